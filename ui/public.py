"""Public mode: what a page that is open to everybody allows, and what it remembers of its visitors to hold them to it.

A visitor is known by the address that they come from, kept only as a hash with a key that never leaves this machine.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

from engines.base import EngineError
from experiments.base import Experiment, Host, Plan, PlanError, RequestEnded, Spending, TokensArrived
from experiments.rented import MODELS, RentedMachine
from experiments.result import ExperimentResult
from experiments.run import takes_part
from experiments.servers import ServersMachine
from experiments.tokens import count_tokens

PUBLIC_VARIABLE, TOKEN_VARIABLE = "BAKEOFF_PUBLIC", "BAKEOFF_ADMIN_TOKEN"
LIST_VARIABLES = {"models": "BAKEOFF_PUBLIC_MODELS", "url_hosts": "BAKEOFF_PUBLIC_URL_HOSTS"}
SPACE_VARIABLE = "SPACE_ID"  # set in every Hugging Face Space
SHORTEST_TOKEN = 16  # characters: a shorter one could be guessed
HOUR, DAY = 3600, 86_400
MOST_QUESTIONS, MOST_CHARACTERS = 64, 100_000  # of a run; before anything is multiplied or counted
LAST_RUNS = 5  # of an experiment, from which the wait is foretold
REMEMBERED = 30 * DAY  # how long a finished run's time counts for that

log = logging.getLogger("bakeoff")


@dataclass(frozen=True, slots=True)
class PublicRules:
    """What a public page allows. Raises ValueError for what cannot be.

    `models`: those that may be rented. `url_hosts`: of servers that may be measured by their address; none by default.
    `behind_proxy`: visitors come through a proxy of the host, which appends their address to X-Forwarded-For.
    Every number is also a variable of the environment, `BAKEOFF_PUBLIC_` and its name in capitals.
    """

    models: tuple[str, ...] = tuple(model.id for model in MODELS)
    url_hosts: tuple[str, ...] = ()
    behind_proxy: bool = False
    admin_token: str = field(default="", repr=False)
    line: int = 20  # visitors in line, the one whose run is under way included
    prompt_tokens: int = 16_384
    requests_per_run: int = 2_500
    tokens_per_run: int = 250_000  # of all answers
    run_seconds: int = 1_800
    runs_per_hour: int = 6  # of one visitor, as everything that does not begin with "all"
    all_runs_per_hour: int = 60
    requests_per_day: int = 10_000
    all_requests_per_day: int = 100_000
    tokens_per_day: int = 1_000_000
    all_tokens_per_day: int = 10_000_000
    gpu_seconds_per_day: int = 7_200
    all_gpu_seconds_per_day: int = 43_200
    uploads_per_hour: int = 10
    all_uploads_per_hour: int = 100
    upload_megabytes: int = 16

    def __post_init__(self) -> None:
        if self.admin_token and len(self.admin_token) < SHORTEST_TOKEN:
            raise ValueError(f"{TOKEN_VARIABLE} must have {SHORTEST_TOKEN} characters or more, or be left out.")
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(one.default, int) and not isinstance(one.default, bool) and value < 1:
                raise ValueError(f"{_variable(one.name)} must be 1 or more, not {value}.")

    def admits(self, token: str | None) -> bool:
        """Whether this is the owner's token, in a time that says nothing of it. Without one there is no owner."""
        typed = (token or "").strip().encode()
        return bool(self.admin_token) and hmac.compare_digest(typed, self.admin_token.encode())


def public_rules(
    asked: bool = False, environment: Mapping[str, str] | None = None, hosted: bool = False
) -> PublicRules | None:
    """The rules that options and environment ask for; None: the page is its owner's own.

    `hosted`: the page is somewhere where strangers come, as in a Hugging Face Space, which is seen by itself; there
    only BAKEOFF_PUBLIC=0 switches the rules off. Raises ValueError.
    """
    given = os.environ if environment is None else environment
    hosted = hosted or bool(given.get(SPACE_VARIABLE))
    said = given.get(PUBLIC_VARIABLE, "").strip().lower()
    if said not in ("", "0", "1", "no", "yes", "false", "true"):
        raise ValueError(f"{PUBLIC_VARIABLE} must be 1 or 0, not {said!r}.")
    if not (asked or said in ("1", "yes", "true") or (hosted and not said)):
        return None
    found: dict[str, Any] = {"admin_token": given.get(TOKEN_VARIABLE, "").strip(), "behind_proxy": hosted}
    for one in fields(PublicRules):
        variable = _variable(one.name)
        value = given.get(variable, "").strip()
        if not value or one.name == "admin_token":
            continue
        if one.name in LIST_VARIABLES:
            found[one.name] = tuple(part.strip() for part in value.split(",") if part.strip())
        elif one.name == "behind_proxy":
            found[one.name] = value == "1"
        else:
            try:
                found[one.name] = int(value)
            except ValueError:
                raise ValueError(f"{variable} must be a whole number, not {value!r}.") from None
    return PublicRules(**found)


def _variable(name: str) -> str:
    return LIST_VARIABLES.get(name, f"BAKEOFF_PUBLIC_{name.upper()}")


# Who somebody is


def address_of(client: str, forwarded: str, behind_proxy: bool) -> str:
    """The address that a visitor comes from, as far as nobody can choose it; an IPv6 visitor's network of 64 bits.

    `client`: who connected to us, as the server knows it. `forwarded`: X-Forwarded-For, to whose end every proxy adds
    the address that it saw; what stands before may be forged by the visitor. So it is read from the end, only where a
    proxy of the host is expected and connected from inside its network, up to the first address of the open network.
    """
    if behind_proxy and not _is_global(client):
        for part in reversed(forwarded.split(",")):
            if _is_global(part.strip()):
                client = part.strip()
                break
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _is_global(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


# What a run needs


@dataclass(frozen=True, slots=True)
class Load:
    """What a plan asks of the engines: `requests` and output `tokens` over all contenders, warm-ups included.

    Users who ask again and again are counted with one request each; how many more there are shows during the run.
    """

    experiment: str
    requests: int
    tokens: int
    gpus: int = 0


def load_of(experiment: Experiment, plan: Plan, machine: Host, rules: PublicRules) -> Load:
    """The plan's load, where the rules allow the plan; raises PlanError with the limit. May take a moment."""
    rented = isinstance(machine, RentedMachine)
    if rented and machine.model not in rules.models:
        listed = ", ".join(rules.models)
        raise PlanError("model", f"This page is open to everybody and offers these models only: {listed}.")
    if rented and plan.dollars_per_hour is not None:
        # It would stand in for the price that the budgets are counted by.
        raise PlanError("dollars_per_hour", "On this page the price is the cloud's own; leave the field empty.")
    if isinstance(machine, ServersMachine):
        for server in machine.servers:
            try:
                machine.url_host.check(server.url)
            except EngineError as error:
                raise PlanError(f"url_{server.place}", error.message) from None
    prefix = (len(getattr(plan, "prefix", "")) + 1) * getattr(plan, "prefix_times", 0)
    if len(plan.prompt) + prefix > MOST_CHARACTERS:
        raise PlanError(
            "prompt", f"On this page a run's questions and prefix have {MOST_CHARACTERS:,} characters at most."
        )
    if len(plan.prompts) > MOST_QUESTIONS:
        raise PlanError("prompt", f"On this page a run has {MOST_QUESTIONS} questions at most.")
    able = tuple(one for one in experiment.contenders(plan, machine) if not one.unavailable)
    requests = tokens = 0
    asked: set[str] = set()
    for trial in experiment.trials(plan, able):
        taking_part = sum(takes_part(trial, contender.key) for contender in able)
        requests += len(trial.prompts) * taking_part
        tokens += len(trial.prompts) * taking_part * (trial.max_tokens or plan.max_tokens)
        asked.update(trial.prompts)
    for what, wanted, most in (
        ("requests", requests, rules.requests_per_run),
        ("output tokens", tokens, rules.tokens_per_run),
    ):
        if wanted > most:
            raise PlanError(
                "repeats",
                f"This run would take {wanted:,} {what}; on this page a run may take {most:,}. Choose fewer repeats, "
                "users or engines, or a shorter answer.",
            )
    # What a visitor calls a model elsewhere is never looked for on this machine.
    _check_prompts("" if isinstance(machine, ServersMachine) else machine.model, asked, rules.prompt_tokens)
    hardware = machine.hardware
    return Load(experiment.name, requests, tokens, hardware.gpu_count if hardware and hardware.gpu else 0)


def _check_prompts(model: str, prompts: set[str], most: int) -> None:
    counted = [count_tokens(model, prompt) for prompt in sorted(prompts, key=len)[-MOST_QUESTIONS:]]
    longest, exactly = max(counted, default=(0, True))
    if longest <= most:
        return
    words = f"has {longest:,} tokens" if exactly else f"may have up to {longest:,} tokens"
    how = "" if exactly else " (its bytes: the model's own way of counting is not at hand, and never counts more)"
    raise PlanError("prompt", f"The longest prompt {words}{how}; on this page it may have {most:,}. Shorten it.")


# What visitors have used


@dataclass(frozen=True, slots=True)
class Use:
    """What one visitor used at one moment (`at`: seconds since 1970). `seconds`: a finished run's time from its turn to
    its end; None for one that was stopped, failed, or is no run."""

    visitor: str
    at: float = 0.0
    runs: int = 0
    requests: int = 0
    tokens: int = 0
    gpu_seconds: float = 0.0
    uploads: int = 0
    guesses: int = 0  # of the owner's token
    experiment: str = ""
    planned_tokens: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """`field` of Use, of which so much may be used within `window` seconds."""

    field: Literal["runs", "requests", "tokens", "gpu_seconds", "uploads"]
    words: str
    window: int
    rule: str  # of a visitor, in PublicRules; with "all_" before it, of everybody

    @property
    def per(self) -> str:
        return "per hour" if self.window == HOUR else "per day"


QUOTAS = (
    Quota("runs", "runs", HOUR, "runs_per_hour"),
    Quota("requests", "requests", DAY, "requests_per_day"),
    Quota("tokens", "output tokens", DAY, "tokens_per_day"),
    Quota("gpu_seconds", "GPU-seconds", DAY, "gpu_seconds_per_day"),
    Quota("uploads", "uploads", HOUR, "uploads_per_hour"),
)
MOST_GUESSES = 10  # of the owner's token per hour and visitor


class Tally:
    """What everybody used, a line per use in `folder`/visits.jsonl, so that limits outlive a restart. Thread-safe.

    Without a folder it forgets when the app ends.
    """

    def __init__(self, folder: Path | None = None, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._path = folder / "visits.jsonl" if folder else None
        self._key = _kept_key(folder) if folder else secrets.token_bytes(32)
        self._guard = threading.Lock()
        self._uses: list[Use] = self._read()
        self._under_way: list[Use] = []

    def name_of(self, address: str) -> str:
        """What a visitor is called here: a keyed hash, which does not lead back to the address."""
        return hmac.new(self._key, address.encode(), hashlib.sha256).hexdigest()[:16]

    def refusal(self, rules: PublicRules, wanted: Use) -> str:
        """Why `wanted` is too much now, with the limit and when it frees; empty where it is not."""
        with self._guard:
            for quota in QUOTAS:
                amount = getattr(wanted, quota.field)
                if not amount and not (quota.field == "gpu_seconds" and wanted.runs):
                    continue
                limits = [(wanted.visitor, getattr(rules, quota.rule)), ("", getattr(rules, f"all_{quota.rule}"))]
                for who, limit in limits:
                    words = self._refused(quota, who, limit, amount)
                    if words:
                        return words
        return ""

    def _refused(self, quota: Quota, visitor: str, limit: float, amount: float) -> str:
        now = self._now()
        uses = [
            (use.at, getattr(use, quota.field))
            for use in [*self._uses, *self._under_way]
            if visitor in ("", use.visitor) and use.at > now - quota.window and getattr(use, quota.field)
        ]
        used = sum(one for _, one in uses)
        needed = amount or 1  # GPU-seconds cannot be told before: one must be left
        if used + needed <= limit:
            return ""
        whose = "You have" if visitor else "All visitors together have"
        said = f"{whose} used {used:,.0f} of {limit:,} {quota.words} {quota.per}"
        said += f", and this needs {amount:,.0f} more" if amount > 1 else ""
        if needed > limit:
            return f"{said}, which is more than is ever allowed at once."
        freed = now
        for at, one in sorted(uses):
            used, freed = used - one, at
            if used + needed <= limit:
                break
        free = freed + quota.window
        return f"{said}. Enough is free again at {_time_of_day(free)}, {in_words(free - now)} from now."

    def guesses_left(self, visitor: str) -> bool:
        """Whether this visitor may try the owner's token again."""
        return sum(use.guesses for use in self.within(HOUR) if use.visitor == visitor) < MOST_GUESSES

    def begin(self, use: Use) -> Use:
        """A use that lasts, counted as foreseen until it is settled."""
        use = replace(use, at=self._now())
        with self._guard:
            self._under_way.append(use)
        return use

    def settle(self, begun: Use, used: Use) -> None:
        """What was begun is over; `used` counts instead, from when it began."""
        with self._guard:
            self._under_way.remove(begun)
        self.add(replace(used, at=begun.at))

    def add(self, use: Use) -> None:
        use = use if use.at else replace(use, at=self._now())
        with self._guard:
            self._uses = [*filter(self._counts, self._uses), use]
            if self._path:
                try:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    with self._path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(use)) + "\n")
                except OSError as failure:
                    log.warning("what visitors used cannot be written to %s: %s", self._path, failure.strerror)

    def within(self, seconds: float) -> list[Use]:
        """Everything of the last `seconds`, runs under way included."""
        with self._guard:
            return [use for use in [*self._uses, *self._under_way] if use.at > self._now() - seconds]

    def foreseen_seconds(self, load: Load) -> float | None:
        """How long a run of this load takes, from the last runs of its experiment that were finished here."""
        with self._guard:
            rates = [
                use.seconds / use.planned_tokens
                for use in self._uses
                if use.seconds is not None and use.planned_tokens and use.experiment == load.experiment
            ]
        return median(rates[-LAST_RUNS:]) * load.tokens if rates else None

    def _counts(self, use: Use) -> bool:
        return use.at > self._now() - (DAY if use.seconds is None else REMEMBERED)

    def _read(self) -> list[Use]:
        if self._path is None or not self._path.is_file():
            return []
        found, known = [], {one.name for one in fields(Use)}
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                use = Use(**{name: value for name, value in entry.items() if name in known})
                found += [use] if self._counts(use) else []
            except (ValueError, TypeError, AttributeError):
                continue  # the end of a line that was being written when the machine went down
        return found


def _kept_key(folder: Path) -> bytes:
    """The key of the hashes, kept beside them for its owner's eyes only."""
    path = folder / "visitor-key"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    return path.read_bytes()


def in_words(seconds: float) -> str:
    """A wait as people say it."""
    if seconds < 45:
        return "less than a minute"
    minutes = math.ceil(seconds / 60 - 0.25)
    if minutes < 100:
        return f"about {minutes} minute{'' if minutes == 1 else 's'}"
    hours = round(seconds / HOUR)
    return f"about {hours} hour{'' if hours == 1 else 's'}"


def _time_of_day(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%H:%M} UTC"


# What a run under way uses


class Watch:
    """Counts what a run under way really uses, and stops it at the limits of one run."""

    def __init__(self, rules: PublicRules, load: Load, visitor: str, tally: Tally, stop: Callable[[], None]) -> None:
        self.rules, self.load, self._tally, self._stop = rules, load, tally, stop
        self.reason = ""
        self.requests = self.tokens = 0
        self._gpu_seconds: float | None = None  # as the meter of rented machines says
        self._clock = time.monotonic
        self._began = self._clock()
        planned = Use(visitor, runs=1, requests=load.requests, tokens=load.tokens, experiment=load.experiment)
        self._begun = tally.begin(planned)
        self._gpu_seconds_left = self._left()
        self.seconds = min(float(rules.run_seconds), self._gpu_seconds_left / load.gpus if load.gpus else math.inf)

    def take(self, event: object) -> None:
        match event:
            case RequestEnded():
                self.requests += 1
            case TokensArrived(arrival=arrival):
                self.tokens += 1 if arrival.tokens is None else arrival.tokens
            case Spending(spent=spent):
                self._gpu_seconds = spent.gpu_seconds
        if self.requests > self.rules.requests_per_run:
            self.end(f"Stopped at {self.rules.requests_per_run:,} requests, the most that one run may take here.")
        elif self.tokens > self.rules.tokens_per_run:
            self.end(f"Stopped at {self.rules.tokens_per_run:,} output tokens, the most that one run may take here.")
        elif self._gpu_seconds is not None and self._gpu_seconds > self._gpu_seconds_left:
            self.end("Stopped: your GPU-seconds of today, or everybody's, are used up.")

    def time_up(self) -> None:
        self.end(f"Stopped after {in_words(self.seconds)}, the longest that a run may take here now.")

    def end(self, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            self._stop()

    def close(self, result: ExperimentResult | None) -> None:
        """The run is over, with this result if with any."""
        finished = result is not None and not result.stopped_early and not any(row.error for row in result.engines)
        passed = self._clock() - self._began
        gpu_seconds = passed * self.load.gpus if self._gpu_seconds is None else self._gpu_seconds
        used = replace(
            self._begun,
            requests=self.requests,
            tokens=self.tokens,
            gpu_seconds=gpu_seconds,
            planned_tokens=self.load.tokens,
            seconds=passed if finished and not self.reason else None,
        )
        self._tally.settle(self._begun, used)

    def _left(self) -> float:
        """GPU-seconds that this visitor and all visitors have left today."""
        today = self._tally.within(DAY)
        mine = sum(use.gpu_seconds for use in today if use.visitor == self._begun.visitor)
        everybody = sum(use.gpu_seconds for use in today)
        left = min(self.rules.gpu_seconds_per_day - mine, self.rules.all_gpu_seconds_per_day - everybody)
        return max(0.0, left)
