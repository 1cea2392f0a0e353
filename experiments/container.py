"""The container's side of a rented run: carries out an order next to the engine, and yields what happens as JSON."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from collections.abc import Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from demo_model.bundled import default_model, model_label, model_note
from demo_model.bundled import draft_model as draft_model_of
from engines import ENGINES
from engines.base import Engine, EngineError, Request
from engines.clock import monotonic_clock
from engines.cloud import ContainerFacts
from engines.hardware import Hardware
from engines.load import LoadGenerator
from engines.local import LocalHost, Status
from engines.openai_stream import Endpoint
from experiments import EXPERIMENTS
from experiments.background import BackgroundRun
from experiments.base import Contender, EngineFailed, Event
from experiments.run import row_of
from experiments.wire import BUNDLED, Order, changes_from_json, encoded, order_from_json

LOOK_SECONDS = 0.05  # the page draws ten times a second; more messages would only be packed together on their way
ALIVE_SECONDS = 5.0
SLEEP_SECONDS = 120.0  # for an engine to empty or fill the GPU's memory
STOP_SECONDS = 60.0  # for a run that was told to stop, until it has made its result


def carried_out(order: str, host: LocalHost) -> Generator[str, None, None]:
    """Run one contender of `order` on `host`, as `experiments.run` does anywhere, and yield its events in batches.

    Between events it says every few seconds that it is still there. Closing it stops the run; so does the order's own
    limit. An order that cannot be read raises EngineError.
    """
    read = order_from_json(order, EXPERIMENTS, host.engines, host.draft_model)
    experiment = next(one for one in EXPERIMENTS if one.name == read.experiment)
    contender = next((one for one in read.contenders if one.key == read.only), None)
    if contender is None:
        raise EngineError(f"The order has no contender called {read.only!r}.")
    run = BackgroundRun(experiment, read.plan, host, read.contenders, read.only)
    try:
        yield from _told(read, contender, run, host)
    finally:
        run.stop()
        run.finished.wait(STOP_SECONDS)  # the engine must be idle for whoever comes next


def _told(order: Order, contender: Contender, run: BackgroundRun, host: LocalHost) -> Generator[str, None, None]:
    seen = 0
    status: Status | None = None
    began = spoken = monotonic_clock()
    while True:
        done = run.finished.is_set()  # read first, so that no event can slip in between
        told: list[Event | Status] = list(run.events[seen:])
        seen += len(told)
        now = host.status(contender.engine.name)
        if (status is None or (now.light, now.phase) != (status.light, status.phase)) and now.light != "busy":
            status = now
            told.insert(0, now)
        if done and run.failure is not None:
            words = f"A fault in the container: {type(run.failure).__name__}: {run.failure}"
            told.append(EngineFailed(replace(row_of(contender), error=words)))
        if told or monotonic_clock() - spoken > ALIVE_SECONDS:
            spoken = monotonic_clock()
            yield encoded(told)
        if done:
            return
        if order.limit_seconds is not None and monotonic_clock() - began > order.limit_seconds:
            run.stop()
        run.finished.wait(LOOK_SECONDS)


class Bench:
    """What a rented container holds: one engine under one configuration, measured again and again.

    `cache` has the engine's environment in it. Times of the process' own beginning come from the operating system.
    """

    def __init__(
        self,
        engine: str,
        model: str,
        draft_model: str,
        features: str,
        cache: Path,
        engines: tuple[Engine, ...] = ENGINES,
        can_sleep: bool = False,
        hardware: Hardware | None = None,
    ) -> None:
        path = str(default_model()) if model == BUNDLED else model
        bundled = draft_model_of(path) if draft_model == BUNDLED else None
        self.engine = next(one for one in engines if one.name == engine)
        self.features = changes_from_json(features, str(bundled) if bundled else None)
        self.host = LocalHost(
            engines,
            path,
            model_label(path),
            model_note(path),
            str(bundled) if bundled else draft_model or None,
            cache,
            hardware,
            tensor_parallel=self.features.pop("tensor_parallel", 1),
            replicas=self.features.pop("replicas", 1),
            can_sleep=can_sleep,
        )
        self.import_seconds = alive_seconds()
        self.calls = 0
        self.from_snapshot = False

    def hello(self) -> dict[str, Any]:
        """What the container says of itself: `engines.cloud.ContainerFacts` as a dictionary."""
        facts = ContainerFacts(
            container=os.environ.get("MODAL_TASK_ID", "this process"),
            hardware=self.host.hardware,
            alive_seconds=alive_seconds(),
            import_seconds=self.import_seconds,
            calls=self.calls,
            region=os.environ.get("MODAL_REGION", ""),
            from_snapshot=self.from_snapshot,
        )
        self.calls += 1
        return asdict(facts)

    def measure(self, order: str) -> Generator[str, None, None]:
        return carried_out(order, self.host)

    def freeze(self) -> None:
        """Before a picture of the memory is taken: start the engine, let it answer once, empty the GPU's memory."""
        serving = self.host.ready(self.engine.name, replace(self.host.config(self.engine.name), **self.features))
        asyncio.run(_asked_once(serving.endpoint))
        _post(f"{serving.endpoint.base_url}{self.engine.sleep_path}")

    def thaw(self) -> None:
        """After the picture has come back to life: fill the GPU's memory again."""
        self.from_snapshot = True
        serving = self.host.ready(self.engine.name, replace(self.host.config(self.engine.name), **self.features))
        _post(f"{serving.endpoint.base_url}{self.engine.wake_path}")

    def close(self) -> None:
        self.host.close()


def alive_seconds() -> float:
    """Since this process began."""
    return max(0.0, time.time() - float(psutil.Process().create_time()))


async def _asked_once(endpoint: Endpoint) -> None:
    async with LoadGenerator(endpoint) as load:
        (answered,), _ = await load.answers([(0.0, Request("Hello.", max_tokens=8))])
    if answered.timeline.error:
        raise EngineError(answered.timeline.error)


def _post(url: str) -> None:
    request = urllib.request.Request(url, data=b"", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=SLEEP_SECONDS):
            pass
    except OSError as failure:
        raise EngineError(f"The engine did not obey {url}: {failure}.") from failure
