"""What every chart shares: the look, the small print, bars with their spread. Plotly is loaded with the first chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from experiments.base import Chart
from experiments.limits import CEILING_WORDS, decode_ceiling, three_digits
from experiments.metrics import METRICS, Distribution, Metric
from experiments.result import EngineRow, ExperimentResult
from experiments.trust import beyond_ceiling, generator_warnings

if TYPE_CHECKING:
    import plotly.graph_objects

# Colours that read on a light and on a dark page.
PLOT_PIXELS, LINE_PIXELS = 300, 16
HIGHEST_CEILING = 3.0  # times what is drawn; a higher ceiling is told in words
INK, GRID, CLEAR = "#7a8290", "rgba(128,136,150,0.25)", "rgba(0,0,0,0)"
CANNOT_BE = "<br>⚠ cannot be: above<br>what memory allows"
PHASE_COLOURS = ("#9ca3af", "#6b7280", "#56b4e9", "#0072b2", "#009e73", "#b8860b", "#d55e00", "#aa4499", "#882255")
FONT = "Inter, 'Segoe UI', system-ui, -apple-system, 'DejaVu Sans', sans-serif"


def styled(
    chart: plotly.graph_objects.Figure, result: ExperimentResult, how: str, pixels: int = PLOT_PIXELS, axis: int = 40
) -> plotly.graph_objects.Figure:
    """The common look, with the source line and everything that must be said in the picture itself.

    `pixels`: height of the plot; `axis`: room below it for the labels of the x axis.
    """
    warnings = [f"⚠ {warning}" for warning in generator_warnings(result)]
    lines = [f"{result.source_line} · {how}" if how else result.source_line, *result.labels, *warnings]
    said = _wrapped(lines)
    chart.update_yaxes(gridcolor=GRID, zerolinecolor=GRID)
    chart.update_xaxes(gridcolor=GRID, zerolinecolor=GRID)
    return chart.update_layout(
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font={"family": FONT, "color": INK, "size": 13},
        meta={"small_print": lines},  # for a page that sets it as text
        height=pixels + LINE_PIXELS * len(said) + 56 + axis,
        margin={"l": 56, "r": 24, "t": 48, "b": 8 + axis + LINE_PIXELS * len(said)},
        annotations=[
            *chart.layout.annotations,
            *(_note(line, -axis - LINE_PIXELS * place) for place, line in enumerate(said)),
        ],
    )


def bar_charts(
    result: ExperimentResult, names: Sequence[str], rows: Iterable[EngineRow] | None = None
) -> plotly.graph_objects.Figure:
    """One bar chart per metric: mean as bar, smallest to largest repeat as whisker, each repeat as a dot.

    The chart of the decoding speed has the memory ceiling as a line.
    """
    from plotly.subplots import make_subplots

    metrics = [METRICS[name] for name in names]
    shown = list(result.engines if rows is None else rows)
    titles = [f"{metric.label}, {metric.unit} ({metric.better} is better)" for metric in metrics]
    chart = make_subplots(rows=1, cols=len(metrics), subplot_titles=titles, horizontal_spacing=0.14)
    repeats = max((len(result.distribution(row.name, metrics[0]).values) for row in shown), default=0)
    labels = [bar_label(row) for row in shown]
    for column, metric in enumerate(metrics, start=1):
        for row, label in zip(shown, labels, strict=True):
            doubtful = metric is METRICS["decode_speed"] and beyond_ceiling(result, row)
            for trace in _bar(row, label, metric, result.distribution(row.name, metric), doubtful):
                chart.add_trace(trace, row=1, col=column)
        chart.update_yaxes(rangemode="tozero", row=1, col=column)
        if metric is METRICS["decode_speed"]:
            add_ceiling(chart, result, [result.distribution(row.name, metric).largest for row in shown], column)
        chart.update_xaxes(categoryorder="array", categoryarray=labels, col=column)
    chart.update_layout(showlegend=False, bargap=0.35)
    chart.update_xaxes(tickangle=0)  # never slanted into the small print
    repeats_word = "run" if repeats == 1 else "runs"
    how = f"bars: mean of {repeats} {repeats_word}, whiskers: smallest to largest"
    return styled(chart, result, how, axis=40 + 18 * max((label.count("<br>") for label in labels), default=0))


def add_ceiling(
    chart: plotly.graph_objects.Figure, result: ExperimentResult, speeds: Iterable[float | None], column: int
) -> None:
    """The memory ceiling of one user as a dotted line; where it would flatten what is drawn below it, in words only."""
    ceiling, top = decode_ceiling(result), max((speed for speed in speeds if speed), default=None)
    if ceiling is None or top is None:
        return
    inside = ceiling <= HIGHEST_CEILING * top
    height = 1.15 * max(ceiling, top) if inside else 1.25 * top  # with room for the words
    if inside:
        chart.add_hline(ceiling, line_dash="dot", line_color=INK, line_width=1.5, row=1, col=column)
    chart.add_annotation(
        text=f"{CEILING_WORDS}: {three_digits(ceiling)} tok/s{'' if inside else ' ↑'}",
        x=1,
        xref=f"x{column if column > 1 else ''} domain",
        y=ceiling if inside else height,
        yref=f"y{column if column > 1 else ''}",
        xanchor="right",
        yanchor="bottom" if inside else "top",
        showarrow=False,
        font={"size": 12, "color": INK},
    )
    chart.update_yaxes(range=[0, height], row=1, col=column)


def start_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """What starting each engine took, phase by phase; None where nothing had to be started."""
    import plotly.graph_objects as go

    rows = [row for row in result.engines if row.start_phases]
    if not rows:
        return None
    chart = go.Figure()
    names = list(dict.fromkeys(phase for row in rows for phase in row.start_phases))
    for place, name in enumerate(names):
        having = [row for row in rows if name in row.start_phases]
        seconds = [row.start_phases[name] for row in having]
        chart.add_bar(
            x=seconds,
            y=[bar_label(row) for row in having],
            base=[_before(row, name) for row in having],  # in the order of each row, not of the traces
            orientation="h",
            name=name,
            marker_color=PHASE_COLOURS[place % len(PHASE_COLOURS)],
            text=[f"{value:.0f} s" if value >= 1 else "" for value in seconds],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            hovertemplate=f"{name}<br>%{{x:.1f}} s<extra></extra>",
        )
    chart.update_layout(
        barmode="overlay", bargap=0.3, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    )
    chart.update_xaxes(title="seconds to start (shorter is better)")
    chart.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=[bar_label(row) for row in rows])
    return styled(chart, result, "", pixels=60 + 46 * len(rows), axis=52)


def _before(row: EngineRow, phase: str) -> float:
    """Seconds of the phases that came before this one."""
    names = list(row.start_phases)
    return sum(row.start_phases[name] for name in names[: names.index(phase)])


START_CHART = Chart("start", "Start of the engines", start_chart)


def bar_label(row: EngineRow) -> str:
    """Name and variant on lines of their own, so that many bars find room for them."""
    return "<br>".join([row.label, *row.variant.split(", ")]) if row.variant else row.label


def colour_of(row: EngineRow) -> dict[str, Any]:
    """The engine's colour; a variant's is hatched, so that it reads without colour too."""
    if not row.variant:
        return {"color": row.colour}
    return {"color": row.colour, "pattern": {"shape": "/", "fgcolor": "white", "fgopacity": 0.45, "size": 7}}


def _bar(
    row: EngineRow, label: str, metric: Metric, distribution: Distribution, doubtful: bool = False
) -> list[dict[str, Any]]:
    """`doubtful`: it cannot be, and is drawn as an outline with the reason in it."""
    if distribution.mean is None:
        words = "not available here" if row.unavailable else "no answer"
        # A bar of nothing shows no text, so the words stand on the axis by themselves.
        place = {"x": [label], "y": [0], "text": [words], "textposition": "top center"}
        return [{"type": "scatter", "mode": "text", **place, "hoverinfo": "skip"}]
    values = [value * metric.scale for value in distribution.values]
    mean = distribution.mean * metric.scale
    bar = {
        "type": "bar",
        "x": [label],
        "y": [mean],
        "name": label,
        "marker": {"color": CLEAR, "line": {"color": row.colour, "width": 2}} if doubtful else colour_of(row),
        "text": [metric.shown_with_unit(distribution.mean) + (CANNOT_BE if doubtful else "")],
        "textposition": "inside",
        "insidetextanchor": "start",
        "textfont": {"color": INK if doubtful else "white", "size": 14},
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
