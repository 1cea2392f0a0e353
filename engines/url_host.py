"""The `url` host: servers that a visitor names, asked as they are. Starts nothing, stops nothing, keeps no key."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from engines.addresses import ServerURL
from engines.base import Engine, EngineError
from engines.clock import monotonic_clock
from engines.compatible import server_engine
from engines.environments import cache_folder
from engines.local import Light, Status

IDLE_WORDS = "asked when you press Run"
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # apart also for eyes that mix up red and green


class UrlHost:
    """What the page reads: one lane per place for a server. Every visitor names servers of their own, so nothing that
    one has typed stands here; a run's own machine is `experiments.servers.ServersMachine`.

    `public`: strangers use the page, so private addresses are refused. `allowed`: the names of the only hosts that may
    be asked; None: any.
    """

    name = "url"
    label = "servers that you name"
    model_label = "chosen per server"
    model_note = ""
    hardware_words = "not known: somebody else's servers"

    def __init__(self, cache: Path | None = None, public: bool = False, allowed: tuple[str, ...] | None = None) -> None:
        self.engines: tuple[Engine, ...] = tuple(
            server_engine(f"server-{place}", f"Server {place}", colour) for place, colour in enumerate(COLOURS, start=1)
        )
        self.cache = cache or cache_folder()
        self.public, self.allowed = public, allowed
        self._statuses = {engine.name: self._idle() for engine in self.engines}
        self._counting = threading.Lock()
        self._asking = dict.fromkeys(self._statuses, 0)

    def check(self, url: ServerURL) -> None:
        """Raises EngineError for a server that this page does not ask."""
        if self.allowed is None or url.host.lower().rstrip(".") in {name.lower() for name in self.allowed}:
            return
        offered = f"only {', '.join(self.allowed)}" if self.allowed else "no servers by their address"
        raise EngineError(f"This page is open to everybody and asks {offered}, not {url.host}.")

    # What the page reads and tells; a host that runs nothing has little to do with it

    def status(self, name: str) -> Status:
        return self._statuses[name]

    def statuses(self) -> dict[str, Status]:
        return dict(self._statuses)

    def open(self) -> None: ...

    def watch_pages(self) -> None: ...

    def page_opened(self, page: str) -> None: ...

    def page_closed(self, page: str) -> None: ...

    def close(self) -> None: ...

    # What a run tells. The lights are everybody's, so they say what happens and never to whose server.

    def show(self, name: str, light: Light, phase: str = "") -> None:
        before = self._statuses[name]
        since = before.since if light == before.light else monotonic_clock()
        self._statuses[name] = replace(before, light=light, phase=phase, since=since)

    @contextlib.contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """Shows the server as answering."""
        with self._counting:
            self._asking[name] += 1
            self.show(name, "busy")
        try:
            yield
        finally:
            with self._counting:
                self._asking[name] -= 1
                if not self._asking[name]:
                    self.show(name, "ready")

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by a run; after it nothing is ours to be ready."""
        try:
            yield
        finally:
            self._statuses = {name: self._idle() for name in self._statuses}

    def _idle(self) -> Status:
        return Status(phase=IDLE_WORDS, since=monotonic_clock())
