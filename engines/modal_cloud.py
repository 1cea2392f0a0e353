"""Containers rented from Modal: calls the classes that `modal deploy modal_app.py` has put there.

Loads the modal package when something is first rented, and never before. Facts of modal 1.6.4, which is pinned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from engines.base import EngineError
from engines.clock import monotonic_clock
from engines.cloud import (
    RESTARTED,
    WIRE_VERSION,
    Container,
    ContainerFacts,
    Machine,
    Rates,
    Rental,
    Stage,
    listed_rates,
)
from engines.hardware import Hardware

if TYPE_CHECKING:
    import modal

APP_NAME = "llm-inference-bake-off"
MACHINE = Machine()
QUEUE_LIMIT_SECONDS = 900.0
RATES_LIMIT_SECONDS = 10.0
SILENCE_LIMIT_SECONDS = 120.0  # the container says something every few seconds, whatever the engine does
LOOK_SECONDS = 1.0
ROUND_TRIPS = 5
IDLE_SECONDS = 20  # between two calls of one run; a container that is not kept leaves by itself at the end
DEPLOY = "`modal deploy modal_app.py`"
WORDS_OF_PREEMPTION = "Modal took the container away for somebody else (preemption)."

log = logging.getLogger("bakeoff")


def class_name(engine: str, snapshot: bool = False) -> str:
    """The name under which `modal_app.py` deploys an engine."""
    return f"{engine.title()}Engine{'Snapshot' if snapshot else ''}"


class ModalCloud:
    """`client`: another than the account's own, for tests."""

    name = "modal"
    label = "Modal"
    machine = MACHINE
    measures = True

    def __init__(self, app_name: str = APP_NAME, client: modal.Client | None = None) -> None:
        self.app_name, self._client = app_name, client

    async def rates(self) -> Rates:
        """The account's own prices, where it says them in units that can be recognised; else the dated table's."""
        import modal

        listed = listed_rates()
        try:
            asked = modal.Workspace.from_context(client=self._client).billing.rates.aio()
            answer = await asyncio.wait_for(asked, RATES_LIMIT_SECONDS)  # its client tries for a minute
            told = {key: float(value) for key, value in answer.items()}
        except Exception as failure:  # whatever it is: the table has a date on it, which is shown
            log.info("Modal's prices for this account could not be had: %s", str(failure) or type(failure).__name__)
            return listed
        return recognised_rates(told, listed)

    async def start(self, rental: Rental, on_stage: Callable[[Stage], None]) -> Container:
        with failures_told(rental):
            instance = self._instance(rental)
            on_stage("waiting for a GPU")
            call = await instance.hello.spawn.aio()
            try:
                facts = await self._first_answer(call, instance, rental, on_stage)
                network = await self._network_seconds(instance)
            except BaseException:
                try:
                    await asyncio.shield(call.cancel.aio(terminate_containers=True))
                except Exception as failure:  # the reason to end, not this, is what the page shows
                    log.warning("a call of %s on Modal could not be cancelled: %r", rental.engine, failure)
                raise
        return _ModalContainer(facts, network, rental, instance, self._client)

    async def let_go(self, rental: Rental) -> None:
        with failures_told(rental):
            await self._instance(rental).hello.autoscaler.update.aio(min_containers=0, scaledown_window=2)

    async def running(self, rental: Rental) -> int:
        with failures_told(rental):
            return int((await self._instance(rental).measure.get_current_stats.aio()).num_total_runners)

    def _instance(self, rental: Rental) -> Any:
        import modal

        deployed = modal.Cls.from_name(self.app_name, class_name(rental.engine, rental.snapshot), client=self._client)
        chosen = deployed.with_options(
            gpu=rental.gpu_words, scaledown_window=max(IDLE_SECONDS, rental.keep_seconds), max_containers=1
        )
        return chosen(model=rental.model, draft_model=rental.draft_model, features=rental.features)

    async def _first_answer(
        self, call: Any, instance: Any, rental: Rental, on_stage: Callable[[Stage], None]
    ) -> ContainerFacts:
        deadline = monotonic_clock() + QUEUE_LIMIT_SECONDS
        while monotonic_clock() < deadline:
            with contextlib.suppress(TimeoutError):  # Python's own: not there yet; Modal's time-outs are other types
                facts = read_facts(await call.get.aio(timeout=LOOK_SECONDS))
                _still_wanted()
                return facts
            _still_wanted()
            stats = await instance.hello.get_current_stats.aio()
            on_stage("starting the container" if stats.num_total_runners else "waiting for a GPU")
        raise EngineError(
            f"No {rental.gpu_words.replace('!', '')} came free on Modal within {QUEUE_LIMIT_SECONDS / 60:.0f} minutes. "
            "Try another GPU, or later; an account on the free plan has at most 10 GPUs at once."
        )

    async def _network_seconds(self, instance: Any) -> float | None:
        shortest = None
        for _ in range(ROUND_TRIPS):
            began = monotonic_clock()
            await instance.hello.remote.aio()
            passed = monotonic_clock() - began
            shortest = passed if shortest is None else min(shortest, passed)
            _still_wanted()
        return shortest


class _ModalContainer:
    def __init__(
        self,
        facts: ContainerFacts,
        network_seconds: float | None,
        rental: Rental,
        instance: Any,
        client: modal.Client | None,
    ) -> None:
        self.facts, self.network_seconds = facts, network_seconds
        self._rental, self._instance, self._client = rental, instance, client

    async def events(self, order: str) -> AsyncGenerator[str, None]:
        life = call_id = ""
        ended = False
        stream = self._instance.measure.remote_gen.aio(order)
        waiting: asyncio.Future[str] | None = None
        try:
            with failures_told(self._rental):
                while True:
                    waiting = asyncio.ensure_future(anext(stream))
                    # Not wait_for: it would cancel the item, and with that close a stream that has not said its id yet;
                    # and Python 3.11's forgets that it was cancelled when the item comes at the same moment.
                    if not (await asyncio.wait([waiting], timeout=SILENCE_LIMIT_SECONDS))[0]:
                        raise EngineError(
                            f"Nothing was heard from the container on Modal for {SILENCE_LIMIT_SECONDS:g} s. Look at "
                            f"its log (`modal app logs {APP_NAME}`), and run it again."
                        )
                    try:
                        item = waiting.result()
                    except StopAsyncIteration:
                        ended = True
                        return
                    finally:
                        waiting = None
                    its_life, number, payload = read_stamp(item)
                    if its_life == life:
                        yield payload
                        continue
                    if number:  # Modal passes on only those items of a second run that come after the first run's
                        raise EngineError(f"{WORDS_OF_PREEMPTION} Run it again.")
                    if life:
                        yield RESTARTED
                    life, call_id = its_life, payload
        finally:
            if not ended:
                try:
                    await asyncio.shield(self._cancel(call_id, waiting or asyncio.ensure_future(anext(stream))))
                except Exception as failure:  # the reason to end, not this, is what the page shows
                    log.warning("a call of %s on Modal could not be cancelled: %r", self._rental.engine, failure)

    async def _cancel(self, call_id: str, coming: asyncio.Future[str]) -> None:
        """End the call there and its container with it: a generator that nobody reads would run, and cost, on.

        Closing the stream does not do that, and the call's id is known only from its own first item.
        """
        import modal

        try:
            if not call_id:
                await asyncio.wait([coming], timeout=SILENCE_LIMIT_SECONDS)
                call_id = read_stamp(coming.result())[2]
        finally:
            coming.cancel()
        call = modal.FunctionCall.from_id(call_id, client=self._client)
        await call.cancel.aio(terminate_containers=True)


def _still_wanted() -> None:
    """Raises CancelledError where this task was cancelled while Modal's client, whose calls may forget that, waited."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def stamped(call_id: str, items: Iterable[str]) -> Generator[str, None, None]:
    """A container's items as they travel: which life of the container they belong to, and their number in it.

    The first one carries the id of the call, so that it can be cancelled. A container that Modal takes away is followed
    by another one, which begins anew: its items must not be taken for the first one's.
    """
    life = secrets.token_hex(4)
    yield f"{life} 0 {call_id}"
    for number, item in enumerate(items, start=1):
        yield f"{life} {number} {item}"


def read_stamp(item: str) -> tuple[str, int, str]:
    """Life, number and payload of an item; raises EngineError for what is none."""
    life, _, rest = item.partition(" ")
    number, _, payload = rest.partition(" ")
    if not number.isdigit():
        raise EngineError(f"The container sent something that cannot be read: {item[:120]}")
    return life, int(number), payload


def read_facts(value: Mapping[str, Any]) -> ContainerFacts:
    """What `hello` of modal_app.py answers; raises EngineError when it speaks another version."""
    if value.get("wire_version") != WIRE_VERSION:
        raise EngineError(f"The app on Modal is of another version than this one. Deploy it again: {DEPLOY}.")
    return ContainerFacts(**{**value, "hardware": Hardware(**value["hardware"])})


def recognised_rates(told: Mapping[str, float], listed: Rates) -> Rates:
    """`told`: $ by keys and in units that the account's answer does not explain. A value counts where its key names a
    GPU of the table (or cpu, memory) and it is within three times the listed price, per second or per hour."""

    def near(name: str, price: float) -> float | None:
        pattern = re.compile(rf"(^|-){re.escape(name.lower())}($|-)")
        for key, value in told.items():
            if pattern.search(re.sub(r"[^a-z0-9]+", "-", key.lower())):
                for seconds in (1, 3600):
                    if price / 3 < value / seconds < price * 3:
                        return value / seconds
        return None

    gpus = {name: near(name, price) for name, price in listed.gpus.items()}
    found = {name: price for name, price in gpus.items() if price is not None}
    if not found:
        return listed
    return Rates(
        {**listed.gpus, **found},
        near("cpu", listed.core) or listed.core,
        near("memory", listed.gibibyte) or listed.gibibyte,
        "Modal's prices for this account today",
    )


@contextlib.contextmanager
def failures_told(rental: Rental) -> Iterator[None]:
    """Turns whatever the modal package raises into an EngineError with the next step."""
    try:
        yield
    except EngineError:
        raise
    except Exception as failure:  # what our own code raises in a container comes back as its own type
        raise EngineError(sentence(failure, rental), _details(failure)) from failure


# What a failure's own words show, where its type says too little.
WORDS = (
    (
        r"image build|building image|image .* failed",
        "The image of {engine} could not be built on Modal. The log below, or `modal app logs`, says why; mend "
        "engines/requirements, and deploy again.",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "The GPU's memory ({gpu}) is too small for this model. Choose a larger GPU or more of them.",
    ),
    (
        r"out of memory|\bOOM\b|oom-kill|exit code 137|SIGKILL",
        "The container ran out of memory and was ended. Choose a smaller model, or give the classes in modal_app.py "
        "more memory and deploy again.",
    ),
    (
        r"preempt",
        f"{WORDS_OF_PREEMPTION} Run it again.",
    ),
    (
        r"spend limit|budget|billing|payment",
        "Modal refuses because of the account's spending limit. Raise it under modal.com/settings/usage, or wait for "
        "the next month.",
    ),
    (
        r"gpu.*(limit|quota)|(limit|quota).*gpu|resource.?exhausted",
        "The account has all the GPUs that its plan allows (10 on the free one). Stop what runs (`modal app list`), "
        "or choose fewer engines.",
    ),
    (r"unknown gpu|invalid gpu|gpu type", "Modal does not know the GPU {gpu}. Choose another one."),
)


def sentence(failure: BaseException, rental: Rental) -> str:
    """What went wrong, for the person at the page, and what to do about it."""
    from modal import exception

    text = str(failure)
    if isinstance(failure, exception.Error):  # not our own code's, whose words may mean anything
        for pattern, words in WORDS:
            if re.search(pattern, text, re.IGNORECASE):
                return words.format(engine=rental.engine, gpu=rental.gpu_words.replace("!", ""))
    match failure:
        case exception.AuthError() if "missing" in text.lower():
            return (
                "There is no Modal token here. Make one with `modal setup` (or `modal token new`), or set "
                "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, and start the app again."
            )
        case exception.AuthError():
            return (
                "Modal does not accept this token. Make a new one with `modal token new`, or correct MODAL_TOKEN_ID "
                "and MODAL_TOKEN_SECRET, and start the app again."
            )
        case exception.NotFoundError():
            return f"The app is not on Modal yet. Put it there with {DEPLOY}, and press Run again."
        case exception.PermissionDeniedError():
            return "This Modal token may not call the app. Use one of the workspace in which it was deployed."
        case exception.ResourceExhaustedError():
            return (
                "The account has all the GPUs that its plan allows (10 on the free one). Stop what runs "
                "(`modal app list`), or choose fewer engines."
            )
        case exception.FunctionTimeoutError():
            return (
                "The run took longer than a container on Modal may (an hour). Choose fewer repeats or fewer users, "
                "and run it again."
            )
        case exception.VersionError():
            return "Modal no longer speaks with this version of its package: raise it in requirements.txt."
        case exception.ConnectionError() | exception.ServiceError() | ConnectionError() | socket.gaierror():
            return f"Modal cannot be reached ({text or type(failure).__name__}). Check the network, and run it again."
        case exception.InternalError() | exception.InternalFailure():
            return f"Something broke inside Modal ({text}). Run it again; status.modal.com says whether others have it."
        case _:
            return (
                f"The container on Modal failed: {type(failure).__name__}{': ' if text else ''}{text}. "
                f"`modal app logs {APP_NAME}` may say more; run it again."
            )


def _details(failure: BaseException) -> str:
    """A long message's end, for the place where logs are shown."""
    text = str(failure)
    return "\n".join(text.splitlines()[-30:]) if "\n" in text else ""
