"""What cannot be run is refused before anything starts, with the name of the setting and a sentence about it."""

from __future__ import annotations

import pytest

from experiments.base import REPEAT_LIMIT, TOKEN_LIMIT, Plan, PlanError

GOOD = {"prompt": "Why is the sky blue?", "engines": ("quick",)}


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("prompt", "", "Type a prompt first: there is nothing to answer."),
        ("prompt", " \n\t", "Type a prompt first: there is nothing to answer."),
        ("engines", (), "Choose at least one engine."),
        ("repeats", 0, "Repeats must be a whole number from 1 to 20, not 0."),
        ("repeats", 21, "Repeats must be a whole number from 1 to 20, not 21."),
        ("repeats", 2.5, "Repeats must be a whole number from 1 to 20, not 2.5."),
        ("repeats", True, "Repeats must be a whole number from 1 to 20, not True."),
        ("repeats", None, "Repeats must be a whole number from 1 to 20, not nothing."),
        ("repeats", "3", "Repeats must be a whole number from 1 to 20, not 3."),
        ("warmups", -1, "Warm-ups must be a whole number from 0 to 20, not -1."),
        ("warmups", None, "Warm-ups must be a whole number from 0 to 20, not nothing."),
        ("max_tokens", 0, "Answer length must be a whole number from 1 to 2048, not 0."),
        ("max_tokens", 2049, "Answer length must be a whole number from 1 to 2048, not 2049."),
        ("max_tokens", float("nan"), "Answer length must be a whole number from 1 to 2048, not nan."),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_the_reason(setting: str, value: object, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan(**{**GOOD, setting: value})  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.message) == (setting, message)
    assert str(caught.value) == message


def test_the_limits_themselves_can_be_used() -> None:
    Plan(**GOOD, repeats=1, warmups=0, max_tokens=1)  # type: ignore[arg-type]
    Plan(**GOOD, repeats=REPEAT_LIMIT, warmups=REPEAT_LIMIT, max_tokens=TOKEN_LIMIT)  # type: ignore[arg-type]


def test_by_default_engines_take_turns_and_answer_greedily_until_the_model_ends() -> None:
    plan = Plan(**GOOD)  # type: ignore[arg-type]
    assert not plan.race
    assert not plan.fixed_length
    assert (plan.temperature, plan.seed) == (0.0, 42)
