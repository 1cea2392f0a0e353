"""Runs a plan on a host and emits what happens. Runs beside the engines; draws and prints nothing."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from engines.bandwidth import Bandwidth
from engines.base import EngineError, Request, SpeculationCounters
from engines.client import EngineClient
from engines.clock import monotonic_clock
from engines.hardware import Hardware, hardware_words
from engines.load import Answered, GeneratorHealth, LoadGenerator
from engines.local import Serving
from engines.model_shape import ModelShape
from experiments.base import (
    Contender,
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
    Trial,
    TrialEnded,
    TrialStarted,
)
from experiments.limits import price_of
from experiments.result import EngineRow, ExperimentResult, RequestRow, TrialRow, engine_of, new_id

T = TypeVar("T")
Keep = Callable[[ExperimentResult], None]
KEEP_SECONDS = 15.0  # between two of them within one contender: writing a large result takes a second itself
RACE_LABEL = "Race: the engines ran at the same time and slowed each other down; these are not speeds of their own."
SIMULATED_LABEL = (
    "Simulated acceptance: the engines kept as many drafts as they were told to, whatever these were. The speed is "
    "what such an acceptance gives; no model has reached it here."
)
SHARED_CORES_LABEL = "Measured on a CPU: engine, load generator and page share its cores."


async def run(
    experiment: Experiment,
    plan: Plan,
    host: Host,
    emit: Emit,
    among: tuple[Contender, ...] = (),
    only: str = "",
    keep: Keep | None = None,
) -> ExperimentResult:
    """Run `plan` and return its result, also emitted last.

    `among`: all contenders, where they have been made out already; `only` the one with this key is run here.
    An engine that cannot be started becomes a row with its error, and so does a failed request; the run goes on.
    When the task is cancelled, what was measured so far is emitted as a result that was stopped early.
    `keep` is given what there is so far, under the id of the whole and as stopped early, after each contender or level
    that was measured: so that it is not lost when this process is killed.
    """
    runner = _Runner(experiment, plan, host, emit, among, only, keep)
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


@dataclass(frozen=True, slots=True)
class _Reached:
    """How a contender is reached: for load that is measured, and for what is asked of it in between."""

    load: LoadGenerator
    client: EngineClient


class _Runner:
    def __init__(
        self,
        experiment: Experiment,
        plan: Plan,
        host: Host,
        emit: Emit,
        among: tuple[Contender, ...] = (),
        only: str = "",
        keep: Keep | None = None,
    ) -> None:
        self.keep, self.kept = keep, monotonic_clock()
        self.experiment, self.plan, self.host, self.emit = experiment, plan, host, emit
        contenders = among or experiment.contenders(plan, host)
        able = tuple(contender for contender in contenders if not contender.unavailable)
        self.trials = experiment.trials(plan, able)
        self.contenders = tuple(one for one in contenders if only in ("", one.key))
        running = [one for one in able if only in ("", one.key)]
        self.total = sum(takes_part(trial, contender.key) for trial in self.trials for contender in running)
        self.done = 0
        self.started = datetime.now(UTC)
        self.id = new_id(experiment.name, self.started)
        self.origin = monotonic_clock()
        self.rows: dict[str, EngineRow] = {}
        self.requests: list[RequestRow] = []
        self.trial_rows: list[TrialRow] = []
        self.stopped_early = False
        self.model_shape: ModelShape | None = None
        self.bandwidth: Bandwidth | None = None
        self.restless = False  # an engine kept the processor busy while it was another's turn

    async def run(self) -> None:
        for contender in self.contenders:
            self.rows[contender.key] = row_of(contender)
            if contender.unavailable:
                self.emit(EngineFailed(self.rows[contender.key]))
        for block in blocks(self.contenders, self.host.resident_together):
            await self._run_block(block)
            await self._keep(at_least=0.0)

    async def _keep(self, at_least: float) -> None:
        """Hand on what there is, unless that was done less than `at_least` seconds ago. Nobody is timed then."""
        if self.keep is None or not self.requests or monotonic_clock() - self.kept < at_least:
            return
        keep, so_far = self.keep, replace(self.result(), stopped_early=True)
        await in_thread(lambda: keep(so_far))
        self.kept = monotonic_clock()

    async def _run_block(self, block: tuple[Contender, ...]) -> None:
        """Contenders that can be loaded at the same time: they take turns, trial by trial."""
        async with contextlib.AsyncExitStack() as stack:
            readied = await asyncio.gather(*(self._ready(contender) for contender in block))
            reached: dict[str, _Reached] = {}
            for contender, serving in zip(block, readied, strict=True):
                if serving:
                    load = await stack.enter_async_context(
                        LoadGenerator(serving.endpoint, self.origin, serving.silence_seconds)
                    )
                    client = await stack.enter_async_context(EngineClient(serving.endpoint))
                    reached[contender.key] = _Reached(load, client)
            if reached and self.bandwidth is None:
                await in_thread(self._learn_limits)
            measured = 0
            for trial in self.trials:
                order = rotated(tuple(reached), measured)
                measured += not trial.warmup
                order = tuple(key for key in order if takes_part(trial, key) and not self._too_long(trial, key))
                if self.plan.race:
                    fit = await asyncio.gather(*(self._survived(key, reached[key], trial) for key in order))
                else:
                    fit = [await self._survived(key, reached[key], trial) for key in order]
                for key in (key for key, survived in zip(order, fit, strict=True) if not survived):
                    del reached[key]
                await self._keep(KEEP_SECONDS)

    def _too_long(self, trial: Trial, key: str) -> bool:
        """Such a trial is passed over."""
        passed_over = self.experiment.too_long(self.plan, trial, key, self.requests)
        self.done += passed_over
        return passed_over

    async def _survived(self, key: str, reached: _Reached, trial: Trial) -> bool:
        """Whether the contender can go on after this trial. Its load generator's breakdown is no other contender's."""
        try:
            await self._trial(key, reached, trial)
        except EngineError as error:
            self._failed(key, error)
            return False
        return True

    def _failed(self, key: str, error: EngineError) -> None:
        self.rows[key] = replace(self.rows[key], error=error.message, log_tail=error.log_tail)
        self.emit(EngineFailed(self.rows[key]))

    async def _ready(self, contender: Contender) -> Serving | None:
        key, name = contender.key, contender.engine.name
        try:
            serving = await in_thread(lambda: self.host.ready(name, contender.config(self.host)))
        except EngineError as error:
            self._failed(key, error)
            return None
        self.rows[key] = replace(
            self.rows[key],
            version=serving.version,
            command=serving.command,
            config=asdict(serving.config),
            installed=serving.installed,
            start_phases=_summed(serving),
            caveat=serving.caveat,
            network_seconds=serving.network_seconds,
        )
        self.emit(EngineReady(self.rows[key]))
        return serving

    def _learn_limits(self) -> None:
        """Once the engines are loaded, because only then a model from the hub is on the disk."""
        self.model_shape = self.host.model_shape()
        self.bandwidth = self.host.memory_bandwidth(self.model_shape) if self.model_shape else None

    async def _trial(self, key: str, reached: _Reached, trial: Trial) -> None:
        if not self.plan.race and not await in_thread(lambda: self.host.settle(engine_of(key))):
            self.restless = True
        self.emit(TrialStarted(key, trial, self.total, self.done))
        emptied = await self._emptied(reached.client) if trial.empty_caches else None
        # Only where there is something to count: the engine makes its metrics' text just before it is timed.
        speculates = bool(self.rows[key].config.get("speculation"))
        before = await self._counters(reached.client) if speculates else None
        began = monotonic_clock() - self.origin
        with self.host.busy(engine_of(key)):
            rows, health = await self._requests(key, reached.load, trial)
        ended = monotonic_clock() - self.origin
        counted = _counted(before, await self._counters(reached.client) if speculates else None, rows)
        row = TrialRow(key, trial.group, trial.repeat, trial.warmup, began, ended, counted, emptied, health)
        self.trial_rows.append(row)
        self.done += 1
        self.emit(TrialEnded(row))

    async def _requests(self, key: str, load: LoadGenerator, trial: Trial) -> tuple[list[RequestRow], GeneratorHealth]:
        plan = self.plan
        rows: list[RequestRow] = []

        def ended(answered: Answered) -> None:
            row = RequestRow(
                key, trial.repeat, trial.warmup, answered.timeline, trial.group, answered.index, answered.planned
            )
            rows.append(row)
            self.requests.append(row)
            self.emit(RequestEnded(row))

        requests = [
            (
                index * trial.spacing,
                Request(prompt, trial.max_tokens or plan.max_tokens, plan.fixed_length, plan.temperature, plan.seed),
            )
            for index, prompt in enumerate(trial.prompts)
        ]
        _, health = await load.answers(
            requests,
            trial.sustained_seconds,
            on_sent=lambda index: self.emit(RequestStarted(key, index)),
            on_arrival=lambda index, arrival: self.emit(TokensArrived(key, arrival, index)),
            on_ended=ended,
        )
        return rows, health

    async def _emptied(self, client: EngineClient) -> bool:
        try:
            return await client.empty_caches()
        except EngineError:
            return False  # the requests that follow fail with their own reason, or show cached tokens

    async def _counters(self, client: EngineClient) -> SpeculationCounters | None:
        try:
            return await client.counters()
        except EngineError:
            return None  # unknown, and shown as a dash; what ails the engine shows in its requests

    def result(self) -> ExperimentResult:
        return ExperimentResult(
            id=self.id,
            experiment=self.experiment.name,
            started=self.started.isoformat(timespec="seconds"),
            host=self.host.name,
            hardware=hardware_facts(self.host.hardware),
            model=self.host.model_label,
            model_note=self.host.model_note,
            settings=asdict(self.plan),
            engines=tuple(self.rows[contender.key] for contender in self.contenders if contender.key in self.rows),
            requests=tuple(self.requests),
            trials=tuple(self.trial_rows),
            labels=self._labels(),
            versions={"python": platform.python_version()},
            stopped_early=self.stopped_early,
            model_shape=self.model_shape,
            bandwidth=self.bandwidth,
            price=price_of(self.plan, self.host.hardware),
        )

    def _labels(self) -> tuple[str, ...]:
        labels = list(self.host.said)
        if self.plan.race and len(self.plan.engines) > 1 and self.host.resident_together and self.host.hardware:
            labels.append(RACE_LABEL)
        if self.host.hardware and self.host.hardware.device == "cpu":
            labels.append(SHARED_CORES_LABEL)
        if self.restless:
            labels.append("Another engine kept the processor busy during some requests; those were slowed by it.")
        if any((row.config.get("speculation") or {}).get("simulated_length") for row in self.rows.values()):
            labels.append(SIMULATED_LABEL)
        if self.host.model_note:
            labels.append(self.host.model_note)
        if any(row.timeline.token_source == "estimated" and row.timeline.arrivals for row in self.requests):
            labels.append("Some token counts are estimated as one per chunk: the engine reported none.")
        return tuple(labels)


def blocks(contenders: tuple[Contender, ...], resident_together: bool) -> list[tuple[Contender, ...]]:
    """Contenders that are loaded at the same time: all engines where they fit, but no engine in two variants."""
    left = [contender for contender in contenders if not contender.unavailable]
    if not resident_together:
        names = [contender.engine.name for contender in left]
        return [(contender,) for contender in sorted(left, key=lambda one: names.index(one.engine.name))]
    found: list[tuple[Contender, ...]] = []
    while left:
        first = {contender.engine.name: contender for contender in reversed(left)}
        block = tuple(contender for contender in left if first[contender.engine.name] is contender)
        found.append(block)
        left = [contender for contender in left if contender not in block]
    return found


def hardware_facts(hardware: Hardware | None) -> dict[str, Any]:
    """As a result holds them; of hardware that nobody here can know, these words alone."""
    return {**(asdict(hardware) if hardware else {}), "words": hardware_words(hardware)}


def takes_part(trial: Trial, key: str) -> bool:
    return not trial.only or key in trial.only


def rotated(names: tuple[str, ...], by: int) -> tuple[str, ...]:
    """Another engine goes first in each measured round, so that a drift of the machine hits all alike."""
    by = by % len(names) if names else 0
    return names[by:] + names[:by]


def row_of(contender: Contender) -> EngineRow:
    engine = contender.engine
    return EngineRow(
        contender.key,
        engine.label,
        engine.colour,
        contender.variant,
        contender.compared_with,
        contender.unavailable or None,
        as_it_is=engine.as_it_is,
    )


def _counted(
    before: SpeculationCounters | None, after: SpeculationCounters | None, rows: list[RequestRow]
) -> SpeculationCounters | None:
    """From the server's counters before and after, else from the requests' own reports."""
    if before is not None and after is not None:
        return after.since(before)
    reports = [row.timeline.usage.speculation for row in rows]
    total = SpeculationCounters()
    for report in reports:
        total = total.plus(report) if report else total
    return total if any(reports) else None


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
