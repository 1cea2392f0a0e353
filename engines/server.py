"""One engine's server process: start, phases read from its log, health, the reason of its death, stop."""

from __future__ import annotations

import contextlib
import http.client
import re
import shlex
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from engines.base import Engine, EngineConfig, EngineError, EngineStopped
from engines.clock import monotonic_clock
from engines.environments import Environment
from engines.openai_stream import Endpoint
from engines.process import KeptProcess

HEALTH_LOOK_SECONDS = 0.25
TAIL_LINES = 30
FIRST_PHASE = "importing"


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """A phase of the start-up that has ended, and how long it took."""

    name: str
    seconds: float


class Server:
    """A server of `engine` under `config`, from the moment it is started until it is stopped or died.

    `on_phase` is called with each new phase; `on_death` with an EngineError when the process ends unasked after
    it was ready (before that, `wait_until_ready` raises it).
    """

    def __init__(
        self,
        engine: Engine,
        config: EngineConfig,
        environment: Environment,
        log_file: Path,
        on_phase: Callable[[str], None] = lambda phase: None,
        on_death: Callable[[EngineError], None] = lambda error: None,
    ) -> None:
        self.engine = engine
        self.config = config
        check_model(config.model)
        check_port(config.port)
        self.command = engine.serve_command(config)
        self.variables = engine.variables(config)
        self.phases: list[PhaseTime] = []
        self.phase = FIRST_PHASE
        self._on_phase, self._on_death = on_phase, on_death
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._stopping = self._ready = False
        self._began = self._phase_began = monotonic_clock()
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_file.open("wb", buffering=0)
        except OSError as failure:
            raise EngineError(f"Cannot write the log {log_file}: {failure.strerror}.") from failure
        program = [environment.program(self.command[0]), *self.command[1:]]
        offline = {"HF_HUB_OFFLINE": "1"} if Path(config.model).expanduser().exists() else {}
        self._process = KeptProcess(program, {**offline, **self.variables})
        self._reader = threading.Thread(target=self._read_log, name=f"log of {engine.name}", daemon=True)
        self._reader.start()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.engine, f"http://127.0.0.1:{self.config.port}", self.config.model)

    @property
    def shown_command(self) -> str:
        """The command as one would type it, with the variables it needs."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command)])

    @property
    def log_tail(self) -> str:
        return "\n".join(self._tail)

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        """Whether it can be counted on: not one that is just being stopped."""
        return not self._stopping and self._process.running()

    def processor_seconds(self) -> float:
        """Processor time that the engine's live processes have used so far."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _tree(self) -> list[psutil.Process]:
        try:
            tree: list[psutil.Process] = psutil.Process(self.pid).children(recursive=True)
            return tree
        except psutil.NoSuchProcess:
            return []

    def wait_until_ready(self, limit_seconds: float) -> None:
        """Returns when the server answers; raises EngineError with the log's tail when it died or took too long."""
        deadline = self._began + limit_seconds
        while True:
            if self._stopping:  # first: what we stopped did not die
                raise EngineStopped(f"{self.engine.label} was stopped while it started.", self.log_tail)
            if not self._process.running():
                self._reader.join(timeout=5)
                raise self._death()
            if self._healthy() and self._owns_port():
                break
            if monotonic_clock() > deadline:
                tail = self.log_tail
                self.stop()
                raise EngineError(
                    f"{self.engine.label} was not ready after {limit_seconds:.0f} s (last phase: {self.phase}).", tail
                )
            threading.Event().wait(HEALTH_LOOK_SECONDS)
        self._enter("ready")
        self._ready = True

    def stop(self) -> None:
        self._stopping = True
        self._process.stop()
        self._reader.join(timeout=5)

    def _read_log(self) -> None:
        patterns = [(re.compile(pattern), phase) for pattern, phase in self.engine.phases]
        with self._log:
            self._write_log(f"$ {self.shown_command}\n")
            for line in self._process:
                self._write_log(line)
                if line.strip():
                    self._tail.append(line.rstrip()[:500])
                for pattern, phase in patterns:
                    if not self._ready and phase != self.phase and pattern.search(line):
                        self._enter(phase)
                        break
        self._process.wait()
        if self._ready and not self._stopping:
            self._on_death(self._death())

    def _write_log(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the reading: the engine would wait for us
            self._log.write(line.encode(errors="replace"))

    def _enter(self, phase: str) -> None:
        now = monotonic_clock()
        self.phases.append(PhaseTime(self.phase, now - self._phase_began))
        self.phase, self._phase_began = phase, now
        self._on_phase(phase)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.config.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _owns_port(self) -> bool:
        """Whether it is our process that answers: another program may have taken the port meanwhile."""
        for process in self._tree():
            try:
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.config.port:
                        return True
            except psutil.Error:
                continue  # it ended, or is not ours to look into
        return self._nobody_is_seen_listening()

    def _nobody_is_seen_listening(self) -> bool:
        """Somebody has answered at the port; where the system shows nobody there at all (a sandbox that keeps its table
        of sockets to itself), it cannot show another program either, and the answer must do."""
        try:
            seen = psutil.net_connections(kind="tcp")
        except psutil.Error:
            return False
        return not any(one.status == psutil.CONN_LISTEN and one.laddr.port == self.config.port for one in seen)

    def _death(self) -> EngineError:
        code = self._process.wait()
        how = f"was ended by signal {code - 128}" if code > 128 else f"stopped with exit code {code}"
        when = "while it was serving" if self._ready else f"while {self.phase}"
        reason = death_reason(list(self._tail))
        return EngineError(f"{self.engine.label} {how} {when}{': ' + reason if reason else '.'}", self.log_tail)


DEATH_REASONS = (
    (r"CUDA out of memory|OutOfMemoryError", "the GPU's memory is full. Lower the memory share or the context."),
    (r"No space left on device", "the disk is full."),
    (r"[Aa]ddress already in use", "its port was taken by another program meanwhile. Run it again."),
    (
        r"not a valid model identifier|Repository Not Found|is not a local folder",
        "the model was not found.",
    ),
)


def death_reason(tail: list[str]) -> str:
    """One sentence out of the last lines of a log; empty when they hold nothing telling."""
    text = "\n".join(tail)
    for pattern, sentence in DEATH_REASONS:
        if re.search(pattern, text):
            return sentence
    for line in reversed(tail):
        match = re.search(r"\b(\w*(?:Error|Exception)): (.+)", line)
        if match:
            return f"{match.group(1)}: {match.group(2)[:200]}"
    return ""


def check_model(model: str) -> None:
    """A name that looks like a folder must be one, with a model in it; other names are left to the model hub."""
    folder = Path(model).expanduser()
    looks_like_a_path = model.startswith(("/", ".", "~")) or folder.exists()
    if not model.strip():
        raise EngineError("Name a model: a folder on this machine, or an id on the model hub.")
    if looks_like_a_path and not (folder / "config.json").is_file():
        missing = "it holds no config.json" if folder.is_dir() else "there is no such folder"
        raise EngineError(f"There is no model in {model}: {missing}.")


def free_port() -> int:
    with socket.socket() as probe:
        # A process that another thread is just forking holds this socket until it executes its program; with
        # this option the port counts as free all the same.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as failure:
            raise EngineError(f"Port {port} is taken by another program.") from failure
