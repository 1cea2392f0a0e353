"""A recorded run played back: the same events in the same order, each answer at the speed at which it came.

Waiting between trials (engines that settled, restarted or took their time to load) is cut short; nothing else is.
"""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_right
from collections.abc import AsyncIterator

from engines.clock import monotonic_clock
from experiments.base import (
    EngineFailed,
    EngineReady,
    Event,
    RequestEnded,
    RequestStarted,
    RunEnded,
    TokensArrived,
    Trial,
    TrialEnded,
    TrialStarted,
)
from experiments.kept import Kept
from experiments.result import ExperimentResult, RequestRow, TrialRow

PAUSE_SECONDS = 0.4  # between two trials
_scheduled: Kept[tuple[ExperimentResult, list[tuple[float, Event]]]] = Kept(4)


def schedule(result: ExperimentResult) -> list[tuple[float, Event]]:
    """(seconds from the start of the replay, what happens), in order. All who watch a result share the list."""
    # With the result beside its schedule its identity cannot become another one's.
    return _scheduled.get(id(result), lambda: (result, _schedule(result)))[1]


def _schedule(result: ExperimentResult) -> list[tuple[float, Event]]:
    events: list[tuple[float, Event]] = []
    for row in result.engines:
        events.append((0.0, EngineFailed(row) if row.error or row.unavailable else EngineReady(row)))
    # A race's trials ran at the same time and stay so; what ran in turn follows with a short pause.
    clock = reached = 0.0
    shift = 0.0
    trials = _trials(result)
    for place, (trial, requests) in enumerate(trials):
        if trial.began >= reached:
            clock += PAUSE_SECONDS if place else 0.0
            shift = clock - trial.began
        reached = max(reached, trial.ended)
        events.append(
            (trial.began + shift, TrialStarted(trial.engine, _told(result, trial, requests), len(trials), place))
        )
        for request in requests:
            events += _played(request, shift)
        events.append((trial.ended + shift, TrialEnded(trial)))
        clock = reached + shift
    events.append((clock, RunEnded(result)))
    return sorted(events, key=lambda timed: timed[0])


def _played(request: RequestRow, shift: float) -> list[tuple[float, Event]]:
    timeline = request.timeline
    sent = timeline.sent + shift
    events: list[tuple[float, Event]] = [(sent, RequestStarted(request.engine, request.index))]
    events += [
        (sent + arrival.at, TokensArrived(request.engine, arrival, request.index)) for arrival in timeline.arrivals
    ]
    last = timeline.arrivals[-1].at if timeline.arrivals else 0.0
    return [*events, (sent + (last if timeline.closed is None else timeline.closed), RequestEnded(request))]


def _trials(result: ExperimentResult) -> list[tuple[TrialRow, list[RequestRow]]]:
    """Each trial with its requests, by time. Schema 1 kept no trials: there each request is one."""
    if result.trials:
        kept = sorted(result.trials, key=lambda trial: trial.began)
        return [(trial, [row for row in result.requests if _belongs(row, trial)]) for trial in kept]
    rows = sorted(result.requests, key=lambda row: row.timeline.sent)
    return [
        (
            TrialRow(
                row.engine,
                row.group,
                row.repeat,
                row.warmup,
                row.timeline.sent,
                row.timeline.sent + (row.timeline.closed or 0.0),
            ),
            [row],
        )
        for row in rows
    ]


def _belongs(row: RequestRow, trial: TrialRow) -> bool:
    same = (row.engine, row.group, row.repeat, row.warmup) == (trial.engine, trial.group, trial.repeat, trial.warmup)
    return same and trial.began <= row.timeline.sent <= trial.ended


def _told(result: ExperimentResult, trial: TrialRow, requests: list[RequestRow]) -> Trial:
    """As much of the plan's trial as the result still knows."""
    words = f"{'warm-up' if trial.warmup else 'repeat'} {trial.repeat}"
    prompt = str(result.settings.get("prompt", ""))
    lines = [line for line in prompt.splitlines() if line.strip()] or [prompt]
    number = trial.group.rpartition(" ")[2]
    place = int(number) - 1 if number.isdigit() and int(number) <= len(lines) else 0
    shown = lines[place] if trial.group.startswith(("prompt ", "short ", "prefix ")) else prompt
    planned = sorted(row.planned for row in requests if row.planned is not None)
    spacing = planned[1] - planned[0] if len(planned) > 1 else 0.0
    return Trial(
        f"{trial.group}, {words}" if trial.group else words,
        trial.repeat,
        trial.warmup,
        (shown,) * max(1, len({row.index for row in requests})),
        trial.group,
        spacing,
    )


class ReplayedRun:
    """A replay with a BackgroundRun's face: events that come by and by, and a stop."""

    failure: BaseException | None = None

    def __init__(self, result: ExperimentResult) -> None:
        self.recorded = result
        self.finished = threading.Event()

    @property
    def result(self) -> ExperimentResult:
        return self.recorded

    def stop(self) -> None:
        self.finished.set()

    async def new_events(self, interval: float) -> AsyncIterator[list[Event]]:
        """What has happened since the last time, at most once per `interval` seconds."""
        events = await asyncio.to_thread(schedule, self.recorded)  # a hundred thousand of them take a moment
        shown = 0
        began = monotonic_clock()
        while shown < len(events) and not self.finished.is_set():
            passed = monotonic_clock() - began
            due = bisect_right(events, passed, lo=shown, key=lambda timed: timed[0])
            if due > shown:
                yield [event for _, event in events[shown:due]]
                shown = due
            await asyncio.sleep(interval)
        self.finished.set()
