"""A result as table, figure, CSV and sentence. Everything shown is formatted here, once. Never imports gradio."""

from __future__ import annotations

import csv
import io
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping
from html import escape, unescape
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from experiments import EXPERIMENTS_BY_NAME
from experiments.base import Table
from experiments.limits import spending_notes
from experiments.metrics import CATALOGUE
from experiments.plain import in_charts
from experiments.result import ExperimentResult
from experiments.trust import generator_notes, generator_warnings, implausible_notes

if TYPE_CHECKING:
    import plotly.graph_objects

SPREAD = "± is half of the 95 % confidence interval of the mean over repeats (Student's t)."
DRAWN_COLUMNS = ("panel", "series", "x", "y", "base", "low", "high", "text")
LINE_BREAK, TAG = re.compile(r"<br\s*/?>"), re.compile(r"</?[a-zA-Z][^<>]*>")


def headline(result: ExperimentResult) -> str:
    return EXPERIMENTS_BY_NAME[result.experiment].headline(result)


def table(result: ExperimentResult) -> Table:
    return EXPERIMENTS_BY_NAME[result.experiment].table(result)


def figures(result: ExperimentResult) -> dict[str, plotly.graph_objects.Figure]:
    """Every chart that this result has something for, by the chart's name."""
    told = in_charts(result)
    drawn = {chart.name: chart.draw(told) for chart in EXPERIMENTS_BY_NAME[result.experiment].charts}
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
    # Several variants of one engine often lack the same thing for the same reason.
    said += dict.fromkeys(f"{engine.label}: {engine.unavailable}" for engine in result.engines if engine.unavailable)
    said += dict.fromkeys(engine.caveat for engine in result.engines if engine.caveat)
    said += [f"⚠ {warning}" for warning in generator_warnings(result)] + implausible_notes(result)
    said += EXPERIMENTS_BY_NAME[result.experiment].notes(result)
    return said + spending_notes(result) + generator_notes(result)


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


def drawn_csv(figure: plotly.graph_objects.Figure) -> bytes:
    """What the figure draws, unrounded, in the units of its axes: one line per point, then one per horizontal line.

    `panel`: the place of a picture beside others, from 1. `base`: where a bar begins that does not begin at 0, because
    of its own base or of the bars stacked below it; its x (lying) or y (standing) stays its length. `low` and `high`:
    the ends of the error bar along y.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(DRAWN_COLUMNS)
    ends: dict[tuple[Any, ...], float] = {}
    for trace in figure.data:
        stacked = figure.layout.barmode == "stack" and trace.type == "bar" and trace.orientation != "h"
        for point in _points(trace.to_plotly_json(), ends if stacked else None):
            writer.writerow(map(_cell, point))
    for shape in figure.layout.shapes:
        if shape.type == "line" and shape.y0 == shape.y1 and _is_value_axis(shape.yref):
            beside = [one.text for one in figure.layout.annotations if (one.yref, one.y) == (shape.yref, shape.y0)]
            writer.writerow(
                map(
                    _cell,
                    (_panel(shape.yref), "line", None, shape.y0, None, None, None, "<br>".join(filter(None, beside))),
                )
            )
    return out.getvalue().encode()


def drawn_points(figure: plotly.graph_objects.Figure) -> Iterator[tuple[str, str, list[tuple[Any, Any]]]]:
    """Of the first panel: each visible series' name, its kind ("bar", "scatter") and its points (x, y)."""
    for trace in figure.data:
        told = trace.to_plotly_json()
        if told.get("visible", True) is True and _panel(told.get("yaxis")) == "1":
            x, y = _values(told.get("x")), _values(told.get("y"))
            places = [unescape(one) if isinstance(one, str) else one for one in x]
            yield unescape(str(told.get("name") or "")), trace.type, list(zip(places, y, strict=False))


def commands_text(result: ExperimentResult) -> str:
    """The exact command that served each contender, for a terminal; above it what it is and needs."""
    told = []
    for row in result.engines:
        if row.command:
            told.append(f"# {row.title}{f' {row.version}' if row.version else ''}\n{row.command}\n")
    return "\n".join(told)


def _points(trace: Mapping[str, Any], stack: dict[tuple[Any, ...], float] | None) -> Iterator[tuple[Any, ...]]:
    """A trace's points as in DRAWN_COLUMNS; none of a hidden trace. `stack`: where the bars end on which the next ones
    stand, by axes and place; None for a trace that is not stacked."""
    if trace.get("visible", True) is not True:
        return
    error = trace.get("error_y", {})
    above = _values(error.get("array"))
    below = _values(error.get("arrayminus")) if not error.get("symmetric", "arrayminus" not in error) else above
    if not error.get("visible", True):
        above = below = []
    x, y = _values(trace.get("x")), _values(trace.get("y"))
    count = min(len(x), len(y))
    columns = [_values(trace.get(name), count) for name in ("base", "text", "hovertext")]
    points = zip_longest(x[:count], y[:count], *(column[:count] for column in (*columns, below, above)))
    for at, value, base, text, hovertext, down, up in points:
        if stack is not None and base is None and value is not None:
            place = (trace.get("xaxis"), trace.get("yaxis"), at)
            base = stack.get(place) or None
            stack[place] = (base or 0) + value
        bounded = value is not None and not (down is None and up is None)
        low, high = (value - (down or 0), value + (up or 0)) if bounded else (None, None)
        yield (
            _panel(trace.get("yaxis")),
            trace.get("name"),
            at,
            value,
            base,
            low,
            high,
            hovertext if text in (None, "") else text,
        )


def _values(value: Any, count: int = 0) -> list[Any]:
    """A trace's values, which may be a numpy array or numbers packed in base64, as Python's own, with None for what is
    not a number; one value for all points is repeated `count` times."""
    if isinstance(value, Mapping):
        import numpy

        kind = numpy.dtype(value["dtype"]).newbyteorder("<")
        value = numpy.frombuffer(b64decode(value["bdata"]), kind)
    if value is None:
        return []
    many = value if hasattr(value, "__len__") and not isinstance(value, str) else [value] * count
    found = [one.item() if hasattr(one, "item") else one for one in many]
    return [one if one == one else None for one in found]


def _panel(axis: str | None) -> str:
    """Of an axis as Plotly names it: y, y2, y3 ..."""
    return (axis or "y")[1:] or "1"


def _is_value_axis(reference: str | None) -> bool:
    """Whether heights are given on an axis and not as a share of the plot or the page."""
    return reference is None or (reference.startswith("y") and not reference.endswith("domain"))


def _cell(value: Any) -> Any:
    """As it is shown: without markup, on one line, nothing for nothing."""
    if isinstance(value, str):
        return _plain(unescape(TAG.sub("", LINE_BREAK.sub(" · ", value))))
    return "" if value is None else value


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
