"""Hand-made results of the concurrency experiment, whose numbers can be worked out on paper."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from engines.bandwidth import Bandwidth
from engines.base import Usage
from engines.gpus import Price
from engines.model_shape import ModelShape
from engines.timeline import Arrival, Timeline
from experiments.levels import ConcurrencyPlan, LevelPoint
from experiments.result import EngineRow, ExperimentResult, RequestRow, TrialRow

VLLM = EngineRow("vllm", "vLLM", "#0072B2")
NAIVE = EngineRow("transformers", "HF Transformers", "#6B7280")
BATCHING = EngineRow("transformers+batching", "HF Transformers", "#6B7280", "continuous batching", "transformers")


def plan_for(*engines: str, **settings: Any) -> ConcurrencyPlan:
    return ConcurrencyPlan(**{"prompt": "Go.", "engines": engines or ("vllm",), **settings})


def answer(
    engine: str = "vllm",
    level: int = 1,
    index: int = 0,
    planned: float = 0.0,
    first: float = 0.1,
    gap: float = 0.01,
    tokens: int = 11,
    repeat: int = 1,
    late: float = 0.0,
    error: str | None = None,
    warmup: bool = False,
) -> RequestRow:
    """First token `first` s after it was sent, then one every `gap` s: with the defaults the last one after 0.2 s."""
    arrivals = tuple(Arrival(first + gap * place, " word", tokens=1) for place in range(tokens))
    closed = arrivals[-1].at + 0.5 if arrivals else 0.5
    timeline = Timeline(planned + late, arrivals, closed, Usage(output_tokens=tokens), "per chunk", "stop", error)
    return RequestRow(engine, repeat, warmup, timeline, str(level), index, planned)


def wave(engine: str, level: int, spacing: float = 0.1, **timing: Any) -> list[RequestRow]:
    return [answer(engine, level, index, planned=index * spacing, **timing) for index in range(level)]


def result_of(
    rows: Iterable[RequestRow], *engines: EngineRow, unfinished: tuple[str, ...] = (), **settings: Any
) -> ExperimentResult:
    """A result of these requests; every trial has come to its end but those of the `unfinished` groups."""
    rows = tuple(rows)
    engines = engines or (VLLM,)
    trials = dict.fromkeys((row.engine, row.group, row.repeat, row.warmup) for row in rows)
    return ExperimentResult(
        id="concurrency-1",
        experiment="concurrency",
        started="2026-11-23T12:00:00+00:00",
        host="local",
        hardware={"words": "Test CPU"},
        model="a model",
        model_note="",
        settings=asdict(plan_for(*(row.engine for row in engines), **settings)),
        engines=engines,
        requests=rows,
        trials=tuple(TrialRow(*trial, 0.0, 1.0) for trial in trials if trial[1] not in unfinished),
    )


def point(**values: Any) -> LevelPoint:
    unknown = dict.fromkeys(LevelPoint.__slots__)
    return LevelPoint(**{**unknown, "level": 1, "extrapolated": False, "outputs": (), **values})


def limited(result: ExperimentResult, bytes_per_second: float) -> ExperimentResult:
    """As if each step read 1 MB and the hardware cost $3.60 per hour, a tenth of a cent per second."""
    shape, bandwidth = ModelShape(1_000_000, 0), Bandwidth(bytes_per_second, "by hand")
    return replace(result, model_shape=shape, bandwidth=bandwidth, price=Price(3.6, "by hand"))


def race_result() -> ExperimentResult:
    """vLLM up to four users, the queue up to one, its batching variant, which fails a request, up to four."""
    rows = [*wave("vllm", 1), *wave("vllm", 4), *wave("transformers", 1, first=0.2, gap=0.02)]
    rows += [*wave("transformers+batching", 1, first=0.3), *wave("transformers+batching", 4, first=0.3)]
    rows[-1] = replace(rows[-1], timeline=replace(rows[-1].timeline, error="broke off"))
    return result_of(rows, VLLM, NAIVE, BATCHING, levels=(1, 4), sequential_limit=1)


RACE = race_result()
