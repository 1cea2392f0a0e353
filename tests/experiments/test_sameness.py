from __future__ import annotations

from dataclasses import replace

from engines.timeline import Arrival, Timeline
from experiments.result import EngineRow, ExperimentResult, RequestRow
from experiments.sameness import same_answers
from tests.experiments.test_result import result_of


def answered(engine: str, text: str, group: str = "", warmup: bool = False, error: str | None = None) -> RequestRow:
    arrivals = tuple(Arrival(0.1, f" {word}", tokens=1) for word in text.split())
    return RequestRow(engine, 1, warmup, Timeline(0.0, arrivals, error=error), group)


def compared(*requests: RequestRow, temperature: float = 0.0) -> list[str]:
    names = dict.fromkeys(row.engine for row in requests)
    rows = tuple(EngineRow(name, name.title(), "#000000") for name in names)
    result: ExperimentResult = replace(
        result_of(), engines=rows, requests=requests, settings={"temperature": temperature}
    )
    return [one.words for one in same_answers(result)]


def test_each_engine_is_compared_with_the_first_that_answered() -> None:
    assert compared(answered("quick", "a b c"), answered("slow", "a b c"), answered("other", "a b d e")) == [
        "Slow: the same as Quick to the end, 3 tokens",
        "Other: departs from Quick at token 3, after 2 that agree",
    ]


def test_each_prompt_is_compared_by_itself() -> None:
    words = compared(
        answered("quick", "a", "prompt 1"),
        answered("quick", "b", "prompt 2"),
        answered("slow", "a", "prompt 1"),
        answered("slow", "c", "prompt 2"),
    )
    assert words == [
        "Slow (prompt 1): the same as Quick to the end, 1 token",
        "Slow (prompt 2): departs from Quick at token 1, after 0 that agree",
    ]


def test_warm_ups_and_failures_are_not_compared() -> None:
    assert (
        compared(answered("quick", "a", error="broke off"), answered("slow", "b", warmup=True), answered("other", "c"))
        == []
    )


def test_above_temperature_0_answers_differ_by_intent_and_nothing_is_compared() -> None:
    assert compared(answered("quick", "a"), answered("slow", "b"), temperature=0.7) == []


def test_answers_of_random_weights_are_not_compared() -> None:
    requests = (answered("quick", "a b"), answered("slow", "a c"))
    rows = tuple(
        EngineRow(name, name.title(), "#000000", config={"random_weights": True}) for name in ("quick", "slow")
    )
    result = replace(result_of(), engines=rows, requests=requests, settings={"temperature": 0.0})
    assert same_answers(result) == []
    plain = tuple(replace(row, config={"random_weights": False}) for row in rows)
    assert len(same_answers(replace(result, engines=plain))) == 1
