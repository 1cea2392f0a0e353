"""A run against servers that somebody else has started: what a visitor types, and the host of one such run.

A server is measured as it is, by the same `experiments.run`. What cannot be known from here stays unknown and is said:
its hardware, who else is asking it, and what it keeps or guesses.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from engines.addresses import ServerURL, read_url
from engines.bandwidth import Bandwidth
from engines.base import EngineConfig, EngineError
from engines.compatible import ANY, PRESETS, Preset, guessed, preset_named, server_engine
from engines.discovery import Found, NoModelList, look
from engines.hardware import Hardware
from engines.local import ServedElsewhere, Serving
from engines.model_shape import ModelShape
from engines.openai_stream import Endpoint
from engines.url_host import COLOURS, UrlHost
from experiments.base import Experiment, Plan, PlanError, Setting, check_whole
from experiments.levels import LEVELS, MOST_USERS, ConcurrencyPlan
from experiments.metrics import MILLISECONDS

MOST_SERVERS = len(COLOURS)
POLITE_USERS = 32  # at once, on a server that may have others to serve
LONGEST_KEY, LONGEST_MODEL = 500, 300  # characters
KEY = re.compile(r"[!-~]+")  # what a header can carry: anything else could end it
# Settings of an experiment that mean nothing for somebody else's server: they speak of engines that the app starts.
OURS_ALONE = ("sequential_limit", "measure_all")
UNKNOWN_LABEL = (
    "Somebody else's servers, measured from here as they are: their hardware, who else asks them and whether their "
    "caches are on cannot be known, and the network to them is in every time."
)
RACE_LABEL = "Race: the servers were asked at the same time; any that share a machine slowed each other down."


@dataclass(frozen=True, slots=True)
class NamedServer:
    """A server as a visitor named it. `place` counts from 1; `title`: what it is called in the result.

    `model` empty: the only one that it serves. The key is in no text that this makes, and in no result.
    """

    place: int
    url: ServerURL
    title: str
    preset: Preset = ANY
    model: str = ""
    key: str = field(default="", repr=False)

    @property
    def engine(self) -> str:
        return engine_name(self.place)


def engine_name(place: int) -> str:
    return f"server-{place}"


def server_settings(place: int) -> tuple[Setting, ...]:
    """The fields of one place for a server."""
    return (
        Setting(
            f"preset_{place}",
            "choice",
            f"Server {place}: kind",
            "What it understands beside plain requests.",
            ANY.name,
            choices={preset.label: preset.name for preset in PRESETS},
        ),
        Setting(f"url_{place}", "line", "Address", "With or without /v1.", ""),
        Setting(f"key_{place}", "line", "Key", "Only where the server wants one.", ""),
        Setting(f"model_{place}", "line", "Model", "Left empty: the only one that it serves.", ""),
    )


SERVER_SETTINGS: tuple[Setting, ...] = tuple(
    setting for place in range(1, MOST_SERVERS + 1) for setting in server_settings(place)
)
POLITE = Setting(
    "most_users",
    "whole",
    "At most so many users at once",
    "Somebody else's server may have others to serve, and may cost money: raise this on purpose only.",
    POLITE_USERS,
    1,
    MOST_USERS,
    group="measure",
)


def own_settings(experiment: Experiment) -> tuple[Setting, ...]:
    """The experiment's settings as they suit somebody else's server."""
    found = []
    for setting in (one for one in experiment.settings if one.on_page):
        if setting.name == "levels":
            polite = ", ".join(str(level) for level in LEVELS if level <= POLITE_USERS)
            found += [replace(setting, default=polite), POLITE]
        elif setting.name not in OURS_ALONE:
            found.append(setting)
    return tuple(found)


def url_settings(experiment: Experiment) -> tuple[Setting, ...]:
    """Everything that a visitor sets, in the order of the page's fields: the experiment's own, then the servers."""
    return own_settings(experiment) + SERVER_SETTINGS


def read_server(place: int, preset: str, url: str, key: str, model: str = "", title: str = "") -> NamedServer:
    """What was typed for one server; raises PlanError, which never repeats the key."""
    try:
        kind = preset_named(preset)
    except EngineError as error:
        raise PlanError(f"preset_{place}", error.message) from None
    try:
        address = read_url(url)
    except EngineError as error:
        raise PlanError(f"url_{place}", f"Server {place}: {error.message}") from None
    return NamedServer(
        place,
        address,
        title.strip() or (f"Server {place}" if kind is ANY else f"Server {place} ({kind.label})"),
        kind,
        _checked_model(place, model),
        read_key(place, key),
    )


def read_key(place: int, typed: str) -> str:
    """Raises PlanError."""
    key = typed.strip()
    if key and not (KEY.fullmatch(key) and len(key) <= LONGEST_KEY):
        raise PlanError(f"key_{place}", f"Server {place}: the key holds a space or a letter that no key can have.")
    return key


def _checked_model(place: int, typed: str) -> str:
    model = typed.strip()
    if len(model) > LONGEST_MODEL or not model.isprintable():
        raise PlanError(f"model_{place}", f"Server {place}: this is no name of a model.")
    return model


def read_servers(chosen: Sequence[str], values: Mapping[str, Any]) -> tuple[NamedServer, ...]:
    """The servers among the `chosen` engines' names for which an address was typed; raises PlanError."""
    found = []
    for place in range(1, MOST_SERVERS + 1):
        preset, url, key, model = (str(values.get(one.name) or one.default) for one in server_settings(place))
        preset = next((one.name for one in PRESETS if preset in (one.name, one.label)), preset)
        if engine_name(place) in chosen and url.strip():
            found.append(read_server(place, preset, url, key, model))
    if not found:
        raise PlanError("url_1", "Type the address of at least one server, and choose it.")
    return tuple(found)


def read_run(
    experiment: Experiment, host: UrlHost, servers: tuple[NamedServer, ...], values: Mapping[str, Any]
) -> tuple[Plan, ServersMachine]:
    """The plan of what was typed and the machine to run it on; raises PlanError.

    `values` by field. Where one is as the experiment itself suggests it, what suits somebody else's server counts.
    """
    suggested = {setting.name: setting.default for setting in experiment.settings}
    polite = {setting.name: setting for setting in own_settings(experiment)}
    typed = {
        name: polite[name].default if name in polite and value == suggested.get(name) else value
        for name, value in values.items()
    }
    plan = experiment.read_plan(tuple(server.engine for server in servers), typed)
    if isinstance(plan, ConcurrencyPlan):
        most = POLITE.read(typed.get(POLITE.name) or POLITE.default)
        check_whole(POLITE.name, POLITE.label, most, 1, MOST_USERS)
        if max(plan.levels) > most:
            raise PlanError(
                "levels",
                f"{max(plan.levels)} users at once may be too many for somebody else's server: the limit is {most}. "
                f"To ask for more on purpose, raise “{POLITE.label}”.",
            )
    return plan, ServersMachine(host, servers, race=plan.race)


class ServersMachine:
    """The host of one run: the servers that one visitor has named."""

    draft_model: str | None = None
    hardware: Hardware | None = None
    resident_together = True
    model_note = ""

    def __init__(self, host: UrlHost, servers: Sequence[NamedServer], race: bool = False) -> None:
        self.url_host, self.servers = host, tuple(servers)
        self.name, self.label = host.name, host.label
        self.engines = tuple(
            server_engine(server.engine, server.title, COLOURS[server.place - 1], server.preset) for server in servers
        )
        self.said: tuple[str, ...] = (UNKNOWN_LABEL, RACE_LABEL) if race and len(self.servers) > 1 else (UNKNOWN_LABEL,)
        self._models = {server.engine: server.model for server in servers}

    @property
    def model(self) -> str:
        return self.model_label

    @property
    def model_label(self) -> str:
        """Of all servers; those that were not named are known once their server has been asked."""
        return " / ".join(dict.fromkeys(model for model in self._models.values() if model)) or "as served"

    def config(self, name: str) -> EngineConfig:
        return EngineConfig(self._models[name])

    def ready(self, name: str, config: EngineConfig | None = None) -> Serving:
        """Ask the server for its models and how far away it is. Blocks; raises EngineError."""
        server = next(one for one in self.servers if one.engine == name)
        self.url_host.show(name, "starting", "asking it for its models")
        try:
            serving = asyncio.run(self._found(server))
        except EngineError:
            self.url_host.show(name, "down", "it could not be asked")
            raise
        self.url_host.show(name, "ready")
        return serving

    async def _found(self, server: NamedServer) -> Serving:
        self.url_host.check(server.url)
        found, problem = await _looked(server, self.url_host.public)
        model = server.model or _only_model(found)
        self._models[server.engine] = model
        preset = guessed(server.preset, found.owner, server.url.base_url)
        place = server.place - 1
        engine = server_engine(server.engine, server.title, COLOURS[place], preset)
        distance = found.round_trip_seconds
        return Serving(
            endpoint=Endpoint(engine, server.url.base_url, model, server.key, found.address),
            config=ServedElsewhere(server.url.base_url, preset.name, model),
            command="",
            version=None,
            installed={},
            phases=(),
            caveat=_caveat(server.title, preset, found, problem),
            network_seconds=distance,
        )

    def settle(self, name: str) -> bool:
        return True

    def busy(self, name: str) -> AbstractContextManager[None]:
        return self.url_host.busy(name)

    def in_use(self) -> AbstractContextManager[None]:
        return self.url_host.in_use()

    def has_prediction_head(self) -> bool:
        return False

    def model_shape(self) -> ModelShape | None:
        return None

    def memory_bandwidth(self, shape: ModelShape) -> Bandwidth | None:
        return None


async def _looked(server: NamedServer, public: bool) -> tuple[Found, str]:
    """What the server said, and why it gave no list of its models where the visitor has named one anyway."""
    try:
        found = await look(server.url, server.key, public)
    except NoModelList as error:
        if not server.model or error.found is None:
            raise
        return error.found, error.message
    if server.model and found.models and server.model not in found.models:
        return found, f"Its list of models does not have {server.model}."
    return found, ""


def _only_model(found: Found) -> str:
    if len(found.models) == 1:
        return found.models[0]
    if not found.models:
        raise EngineError("It serves no model. Load one there, or type its name.")
    some = ", ".join(found.models[:5]) + (" …" if len(found.models) > 5 else "")
    raise EngineError(f"It serves {len(found.models)} models. Choose one of them: {some}")


def _caveat(title: str, preset: Preset, found: Found, problem: str) -> str:
    """What the reader must know of this server's numbers."""
    where = "on this machine, with which it shares its processor" if found.on_this_machine else "somewhere else"
    kind = f", as {preset.label}" if preset is not ANY else ""
    words = f"{title} answers {where}{kind}; {_milliseconds(found.round_trip_seconds)} there and back are in its times."
    words += f" It reports {preset.reports}."
    if not preset.exact:
        words += " It cannot be made to write an exact number of tokens, so its answers may end earlier."
    return words + (f" ⚠ {problem}" if problem else "")


def _milliseconds(seconds: float) -> str:
    value = seconds * MILLISECONDS
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.2g} ms"


@dataclass(frozen=True, slots=True)
class Looked:
    """What looking for models came to: the models' ids, and a sentence to show. `problem`: it is one."""

    models: tuple[str, ...]
    words: str
    problem: bool = False


async def look_for_models(server: NamedServer, public: bool = False) -> Looked:
    """For the page and the command line; what goes wrong is in the words."""
    try:
        found = await look(server.url, server.key, public)
    except EngineError as error:
        return Looked((), error.message, problem=True)
    preset = guessed(server.preset, found.owner, server.url.base_url)
    count = len(found.models)
    said = f"{count} model{'' if count == 1 else 's'}" if count else "No model: load one there, or type its name"
    kind = f" It seems to be {preset.label}." if preset is not server.preset else ""
    away = f"{_milliseconds(found.round_trip_seconds)} there and back"
    return Looked(found.models, f"{said}. {away}.{kind}", problem=not count)


# On the command line


def servers_of(
    typed: Sequence[str], model: str, models: Sequence[str], keys: Mapping[str, str], kinds: Sequence[str]
) -> tuple[NamedServer, ...]:
    """Servers as "name=URL" or "URL"; `models` and `kinds` as "name=value", or one value for the only server.

    `keys` by the server's name, "" for the only one. Raises PlanError.
    """
    if not 1 <= len(typed) <= MOST_SERVERS:
        raise PlanError("server", f'Name one to {MOST_SERVERS} servers: --server "name=http://127.0.0.1:8000".')
    named = [_named(one, place) for place, one in enumerate(typed, start=1)]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise PlanError("server", "Give each server a name of its own.")
    by_name, kind_of = _by_name("server-model", models, names), _by_name("preset", kinds, names)
    key_of = {name or names[0]: key for name, key in keys.items()}
    if "" in keys and len(names) > 1:
        raise PlanError("key_variable", "With several servers say whose key it is: --key-variable name=VARIABLE.")
    if strange := set(key_of) - set(names):
        raise PlanError("key_variable", f"There is no server called {strange.pop()}.")
    return tuple(
        read_server(place, kind_of.get(name, ANY.name), url, key_of.get(name, ""), by_name.get(name, "") or model, name)
        for place, (name, url) in enumerate(named, start=1)
    )


def _named(typed: str, place: int) -> tuple[str, str]:
    name, equals, url = typed.partition("=")
    if not equals or "://" in name:
        return f"Server {place}", typed
    return name.strip() or f"Server {place}", url


def _by_name(option: str, typed: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    found = {}
    for one in typed:
        name, equals, value = one.partition("=")
        if not equals and len(names) == 1:
            name, value = names[0], one
        if name not in names:
            raise PlanError(option.replace("-", "_"), f"--{option} needs a server's name: --{option} {names[0]}=...")
        found[name] = value
    return found
