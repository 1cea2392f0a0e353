"""A run on a thread of its own, on whichever host, for a page that watches it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

from engines.local import LocalHost
from engines.rented import RentedHost
from engines.url_host import UrlHost
from experiments.base import Contender, Emit, Event, Experiment, Host, Plan, RunEnded
from experiments.rented import RentedMachine, run_rented
from experiments.result import ExperimentResult
from experiments.run import Keep, run

AnyHost = LocalHost | RentedHost | UrlHost  # where a page's engines run


async def measure(
    experiment: Experiment,
    plan: Plan,
    host: Host,
    emit: Emit,
    among: tuple[Contender, ...] = (),
    only: str = "",
    keep: Keep | None = None,
) -> ExperimentResult:
    """Run `plan` where the host's engines are: beside this process, or in containers that are rented for it, of which
    `keep` is told nothing."""
    if isinstance(host, RentedMachine):
        return await run_rented(experiment, plan, host, emit)
    return await run(experiment, plan, host, emit, among, only, keep)


class BackgroundRun:
    """A run on a thread and an event loop of its own, so that the page cannot slow what is measured.

    `among` and `only`: as in `experiments.run.run`. `events` grows while it runs; readers keep their own place in it.
    `finished` is set after the last event. `failure` holds an unexpected error, to be shown and not swallowed.
    """

    def __init__(
        self,
        experiment: Experiment,
        plan: Plan,
        host: Host,
        among: tuple[Contender, ...] = (),
        only: str = "",
    ) -> None:
        self.events: list[Event] = []
        self.finished = threading.Event()
        self.failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[ExperimentResult] | None = None
        self._stop_asked = threading.Event()
        self._arguments = (experiment, plan, host, self.events.append, among, only)
        threading.Thread(target=self._work, name="run", daemon=True).start()

    def stop(self) -> None:
        """Ends the run; what was measured so far is kept."""
        self._stop_asked.set()
        if self._loop and self._task:
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._task.cancel)

    @property
    def result(self) -> ExperimentResult | None:
        last = self.events[-1] if self.events else None
        return last.result if isinstance(last, RunEnded) else None

    def _work(self) -> None:
        async def main() -> None:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.ensure_future(measure(*self._arguments))
            if self._stop_asked.is_set():
                self._loop.call_soon(self._task.cancel)  # once it has begun: before, it could not end with a result
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

        try:
            asyncio.run(main())
        except BaseException as failure:
            self.failure = failure
        finally:
            self.finished.set()

    async def new_events(self, interval: float) -> AsyncIterator[list[Event]]:
        """What has happened since the last time, at most once per `interval` seconds, until the run has ended."""
        seen = 0
        while True:
            done = self.finished.is_set()  # read first, so that no event can slip in between
            batch = self.events[seen:]
            seen += len(batch)
            if batch:
                yield batch
            if done:
                return
            await asyncio.sleep(interval)
