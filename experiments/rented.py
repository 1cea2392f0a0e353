"""A run on rented machines: what can be rented, and a whole experiment run in containers, one per contender.

Each contender runs in a container of its own, next to its engine, with the same `experiments.run`; what comes back is
stamped already. Engines run at the same time, for they share nothing; variants of one engine follow each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from contextlib import AbstractContextManager, aclosing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from demo_model.bundled import default_model, model_label, model_note
from engines.bandwidth import Bandwidth
from engines.base import EngineConfig, EngineError
from engines.clock import monotonic_clock
from engines.cloud import GPU_CHOICES, RESTARTED, Container, Rates, Rental, Stage
from engines.gpus import Price
from engines.hardware import Hardware
from engines.local import Serving, Status
from engines.model_shape import ModelShape
from engines.rented import RentedHost
from engines.server import PhaseTime
from engines.spending import Limits, Meter, Spent, dollars
from experiments.base import (
    Contender,
    Emit,
    EngineFailed,
    EngineReady,
    Event,
    Experiment,
    Plan,
    PlanError,
    RequestEnded,
    RunEnded,
    Setting,
    Spending,
    TrialEnded,
    TrialStarted,
    check_number,
    check_whole,
)
from experiments.result import EngineRow, ExperimentResult, RequestRow, TrialRow, new_id
from experiments.run import row_of, takes_part
from experiments.wire import BUNDLED, Order, changes_to_json, decoded, order_to_json

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_GPUS = 8
MOST_KEEP_SECONDS = 1200
LEAVING_SECONDS = 5.0  # that a container which was let go is counted for
LOOK_SECONDS = 0.5
BUDGET_WORDS = "Stopped at its budget of"
SNAPSHOT_LABEL = "The engines were started from a picture of their memory; their start says nothing of a plain one."


@dataclass(frozen=True, slots=True)
class RentedModel:
    """A model as it is offered. `head`: it can guess its own next tokens."""

    id: str
    words: str
    head: bool = False


MODELS = (
    RentedModel("Qwen/Qwen3.5-4B", "4 B parameters", head=True),
    RentedModel("google/gemma-4-26B-A4B-it", "26 B parameters, of which 4 B work on each token"),
    RentedModel(BUNDLED, "the small model of this project: starts in seconds, knows one subject"),
)
# What the published runs used: (GPU, model) by the experiment's name, else the first.
SUGGESTED = {"": ("L4", MODELS[0].id), "concurrency": ("H100!", MODELS[1].id)}


@dataclass(frozen=True, slots=True)
class Rent:
    """What to rent for a run. Raises PlanError for what cannot be rented. `budget`: $; None: the host's own limit."""

    model: str
    gpu: str = "L4"
    gpu_count: int = 1
    replicas: int = 1
    keep_seconds: int = 0
    budget: float | None = None
    snapshot: bool = False

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise PlanError("model", "Name a model: its id on the model hub, such as Qwen/Qwen3.5-4B.")
        if self.model.startswith(("/", ".", "~")):
            raise PlanError("model", "A rented machine cannot read folders of this one: name a model on the model hub.")
        choice = next((one for one in GPU_CHOICES if one.exactly == self.gpu), None)
        if choice is None:
            raise PlanError("gpu", f"There is no GPU called {self.gpu!r} to rent.")
        check_whole("gpu_count", "GPUs that share the work", self.gpu_count, 1, MOST_GPUS)
        check_whole("replicas", "Copies of the model", self.replicas, 1, MOST_GPUS)
        if self.gpu_count * self.replicas > choice.most:
            raise PlanError(
                "replicas", f"A container has at most {choice.most} GPUs of this kind: choose fewer copies or GPUs."
            )
        check_whole("keep_seconds", "Keep idle containers", self.keep_seconds, 0, MOST_KEEP_SECONDS)
        if self.budget is not None:
            check_number("budget", "Budget", self.budget, 0.01, 1000)


def rent_settings(experiment: str, host: RentedHost) -> tuple[Setting, ...]:
    """What a visitor chooses beside the experiment's own settings, with the values that suit it."""
    gpu, model = SUGGESTED.get(experiment, SUGGESTED[""])
    listed = "; ".join(f"{one.id} ({one.words})" for one in MODELS)
    return (
        Setting("model", "line", "Model", f"Its id on the model hub. Tried: {listed}.", host.model or model),
        Setting(
            "gpu",
            "choice",
            "GPU of each engine",
            "Every engine gets one of its own, of exactly this kind.",
            gpu,
            choices={choice.name: choice.exactly for choice in GPU_CHOICES},
        ),
        Setting(
            "gpu_count",
            "whole",
            "GPUs that share the work",
            "Tensor parallelism: GPUs that compute each token together.",
            1,
            1,
            MOST_GPUS,
            flag="gpus",
        ),
        Setting(
            "replicas",
            "whole",
            "Copies of the model",
            "Data parallelism: copies that share the users, each on GPUs of its own.",
            1,
            1,
            MOST_GPUS,
        ),
        Setting(
            "keep_seconds",
            "whole",
            "Keep idle containers, seconds",
            "0 lets them go at once. Kept ones start the next run faster, and cost as much as working ones.",
            0,
            0,
            MOST_KEEP_SECONDS,
            10,
        ),
        Setting(
            "budget",
            "number",
            "Budget of this run, $",
            "The run stops cleanly when it is spent. Left empty: the page's own limit"
            + (f", ${host.limits.per_run:,.2f}." if host.limits.per_run is not None else ", of which there is none."),
            None,
            0,
            1000,
            0.01,
        ),
        Setting(
            "snapshot",
            "switch",
            "Start from a snapshot",
            "Engines wake from a picture of their memory: a faster start, in alpha at Modal; not for scored runs.",
            False,
        ),
    )


def read_rent(experiment: str, host: RentedHost, values: dict[str, Any]) -> Rent:
    """What was typed or chosen; raises PlanError."""
    settings = rent_settings(experiment, host)
    rent = Rent(**{one.name: one.read(values.get(one.name, one.default)) for one in settings})
    return replace(rent, model=rent.model.strip())


class RentedMachine:
    """The host of one run: what its contenders run on, before a container says more."""

    said: tuple[str, ...] = ()

    def __init__(self, host: RentedHost, rent: Rent, visitor: str = "") -> None:
        self.rented_from, self.rent, self.visitor = host, rent, visitor
        self.name, self.label = host.name, host.cloud.label
        self.model = rent.model
        bundled = rent.model == BUNDLED
        self.model_label = model_label(str(default_model())) if bundled else rent.model
        self.model_note = model_note(str(default_model())) if bundled else ""
        self.draft_model: str | None = BUNDLED if bundled else None
        self.engines = host.engines
        machine = host.cloud.machine
        words = rent.gpu.rstrip("!")
        count = rent.gpu_count * rent.replicas
        self.hardware = Hardware("rented", round(machine.cores), machine.gibibytes, words, gpu_count=count)
        self.resident_together = True

    def config(self, name: str) -> EngineConfig:
        rent = self.rent
        return EngineConfig(
            self.model,
            device="cuda",
            tensor_parallel=rent.gpu_count,
            replicas=rent.replicas,
            can_sleep=rent.snapshot,
        )

    def rental(self, contender: Contender) -> Rental:
        """The containers of one contender: nothing that differs between two contenders may be missing here."""
        rent = self.rent
        changes = {**contender.changes, "tensor_parallel": rent.gpu_count, "replicas": rent.replicas}
        return Rental(
            contender.engine.name,
            rent.model,
            self.draft_model or "",
            changes_to_json(changes),
            rent.gpu,
            rent.gpu_count * rent.replicas,
            rent.keep_seconds,
            rent.snapshot,
        )

    def has_prediction_head(self) -> bool:
        return any(one.head for one in MODELS if one.id == self.model)

    def model_shape(self) -> ModelShape | None:
        return None  # the containers know

    def memory_bandwidth(self, shape: ModelShape) -> Bandwidth | None:
        return None

    def in_use(self) -> AbstractContextManager[None]:
        return self.rented_from.in_use()

    # A machine of one's own for each contender has nothing to take turns for, and serves nobody from here.

    def ready(self, name: str, config: EngineConfig | None = None) -> Serving:
        raise EngineError(f"{name} runs in a container, and is measured there.")

    def settle(self, name: str) -> bool:
        return True

    def busy(self, name: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def machine_words(machine: RentedMachine) -> str:
    rent, size = machine.rent, machine.rented_from.cloud.machine
    return (
        f"{machine.label}: {rent.gpu_count * rent.replicas} x {rent.gpu.rstrip('!')}, {size.cores:g} cores and "
        f"{size.gibibytes:g} GiB for each engine"
    )


async def run_rented(experiment: Experiment, plan: Plan, machine: RentedMachine, emit: Emit) -> ExperimentResult:
    """Run `plan` in containers and return its result, also emitted last; as `experiments.run.run` does beside engines.

    It stops with what it has when the task is cancelled, the budget is spent, or the app closes.
    """
    host = machine.rented_from
    runner = _RentedRunner(experiment, plan, machine, emit)
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


class _RentedRunner:
    def __init__(self, experiment: Experiment, plan: Plan, machine: RentedMachine, emit: Emit) -> None:
        self.experiment, self.plan, self.machine, self.emit = experiment, plan, machine, emit
        self.host = machine.rented_from
        self.contenders = experiment.contenders(plan, machine)
        self.able = tuple(one for one in self.contenders if not one.unavailable)
        trials = experiment.trials(plan, self.able)
        self.total = sum(takes_part(trial, contender.key) for trial in trials for contender in self.able)
        self.done = 0
        self.started = datetime.now(UTC)
        self.origin = monotonic_clock()
        self.rows: dict[str, EngineRow] = {}
        self.requests: list[RequestRow] = []
        self.trial_rows: list[TrialRow] = []
        self.labels: list[str] = []
        self.ended: dict[str, ExperimentResult] = {}  # what each container said at its end
        self.stopped_early = False
        self.limit: float | None = None
        self.meter = Meter(None, 0, "")
        self.rates: Rates | None = None

    async def run(self) -> None:
        for contender in self.contenders:
            self.rows[contender.key] = row_of(contender)
            if contender.unavailable:
                self.emit(EngineFailed(self.rows[contender.key]))
        try:
            await self._price()
        except EngineError as error:
            self._all_failed(error)
            return
        visitor, granted = self.machine.visitor, self.limit
        work = asyncio.ensure_future(self._work())
        try:
            await self._watched(work)
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(asyncio.wait([work]))  # containers are let go before anybody is told
            spent = self.meter.spent
            self.host.ledger.settle(visitor, granted, spent.dollars or 0.0)
            self.emit(Spending(spent, self.limit))
            self.host.watch_leaving([self.machine.rental(one) for one in self.able])
        work.result() if not work.cancelled() else None  # a fault of our own is not swallowed

    async def _price(self) -> None:
        """What a container costs per second, and how much may be spent; raises EngineError when nothing may."""
        rent, cloud = self.machine.rent, self.host.cloud
        self.rates = await self.host.rates()
        gpus = rent.gpu_count * rent.replicas
        rate = self.rates.dollars_per_second(rent.gpu, gpus, cloud.machine.cores, cloud.machine.gibibytes)
        source = self.rates.source
        if self.plan.dollars_per_hour is not None:
            rate, source = self.plan.dollars_per_hour / 3600, "price as typed"
        limited = rent.budget is not None or self.host.limits != Limits(None, None, None)
        if rate is None and limited:
            raise EngineError(
                f"The price of the {rent.gpu.rstrip('!')} is not known, so a budget cannot be kept. Type its price per "
                "hour in the settings, or choose another GPU."
            )
        self.limit = self.host.ledger.reserve(self.machine.visitor, self.host.limits, rent.budget)
        self.meter = Meter(rate, gpus, source)

    def _all_failed(self, error: EngineError) -> None:
        for contender in self.able:  # beside the run only: the lights are everybody's, and nothing was rented
            row = self.rows[contender.key] = replace(self.rows[contender.key], error=error.message)
            self.emit(EngineFailed(row))

    async def _watched(self, work: asyncio.Future[None]) -> None:
        """Wait for the work, tell what it costs, and end it when the budget is spent or the app closes."""
        told: Spent | None = None
        while not work.done():
            await asyncio.wait([work], timeout=LOOK_SECONDS)
            spent = self.meter.spent
            if spent != told and spent.container_seconds:
                told = spent
                self.emit(Spending(spent, self.limit))
            if self.limit is not None and spent.dollars is not None and spent.dollars >= self.limit:
                self.stopped_early = True
                self.labels.append(f"{BUDGET_WORDS} {dollars(self.limit)}: what was measured until then is shown.")
                return
            if self.host.closing.is_set():
                self.stopped_early = True
                return

    async def _work(self) -> None:
        """Engines at the same time, variants of one engine one after the other."""
        by_engine: dict[str, list[Contender]] = {}
        for contender in self.able:
            by_engine.setdefault(contender.engine.name, []).append(contender)

        async def in_turn(mine: list[Contender]) -> None:
            for contender in mine:
                await self._contender(contender)

        async with asyncio.TaskGroup() as group:
            for mine in by_engine.values():
                group.create_task(in_turn(mine))

    async def _contender(self, contender: Contender) -> None:
        name, rental = contender.engine.name, self.machine.rental(contender)
        show = self.host.show
        show(name, "starting", "asking Modal" if self.host.name == "modal" else "asking")
        stages = _Stages(lambda phase, phases: show(name, "starting", phase, phases=phases))
        try:
            container = await self.host.cloud.start(rental, lambda stage: self._staged(contender, stages, stage))
            stages.end(container)
            self.meter.start(contender.key, stages.alive_seconds)
            await self._measured(contender, container, stages)
            if not self.rows[contender.key].error:
                show(name, "down", self._leaving_words)
        except EngineError as error:
            self._failed(contender, error)
        except asyncio.CancelledError:
            show(name, "down", "stopped; its container is let go")
            raise
        finally:
            self.meter.stop(contender.key, LEAVING_SECONDS + self.machine.rent.keep_seconds)

    @property
    def _leaving_words(self) -> str:
        keep = self.machine.rent.keep_seconds
        return f"its container is kept for {keep} s" if keep else "letting its container go"

    def _staged(self, contender: Contender, stages: _Stages, stage: Stage) -> None:
        stages.enter(stage)
        if stage == "starting the container":
            self.meter.start(contender.key)

    async def _measured(self, contender: Contender, container: Container, stages: _Stages) -> None:
        began = monotonic_clock() - self.origin
        order = Order(
            self.experiment.name,
            self.plan,
            self.able,
            contender.key,
            self._seconds_left(),
            leave=not self.machine.rent.keep_seconds,
        )
        async with aclosing(container.events(order_to_json(order))) as items:
            async for item in items:
                if item == RESTARTED:
                    self._began_anew(contender)
                    continue
                for event in decoded(item):
                    self._take(contender, container, stages, event, began)
        if contender.key not in self.ended and not self.rows[contender.key].error:
            raise EngineError("The container ended before it had finished. Run it again.")

    def _seconds_left(self) -> float | None:
        """After which a container stops by itself, should nobody be there to stop it: it cannot spend more alone."""
        rate = self.meter.dollars_per_second
        if self.limit is None or not rate:
            return None
        return max(1.0, (self.limit - (self.meter.spent.dollars or 0.0)) / rate)

    def _take(
        self, contender: Contender, container: Container, stages: _Stages, event: Event | Status, began: float
    ) -> None:
        """One event of a container, on its own clock, as part of the whole run."""
        key, name = contender.key, contender.engine.name
        match event:
            case Status():
                if event.light in ("installing", "starting"):
                    self.host.show(name, "starting", event.phase, phases=[*stages.phases, *event.phases])
                return
            case EngineReady(row):
                self.rows[key] = row = replace(
                    row,
                    start_phases={**stages.seconds, **row.start_phases} if stages.fresh(container) else {},
                    hardware=container.facts.hardware.words,
                    network_seconds=container.network_seconds,
                )
                self.host.show_version(name, row.version)
                phases = [PhaseTime(phase, seconds) for phase, seconds in row.start_phases.items()]
                self.host.show(name, "ready", phases=phases)
                event = EngineReady(row)
            case EngineFailed(row):
                self._failed(contender, EngineError(row.error or "It failed.", row.log_tail))
                return
            case TrialStarted():
                self.host.show(name, "busy", phases=self.host.status(name).phases)
                event = replace(event, of=self.total, done=self.done)
            case TrialEnded(row=ended):
                self.done += 1
                self.trial_rows.append(replace(ended, began=ended.began + began, ended=ended.ended + began))
                self.host.show(name, "ready", phases=self.host.status(name).phases)
                event = TrialEnded(self.trial_rows[-1])
            case RequestEnded(row=request):
                timeline = replace(request.timeline, sent=request.timeline.sent + began)
                planned = None if request.planned is None else request.planned + began
                self.requests.append(replace(request, timeline=timeline, planned=planned))
                event = RequestEnded(self.requests[-1])
            case RunEnded(result):
                self.ended[key] = result
                return
        self.emit(event)

    def _began_anew(self, contender: Contender) -> None:
        key = contender.key
        self.requests = [row for row in self.requests if row.engine != key]
        before = len(self.trial_rows)
        self.trial_rows = [row for row in self.trial_rows if row.engine != key]
        self.done -= before - len(self.trial_rows)
        title = self.rows[key].title
        self.labels.append(f"Modal took {title}'s container away in mid-run; it was measured anew on another one.")
        self.emit(EngineReady(self.rows[key]))

    def _failed(self, contender: Contender, error: EngineError) -> None:
        key = contender.key
        self.rows[key] = replace(self.rows[key], error=error.message, log_tail=error.log_tail)
        self.host.show(contender.engine.name, "failed", error=error.message, log_tail=error.log_tail)
        self.emit(EngineFailed(self.rows[key]))

    def result(self) -> ExperimentResult:
        machine = self.machine
        facts = next(iter(self.ended.values()), None)
        hardware = facts.hardware if facts else {**asdict(machine.hardware), "words": machine.hardware.words}
        rate = self.meter.dollars_per_second
        price = None if rate is None else Price(rate * 3600, f"{self.meter.source}, for one engine's container")
        return ExperimentResult(
            id=new_id(self.experiment.name, self.started),
            experiment=self.experiment.name,
            started=self.started.isoformat(timespec="seconds"),
            host=self.host.name,
            hardware=hardware,
            model=machine.model_label,
            model_note=machine.model_note,
            settings={**asdict(self.plan), "rent": asdict(machine.rent)},
            engines=tuple(self.rows[contender.key] for contender in self.contenders),
            requests=tuple(self.requests),
            trials=tuple(sorted(self.trial_rows, key=lambda row: row.began)),
            labels=self._labels(hardware),
            versions={"python": platform.python_version()},
            stopped_early=self.stopped_early,
            model_shape=facts.model_shape if facts else None,
            bandwidth=facts.bandwidth if facts else None,
            price=price,
            spent=self.meter.spent,
        )

    def _labels(self, hardware: dict[str, Any]) -> tuple[str, ...]:
        where = [f"Measured in containers on {machine_words(self.machine)}."] if self.host.cloud.measures else []
        labels = where + self.labels
        words = dict.fromkeys(row.hardware for row in self.rows.values() if row.hardware)
        if len(words) > 1:
            labels.append(f"The engines did not all get the same machine: {'; '.join(words)}.")
        if self.machine.rent.snapshot:
            labels.append(SNAPSHOT_LABEL)
        for ended in self.ended.values():
            labels += ended.labels
        return tuple(dict.fromkeys(labels))


class _Stages:
    """How long a container took until it answered, stage by stage, as far as can be told from here."""

    def __init__(self, show: Callable[[str, list[PhaseTime]], None]) -> None:
        self._show = show
        self._stage: str = ""
        self._began = self._asked = monotonic_clock()
        self.phases: list[PhaseTime] = []
        self.alive_seconds = 0.0  # of the container, as far as it lived for us

    @property
    def seconds(self) -> dict[str, float]:
        return {phase.name: round(phase.seconds, 3) for phase in self.phases}

    def enter(self, stage: Stage) -> None:
        if stage == self._stage:
            return
        now = monotonic_clock()
        if self._stage:
            self.phases.append(PhaseTime(self._stage, now - self._began))
        self._stage, self._began = stage, now
        self._show(stage, self.phases)

    def end(self, container: Container) -> None:
        """It answers, and says since when it lives and how long it took to load our code."""
        facts, now = container.facts, monotonic_clock()
        if facts.calls:  # it was there already
            self.phases = []
            return
        waited = sum(phase.seconds for phase in self.phases if phase.name == "waiting for a GPU")
        # A process that came back from a snapshot says that it is as old as that.
        self.alive_seconds = min(facts.alive_seconds, now - self._asked)
        # Before it lived, the cloud was busy with it; what this page saw of that may lag by a look.
        before = now - self._asked - self.alive_seconds
        waited = min(waited, before)
        self.phases = [
            PhaseTime("waiting for a GPU", waited),
            PhaseTime("starting the container", before - waited),
            PhaseTime("loading our code", min(facts.import_seconds, self.alive_seconds)),
        ]

    def fresh(self, container: Container) -> bool:
        return not container.facts.calls
