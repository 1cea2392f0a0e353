"""Same answer? Where one answer departs from another, in characters and in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from engines.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far an answer goes with the first one. `characters` and `tokens` (of the first answer) that both share;
    `whole`: the two are the same to the end."""

    characters: int
    tokens: int
    whole: bool


def agreement(first: Timeline, other: Timeline) -> Agreement | None:
    """None where one of the two has no text. Thinking is not compared."""
    text, against = first.text, other.text
    if not text or not against:
        return None
    shared = 0
    for mine, theirs in zip(text, against, strict=False):
        if mine != theirs:
            break
        shared += 1
    tokens = end = 0
    for arrival in first.arrivals:
        if arrival.reasoning:
            continue
        end += len(arrival.text)
        if end > shared:
            break
        tokens += 1 if arrival.tokens is None else arrival.tokens
    return Agreement(shared, tokens, text == against)
