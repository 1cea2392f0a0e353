"""Runs against scripted engines: real server processes whose pace and faults are known beforehand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from engines.base import Engine, EngineConfig
from engines.hardware import Hardware
from engines.local import TOGETHER_LABEL, LocalHost
from engines.random_weights import make_model
from engines.scripted import Script, scripted_engine
from experiments.background import BackgroundRun
from experiments.base import (
    Contender,
    EngineFailed,
    EngineReady,
    Plan,
    RequestEnded,
    RunEnded,
    TokensArrived,
    TrialStarted,
)
from experiments.baseline import EXPERIMENT
from experiments.metrics import METRICS
from experiments.result import ExperimentResult
from experiments.run import RACE_LABEL, SHARED_CORES_LABEL, blocks, rotated, run
from tests.conftest import MACHINE, wait_until
from tests.engines.tiny_shapes import TINY_QWEN

ONE_GPU = Hardware(cpu="Test CPU", cores=2, memory_gib=8.0, gpu="Test GPU", gpu_memory_gib=24.0, gpu_count=1)

MakeEngine = Callable[..., Engine]
MakeHost = Callable[..., LocalHost]
Run = tuple[ExperimentResult, list[object]]


def engine(name: str, **script: object) -> Engine:
    settings = {"start": 0.05, "first_token": 0.005, "gap": 0.001, **script}
    return scripted_engine(name, name.title(), "#0072B2", Script(**settings))  # type: ignore[arg-type]


def plan_for(*engines: str, **settings: object) -> Plan:
    return Plan(**{"prompt": "Go.", "engines": engines, "repeats": 1, "warmups": 0, "max_tokens": 8, **settings})  # type: ignore[arg-type]


def run_plan(host: LocalHost, plan: Plan) -> Run:
    events: list[object] = []
    return asyncio.run(run(EXPERIMENT, plan, host, events.append)), events


def order(events: list[object]) -> list[tuple[str, bool, int]]:
    return [
        (event.engine, event.trial.warmup, event.trial.repeat) for event in events if isinstance(event, TrialStarted)
    ]


# Starting a server takes half a second, so tests that leave theirs as they found it share one.


@pytest.fixture(scope="module")
def shared_host(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeHost]:
    with contextlib.ExitStack() as stack:

        def make(*engines: Engine, **settings: str) -> LocalHost:
            host = LocalHost(engines, model, cache=tmp_path_factory.mktemp("cache"), hardware=MACHINE, **settings)  # type: ignore[arg-type]
            stack.callback(host.close)
            return host

        yield make


@pytest.fixture(scope="module")
def steady(shared_host: MakeHost) -> LocalHost:
    """A host with one engine: first token after 0.1 s, then one every 0.02 s."""
    engines = [engine("steady", first_token=0.1, gap=0.02)]
    return shared_host(*engines, model_label="a model", model_note="Random words.")


@pytest.fixture(scope="module")
def pair(shared_host: MakeHost) -> LocalHost:
    return shared_host(engine("one", gap=0.01), engine("two", gap=0.01))


@pytest.fixture(scope="module")
def troubled(shared_host: MakeHost) -> Run:
    """Two repeats, all at once, with an engine for each thing that goes wrong or is out of the ordinary."""
    engines = [
        engine("quick"),
        engine("unstartable", fault="exit at start"),
        engine("refusing", fault="http 500"),
        engine("reporting", fault="error event", fault_after_tokens=3),
        engine("dying", fault="exit in mid-stream", fault_after_tokens=3),
        engine("empty", fault="no tokens"),
        engine("mute", usage="none"),
        engine("bursty", gap=0.04, tokens_per_chunk=4),
    ]
    plan = plan_for(*(engine.name for engine in engines), repeats=2, race=True)
    return run_plan(shared_host(*engines), plan)


def contender(key: str, unavailable: str = "") -> Contender:
    return Contender(key, engine(key.partition("+")[0]), unavailable=unavailable)


def keys(found: list[tuple[Contender, ...]]) -> list[list[str]]:
    return [[one.key for one in block] for block in found]


def test_what_fits_is_loaded_together_but_no_engine_in_two_variants() -> None:
    all_of_them = tuple(contender(key) for key in ("a", "a+1", "a+2", "b", "b+1", "c"))
    assert keys(blocks(all_of_them, resident_together=True)) == [["a", "b", "c"], ["a+1", "b+1"], ["a+2"]]


def test_where_one_engine_fits_its_variants_follow_each_other() -> None:
    all_of_them = tuple(contender(key) for key in ("a", "b", "a+1", "b+1"))
    assert keys(blocks(all_of_them, resident_together=False)) == [["a"], ["a+1"], ["b"], ["b+1"]]


def test_what_is_unavailable_is_never_loaded() -> None:
    both = (contender("a"), contender("a+1", unavailable="It cannot."))
    assert keys(blocks(both, resident_together=True)) == [["a"]]
    assert keys(blocks(both[1:], resident_together=False)) == []


def test_rotation_lets_each_engine_go_first_in_its_turn() -> None:
    names = ("a", "b", "c")
    assert [rotated(names, by) for by in range(4)] == [names, ("b", "c", "a"), ("c", "a", "b"), names]
    assert rotated((), 2) == ()


def test_engines_take_turns_in_each_round_and_another_one_goes_first_in_each_repeat(pair: LocalHost) -> None:
    result, events = run_plan(pair, plan_for("one", "two", warmups=1, repeats=2, max_tokens=5))
    assert order(events) == [
        ("one", True, 1),
        ("two", True, 1),
        ("one", False, 1),
        ("two", False, 1),
        ("two", False, 2),
        ("one", False, 2),
    ]
    # One at a time: each request is sent after the one before it has ended.
    for before, after in pairwise(result.requests):
        assert before.timeline.closed is not None
        assert before.timeline.sent + before.timeline.closed <= after.timeline.sent
    # What each event says is what the result keeps, and the result comes last.
    assert [event.row for event in events if isinstance(event, RequestEnded)] == list(result.requests)
    tokens = [event.arrival for event in events if isinstance(event, TokensArrived)]
    assert tokens == [arrival for row in result.requests for arrival in row.timeline.arrivals]
    assert len(tokens) == 6 * 5
    assert events[-1] == RunEnded(result)
    # Warm-ups are kept, and are no part of any statistic.
    assert [row.repeat for row in result.measured("one")] == [1, 2]
    assert len(result.distribution("one", METRICS["ttft"]).values) == 2
    assert not result.stopped_early
    assert result.labels == (SHARED_CORES_LABEL,)


def test_a_race_runs_all_engines_at_once_and_says_that_they_slowed_each_other(pair: LocalHost) -> None:
    result, _ = run_plan(pair, plan_for("one", "two", max_tokens=20, race=True))
    first, second = (row.timeline for row in result.requests)
    assert first.closed is not None and second.closed is not None
    assert max(first.sent, second.sent) < min(first.sent + first.closed, second.sent + second.closed)
    assert result.labels[0] == RACE_LABEL


def test_an_engine_alone_is_no_race(steady: LocalHost) -> None:
    result, _ = run_plan(steady, plan_for("steady", max_tokens=2, race=True))
    assert RACE_LABEL not in result.labels


def test_a_result_says_exactly_what_was_measured(steady: LocalHost, model: str) -> None:
    result, events = run_plan(steady, plan_for("steady", max_tokens=2))
    (row,) = result.engines
    assert [event.row for event in events if isinstance(event, EngineReady)] == [row]
    assert (row.name, row.label, row.error) == ("steady", "Steady", None)
    assert row.command is not None
    assert "-m engines.scripted --port" in row.command
    assert row.config["model"] == model
    assert (row.config["prefix_caching"], row.config["speculation"]) == (False, None)
    assert list(row.start_phases) == ["importing", "loading weights", "warming up"]
    assert row.caveat == "Steady follows a script: these are no engine's numbers."
    assert (result.model, result.host, result.hardware["cpu"]) == ("a model", "local", "Test CPU")
    assert result.settings["max_tokens"] == 2
    assert "Random words." in result.labels


def test_measured_times_agree_with_the_script(steady: LocalHost) -> None:
    result, _ = run_plan(steady, plan_for("steady", repeats=2, max_tokens=9))
    # A busy machine can only make it later than the script says, so the quicker repeat is held against it.
    ttft, tpot = (result.distribution("steady", METRICS[name]).smallest for name in ("ttft", "tpot"))
    assert ttft is not None and tpot is not None
    assert 0.095 < ttft < 0.25
    assert 0.019 < tpot < 0.04
    for row in result.requests:
        assert row.timeline.token_source == "per chunk"
        assert (row.metrics.output_tokens, len(row.timeline.arrivals)) == (9, 9)


def test_chunks_of_four_tokens_are_measured_by_the_token(troubled: Run) -> None:
    result, _ = troubled
    for row in result.measured("bursty"):
        assert [arrival.tokens for arrival in row.timeline.arrivals] == [4, 4]
        assert row.metrics.tpot is not None
        # 0.04 s / 4 tokens, less if a busy machine sent the first chunk late; by the chunk it would be 0.04 / 7 = 0.006
        assert 0.0065 < row.metrics.tpot < 0.05


def test_an_engine_that_cannot_start_is_a_row_with_its_error_and_the_others_are_measured(troubled: Run) -> None:
    result, events = troubled
    row = next(engine for engine in result.engines if engine.name == "unstartable")
    assert [event.row for event in events if isinstance(event, EngineFailed)] == [row]
    assert row.error is not None
    assert "the script says so" in row.error
    assert "RuntimeError" in row.log_tail
    assert result.measured("unstartable") == []
    assert len(result.measured("quick")) == 2
    assert not result.failures("quick")


def test_engines_stand_in_the_order_of_the_plan_however_long_each_took_to_start(troubled: Run) -> None:
    result, _ = troubled
    assert [row.name for row in result.engines] == list(result.settings["engines"])


def test_a_run_in_which_no_engine_starts_ends_with_their_errors(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted("one"), scripted("two"), model="/nowhere")
    result, events = run_plan(host, plan_for("one", "two"))
    assert result.requests == ()
    assert [row.error for row in result.engines] == ["There is no model in /nowhere: there is no such folder."] * 2
    assert isinstance(events[-1], RunEnded)


@pytest.mark.parametrize(
    ("name", "words", "tokens"),
    [
        ("refusing", "HTTP 500", 0),
        ("empty", "without a single token", 0),
        ("reporting", "out of cache blocks", 3),
        ("dying", "broke off", 3),
    ],
)
def test_a_failed_request_is_a_row_with_its_error_that_keeps_what_came_and_enters_no_statistic(
    troubled: Run, name: str, words: str, tokens: int
) -> None:
    result, _ = troubled
    assert len(result.failures(name)) == 2
    timeline = result.failures(name)[0].timeline
    assert timeline.error is not None
    assert words in timeline.error
    assert len(timeline.arrivals) == tokens
    assert result.distribution(name, METRICS["ttft"]).values == ()


def test_an_engine_that_died_in_one_request_fails_the_next_one_as_well(troubled: Run) -> None:
    result, _ = troubled
    assert "cannot be reached" in str(result.failures("dying")[1].timeline.error)


def test_token_counts_that_no_engine_reported_are_labelled_as_estimates(troubled: Run) -> None:
    result, _ = troubled
    assert result.measured("mute")[0].metrics.output_tokens == 8
    assert result.measured("mute")[0].timeline.token_source == "estimated"
    assert any("estimated as one per chunk" in label for label in result.labels)


def test_where_one_engine_at_a_time_fits_each_is_measured_whole_and_makes_room(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted("one"), scripted("two"), hardware=ONE_GPU)
    lights: list[tuple[str, str]] = []
    events: list[object] = []

    def watch(event: object) -> None:
        events.append(event)
        if isinstance(event, TrialStarted):
            lights.append((host.status("one").light, host.status("two").light))

    result = asyncio.run(run(EXPERIMENT, plan_for("one", "two", warmups=1, repeats=2, race=True), host, watch))
    assert order(events) == [(name, *part) for name in ("one", "two") for part in ((True, 1), (False, 1), (False, 2))]
    assert lights == [("ready", "down")] * 3 + [("down", "ready")] * 3
    assert not any(row.timeline.error for row in result.requests)
    assert result.labels == ()  # they shared neither cores nor time


# On a thread of its own


def test_stopping_keeps_what_was_measured(steady: LocalHost) -> None:
    background = BackgroundRun(EXPERIMENT, plan_for("steady", repeats=20, max_tokens=3), steady)
    wait_until(lambda: sum(isinstance(event, RequestEnded) for event in background.events) >= 2)
    background.stop()
    assert background.finished.wait(5)
    assert background.failure is None
    assert background.result is not None
    assert background.result.stopped_early
    assert 2 <= len(background.result.requests) < 20
    assert not any(row.timeline.error for row in background.result.requests)


def test_stopping_does_not_wait_for_an_engine_that_hangs(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted("hanging", fault="hang", fault_after_tokens=2))
    background = BackgroundRun(EXPERIMENT, plan_for("hanging"), host)
    wait_until(lambda: sum(isinstance(event, TokensArrived) for event in background.events) == 2)
    background.stop()
    assert background.finished.wait(2)
    assert background.result is not None
    assert background.result.stopped_early


def test_stopping_while_an_engine_starts_ends_the_run_at_once(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted("slow", start=30))
    background = BackgroundRun(EXPERIMENT, plan_for("slow"), host)
    wait_until(lambda: host.status("slow").phase == "loading weights")
    background.stop()
    assert background.finished.wait(2)
    assert background.result is not None
    assert background.result.requests == ()


def test_stopping_before_the_run_has_begun_still_ends_with_a_result(steady: LocalHost) -> None:
    for _ in range(10):  # the stop comes before or after the first step of the run, as the threads happen to go
        background = BackgroundRun(EXPERIMENT, plan_for("steady"), steady)
        background.stop()
        assert background.finished.wait(5)
        assert background.failure is None
        assert background.result is not None
        assert background.result.stopped_early


def test_stopping_a_run_that_is_over_changes_nothing(steady: LocalHost) -> None:
    background = BackgroundRun(EXPERIMENT, plan_for("steady", max_tokens=2), steady)
    assert background.finished.wait(10)
    before = background.result
    background.stop()
    assert background.result == before
    assert before is not None
    assert not before.stopped_early


def test_an_unexpected_failure_is_kept_to_be_shown(scripted: MakeEngine, make_host: MakeHost) -> None:
    def broken_command(config: EngineConfig) -> list[str]:
        raise ZeroDivisionError("a fault of ours, not of an engine")

    host = make_host(replace(scripted("quick"), serve_command=broken_command))
    background = BackgroundRun(EXPERIMENT, plan_for("quick"), host)
    assert background.finished.wait(10)
    assert isinstance(background.failure, ZeroDivisionError)
    assert background.result is None


def test_readers_of_a_run_get_every_event_once_and_in_order(steady: LocalHost) -> None:
    background = BackgroundRun(EXPERIMENT, plan_for("steady"), steady)

    async def read() -> list[list[object]]:
        return [batch async for batch in background.new_events(0.05)]

    batches = asyncio.run(read())
    assert [event for batch in batches for event in batch] == background.events
    assert len(batches) > 1
    assert isinstance(batches[-1][-1], RunEnded)


def test_what_was_measured_is_kept_after_each_contender_as_part_of_the_same_run(
    make_host: MakeHost, tmp_path: Path
) -> None:
    host = make_host(engine("one"), engine("two"), hardware=ONE_GPU)  # one after the other: two blocks
    kept: list[ExperimentResult] = []

    def keep(so_far: ExperimentResult) -> None:
        kept.append(so_far)
        so_far.save(tmp_path / "out")

    whole = asyncio.run(run(EXPERIMENT, plan_for("one", "two"), host, lambda event: None, keep=keep))
    assert [len({row.engine for row in so_far.requests}) for so_far in kept] == [1, 2]
    assert {so_far.id for so_far in kept} == {whole.id}
    assert all(so_far.stopped_early for so_far in kept) and not whole.stopped_early
    whole.save(tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()  # in its place
    assert not ExperimentResult.from_json(path.read_text(encoding="utf-8")).stopped_early


def test_within_one_contender_it_is_kept_now_and_then(pair: LocalHost, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    plan = plan_for("one", "two", repeats=3)
    asyncio.run(run(EXPERIMENT, plan, pair, lambda event: None, keep=lambda so_far: kept.append(len(so_far.requests))))
    assert kept == [6]  # all of it took less than the seconds between two
    monkeypatch.setattr("experiments.run.KEEP_SECONDS", 0.0)
    kept.clear()
    asyncio.run(run(EXPERIMENT, plan, pair, lambda event: None, keep=lambda so_far: kept.append(len(so_far.requests))))
    assert kept == [2, 4, 6, 6]


def test_engines_that_share_a_gpu_take_turns_and_the_result_says_that_they_shared_it(
    make_host: MakeHost, tmp_path: Path
) -> None:
    folder = str(make_model(TINY_QWEN, (), tmp_path))
    host = make_host(engine("one"), engine("two"), model=folder, hardware=ONE_GPU, together=True)
    result, events = run_plan(host, plan_for("one", "two", repeats=2))
    assert order(events) == [("one", False, 1), ("two", False, 1), ("two", False, 2), ("one", False, 2)]
    assert TOGETHER_LABEL in result.labels and SHARED_CORES_LABEL not in result.labels
    assert {row.config["cache_gib"] for row in result.engines} == {host.config("one").cache_gib}
