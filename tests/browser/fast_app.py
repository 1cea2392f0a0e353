"""`python -m tests.browser.fast_app ...`: the app itself, racing three scripted engines of 300 tokens per second."""

from __future__ import annotations

import sys

import app
from engines import scripted
from engines.scripted import TEXT, Script, scripted_engine

TOKENS_PER_SECOND = 300


def main(arguments: list[str]) -> int:
    script = Script(start=0.1, first_token=0.02, gap=1 / TOKENS_PER_SECOND, text=TEXT)
    colours = {"slow": "#6B7280", "quick": "#0072B2", "bursty": "#D55E00"}
    scripted.SCRIPTED_ENGINES = tuple(
        scripted_engine(name, name.title(), colour, script) for name, colour in colours.items()
    )
    return app.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
