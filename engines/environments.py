"""One isolated Python environment per engine, made from a fully pinned set when it is first needed.

An environment lives in `<cache>/environments/<engine>-<device>-<hash of its pins>`; a marker written last says
that it is whole. What lacks the marker, or no longer holds every pinned distribution, is removed and made again.
A file lock keeps two apps from making one environment at once.

On a machine without a network `packing` has put one at `<cache>/environments/<engine>-<device>-packed`. It is used as
it is and never made again: its pins are its marker's, and some of its packages, torch among them, are the machine's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from engines.base import Device, EngineError
from engines.process import KeptProcess

REQUIREMENTS_FOLDER = Path(__file__).parent / "requirements"
CACHE_VARIABLE = "BAKEOFF_CACHE"
MARKER = "complete.json"
LOOK_SECONDS = 0.5
GIB = 1 << 30
TAIL_LINES = 25

Progress = Callable[[str], None]


def cache_folder() -> Path:
    """Where environments, logs and made models live; the variable BAKEOFF_CACHE overrides it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else user_cache_path("llm-inference-bakeoff")


def pinned(requirements: Path) -> dict[str, str]:
    """Distribution name (normalised) -> version, of a requirements file where every line is name==version."""
    pins = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].partition(";")[0].strip()
        if requirement:
            name, _, version = requirement.partition("==")
            pins[normalised(name)] = version
    return pins


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower()


class Installable(Protocol):
    """What an environment is made for: an engine, or another program with a pinned set of its own."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def requirements(self) -> Mapping[Device, str]: ...
    @property
    def install_gib(self) -> float: ...
    def package_for(self, device: Device) -> str: ...


def environment_name(engine: Installable, device: Device, python: str) -> str:
    """The folder's name: another one for other pins or another Python ("3.11")."""
    pins = (REQUIREMENTS_FOLDER / engine.requirements[device]).read_bytes()
    digest = hashlib.sha256(pins).hexdigest()[:10]
    return f"{engine.name}-{device}-py{python.replace('.', '')}-{digest}"


class Environment:
    """The environment of one engine for one kind of hardware."""

    is_packed = False  # made by `packing`, on a machine without a network

    def __init__(self, engine: Installable, device: Device, cache: Path | None = None) -> None:
        self.engine = engine
        self.device = device
        if not engine.requirements:  # the engine runs in the app's own environment
            self.folder = Path(sys.prefix)
            return
        if device not in engine.requirements:
            raise EngineError(f"{engine.label} has no pinned set of packages for {device}.")
        self.requirements = REQUIREMENTS_FOLDER / engine.requirements[device]
        root = (cache or cache_folder()) / "environments"
        self.folder = root / environment_name(engine, device, f"{sys.version_info.major}.{sys.version_info.minor}")
        packed = root / f"{engine.name}-{device}-packed"
        if packed.exists():
            self.folder = packed
            self.is_packed = True

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def program(self, name: str) -> str:
        """The full path of a program of this environment."""
        return sys.executable if name == "python" and not self.engine.requirements else str(self.bin / name)

    def installed(self) -> dict[str, str]:
        """Distributions found in the environment: name (normalised) -> version.

        Of the machine's own packages, those that a packed environment relies on.
        """
        found = {}
        for folder in self.folder.glob("lib/python*/site-packages"):
            found.update(_distributions(folder))
        marker = self._marker() if self.is_packed else {}
        for folder in map(Path, marker.get("base_folders", [])):
            for name, version in _distributions(folder).items():
                if name in marker["base"]:
                    found.setdefault(name, version)
        return found

    def _marker(self) -> dict[str, Any]:
        try:
            marker: dict[str, Any] = json.loads((self.folder / MARKER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return marker

    def engine_version(self) -> str | None:
        return self.installed().get(normalised(self.engine.package_for(self.device)))

    def problem(self) -> str | None:
        """Why the environment cannot be used as it is; None when it is whole."""
        if not self.engine.requirements:
            return None
        if not (self.folder / MARKER).exists():
            return "was not finished" if self.folder.exists() else "is not there yet"
        installed = self.installed()
        pins = self._marker()["installed"] if self.is_packed else pinned(self.requirements)
        for name, version in pins.items():
            # A build without CUDA calls itself 2.13.0+cpu, which is the pinned 2.13.0.
            if installed.get(name, "").partition("+")[0] != version.partition("+")[0]:
                return f"lacks {name} {version}"
        return None if (self.bin / "python").exists() else "lacks its Python"

    def ensure(self, progress: Progress = lambda message: None, cancelled: threading.Event | None = None) -> None:
        """Make the environment unless it is whole. Raises EngineError, and leaves nothing half made behind."""
        problem = self.problem()
        if problem is None:
            return
        if self.is_packed:
            raise EngineError(
                f"The packed environment of {self.engine.label} in {self.folder} {problem}. "
                "Unpack it again, or remove that folder to have it installed over the network."
            )
        cancelled = cancelled or threading.Event()
        with self._locked(progress, cancelled):
            problem = self.problem()  # another app may have made it while we waited
            if problem is None:
                return
            if self.folder.exists():
                progress(f"making the environment again: it {problem}")
                shutil.rmtree(self.folder)
            self._check_space()
            try:
                self._make(progress, cancelled)
            except BaseException as failure:
                shutil.rmtree(self.folder, ignore_errors=True)
                if isinstance(failure, OSError):  # pip found room for everything, the marker did not
                    raise EngineError(f"Installing {self.engine.label} failed: {_reason([str(failure)])}") from failure
                raise

    def discard(self) -> None:
        """Forget that the environment is whole, so that the next `ensure` makes it again (a packed one cannot be)."""
        if not self.is_packed:
            (self.folder / MARKER).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, progress: Progress, cancelled: threading.Event) -> Iterator[None]:
        lock = FileLock(str(self.folder) + ".lock")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    lock.acquire(timeout=LOOK_SECONDS)
                    break
                except Timeout:
                    progress("another app is installing it; waiting")
                    _check_cancelled(cancelled)
        except OSError as failure:
            raise EngineError(f"Cannot write to {self.folder.parent}: {failure.strerror}.") from failure
        try:
            yield
        finally:
            lock.release()

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.folder.parent).free
        if free < self.engine.install_gib * GIB:
            raise EngineError(
                f"Not enough disk space to install {self.engine.label}: it needs {self.engine.install_gib:.1f} GiB, "
                f"{free / GIB:.1f} GiB are free in {self.folder.parent}. "
                f"Free some space, or set {CACHE_VARIABLE} to a folder on a larger disk."
            )

    def _make(self, progress: Progress, cancelled: threading.Event) -> None:
        progress("creating its environment")
        self._run([sys.executable, "-m", "venv", "--without-pip", str(self.folder)], lambda line: None, cancelled)
        pins = pinned(self.requirements)
        install = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        install += ["--no-compile", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        # torch first and with its own dependencies: which these are depends on the build that this machine gets.
        torch = f"torch=={pins['torch']}"
        progress(f"installing {torch.replace('==', ' ')}")
        self._run([*install, "--constraint", str(self.requirements), torch], lambda line: None, cancelled)
        seen: set[str] = set()

        def show(line: str) -> None:
            match = re.match(r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9_.-]+?)(?:\[.*)?==", line)
            if match:
                seen.add(match.group(1))
                progress(f"downloading package {len(seen)} of {len(pins)}: {match.group(1)}")
            elif line.startswith("Installing collected packages"):
                progress(f"unpacking {len(pins)} packages")

        self._run([*install, "--no-deps", "--requirement", str(self.requirements)], show, cancelled)
        marker = {"engine": self.engine.name, "device": self.device, "installed": self.installed()}
        partial = self.folder / (MARKER + ".part")
        partial.write_text(json.dumps(marker, indent=1), encoding="utf-8")
        partial.replace(self.folder / MARKER)
        problem = self.problem()
        if problem:
            raise EngineError(f"The installed environment of {self.engine.label} {problem}.")

    def _run(self, command: list[str], on_line: Progress, cancelled: threading.Event) -> None:
        tail: list[str] = []
        process = KeptProcess(command)
        lines: SimpleQueue[str | None] = SimpleQueue()

        def read() -> None:
            for line in process:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                with contextlib.suppress(Empty):  # pip is silent for long while it unpacks
                    line = lines.get(timeout=LOOK_SECONDS)
                    if line is None:
                        break
                    tail = [*tail[1 - TAIL_LINES :], line.rstrip()]
                    on_line(line)
                _check_cancelled(cancelled)
        finally:
            process.stop()
        if process.wait():
            raise EngineError(f"Installing {self.engine.label} failed: {_reason(tail)}", "\n".join(tail))


def _distributions(packages: Path) -> dict[str, str]:
    found = {}
    for entry in packages.glob("*.dist-info"):
        if (entry / "METADATA").exists():
            name, _, version = entry.name.removesuffix(".dist-info").rpartition("-")
            found[normalised(name)] = version
    return found


def _check_cancelled(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise EngineError("The installation was cancelled.")


def _reason(tail: list[str]) -> str:
    """One sentence out of pip's last lines."""
    text = "\n".join(tail)
    if "No space left on device" in text:
        return f"the disk is full. Free some space, or set {CACHE_VARIABLE} to a folder on a larger disk."
    if "Retry(total=0" in text:  # its last attempt; what follows speaks of conflicts or of no such version
        return "the package index cannot be reached. Check the network connection, and try again."
    for line in reversed(tail):
        if line.startswith("ERROR") and "for help visit" not in line:
            return line.removeprefix("ERROR:").strip()
    return tail[-1] if tail else "pip gave no reason."
