"""What several tests need: a model folder that servers accept, and hosts whose engines follow a script."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmark.running import RunningTruth
from demo_model.bundled import default_model
from engines.base import Engine
from engines.hardware import Hardware
from engines.local import LocalHost
from engines.scripted import Script, scripted_engine

MACHINE = Hardware(cpu="Test CPU", cores=2, memory_gib=8.0)


@pytest.fixture(scope="session")
def model() -> str:
    return str(default_model())


@pytest.fixture
def scripted() -> Callable[..., Engine]:
    """Make an engine row out of a script: `scripted("name", gap=0.001, fault="http 500")`."""

    def make(name: str = "quick", **script: object) -> Engine:
        settings = {"start": 0.05, "first_token": 0.005, "gap": 0.001, **script}
        return scripted_engine(name, name.title(), "#0072B2", Script(**settings))  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_host(model: str, tmp_path: Path) -> Iterator[Callable[..., LocalHost]]:
    """Make a host over the given engines; all hosts are closed at the end of the test."""
    hosts: list[LocalHost] = []

    def make(*engines: Engine, **settings: object) -> LocalHost:
        settings = {"model": model, "cache": tmp_path / "cache", "hardware": MACHINE, **settings}
        hosts.append(LocalHost(engines, **settings))  # type: ignore[arg-type]
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


@pytest.fixture(scope="module")
def truth() -> Iterator[RunningTruth]:
    """A server whose every moment is known; each test gives it a schedule of its own."""
    with RunningTruth() as running:
        yield running


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, as large as tmpfs is told ("2m"); the test is skipped where none can be mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Returns as soon as the condition holds; fails the test when it does not within the limit."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.02)
