"""Concurrency: its plan, who takes part, what is asked and said, and one run against scripted engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import pytest

from engines.base import Engine, EngineConfig, EngineError
from engines.local import LocalHost
from engines.scripted import Script, scripted_engine
from experiments import levels
from experiments.base import Contender, PlanError, Trial, TrialStarted
from experiments.concurrency import EXPERIMENT
from experiments.levels import ConcurrencyPlan, arrival_ceiling, extrapolated_point, points, times_one_user
from experiments.result import EngineRow, ExperimentResult
from experiments.run import run
from tests.conftest import MACHINE
from tests.experiments.level_rows import BATCHING, RACE, VLLM, answer, limited, plan_for, result_of, wave

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
    # Warmed up with as many as are measured; a queue has no batch to warm up.
    trials = EXPERIMENT.trials(plan, bare("vllm", "transformers"))
    assert told(trials) == [
        ("1 user, warm-up 1 of 1", 1, both),
        ("1 user, repeat 1 of 2", 1, both),
        ("1 user, repeat 2 of 2", 1, both),
        ("8 users, warm-up 1 of 1", 8, batching),
        ("8 users, repeat 1 of 2", 8, both),
        ("8 users, repeat 2 of 2", 8, both),
        ("16 users, warm-up 1 of 1", 16, batching),
        ("16 users, repeat 1 of 2", 16, batching),
        ("16 users, repeat 2 of 2", 16, batching),
    ]
    assert [trial.group for trial in trials] == ["1"] * 3 + ["8"] * 3 + ["16"] * 3
    assert [trial.spacing for trial in trials] == [0, 0.1, 0.1] * 3  # all at once to warm up: the batch is to be full
    assert [trial.max_tokens for trial in trials] == [16, None, None] * 3
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


# Words


def told_by_heading(result: ExperimentResult) -> list[dict[str, str]]:
    table = EXPERIMENT.table(result)
    return [dict(zip(table.headings, row, strict=True)) for row in table.rows]


def test_the_headline_names_output_gain_and_how_many_are_served() -> None:
    # vLLM: 44 / 0.5 = 88 tok/s against 55. Queue: 0.4 s each, 27.5 tok/s with any number of users.
    # Batching: three answers, the last from 0.2 to 0.6 s, 33 / 0.6 = 55 tok/s against 11 / 0.4 = 27.5
    assert EXPERIMENT.headline(RACE) == (
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
    _, *rows = told_by_heading(result)
    assert [(row["Engine"], row["Users"]) for row in rows] == [
        ("SGLang", "could not run"),
        ("HF Transformers, continuous batching", "not available here"),
    ]


def test_one_user_alone_is_compared_with_nobody() -> None:
    words = EXPERIMENT.headline(result_of(wave("vllm", 1), levels=(1,)))
    assert words.startswith("At 1 user vLLM delivers 55 tok/s. vLLM serves up to 1 user within")


def test_the_table_marks_every_extrapolated_number() -> None:
    by_place = {(row["Engine"], row["Users"]): row for row in told_by_heading(limited(RACE, 100e6))}
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
        "22%",  # of 4 users * 100 MB/s / 1 MB
        "$11.36",  # 0.001 $/s / 88 tok/s * 1e6
        "0",
    ]
    # The queue: 0.4 s each, arrivals 0.1 s apart wait 0, 0.3, 0.6, 0.9 s for a first token after 0.2 s
    guessed = by_place["HF Transformers", "4, extrapolated"]
    assert (guessed["Output"], guessed["× one user"], guessed["First token p50"]) == (
        "≈ 28 tok/s",
        "≈ 1.0×",
        "≈ 650.0 ms",
    )
    # However many wait, a queue writes one token per step, so its ceiling is that of one user: 27.5 / 100
    assert guessed["Of the memory ceiling"] == "≈ 28%"
    assert guessed["Cost per million tokens"] == "≈ $36.36"
    assert guessed["Failed"] == "–"
    assert all(word.startswith("≈") for word in list(guessed.values())[2:-1])
    assert by_place["HF Transformers, continuous batching", "4"]["Failed"] == "1"
    assert any("Its values for 4 users are extrapolated (≈)" in note for note in EXPERIMENT.notes(RACE))


def test_what_bounds_the_output_and_what_it_costs_are_notes() -> None:
    notes = EXPERIMENT.notes(limited(RACE, 100e6))
    assert any("The memory ceiling" in note and "allows one user 100 tok/s" in note for note in notes)
    assert "Cost: $3.60 per hour (by hand)." in notes


def test_a_load_too_short_for_a_steady_state_is_said_to_be_so() -> None:
    rows = [answer(level=2, index=index, first=3.0) for index in range(2)]
    notes = EXPERIMENT.notes(result_of(rows, load="sustained", seconds=1, levels=(2,)))
    assert any("with 2 users not all had a first token within 1 s" in note for note in notes)


@pytest.mark.parametrize(("gaps", "same"), [((0.0101, 0.0100, 0.0102), True), ((0.0201, 0.0200, 0.0202), False)])
def test_engines_whose_repeats_overlap_are_not_called_different(gaps: tuple[float, ...], same: bool) -> None:
    rows = []
    for repeat, gap in enumerate((0.0100, 0.0102, 0.0101), start=1):
        rows += [answer("vllm", 1, repeat=repeat, gap=gap), answer("sglang", 1, repeat=repeat, gap=gaps[repeat - 1])]
    sglang = EngineRow("sglang", "SGLang", "#D55E00")
    words = EXPERIMENT.headline(result_of(rows, VLLM, sglang, levels=(1,), repeats=3))
    assert ("no measurable difference" in words) is same


def test_where_all_failed_there_are_dashes() -> None:
    result = result_of([answer(error="refused", tokens=0)], levels=(1,))
    (row,) = told_by_heading(result)
    assert [heading for heading, word in row.items() if word != "–"] == ["Engine", "Users", "Within limits", "Failed"]
    assert (row["Within limits"], row["Failed"]) == ("0%", "1")
    assert EXPERIMENT.headline(result) == "No engine gave output that could be measured."


def test_a_result_without_requests_is_a_row_of_dashes() -> None:
    result = limited(result_of([]), 100e6)
    (row,) = told_by_heading(result)
    assert set(list(row.values())[2:]) == {"–"}
    assert "Cost: $3.60 per hour (by hand)." in EXPERIMENT.notes(result)
    assert EXPERIMENT.headline(result) == "No engine gave output that could be measured."


def test_a_result_reads_the_same_after_it_was_kept() -> None:
    kept = ExperimentResult.from_json(RACE.to_json())
    assert EXPERIMENT.table(kept) == EXPERIMENT.table(RACE)
    assert EXPERIMENT.headline(kept) == EXPERIMENT.headline(RACE)


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


def test_a_level_of_the_naive_queue_that_takes_too_long_is_extrapolated_and_said(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "SEQUENTIAL_SECONDS", 1.0)
    naive = scripted("transformers", at_once=1, first_token=0.1, gap=0.02)  # 0.4 s for 16 tokens: 2 users are 0.8 s
    host = make_host(naive, scripted("quick"))
    plan = plan_for("transformers", "quick", levels=(1, 2, 4), spacing_ms=10, warmups=0, max_tokens=16)
    events: list[object] = []
    result = asyncio.run(run(EXPERIMENT, plan, host, events.append))
    asked = {(trial.engine, trial.group) for trial in result.trials}
    assert asked >= {("transformers", "1"), ("transformers", "2"), ("quick", "4")}
    assert ("transformers", "4") not in asked
    row = next(one for one in result.engines if one.name == "transformers")
    assert [(one.level, one.extrapolated) for one in points(result, row)] == [(1, False), (2, False), (4, True)]
    told = [note for note in EXPERIMENT.notes(result) if "was not measured with" in note]
    assert told == [
        f"{row.label} was not measured with 4 users because all their answers, one after the other, would have taken "
        "more than 90 s."
    ]
    started = [event for event in events if isinstance(event, TrialStarted)]
    assert started[-1].done <= started[-1].of - 1  # what was passed over counts as done
