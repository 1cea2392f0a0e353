"""The `local` host: engine servers that the app starts on this machine, and the state of each for the page to show."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engines.bandwidth import Bandwidth, memory_bandwidth
from engines.base import Engine, EngineConfig, EngineError, EngineStopped
from engines.clock import monotonic_clock
from engines.environments import Environment, cache_folder
from engines.hardware import GIB, Hardware, this_machine
from engines.load import SILENCE_SECONDS
from engines.model_shape import ModelShape, has_prediction_head, has_random_weights, read_shape
from engines.openai_stream import Endpoint
from engines.server import PhaseTime, Server, free_port

Light = Literal["down", "installing", "starting", "ready", "busy", "failed"]
READY_LIMIT_SECONDS = 900.0  # a large model's first start compiles and captures for minutes
PAGE_GRACE_SECONDS = 45.0  # a reload closes the page and opens it again
TELL_EVERY_SECONDS = 5.0
SETTLE_LIMIT_SECONDS = 5.0
SETTLE_LOOK_SECONDS = 0.2
QUIET_SHARE_OF_CORE = 0.15
FIRST_PAGE_SECONDS = 900.0  # nobody came after the start of the app
# How engines share one GPU: what each takes beside weights and cache, which share of the memory all may take together,
# and which cache for keys and values is large enough for any load here and too small to serve it.
ENGINE_GIB, SHARED_SHARE, LARGEST_CACHE_GIB, SMALLEST_CACHE_GIB = 4.0, 0.92, 16.0, 1.0
TOGETHER_LABEL = (
    "The engines shared the GPU's memory and took turns: while one was measured, the others were loaded and idle, and "
    "each had a cache of fixed size."
)

log = logging.getLogger("bakeoff")


@dataclass(frozen=True, slots=True)
class Status:
    """What one engine is doing. `since` is the clock's reading when `light` or `phase` last changed."""

    light: Light = "down"
    phase: str = ""
    since: float = 0.0
    error: str = ""
    log_tail: str = ""
    phases: tuple[PhaseTime, ...] = ()
    version: str | None = None  # of the engine, once its environment is there
    install_seconds: float | None = None  # None where nothing had to be installed

    def elapsed(self) -> float:
        return monotonic_clock() - self.since

    @property
    def start_seconds(self) -> float | None:
        return sum(phase.seconds for phase in self.phases) if self.phases else None


@dataclass(frozen=True, slots=True)
class ServedElsewhere:
    """All that is known of how somebody else's server serves: where, of what kind it is, and which model was asked."""

    url: str
    preset: str
    model: str


@dataclass(frozen=True, slots=True)
class Serving:
    """An engine that answers: where, and everything a result must say about it.

    `network_seconds`: there and back to a server that is not on this machine or may not be; None where it is ours.
    """

    endpoint: Endpoint
    config: EngineConfig | ServedElsewhere
    command: str
    version: str | None
    installed: dict[str, str]
    phases: tuple[PhaseTime, ...]
    caveat: str | None
    network_seconds: float | None = None
    silence_seconds: float = SILENCE_SECONDS  # without a byte of an answer, after which it has failed


class _Slot:
    """One engine's place on the host. `gate` lets one thread at a time change its server."""

    def __init__(self, engine: Engine, gate: threading.RLock) -> None:
        self.engine = engine
        self.gate = gate
        self.requests = 0  # with the engine right now
        self.status = Status(since=monotonic_clock())
        self.server: Server | None = None
        self.environment: Environment | None = None
        self.told = 0.0  # when the terminal last heard of it


class LocalHost:
    """Installs, starts and stops engines on this machine.

    On a CPU all engines stay resident and take turns; on one GPU only one at a time fits (`resident_together`), unless
    they are told to share it (`together`). Raises EngineError where they do not fit.
    """

    name = "local"
    label = "this machine"

    def __init__(
        self,
        engines: Sequence[Engine],
        model: str,
        model_label: str = "",
        model_note: str = "",
        draft_model: str | None = None,
        cache: Path | None = None,
        hardware: Hardware | None = None,
        port: int | None = None,
        page_grace_seconds: float = PAGE_GRACE_SECONDS,
        first_page_seconds: float = FIRST_PAGE_SECONDS,
        tensor_parallel: int = 1,
        replicas: int = 1,
        can_sleep: bool = False,
        silence_seconds: float = SILENCE_SECONDS,
        together: bool = False,
    ) -> None:
        self.engines = tuple(engines)
        self.model = model
        self.model_label = model_label or model
        self.model_note = model_note
        self.draft_model = draft_model
        self.cache = cache or cache_folder()
        self.hardware = hardware or this_machine()
        self.resident_together = together or self.hardware.device == "cpu"
        self.random_weights = has_random_weights(model)
        self.said: tuple[str, ...] = ()
        self._cache_gib: float | None = None
        if together and self.hardware.device == "cuda":
            self._cache_gib = shared_cache_gib(self.hardware, read_shape(model), len(self.engines))
            self.said = (TOGETHER_LABEL,)
        self.tensor_parallel, self.replicas, self._can_sleep = tensor_parallel, replicas, can_sleep
        self.silence_seconds = silence_seconds
        self._fixed_port = port
        # Where only one engine fits, one gate for all: an engine that is stopped for another cannot be starting too.
        shared = threading.RLock()
        self._slots = {
            engine.name: _Slot(engine, threading.RLock() if self.resident_together else shared) for engine in engines
        }
        self._install_turn = threading.Lock()  # two installations at once only slow each other down
        self._counting = threading.Lock()
        self._closing = threading.Event()
        self._pages: set[str] = set()
        self._pages_changed = threading.Condition()
        self._users = 0  # runs under way
        self._page_grace_seconds = page_grace_seconds
        self._first_page_seconds = first_page_seconds
        self._wanted = False

    # What the page reads

    @property
    def hardware_words(self) -> str:
        return self.hardware.words

    def status(self, name: str) -> Status:
        return self._slots[name].status

    def statuses(self) -> dict[str, Status]:
        return {name: slot.status for name, slot in self._slots.items()}

    def config(self, name: str) -> EngineConfig:
        """The plain configuration: no prefix cache, no speculation.

        On a CPU one core is left to the server, the load generator and the page, as vLLM does by itself; so all
        engines compute with the same number of threads.
        """
        threads = self._cpu_threads if self.hardware.device == "cpu" else None
        return EngineConfig(
            model=self.model,
            device=self.hardware.device,
            cpu_threads=threads,
            tensor_parallel=self.tensor_parallel,
            replicas=self.replicas,
            can_sleep=self._can_sleep,
            random_weights=self.random_weights,
            cache_gib=self._cache_gib,
        )

    @property
    def _cpu_threads(self) -> int:
        return max(1, self.hardware.cores - 1)

    def model_shape(self) -> ModelShape | None:
        """None before the model is on this machine's disk."""
        return read_shape(self.model)

    def has_prediction_head(self) -> bool:
        return has_prediction_head(self.model)

    def memory_bandwidth(self, shape: ModelShape) -> Bandwidth | None:
        """As seen by as many threads as the engines compute with, reading as much as one decode step does.

        GPUs that compute a token together read at the same time. None with several copies of the model: how its users
        are spread over them is the engine's business.
        """
        if self.replicas > 1:
            return None
        one = memory_bandwidth(self.hardware, round(shape.step_bytes(1, 0)), self._cpu_threads)
        if one is None or self.tensor_parallel == 1 or not self.hardware.gpu:
            return one
        return Bandwidth(self.tensor_parallel * one.bytes_per_second, f"{self.tensor_parallel} x {one.source}")

    # Bringing engines up and down

    def open(self) -> None:
        """Install every engine behind the page, and start those that can be resident together. Returns at once."""
        self._wanted = True
        threading.Thread(target=self._bring_up_all, name="bring up", daemon=True).start()

    def watch_pages(self) -> None:
        """Stop the engines when nobody has the page open any more; start them again for the next visitor."""
        threading.Thread(target=self._watch_pages, name="page watch", daemon=True).start()

    def page_opened(self, page: str) -> None:
        with self._pages_changed:
            self._pages.add(page)
            self._pages_changed.notify()
            wanted, self._wanted = self._wanted, True
        if not wanted and not self._closing.is_set():
            self.open()

    def page_closed(self, page: str) -> None:
        with self._pages_changed:
            self._pages.discard(page)
            self._pages_changed.notify()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by a run: engines are not stopped for want of a page meanwhile."""
        with self._pages_changed:
            self._users += 1
        try:
            yield
        finally:
            with self._pages_changed:
                self._users -= 1
                self._pages_changed.notify()

    def ready(self, name: str, config: EngineConfig | None = None) -> Serving:
        """The engine serving under `config`: installed, started or restarted as needed. Blocks; raises EngineError."""
        slot = self._slots[name]
        config = config or self.config(name)
        if not self.resident_together:
            for other, occupied in self._slots.items():
                if other != name and (server := occupied.server) is not None:
                    server.stop()  # one that still starts ends its wait, and the gate opens
        with slot.gate:
            if self._closing.is_set():
                raise EngineError("The app is closing.")
            server = slot.server
            same = server is not None and replace(server.config, port=config.port) == config
            if server is None or not same or not server.running():
                if not self.resident_together:
                    self._stop_others(name)
                server = self._start(slot, config)
            environment = slot.environment
            assert environment is not None
            return Serving(
                endpoint=server.endpoint,
                config=server.config,
                command=server.shown_command,
                version=environment.engine_version(),
                installed=environment.installed() if slot.engine.requirements else {},
                phases=tuple(server.phases),
                caveat=slot.engine.caveat(server.config),
                silence_seconds=self.silence_seconds,
            )

    @contextlib.contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """Shows the engine as busy while a request of ours is with it."""
        slot = self._slots[name]
        with self._counting:
            slot.requests += 1
            if slot.status.light == "ready":
                self._show(slot, light="busy")
        try:
            yield
        finally:
            with self._counting:
                slot.requests -= 1
                if slot.status.light == "busy" and not slot.requests:
                    self._show(slot, light="ready")

    def settle(self, name: str) -> bool:
        """Wait until the other engines leave the processor alone; False when they did not within the limit.

        An engine may keep a core spinning after its last request (vLLM's worker process did so for a second), which
        on two cores halves the speed of whichever engine comes next.
        """
        others = [slot for other, slot in self._slots.items() if other != name]
        deadline = monotonic_clock() + SETTLE_LIMIT_SECONDS
        while True:
            servers = [server for slot in others if (server := slot.server) is not None]
            before, began = sum(server.processor_seconds() for server in servers), monotonic_clock()
            if not servers or self._closing.wait(SETTLE_LOOK_SECONDS):
                return True
            used = sum(server.processor_seconds() for server in servers) - before
            if used < QUIET_SHARE_OF_CORE * (monotonic_clock() - began):
                return True
            if monotonic_clock() > deadline:
                return False

    def stop_engine(self, name: str) -> None:
        slot = self._slots[name]
        server = slot.server
        if server is not None:
            server.stop()  # also ends a wait for its readiness, so that the gate opens
        with slot.gate:
            if server is not None and slot.server not in (server, None):
                return  # it was started anew meanwhile, for somebody who wants it
            if slot.server is not None:
                slot.server.stop()
                slot.server = None
            if slot.status.light != "failed":
                self._show(slot, light="down", phase="")

    def close(self) -> None:
        """Stop everything; returns when no process of ours is left."""
        self._closing.set()
        with self._pages_changed:
            self._pages_changed.notify()
        stoppers = [threading.Thread(target=self.stop_engine, args=(name,)) for name in self._slots]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()

    # Inside

    def _bring_up_all(self) -> None:
        """Install one engine after the other, and start each as soon as it is there, while the next installs.

        In the background an error belongs in the lane, where it has been put, and nowhere else.
        """
        for slot in self._slots.values():
            if slot.status.light == "down":
                self._show(slot, phase="waiting for its turn")
        for name, slot in self._slots.items():
            with contextlib.suppress(EngineError):
                with slot.gate, self._failures_shown(slot):
                    self._install(slot)
                    if not self.resident_together:
                        self._show(slot, light="down", phase="installed; starts when it is its turn")
                if self.resident_together:
                    threading.Thread(target=self._start_quietly, args=(name,), daemon=True).start()

    def _start_quietly(self, name: str) -> None:
        with contextlib.suppress(EngineError):
            self.ready(name)

    def _start(self, slot: _Slot, config: EngineConfig) -> Server:
        engine = slot.engine
        with self._failures_shown(slot):
            if (old := slot.server) is not None:
                old.stop()
                slot.server = None
            config = replace(config, port=self._fixed_port or free_port())
            engine.serve_command(config)  # what it cannot do is said before minutes of installing
            self._install(slot)
            assert slot.environment is not None
            version = slot.environment.engine_version()
            self._show(slot, light="starting", phase="importing", phases=(), version=version)
            server = slot.server = Server(
                engine,
                config,
                slot.environment,
                self.cache / "logs" / f"{engine.name}-{os.getpid()}.log",
                on_phase=lambda phase: self._phase(slot, phase),
                on_death=lambda error: self._died(slot, error),
            )
            if self._closing.is_set():  # it may have looked for a server just before there was one
                server.stop()
            try:
                server.wait_until_ready(READY_LIMIT_SECONDS)
            except EngineError as error:
                slot.server = None
                if names_missing_package(error):
                    slot.environment.discard()  # a broken installation: the next attempt makes it again
                raise
            self._show(slot, light="ready", phase="", phases=tuple(server.phases))
            return server

    def _install(self, slot: _Slot) -> None:
        slot.environment = slot.environment or Environment(slot.engine, self.hardware.device, self.cache)
        if slot.environment.problem() is None:
            return
        self._show(slot, light="installing", phase="waiting for its turn", install_seconds=None)
        with self._install_turn:
            began = monotonic_clock()
            slot.environment.ensure(lambda message: self._show(slot, phase=message), self._closing)
            self._show(slot, install_seconds=monotonic_clock() - began)

    @contextlib.contextmanager
    def _failures_shown(self, slot: _Slot) -> Iterator[None]:
        try:
            yield
        except EngineStopped:
            self._show(slot, light="down", phase="")
            raise
        except EngineError as error:
            if not self._closing.is_set():
                self._show(slot, light="failed", phase="", error=error.message, log_tail=error.log_tail)
            raise

    def _phase(self, slot: _Slot, phase: str) -> None:
        if phase != "ready":  # the light says that
            self._show(slot, phase=phase, phases=tuple(slot.server.phases) if slot.server else ())

    def _died(self, slot: _Slot, error: EngineError) -> None:
        slot.server = None
        if not self._closing.is_set():
            self._show(slot, light="failed", phase="", error=error.message, log_tail=error.log_tail)

    def _stop_others(self, name: str) -> None:
        for other in self._slots:
            if other != name and self._slots[other].server is not None:
                self.stop_engine(other)

    def _show(self, slot: _Slot, **changes: object) -> None:
        before = slot.status
        if changes.get("light", before.light) != "failed":
            changes = {"error": "", "log_tail": "", **changes}
        after = replace(before, **changes)  # type: ignore[arg-type]
        if (after.light, after.phase) != (before.light, before.phase):
            # While it installs or starts, one stopwatch runs over all of its phases.
            if after.light != before.light:
                after = replace(after, since=monotonic_clock())
            self._tell(slot, before, after)
        slot.status = after

    def _tell(self, slot: _Slot, before: Status, after: Status) -> None:
        """The same story on the terminal, without the busy lights and with a download's progress now and then."""
        if "busy" in (before.light, after.light) and after.light != "failed":
            return
        if after.light == before.light == "installing" and monotonic_clock() - slot.told < TELL_EVERY_SECONDS:
            return
        slot.told = monotonic_clock()
        words = ": ".join(filter(None, (after.light, after.phase, after.error)))
        log.info("%s: %s", slot.engine.label, words)
        if after.log_tail and after.light == "failed":
            log.info("end of its log:\n%s", after.log_tail)

    def _watch_pages(self) -> None:
        limit = self._first_page_seconds
        while not self._closing.is_set():
            with self._pages_changed:
                needed = bool(self._pages or self._users)
                if needed:
                    limit = self._page_grace_seconds
                    self._pages_changed.wait()
                    continue
                changed = self._pages_changed.wait(timeout=limit)
                leave = not changed and self._wanted and not self._closing.is_set()
                if leave:
                    self._wanted = False
            if leave:
                log.info("nobody has the page open: stopping the engines")
                for name in self._slots:
                    if not self._wanted:  # else somebody has come meanwhile
                        self.stop_engine(name)


def shared_cache_gib(hardware: Hardware, shape: ModelShape | None, engines: int) -> float:
    """The cache of each of so many engines that share one GPU, in GiB. Raises EngineError where that is too little."""
    if hardware.gpu_memory_gib is None or shape is None:
        missing = "how much memory the GPU has" if hardware.gpu_memory_gib is None else "how large the model is"
        raise EngineError(f"Engines can share the GPU only where it is known {missing}: let them take turns.")
    weights = (shape.weight_bytes + shape.expert_bytes) / GIB
    left = SHARED_SHARE * hardware.gpu_memory_gib / engines - weights - ENGINE_GIB
    if left < SMALLEST_CACHE_GIB:
        raise EngineError(
            f"{engines} engines do not fit on the GPU together: each needs {weights:.0f} GiB for the weights and about "
            f"{ENGINE_GIB + SMALLEST_CACHE_GIB:.0f} GiB more, and there are {hardware.gpu_memory_gib:.0f} GiB. "
            "Let them take turns."
        )
    return round(min(left, LARGEST_CACHE_GIB), 1)


def names_missing_package(error: EngineError) -> bool:
    """Whether the engine died of a package that is missing or broken in its environment."""
    # Not any ImportError: where a driver's library is absent, installing again would not help.
    return "ModuleNotFoundError" in error.message or "ImportError: cannot import name" in error.message
