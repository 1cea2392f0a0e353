"""Prefix caching: what is run in which order, and what is said about it, from results by hand and from one real run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from demo_model.corpus import with_prefix
from engines.base import Engine, Usage
from engines.hardware import Hardware
from engines.local import LocalHost
from engines.scripted import Script, scripted_engine
from engines.timeline import Arrival, Timeline
from experiments.base import Plan, PlanError
from experiments.prefix_caching import (
    EXPERIMENT,
    QUESTIONS,
    PrefixCachingPlan,
    apart,
    cached_chart,
    cached_tokens,
    cold_start_verified,
    contenders,
    groups,
    headline,
    misses,
    notes,
    prefix_tokens,
    prefixed,
    prompt_tokens,
    questions,
    table,
    to_no_prefix,
    to_uncached,
    trials,
    ttft,
    ttft_chart,
)
from experiments.result import EngineRow, ExperimentResult, RequestRow, TrialRow
from experiments.run import run

ONE_GPU = Hardware(cpu="Test CPU", cores=2, memory_gib=8.0, gpu="Test GPU", gpu_memory_gib=24.0, gpu_count=1)
LABELS = {"vllm": "vLLM", "transformers": "HF Transformers"}
NO_CACHE = "It keeps no prefix cache between requests."

# One run over its series: TTFTs in ms (None: the request failed), cached tokens (None: not reported), prompt tokens.
Run = tuple[list[float | None], int | None, int | None]
Runs = Mapping[str, Run]

# Three series of two questions. The prompts are 20 and 21 tokens, behind the prefix 2,023 and 2,024: 2,003 more.
PLAIN: Runs = {
    "short 1": ([36, 38, 40], 0, 20),
    "short 2": ([40, 40, 40], 0, 21),
    "prefix 1": ([380, 400, 420], 0, 2023),
    "prefix 2": ([400, 400, 400], 0, 2024),
}
CACHED: Runs = {
    "short 1": ([38, 40, 42], 0, 20),
    "short 2": ([40, 40, 40], 16, 21),
    "prefix 1": ([410, 400, 420], 16, 2023),
    "prefix 2": ([20, 40, 80], 2016, 2024),
}
NAIVE: Runs = {
    "short 1": ([90, 90, 90], None, None),
    "short 2": ([90, 90, 90], None, None),
    "prefix 1": ([890, 900, 910], None, None),
    "prefix 2": ([880, 900, 920], None, None),
}


def plan_of(**settings: object) -> PrefixCachingPlan:
    values = {"prompt": "One?\nTwo?", "engines": ("keeps",), "prefix_times": 3, **settings}
    return PrefixCachingPlan(**values)  # type: ignore[arg-type]


def timeline(milliseconds: float | None, cached: int | None, prompt: int | None) -> Timeline:
    if milliseconds is None:
        return Timeline(0.0, error="The engine refused the request with HTTP 500.")
    arrivals = (Arrival(milliseconds / 1000, " word", tokens=1), Arrival(milliseconds / 1000 + 0.01, " more", tokens=1))
    return Timeline(0.0, arrivals, arrivals[-1].at, Usage(prompt, 2, cached), "per chunk", "stop")


def result_of(*unavailable: str, emptied: bool = True, **contenders: Runs) -> ExperimentResult:
    """A result by hand; "vllm_cache" is vLLM with its cache on. Every row has a warm-up of 9 s, which never counts."""
    engines, requests, trial_rows = [], [], []
    for key in [*contenders, *unavailable]:
        engine, _, variant = key.partition("_")
        name = f"{engine}+cache" if variant else engine
        row = EngineRow(name, LABELS.get(engine, engine.title()), "#0072B2")
        if variant:
            row = replace(row, variant="prefix cache", compared_with=engine)
        engines.append(replace(row, unavailable=NO_CACHE) if key in unavailable else row)
        for group, (waits, cached, prompt) in contenders.get(key, {}).items():
            for repeat, wait in enumerate(waits, start=1):
                requests.append(RequestRow(name, repeat, False, timeline(wait, cached, prompt), group))
                asked = emptied if group == "short 1" else None
                trial_rows.append(TrialRow(name, group, repeat, False, 0.0, 1.0, caches_emptied=asked))
        requests.append(RequestRow(name, 1, True, timeline(9000, 500, 20)))
    return ExperimentResult(
        id="prefix-caching-20261123-120000-abcdef",
        experiment="prefix-caching",
        started="2026-11-23T12:00:00+00:00",
        host="local",
        hardware={"words": "Test CPU, 2 cores"},
        model="test-model",
        model_note="",
        settings={},
        engines=tuple(engines),
        requests=tuple(requests),
        trials=tuple(trial_rows),
        labels=("A label.",),
    )


def whole() -> ExperimentResult:
    return result_of("transformers_cache", vllm=PLAIN, vllm_cache=CACHED, transformers=NAIVE)


def row_of(result: ExperimentResult, name: str) -> EngineRow:
    return next(row for row in result.engines if row.name == name)


# The plan


def test_the_settings_as_they_are_make_a_plan_of_three_series() -> None:
    plan = EXPERIMENT.read_plan(("keeps",), {})
    assert isinstance(plan, PrefixCachingPlan)
    assert plan.prompts == QUESTIONS
    assert (plan.prefix, plan.prefix_times) == ("poem", 2000)
    assert (plan.repeats, plan.warmups, plan.max_tokens, plan.fixed_length) == (3, 1, 32, False)
    # What the settings say by default is what the plan has by itself.
    assert plan == PrefixCachingPlan("\n".join(QUESTIONS), ("keeps",))


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"prompt": "Only one?"}, "prompt", "at least two questions"),
        ({"prompt": "Only one?\n \n"}, "prompt", "at least two questions"),
        ({"prompt": "One?\nTwo?\n One? "}, "prompt", "each question once"),
        ({"prompt": " "}, "prompt", "Type a prompt first"),
        ({"prefix": " "}, "prefix", "the text that the questions share"),
        ({"prefix": "\ud83d"}, "prefix", "half a character"),
        ({"prefix_times": 0}, "prefix_times", "Times must be a whole number from 1 to 100000, not 0."),
        ({"prefix_times": 100_001}, "prefix_times", "not 100001"),
        ({"prefix_times": None}, "prefix_times", "not nothing"),
        ({"prefix_times": 2.5}, "prefix_times", "not 2.5"),
        # "poem" and a space are 5 characters, 100,000 times 500,000; ten letters and a space would be 1,100,000.
        ({"prefix": "a" * 10, "prefix_times": 100_000}, "prefix_times", "1,000,000 characters at most"),
        ({"engines": ()}, "engines", "at least one engine"),
        ({"repeats": 0}, "repeats", "Repeats must be"),
    ],
)
def test_a_plan_that_cannot_be_run_names_the_setting_and_the_reason(
    settings: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(**settings)
    assert caught.value.field == field
    assert words in caught.value.message


def test_the_longest_prefix_of_the_usual_word_is_allowed() -> None:
    assert plan_of(prefix_times=100_000).prefix_times == 100_000


def test_the_prefix_stands_before_the_question_as_often_as_said() -> None:
    assert prefixed("Why?", "once more", 2) == "once more once more Why?"
    assert prefixed("Why?", "poem", 2000) == with_prefix("Why?", 2000)  # what the bundled model was trained on


# What is run


def test_a_series_empties_the_caches_then_asks_each_question_alone_and_then_behind_the_prefix() -> None:
    run_order = trials(plan_of(repeats=2, warmups=1, prefix="la"), ())
    assert [(trial.words, trial.group, trial.prompts, trial.empty_caches) for trial in run_order] == [
        ("warm-up 1 of 1, no prefix", "", ("One?",), False),
        ("warm-up 1 of 1, with the shared prefix", "", ("la la la One?",), False),
        ("series 1 of 2: no prefix, 1 of 2", "short 1", ("One?",), True),
        ("series 1 of 2: no prefix, 2 of 2", "short 2", ("Two?",), False),
        ("series 1 of 2: with the shared prefix, 1 of 2", "prefix 1", ("la la la One?",), False),
        ("series 1 of 2: with the shared prefix, 2 of 2", "prefix 2", ("la la la Two?",), False),
        ("series 2 of 2: no prefix, 1 of 2", "short 1", ("One?",), True),
        ("series 2 of 2: no prefix, 2 of 2", "short 2", ("Two?",), False),
        ("series 2 of 2: with the shared prefix, 1 of 2", "prefix 1", ("la la la One?",), False),
        ("series 2 of 2: with the shared prefix, 2 of 2", "prefix 2", ("la la la Two?",), False),
    ]
    assert [(trial.warmup, trial.repeat) for trial in run_order] == [(True, 1)] * 2 + [(False, 1)] * 4 + [
        (False, 2)
    ] * 4


# What was measured


def test_first_tokens_and_token_counts_are_those_of_one_run_over_the_series() -> None:
    result = whole()
    assert questions(result) == 2
    assert groups(result) == ["short 1", "short 2", "prefix 1", "prefix 2"]
    assert ttft(result, "vllm+cache", "prefix 2").values == pytest.approx((0.02, 0.04, 0.08))
    assert cached_tokens(result, "vllm+cache", "prefix 2").values == (2016, 2016, 2016)
    assert prompt_tokens(result, "vllm+cache", "prefix 2").mean == 2024
    assert cached_tokens(result, "transformers", "prefix 2").mean is None  # it reports none, which is not 0


def test_the_prefix_is_as_long_as_the_servers_own_counts_differ() -> None:
    result = whole()
    assert prefix_tokens(result, "vllm") == 2003  # 2024 - 21
    assert prefix_tokens(result, "transformers") is None


def test_the_gain_is_the_last_run_with_the_prefix_over_the_same_run_without_the_cache() -> None:
    result = whole()
    gain = to_uncached(result, row_of(result, "vllm+cache"))
    assert gain is not None
    # Geometric means: cube root of 20 * 40 * 80 = 40, over 400. The logarithms of 20, 40, 80 lie ln 2 apart, so their
    # variance is (ln 2)^2 and that of their mean (ln 2)^2 / 3; the others do not vary. Hence 2 degrees of freedom, and
    # 4.303 * ln 2 / sqrt 3 = 1.722 on the logarithm: a factor of 5.595 either way.
    assert gain.value == pytest.approx(0.1)
    assert (gain.low, gain.high) == (pytest.approx(0.1 / 5.595, rel=1e-3), pytest.approx(0.1 * 5.595, rel=1e-3))
    assert to_uncached(result, row_of(result, "vllm")) is None  # a baseline
    assert to_uncached(result, row_of(result, "transformers+cache")) is None  # not measured


def test_the_same_run_is_compared_with_the_question_alone() -> None:
    result = whole()
    values = {name: to_no_prefix(result, name) for name in ("vllm", "vllm+cache", "transformers")}
    assert {name: ratio.value for name, ratio in values.items() if ratio} == {
        "vllm": pytest.approx(10.0),  # 400 / 40
        "vllm+cache": pytest.approx(1.0),  # 40 / 40
        "transformers": pytest.approx((880 * 900 * 920) ** (1 / 3) / 90),
    }


@pytest.mark.parametrize(
    ("first", "cached", "verified"),
    [
        pytest.param([400, 400], 0, True, id="nothing came from the cache"),
        pytest.param([400, 400], 64, True, id="no more than a template"),
        pytest.param([400, 400], 65, False, id="more than a template"),
        pytest.param([400, 400], 2003, False, id="the whole prefix"),
        pytest.param([400, 400], None, None, id="not reported"),
        pytest.param([None, None], 0, None, id="failed"),
        pytest.param([400, None], 0, True, id="failed once"),
    ],
)
def test_a_cold_start_is_verified_by_what_the_first_request_with_the_prefix_found(
    first: list[float | None], cached: int | None, verified: bool | None
) -> None:
    result = result_of(vllm=PLAIN, vllm_cache={**CACHED, "prefix 1": (first, cached, 2023)})
    assert cold_start_verified(result, "vllm+cache") is verified


def test_one_warm_series_among_cold_ones_is_no_cold_start() -> None:
    result = whole()
    warm = RequestRow("vllm+cache", 4, False, timeline(40, 2016, 2023), "prefix 1")
    assert cold_start_verified(replace(result, requests=(*result.requests, warm)), "vllm+cache") is False


def test_a_prefix_as_short_as_a_template_verifies_nothing() -> None:
    # 85 - 21 = 64 tokens: those that were cached may be the template's or the prefix's.
    short = {**CACHED, "prefix 1": ([50.0], 48, 84), "prefix 2": ([45.0], 80, 85)}
    result = result_of(vllm_cache=short)
    assert prefix_tokens(result, "vllm+cache") == 64
    assert cold_start_verified(result, "vllm+cache") is None
    assert misses(result, "vllm+cache").values == ()


def test_a_later_run_misses_when_it_finds_no_more_than_a_template() -> None:
    three: Runs = {**CACHED, "short 3": ([40.0] * 3, 16, 21), "prefix 3": ([400.0] * 3, 48, 2024)}
    result = result_of(vllm=PLAIN, vllm_cache=three)
    assert misses(result, "vllm+cache").values == (48, 48, 48)
    assert misses(whole(), "vllm+cache").values == ()


# In words


def test_the_headline_tells_what_each_cache_saves_and_who_keeps_none() -> None:
    # vLLM: the means of 20, 40, 80 and of 400, 400, 400; the ratios are geometric. Transformers: the mean of 890, 900,
    # 910, 880, 900, 920.
    assert headline(whole()) == (
        "With 2,003 shared tokens vLLM's first token comes after 46.7 ms instead of 400.0 ms "
        "(0.10×, 95 % interval 0.02–0.56), as fast as with no prefix (1.00×). "
        "HF Transformers keeps no prefix cache: 900.0 ms each time."
    )


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        pytest.param(
            ([100], 2016, 2024),
            "With 2,003 shared tokens vLLM's first token comes after 100.0 ms instead of 400.0 ms "
            "(0.25×, from too few series to say whether that holds), slower than with no prefix (2.50×).",
            id="one series left, and slower than alone",  # 100 / 400, 100 / 40
        ),
        pytest.param(
            ([200, 400, 800], 2016, 2024),
            # The mean is 1400 / 3; the interval is as wide as above: 1 / 5.595 to 5.595.
            "With 2,003 shared tokens vLLM's first token shows no measurable difference "
            "(466.7 ms with its cache, 400.0 ms without; 1.00×, 95 % interval 0.18–5.59).",
            id="no measurable difference",
        ),
        pytest.param(
            ([None], None, None), "No saving could be measured for vLLM.", id="every request of the last run failed"
        ),
    ],
)
def test_the_headline_claims_no_more_than_was_measured(last: Run, sentence: str) -> None:
    assert headline(result_of(vllm=PLAIN, vllm_cache={**CACHED, "prefix 2": last})) == sentence


def test_a_headline_without_a_single_number_is_a_sentence_too() -> None:
    assert headline(result_of()) == "No saving could be measured."
    assert headline(result_of("transformers_cache")) == "HF Transformers keeps no prefix cache."


def test_a_prefix_of_unknown_length_and_a_name_that_ends_in_s_make_a_sentence_too() -> None:
    unknown: Runs = {group: (waits, None, None) for group, (waits, _, _) in CACHED.items()}
    plain: Runs = {group: (waits, None, None) for group, (waits, _, _) in PLAIN.items()}
    sentence = headline(result_of(keeps=plain, keeps_cache=unknown))
    assert sentence.startswith("With the shared prefix Keeps' first token comes after 46.7 ms instead of 400.0 ms")


def test_the_table_has_a_row_for_every_contender() -> None:
    told = table(whole())
    assert told.headings == [
        "Engine",
        "First token, no prefix",
        "First run with prefix",
        "Last run with prefix",
        "To without cache",
        "To no prefix",
        "Cached tokens",
        "Prompt tokens",
        "Runs",
        "Failed",
    ]
    rows = {row[0]: row[1:] for row in told.rows}
    assert list(rows) == ["vLLM", "vLLM, prefix cache", "HF Transformers", "HF Transformers, prefix cache"]
    # ± is 4.303 * deviation / sqrt 3. For 380, 400, 420: 4.303 * 20 / 1.732 = 49.7; for 410, 400, 420 it is 24.8. For
    # 20, 40, 80 the squares of 26.67, 6.67, 33.33 make 1866.7, the deviation is sqrt(1866.7 / 2) = 30.55, hence 75.9.
    assert rows["vLLM"] == [
        *("40.0 ms", "400.0 ±49.7 ms", "400.0 ms", "–", "10.00× (10.00–10.00)", "0", "2,024", "12", "0")
    ]
    assert rows["vLLM, prefix cache"] == [
        *("40.0 ms", "410.0 ±24.8 ms", "46.7 ±75.9 ms", "0.10× (0.02–0.56)", "1.00× (0.18–5.59)"),
        *("2,016", "2,024", "12", "0"),
    ]
    assert rows["HF Transformers"][5:] == ["–", "–", "12", "0"]
    assert rows["HF Transformers, prefix cache"] == ["–"] * 7 + ["not available here", "–"]


def test_a_run_in_which_all_is_as_it_should_be_needs_no_note() -> None:
    assert notes(whole()) == []


def noted(emptied: bool = True, **changes: Run) -> list[str]:
    """The notes of vLLM with some of the cached runs changed ("prefix_1" is prefix 1)."""
    changed = {name.replace("_", " "): run for name, run in changes.items()}
    return notes(result_of(emptied=emptied, vllm=PLAIN, vllm_cache={**CACHED, **changed}))


def test_a_first_request_that_found_the_prefix_is_noted() -> None:
    (note,) = noted(prefix_1=([40], 2016, 2023))
    assert note == (
        "vLLM, prefix cache: the first request with the prefix did not meet an empty cache: up to 2,016 of its tokens "
        "came from there."
    )
    (note,) = noted(emptied=False, prefix_1=([40], 2016, 2023))
    assert note.endswith("came from there. The engine did not empty it when asked.")


def test_an_engine_that_reports_no_cached_tokens_cannot_be_verified_which_is_noted() -> None:
    silent: dict[str, Run] = {group.replace(" ", "_"): (waits, None, 2000) for group, (waits, _, _) in CACHED.items()}
    (note,) = noted(**silent)
    assert note.startswith("vLLM, prefix cache: it cannot be verified that the first request with the prefix met an ")


def test_a_cache_that_is_on_and_finds_nothing_is_noted_with_what_is_left() -> None:
    missed, left = noted(prefix_2=([380, 400, 380], 0, 2024))
    assert missed == (
        "vLLM, prefix cache: its cache is on, yet in 3 of 3 later runs with the prefix it reports only 0 cached tokens."
    )
    # (380 * 400 * 380)^(1/3) = 386.55, / 400 = 97 %; the mean is 1160 / 3.
    assert left == (
        "vLLM, prefix cache: the last first token with the prefix takes 97% of the time without the cache: the engine "
        "reports 0 of 2,024 tokens as cached and still needs 386.7 ms, longer than with no prefix at all (40.0 ms)."
    )


def test_a_first_token_that_stays_late_although_all_was_cached_is_explained_by_the_numbers() -> None:
    (note,) = noted(short_2=([300, 300, 300], 16, 21), prefix_2=([300, 300, 300], 2016, 2024))
    assert note == (
        "vLLM, prefix cache: the last first token with the prefix takes 75% of the time without the cache: the engine "
        "reports 2,016 of 2,024 tokens as cached and still needs 300.0 ms, as long as with no prefix at all (300.0 ms)."
    )
    # Half of the time is no cause for a note.
    assert noted(prefix_2=([200, 200, 200], 2016, 2024)) == []


def test_an_engine_that_caches_although_told_not_to_is_noted() -> None:
    result = result_of(vllm={**PLAIN, "prefix 2": ([40], 2016, 2024)})
    assert notes(result) == ["vLLM: its cache is off, yet it reports up to 2,016 cached tokens."]


# In pictures


def test_the_first_chart_draws_each_contender_in_run_order_with_its_spread_and_its_name() -> None:
    chart = ttft_chart(whole())
    assert chart is not None
    lines = {trace.name: trace for trace in chart.data}
    assert list(lines) == ["vLLM", "vLLM, prefix cache", "HF Transformers"]  # the unavailable one has nothing to show
    cached = lines["vLLM, prefix cache"]
    assert list(cached.x) == ["short 1", "short 2", "prefix 1", "prefix 2"]
    assert list(cached.y) == pytest.approx([40, 40, 410, 140 / 3])
    assert list(cached.error_y.array) == pytest.approx([2, 0, 10, 80 - 140 / 3])
    assert list(cached.error_y.arrayminus) == pytest.approx([2, 0, 10, 140 / 3 - 20])
    looks = {name: (line.line.dash, line.marker.symbol) for name, line in lines.items()}
    assert looks["vLLM"] == ("solid", "circle")
    assert looks["vLLM, prefix cache"] == ("dash", "diamond-open")
    assert chart.layout.yaxis.range == (0, pytest.approx(1.08 * 920))  # from zero, the largest value in it
    said = [note.text for note in chart.layout.annotations]
    assert said[:3] == ["vLLM, prefix cache 47 ms", "vLLM 400 ms", "HF Transformers 900 ms"]
    small_print = " ".join(said[3:])
    assert "mean of 3 series" in small_print
    assert "dashed line and diamonds: cache on" in small_print
    assert "test-model · Test CPU, 2 cores · 2026-11-23" in small_print
    assert "A label." in small_print


def test_names_of_lines_that_end_close_together_do_not_cover_each_other() -> None:
    assert apart([0, 5, 90, 91, 92], 20) == [0, 20, 90, 110, 130]
    chart = ttft_chart(result_of(vllm=PLAIN, other={**PLAIN, "prefix 2": ([404], 0, 2024)}))
    assert chart is not None
    lower, upper = chart.layout.annotations[:2]
    # 1.08 * 420 ms is the axis' end and 300 pixels high: 4 ms are 4 / 453.6 * 300 = 2.6 pixels, 17 are needed.
    assert (lower.yshift, upper.yshift) == (0, pytest.approx(17 - 4 / 453.6 * 300))


def test_a_run_of_which_every_request_failed_is_a_gap_and_the_name_stands_at_the_last_point() -> None:
    chart = ttft_chart(result_of(vllm={**PLAIN, "prefix 2": ([None, None], None, None)}))
    assert chart is not None
    assert chart.data[0].y[3] is None
    assert (chart.layout.annotations[0].x, chart.layout.annotations[0].y) == ("prefix 1", 400)


def test_the_second_chart_stacks_cached_and_computed_tokens_of_the_contenders_that_report_them() -> None:
    chart = cached_chart(whole())
    assert chart is not None
    assert chart.layout.barmode == "stack"
    assert [trace.name for trace in chart.data] == [
        "vLLM, prefix cache, from the cache",
        "vLLM, prefix cache, computed",
    ]
    cached, computed = chart.data
    assert list(cached.x) == ["short 1", "short 2", "prefix 1", "prefix 2"]
    assert list(cached.y) == [0, 16, 16, 2016]
    assert list(computed.y) == [20, 5, 2007, 8]  # 20 - 0, 21 - 16, 2023 - 16, 2024 - 2016
    assert "as the engine reports them" in " ".join(note.text for note in chart.layout.annotations)


def test_charts_of_nothing_are_left_out() -> None:
    assert ttft_chart(result_of("transformers_cache")) is None
    assert cached_chart(result_of(transformers=NAIVE)) is None
    assert cached_chart(result_of(vllm=PLAIN)) is None  # its cache is off, and it reports 0


# A real run: one engine that keeps prefixes and one that cannot, both at 1.5 ms per word of the prompt.

WORDS = 100


@pytest.fixture(scope="module")
def measured(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExperimentResult]:
    def engine(name: str, caches: bool) -> Engine:
        script = Script(start=0.05, first_token=0.005, gap=0.001, seconds_per_prompt_word=0.0015, caches=caches)
        return scripted_engine(name, name.title(), "#0072B2", script)

    engines = (engine("keeps", True), engine("forgets", False))
    # On one GPU one engine runs at a time, so that none waits for the others to be quiet.
    host = LocalHost(engines, model, cache=tmp_path_factory.mktemp("cache"), hardware=ONE_GPU)
    plan = PrefixCachingPlan(
        "What is it?\nWhy so?", ("keeps", "forgets"), repeats=2, warmups=1, max_tokens=3, prefix_times=WORDS
    )
    yield asyncio.run(run(EXPERIMENT, plan, host, lambda event: None))
    host.close()


def test_an_engine_without_a_cache_stays_as_the_baseline_and_says_why(measured: ExperimentResult) -> None:
    assert [row.name for row in measured.engines] == ["keeps", "keeps+cache", "forgets", "forgets+cache"]
    assert row_of(measured, "forgets+cache").unavailable == "Forgets's script has no prefix cache."
    assert [len(measured.measured(row.name)) for row in measured.engines] == [8, 8, 8, 0]  # 2 series of 2 + 2
    caching = {row.name: row.config.get("prefix_caching") for row in measured.engines}
    assert caching == {"keeps": False, "keeps+cache": True, "forgets": False, "forgets+cache": None}
    assert not any(row.timeline.error for row in measured.requests)


def test_every_series_began_with_empty_caches(measured: ExperimentResult) -> None:
    def emptied(name: str) -> list[tuple[str, bool | None]]:
        return [(trial.group, trial.caches_emptied) for trial in measured.trials if trial.engine == name]

    series = [("short 1", True), ("short 2", None), ("prefix 1", None), ("prefix 2", None)]
    assert emptied("keeps+cache") == [("", None), ("", None), *series, *series]
    assert [asked for group, asked in emptied("forgets") if group == "short 1"] == [False, False]
    assert cold_start_verified(measured, "keeps+cache") is True


def test_the_engine_that_keeps_prefixes_reports_them_and_answers_sooner(measured: ExperimentResult) -> None:
    # The questions share no word with the prefix or each other, so exactly its words come from the cache.
    counts = {group: cached_tokens(measured, "keeps+cache", group).values for group in groups(measured)}
    assert counts == {"short 1": (0, 0), "short 2": (0, 0), "prefix 1": (0, 0), "prefix 2": (WORDS, WORDS)}
    assert all(prefix_tokens(measured, name) == WORDS for name in ("keeps", "keeps+cache", "forgets"))
    # A busy machine can only make it later than the script: 5 ms + 102 words * 1.5 ms against 5 ms + 2 words * 1.5 ms.
    for name, group in (("keeps", "prefix 2"), ("forgets", "prefix 2"), ("keeps+cache", "prefix 1")):
        assert (ttft(measured, name, group).smallest or 0) > 0.157
    gain = to_uncached(measured, row_of(measured, "keeps+cache"))
    assert gain is not None
    assert gain.value < 0.5
    assert notes(measured) == []


def test_a_real_result_is_told_drawn_and_kept(measured: ExperimentResult, tmp_path: Path) -> None:
    again = ExperimentResult.from_json(measured.save(tmp_path).read_text(encoding="utf-8"))
    assert headline(again).startswith("With 100 shared tokens Keeps' first token ")
    assert "Forgets keeps no prefix cache: " in headline(again)
    assert table(again).rows[3][-2:] == ["not available here", "–"]
    assert all(chart.draw(again) is not None for chart in EXPERIMENT.charts)


def test_contenders_are_each_engine_without_and_with_its_cache() -> None:
    keeps, forgets = (
        scripted_engine(name, name.title(), "#0072B2", Script(caches=name == "keeps")) for name in ("keeps", "forgets")
    )
    host = LocalHost((keeps, forgets), "/nowhere", hardware=ONE_GPU)
    found = contenders(plan_of(engines=("forgets", "keeps")), host)
    assert [(one.key, one.variant, dict(one.changes), one.compared_with) for one in found] == [
        ("forgets", "", {}, ""),
        ("forgets+cache", "prefix cache", {"prefix_caching": True}, "forgets"),
        ("keeps", "", {}, ""),
        ("keeps+cache", "prefix cache", {"prefix_caching": True}, "keeps"),
    ]
    assert [bool(one.unavailable) for one in found] == [False, True, False, False]
    host.close()


def test_every_setting_is_a_field_of_the_plan_and_is_in_words() -> None:
    for setting in EXPERIMENT.settings:
        assert setting.name in Plan.__slots__ or setting.name in PrefixCachingPlan.__slots__
        assert setting.label
