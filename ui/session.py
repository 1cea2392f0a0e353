"""Who is on the page and whose turn it is: one run at a time on a machine that all visitors share."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from experiments.background import BackgroundRun
from experiments.library import RECORDINGS, Library
from experiments.replay import ReplayedRun


class Turn:
    """A visitor's place in the line. `came` says whether its turn has come, or it has given up."""

    def __init__(self) -> None:
        self._came = asyncio.Event()
        self.given_up = False
        self._run: BackgroundRun | ReplayedRun | None = None

    async def came(self, patience: float) -> bool:
        try:
            await asyncio.wait_for(self._came.wait(), patience)
        except TimeoutError:
            return False
        return True

    def runs(self, background: BackgroundRun | ReplayedRun) -> None:
        self._run = background
        if self.given_up:
            background.stop()

    def call(self) -> None:
        self._came.set()

    def give_up(self) -> None:
        self.given_up = True
        self._came.set()
        if self._run:
            self._run.stop()


class Sessions:
    """The line of runs, first come first served, and each visitor's place in it."""

    def __init__(self, results: Path | None = None, recordings: Path = RECORDINGS) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="bakeoff-", ignore_cleanup_errors=True)
        self.results = results or self.files / "results"  # every result is kept there as JSON
        self.library = Library(self.results, recordings)
        self._line: list[Turn] = []
        self._turns: dict[str, Turn] = {}

    @property
    def files(self) -> Path:
        """For downloads that can be made again from a result; gone when the app ends."""
        return Path(self._files.name)

    @asynccontextmanager
    async def turn(self, session: str) -> AsyncIterator[Turn]:
        """A place in the line, left again on exit. Only ever used from the page's one event loop."""
        turn = Turn()
        self._line.append(turn)
        self._turns[session] = turn
        self._line[0].call()
        try:
            yield turn
        finally:
            self._line.remove(turn)
            if self._turns.get(session) is turn:
                del self._turns[session]
            if self._line:
                self._line[0].call()

    @contextmanager
    def watching(self, session: str, replay: ReplayedRun) -> Iterator[None]:
        """While a visitor watches a recording: it takes no place in the line, and Stop ends it."""
        turn = Turn()
        turn.runs(replay)
        self._turns[session] = turn
        try:
            yield
        finally:
            if self._turns.get(session) is turn:
                del self._turns[session]

    def stop(self, session: str) -> None:
        """Stop the visitor's run, or leave the line."""
        turn = self._turns.get(session)
        if turn:
            turn.give_up()
