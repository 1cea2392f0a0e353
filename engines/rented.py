"""The `modal` host: engines in containers rented for a run and let go after it, and the state of each for the page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from engines.base import Engine, EngineError
from engines.clock import monotonic_clock
from engines.cloud import Cloud, Rates, Rental
from engines.environments import cache_folder
from engines.local import Light, Status
from engines.server import PhaseTime
from engines.spending import Ledger, Limits

CLOSE_SECONDS = 20.0  # for the runs under way to cancel their calls
LEAVING_SECONDS = 90.0  # until a container that was let go is expected to be gone
LOOK_SECONDS = 2.0
NOTHING_LEFT = "nothing left running"
IDLE_WORDS = "rented when you press Run"
RATES_SECONDS = 3600.0  # that prices are taken to stay the same

log = logging.getLogger("bakeoff")


class RentedHost:
    """Rents from `cloud`. Starts nothing before a run asks for it, and checks after each that nothing is left."""

    def __init__(
        self,
        cloud: Cloud,
        engines: Sequence[Engine],
        cache: Path | None = None,
        limits: Limits | None = None,
        model: str = "",
    ) -> None:
        self.cloud, self.engines = cloud, tuple(engines)
        self.name, self.label = cloud.name, f"{cloud.label}, rented by the second"
        self.model = model  # empty: as each experiment suggests
        self.cache = cache or cache_folder()
        self.limits = limits or Limits()
        self.ledger = Ledger(self.cache / f"spending-{cloud.name}.jsonl")
        self.closing = threading.Event()
        self._statuses = {engine.name: Status(phase=IDLE_WORDS, since=monotonic_clock()) for engine in engines}
        self._changed = threading.Condition()
        self._runs = 0
        self._rates: tuple[float, Rates] | None = None

    # What the page reads

    def status(self, name: str) -> Status:
        return self._statuses[name]

    def statuses(self) -> dict[str, Status]:
        return dict(self._statuses)

    async def rates(self) -> Rates:
        """Asked of the cloud once an hour."""
        if self._rates is None or monotonic_clock() - self._rates[0] > RATES_SECONDS:
            self._rates = (monotonic_clock(), await self.cloud.rates())
        return self._rates[1]

    # What the page tells; a host that keeps nothing running has little to do with it

    def open(self) -> None: ...

    def watch_pages(self) -> None: ...

    def page_opened(self, page: str) -> None: ...

    def page_closed(self, page: str) -> None: ...

    # What a run tells

    def show(
        self,
        name: str,
        light: Light,
        phase: str = "",
        error: str = "",
        log_tail: str = "",
        phases: Sequence[PhaseTime] = (),
    ) -> None:
        """What the engine's container is doing."""
        before = self._statuses[name]
        since = before.since if light == before.light else monotonic_clock()
        after = Status(light, phase, since, error, log_tail, tuple(phases), before.version)
        if (after.light, after.phase) != (before.light, before.phase) and "busy" not in (after.light, before.light):
            log.info("%s on %s: %s", name, self.cloud.label, ": ".join(filter(None, (light, phase, error))))
        self._statuses[name] = after

    def show_version(self, name: str, version: str | None) -> None:
        self._statuses[name] = replace(self._statuses[name], version=version)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by a run, so that closing waits until it has let its containers go."""
        with self._changed:
            self._runs += 1
        try:
            yield
        finally:
            with self._changed:
                self._runs -= 1
                self._changed.notify_all()

    def watch_leaving(self, rentals: Sequence[Rental]) -> None:
        """See to it that what was let go really ends, and show that. Returns at once."""
        by_engine: dict[str, list[Rental]] = {}
        for rental in rentals:
            by_engine.setdefault(rental.engine, []).append(rental)
        for name, its in by_engine.items():
            threading.Thread(
                target=lambda name=name, its=its: asyncio.run(self._watch_leaving(name, its)),
                name=f"containers of {name} leaving",
                daemon=True,
            ).start()

    def close(self) -> None:
        """Cancel what runs, and wait until its containers are let go."""
        self.closing.set()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._runs, CLOSE_SECONDS):
                log.warning(
                    "a run on %s did not end within %g s: look with `modal container list`",
                    self.cloud.label,
                    CLOSE_SECONDS,
                )

    async def _watch_leaving(self, name: str, rentals: list[Rental]) -> None:
        since = self._statuses[name].since
        keep = max(rental.keep_seconds for rental in rentals)
        deadline = monotonic_clock() + LEAVING_SECONDS + keep
        while self._statuses[name].since == since and not self.closing.is_set():  # else it is rented again
            try:
                left = [rental for rental in rentals if await self.cloud.running(rental)]
                if left and monotonic_clock() > deadline:
                    for rental in left:
                        await self.cloud.let_go(rental)
                    words = "its container was still there and was told to end; look with `modal container list`"
                    self._show_left(name, words)
                    return
            except EngineError as error:
                self._show_left(name, f"whether anything is left running could not be seen: {error.message}")
                return
            if not left:
                self._show_left(name, NOTHING_LEFT)
                return
            await asyncio.sleep(LOOK_SECONDS)

    def _show_left(self, name: str, words: str) -> None:
        """Beside a light that is out; a failure's own words stay, and the terminal hears of it in any case."""
        log.info("%s on %s: %s", name, self.cloud.label, words)
        status = self._statuses[name]
        if status.light == "down":
            self._statuses[name] = replace(status, phase=words)

    # What stands at the top of the page

    @property
    def model_label(self) -> str:
        return self.model or "chosen per run"

    model_note = ""
    hardware_words = "GPU chosen per run, one for each engine"
