from __future__ import annotations

import re

from demo_model.corpus import read_corpus
from demo_model.evaluate import held_back_questions, summary, told
from engines.agreement import Agreement
from engines.timeline import Arrival, Timeline


def plain(question: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", question.lower()).strip()


def answer(*words: str, error: str | None = None) -> Timeline:
    arrivals = tuple(Arrival(0.1 * place, word, tokens=1) for place, word in enumerate(words))
    return Timeline(0.0, arrivals, closed=1.0, error=error)


def test_twenty_questions_are_held_back_and_none_is_in_the_corpus() -> None:
    questions = held_back_questions()
    known = {plain(question) for entry in read_corpus() for question in entry.questions}
    assert len(set(questions)) == 20
    assert [question for question in questions if plain(question) in known] == []


def test_answers_that_are_the_same_are_shown_once() -> None:
    words = told("Why?", {"A": answer("It", " is"), "B": answer("It", " is"), "C": answer("It", " was")})
    assert words == "Q: Why?\nA: It is\nB: the same\nC: parts after 1 tokens\n    It was"


def test_a_failed_answer_shows_its_error() -> None:
    assert "parts after 0 tokens\n    refused" in told("Why?", {"A": answer("It"), "B": answer(error="refused")})


def test_the_summary_counts_whole_answers_and_long_agreements() -> None:
    compared = [Agreement(900, 200, True), Agreement(80, 20, True), Agreement(300, 40, False), Agreement(9, 3, False)]
    assert summary("B", [*compared, None]) == "B: 2 of 5 the same to the end, 3 for at least 32 tokens"
