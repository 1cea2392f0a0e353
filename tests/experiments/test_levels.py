"""The numbers of the concurrency experiment, each worked out on paper beside what is expected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engines.base import Usage
from experiments.base import Trial
from experiments.levels import (
    arrival_ceiling,
    extrapolated_point,
    in_flight,
    level_point,
    most_users,
    points,
    queued,
    steady_window,
    times_one_user,
    token_moments,
    too_long,
    waited,
)
from tests.experiments.level_rows import NAIVE, VLLM, answer, plan_for, point, result_of, wave

# A wave


def test_the_output_of_a_wave_is_all_tokens_from_the_first_planned_arrival_to_the_last_token() -> None:
    found = level_point(result_of(wave("vllm", 4)), "vllm", 4)
    assert found is not None
    # 4 answers of 11 tokens; the last is sent at 0.3 s and ends 0.2 s later: 44 / 0.5 = 88 tok/s, 4 / 0.5 = 8 good ones
    assert found.tokens_per_second == pytest.approx(88)
    assert found.goodput == pytest.approx(8)
    assert (found.ttft_p50, found.e2e_p50, found.tpot_p50) == pytest.approx((0.1, 0.2, 0.01))
    assert (found.failed, found.slo_share, found.extrapolated, found.spread) == (0, 1.0, False, None)


def test_times_count_from_the_planned_arrival_however_late_it_was_sent() -> None:
    # 0.1 s to the first token, sent 0, 50, 100 ms late: 100, 150, 200 ms, and 100 ms more for the whole answer
    rows = [answer(level=3, index=index, late=0.05 * index) for index in range(3)]
    found = level_point(result_of(rows), "vllm", 3)
    assert found is not None
    assert (found.ttft_p50, found.e2e_p50) == pytest.approx((0.15, 0.25))
    # Between the second and the third of three values: 95 % lies at 1.9, 99 % at 1.98 steps
    assert (found.ttft_p95, found.ttft_p99) == pytest.approx((0.195, 0.199))
    assert (found.e2e_p95, found.e2e_p99) == pytest.approx((0.295, 0.299))
    assert found.tokens_per_second == pytest.approx(33 / 0.3)


def test_a_failed_request_is_counted_and_gives_neither_tokens_nor_times() -> None:
    rows = [*wave("vllm", 3), answer(level=4, index=3, planned=0.3, first=9.0, error="broke off")]
    rows = [replace(row, group="4") for row in rows]
    found = level_point(result_of(rows, levels=(4,)), "vllm", 4)
    assert found is not None
    assert found.failed == 1
    assert found.tokens_per_second == pytest.approx(33 / 0.4)  # sent at 0.2, ended at 0.4 s
    assert found.ttft_p99 == pytest.approx(0.1)
    assert found.slo_share == pytest.approx(3 / 4)
    assert most_users([found]) is None


def test_where_all_failed_nothing_but_that_is_known() -> None:
    result = result_of([answer(error="refused", tokens=0)], levels=(1,))
    assert level_point(result, "vllm", 1) == point(failed=1, slo_share=0.0)


def test_the_rates_of_repeats_are_averaged_and_their_times_are_pooled() -> None:
    rows = [answer(repeat=1), answer(repeat=2, first=0.3), answer(repeat=3, warmup=True, first=7.0)]
    found = level_point(result_of(rows), "vllm", 1)
    assert found is not None
    # 11 / 0.2 = 55 and 11 / 0.4 = 27.5 tok/s
    assert found.tokens_per_second == pytest.approx(41.25)
    assert found.ttft_p50 == pytest.approx(0.2)
    # Student's t for one degree of freedom is 12.706; the deviation is 27.5 / √2, its error 27.5 / 2
    assert found.spread == pytest.approx(12.706 * 13.75, rel=1e-4)


def test_a_trial_that_was_stopped_says_nothing() -> None:
    rows = [*wave("vllm", 1), *wave("vllm", 4)[:2]]
    result = result_of(rows, unfinished=("4",))
    assert [one.level for one in points(result, VLLM)] == [1]


# A sustained load


def test_the_steady_state_lasts_from_the_last_users_first_token_to_the_planned_end() -> None:
    rows = [answer(index=0, first=0.1), answer(index=1, first=0.6), answer(index=0, planned=0.3, first=0.1)]
    assert steady_window(rows, 2.0) == pytest.approx((0.6, 2.0))
    assert steady_window(rows, 0.5) is None  # over before all were served


def test_without_a_token_for_every_user_there_is_no_steady_state() -> None:
    assert steady_window([answer(index=0), answer(index=1, tokens=0, error="refused")], 2.0) is None


def test_only_tokens_inside_the_steady_state_count_over_its_length() -> None:
    # Two users, 1 s. The first asks at 0, 0.4, 0.8 s, the second, whose first token takes 0.2 s longer, at 0 and 0.6.
    first = [answer(level=2, index=0, planned=start, first=0.1, gap=0.1, tokens=4) for start in (0.0, 0.4, 0.8)]
    second = [answer(level=2, index=1, planned=start, first=0.25, gap=0.1, tokens=4) for start in (0.0, 0.6)]
    found = level_point(result_of([*first, *second], load="sustained", seconds=1), "vllm", 2)
    assert found is not None
    # The window is (0.25, 1.0]. First user: 0.3 0.4 | 0.5 0.6 0.7 0.8 | 0.9 1.0 are in it, 8 tokens; second user:
    # 0.35 0.45 0.55 | 0.85 0.95, 5 tokens. 13 tokens / 0.75 s
    assert found.tokens_per_second == pytest.approx(13 / 0.75)
    # Answers that ended in it and kept to 200 ms and 50 ms per token: none, each token took 100 ms
    assert (found.goodput, found.slo_share) == (0, 0)


def test_good_answers_of_a_sustained_load_are_those_that_ended_in_the_steady_state() -> None:
    rows = [answer(planned=start) for start in (0.0, 0.2, 0.4, 0.9)]
    found = level_point(result_of(rows, load="sustained", seconds=1), "vllm", 1)
    assert found is not None
    # The window is (0.1, 1.0]; they end at 0.2, 0.4, 0.6 and, too late, 1.1 s: 3 / 0.9 s
    assert found.goodput == pytest.approx(3 / 0.9)


def test_of_too_short_a_load_no_rate_is_known() -> None:
    rows = [answer(level=2, index=index, first=3.0) for index in range(2)]
    (found,) = points(result_of(rows, load="sustained", seconds=1, levels=(2,)), VLLM)
    assert (found.tokens_per_second, found.goodput) == (None, None)


def test_tokens_that_no_chunk_reported_are_shared_among_the_chunks() -> None:
    row = answer(tokens=4)
    arrivals = tuple(replace(arrival, tokens=None) for arrival in row.timeline.arrivals)
    usage = Usage(output_tokens=6)
    silent = replace(row, timeline=replace(row.timeline, arrivals=arrivals, usage=usage, token_source="final usage"))
    assert [count for _, count in token_moments(silent)] == [1.5] * 4
    # An end-of-text token, counted without a text of its own, comes with the last one
    ended = replace(row, timeline=replace(row.timeline, usage=Usage(output_tokens=5)))
    assert [count for _, count in token_moments(ended)] == [1, 1, 1, 2]
    assert token_moments(answer(tokens=0)) == []


# Limits


@pytest.mark.parametrize(
    ("timing", "good"),
    [
        ({"first": 0.2, "gap": 0.05}, 1),  # exactly at both limits
        ({"first": 0.201, "gap": 0.05}, 0),
        ({"first": 0.2, "gap": 0.051}, 0),
        ({"first": 0.1, "late": 0.11}, 0),  # in time after the sending, too late after the planned arrival
        ({"tokens": 1}, 1),  # nothing to wait for after the first token
        ({"error": "broke off"}, 0),
    ],
)
def test_a_good_request_keeps_to_both_limits(timing: dict[str, Any], good: int) -> None:
    # A hair above the limits, for what rounding adds to 0.2 s in binary
    found = level_point(result_of([answer(**timing)], slo_ttft_ms=200.0001, slo_tpot_ms=50.0001), "vllm", 1)
    assert found is not None
    assert found.slo_share == good


def test_most_users_are_those_of_the_largest_measured_level_with_ninety_nine_good_of_a_hundred() -> None:
    served = [
        point(level=1, slo_share=1.0, failed=0),
        point(level=64, slo_share=0.99, failed=0),
        point(level=80, slo_share=1.0, failed=1),
        point(level=100, slo_share=0.98, failed=0),
        point(level=128, slo_share=1.0, extrapolated=True),
    ]
    assert most_users(served) == 64
    assert most_users(served[2:]) is None


# The ceiling


def test_the_spacing_of_arrivals_limits_the_output() -> None:
    # 11 tokens; the quickest answer took 0.2 s. One user: 11 / 0.2; four: 44 / (3 * 0.1 + 0.2)
    result = result_of([*wave("vllm", 1), *wave("vllm", 4, first=0.4)])
    assert arrival_ceiling(result, 1) == pytest.approx(55)
    assert arrival_ceiling(result, 4) == pytest.approx(88)
    found = level_point(result, "vllm", 4)
    assert found is not None and found.tokens_per_second is not None
    assert found.tokens_per_second == pytest.approx(44 / 0.8)


@pytest.mark.parametrize("settings", [{"spacing_ms": 0}, {"load": "sustained"}])
def test_without_spacing_there_is_no_such_limit(settings: dict[str, Any]) -> None:
    assert arrival_ceiling(result_of(wave("vllm", 1), **settings), 4) is None


# The naive queue, extrapolated


def test_a_queue_serves_one_after_the_other() -> None:
    # 1 s each, arriving every 0.4 s: they start at 0, 1, 2, 3 s
    assert queued([0, 0.4, 0.8, 1.2], 1.0) == [(0, 0), (0.4, 1), (0.8, 2), (1.2, 3)]
    # Quicker than they arrive, nobody waits
    assert queued([0, 0.4], 0.3) == [(0, 0), (0.4, 0.4)]
    # Two users for 2.5 s: answered at 1 and 2 s they ask again, at 3 and 4 s no more
    assert queued([0, 0], 1.0, until=2.5) == [(0, 0), (0, 1), (1, 2), (2, 3)]


def test_above_its_levels_the_queue_is_worked_out_from_one_users_answers() -> None:
    # One user: 11 tokens, first token after 0.1 s, all after 0.2, 0.4 and 0.3 s, so the median answer takes 0.3 s
    rows = [answer("transformers", repeat=repeat, gap=gap) for repeat, gap in ((1, 0.01), (2, 0.03), (3, 0.02))]
    found = extrapolated_point(result_of(rows, NAIVE, repeats=3), "transformers", 4)
    assert found is not None
    # Arrivals at 0, 0.1, 0.2, 0.3 s start at 0, 0.3, 0.6, 0.9 s: they wait 0, 0.2, 0.4, 0.6 s, and the last ends at 1.2
    assert found.tokens_per_second == pytest.approx(44 / 1.2)
    assert found.ttft_p50 == pytest.approx(0.1 + 0.3)  # between 0.2 and 0.4 s of waiting
    assert found.ttft_p95 == pytest.approx(0.1 + 0.4 + 0.85 * 0.2)  # 95 % of three steps: 2.85
    assert found.e2e_p99 == pytest.approx(0.3 + 0.4 + 0.97 * 0.2)
    assert found.tpot_p50 == pytest.approx(0.02)
    # Only the first has its first token within 200 ms
    assert (found.slo_share, found.goodput) == pytest.approx((1 / 4, 1 / 1.2))
    assert (found.failed, found.extrapolated) == (None, True)


def test_the_queue_of_sustained_users_stays_full() -> None:
    rows = [answer("transformers", planned=0.2 * place) for place in range(5)]
    found = extrapolated_point(result_of(rows, NAIVE, load="sustained", seconds=1), "transformers", 3)
    assert found is not None
    # 11 tokens every 0.2 s. From the third answer on everybody waits for the two others, 0.4 s, which is no good
    assert found.tokens_per_second == pytest.approx(55)
    assert found.ttft_p99 == pytest.approx(0.5)
    assert found.goodput == 0
    # Asked at 0 three times and at 0.2, 0.4, 0.6, 0.8 s once each; at 1.0 s and later nobody asks again
    assert found.slo_share == pytest.approx(1 / 7)


def test_without_one_users_answers_the_first_of_the_smallest_level_had_nobody_before_it() -> None:
    rows = [answer("transformers", 2, index, first=0.1 + 0.2 * index) for index in range(2)]
    found = extrapolated_point(result_of(rows, NAIVE, levels=(2, 4)), "transformers", 4)
    assert found is not None
    assert found.tokens_per_second == pytest.approx(44 / 0.8)  # 0.2 s each


def test_only_the_queue_is_extrapolated_and_only_where_it_was_not_measured() -> None:
    rows = [*wave("transformers", 1), *wave("transformers", 4), *wave("vllm", 1)]
    result = result_of(rows, NAIVE, VLLM, levels=(1, 4, 8))
    assert [(one.level, one.extrapolated) for one in points(result, NAIVE)] == [(1, False), (4, False), (8, True)]
    assert [one.level for one in points(result, VLLM)] == [1]
    nothing = result_of([answer("transformers", error="refused")], NAIVE, levels=(1, 8))
    assert [one.level for one in points(nothing, NAIVE)] == [1]


# In flight


def test_requests_are_in_flight_from_the_planned_arrival_to_the_last_token_or_their_failure() -> None:
    rows = [
        answer(planned=5.0, index=0),  # to 5.2
        answer(planned=5.1, index=1, tokens=0, error="refused"),  # to 5.6
        answer(planned=5.2, index=2, late=0.1),  # begins as the first ends; to 5.5
    ]
    steps = in_flight(rows)
    assert [count for _, count in steps] == [1, 2, 2, 1, 0]
    assert [moment for moment, _ in steps] == pytest.approx([0, 0.1, 0.2, 0.5, 0.6])
    assert in_flight([]) == []


# Beside other levels


def test_a_gain_is_known_only_beside_one_user() -> None:
    alone, four = point(level=1, tokens_per_second=2.0), point(level=4, tokens_per_second=5.0)
    assert times_one_user(four, [alone, four]) == 2.5
    assert times_one_user(four, [four]) is None
    assert times_one_user(point(level=4), [alone]) is None


def test_a_wait_of_minutes_is_told_in_seconds() -> None:
    assert waited(0.0842) == "84.2 ms"
    assert waited(1180.0) == "1,180.0 s"
    assert waited(None) == "–"


# What would take too long


def trial_of(users: int, warmup: bool = False) -> Trial:
    return Trial("a level", 1, warmup, ("Go.",) * users, group=str(users))


@pytest.mark.parametrize(
    ("users", "repeats", "seconds", "expected"),
    [
        pytest.param(1, 1, 80.0, False, id="nothing is known yet of one user"),
        pytest.param(4, 1, 22.0, False, id="4 x 22 s are 88"),
        pytest.param(4, 1, 23.0, True, id="4 x 23 s are 92"),
        pytest.param(4, 2, 12.0, True, id="2 x 4 x 12 s are 96"),
        pytest.param(128, 1, 0.5, False, id="128 x 0.5 s are 64"),
    ],
)
def test_the_naive_queue_is_passed_over_where_a_level_would_take_longer_than_ninety_seconds(
    users: int, repeats: int, seconds: float, expected: bool
) -> None:
    plan = plan_for("transformers", repeats=repeats)
    seen = [answer("transformers", 1, first=seconds, gap=0.0, tokens=2)] if users > 1 else []
    assert too_long(plan, trial_of(users), "transformers", seen) is expected
    assert not too_long(plan, trial_of(users), "transformers+batching", seen)
    assert not too_long(plan, trial_of(users, warmup=True), "transformers", seen)
    assert not too_long(replace(plan, measure_all=True), trial_of(users), "transformers", seen)


def test_only_answers_that_had_nobody_before_them_say_how_long_one_takes() -> None:
    queue = [answer("transformers", 4, place, first=5.0 * (place + 1), gap=0.0, tokens=2) for place in range(4)]
    plan = plan_for("transformers")
    assert not too_long(plan, trial_of(16), "transformers", queue)  # 16 x 5 s, not 16 x 20 s
    assert too_long(plan, trial_of(32), "transformers", queue)


def test_the_smallest_level_is_measured_in_every_repeat() -> None:
    plan = plan_for("transformers", repeats=3, levels=(8, 16))
    seen = [answer("transformers", 8, place, first=60.0, gap=0.0, tokens=2) for place in range(8)]
    assert not too_long(plan, replace(trial_of(8), repeat=2), "transformers", seen)
    assert too_long(plan, trial_of(16), "transformers", seen)
