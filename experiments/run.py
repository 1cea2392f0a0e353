"""Runs a plan on a host and emits what happens. Runs beside the engines; draws and prints nothing."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import TypeVar

from engines.base import EngineError, Request
from engines.local import Serving
from engines.openai_stream import ChatClient, ChatStreamParser
from engines.timeline import Clock, monotonic_clock, record
from experiments.base import (
    Emit,
    EngineFailed,
    EngineReady,
    Experiment,
    Host,
    Plan,
    RequestEnded,
    RequestStarted,
    RunEnded,
    TokensArrived,
)
from experiments.result import EngineRow, ExperimentResult, RequestRow, new_id

T = TypeVar("T")
RACE_LABEL = "Race: the engines ran at the same time and slowed each other down; these are not speeds of their own."
SHARED_CORES_LABEL = "Measured on a CPU: engine, load generator and page share its cores."


async def run(
    experiment: Experiment, plan: Plan, host: Host, emit: Emit, clock: Clock = monotonic_clock
) -> ExperimentResult:
    """Run `plan` and return its result, also emitted last.

    An engine that cannot be started becomes a row with its error, and so does a failed request; the run goes on.
    When the task is cancelled, what was measured so far is emitted as a result that was stopped early.
    """
    runner = _Runner(experiment, plan, host, emit, clock)
    with host.in_use():
        try:
            await runner.run()
        except asyncio.CancelledError:
            runner.stopped_early = True
            emit(RunEnded(runner.result()))
            raise
    result = runner.result()
    emit(RunEnded(result))
    return result


class _Runner:
    def __init__(self, experiment: Experiment, plan: Plan, host: Host, emit: Emit, clock: Clock) -> None:
        self.experiment, self.plan, self.host, self.emit, self.clock = experiment, plan, host, emit, clock
        self.started = datetime.now(UTC)
        self.origin = clock()
        self.rows: dict[str, EngineRow] = {}
        self.requests: list[RequestRow] = []
        self.stopped_early = False
        self.restless = False  # an engine kept the processor busy while it was another's turn

    async def run(self) -> None:
        if self.host.resident_together:
            await self._run_group(self.plan.engines)
        else:  # one engine at a time fits: each starts, is measured whole, and makes room
            for name in self.plan.engines:
                await self._run_group((name,))

    async def _run_group(self, names: tuple[str, ...]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            readied = await asyncio.gather(*(self._ready(name) for name in names))
            clients = {}
            for name, serving in zip(names, readied, strict=True):
                if serving:
                    clients[name] = await stack.enter_async_context(ChatClient(serving.endpoint))
            for warmup, repeat in rounds(self.plan.warmups, self.plan.repeats):
                order = rotated(tuple(clients), 0 if warmup else repeat - 1)
                if self.plan.race:
                    await asyncio.gather(*(self._request(name, clients[name], warmup, repeat) for name in order))
                else:
                    for name in order:
                        await self._request(name, clients[name], warmup, repeat)

    async def _ready(self, name: str) -> Serving | None:
        engine = next(engine for engine in self.host.engines if engine.name == name)
        row = EngineRow(engine.name, engine.label, engine.colour)
        try:
            serving = await in_thread(lambda: self.host.ready(name, self.host.config(name)))
        except EngineError as error:
            self.rows[name] = replace(row, error=error.message, log_tail=error.log_tail)
            self.emit(EngineFailed(self.rows[name]))
            return None
        self.rows[name] = replace(
            row,
            version=serving.version,
            command=serving.command,
            config=asdict(serving.config),
            installed=serving.installed,
            start_phases=_summed(serving),
            caveat=serving.caveat,
        )
        self.emit(EngineReady(self.rows[name]))
        return serving

    async def _request(self, name: str, client: ChatClient, warmup: bool, repeat: int) -> None:
        plan = self.plan
        if not plan.race and not await in_thread(lambda: self.host.settle(name)):
            self.restless = True
        self.emit(RequestStarted(name, warmup, repeat, plan.warmups if warmup else plan.repeats))
        request = Request(plan.prompt, plan.max_tokens, plan.fixed_length, plan.temperature, plan.seed)
        with self.host.busy(name):
            timeline = await record(
                request,
                client.blocks,
                ChatStreamParser(),
                on_arrival=lambda arrival: self.emit(TokensArrived(name, arrival)),
                clock=self.clock,
                origin=self.origin,
            )
        row = RequestRow(name, repeat, warmup, timeline)
        self.requests.append(row)
        self.emit(RequestEnded(row))

    def result(self) -> ExperimentResult:
        return ExperimentResult(
            id=new_id(self.experiment.name, self.started),
            experiment=self.experiment.name,
            started=self.started.isoformat(timespec="seconds"),
            host=self.host.name,
            hardware={**asdict(self.host.hardware), "words": self.host.hardware.words},
            model=self.host.model_label,
            model_note=self.host.model_note,
            settings=asdict(self.plan),
            engines=tuple(self.rows[name] for name in self.plan.engines if name in self.rows),
            requests=tuple(self.requests),
            labels=self._labels(),
            versions={"python": platform.python_version(), "aiohttp": metadata.version("aiohttp")},
            stopped_early=self.stopped_early,
        )

    def _labels(self) -> tuple[str, ...]:
        labels = []
        if self.plan.race and len(self.plan.engines) > 1 and self.host.resident_together:
            labels.append(RACE_LABEL)
        if self.host.hardware.device == "cpu":
            labels.append(SHARED_CORES_LABEL)
        if self.restless:
            labels.append("Another engine kept the processor busy during some requests; those were slowed by it.")
        if self.host.model_note:
            labels.append(self.host.model_note)
        if any(row.timeline.token_source == "estimated" and row.timeline.arrivals for row in self.requests):
            labels.append("Some token counts are estimated as one per chunk: the engine reported none.")
        return tuple(labels)


def rounds(warmups: int, repeats: int) -> list[tuple[bool, int]]:
    """(is it a warm-up, which one counted from 1), in the order of the run."""
    return [(True, number) for number in range(1, warmups + 1)] + [(False, number) for number in range(1, repeats + 1)]


def rotated(names: tuple[str, ...], by: int) -> tuple[str, ...]:
    """Another engine goes first in each repeat, so that a drift of the machine hits all alike."""
    by = by % len(names) if names else 0
    return names[by:] + names[:by]


def _summed(serving: Serving) -> dict[str, float]:
    """Seconds per phase of the start-up; a phase that came twice counts once with its sum."""
    seconds: dict[str, float] = {}
    for phase in serving.phases:
        seconds[phase.name] = round(seconds.get(phase.name, 0.0) + phase.seconds, 3)
    return seconds


async def in_thread(function: Callable[[], T]) -> T:
    """Await a blocking call in a daemon thread, which neither cancelling nor closing the loop has to wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if future.done() else setter())

    def work() -> None:
        try:
            value = function()
        except BaseException as error:
            failure = error
            settle(lambda: future.set_exception(failure))
        else:
            settle(lambda: future.set_result(value))

    threading.Thread(target=work, daemon=True).start()
    return await future


class BackgroundRun:
    """A run on a thread and an event loop of its own, so that the page cannot slow what is measured.

    `events` grows while it runs; readers keep their own place in it. `finished` is set after the last event.
    `failure` holds an unexpected error, to be shown and not swallowed.
    """

    def __init__(self, experiment: Experiment, plan: Plan, host: Host) -> None:
        self.events: list[object] = []
        self.finished = threading.Event()
        self.failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[ExperimentResult] | None = None
        self._stop_asked = threading.Event()
        self._arguments = (experiment, plan, host, self.events.append)
        threading.Thread(target=self._work, name="run", daemon=True).start()

    def stop(self) -> None:
        """Ends the run; what was measured so far is kept."""
        self._stop_asked.set()
        if self._loop and self._task:
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._task.cancel)

    @property
    def result(self) -> ExperimentResult | None:
        last = self.events[-1] if self.events else None
        return last.result if isinstance(last, RunEnded) else None

    def _work(self) -> None:
        async def main() -> None:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.ensure_future(run(*self._arguments))
            if self._stop_asked.is_set():
                self._loop.call_soon(self._task.cancel)  # once it has begun: before, it could not end with a result
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

        try:
            asyncio.run(main())
        except BaseException as failure:
            self.failure = failure
        finally:
            self.finished.set()

    async def new_events(self, interval: float) -> AsyncIterator[list[object]]:
        """What has happened since the last time, at most once per `interval` seconds, until the run has ended."""
        seen = 0
        while True:
            done = self.finished.is_set()  # read first, so that no event can slip in between
            batch = self.events[seen:]
            seen += len(batch)
            if batch:
                yield batch
            if done:
                return
            await asyncio.sleep(interval)
