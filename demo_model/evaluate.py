"""Asks the held-back questions of every engine and compares the answers: `python -m demo_model.evaluate`.

Writes one block per question to the standard output: the answers, and for how many tokens each agrees with the first.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from demo_model.bundled import default_model
from engines import ENGINES
from engines.agreement import Agreement, agreement
from engines.base import Request
from engines.client import EngineClient
from engines.local import LocalHost
from engines.openai_stream import ChatStreamParser, Endpoint
from engines.timeline import Timeline, record

QUESTIONS = Path(__file__).parent / "held_back.txt"
LONGEST_ANSWER = 320


def held_back_questions() -> list[str]:
    return QUESTIONS.read_text(encoding="ascii").splitlines()


async def answers(endpoint: Endpoint, questions: list[str], longest: int = LONGEST_ANSWER) -> list[Timeline]:
    """At temperature 0, one at a time, each until the model ends it or it has `longest` tokens."""
    async with EngineClient(endpoint) as client:
        requests = [Request(question, longest, fixed_length=False) for question in questions]
        return [await record(request, client.blocks, ChatStreamParser()) for request in requests]


def told(question: str, given: dict[str, Timeline]) -> str:
    """One question's answers: the first whole, the others whole where they depart from it."""
    (first, reference), *others = given.items()
    lines = [f"Q: {question}", f"{first}: {reference.error or reference.text}"]
    for label, timeline in others:
        compared = agreement(reference, timeline)
        if compared and compared.whole:
            lines.append(f"{label}: the same")
        else:
            lines.append(f"{label}: parts after {compared.tokens if compared else 0} tokens")
            lines.append(f"    {timeline.error or timeline.text}")
    return "\n".join(lines)


def summary(label: str, compared: list[Agreement | None], tokens: int = 32) -> str:
    same = sum(bool(one and one.whole) for one in compared)
    begun = sum(bool(one and (one.whole or one.tokens >= tokens)) for one in compared)
    return f"{label}: {same} of {len(compared)} the same to the end, {begun} for at least {tokens} tokens"


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask every engine the held-back questions.")
    parser.add_argument("--model", default=str(default_model()), help="a model's folder; the bundled one when left out")
    parser.add_argument("--question", action="append", help="ask this instead; may be given several times")
    options = parser.parse_args()
    questions = options.question or held_back_questions()
    given: dict[str, list[Timeline]] = {}
    for engine in ENGINES:
        host = LocalHost([engine], options.model)
        try:
            given[engine.label] = asyncio.run(answers(host.ready(engine.name).endpoint, questions))
        finally:
            host.close()
    for place, question in enumerate(questions):
        print(told(question, {label: timelines[place] for label, timelines in given.items()}), end="\n\n")
    (first, reference), *others = given.items()
    print(f"Compared with {first}, at temperature 0, one request at a time:")
    for label, timelines in others:
        compared = [agreement(mine, theirs) for mine, theirs in zip(reference, timelines, strict=True)]
        print(summary(label, compared))
    return 1 if any(timeline.error for timelines in given.values() for timeline in timelines) else 0


if __name__ == "__main__":
    sys.exit(main())
