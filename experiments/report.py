"""A result as table, figure, CSV and sentence. Everything shown is formatted here, once. Never imports gradio."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from experiments import EXPERIMENTS_BY_NAME
from experiments.base import Table
from experiments.metrics import CATALOGUE
from experiments.result import ExperimentResult

if TYPE_CHECKING:
    import plotly.graph_objects

SPREAD = "± is half of the 95 % confidence interval of the mean over repeats (Student's t)."


def headline(result: ExperimentResult) -> str:
    return EXPERIMENTS_BY_NAME[result.experiment].headline(result)


def table(result: ExperimentResult) -> Table:
    return EXPERIMENTS_BY_NAME[result.experiment].table(result)


def figures(result: ExperimentResult) -> dict[str, plotly.graph_objects.Figure]:
    """Every chart that this result has something for, by the chart's name."""
    drawn = {chart.name: chart.draw(result) for chart in EXPERIMENTS_BY_NAME[result.experiment].charts}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def notes(result: ExperimentResult) -> list[str]:
    """Everything that must be said beside the numbers."""
    said = ["Stopped early: some repeats are missing."] if result.stopped_early else []
    said += result.labels
    said += [f"{engine.title}: {engine.error}" for engine in result.engines if engine.error]
    for engine in result.engines:
        failures = result.failures(engine.name)
        if failures:
            said.append(
                f"{engine.title}: {len(failures)} of {len(result.measured(engine.name))} requests failed: "
                f"{failures[0].timeline.error}"
            )
        bunched = sum(row.metrics.bunched for row in result.measured(engine.name))
        if bunched:
            said.append(
                f"{engine.title}: {bunched} of {len(result.measured(engine.name))} answers arrived in a few large "
                "pieces, because its server was held up; their first token and speed say little, their E2E is right."
            )
    said += [f"{engine.title}: {engine.unavailable}" for engine in result.engines if engine.unavailable]
    said += dict.fromkeys(engine.caveat for engine in result.engines if engine.caveat)
    return said + EXPERIMENTS_BY_NAME[result.experiment].notes(result)


def text_table(result: ExperimentResult) -> str:
    """The table for a terminal, with what must be said below it."""
    told = table(result)
    headings, rows = told.headings, told.rows
    widths = [max(len(line[column]) for line in [headings, *rows]) for column in range(len(headings))]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in [headings, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", headline(result), result.source_line, SPREAD, *notes(result)])


def csv_bytes(result: ExperimentResult) -> bytes:
    """One line per request, warm-ups and failures included, in seconds and tokens, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    headings = [
        "run",
        "experiment",
        "started",
        "model",
        "hardware",
        "engine",
        "version",
        "group",
        "index",
        "warmup",
        "repeat",
    ]
    headings += [f"{metric.name}_seconds" if metric.unit in ("ms", "s") else metric.name for metric in CATALOGUE]
    headings += ["planned_seconds", "lateness_seconds"]
    writer.writerow([*headings, "token_source", "finish_reason", "error"])
    versions = {engine.name: engine.version for engine in result.engines}
    for row in result.requests:
        values = [*(metric.read(row.metrics) for metric in CATALOGUE), row.planned, row.metrics.lateness]
        fixed = [result.id, result.experiment, result.started, result.model, result.hardware.get("words", "")]
        writer.writerow(
            [_plain(word) for word in fixed]
            + [row.engine, versions.get(row.engine) or "", _plain(row.group), row.index, int(row.warmup), row.repeat]
            + ["" if value is None else value for value in values]
            + [row.timeline.token_source, _plain(row.timeline.finish_reason or ""), _plain(row.timeline.error or "")]
        )
    return out.getvalue().encode()


def _plain(word: str) -> str:
    """A spreadsheet runs a cell that begins like a formula; a leading quote keeps it text."""
    return f"'{word}" if word[:1] in "=+-@\t\r" and word else word


def figures_html(result: ExperimentResult, drawn: Mapping[str, plotly.graph_objects.Figure] | None = None) -> bytes:
    """A page of its own with every chart, which needs no network: the plotting library is inside it.

    `drawn`: the result's figures where they are drawn already; they stay as they are, the page behind them is white.
    """
    parts: list[str] = []
    for figure in (figures(result) if drawn is None else drawn).values():
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts))
    title = escape(f"{EXPERIMENTS_BY_NAME[result.experiment].title}: {result.source_line}")
    head = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title></head>"
    told = f"<h1>{title}</h1><p>{escape(headline(result))}</p>"
    return f"{head}<body style='background: white'>{told}{''.join(parts)}</body></html>".encode()
