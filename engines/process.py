"""Starts a program under the keeper, so that it never outlives the app, and reads what it prints."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

KEEPER = Path(__file__).parent / "keeper.py"
STOP_SECONDS = 15.0  # longer than the keeper's own patience with the engine


class KeptProcess:
    """A running program and everything it starts. Iterating yields its output, line by line, until it ends."""

    def __init__(self, command: list[str], variables: Mapping[str, str] | None = None) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"}
        environment.pop("PYTHONPATH", None)  # the app's own path must not leak into another environment
        environment |= variables or {}
        self._keeper = subprocess.Popen(
            [sys.executable, "-S", "-E", str(KEEPER), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the app alone, which then stops its engines in order
        )

    @property
    def pid(self) -> int:
        """The keeper's process id: the root of the tree."""
        return self._keeper.pid

    def __iter__(self) -> Iterator[str]:
        assert self._keeper.stdout is not None
        yield from self._keeper.stdout

    def running(self) -> bool:
        return self._keeper.poll() is None

    def wait(self) -> int:
        return self._keeper.wait()

    def stop(self) -> None:
        """End the whole tree, politely first. Returns when it is gone."""
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
