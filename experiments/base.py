"""What an experiment is, what happens while it runs, and what it needs of a host."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from engines.bandwidth import Bandwidth
from engines.base import Engine, EngineConfig, EngineError
from engines.hardware import Hardware
from engines.local import Serving
from engines.model_shape import ModelShape
from engines.spending import Spent
from engines.timeline import Arrival
from experiments.result import EngineRow, ExperimentResult, RequestRow, TrialRow

if TYPE_CHECKING:
    import plotly.graph_objects

DEFAULT_PROMPT = "Write a short paragraph about LLM inference serving optimizations."
TOKEN_LIMIT = 2048
REPEAT_LIMIT = 20
MOST_DOLLARS = 10_000
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(\D|$))")  # the comma of "1,000"; that of "2,5" is none


class PlanError(ValueError):
    """A setting that cannot be used: `field` names it, so that the message stands where it was typed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class Host(Protocol):
    """Where engines run. `hardware`: None where nobody here can know it; `said`: what every result from it must say."""

    name: str
    label: str
    model_note: str
    draft_model: str | None
    engines: tuple[Engine, ...]

    @property
    def model(self) -> str: ...
    @property
    def model_label(self) -> str: ...
    @property
    def hardware(self) -> Hardware | None: ...

    resident_together: bool
    said: tuple[str, ...]

    def config(self, name: str) -> EngineConfig: ...
    def ready(self, name: str, config: EngineConfig | None = None) -> Serving: ...
    def settle(self, name: str) -> bool: ...
    def busy(self, name: str) -> AbstractContextManager[None]: ...
    def in_use(self) -> AbstractContextManager[None]: ...
    def has_prediction_head(self) -> bool: ...
    def model_shape(self) -> ModelShape | None: ...
    def memory_bandwidth(self, shape: ModelShape) -> Bandwidth | None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Raises PlanError for what cannot be run.

    `race`: all engines at once, instead of taking turns on the machine they share. `dollars_per_hour`: the price of the
    hardware, where None is the price that is known of it, if any. An experiment with settings of its own extends this.
    """

    prompt: str
    engines: tuple[str, ...]
    repeats: int = 3
    warmups: int = 2
    max_tokens: int = 256
    fixed_length: bool = False
    race: bool = False
    temperature: float = 0.0
    seed: int = 42
    dollars_per_hour: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise PlanError("prompt", "Type a prompt first: there is nothing to answer.")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):
            raise PlanError("prompt", "The prompt holds half a character, which no engine can read. Please retype it.")
        if not self.engines:
            raise PlanError("engines", "Choose at least one engine.")
        check_whole("repeats", "Repeats", self.repeats, 1, REPEAT_LIMIT)
        check_whole("warmups", "Warm-ups", self.warmups, 0, REPEAT_LIMIT)
        check_whole("max_tokens", "Answer length", self.max_tokens, 1, TOKEN_LIMIT)
        if self.dollars_per_hour is not None:
            check_number("dollars_per_hour", "Price per hour", self.dollars_per_hour, 0, MOST_DOLLARS)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt's lines that are not empty, for experiments that ask several."""
        return tuple(line.strip() for line in self.prompt.splitlines() if line.strip())


def check_whole(field: str, label: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        shown = "nothing" if value is None else value
        raise PlanError(field, f"{label} must be a whole number from {low} to {high}, not {shown}.")


def check_number(field: str, label: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        shown = "nothing" if value is None else value
        raise PlanError(field, f"{label} must be a number from {low:g} to {high:g}, not {shown}.")


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a plan (`name`) as people set it: on the page and, as `--flag`, on the command line.

    `kind`: a text, one line of it, a whole number, a number, a switch, one of several `choices`, or (whole) numbers
    with commas between them. `on_page`: else it is for the command line alone.
    """

    name: str
    kind: Literal["text", "line", "whole", "number", "switch", "choice", "wholes", "numbers"]
    label: str
    info: str
    default: Any
    low: float = 0
    high: float = 0
    step: float = 1
    choices: Mapping[str, Any] = field(default_factory=dict)  # words -> value
    flag: str = ""  # without the dashes; empty: the name
    group: Literal["ask", "measure"] = "ask"  # what is asked, or how it is measured and judged
    on_page: bool = True

    @property
    def option(self) -> str:
        return self.flag or self.name.replace("_", "-")

    def read(self, value: Any) -> Any:
        """The plan's value of what was typed or chosen; raises PlanError."""
        if self.kind == "wholes":
            return _wholes(self.name, self.label, value)
        if self.kind == "numbers":
            return _numbers(self.name, self.label, value)
        if self.kind == "choice":
            return self.choices.get(value, value)
        if self.kind in ("whole", "number") and isinstance(value, str):
            value = _typed_number(self.name, self.label, value)
        if self.kind == "whole" and isinstance(value, float) and value.is_integer():
            return int(value)
        return value or "" if self.kind in ("text", "line") else value


def _typed_number(name: str, label: str, value: str) -> float | None:
    """None for an empty field. Raises PlanError."""
    try:
        return float(THOUSANDS.sub("", value.strip().lstrip("$"))) if value.strip() else None
    except ValueError:
        raise PlanError(name, f"{label} must be a number, not {value!r}.") from None


def _wholes(name: str, label: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, str):
        return tuple(value or ())
    try:
        return tuple(int(part) for part in value.replace(";", ",").split(",") if part.strip())
    except ValueError:
        raise PlanError(name, f"{label} must be whole numbers with commas between them, not {value!r}.") from None


def _numbers(name: str, label: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, str):
        return tuple(value or ())
    try:
        return tuple(float(part) for part in value.replace(";", ",").split(",") if part.strip())
    except ValueError:
        raise PlanError(name, f"{label} must be numbers with commas between them, not {value!r}.") from None


PROMPT = Setting("prompt", "text", "Your question", "", DEFAULT_PROMPT)
REPEATS = Setting(
    "repeats", "whole", "Repeats", "Measured runs per engine; more narrow the spread.", 3, 1, 20, group="measure"
)
WARMUPS = Setting("warmups", "whole", "Warm-ups", "Runs before them that do not count.", 2, 0, 5, group="measure")
ANSWER_LENGTH = Setting(
    "max_tokens", "whole", "Answer length", "In tokens, at most or exactly.", 256, 8, 1024, 8, flag="tokens"
)
LENGTH_KIND = Setting(
    "fixed_length",
    "choice",
    "When does an answer end?",
    "An exact length gives every engine the same work; the text may ramble after its natural end.",
    False,
    choices={
        "Where the model ends it, or at that length": False,
        "At exactly that many tokens, on every engine": True,
    },
    flag="exact-length",
)
PRICE = Setting(
    "dollars_per_hour",
    "number",
    "Price of this hardware, $ per hour",
    "For the cost per million tokens. Left empty: the list price of a rented GPU, where there is one.",
    None,
    0,
    MOST_DOLLARS,
    0.01,
    group="measure",
)
RACE = Setting(
    "race",
    "switch",
    "Race: all engines at once",
    "Fun to watch, but they share this machine and slow each other. By default they take turns.",
    False,
    group="measure",
)


@dataclass(frozen=True, slots=True)
class Contender:
    """One thing that is measured: an engine under one configuration.

    `key` names its rows in a result: the engine's name, for a variant with "+" and a word behind it. `changes` are
    fields of EngineConfig that differ from the host's plain one. `compared_with` is the key of the contender whose
    ratio to this one is of interest. `unavailable`: why it cannot run here; it then is a row with a reason.
    """

    key: str
    engine: Engine
    variant: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    compared_with: str = ""
    unavailable: str = ""

    def config(self, host: Host) -> EngineConfig:
        return replace(host.config(self.engine.name), **self.changes)


def plain_contenders(plan: Plan, host: Host) -> tuple[Contender, ...]:
    """Every chosen engine as it is, with nothing switched on."""
    by_name = {engine.name: engine for engine in host.engines}
    return tuple(Contender(name, by_name[name]) for name in plan.engines)


def checked(contender: Contender, host: Host) -> Contender:
    """The contender, marked as unavailable where its engine says that it cannot do this."""
    try:
        contender.engine.serve_command(contender.config(host))
    except EngineError as error:
        return replace(contender, unavailable=error.message)
    return contender


@dataclass(frozen=True, slots=True)
class Trial:
    """What one contender is asked at a time: one request per prompt, `spacing` seconds between planned arrivals.

    Rows with the same `group` are averaged together. With `sustained_seconds` each prompt is a user who asks again
    as soon as the answer is there, for that long. `only`: the keys of the contenders that take part; empty: all.
    `max_tokens`: of each answer, where it differs from the plan's.
    """

    words: str  # for the progress line: "repeat 2 of 3"
    repeat: int
    warmup: bool
    prompts: tuple[str, ...]
    group: str = ""
    spacing: float = 0.0
    sustained_seconds: float | None = None
    empty_caches: bool = False
    only: tuple[str, ...] = ()
    max_tokens: int | None = None


# What happens during a run, in the order in which it happens. `engine` is always a contender's key.


@dataclass(frozen=True, slots=True)
class EngineReady:
    row: EngineRow


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """It could not be started, or (`row.unavailable`) cannot do what was asked."""

    row: EngineRow


@dataclass(frozen=True, slots=True)
class TrialStarted:
    engine: str
    trial: Trial
    of: int  # trials of the whole run, over all contenders
    done: int


@dataclass(frozen=True, slots=True)
class RequestStarted:
    engine: str
    index: int = 0  # within its trial


@dataclass(frozen=True, slots=True)
class TokensArrived:
    engine: str
    arrival: Arrival
    index: int = 0


@dataclass(frozen=True, slots=True)
class RequestEnded:
    row: RequestRow


@dataclass(frozen=True, slots=True)
class TrialEnded:
    row: TrialRow


@dataclass(frozen=True, slots=True)
class Spending:
    """What a run on rented machines has cost so far, and may cost at most (None: as much as it takes)."""

    spent: Spent
    limit: float | None


@dataclass(frozen=True, slots=True)
class RunEnded:
    result: ExperimentResult


Event = (
    EngineReady
    | EngineFailed
    | TrialStarted
    | RequestStarted
    | TokensArrived
    | RequestEnded
    | TrialEnded
    | Spending
    | RunEnded
)
Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Table:
    """A result's table in words: headings, one row per contender or level."""

    headings: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture of a result. `draw` gives None where the result has nothing for it."""

    name: str
    title: str
    draw: Callable[[ExperimentResult], plotly.graph_objects.Figure | None]


@dataclass(frozen=True, slots=True)
class Experiment:
    """One row of the table of experiments: its words, what it runs, and how its result is told."""

    name: str
    title: str
    question: str
    mechanism: str
    plan: type[Plan]
    settings: tuple[Setting, ...]
    contenders: Callable[[Plan, Host], tuple[Contender, ...]]
    trials: Callable[[Plan, tuple[Contender, ...]], tuple[Trial, ...]]
    headline: Callable[[ExperimentResult], str]
    table: Callable[[ExperimentResult], Table]
    charts: tuple[Chart, ...]
    notes: Callable[[ExperimentResult], list[str]] = lambda result: []
    # Whether a trial of the contender with this key would take longer than anybody waits, by what it was seen to do.
    too_long: Callable[[Plan, Trial, str, Sequence[RequestRow]], bool] = lambda plan, trial, key, seen: False

    def read_plan(self, engines: tuple[str, ...], values: Mapping[str, Any]) -> Plan:
        """The plan of what was typed: values by field, the settings' defaults where one is missing."""
        typed = {setting.name: setting.read(values.get(setting.name, setting.default)) for setting in self.settings}
        return self.plan(engines=engines, **typed)
