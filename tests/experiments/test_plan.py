"""What cannot be run is refused before anything starts, with the name of the setting and a sentence about it."""

from __future__ import annotations

import pytest

from experiments.base import PRICE, REPEAT_LIMIT, REPEATS, TOKEN_LIMIT, Plan, PlanError, Setting

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


# What was typed


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("2.5", 2.5),
        ("$2.5", 2.5),
        (" $ 2.50 ", 2.5),
        ("1,234.5", 1234.5),
        ("0", 0.0),
        ("", None),
        ("  ", None),
        (None, None),
        (2.5, 2.5),
        (3, 3),
    ],
)
def test_a_number_may_be_typed_as_text_and_left_empty(typed: object, value: float | None) -> None:
    assert PRICE.read(typed) == value


@pytest.mark.parametrize("typed", ["much", "$", "2.5 per hour", "€2", "1.2.3"])
def test_a_number_that_is_none_is_refused_where_it_was_typed(typed: str) -> None:
    with pytest.raises(PlanError) as caught:
        PRICE.read(typed)
    assert caught.value.field == "dollars_per_hour"
    assert caught.value.message == f"Price of this hardware, $ per hour must be a number, not {typed!r}."


@pytest.mark.parametrize("typed", ["nan", "inf", "-1", "1e400"])
def test_a_number_that_is_none_of_this_world_is_refused_by_the_plan(typed: str) -> None:
    with pytest.raises(PlanError, match="Price per hour must be a number from 0 to 10000"):
        Plan(**GOOD, dollars_per_hour=PRICE.read(typed))  # type: ignore[arg-type]


@pytest.mark.parametrize("typed", ["2,5", "0,50", "1,2345", "12,34.5"])
def test_a_comma_that_parts_no_thousands_is_refused(typed: str) -> None:
    with pytest.raises(PlanError):
        PRICE.read(typed)


@pytest.mark.parametrize("typed", [3, 3.0])
def test_a_whole_number_is_read_as_one(typed: object) -> None:
    assert Plan(**GOOD, repeats=REPEATS.read(typed)).repeats == 3  # type: ignore[arg-type]


def test_a_whole_number_may_be_typed_as_text() -> None:
    assert Plan(**GOOD, repeats=REPEATS.read("3")).repeats == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("typed", [2.5, "2.5"])
def test_half_a_repeat_is_refused(typed: object) -> None:
    with pytest.raises(PlanError, match="Repeats must be a whole number from 1 to 20, not 2.5"):
        Plan(**GOOD, repeats=REPEATS.read(typed))  # type: ignore[arg-type]


def test_a_line_that_was_left_empty_is_no_text() -> None:
    line = Setting("model", "line", "Model", "", "owner/model")
    assert (line.read(None), line.read(""), line.read("owner/other")) == ("", "", "owner/other")
