"""A recording played back: the same events, each answer at its own speed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest

from engines.timeline import Arrival, Timeline
from experiments.base import (
    EngineFailed,
    EngineReady,
    RequestEnded,
    RequestStarted,
    RunEnded,
    TokensArrived,
    TrialStarted,
)
from experiments.replay import PAUSE_SECONDS, ReplayedRun, schedule
from experiments.result import EngineRow, ExperimentResult, RequestRow, TrialRow
from tests.experiments.test_result import SCHEMA_1, result_of


def request(engine: str, sent: float, *at: float, group: str = "", index: int = 0, repeat: int = 1) -> RequestRow:
    arrivals = tuple(Arrival(moment, " word", tokens=1) for moment in at)
    return RequestRow(engine, repeat, False, Timeline(sent, arrivals, closed=at[-1]), group, index, planned=sent)


def recording(trials: list[TrialRow], requests: list[RequestRow], **changes: object) -> ExperimentResult:
    rows = tuple(EngineRow(name, name.title(), "#000000") for name in dict.fromkeys(row.engine for row in requests))
    result = replace(result_of(), engines=rows, trials=tuple(trials), requests=tuple(requests))
    return replace(result, **changes)  # type: ignore[arg-type]


ONE_AFTER_THE_OTHER = recording(
    [
        TrialRow("quick", "prompt 1", 1, False, 100.0, 100.3),
        TrialRow("slow", "prompt 1", 1, False, 190.0, 191.0),  # 90 s later: an engine was restarted in between
    ],
    [request("quick", 100.0, 0.1, 0.3, group="prompt 1"), request("slow", 190.0, 0.5, 1.0, group="prompt 1")],
    settings={"prompt": "One?\nTwo?"},
)


def test_each_answer_keeps_its_times_and_waiting_in_between_is_cut_short() -> None:
    timed = schedule(ONE_AFTER_THE_OTHER)
    tokens = [(event.engine, at) for at, event in timed if isinstance(event, TokensArrived)]
    begin = 0.3 + PAUSE_SECONDS  # the second trial begins a pause after the first has ended
    assert tokens == [
        ("quick", pytest.approx(0.1)),
        ("quick", pytest.approx(0.3)),
        ("slow", pytest.approx(begin + 0.5)),
        ("slow", pytest.approx(begin + 1.0)),
    ]
    assert all(earlier <= later for (earlier, _), (later, _) in pairwise(timed))
    assert isinstance(timed[-1][1], RunEnded)


def test_the_prompt_of_each_trial_is_told_and_its_place_among_all() -> None:
    started = [event for _, event in schedule(ONE_AFTER_THE_OTHER) if isinstance(event, TrialStarted)]
    assert [(event.trial.prompts, event.trial.words) for event in started] == [(("One?",), "prompt 1, repeat 1")] * 2
    assert [(event.done, event.of) for event in started] == [(0, 2), (1, 2)]


def test_what_ran_at_the_same_time_is_played_at_the_same_time() -> None:
    race = recording(
        [TrialRow("quick", "", 1, False, 5.0, 6.0), TrialRow("slow", "", 1, False, 5.1, 8.0)],
        [request("quick", 5.0, 1.0), request("slow", 5.1, 2.9)],
    )
    sent = {event.engine: at for at, event in schedule(race) if isinstance(event, RequestStarted)}
    assert sent == {"quick": pytest.approx(0.0), "slow": pytest.approx(0.1)}


def test_many_users_keep_their_spacing() -> None:
    wave = recording(
        [TrialRow("quick", "2", 1, False, 10.0, 12.0)],
        [request("quick", 10.0, 1.0, group="2"), request("quick", 10.1, 1.5, group="2", index=1)],
    )
    (started,) = [event for _, event in schedule(wave) if isinstance(event, TrialStarted)]
    assert len(started.trial.prompts) == 2
    assert started.trial.spacing == pytest.approx(0.1)


def test_engines_that_could_not_run_say_so_at_the_beginning() -> None:
    rows = (EngineRow("a", "A", "#000000"), EngineRow("a+1", "A", "#000000", unavailable="It cannot."))
    timed = schedule(replace(ONE_AFTER_THE_OTHER, engines=rows))
    assert [type(event) for _, event in timed[:2]] == [EngineReady, EngineFailed]


def test_results_of_schema_1_are_played_request_by_request() -> None:
    result = ExperimentResult.from_json(SCHEMA_1.read_text(encoding="utf-8"))
    timed = schedule(result)
    ended = [event.row for _, event in timed if isinstance(event, RequestEnded)]
    assert sorted(row.timeline.sent for row in ended) == sorted(row.timeline.sent for row in result.requests)
    assert sum(isinstance(event, TrialStarted) for _, event in timed) == len(result.requests)


def play(run: ReplayedRun) -> list[object]:
    async def watch() -> list[object]:
        return [event async for events in run.new_events(0.02) for event in events]

    return asyncio.run(watch())


def test_a_replay_gives_every_event_and_takes_as_long_as_the_answers_did() -> None:
    run = ReplayedRun(recording([TrialRow("quick", "", 1, False, 0.0, 0.3)], [request("quick", 0.0, 0.1, 0.3)]))
    events = play(run)
    assert [type(event).__name__ for event in events] == [
        "EngineReady",
        "TrialStarted",
        "RequestStarted",
        "TokensArrived",
        "TokensArrived",
        "RequestEnded",
        "TrialEnded",
        "RunEnded",
    ]
    assert run.finished.is_set() and run.result is run.recorded


def test_a_replay_that_is_stopped_ends_at_once() -> None:
    run = ReplayedRun(recording([TrialRow("quick", "", 1, False, 0.0, 60.0)], [request("quick", 0.0, 60.0)]))
    run.stop()
    assert play(run) == []
