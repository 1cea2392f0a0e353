"""What rented machines cost: a meter per run, limits per run, visitor and day, and a ledger that outlives the app."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from engines.base import EngineError
from engines.clock import Clock, monotonic_clock

log = logging.getLogger("bakeoff")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that may be spent, in $; None: no limit."""

    per_run: float | None = 1.0
    per_visitor: float | None = None
    per_day: float | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """`container_seconds` and `gpu_seconds` of a run; `dollars` None where a price is not known."""

    container_seconds: float
    gpu_seconds: float
    dollars: float | None
    source: str


class Meter:
    """Counts the seconds of one run's containers. Safe to use from several threads.

    What is counted begins when the cloud says that a container is there and ends when it is let go, so it is what
    Modal bills within a few seconds; its own bill counts.
    """

    def __init__(
        self, dollars_per_second: float | None, gpus: int, source: str, clock: Clock = monotonic_clock
    ) -> None:
        self.dollars_per_second, self.gpus, self.source, self._clock = dollars_per_second, gpus, source, clock
        self._began: dict[str, float] = {}
        self._seconds = 0.0
        self._guard = threading.Lock()

    def start(self, container: str, earlier: float = 0.0) -> None:
        """`container` is there, and has been for `earlier` seconds. The earliest beginning that was told counts."""
        with self._guard:
            moment = self._clock() - earlier
            self._began[container] = min(moment, self._began.get(container, moment))

    def stop(self, container: str, later: float = 0.0) -> None:
        """It was let go, and stays for another `later` seconds."""
        with self._guard:
            began = self._began.pop(container, None)
            if began is not None:
                self._seconds += self._clock() - began + later

    @property
    def spent(self) -> Spent:
        with self._guard:
            now = self._clock()
            seconds = self._seconds + sum(now - began for began in self._began.values())
        dollars = None if self.dollars_per_second is None else seconds * self.dollars_per_second
        return Spent(seconds, seconds * self.gpus, dollars, self.source)


class Ledger:
    """What was spent, a line per run: `{"at": ISO 8601 in UTC, "visitor": a hash, "dollars": x}` in one file.

    A visitor is known by a hash, never by name or address. Lines that cannot be read are passed over.
    """

    def __init__(self, path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path, self._now = path, now
        self._guard = threading.Lock()
        self._reserved: list[tuple[str, float]] = []  # runs under way may spend up to their limit
        self._unwritten: list[tuple[str, str, float]] = []  # so that the limits hold at least as long as the app runs

    def today(self, visitor: str | None = None) -> float:
        """$ spent since midnight UTC, and what runs under way may still spend; of all or of one visitor."""
        with self._guard:
            return self._today(visitor)

    def _today(self, visitor: str | None) -> float:
        name = None if visitor is None else _hashed(visitor)
        day = self._now().date().isoformat()
        total = sum(dollars for who, dollars in self._reserved if name in (None, who))
        for at, who, dollars in [*self._lines(), *self._unwritten]:
            if at.startswith(day) and name in (None, who):
                total += dollars
        return total

    def reserve(self, visitor: str, limits: Limits, wanted: float | None) -> float | None:
        """How much a run may spend: the least of what is wanted and what the limits leave, kept for it until `settle`.

        None where nothing limits it. Raises EngineError when nothing is left.
        """
        with self._guard:
            left = [amount for amount in (wanted, limits.per_run) if amount is not None]
            for limit, who, words in (
                (limits.per_visitor, visitor, "your budget for today"),
                (limits.per_day, None, "this page's budget for today"),
            ):
                if limit is not None:
                    rest = limit - self._today(who)
                    if rest <= 0:
                        raise EngineError(
                            f"Nothing is left of {words} ({dollars(limit)}). It begins anew at midnight UTC; until "
                            "then recorded runs can be replayed."
                        )
                    left.append(rest)
            granted = min(left, default=None)
            self._reserved.append((_hashed(visitor), granted or 0.0))
            return granted

    def settle(self, visitor: str, granted: float | None, spent: float) -> None:
        """The run is over and has cost `spent`."""
        at, who = self._now().isoformat(timespec="seconds"), _hashed(visitor)
        entry = {"at": at, "visitor": who, "dollars": spent}
        with self._guard:
            self._reserved.remove((who, granted or 0.0))
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a+", encoding="utf-8", errors="replace") as file:
                    file.seek(0)
                    whole = file.read()[-1:] in ("", "\n")  # else the last line was cut off
                    file.write(f"{'' if whole else chr(10)}{json.dumps(entry)}\n")
            except OSError as failure:
                self._unwritten.append((at, who, spent))
                log.warning("what was spent cannot be written to %s: %s", self.path, failure.strerror)

    def _lines(self) -> list[tuple[str, str, float]]:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                found.append((str(entry["at"]), str(entry["visitor"]), float(entry["dollars"])))
            except (ValueError, TypeError, LookupError):
                continue  # the end of a line that was being written when the machine went down
        return found


def dollars(value: float | None) -> str:
    """In cents; below ten of them as many places as two digits that count need."""
    if value is None or not math.isfinite(value):
        return "–"
    places = 2 if value <= 0 else max(2, 1 - math.floor(math.log10(value)))
    return f"${value:,.{places}f}"


def _hashed(visitor: str) -> str:
    return hashlib.sha256(visitor.encode()).hexdigest()[:12]
