"""The race that plays when the page opens: the answers of the recording that came with the app, as one small file.

The visitor's own browser plays it (`page.js`), so that any number of visitors costs the server one cached answer each.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from experiments.metrics import METRICS, Metric
from experiments.result import ExperimentResult, RequestRow
from ui.lanes import TILES, shortened

ROUNDS = 3  # of the recorded repeats: about ten seconds, then the page shows the recording's end


def opening_race(result: ExperimentResult, lanes: Collection[str]) -> dict[str, Any] | None:
    """What the lanes play, or None where the recording has no answer for any of them.

    `rounds`: per repeat and lane the arrivals as [ms since the request was sent, text, tokens]. All of a repeat begin
    at the same moment, although the engines had taken turns: `label` says so.
    """
    rounds = [
        {row.engine: _arrivals(row) for row in _measured(result, repeat) if row.engine in lanes}
        for repeat in _repeats(result)[:ROUNDS]
    ]
    rounds = [played for played in rounds if played]
    if not rounds:
        return None
    together = result.settings.get("race")
    turns = "" if together else " The engines had taken turns; here they start together, each at its true speed."
    return {
        "run": result.id,
        "label": f"Recorded, not live: {result.source_line}.{turns}",
        "prompt": shortened(str(result.settings.get("prompt", ""))),
        "rounds": rounds,
    }


def terms() -> dict[str, Any]:
    """How the tiles' metrics are called and written, for the browser: their tooltips are not sent with every tile."""
    return {metric.name: _term(metric) for metric in TILES}


def _term(metric: Metric) -> dict[str, Any]:
    words = f"{metric.term}. {metric.explanation}"
    return {"title": words, "scale": METRICS[metric.name].scale, "digits": metric.digits}


def _repeats(result: ExperimentResult) -> list[int]:
    return sorted({row.repeat for row in result.requests if not row.warmup})


def _measured(result: ExperimentResult, repeat: int) -> list[RequestRow]:
    """One whole answer per engine."""
    rows = [row for row in result.requests if row.repeat == repeat and not row.warmup and not row.timeline.error]
    return list({row.engine: row for row in reversed(rows)}.values())


def _arrivals(row: RequestRow) -> list[list[Any]]:
    return [
        [round(arrival.at * 1000, 1), arrival.text, 1 if arrival.tokens is None else arrival.tokens]
        for arrival in row.timeline.arrivals
    ]
