"""What bounds a result and what it costs, with the arithmetic beside each number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engines.bandwidth import Bandwidth
from engines.base import Engine
from engines.gpus import PRICES_OF, Price
from engines.hardware import Hardware
from engines.local import LocalHost
from engines.model_shape import ModelShape
from engines.spending import dollars
from experiments.base import Plan, PlanError
from experiments.baseline import EXPERIMENT
from experiments.drawing import bar_charts
from experiments.limits import (
    decode_ceiling,
    dollars_per_million,
    limit_notes,
    of_ceiling,
    price_of,
    three_digits,
)
from experiments.report import figures, headline, notes, table
from experiments.result import ExperimentResult
from experiments.run import run
from experiments.trust import beyond_ceiling
from tests.conftest import MACHINE
from tests.experiments.test_result import OUTCOMES, result_of

SHAPE = ModelShape(weight_bytes=1000, cache_bytes=10)
# Every answer by hand has 7 tokens before it and is 2 long, so a step finds 7 + 2 / 2 = 8 tokens there on average and
# reads 1,000 + 8 * 10 = 1,080 bytes. At 108,000 bytes/s that is 100 steps per second.
BANDWIDTH = Bandwidth(108_000.0, "by hand")
PRICE = Price(3.6, "by hand")  # $/hour: 0.001 per second


def limited(warmups: int = 0, **engines: OUTCOMES) -> ExperimentResult:
    result = result_of(warmups, **engines)
    return replace(result, model_shape=SHAPE, bandwidth=BANDWIDTH, price=PRICE)


def cells(result: ExperimentResult, heading: str) -> list[str]:
    told = table(result)
    return [row[told.headings.index(heading)] for row in told.rows]


# The ceiling


def test_one_user_gets_a_token_each_time_the_model_and_the_context_have_been_read() -> None:
    assert decode_ceiling(limited(quick=[50.0])) == pytest.approx(108_000 / 1080)


def test_many_users_share_the_weights_but_not_the_context() -> None:
    # 4 tokens per step of 1,000 + 4 * 80 bytes
    assert decode_ceiling(limited(quick=[50.0]), 4) == pytest.approx(4 * 108_000 / 1320)


def test_more_users_touch_more_experts() -> None:
    mixture = replace(limited(quick=[50.0]), model_shape=ModelShape(1000, 10, 800, 4, 1))
    # A quarter of 800 bytes of experts for one user, 1 - (3/4)² = 7/16 for two
    assert decode_ceiling(mixture, 1) == pytest.approx(108_000 / (1080 + 200))
    assert decode_ceiling(mixture, 2) == pytest.approx(2 * 108_000 / (1000 + 2 * 80 + 350))


def test_the_context_is_that_of_measured_answers_that_succeeded() -> None:
    result = limited(warmups=1, quick=[50.0, None])
    warmup, answered, failed = result.requests
    long = replace(warmup.timeline.usage, prompt_tokens=5000)
    others = (replace(one, timeline=replace(one.timeline, usage=long)) for one in (warmup, failed))
    assert decode_ceiling(replace(result, requests=(answered, *others))) == pytest.approx(100)


def test_where_no_context_is_known_the_ceiling_is_that_of_the_weights() -> None:
    assert decode_ceiling(limited()) == pytest.approx(108_000 / 1000)


@pytest.mark.parametrize("unknown", [{"model_shape": None}, {"bandwidth": None}, {"model_shape": ModelShape(0, 0)}])
def test_without_its_parts_there_is_no_ceiling(unknown: dict[str, Any]) -> None:
    result = replace(limited(quick=[50.0]), **unknown)
    assert decode_ceiling(result) is None
    assert of_ceiling(result, 50.0) is None
    assert cells(result, "Of the memory ceiling") == ["–"]


def test_the_share_of_the_ceiling_is_of_as_many_users() -> None:
    result = limited(quick=[50.0])
    assert of_ceiling(result, 50.0) == pytest.approx(50 / 100)
    assert of_ceiling(result, 270.0, 4) == pytest.approx(270 / (4 * 108_000 / 1320))  # 82.5 %
    assert of_ceiling(result, None) is None


def test_the_baselines_table_tells_the_share_of_each_engines_mean_speed() -> None:
    result = limited(quick=[70.0, 80.0], slow=[25.0], broken="It could not start.")
    assert cells(result, "Of the memory ceiling") == ["75%", "25%", "–"]


# The price


def test_a_million_tokens_cost_the_price_of_the_time_they_take() -> None:
    # 1e6 tokens / 50 tok/s = 20,000 s at 0.001 $/s
    assert dollars_per_million(limited(), 50.0) == pytest.approx(20)
    assert dollars_per_million(limited(), None) is None
    assert dollars_per_million(limited(), 0.0) is None
    assert dollars_per_million(replace(limited(), price=None), 50.0) is None
    assert dollars_per_million(replace(limited(), price=Price(0.0, "as typed")), 50.0) == 0


def test_the_baselines_cost_counts_whole_answers_that_succeeded() -> None:
    # 0.1 s to the first token and 1/100 and 1/50 s to the second: 4 tokens / (0.11 + 0.12) s = 17.39 tok/s,
    # and 0.001 / 17.39 * 1e6 = $57.50. Neither the warm-up, which takes 1.1 s, nor the failure counts.
    result = limited(warmups=1, quick=[100.0, None, 50.0], failing=[None], broken="It could not start.")
    assert cells(result, "Cost per million tokens") == ["$57.50", "–", "–"]
    assert cells(replace(result, price=None), "Cost per million tokens") == ["–"] * 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (0.0, "$0.00"),
        (1234.5, "$1,234.50"),
        (0.996, "$1.00"),
        (0.5, "$0.50"),
        (0.0567, "$0.057"),
        (0.0000123, "$0.000012"),
        # From somebody else's file
        (float("nan"), "–"),
        (float("inf"), "–"),
        (-3.0, "$-3.00"),
    ],
)
def test_dollars_are_told_in_cents_or_as_far_as_they_go(value: float | None, words: str) -> None:
    assert dollars(value) == words


def plan_at(price: float | None) -> Plan:
    return Plan("Go.", ("quick",), dollars_per_hour=price)


def hardware(gpu: str | None) -> Hardware:
    return replace(MACHINE, gpu=gpu, gpu_count=1 if gpu else 0)


def test_the_price_is_as_typed_else_as_listed_else_unknown() -> None:
    assert price_of(plan_at(1.5), hardware("NVIDIA L4")) == Price(1.5, "as typed")
    assert price_of(plan_at(0), hardware("NVIDIA L4")) == Price(0, "as typed")
    listed = Price(0.8, f"Modal's list price of {PRICES_OF} for one L4")
    assert price_of(plan_at(None), hardware("NVIDIA L4")) == listed
    assert price_of(plan_at(None), hardware("NVIDIA H100 PCIe")) is None  # known, but not for rent
    assert price_of(plan_at(None), hardware("Test GPU")) is None
    assert price_of(plan_at(None), hardware(None)) is None


@pytest.mark.parametrize("price", [-1, 10_001, float("nan"), True, "much"])
def test_a_price_that_cannot_be_is_refused(price: Any) -> None:
    with pytest.raises(PlanError, match=r"Price per hour must be a number from 0 to 10000, not") as caught:
        plan_at(price)
    assert caught.value.field == "dollars_per_hour"


def test_a_price_is_typed_or_left_empty() -> None:
    assert EXPERIMENT.read_plan(("quick",), {"dollars_per_hour": 2.5}).dollars_per_hour == 2.5
    assert EXPERIMENT.read_plan(("quick",), {"dollars_per_hour": None}).dollars_per_hour is None
    assert EXPERIMENT.read_plan(("quick",), {}).dollars_per_hour is None


# Notes


def test_the_notes_say_how_the_ceiling_comes_about_and_who_says_what_it_costs() -> None:
    shape, bandwidth = ModelShape(30_000_000, 0), Bandwidth(58.5e9, "measured")
    result = replace(limited(quick=[50.0]), model_shape=shape, bandwidth=bandwidth)
    assert limit_notes(result) == [
        # 58.5e9 / 30e6 = 1,950
        "The memory ceiling: to write one token the processor reads 30 MB (the weights, and the keys and values of the "
        "text so far). At 58.5 GB/s (measured) that allows one user 1,950 tok/s, unless several tokens come out of one "
        "step.",
        "Cost: $3.60 per hour (by hand).",
    ]
    assert limit_notes(result_of(quick=[50.0])) == []
    assert notes(result) == limit_notes(result)  # the baseline's are these


@pytest.mark.parametrize(
    ("value", "words"), [(3350.0, "3,350"), (123456.7, "123,457"), (58.456, "58.5"), (1.25, "1.25"), (0.512, "0.512")]
)
def test_numbers_of_any_size_keep_three_digits(value: float, words: str) -> None:
    assert three_digits(value) == words


def test_a_large_models_ceiling_and_a_quick_memory_are_told_in_plain_numbers() -> None:
    shape, bandwidth = ModelShape(140_000_000_000, 0), Bandwidth(3350e9, "data sheet of the H100")
    note, _ = limit_notes(replace(limited(quick=[20.0]), model_shape=shape, bandwidth=bandwidth))
    assert "reads 140,000 MB" in note
    assert "At 3,350 GB/s (data sheet of the H100) that allows one user 23.9 tok/s" in note  # 3,350 / 140


def test_speculation_may_be_faster_than_one_token_per_step() -> None:
    result = limited(quick=[150.0])
    drafting = replace(result.engines[0], config={"speculation": {"draft_tokens": 3}})
    assert not beyond_ceiling(replace(result, engines=(drafting,)), drafting)
    assert beyond_ceiling(result, result.engines[0])


# The line in the chart of the decoding speed


def ceiling_words(figure: Any) -> Any:
    return next((one for one in figure.layout.annotations if str(one.text).startswith("memory ceiling")), None)


def test_the_ceiling_is_a_line_over_the_bars() -> None:
    figure = bar_charts(limited(quick=[50.0, 80.0]), ("decode_speed", "ttft"))
    (line,) = figure.layout.shapes
    assert (line.y0, line.y1, line.yref) == (pytest.approx(100), pytest.approx(100), "y")
    words = ceiling_words(figure)
    assert (words.text, words.y, words.xref) == ("memory ceiling: 100 tok/s", pytest.approx(100), "x domain")
    assert figure.layout.yaxis.range == pytest.approx((0, 115))  # 15 % for the words
    assert figure.layout.yaxis2.range is None


def test_bars_above_the_ceiling_are_drawn_whole() -> None:
    figure = bar_charts(limited(quick=[150.0]), ("decode_speed",))
    assert len(figure.layout.shapes) == 1
    assert figure.layout.yaxis.range == pytest.approx((0, 1.15 * 150))


def test_a_ceiling_that_would_flatten_the_bars_is_told_in_words() -> None:
    figure = bar_charts(limited(quick=[20.0]), ("ttft", "decode_speed"))
    assert figure.layout.shapes == ()
    words = ceiling_words(figure)
    assert words.text == "memory ceiling: 100 tok/s ↑"
    assert (words.xref, words.yref, words.y, words.yanchor) == ("x2 domain", "y2", pytest.approx(25), "top")
    assert figure.layout.yaxis2.range == pytest.approx((0, 25))  # a quarter above 20 for the words


@pytest.mark.parametrize("result", [result_of(quick=[50.0]), limited(quick=[None]), limited()])
def test_without_a_ceiling_or_anything_below_it_there_is_no_line(result: ExperimentResult) -> None:
    figure = bar_charts(result, ("decode_speed", "ttft"))
    assert figure.layout.shapes == ()
    assert ceiling_words(figure) is None


@pytest.mark.parametrize("experiment", ["baseline", "speculation"])
@pytest.mark.parametrize("engines", [{}, {"quick": []}, {"quick": [None]}, {"quick": "It could not start."}])
def test_a_result_in_which_nothing_was_measured_is_shown_with_its_limits(
    experiment: str, engines: dict[str, OUTCOMES]
) -> None:
    result = replace(limited(**engines), experiment=experiment)
    assert "Cost: $3.60 per hour (by hand)." in notes(result)
    assert headline(result)
    assert len(table(result).rows) == len(engines)
    figures(result)


def test_somebody_elses_numbers_break_nothing() -> None:
    odd = replace(limited(quick=[50.0]), bandwidth=Bandwidth(0.0, "nobody"), price=Price(float("nan"), "nobody"))
    kept = ExperimentResult.from_json(odd.to_json())
    assert cells(kept, "Of the memory ceiling") == cells(kept, "Cost per million tokens") == ["–"]
    notes(kept), figures(kept)


# A run


def test_a_run_keeps_what_bounded_it_and_what_it_cost(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    host = make_host(scripted("quick"))
    plan = Plan("Go.", ("quick",), repeats=1, warmups=0, max_tokens=6, race=True, dollars_per_hour=2.5)
    result = asyncio.run(run(EXPERIMENT, plan, host, lambda event: None))
    assert result.model_shape is not None
    assert result.model_shape == host.model_shape()
    assert result.bandwidth == host.memory_bandwidth(result.model_shape)
    assert result.price == Price(2.5, "as typed")
    assert cells(result, "Of the memory ceiling") != ["–"]


def test_a_run_in_which_no_engine_started_does_not_measure_memory(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    host = make_host(scripted("quick", fault="exit at start"))
    plan = Plan("Go.", ("quick",), repeats=1, warmups=0, max_tokens=6, race=True)
    result = asyncio.run(run(EXPERIMENT, plan, host, lambda event: None))
    assert (result.model_shape, result.bandwidth, result.price) == (None, None, None)
