"""A run's result: everything that happened, as one JSON with a schema number. Metrics are computed on load."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engines.base import Usage
from engines.timeline import Arrival, Timeline
from experiments.metrics import Distribution, Metric, RequestMetrics

SCHEMA = 1


class ResultError(Exception):
    """A file that is not a result of ours, in words for the person who opened it."""


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request of a run. `repeat` counts from 1 within its kind; a warm-up is never part of a statistic."""

    engine: str
    repeat: int
    warmup: bool
    timeline: Timeline

    @property
    def metrics(self) -> RequestMetrics:
        return RequestMetrics(self.timeline)


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine of a run: what exactly was measured, or why it could not be (`error`, with its log's tail)."""

    name: str
    label: str
    colour: str
    version: str | None = None
    command: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    installed: dict[str, str] = field(default_factory=dict)
    start_phases: dict[str, float] = field(default_factory=dict)  # phase -> seconds
    caveat: str | None = None
    error: str | None = None
    log_tail: str = ""


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
    labels: tuple[str, ...] = ()  # what must be said wherever these numbers are shown
    versions: dict[str, str] = field(default_factory=dict)  # of this tool and of Python
    stopped_early: bool = False
    schema: int = SCHEMA

    def measured(self, engine: str) -> list[RequestRow]:
        """The engine's requests that count: no warm-ups; failures included."""
        return [row for row in self.requests if row.engine == engine and not row.warmup]

    def failures(self, engine: str) -> list[RequestRow]:
        return [row for row in self.measured(engine) if row.timeline.error]

    def distribution(self, engine: str, metric: Metric) -> Distribution:
        """Over the engine's measured requests that succeeded."""
        return Distribution.of(metric.read(row.metrics) for row in self.measured(engine) if not row.timeline.error)

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
        try:
            value = json.loads(text)
            if not isinstance(value, dict) or "schema" not in value or "experiment" not in value:
                raise ResultError("This file is not a result of the bake-off: it names no experiment and no schema.")
            if value["schema"] > SCHEMA:
                raise ResultError(
                    f"This result was written by a newer version (schema {value['schema']}; this app reads {SCHEMA})."
                )
            return cls(
                **{
                    **value,
                    "engines": tuple(EngineRow(**row) for row in value["engines"]),
                    "requests": tuple(_request_row(row) for row in value["requests"]),
                    "labels": tuple(value["labels"]),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError) as failure:
            raise ResultError(f"This file is not a whole result: {failure}.") from failure

    def save(self, folder: Path) -> Path:
        """Write `<folder>/<id>.json` in one step, so that a reader never sees half a file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.id}.json"
        partial = path.with_suffix(".part")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)
        return path


def new_id(experiment: str, now: datetime | None = None) -> str:
    moment = now or datetime.now(UTC)
    return f"{experiment}-{moment:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


ARRIVAL_COLUMNS = ("at", "text", "reasoning", "tokens")


def _columns(arrivals: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Arrivals as one list per field: a third of the size of one object per arrival."""
    return {name: [arrival[name] for arrival in arrivals] for name in ARRIVAL_COLUMNS}


def _arrivals(columns: dict[str, list[Any]]) -> tuple[Arrival, ...]:
    return tuple(Arrival(*row) for row in zip(*(columns[name] for name in ARRIVAL_COLUMNS), strict=True))


def _request_row(value: dict[str, Any]) -> RequestRow:
    timeline = value["timeline"]
    return RequestRow(
        **{
            **value,
            "timeline": Timeline(
                **{
                    **timeline,
                    "arrivals": _arrivals(timeline["arrivals"]),
                    "usage": Usage(**timeline["usage"]),
                }
            ),
        }
    )
