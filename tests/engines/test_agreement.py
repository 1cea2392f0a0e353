from __future__ import annotations

import pytest

from engines.agreement import Agreement, agreement
from engines.timeline import Arrival, Timeline


def answer(*arrivals: str | Arrival) -> Timeline:
    stamped = (one if isinstance(one, Arrival) else Arrival(0.1, one, tokens=1) for one in arrivals)
    return Timeline(0.0, tuple(stamped), closed=1.0)


def test_equal_answers_agree_to_the_end_however_they_were_cut() -> None:
    assert agreement(answer("One", " two"), answer("On", "e two")) == Agreement(7, 2, True)


def test_the_shared_tokens_are_those_of_the_first_answer_that_lie_before_the_difference() -> None:
    # "The cache " is shared: 10 characters; the token " grows" is not whole in them.
    assert agreement(answer("The", " cache", " grows"), answer("The cache ends")) == Agreement(10, 2, False)


def test_a_chunk_of_several_tokens_counts_only_when_all_of_it_is_shared() -> None:
    first = answer(Arrival(0.1, "a b c", tokens=3), Arrival(0.2, " d e", tokens=2))
    assert agreement(first, answer("a b c d f")) == Agreement(8, 3, False)


def test_an_answer_that_stops_earlier_is_not_the_same() -> None:
    assert agreement(answer("One", " two"), answer("One")) == Agreement(3, 1, False)


def test_thinking_is_not_compared() -> None:
    first = answer(Arrival(0.1, "hm", reasoning=True, tokens=1), "One")
    assert agreement(first, answer("One")) == Agreement(3, 1, True)


@pytest.mark.parametrize("silent", [answer(), answer(Arrival(0.1, "hm", reasoning=True))])
def test_without_text_there_is_nothing_to_compare(silent: Timeline) -> None:
    assert agreement(silent, answer("One")) is None
    assert agreement(answer("One"), silent) is None
