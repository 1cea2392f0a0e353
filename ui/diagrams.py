"""One small drawing per tab: the mechanism at a glance. Inline SVG that takes its ink from the page, light or dark.

The engines' own colours come in as `--engine-1` to `--engine-3`; a screen reader gets the title and the description.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from engines.base import Engine

WIDTH, HEIGHT = 320, 104


def engine_colours(engines: Iterable[Engine]) -> str:
    """The first engines' colours as CSS variables, for a style attribute."""
    return ";".join(f"--engine-{place}:{escape(engine.colour)}" for place, engine in enumerate(engines, start=1))


def diagram(name: str) -> str:
    """The drawing of one tab, by its experiment's name or "results"; empty for an experiment that has none."""
    if name not in DRAWN:
        return ""
    title, description, parts = DRAWN[name]
    own = f"diagram-{name}"
    return (
        f"<svg class='diagram' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-labelledby='{own}-title {own}-words'>"
        f"<title id='{own}-title'>{escape(title)}</title><desc id='{own}-words'>{escape(description)}</desc>"
        f"{parts}</svg>"
    )


def _box(x: float, y: float, width: float, height: float, look: str) -> str:
    return f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='2' class='{look}'/>"


def _word(x: float, y: float, words: str, look: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' class='{look}'>{escape(words)}</text>"


def _baseline() -> str:
    parts = [_word(0, 12, "the first token, then one per reading of the model")]
    for row, (wait, gap) in enumerate(((62, 22), (26, 11), (36, 16)), start=1):
        y = 4 + 26 * row
        parts.append(_box(0, y, wait - 4, 14, "outline"))
        parts += [_box(x, y, 7, 14, f"e{row}") for x in range(wait, WIDTH - 12, gap)]
    return "".join(parts)


def _speculation() -> str:
    parts = [_word(0, 12, "a small model guesses four …")]
    parts += [_box(24 * place, 20, 20, 16, "outline") for place in range(4)]
    parts += [_word(0, 62, "… the large one checks all four in one step")]
    parts += [_box(24 * place, 70, 20, 16, "e2" if place < 3 else "faint") for place in range(4)]
    parts += [_word(24 * place + 10, 82, "✓", "mid on") for place in range(3)]
    parts += [_word(82, 82, "✗", "mid")]
    parts += [_word(112, 82, "3 tokens, 1 step")]
    return "".join(parts)


def _prefix_caching() -> str:
    parts = [_word(0, 12, "first prompt: everything is read")]
    parts += [_box(0, 20, 220, 16, "e2"), _box(224, 20, 40, 16, "e3"), _word(270, 32, "answer")]
    parts += [_word(0, 62, "next prompt: only the question is read")]
    parts += [_box(0, 70, 220, 16, "outline dashed"), _box(224, 70, 40, 16, "e3"), _word(270, 82, "answer")]
    return "".join(parts)


def _concurrency() -> str:
    parts = [_word(0, 12, "queue: one after the other"), _word(176, 12, "batch: all in each step")]
    for row in range(4):
        y = 20 + 20 * row
        parts.append(_box(38 * row, y, 34, 12, "e1"))
        if row:
            parts.append(_box(0, y, 38 * row - 4, 12, "outline dashed"))
        parts += [_box(176 + 6 * row + 15 * step, y, 11, 12, "e2") for step in range(7)]
    return "".join(parts)


def _results() -> str:
    parts = [_word(0, 12, "every run is a file: open, overlay, share")]
    for place, (height, look) in enumerate(((30, "e1"), (64, "e2"), (46, "e3"))):
        parts += [_box(20 + 60 * place, 96 - height, 20, height, look)]
        parts += [_box(42 + 60 * place, 96 - height * 0.8, 20, height * 0.8, "outline")]
    return "".join(parts)


DRAWN = {
    "baseline": (
        "Waiting for the first token, then token after token",
        "Three engines answer the same question. Each waits for its first token, then writes one token per reading of "
        "the model; the gaps between tokens differ from engine to engine.",
        _baseline(),
    ),
    "speculation": (
        "Guess ahead, check at once",
        "A small model guesses four tokens. The large model checks all four in one step, keeps the first three and "
        "drops the last: three tokens for one step.",
        _speculation(),
    ),
    "prefix-caching": (
        "Read the shared beginning once",
        "The first prompt is read from its beginning. The next one begins with the same text, which the engine has "
        "kept, so that only the question at its end is read.",
        _prefix_caching(),
    ),
    "concurrency": (
        "A queue beside a batch",
        "On the left a queue answers four people one after the other, and the last waits longest. On the right a batch "
        "writes a token for each of them in every step.",
        _concurrency(),
    ),
    "results": (
        "Two runs beside each other",
        "The bars of three engines, each with the bar of a second run laid beside it.",
        _results(),
    ),
}
