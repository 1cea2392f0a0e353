"""The pictures of the concurrency experiment: lines over the number of users, and every request of the largest one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from experiments.drawing import INK, PLOT_PIXELS, bar_label, colour_of, styled
from experiments.levels import (
    E2E,
    LevelPoint,
    arrival_ceiling,
    ended,
    finished_trials,
    in_flight,
    levels_in,
    plan_of,
    planned,
    points,
    times_one_user,
    users,
    waited,
)
from experiments.limits import CEILING_WORDS, decode_ceiling
from experiments.metrics import MILLISECONDS
from experiments.result import EngineRow, ExperimentResult, RequestRow

if TYPE_CHECKING:
    import plotly.graph_objects


FAILED_COLOUR = "#DC2626"
LABEL_PIXELS, LABEL_MARGIN = 17, 170  # height of one line of a label, width that labels take right of the plot
LEAST_FLIGHT_PIXELS, MOST_FLIGHT_PIXELS = 5, 640
EXTRAPOLATED_WORDS = "dashed and hollow: extrapolated from one user alone"
SPACING_WORDS = "limit set by the spacing of arrivals"
SINCE = "seconds from the first planned arrival"
Span = Callable[[LevelPoint], tuple[float, float, float]]  # low end of the whisker, value, high end


def throughput_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """tok/s of all users together over the number of users."""
    import plotly.graph_objects as go

    def span(point: LevelPoint) -> tuple[float, float, float]:
        value, spread = point.tokens_per_second or 0.0, point.spread or 0.0
        return value - spread, value, value + spread

    def words(point: LevelPoint, found: Sequence[LevelPoint]) -> str:
        gain = times_one_user(point, found)
        return f"{span(point)[1]:,.0f} tok/s" + (f", {gain:.1f}× one user" if gain else "")

    lines = _lines(result, lambda point: point.tokens_per_second)
    if not lines:
        return None
    chart = go.Figure([trace for row, found in lines for trace in _traces(row, found, span, words)])
    levels = _level_axis(chart, lines)
    top = 1.15 * max(span(point)[2] for _, found in lines for point in found)
    spacing, memory = (
        [(level, ceiling) for level in levels if (ceiling := ceiling_of(result, level))]
        for ceiling_of in (arrival_ceiling, decode_ceiling)
    )
    if spacing:
        # Far above the lines it would flatten them, so it may leave the picture at the top.
        top = max(top, min(1.1 * spacing[-1][1], 1.5 * top))
    for told, ceilings in ((SPACING_WORDS, spacing), (CEILING_WORDS, memory)):
        _limit_line(chart, told, ceilings, top)
    _end_labels(chart, [(row, found[-1], span(found[-1])[1]) for row, found in lines], 0, top)
    chart.update_yaxes(title="tok/s", range=[0, top])
    chart.update_layout(title="Output of all users together", showlegend=False)
    return _with_room_for_labels(chart, result, _load_words(result), lines)


def _limit_line(
    chart: plotly.graph_objects.Figure, words: str, ceilings: Sequence[tuple[int, float]], top: float
) -> None:
    """A dotted line of (users, tok/s), with its words at its last point below `top`, the end of the picture."""
    below = [one for one in ceilings if one[1] < 0.95 * top]
    if not below:
        return
    chart.add_scatter(
        x=[level for level, _ in ceilings],
        y=[ceiling for _, ceiling in ceilings],
        mode="lines",
        name=words,
        line={"color": INK, "dash": "dot", "width": 1.5},
        hovertemplate=f"{words}<br>%{{y:,.0f}} tok/s<extra></extra>",
    )
    level, ceiling = below[-1]
    side = "left" if level == ceilings[0][0] else "right"
    _written(chart, level, ceiling, words, xanchor=side, yanchor="bottom")


def ttft_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """Wait for the first token over the number of users, median with a whisker to p95, beside its limit."""
    import plotly.graph_objects as go

    def span(point: LevelPoint) -> tuple[float, float, float]:
        middle = (point.ttft_p50 or 0.0) * MILLISECONDS
        return middle, middle, (point.ttft_p95 or 0.0) * MILLISECONDS

    def words(point: LevelPoint, found: Sequence[LevelPoint]) -> str:
        return f"p50 {waited(point.ttft_p50)}, p95 {waited(point.ttft_p95)}, p99 {waited(point.ttft_p99)}"

    lines = _lines(result, lambda point: point.ttft_p50 or None)  # a logarithmic axis has no zero
    if not lines:
        return None
    limit = plan_of(result).slo_ttft_ms
    chart = go.Figure([trace for row, found in lines for trace in _traces(row, found, span, words)])
    levels = _level_axis(chart, lines)
    chart.add_scatter(
        x=[levels[0], levels[-1]],
        y=[limit, limit],
        mode="lines",
        name="limit",
        line={"color": INK, "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )
    _written(chart, levels[0], math.log10(limit), f"limit: {limit:g} ms", xanchor="left", yanchor="bottom")
    spans = [end for _, found in lines for point in found for end in (span(point)[0], span(point)[2])]
    low, high = math.floor(math.log10(min(*spans, limit))), math.ceil(math.log10(max(*spans, limit)))
    high += low == high
    _end_labels(chart, [(row, found[-1], math.log10(span(found[-1])[1])) for row, found in lines], low, high)
    chart.update_yaxes(title="ms", type="log", range=[low, high], dtick=1, tickformat=",")
    chart.update_layout(title="Wait for the first token", showlegend=False)
    how = f"points: median from the planned arrival, whiskers: up to p95 · {_load_words(result)}"
    return _with_room_for_labels(chart, result, how, lines)


def flight_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """Every request of each contender's largest measured level: its wait light, its answer in the engine's colour."""
    from plotly.subplots import make_subplots

    flights = _flights(result)
    if not flights:
        return None
    titles = [f"{bar_label(row)}<br>{users(level)}" for row, level, _ in flights]
    chart = make_subplots(rows=1, cols=len(flights), subplot_titles=titles, shared_xaxes="all")
    longest = max(ended(one) - min(map(planned, rows)) for _, _, rows in flights for one in rows)
    for column, (row, level, rows) in enumerate(flights, start=1):
        for trace in _flight_bars(row, rows):
            chart.add_trace(trace, row=1, col=column)
        chart.update_yaxes(range=[level + 0.5, 0.5], **_counting(level), row=1, col=column)
    chart.update_xaxes(title=_below("seconds"), range=[0, 1.03 * longest])
    chart.update_yaxes(title="request" if plan_of(result).load == "wave" else "user", col=1)
    title = {"text": f"Every request, {SINCE}", "y": 0.98, "yanchor": "top"}
    chart.update_layout(title=title, showlegend=False, barmode="overlay")
    most = max(level for _, level, _ in flights)
    pixels = max(PLOT_PIXELS, min(LEAST_FLIGHT_PIXELS * most, MOST_FLIGHT_PIXELS))
    how = "light: from the planned arrival to the first token, full: the answer, red with a cross: failed"
    styled(chart, result, f"{how}{_of_repeat_one(result)}", pixels)
    return chart.update_layout(margin={"t": 112}, height=chart.layout.height + 64)  # titles of three lines


def in_flight_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """How many requests are under way at each moment, at each contender's largest measured level."""
    import plotly.graph_objects as go

    flights = _flights(result)
    if not flights:
        return None
    chart = go.Figure()
    for row, level, rows in flights:
        steps = in_flight(rows)
        chart.add_scatter(
            x=[moment for moment, _ in steps],
            y=[count for _, count in steps],
            mode="lines",
            name=f"{row.title}: {users(level)}, at most {max(count for _, count in steps)} in flight",
            line={"color": row.colour, "shape": "hv", "dash": _dash(row)},
            hovertemplate=f"{row.title}<br>%{{y}} in flight after %{{x:.2f}} s<extra></extra>",
        )
    chart.update_xaxes(title=_below(SINCE), rangemode="tozero")
    chart.update_yaxes(title="requests", rangemode="tozero", **_counting(max(level for _, level, _ in flights)))
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
    title = {"text": "Requests in flight", "y": 0.98, "yanchor": "top"}
    chart.update_layout(title=title, showlegend=True, legend=legend)
    how = f"in flight: from the planned arrival to the last token{_of_repeat_one(result)}"
    styled(chart, result, how)
    return chart.update_layout(margin={"t": 100}, height=chart.layout.height + 52)


Line = tuple[EngineRow, list[LevelPoint]]


def _lines(result: ExperimentResult, read: Callable[[LevelPoint], float | None]) -> list[Line]:
    """The contenders with the points at which `read` gives something, if there are any."""
    lines = [(row, [one for one in points(result, row) if read(one) is not None]) for row in result.engines]
    return [(row, found) for row, found in lines if found]


def _dash(row: EngineRow) -> str:
    return "dashdot" if row.variant else "solid"


def _traces(
    row: EngineRow, points: list[LevelPoint], span: Span, words: Callable[[LevelPoint, Sequence[LevelPoint]], str]
) -> list[dict[str, Any]]:
    """The measured points, and the extrapolated ones as a dashed line that goes on from the last measured one."""
    symbol = "diamond" if row.variant else "circle"
    measured = [point for point in points if not point.extrapolated]
    guessed = [point for point in points if point.extrapolated]
    parts = [(row.title, measured, _dash(row), symbol)] if measured else []
    if guessed:
        parts.append((f"{row.title}, extrapolated", [*measured[-1:], *guessed], "dash", f"{symbol}-open"))
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [point.level for point in found],
            "y": [span(point)[1] for point in found],
            "line": {"color": row.colour, "dash": dash, "width": 2.5},
            # The measured point from which the dashed line goes on is drawn once, as a measured one.
            "marker": {
                "symbol": mark,
                "size": [9 if point in guessed or found is measured else 0 for point in found],
                "color": row.colour,
                "opacity": 1,
            },
            "error_y": {
                "type": "data",
                "visible": any(span(point)[0] < span(point)[2] for point in found),
                "symmetric": False,
                "array": [span(point)[2] - span(point)[1] for point in found],
                "arrayminus": [span(point)[1] - span(point)[0] for point in found],
                "thickness": 1.2,
                "width": 3,
            },
            "hovertext": [
                f"{row.title}<br>{users(point.level)}{', extrapolated' if point.extrapolated else ''}"
                f"<br>{words(point, points)}"
                for point in found
            ],
            "hoverinfo": "text",
        }
        for name, found, dash, mark in parts
    ]


def _level_axis(chart: plotly.graph_objects.Figure, lines: list[Line]) -> list[int]:
    """Equal steps for equal factors, with the levels as ticks; returns them."""
    levels = sorted({point.level for _, found in lines for point in found})
    room = 0.04 * math.log10(levels[-1] / levels[0]) or 0.1
    ends = [math.log10(levels[0]) - room, math.log10(levels[-1]) + room]
    names = [str(level) for level in levels]
    chart.update_xaxes(title=_below("users"), type="log", range=ends, tickvals=levels, ticktext=names)
    return levels


def _below(words: str) -> dict[str, Any]:
    """A title of the x axis, close enough to it to stay clear of the small print."""
    return {"text": words, "standoff": 3, "font": {"size": 12}}


def _counting(most: int) -> dict[str, Any]:
    """The ticks of an axis that counts to `most`: whole numbers, about eight of them."""
    return {"tick0": 0, "dtick": max(1, round(most / 8))}


def _written(chart: plotly.graph_objects.Figure, level: int, y: float, words: str, **place: Any) -> None:
    """Words at a point of the picture. Unlike a trace, an annotation wants a logarithmic axis' logarithm."""
    font = {"size": 12, "color": INK}
    chart.add_annotation(**{"x": math.log10(level), "y": y, "text": words, "showarrow": False, "font": font, **place})


def _end_labels(
    chart: plotly.graph_objects.Figure, ends: list[tuple[EngineRow, LevelPoint, float]], low: float, high: float
) -> None:
    """Each line's name at its end, moved apart where two would overlap. `low` and `high`: the ends of the y axis."""
    taken = -math.inf  # up to which pixel
    for row, point, y in sorted(ends, key=lambda end: end[2]):
        words = bar_label(row) + ("<br>(extrapolated)" if point.extrapolated else "")
        height = LABEL_PIXELS * (1 + words.count("<br>"))
        wanted = (y - low) / (high - low) * PLOT_PIXELS
        centre = max(wanted, taken + height / 2)
        taken = centre + height / 2
        font = {"size": 13, "color": row.colour}
        place = {"xanchor": "left", "xshift": 10, "yanchor": "middle", "yshift": centre - wanted, "align": "left"}
        _written(chart, point.level, y, words, font=font, **place)


def _with_room_for_labels(
    chart: plotly.graph_objects.Figure, result: ExperimentResult, how: str, lines: list[Line]
) -> plotly.graph_objects.Figure:
    if any(point.extrapolated for _, found in lines for point in found):
        how += f" · {EXTRAPOLATED_WORDS}"
    return styled(chart, result, how).update_layout(margin={"r": LABEL_MARGIN})


def _load_words(result: ExperimentResult) -> str:
    plan = plan_of(result)
    if plan.load == "sustained":
        return f"each user asks again at once, for {plan.seconds:g} s; tok/s while all users are being answered"
    return f"one request per user, one every {plan.spacing_ms:g} ms"


def _of_repeat_one(result: ExperimentResult) -> str:
    return "; the first repeat" if plan_of(result).repeats > 1 else ""


def _flights(result: ExperimentResult) -> list[tuple[EngineRow, int, list[RequestRow]]]:
    """Each contender with the first finished trial at its largest measured level."""
    found = []
    for row in result.engines:
        for level in sorted(levels_in(result, row.name), reverse=True):
            if trials := finished_trials(result, row.name, level):
                found.append((row, level, trials[0]))
                break
    return found


def _flight_bars(row: EngineRow, rows: list[RequestRow]) -> list[dict[str, Any]]:
    begin = min(map(planned, rows))
    failed = [one for one in rows if one.timeline.error]
    answered = [one for one in rows if not one.timeline.error]
    first = [one.timeline.sent + one.timeline.arrivals[0].at for one in answered]
    parts = [
        (f"{row.title}: wait", answered, [*map(planned, answered)], first, {"color": row.colour, "opacity": 0.3}),
        (f"{row.title}: answer", answered, first, [*map(ended, answered)], colour_of(row)),
        (f"{row.title}: failed", failed, [*map(planned, failed)], [*map(ended, failed)], {"color": FAILED_COLOUR}),
    ]
    bars: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [one.index + 1 for one in those],
            "base": [start - begin for start in starts],
            "x": [end - start for start, end in zip(starts, ends, strict=True)],
            "width": 0.85,  # else as wide as the gap between the requests of this trace, which failures widen
            "marker": {"line": {"width": 0}, **marker},
            "hovertext": [_flight_words(one) for one in those],
            "hoverinfo": "text",
        }
        for name, those, starts, ends, marker in parts
        if those
    ]
    if failed:
        bars.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{row.title}: failed here",
                "x": [ended(one) - begin for one in failed],
                "y": [one.index + 1 for one in failed],
                "marker": {"symbol": "x", "size": 8, "color": FAILED_COLOUR},
                "hoverinfo": "skip",
            }
        )
    return bars


def _flight_words(row: RequestRow) -> str:
    if row.timeline.error:
        return f"request {row.index + 1} failed after {ended(row) - planned(row):.2f} s"
    first, whole = waited(row.metrics.planned_ttft), E2E.shown_with_unit(row.metrics.planned_e2e)
    return f"request {row.index + 1}<br>first token after {first}<br>whole answer after {whole}"
