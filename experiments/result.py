"""A run's result: everything that happened, as one JSON with a schema number. Metrics are computed on load."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from engines.bandwidth import Bandwidth
from engines.base import SpeculationCounters
from engines.gpus import Price
from engines.load import GeneratorHealth
from engines.model_shape import ModelShape
from engines.spending import Spent
from engines.timeline import Timeline
from experiments.metrics import Distribution, Metric, RequestMetrics

# 1 had engines without variants, and no trials; 2 said nothing of the load generator; 3 nothing of rented machines.
# All are still read.
SCHEMA = 4


class ResultError(Exception):
    """A file that is not a result of ours, in words for the person who opened it."""


def engine_of(name: str) -> str:
    """The engine's name in a row's name (a contender's key)."""
    return name.partition("+")[0]


@dataclass(frozen=True)  # without slots, so that its metrics are made once
class RequestRow:
    """One request of a run. `repeat` counts from 1 within its kind; a warm-up is never part of a statistic.

    `engine` is the name of its EngineRow. Rows of one `group` belong together (one prompt, one number of users).
    `planned` is when it was meant to be sent, on the run's clock; `index` its place within its trial.
    """

    engine: str
    repeat: int
    warmup: bool
    timeline: Timeline
    group: str = ""
    index: int = 0
    planned: float | None = None

    @cached_property
    def metrics(self) -> RequestMetrics:
        return RequestMetrics(self.timeline, self.planned)


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One contender's trial: when it ran (seconds on the run's clock), what its engine counted meanwhile, whether its
    caches were emptied before it (None: it was not asked to), and how the load generator was."""

    engine: str
    group: str
    repeat: int
    warmup: bool
    began: float
    ended: float
    speculation: SpeculationCounters | None = None
    caches_emptied: bool | None = None
    generator: GeneratorHealth | None = None


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One contender of a run: an engine under one configuration, or why it could not be measured.

    `name` is the engine's name, for a variant with "+" and a word behind it. `error`: it failed, with its log's tail;
    `unavailable`: it cannot do this here, which is no failure. `compared_with` names the row of its baseline.
    """

    name: str
    label: str
    colour: str
    variant: str = ""
    compared_with: str = ""
    unavailable: str | None = None
    version: str | None = None
    command: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    installed: dict[str, str] = field(default_factory=dict)
    start_phases: dict[str, float] = field(default_factory=dict)  # phase -> seconds
    caveat: str | None = None
    error: str | None = None
    log_tail: str = ""
    hardware: str = ""  # in words, of the machine that it had to itself; empty: the result's own
    network_seconds: float | None = None  # there and back to a machine elsewhere; of a rented one in no number
    as_it_is: bool = False  # somebody else's server, of which nothing was switched or emptied

    @property
    def engine(self) -> str:
        return engine_of(self.name)

    @property
    def title(self) -> str:
        """Engine and variant in words."""
        return f"{self.label}, {self.variant}" if self.variant else self.label


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    """One run of one experiment. `started` is UTC, ISO 8601; all other times are seconds on the run's clock."""

    id: str
    experiment: str
    started: str
    host: str
    hardware: dict[str, Any]
    model: str
    model_note: str
    settings: dict[str, Any]
    engines: tuple[EngineRow, ...]
    requests: tuple[RequestRow, ...]
    trials: tuple[TrialRow, ...] = ()
    labels: tuple[str, ...] = ()  # what must be said wherever these numbers are shown
    versions: dict[str, str] = field(default_factory=dict)  # of this tool and of Python
    stopped_early: bool = False
    model_shape: ModelShape | None = None
    bandwidth: Bandwidth | None = None
    price: Price | None = None
    spent: Spent | None = None  # on rented machines
    schema: int = SCHEMA

    def measured(self, engine: str, group: str | None = None) -> list[RequestRow]:
        """The requests of the row named `engine` that count: no warm-ups; failures included."""
        return [
            row
            for row in self.requests
            if row.engine == engine and not row.warmup and (group is None or row.group == group)
        ]

    def failures(self, engine: str, group: str | None = None) -> list[RequestRow]:
        return [row for row in self.measured(engine, group) if row.timeline.error]

    def distribution(self, engine: str, metric: Metric, group: str | None = None) -> Distribution:
        """Over the measured requests that succeeded."""
        return Distribution.of(
            metric.read(row.metrics) for row in self.measured(engine, group) if not row.timeline.error
        )

    def speculation(self, engine: str) -> SpeculationCounters | None:
        """What speculation did over all measured trials; None where nothing was counted."""
        counted = [
            trial.speculation
            for trial in self.trials
            if trial.engine == engine and not trial.warmup and trial.speculation is not None
        ]
        total = SpeculationCounters()
        for one in counted:
            total = total.plus(one)
        return total if counted else None

    @property
    def source_line(self) -> str:
        """What must stand under every picture: model, hardware, host, date."""
        return f"{self.model} · {self.hardware.get('words', 'unknown hardware')} · {self.started[:10]}"

    def to_json(self) -> str:
        value = asdict(self)
        for row in value["requests"]:
            row["timeline"]["arrivals"] = _columns(row["timeline"]["arrivals"])
        return json.dumps(value, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ExperimentResult:
        """Raises ResultError for whatever is no whole result: somebody else's file may hold anything."""
        from pydantic import TypeAdapter, ValidationError  # here: only readers of files pay for loading it

        try:
            value = json.loads(text)
            if not isinstance(value, dict) or "schema" not in value or "experiment" not in value:
                raise ResultError("This file is not a result of the bake-off: it names no experiment and no schema.")
            if value["schema"] > SCHEMA:
                raise ResultError(
                    f"This result was written by a newer version (schema {value['schema']}; this app reads {SCHEMA})."
                )
            for row in value["requests"]:
                row["timeline"]["arrivals"] = _arrivals(row["timeline"]["arrivals"])
            return TypeAdapter(cls).validate_python(value)
        except ValidationError as failure:
            first = failure.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ResultError(f"This file is not a whole result: {where}: {first['msg']}.") from failure
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as failure:
            raise ResultError(f"This file is not a whole result: {failure}.") from failure

    def save(self, folder: Path) -> Path:
        """Write `<folder>/<id>.json` in one step, so that a reader never sees half a file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.id}.json"
        partial = path.with_suffix(f".{secrets.token_hex(4)}.part")  # its own: two visitors may save the same run
        try:
            partial.write_text(self.to_json(), encoding="utf-8")
            partial.replace(path)
        except OSError:  # a full disk: what did fit is of no use, and takes the room of the next run
            partial.unlink(missing_ok=True)
            raise
        return path


def new_id(experiment: str, now: datetime | None = None) -> str:
    moment = now or datetime.now(UTC)
    return f"{experiment}-{moment:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


ARRIVAL_COLUMNS = ("at", "text", "reasoning", "tokens")


def _columns(arrivals: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Arrivals as one list per field: a third of the size of one object per arrival."""
    return {name: [arrival[name] for arrival in arrivals] for name in ARRIVAL_COLUMNS}


def _arrivals(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows = zip(*(columns[name] for name in ARRIVAL_COLUMNS), strict=True)
    return [dict(zip(ARRIVAL_COLUMNS, row, strict=True)) for row in rows]
