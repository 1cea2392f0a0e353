"""A rented host without an account: recordings come back as if containers had measured them just now.

For trying the page, and for its tests: the same interface, the same stages, the same failures in Modal's own words,
but nothing is measured and nothing is paid, and every result says so. A model called `rehearse/NAME` fails that way.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from engines.base import EngineError
from engines.clock import monotonic_clock
from engines.cloud import RESTARTED, ContainerFacts, Machine, Rates, Rental, Stage, listed_rates
from engines.hardware import Hardware
from engines.local import Status
from engines.modal_cloud import failures_told
from engines.server import PhaseTime
from experiments.base import EngineFailed, EngineReady, Event, RunEnded
from experiments.library import RECORDINGS, Library
from experiments.replay import schedule
from experiments.result import ExperimentResult
from experiments.wire import encoded

QUEUE_SECONDS, CONTAINER_SECONDS, IMPORT_SECONDS = 3.0, 4.0, 2.0
LOOK_SECONDS = 0.05
LEAVING_SECONDS = 4.0  # that a container is still there after it was let go
NETWORK_SECONDS = 0.09
FAULTS = "rehearse/"
STAGES = {"importing": 4.0, "loading weights": 3.0, "compiling": 4.0, "capturing graphs": 2.0, "warming up": 1.0}


class RehearsalCloud:
    """`speed`: how many times as fast as it was recorded; `fault`: what goes wrong, whatever the model."""

    name = "rehearsal"
    label = "Modal (rehearsal)"
    machine = Machine()
    measures = False

    def __init__(self, recordings: Path = RECORDINGS, speed: float = 1.0) -> None:
        self.library = Library(recordings, recordings)
        self.speed = speed
        self.containers: dict[Rental, float] = {}  # until when each is there
        self.cancelled: list[Rental] = []

    async def rates(self) -> Rates:
        return listed_rates()

    async def start(self, rental: Rental, on_stage: Callable[[Stage], None]) -> _RehearsedContainer:
        fault = rental.model.removeprefix(FAULTS) if rental.model.startswith(FAULTS) else ""
        began = monotonic_clock()
        with failures_told(rental):
            on_stage("waiting for a GPU")
            await self._passes(QUEUE_SECONDS)
            _raise_at_start(fault)
            if fault == "no-gpu":
                await asyncio.Event().wait()  # until the visitor gives up
            self.containers[rental] = inf
            try:
                on_stage("starting the container")
                await self._passes(CONTAINER_SECONDS)
                alive = monotonic_clock()
                await self._passes(IMPORT_SECONDS)
            except asyncio.CancelledError:
                await self.let_go(rental)
                raise
        passed = monotonic_clock() - alive
        facts = ContainerFacts(f"rehearsed {began:.0f}", Hardware("rehearsed", 0, 0.0), passed, passed, calls=0)
        return _RehearsedContainer(self, rental, facts, fault)

    async def let_go(self, rental: Rental) -> None:
        self.leave(rental, 0)

    def leave(self, rental: Rental, after_seconds: float) -> None:
        self.containers[rental] = monotonic_clock() + (after_seconds + LEAVING_SECONDS) / self.speed

    async def running(self, rental: Rental) -> int:
        return int(monotonic_clock() < self.containers.get(rental, 0.0))

    async def _passes(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.speed)


class _RehearsedContainer:
    network_seconds: float | None = NETWORK_SECONDS

    def __init__(self, cloud: RehearsalCloud, rental: Rental, facts: ContainerFacts, fault: str) -> None:
        self.facts = facts
        self._cloud, self._rental, self._fault = cloud, rental, fault

    async def events(self, order: str) -> AsyncGenerator[str, None]:
        ended = False
        try:
            with failures_told(self._rental):
                async for item in self._replayed(json.loads(order)):
                    yield item
            ended = True
        finally:
            if not ended:
                self._cloud.cancelled.append(self._rental)
            self._cloud.leave(self._rental, self._rental.keep_seconds if ended else 0)

    async def _replayed(self, order: dict[str, object]) -> AsyncGenerator[str, None]:
        result = self._recorded(str(order["experiment"]), str(order["only"]))
        phases: list[PhaseTime] = []
        for phase, seconds in STAGES.items():
            yield encoded([Status("starting", phase, phases=tuple(phases))])
            await self._cloud._passes(seconds)
            phases.append(PhaseTime(phase, seconds / self._cloud.speed))
            if self._fault == "out-of-gpu-memory" and phase == "loading weights":
                words = (
                    f"{result.engines[0].label} stopped with exit code 1 while loading weights: the GPU's memory is "
                    "full. Lower the memory share or the context."
                )
                row = replace(result.engines[0], error=words, log_tail="torch.OutOfMemoryError: CUDA out of memory.")
                yield encoded([EngineFailed(row), RunEnded(replace(result, engines=(row,)))])
                return
        row = result.engines[0]
        if row.error or row.unavailable:
            row = replace(row, error=row.error or row.unavailable)
            yield encoded([EngineFailed(row), RunEnded(result)])
            return
        yield encoded([EngineReady(replace(row, start_phases={one.name: one.seconds for one in phases}))])
        timed = [(at, event) for at, event in schedule(result) if not isinstance(event, EngineReady | EngineFailed)]
        half = timed[len(timed) // 2][0]
        async for events in self._paced([one for one in timed if not self._fault or one[0] <= half]):
            yield encoded(events)
        if self._fault == "preemption":
            yield RESTARTED
            async for events in self._paced(timed):
                yield encoded(events)
        elif self._fault:
            _raise_in_mid_run(self._fault)

    async def _paced(self, timed: Sequence[tuple[float, Event]]) -> AsyncGenerator[list[Event], None]:
        began = monotonic_clock()
        while timed:
            passed = (monotonic_clock() - began) * self._cloud.speed
            due = [event for at, event in timed if at <= passed]
            timed = timed[len(due) :]
            if due:
                yield due
            await asyncio.sleep(LOOK_SECONDS)

    def _recorded(self, experiment: str, key: str) -> ExperimentResult:
        """One contender's part of the newest recording."""
        for entry in self._cloud.library.entries(experiment):
            result = self._cloud.library.load(entry.id)
            rows = tuple(row for row in result.engines if row.name == key)
            if rows:
                note = (
                    f"Rehearsal: a recording of {result.started[:10]} ({result.model}, {result.hardware['words']}), "
                    "played as if it came from Modal. Nothing was measured or paid now; costs are what the time would "
                    "have cost."
                )
                return replace(
                    result,
                    engines=rows,
                    requests=tuple(row for row in result.requests if row.engine == key),
                    trials=tuple(row for row in result.trials if row.engine == key),
                    labels=(note, *result.labels),
                )
        raise EngineError("The recordings have no run with these settings: a rehearsal can only replay what is there.")


def _raise_at_start(fault: str) -> None:
    from modal import exception

    match fault:
        case "no-token":
            raise exception.AuthError("Token missing. Could not authenticate client.")
        case "wrong-token":
            raise exception.AuthError("Token ID is malformed or was revoked.")
        case "not-deployed":
            raise exception.NotFoundError("Lookup failed for Cls 'VllmEngine' from the app: App not found.")
        case "quota":
            raise exception.ResourceExhaustedError("GPU limit of 10 reached for this workspace.")
        case "image-build":
            raise exception.RemoteError("Image build for im-123 failed. See build logs for more details.")
        case "spending-limit":
            raise exception.PermissionDeniedError("Workspace has reached its spend limit.")


def _raise_in_mid_run(fault: str) -> None:
    from modal import exception

    match fault:
        case "out-of-memory":
            raise exception.RemoteError("Container was killed: out of memory (exit code 137).")
        case "time-out":
            raise exception.FunctionTimeoutError("Task's current input hit its timeout of 3600s")
        case "network":
            raise exception.ConnectionError("Deadline exceeded")
        case _:
            raise EngineError(f"There is no rehearsal of a failure called {fault!r}.")
