"""A result as table, figure, CSV and sentence. Everything shown is formatted here, once. Never imports gradio."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments import EXPERIMENTS_BY_NAME
from experiments.metrics import CATALOGUE, METRICS, Distribution, Metric
from experiments.result import ExperimentResult

if TYPE_CHECKING:
    import plotly.graph_objects

TABLE_METRICS = ("decode_speed", "ttft", "tpot", "itl_p99", "e2e", "output_tokens")


@dataclass(frozen=True, slots=True)
class Cell:
    """One engine's value of one metric: the mean and how far the repeats spread."""

    metric: Metric
    distribution: Distribution

    @property
    def words(self) -> str:
        """e.g. "228 ±4 tok/s": the mean, and half of its 95 % confidence interval (Student's t)."""
        mean, half = self.distribution.mean, self.distribution.half_width
        if mean is None:
            return "–"
        # Equal values, such as a fixed length, have no spread worth a sign.
        spread = f" ±{self.metric.shown(half)}" if half else ""
        return f"{self.metric.shown(mean)}{spread} {self.metric.unit}".strip()


def headline(result: ExperimentResult) -> str:
    return EXPERIMENTS_BY_NAME[result.experiment].headline(result)


def table(result: ExperimentResult) -> tuple[list[str], list[list[str]]]:
    """(headings, one row of words per engine)."""
    metrics = [METRICS[name] for name in TABLE_METRICS]
    headings = ["Engine", "Version", *(metric.label for metric in metrics), "Runs", "Failed"]
    rows = []
    for engine in result.engines:
        cells = [Cell(metric, result.distribution(engine.name, metric)).words for metric in metrics]
        measured, failed = result.measured(engine.name), result.failures(engine.name)
        count = "could not run" if engine.error else str(len(measured))
        rows.append([engine.label, engine.version or "–", *cells, count, str(len(failed))])
    return headings, rows


def notes(result: ExperimentResult) -> list[str]:
    """Everything that must be said beside the numbers."""
    said = ["Stopped early: some repeats are missing."] if result.stopped_early else []
    said += result.labels
    said += [f"{engine.label}: {engine.error}" for engine in result.engines if engine.error]
    for engine in result.engines:
        failures = result.failures(engine.name)
        if failures:
            said.append(
                f"{engine.label}: {len(failures)} of {len(result.measured(engine.name))} requests failed: "
                f"{failures[0].timeline.error}"
            )
        bunched = sum(row.metrics.bunched for row in result.measured(engine.name))
        if bunched:
            said.append(
                f"{engine.label}: {bunched} of {len(result.measured(engine.name))} answers arrived in a few large "
                "pieces, because its server was held up; their first token and speed say little, their E2E is right."
            )
    said += [engine.caveat for engine in result.engines if engine.caveat]
    return said


def text_table(result: ExperimentResult) -> str:
    """The table for a terminal, with what must be said below it."""
    headings, rows = table(result)
    widths = [max(len(line[column]) for line in [headings, *rows]) for column in range(len(headings))]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in [headings, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    spread = "Values are means over repeats; ± is half of the 95 % confidence interval (Student's t)."
    return "\n".join([*lines, "", headline(result), result.source_line, spread, *notes(result)])


def csv_bytes(result: ExperimentResult) -> bytes:
    """One line per request, warm-ups and failures included, in seconds and tokens, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    headings = ["run", "experiment", "started", "model", "hardware", "engine", "version", "warmup", "repeat"]
    headings += [f"{metric.name}_seconds" if metric.unit in ("ms", "s") else metric.name for metric in CATALOGUE]
    writer.writerow([*headings, "token_source", "finish_reason", "error"])
    versions = {engine.name: engine.version for engine in result.engines}
    for row in result.requests:
        values = [metric.read(row.metrics) for metric in CATALOGUE]
        fixed = [result.id, result.experiment, result.started, result.model, result.hardware.get("words", "")]
        writer.writerow(
            [_plain(word) for word in fixed]
            + [row.engine, versions.get(row.engine) or "", int(row.warmup), row.repeat]
            + ["" if value is None else value for value in values]
            + [row.timeline.token_source, _plain(row.timeline.finish_reason or ""), _plain(row.timeline.error or "")]
        )
    return out.getvalue().encode()


def _plain(word: str) -> str:
    """A spreadsheet runs a cell that begins like a formula; a leading quote keeps it text."""
    return f"'{word}" if word[:1] in "=+-@\t\r" and word else word


# Colours that read on a light and on a dark page.
PLOT_PIXELS, LINE_PIXELS = 300, 16
INK, GRID, CLEAR = "#7a8290", "rgba(128,136,150,0.25)", "rgba(0,0,0,0)"
FONT = "Inter, 'Segoe UI', system-ui, -apple-system, 'DejaVu Sans', sans-serif"


def figure(result: ExperimentResult) -> plotly.graph_objects.Figure:
    """One bar chart per charted metric: mean as bar, smallest to largest repeat as whisker, each repeat as a dot."""
    from plotly.subplots import make_subplots  # loading plotly costs a second: not before the first chart

    metrics = [METRICS[name] for name in EXPERIMENTS_BY_NAME[result.experiment].charted]
    titles = [f"{metric.label}, {metric.unit} ({metric.better} is better)" for metric in metrics]
    chart = make_subplots(rows=1, cols=len(metrics), subplot_titles=titles, horizontal_spacing=0.14)
    repeats = max((len(result.distribution(engine.name, metrics[0]).values) for engine in result.engines), default=0)
    for column, metric in enumerate(metrics, start=1):
        for engine in result.engines:
            distribution = result.distribution(engine.name, metric)
            for trace in _bar(engine.label, engine.colour, metric, distribution):
                chart.add_trace(trace, row=1, col=column)
        chart.update_yaxes(rangemode="tozero", gridcolor=GRID, zerolinecolor=GRID, row=1, col=column)
        chart.update_xaxes(categoryorder="array", categoryarray=[engine.label for engine in result.engines], col=column)
    repeats_word = "repeat" if repeats == 1 else "repeats"
    source = f"{result.source_line} · bars: mean of {repeats} {repeats_word}, whiskers: smallest to largest"
    said = _wrapped([source, *result.labels])
    chart.update_layout(
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font={"family": FONT, "color": INK, "size": 13},
        showlegend=False,
        bargap=0.35,
        height=PLOT_PIXELS + LINE_PIXELS * len(said) + 96,
        margin={"l": 56, "r": 24, "t": 48, "b": 48 + LINE_PIXELS * len(said)},
        annotations=[
            *chart.layout.annotations,
            *(_note(line, -40 - LINE_PIXELS * place) for place, line in enumerate(said)),
        ],
    )
    return chart


def _bar(label: str, colour: str, metric: Metric, distribution: Distribution) -> list[dict[str, Any]]:
    if distribution.mean is None:
        return [{"type": "bar", "x": [label], "y": [None], "text": ["no answer"], "hoverinfo": "skip"}]
    values = [value * metric.scale for value in distribution.values]
    mean = distribution.mean * metric.scale
    bar = {
        "type": "bar",
        "x": [label],
        "y": [mean],
        "name": label,
        "marker": {"color": colour},
        "text": [metric.shown_with_unit(distribution.mean)],
        "textposition": "inside",
        "insidetextanchor": "start",
        "textfont": {"color": "white", "size": 14},
        "hovertemplate": f"{label}<br>%{{y:.{metric.digits}f}} {metric.unit}<extra></extra>",
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [max(values) - mean],
            "arrayminus": [mean - min(values)],
            "color": INK,
            "thickness": 1.5,
            "visible": len(values) > 1,
        },
    }
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [label] * len(values),
        "y": values,
        "name": f"{label}, each repeat",
        "marker": {"color": "#111827", "size": 7, "line": {"color": "white", "width": 1.5}},
        "hovertemplate": f"repeat: %{{y:.{metric.digits}f}} {metric.unit}<extra></extra>",
    }
    return [bar, dots]


def _note(words: str, below: int) -> dict[str, Any]:
    """A line of small print, `below` pixels under the plot's lower edge."""
    return {
        "text": words,
        "x": 0,
        "y": 0,
        "yshift": below,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "top",
        "showarrow": False,
        "font": {"size": 11, "color": INK},
    }


def _wrapped(lines: list[str], width: int = 150) -> list[str]:
    import textwrap

    return [part for line in lines for part in textwrap.wrap(line, width)]


def figure_html(result: ExperimentResult) -> bytes:
    """A page of its own that needs no network: the plotting library is inside it."""
    page: str = figure(result).update_layout(paper_bgcolor="white", plot_bgcolor="white").to_html(include_plotlyjs=True)
    return page.encode()
