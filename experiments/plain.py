"""Somebody else's words made plain: a result's file may hold anything, and its words stand between our own.

What turns the reading direction, moves a terminal's cursor or cannot be seen is taken out; what is too long is cut.
Markup stays what it is, text: whoever shows it escapes it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from functools import partial
from html import escape
from typing import Any

from experiments.result import EngineRow, ExperimentResult, RequestRow, ResultError, TrialRow

NAME, SENTENCE, TEXT = 300, 2_000, 20_000  # characters: of a name, of what is said in a line, of a log or a command
MOST_ENGINES, MOST_LABELS, MOST_GROUPS = 100, 100, 1_000
MARKUP = re.compile("[&<>]")
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
# Controls but tab and line break, marks that turn the direction or join nothing, half characters, the end of a line
# as Unicode has it, and tags that cannot be seen. The zero-width joiner stays: emoji are made with it.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
# More marks on one letter than any script needs grow over the lines above and below.
PILED = re.compile("([\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{4})"
                   "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")  # fmt: skip


def plain_text(text: str, longest: int = TEXT) -> str:
    """On several lines, without what acts or hides, `longest` characters at most."""
    text = text[: 4 * longest].replace("\r\n", "\n").replace("\r", "\n")
    text = PILED.sub(r"\1", UNSEEN.sub("", ANSI.sub("", text)))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def plain_line(text: str, longest: int = SENTENCE) -> str:
    """The same on one line."""
    return " ".join(plain_text(text, longest).split())


plain_name = partial(plain_line, longest=NAME)


def plain_result(result: ExperimentResult) -> ExperimentResult:
    """The result with plain words everywhere but in the answers. Raises ResultError for what no run of ours has."""
    if len(result.engines) > MOST_ENGINES:
        raise ResultError(f"This result has {len(result.engines):,} engines; {MOST_ENGINES} can be shown.")
    if len({row.group for row in result.requests}) > MOST_GROUPS:
        raise ResultError(f"This result has more than {MOST_GROUPS:,} groups of requests.")
    try:
        datetime.fromisoformat(result.started)
    except ValueError:
        raise ResultError(f"This result began at no time: {plain_name(result.started)!r}.") from None
    names: dict[str, str] = {}  # many rows have few names

    def name(text: str) -> str:
        if text not in names:
            names[text] = plain_name(text)
        return names[text]

    def request(row: RequestRow) -> RequestRow:
        engine, group, error = name(row.engine), name(row.group), row.timeline.error
        if error is not None and error != (told := plain_line(error)):
            row = replace(row, timeline=replace(row.timeline, error=told))
        return row if (engine, group) == (row.engine, row.group) else replace(row, engine=engine, group=group)

    def trial(row: TrialRow) -> TrialRow:
        engine, group = name(row.engine), name(row.group)
        return row if (engine, group) == (row.engine, row.group) else replace(row, engine=engine, group=group)

    return replace(
        result,
        id=name(result.id),
        host=name(result.host),
        hardware=_plain_values(result.hardware),
        model=name(result.model),
        model_note=plain_line(result.model_note),
        engines=tuple(map(_plain_engine, result.engines)),
        requests=tuple(map(request, result.requests)),
        trials=tuple(map(trial, result.trials)),
        labels=tuple(map(plain_line, result.labels[:MOST_LABELS])),
        versions={name(what): name(version) for what, version in result.versions.items()},
        price=result.price and replace(result.price, source=plain_line(result.price.source)),
        spent=result.spent and replace(result.spent, source=plain_line(result.spent.source)),
    )


def _plain_engine(row: EngineRow) -> EngineRow:
    if not COLOUR.fullmatch(row.colour):
        raise ResultError(f"This result's colour of {plain_name(row.label)} is none: {plain_name(row.colour)!r}.")

    def line(text: str | None) -> str | None:
        return None if text is None else plain_line(text)

    return replace(
        row,
        name=plain_name(row.name),
        label=plain_name(row.label),
        variant=plain_name(row.variant),
        compared_with=plain_name(row.compared_with),
        unavailable=line(row.unavailable),
        version=line(row.version),
        command=None if row.command is None else plain_text(row.command),
        start_phases={plain_name(phase): seconds for phase, seconds in row.start_phases.items()},
        caveat=line(row.caveat),
        error=line(row.error),
        log_tail=plain_text(row.log_tail),
        hardware=plain_name(row.hardware),
    )


def _plain_values(values: dict[str, Any]) -> dict[str, Any]:
    return {plain_name(what): plain_line(value) if isinstance(value, str) else value for what, value in values.items()}


def in_charts(result: ExperimentResult) -> ExperimentResult:
    """The result as charts get it: Plotly takes text for markup with links, so its words are escaped."""

    def told(text: str) -> str:
        return escape(text, quote=False)

    def row(one: RequestRow) -> RequestRow:
        error = one.timeline.error
        if error and MARKUP.search(error):
            one = replace(one, timeline=replace(one.timeline, error=told(error)))
        return replace(one, group=told(one.group)) if MARKUP.search(one.group) else one

    return replace(
        result,
        hardware={what: told(value) if isinstance(value, str) else value for what, value in result.hardware.items()},
        model=told(result.model),
        engines=tuple(
            replace(
                one,
                label=told(one.label),
                variant=told(one.variant),
                unavailable=one.unavailable and told(one.unavailable),
                error=one.error and told(one.error),
                caveat=one.caveat and told(one.caveat),
                start_phases={told(phase): seconds for phase, seconds in one.start_phases.items()},
            )
            for one in result.engines
        ),
        requests=tuple(map(row, result.requests)),
        trials=tuple(replace(one, group=told(one.group)) if MARKUP.search(one.group) else one for one in result.trials),
        labels=tuple(map(told, result.labels)),
    )
