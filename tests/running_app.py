"""Starts `python app.py` as its users do, in a process of its own, and finds every process under it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil

from tests.conftest import wait_until

PROJECT = Path(__file__).parent.parent


class RunningApp:
    """The app under test. `log` grows as it prints; use as a context manager, which ends it."""

    def __init__(
        self,
        *arguments: str,
        cache: Path | None = None,
        program: tuple[str, ...] = ("app.py",),
        variables: dict[str, str] | None = None,
    ) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(variables or {})}
        if cache:
            environment["BAKEOFF_CACHE"] = str(cache)
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line

    def __enter__(self) -> RunningApp:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def url(self, seconds: float = 60.0) -> str:
        """The page's address, as soon as the app has printed it."""
        pattern = re.compile(r"The page is up: (http://\S+/)")
        wait_until(lambda: bool(pattern.search(self.log)) or self.process.poll() is not None, seconds)
        found = pattern.search(self.log)
        assert found, self.log
        return found.group(1)

    def wait_for_log(self, words: str, count: int = 1, seconds: float = 30.0) -> None:
        wait_until(lambda: self.log.count(words) >= count, seconds)

    def tree(self) -> list[psutil.Process]:
        """Every process that the app has started, however deep."""
        return psutil.Process(self.process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those still running; a zombie that nobody has reaped yet runs no more."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
