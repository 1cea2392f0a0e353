"""Concurrency: hand-made results whose numbers can be worked out on paper, and one run against scripted engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import pytest

from engines.base import Engine, EngineConfig, EngineError, Usage
from engines.local import LocalHost
from engines.scripted import Script, scripted_engine
from engines.timeline import Arrival, Timeline
from experiments import concurrency
from experiments.base import Contender, PlanError, Trial
from experiments.concurrency import (
    CEILING_WORDS,
    EXPERIMENT,
    ConcurrencyPlan,
    LevelPoint,
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
)
from experiments.result import EngineRow, ExperimentResult, RequestRow, TrialRow
from experiments.run import run
from tests.conftest import MACHINE

VLLM = EngineRow("vllm", "vLLM", "#0072B2")
NAIVE = EngineRow("transformers", "HF Transformers", "#6B7280")
BATCHING = EngineRow("transformers+batching", "HF Transformers", "#6B7280", "continuous batching", "transformers")


def plan_for(*engines: str, **settings: Any) -> ConcurrencyPlan:
    return ConcurrencyPlan(**{"prompt": "Go.", "engines": engines or ("vllm",), **settings})


def answer(
    engine: str = "vllm",
    level: int = 1,
    index: int = 0,
    planned: float = 0.0,
    first: float = 0.1,
    gap: float = 0.01,
    tokens: int = 11,
    repeat: int = 1,
    late: float = 0.0,
    error: str | None = None,
    warmup: bool = False,
) -> RequestRow:
    """First token `first` s after it was sent, then one every `gap` s: with the defaults the last one after 0.2 s."""
    arrivals = tuple(Arrival(first + gap * place, " word", tokens=1) for place in range(tokens))
    closed = arrivals[-1].at + 0.5 if arrivals else 0.5
    timeline = Timeline(planned + late, arrivals, closed, Usage(output_tokens=tokens), "per chunk", "stop", error)
    return RequestRow(engine, repeat, warmup, timeline, str(level), index, planned)


def wave(engine: str, level: int, spacing: float = 0.1, **timing: Any) -> list[RequestRow]:
    return [answer(engine, level, index, planned=index * spacing, **timing) for index in range(level)]


def result_of(
    rows: Iterable[RequestRow], *engines: EngineRow, unfinished: tuple[str, ...] = (), **settings: Any
) -> ExperimentResult:
    """A result of these requests; every trial has come to its end but those of the `unfinished` groups."""
    rows = tuple(rows)
    engines = engines or (VLLM,)
    trials = dict.fromkeys((row.engine, row.group, row.repeat, row.warmup) for row in rows)
    return ExperimentResult(
        id="concurrency-1",
        experiment="concurrency",
        started="2026-11-23T12:00:00+00:00",
        host="local",
        hardware={"words": "Test CPU"},
        model="a model",
        model_note="",
        settings=asdict(plan_for(*(row.engine for row in engines), **settings)),
        engines=engines,
        requests=rows,
        trials=tuple(TrialRow(*trial, 0.0, 1.0) for trial in trials if trial[1] not in unfinished),
    )


def point(**values: Any) -> LevelPoint:
    unknown = dict.fromkeys(LevelPoint.__slots__)
    return LevelPoint(**{**unknown, "level": 1, "extrapolated": False, **values})


# The plan


def test_a_plan_is_as_the_comparison_needs_it_by_default() -> None:
    plan = EXPERIMENT.read_plan(("vllm",), {})
    assert plan == plan_for(prompt=plan.prompt)
    assert isinstance(plan, ConcurrencyPlan)
    assert plan.levels == (1, 4, 8, 16, 32, 64, 128)
    assert (plan.load, plan.spacing_ms, plan.seconds, plan.sequential_limit) == ("wave", 100, 20, 8)
    assert (plan.repeats, plan.warmups, plan.max_tokens, plan.fixed_length) == (1, 1, 128, True)
    assert (plan.slo_ttft_ms, plan.slo_tpot_ms, plan.measure_all) == (200, 50, False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("levels", ()),
        ("levels", (1, 0)),
        ("levels", (513,)),
        ("spacing_ms", -1),
        ("spacing_ms", 10_001),
        ("load", "flood"),
        ("seconds", 0),
        ("seconds", 601),
        ("sequential_limit", 0),
        ("slo_ttft_ms", 0),
        ("slo_tpot_ms", float("nan")),
        ("repeats", 0),
        ("prompt", " "),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(field: str, value: object) -> None:
    with pytest.raises(PlanError) as caught:
        plan_for(**{field: value})
    assert caught.value.field == field


def test_typed_settings_become_the_plan() -> None:
    words = "Again and again (sustained)"
    plan = EXPERIMENT.read_plan(("vllm",), {"levels": "2, 1", "load": words, "seconds": 3, "spacing_ms": 12.5})
    assert isinstance(plan, ConcurrencyPlan)
    assert (plan.levels, plan.load, plan.seconds, plan.spacing_ms) == ((2, 1), "sustained", 3, 12.5)


def test_every_field_of_the_plan_has_a_setting_with_the_same_default() -> None:
    fields = set(asdict(plan_for())) - {"engines", "race", "temperature", "seed"}
    assert {setting.name for setting in EXPERIMENT.settings} == fields


# Contenders and trials


def bare(*keys: str) -> tuple[Contender, ...]:
    return tuple(Contender(key, None) for key in keys)  # type: ignore[arg-type]


def told(trials: Iterable[Trial]) -> list[tuple[str, int, tuple[str, ...]]]:
    return [(trial.words, len(trial.prompts), trial.only) for trial in trials]


def test_the_naive_engine_takes_part_a_second_time_with_continuous_batching(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    host = make_host(scripted("vllm"), scripted("transformers"))
    found = EXPERIMENT.contenders(plan_for("vllm", "transformers"), host)
    assert [(one.key, one.variant, one.compared_with) for one in found] == [
        ("vllm", "", ""),
        ("transformers", "", ""),
        ("transformers+batching", "continuous batching", "transformers"),
    ]
    assert [one.config(host).continuous_batching for one in found] == [None, None, True]


def test_where_it_cannot_batch_the_reason_stands_in_its_row(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    def serve_command(config: EngineConfig) -> list[str]:
        if config.continuous_batching:
            raise EngineError("not with this model")
        return ["python"]

    host = make_host(replace(scripted("transformers"), serve_command=serve_command))
    found = EXPERIMENT.contenders(plan_for("transformers"), host)
    assert [one.unavailable for one in found] == ["", "not with this model"]


def test_levels_come_in_order_and_the_naive_queue_only_up_to_its_limit() -> None:
    plan = plan_for("vllm", "transformers", levels=(16, 1, 8), repeats=2, sequential_limit=8)
    both, batching = ("vllm", "transformers"), ("vllm",)
    trials = EXPERIMENT.trials(plan, bare("vllm", "transformers"))
    assert told(trials) == [
        # The fewest users, then as many as a batch of eight; a queue has no batch to warm up.
        ("1 user, warm-up 1 of 1", 1, both),
        ("8 users, warm-up 1 of 1", 8, batching),
        ("1 user, repeat 1 of 2", 1, both),
        ("1 user, repeat 2 of 2", 1, both),
        ("8 users, repeat 1 of 2", 8, both),
        ("8 users, repeat 2 of 2", 8, both),
        ("16 users, repeat 1 of 2", 16, batching),
        ("16 users, repeat 2 of 2", 16, batching),
    ]
    assert [trial.group for trial in trials] == ["1", "8", "1", "1", "8", "8", "16", "16"]
    assert [trial.spacing for trial in trials] == [0, 0, *[0.1] * 6]
    assert all(trial.sustained_seconds is None for trial in trials)


def test_measured_in_full_the_queue_takes_part_everywhere() -> None:
    plan = plan_for("vllm", "transformers", levels=(1, 16), warmups=0, measure_all=True)
    trials = EXPERIMENT.trials(plan, bare("vllm", "transformers"))
    assert [trial.only for trial in trials] == [("vllm", "transformers")] * 2


def test_a_queue_with_no_level_within_its_limit_is_measured_with_one_user() -> None:
    plan = plan_for("vllm", "transformers", levels=(16, 32), warmups=0)
    assert told(EXPERIMENT.trials(plan, bare("vllm", "transformers"))) == [
        ("1 user, repeat 1 of 1", 1, ("transformers",)),
        ("16 users, repeat 1 of 1", 16, ("vllm",)),
        ("32 users, repeat 1 of 1", 32, ("vllm",)),
    ]
    # Alone it must not be left with trials that name nobody, which would mean everybody.
    assert [len(trial.prompts) for trial in EXPERIMENT.trials(plan, bare("transformers"))] == [1]
    assert EXPERIMENT.trials(plan, ()) == ()


def test_sustained_users_ask_without_spacing_for_so_long() -> None:
    plan = plan_for(levels=(2,), load="sustained", seconds=5)
    warmup, measured = EXPERIMENT.trials(plan, bare("vllm"))
    assert (warmup.sustained_seconds, measured.sustained_seconds, measured.spacing) == (None, 5, 0)


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
    assert any("up to 100 ms late" in note for note in EXPERIMENT.notes(result_of(rows)))


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
    found = level_point(result, "vllm", 1)
    assert found == point(failed=1, slo_share=0.0)
    assert EXPERIMENT.table(result).rows == [["vLLM", "1", *["–"] * 8, "0%", "–", "1"]]
    assert EXPERIMENT.headline(result) == "No engine gave output that could be measured."


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


def test_too_short_a_load_is_unknown_and_said_to_be_so() -> None:
    rows = [answer(level=2, index=index, first=3.0) for index in range(2)]
    result = result_of(rows, load="sustained", seconds=1, levels=(2,))
    (found,) = points(result, VLLM)
    assert (found.tokens_per_second, found.goodput) == (None, None)
    assert any("with 2 users not all had a first token within 1 s" in note for note in EXPERIMENT.notes(result))


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


# Words


@pytest.fixture
def race() -> ExperimentResult:
    """vLLM up to four users, the queue up to one, its batching variant, which fails a request, up to four."""
    rows = [*wave("vllm", 1), *wave("vllm", 4), *wave("transformers", 1, first=0.2, gap=0.02)]
    rows += [*wave("transformers+batching", 1, first=0.3), *wave("transformers+batching", 4, first=0.3)]
    rows[-1] = replace(rows[-1], timeline=replace(rows[-1].timeline, error="broke off"))
    return result_of(rows, VLLM, NAIVE, BATCHING, levels=(1, 4), sequential_limit=1)


def test_the_headline_names_output_gain_and_how_many_are_served(race: ExperimentResult) -> None:
    # vLLM: 44 / 0.5 = 88 tok/s against 55. Queue: 0.4 s each, 27.5 tok/s with any number of users.
    # Batching: three answers, the last from 0.2 to 0.6 s, 33 / 0.6 = 55 tok/s against 11 / 0.4 = 27.5
    assert EXPERIMENT.headline(race) == (
        "At 4 users vLLM delivers 88 tok/s, 1.6× its own single-user speed; HF Transformers with continuous batching "
        "55 (2.0×); HF Transformers 28 (1.0×, extrapolated). vLLM serves up to 4 users and HF Transformers up to 1 "
        "within 200 ms to the first token and 50 ms per token."
    )


def test_the_headline_says_what_is_missing() -> None:
    broken = EngineRow("sglang", "SGLang", "#D55E00", error="no memory")
    cannot = replace(BATCHING, unavailable="not here")
    result = result_of(wave("vllm", 4, first=3.0), VLLM, broken, cannot, levels=(4,))
    # 44 tokens / (0.3 + 3.1) s, without a single user to compare with
    assert EXPERIMENT.headline(result) == (
        "At 4 users vLLM delivers 13 tok/s. Nobody keeps to 200 ms to the first token and 50 ms per token with any "
        "number of users that was measured. SGLang gave no output that could be measured."
    )
    rows = EXPERIMENT.table(result).rows
    assert [row[:2] for row in rows[1:]] == [
        ["SGLang", "could not run"],
        ["HF Transformers, continuous batching", "not available here"],
    ]
    assert {len(row) for row in rows} == {13}
    assert times_one_user(point(level=4, tokens_per_second=2.0), []) is None


def test_one_user_alone_is_compared_with_nobody() -> None:
    words = EXPERIMENT.headline(result_of(wave("vllm", 1), levels=(1,)))
    assert words.startswith("At 1 user vLLM delivers 55 tok/s. vLLM serves up to 1 user within")


def test_the_table_marks_every_extrapolated_number(race: ExperimentResult) -> None:
    table = EXPERIMENT.table(race)
    by_place = {(row[0], row[1]): dict(zip(table.headings, row, strict=True)) for row in table.rows}
    assert list(by_place) == [
        ("vLLM", "1"),
        ("vLLM", "4"),
        ("HF Transformers", "1"),
        ("HF Transformers", "4, extrapolated"),
        ("HF Transformers, continuous batching", "1"),
        ("HF Transformers, continuous batching", "4"),
    ]
    assert list(by_place["vLLM", "4"].values()) == [
        "vLLM",
        "4",
        "88 tok/s",
        "1.6×",
        *["100.0 ms"] * 3,
        *["0.20 s"] * 2,
        "10.00 ms",
        "100%",
        "8.00/s",
        "0",
    ]
    # The queue: 0.4 s each, arrivals 0.1 s apart wait 0, 0.3, 0.6, 0.9 s for a first token after 0.2 s
    guessed = by_place["HF Transformers", "4, extrapolated"]
    assert (guessed["Output"], guessed["× one user"], guessed["First token p50"]) == (
        "≈ 28 tok/s",
        "≈ 1.0×",
        "≈ 650.0 ms",
    )
    assert guessed["Failed"] == "–"
    assert all(word.startswith("≈") for word in list(guessed.values())[2:-1])
    assert by_place["HF Transformers, continuous batching", "4"]["Failed"] == "1"
    assert any("Its values for 4 users are extrapolated (≈)" in note for note in EXPERIMENT.notes(race))


def test_a_wait_of_minutes_is_told_in_seconds() -> None:
    assert concurrency.waited(0.0842) == "84.2 ms"
    assert concurrency.waited(1180.0) == "1,180.0 s"
    assert concurrency.waited(None) == "–"


def test_a_result_reads_the_same_after_it_was_kept(race: ExperimentResult) -> None:
    kept = ExperimentResult.from_json(race.to_json())
    assert EXPERIMENT.table(kept) == EXPERIMENT.table(race)
    assert EXPERIMENT.headline(kept) == EXPERIMENT.headline(race)


# Pictures


def draw(name: str, result: ExperimentResult) -> Any:
    return next(chart for chart in EXPERIMENT.charts if chart.name == name).draw(result)


def traces(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


def written(figure: Any) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_the_throughput_chart_tells_measured_from_extrapolated(race: ExperimentResult) -> None:
    figure = draw("throughput", race)
    lines = traces(figure)
    queue = "HF Transformers, extrapolated"
    assert list(lines) == ["vLLM", "HF Transformers", queue, "HF Transformers, continuous batching", CEILING_WORDS]
    assert [line.line.dash for line in lines.values()] == ["solid", "solid", "dash", "dashdot", "dot"]
    assert lines["vLLM"].line.color == VLLM.colour
    assert lines["vLLM"].marker.symbol != lines["HF Transformers, continuous batching"].marker.symbol
    # The dashed line goes on from the last measured point, which keeps its own marker
    assert (lines[queue].x, lines[queue].marker.symbol) == ((1, 4), "circle-open")
    assert lines[queue].marker.size == (0, 9)
    assert ["extrapolated" in words for words in lines[queue].hovertext] == [False, True]
    assert lines[CEILING_WORDS].y == pytest.approx((55, 88))  # as in the test of the ceiling
    assert (figure.layout.xaxis.type, figure.layout.xaxis.ticktext) == ("log", ("1", "4"))
    assert not figure.layout.showlegend
    assert {"vLLM", "HF Transformers<br>(extrapolated)", CEILING_WORDS} <= set(written(figure))
    small_print = " ".join(written(figure))
    assert race.source_line in small_print
    assert "dashed and hollow: extrapolated" in small_print


def test_labels_at_the_ends_of_lines_do_not_overlap(race: ExperimentResult) -> None:
    figure = draw("throughput", replace(race, engines=(VLLM, replace(VLLM, label="Twin"))))
    low, high = (one for one in figure.layout.annotations if one.text in ("vLLM", "Twin"))
    assert high.yshift - low.yshift == concurrency.LABEL_PIXELS


def test_the_wait_is_drawn_on_a_logarithmic_axis_beside_its_limit(race: ExperimentResult) -> None:
    figure = draw("ttft", race)
    lines = traces(figure)
    assert figure.layout.yaxis.type == "log"
    assert lines["limit"].y == (200, 200)
    assert "limit: 200 ms" in written(figure)
    assert lines["vLLM"].y == pytest.approx((100, 100))
    # p95 of the queue's 200, 500, 800, 1,100 ms is 1,055, 405 above the median
    assert lines["HF Transformers, extrapolated"].error_y.array[1] == pytest.approx(405)
    assert figure.layout.yaxis.range == (2, 4)  # 100 to 10,000 ms


def test_every_request_of_the_largest_measured_level_has_its_bars(race: ExperimentResult) -> None:
    figure = draw("flight", race)
    bars = traces(figure)
    assert bars["vLLM: wait"].base == pytest.approx((0, 0.1, 0.2, 0.3))
    assert bars["vLLM: wait"].x == pytest.approx([0.1] * 4)
    assert bars["vLLM: answer"].base == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert bars["vLLM: answer"].x == pytest.approx([0.1] * 4)
    assert (bars["vLLM: answer"].marker.color, bars["vLLM: answer"].y) == (VLLM.colour, (1, 2, 3, 4))
    assert bars["vLLM: wait"].marker.opacity < 0.5
    assert {bar.width for bar in bars.values() if bar.type == "bar"} == {0.85}  # a lone failure covers no other
    failed = "HF Transformers, continuous batching: failed"
    assert (bars[failed].y, bars[failed].marker.color) == ((4,), concurrency.FAILED_COLOUR)
    assert (bars[f"{failed} here"].marker.symbol, bars[f"{failed} here"].y) == ("x", (4,))
    assert {"vLLM<br>4 users", "HF Transformers<br>1 user"} <= set(written(figure))
    assert figure.layout.xaxis2.matches == "x"  # one time for all
    assert figure.layout.xaxis.range == figure.layout.xaxis3.range
    assert race.source_line in " ".join(written(figure))


def test_requests_in_flight_are_steps(race: ExperimentResult) -> None:
    figure = draw("in_flight", race)
    # Sent 0.1 s apart and answered in 0.2 s, two overlap; the failed one is given up 0.5 s after its last token
    line = traces(figure)["vLLM: 4 users, at most 2 in flight"]
    assert (line.line.shape, line.y[-1]) == ("hv", 0)
    assert line.x[-1] == pytest.approx(0.5)
    assert "HF Transformers: 1 user, at most 1 in flight" in traces(figure)
    assert race.source_line in " ".join(written(figure))


def test_a_result_without_requests_has_no_pictures() -> None:
    result = result_of([])
    assert [chart.draw(result) for chart in EXPERIMENT.charts] == [None] * 4
    assert EXPERIMENT.table(result).rows == [["vLLM", "0", *["–"] * 11]]


# Against scripted engines


@pytest.fixture(scope="module")
def shared(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterable[LocalHost]:
    """One engine that serves one request at a time, and one that serves all at once, at the same pace."""
    engines = [
        scripted_engine(name, label, "#6B7280", Script(start=0.05, first_token=0.05, gap=0.01, at_once=at_once))
        for name, label, at_once in (("transformers", "Queue", 1), ("quick", "Quick", 0))
    ]
    host = LocalHost(engines, model, cache=tmp_path_factory.mktemp("cache"), hardware=MACHINE)
    yield host
    host.close()


def test_an_engine_that_serves_one_at_a_time_stays_flat_and_one_that_batches_grows(shared: LocalHost) -> None:
    plan = plan_for("transformers", "quick", levels=(1, 4), spacing_ms=10, max_tokens=10, warmups=0)
    result = asyncio.run(run(EXPERIMENT, plan, shared, lambda event: None))
    assert not any(row.timeline.error for row in result.requests)
    queue, _, quick = (points(result, row) for row in result.engines)
    flat, grown = (times_one_user(found[-1], found) for found in (queue, quick))
    # 10 tokens take 0.05 + 9 * 0.01 = 0.14 s, of four users 0.03 s apart 0.17 s: 40 / 0.17 / (10 / 0.14) = 3.3×
    assert flat is not None and grown is not None
    assert 0.7 < flat < 1.4
    assert 2 < grown < 4.5
    # What one user's answer lets expect of a queue of four agrees with what was measured
    expected = extrapolated_point(result, "transformers", 4)
    assert expected is not None
    assert expected.ttft_p95 == pytest.approx(queue[1].ttft_p95, rel=0.4)
    assert expected.tokens_per_second == pytest.approx(queue[1].tokens_per_second, rel=0.4)
    for found in quick:
        ceiling = arrival_ceiling(result, found.level)
        assert ceiling is not None and found.tokens_per_second is not None
        assert found.tokens_per_second <= ceiling
    assert all(chart.draw(result) is not None for chart in EXPERIMENT.charts)


def test_sustained_users_are_measured_while_all_are_served(shared: LocalHost) -> None:
    plan = plan_for("quick", levels=(2,), load="sustained", seconds=1, max_tokens=10, warmups=0)
    result = asyncio.run(run(EXPERIMENT, plan, shared, lambda event: None))
    (found,) = points(result, result.engines[0])
    assert found.tokens_per_second is not None
    # Two users, 10 tokens every 0.14 s and a little: at most 143 tok/s, but for an answer cut by the window's ends
    assert 70 < found.tokens_per_second < 160
    assert len(result.measured("quick")) > 6
    assert found.failed == 0
