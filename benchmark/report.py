"""The benchmark's table and figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from benchmark.cases import Case, cases
from benchmark.compare import Score
from benchmark.tools import CLIENTS
from experiments.drawing import FONT, GRID, INK
from experiments.metrics import Distribution

if TYPE_CHECKING:
    import plotly.graph_objects

WORDS = {client.name: client.words for client in CLIENTS}
OURS = "ours"
COLOURS = ("#0072B2", "#6B7280", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9")
HEADINGS = (
    "Client",
    "Stamp late p50, ms",
    "p99",
    "CPU, cores",
    "TTFT error, ms",
    "TPOT error, ms",
    "ITL p50 error, ms",
    "Longest gap error, ms",
    "Lost",
)
ENOUGH_SECONDS, ENOUGH_SHARE = 0.001, 0.01  # an error within either is no error


def table(scores: Iterable[Score]) -> str:
    """Markdown, one table per case: medians over the rounds, with the range where there are several."""
    scores = list(scores)
    parts = []
    for case in _cases(scores):
        rows = [
            [*_row([one for one in scores if (one.case, one.client) == (case.name, name)])] for name in _names(scores)
        ]
        lines = [HEADINGS, ["---"] + ["---:"] * (len(HEADINGS) - 1), *(row for row in rows if row)]
        parts.append(f"**{case.words}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _row(scores: list[Score]) -> list[str]:
    if not scores:
        return []
    times: list[Callable[[Score], float | None]] = [
        lambda one: one.late_p50,
        lambda one: one.late_p99,
    ]
    errors: list[Callable[[Score], float | None]] = [
        lambda one: one.ttft_error,
        lambda one: one.tpot_error,
        lambda one: one.itl_error,
        lambda one: one.longest_gap_error,
    ]
    lost = sum(one.lost for one in scores)
    failed = sum(one.failed for one in scores)
    name = WORDS.get(scores[0].client, scores[0].client)
    return [
        f"**{name}**" if scores[0].client == OURS else name,
        *(_spread([read(one) for one in scores], 1000) for read in times),
        _spread([one.processor for one in scores], 1),
        *(_spread([read(one) for one in scores], 1000) for read in errors),
        f"{lost} chunks" + (f", {failed} answers" if failed else "") if lost or failed else "0",
    ]


def _spread(values: list[float | None], scale: float) -> str:
    known = Distribution.of(None if value is None else value * scale for value in values)
    if known.median is None or known.smallest is None or known.largest is None:
        return "–"
    shown = _digits(known.median)
    if len(known.values) == 1 or _digits(known.smallest) == _digits(known.largest):
        return shown
    return f"{shown} ({_digits(known.smallest)}–{_digits(known.largest)})"


def _digits(value: float) -> str:
    """Two digits that count, at least."""
    if abs(value) >= 10:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}" if abs(value) >= 0.095 else f"{value:.3f}"


def figure(scores: Iterable[Score], source: str) -> plotly.graph_objects.Figure | None:
    """Lateness p99 and processor time over the number of streams, one line per client."""
    from plotly.subplots import make_subplots

    scores = list(scores)
    levels = [case for case in _cases(scores) if case.name.isdigit()]
    if not levels:
        return None
    titles = ["How late a chunk is stamped, ms (p99)", "Processor, cores"]
    chart = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.1)
    for place, name in enumerate(_names(scores)):
        colour = COLOURS[place % len(COLOURS)]
        for column, (read, scale) in enumerate(((_late, 1000.0), (_processor, 1.0)), start=1):
            points = [(case, _median(scores, name, case, read)) for case in levels]
            known = [(case.streams, value * scale) for case, value in points if value is not None]
            chart.add_scatter(
                x=[streams for streams, _ in known],
                y=[value for _, value in known],
                name=WORDS.get(name, name),
                mode="lines+markers",
                line={"color": colour, "width": 4 if name == OURS else 2},
                marker={"size": 9 if name == OURS else 7},
                showlegend=column == 1,
                row=1,
                col=column,
            )
    ticks = [case.streams for case in levels]
    chart.update_xaxes(
        type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks], title="streams", gridcolor=GRID
    )
    chart.update_yaxes(gridcolor=GRID)
    chart.update_yaxes(type="log", col=1)
    chart.update_yaxes(rangemode="tozero", col=2)
    chart.add_annotation(
        text=f"{source} · each stream at 100 tok/s, 256 at 50 · truth: the server's own stamps",
        x=0,
        y=-0.28,
        xref="paper",
        yref="paper",
        xanchor="left",
        showarrow=False,
        font={"size": 11, "color": INK},
    )
    return chart.update_layout(
        font={"family": FONT, "color": INK, "size": 13},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=440,
        width=1060,
        margin={"l": 60, "r": 20, "t": 50, "b": 110},
    )


def verdicts(scores: Iterable[Score]) -> list[str]:
    """Where ours is further from the truth than 1 ms or 1 %, or lost something; empty when it never is."""
    said = []
    for one in scores:
        if one.client != OURS:
            continue
        case = next(case for case in _cases([one]))
        gap = 1 / case.chunks_per_second
        errors = {
            "TTFT": (one.ttft_error, case.schedule.first_token),
            "TPOT": (one.tpot_error, gap / case.tokens_per_chunk),
            "ITL p50": (one.itl_error, gap / case.tokens_per_chunk),
            "longest gap": (one.longest_gap_error, gap + case.stall_seconds),
        }
        for name, (error, size) in errors.items():
            if error is None or error > max(ENOUGH_SECONDS, ENOUGH_SHARE * size):
                said.append(
                    f"{case.words}: {name} of ours is off by {'?' if error is None else f'{error * 1000:.2f} ms'}"
                )
        if one.lost or one.failed:
            said.append(f"{case.words}: ours lost {one.lost} chunks and {one.failed} answers")
    return said


def _late(score: Score) -> float | None:
    return score.late_p99


def _processor(score: Score) -> float | None:
    return score.processor


def _median(scores: list[Score], name: str, case: Case, read: Callable[[Score], float | None]) -> float | None:
    return Distribution.of(read(one) for one in scores if (one.client, one.case) == (name, case.name)).median


def _cases(scores: Iterable[Score]) -> list[Case]:
    known = {score.case for score in scores}
    return [case for case in cases(5.0) if case.name in known]


def _names(scores: Iterable[Score]) -> list[str]:
    return list(dict.fromkeys(client.name for client in CLIENTS if client.name in {score.client for score in scores}))
