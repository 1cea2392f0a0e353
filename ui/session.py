"""Who is on the page and whose turn it is: one run at a time on a machine that all visitors share."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.background import BackgroundRun
from experiments.kept import Kept
from experiments.library import RECORDINGS, Entry, Library, entry_of
from experiments.replay import ReplayedRun
from experiments.result import ExperimentResult, ResultError, new_id
from ui.public import Load, PublicRules, Tally, Use, in_words

CLOSED_WORDS = "Runs are closed for today. Recorded runs can be replayed."
FILES_BYTES = 256_000_000  # of downloads: some fifty results; older ones are opened anew in the Results tab
MOST_UPLOADS = 5  # files of one visitor that are held at once in public mode


class Turn:
    """A visitor's place in the line. `came` says whether its turn has come, or it has given up."""

    def __init__(self, session: str = "", visitor: str = "", load: Load | None = None) -> None:
        self.session, self.visitor, self.load = session, visitor, load
        self.began: float | None = None  # when its turn came
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
        if self.began is None:
            self.began = time.monotonic()
        self._came.set()

    def give_up(self) -> None:
        self.given_up = True
        self._came.set()
        if self._run:
            self._run.stop()


@dataclass(frozen=True, slots=True)
class Place:
    """`number` in line: 0 has its turn, 1 is next. `seconds` until the turn; None where nobody can know."""

    number: int
    seconds: float | None

    @property
    def words(self) -> str:
        if self.number <= 1:
            return "Another run is under way; yours is next in line" + self._wait(".")
        return f"You are number {self.number} in line" + self._wait(". Others run before you.")

    def _wait(self, otherwise: str) -> str:
        return otherwise if self.seconds is None else f"; {in_words(self.seconds)}."


class Sessions:
    """The line of runs, first come first served, and each visitor's place in it.

    With `rules` the page is open to everybody: the line has an end, visitors have limits, and what they upload is their
    own. `now` is for the day on which the page is closed.
    """

    def __init__(
        self,
        results: Path | None = None,
        recordings: Path = RECORDINGS,
        rules: PublicRules | None = None,
        tally: Tally | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="bakeoff-", ignore_cleanup_errors=True)
        self.results = results or self.files / "results"  # every result is kept there as JSON
        self.library = Library(self.results, recordings)
        self.rules, self.tally, self._now = rules, tally or Tally(), now
        self._line: list[Turn] = []
        self._turns: dict[str, Turn] = {}
        self.shown: Kept[Any] = Kept(8)  # how results look whose drawing several visitors share
        self._uploads: dict[str, dict[str, ExperimentResult]] = {}
        # Of each tab, what makes that which every visitor finds first, and its charts; each makes it once for all.
        self.shown_first: list[tuple[Callable[[], Any], Callable[[], Any]]] = []

    @property
    def files(self) -> Path:
        """For downloads that can be made again from a result; gone when the app ends."""
        return Path(self._files.name)

    def make_room(self, most: int = FILES_BYTES) -> None:
        """Delete the oldest downloads beyond `most` bytes; never a recording's, whose links every page has."""
        recorded = tuple(path.stem for path in self.library.recorded())
        found = []
        for path in self.files.iterdir():
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # somebody else made room meanwhile
                continue
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= most:
                return
            if path.is_file() and not path.name.startswith(recorded):
                path.unlink(missing_ok=True)
                left -= size

    def warm(self) -> None:
        """Make what every visitor finds first, before many at once ask for it."""
        for frames in zip(*self.shown_first, strict=True):  # all texts before any chart
            for make in frames:
                make()

    # The line

    def refusal(self, visitor: str, load: Load) -> str:
        """Why this visitor cannot run this now, in words; empty where nothing is against it."""
        if self.rules is None:
            return ""
        if any(turn.visitor == visitor for turn in self._line):
            return "You have a run in line already; it ends or is stopped before you can start another."
        if len(self._line) >= self.rules.line:
            return f"The line is full: {len(self._line)} visitors wait for their turn. Please try again in a while."
        return self.refusal_at_turn(visitor, load)

    def refusal_at_turn(self, visitor: str, load: Load) -> str:
        """The same once the turn has come, for others have run meanwhile."""
        if self.rules is None:
            return ""
        if self.closed:
            return CLOSED_WORDS
        wanted = Use(visitor, runs=1, requests=load.requests, tokens=load.tokens)
        return self.tally.refusal(self.rules, wanted)

    @asynccontextmanager
    async def turn(self, session: str, visitor: str = "", load: Load | None = None) -> AsyncIterator[Turn]:
        """A place in the line, left again on exit. Only ever used from the page's one event loop."""
        turn = Turn(session, visitor, load)
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

    def place(self, turn: Turn) -> Place:
        """Where a turn stands now, and how long those before it take as far as earlier runs tell."""
        number = self._line.index(turn)
        waits = [self._left(ahead) for ahead in self._line[:number]]
        known = [wait for wait in waits if wait is not None]
        return Place(number, sum(known) if len(known) == len(waits) else None)

    def _left(self, turn: Turn) -> float | None:
        whole = self.tally.foreseen_seconds(turn.load) if turn.load else None
        passed = 0.0 if turn.began is None else time.monotonic() - turn.began
        return None if whole is None else max(0.0, whole - passed)

    def to_front(self, session: str) -> bool:
        """Let this page's run be the next one; False where none of it waits."""
        turn = next((one for one in self._line[1:] if one.session == session), None)
        if turn is None:
            return False
        self._line.remove(turn)
        self._line.insert(1, turn)
        return True

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

    def leave(self, session: str) -> None:
        """The page was closed: its run ends, and what was uploaded on it is forgotten."""
        self.stop(session)
        self._uploads.pop(session, None)

    # Closed for today: a file, so that a restart opens nothing

    @property
    def closed(self) -> bool:
        """Whether the page's owner has switched runs off for this day, UTC."""
        try:
            return self._closed_file.read_text(encoding="utf-8").strip() == self._today
        except FileNotFoundError:
            return False

    def close_for_today(self, closed: bool = True) -> None:
        if closed:
            self._closed_file.parent.mkdir(parents=True, exist_ok=True)
            self._closed_file.write_text(self._today, encoding="utf-8")
        else:
            self._closed_file.unlink(missing_ok=True)

    @property
    def _closed_file(self) -> Path:
        return self.results.parent / "closed-for-today"

    @property
    def _today(self) -> str:
        return self._now().date().isoformat()

    # Results: everybody's, and in public mode what one visitor uploaded, for that visitor alone

    def entries(self, experiment: str = "", session: str = "") -> list[Entry]:
        own = [entry_of(result) for result in self._uploads.get(session, {}).values()]
        return [one for one in own if experiment in ("", one.experiment)] + self.library.entries(experiment)

    def load(self, run: str, session: str = "") -> ExperimentResult:
        """Raises ResultError."""
        return self._uploads.get(session, {}).get(run) or self.library.load(run)

    def add(self, text: str, session: str = "") -> ExperimentResult:
        """Take somebody's file: into the folder of results, in public mode for this visitor's page alone, until that is
        closed. Raises ResultError."""
        if self.rules is None:
            return self.library.add(text)
        if len(text) > self.rules.upload_megabytes * 1_000_000:
            raise ResultError(f"This file is larger than {self.rules.upload_megabytes} MB.")
        own = self._uploads.get(session, {})
        if len(own) >= MOST_UPLOADS:
            raise ResultError(f"You have added {MOST_UPLOADS} files; close this page and open it again for others.")
        result = self.library.checked(text)
        result = replace(result, id=new_id(result.experiment))  # its own: it could be called like somebody's run
        self._uploads.setdefault(session, {})[result.id] = result
        return result

    def is_private(self, run: str) -> bool:
        """Whether a visitor uploaded it in public mode: there is no link to it."""
        return any(run in own for own in self._uploads.values())

    def delete(self, run: str) -> None:
        """Raises ResultError."""
        if self.rules is not None:
            raise ResultError("On this page only its owner can delete runs.")
        self.library.delete(run)
