"""A run as a picture of 1200 x 630 pixels, as social networks show it beside a link. Never imports gradio."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from experiments import EXPERIMENTS_BY_NAME
from experiments.report import drawn_points, figures, headline
from experiments.result import ExperimentResult

if TYPE_CHECKING:
    import plotly.graph_objects
    from PIL import ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 1200, 630, 56
PAPER, INK, SOFT, ACCENT, GRID = "#ffffff", "#111827", "#526072", "#0f766e", "#e5e7eb"
CHART_TOP, CHART_BOTTOM = 330, 540
HEADLINE_ROOM = 195  # pixels above the chart and its title
MOST_BARS = 8
LINE_BREAK = re.compile(r"<br\s*/?>")
PLAINER = str.maketrans({"×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "≈": "~", "’": "'", "⚠": "!"})
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True, slots=True)
class _Series:
    """One thing that the first chart shows: a bar (one point) or a line."""

    name: str
    colour: str
    points: tuple[tuple[float | str, float], ...]


def preview_png(result: ExperimentResult) -> bytes:
    """The run's sentence and its first chart, in few strokes; what must be said with it stands at the bottom."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, WIDTH, 12), ACCENT)
    title = f"LLM Inference Bake-Off  ·  {EXPERIMENTS_BY_NAME[result.experiment].title}"
    draw.text((MARGIN, 40), title, SOFT, _font(26))
    lines, font = _fitting(draw, _plain(headline(result)))
    for place, line in enumerate(lines):
        draw.text((MARGIN, 92 + place * (font.size * 1.25)), line, INK, font)
    drawn = next(iter(figures(result).values()), None)
    series = list(_series(result, drawn)) if drawn is not None else []
    if drawn is not None and series:
        draw.text((MARGIN, CHART_TOP - 30), _plain(_quantity(drawn)), SOFT, _font(19))
    bars = [one for one in series if len(one.points) == 1]
    lines_drawn = [one for one in series if len(one.points) > 1]
    if lines_drawn:
        _draw_lines(draw, lines_drawn)
    elif bars:
        _draw_bars(draw, bars[:MOST_BARS])
    told = _plain(" · ".join([result.source_line, *result.labels[:1]]))
    said = _wrapped(draw, told, _font(19), WIDTH - 2 * MARGIN)[:2]
    for place, line in enumerate(said):
        draw.text((MARGIN, HEIGHT - 58 + 25 * place), line, SOFT, _font(19))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _quantity(drawn: plotly.graph_objects.Figure) -> str:
    """What the first panel shows: the title of its y axis, else its own."""
    title = drawn.layout.yaxis.title.text or next((one.text for one in drawn.layout.annotations), "")
    return LINE_BREAK.sub(" ", str(title))


def _series(result: ExperimentResult, drawn: plotly.graph_objects.Figure) -> Iterator[_Series]:
    """What a chart draws in its first panel, extrapolations and empty bars left out."""
    rows = {row.title: row for row in result.engines}
    for name, kind, points in drawn_points(drawn):
        row = rows.get(_plain(LINE_BREAK.sub(", ", name)))
        numbers = tuple((x, y) for x, y in points if isinstance(y, int | float))
        # Only what was measured of an engine: no ceilings, no dots of single repeats beside their bar.
        if row is not None and numbers and (kind == "bar") == (len(numbers) == 1):
            colour = row.colour if COLOUR.fullmatch(row.colour) else INK
            yield _Series(_plain(row.title), _lighter(colour) if row.variant else colour, numbers)


def _draw_bars(draw: ImageDraw.ImageDraw, bars: Sequence[_Series]) -> None:
    top = max(one.points[0][1] for one in bars) or 1.0
    step = (CHART_BOTTOM - CHART_TOP) / len(bars)
    thick = min(44.0, step * 0.72)
    font = _font(min(22, max(14, int(thick * 0.6))))
    label_width = max(draw.textlength(one.name, font) for one in bars)
    left = MARGIN + min(420.0, label_width) + 20
    for place, one in enumerate(bars):
        value = one.points[0][1]
        y = CHART_TOP + place * step
        draw.text((left - 20, y + thick / 2), one.name, INK, font, anchor="rm")
        right = left + (WIDTH - MARGIN - 110 - left) * value / top
        draw.rectangle((left, y, max(left + 2, right), y + thick), one.colour)
        draw.text((max(left + 2, right) + 10, y + thick / 2), _number(value), INK, font, anchor="lm")


def _draw_lines(draw: ImageDraw.ImageDraw, lines: Sequence[_Series]) -> None:
    """Over places of equal distance, as levels are read: 1, 2, 4 ..."""
    places = list(dict.fromkeys(x for one in lines for x, _ in one.points))
    if all(isinstance(x, int | float) for x in places):
        places.sort(key=float)
    top = max(y for one in lines for _, y in one.points) or 1.0
    left, right = MARGIN + 20, WIDTH - MARGIN - 330
    step = (right - left) / max(1, len(places) - 1)
    draw.line((left, CHART_BOTTOM - 24, right, CHART_BOTTOM - 24), GRID, 2)
    for place, x in enumerate(places):
        draw.text((left + place * step, CHART_BOTTOM - 18), str(x), SOFT, _font(17), anchor="ma")
    for number, one in enumerate(lines[:MOST_BARS]):
        path = [
            (left + places.index(x) * step, CHART_BOTTOM - 24 - (CHART_BOTTOM - 40 - CHART_TOP) * y / top)
            for x, y in one.points
        ]
        draw.line(path, one.colour, 5, joint="curve")
        y = CHART_TOP + 14 + 30 * number
        draw.rectangle((right + 40, y - 7, right + 64, y + 7), one.colour)
        words = f"{one.name[:28]}  {_number(one.points[-1][1])}"
        draw.text((right + 74, y), words, INK, _font(18), anchor="lm")


def _fitting(draw: ImageDraw.ImageDraw, words: str) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """The sentence in the largest letters in which it fits above the chart; cut off where none is small enough."""
    for size in (44, 38, 33, 28, 24):
        lines = _wrapped(draw, words, _font(size), WIDTH - 2 * MARGIN)
        if len(lines) * size * 1.25 <= HEADLINE_ROOM:
            return lines, _font(size)
    most = int(HEADLINE_ROOM / (24 * 1.25))
    return [*lines[: most - 1], f"{lines[most - 1]} ..."], _font(24)


def _wrapped(draw: ImageDraw.ImageDraw, words: str, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word[:120])
    return [line for line in lines if line]


def _lighter(colour: str) -> str:
    """Half way to the paper: a variant beside its engine."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{(part + 255) // 2:02x}" for part in parts)


def _plain(words: str) -> str:
    """In the letters that the font has."""
    return "".join(letter for letter in words.translate(PLAINER) if letter.isprintable() and ord(letter) < 0x250)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The one that comes with the package, so that a picture looks the same on every server."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
