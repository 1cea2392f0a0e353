"""Renting from Modal with Modal's own client, against a control plane on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import asdict, replace
from functools import wraps
from typing import Any

import modal
import pytest
from grpclib import Status

import modal_app
from engines import modal_cloud
from engines.base import EngineError
from engines.cloud import RESTARTED, ContainerFacts, Rental
from engines.hardware import Hardware
from engines.modal_cloud import ModalCloud, stamped
from tests.loopback import ControlPlane, Failure, Fault, Preemption, Wait, connected, control_plane, current_call

RENTAL = Rental("vllm", "Qwen/Qwen3.5-4B", features='{"prefix_caching": true}', gpu="H100!", gpu_count=2)
FACTS = ContainerFacts(
    "ta-1", Hardware("CPU", 4, 32.0, "NVIDIA H100 80GB HBM3"), 12.5, 3.0, calls=0, region="us-east-1"
)
Test = Callable[[ControlPlane, modal.Client], Coroutine[Any, Any, None]]


async def hello(parameters: dict[str, Any]) -> dict[str, Any]:
    return asdict(FACTS)


def measure(
    *items: str, then: Exception | None = None, pause: float = 0.0
) -> Callable[[dict[str, Any], str], AsyncIterator[str]]:
    """The container's side as modal_app.py has it: its own id first, then what it has to tell."""

    async def handler(parameters: dict[str, Any], order: str) -> AsyncIterator[str]:
        first, *others = stamped(current_call.get().id, items)
        yield first
        for item in others:
            yield item
            await asyncio.sleep(pause)
        if then:
            raise then

    return handler


def on_modal(test: Test) -> Callable[[], None]:
    """Run the test with our app deployed, containers that say hello, and Modal's client connected."""

    @wraps(test)
    def run() -> None:
        async def whole() -> None:
            async with control_plane() as (plane, url), connected(url) as client:
                await modal_app.app.deploy.aio(client=client)
                plane.handlers["VllmEngine.hello"] = hello
                plane.handlers["VllmEngine.measure"] = measure("one", "two")
                await test(plane, client)

        asyncio.run(whole())

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would take the test's arguments for fixtures
    return run


async def everything(container: Any, order: str = "{}") -> list[str]:
    return [item async for item in container.events(order)]


@on_modal
async def test_a_rental_reaches_modal_as_gpu_parameters_and_options(plane: ControlPlane, client: modal.Client) -> None:
    cloud = ModalCloud(client=client)

    container = await cloud.start(replace(RENTAL, keep_seconds=120), lambda stage: None)
    items = await everything(container)

    assert (container.facts, items) == (FACTS, ["one", "two"])
    variants = {call.variant for call in plane.calls}
    (variant,) = variants
    assert variant.gpu == "H100!:2"
    assert variant.parameters == {
        "model": "Qwen/Qwen3.5-4B",
        "draft_model": "",
        "features": '{"prefix_caching": true}',
    }
    assert variant.function.concurrency_limit == 1
    assert variant.options.task_idle_timeout_secs == 120
    assert [call.name for call in plane.calls] == ["VllmEngine.hello"] * 6 + ["VllmEngine.measure"]
    assert container.network_seconds is not None and 0 < container.network_seconds < 1


@on_modal
async def test_another_configuration_gets_containers_of_its_own(plane: ControlPlane, client: modal.Client) -> None:
    cloud = ModalCloud(client=client)

    for rental in (RENTAL, replace(RENTAL, features="{}"), replace(RENTAL, gpu="L4"), RENTAL):
        await cloud.start(rental, lambda stage: None)

    assert len({call.variant.id for call in plane.calls}) == 3


@on_modal
async def test_a_snapshot_is_another_class(plane: ControlPlane, client: modal.Client) -> None:
    plane.handlers["VllmEngineSnapshot.hello"] = hello

    await ModalCloud(client=client).start(replace(RENTAL, snapshot=True), lambda stage: None)

    assert {call.variant.name for call in plane.calls} == {"VllmEngineSnapshot"}


@on_modal
async def test_the_queue_and_the_container_s_start_are_told_apart(plane: ControlPlane, client: modal.Client) -> None:
    plane.waits["VllmEngine"] = Wait(queued=1.5, starting=1.5)
    stages: list[str] = []

    await ModalCloud(client=client).start(RENTAL, stages.append)

    assert list(dict.fromkeys(stages)) == ["waiting for a GPU", "starting the container"]


@on_modal
async def test_giving_up_in_the_queue_cancels_the_call(plane: ControlPlane, client: modal.Client) -> None:
    plane.waits["VllmEngine"] = Wait(queued=float("inf"))
    waiting = asyncio.ensure_future(ModalCloud(client=client).start(RENTAL, lambda stage: None))
    await asyncio.sleep(1.5)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert [call.cancelled for call in plane.calls] == [True]


@on_modal
async def test_a_gpu_that_never_comes_free_is_given_up(plane: ControlPlane, client: modal.Client) -> None:
    plane.waits["VllmEngine"] = Wait(queued=float("inf"))

    with pytest.raises(EngineError, match=r"No H100:2 came free.*another GPU, or later.*10 GPUs"):
        await ModalCloud(client=client).start(RENTAL, lambda stage: None)
    assert [call.cancelled for call in plane.calls] == [True]


@on_modal
async def test_what_a_container_tells_comes_as_it_is_told(plane: ControlPlane, client: modal.Client) -> None:
    plane.handlers["VllmEngine.measure"] = measure("one", "two", "three", pause=0.3)
    container = await ModalCloud(client=client).start(RENTAL, lambda stage: None)
    loop, moments = asyncio.get_running_loop(), []

    async for _ in container.events("{}"):
        moments.append(loop.time())

    assert len(moments) == 3 and moments[-1] - moments[0] > 0.3  # they were told 0.6 s apart


@pytest.mark.parametrize("read", [0, 1])
def test_closing_the_events_early_ends_the_call_and_its_container(read: int) -> None:
    @on_modal
    async def closed_after_some(plane: ControlPlane, client: modal.Client) -> None:
        plane.handlers["VllmEngine.measure"] = measure(*map(str, range(100)), pause=0.2)
        container = await ModalCloud(client=client).start(RENTAL, lambda stage: None)
        events = container.events("{}")
        reading = asyncio.ensure_future(_read(events, read))
        if read:
            await reading
        else:  # stopped before anything has come
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

        await events.aclose()

        call = plane.calls[-1]
        assert call.name == "VllmEngine.measure" and call.cancelled is True

    closed_after_some()


async def _read(events: AsyncGenerator[str, None], count: int) -> None:
    for _ in range(count or 1):
        await anext(events)


@on_modal
async def test_a_cancelled_reader_ends_the_call(plane: ControlPlane, client: modal.Client) -> None:
    plane.handlers["VllmEngine.measure"] = measure(*map(str, range(100)), pause=0.2)
    container = await ModalCloud(client=client).start(RENTAL, lambda stage: None)
    reading = asyncio.ensure_future(everything(container))
    await asyncio.sleep(0.7)

    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading

    assert plane.calls[-1].cancelled is True


@on_modal
async def test_a_silent_container_is_given_up_and_ended(plane: ControlPlane, client: modal.Client) -> None:
    plane.handlers["VllmEngine.measure"] = measure("one", "two", pause=30.0)
    container = await ModalCloud(client=client).start(RENTAL, lambda stage: None)

    with pytest.raises(EngineError, match=r"Nothing was heard from the container.*modal app logs"):
        await everything(container)

    assert plane.calls[-1].cancelled is True


@on_modal
async def test_a_preempted_container_s_successor_begins_anew(plane: ControlPlane, client: modal.Client) -> None:
    plane.handlers["VllmEngine.measure"] = measure("one", "two", "three")
    plane.preemptions["VllmEngine.measure"] = Preemption(after=3)
    container = await ModalCloud(client=client).start(RENTAL, lambda stage: None)

    items = await everything(container)

    assert items == ["one", "two", RESTARTED, "one", "two", "three"]


@on_modal
async def test_a_successor_whose_beginning_was_dropped_is_a_failure(plane: ControlPlane, client: modal.Client) -> None:
    plane.handlers["VllmEngine.measure"] = measure("one", "two", "three")
    plane.preemptions["VllmEngine.measure"] = Preemption(after=2, numbered_anew=True)
    container = await ModalCloud(client=client).start(RENTAL, lambda stage: None)

    with pytest.raises(EngineError, match=r"took the container away.*Run it again"):
        await everything(container)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Failure("TIMEOUT", "Task's current input hit its timeout of 3600s"), r"longer than a container.*fewer"),
        (
            Failure("FAILURE", "Container killed: out of memory (137)", container_lost=True),
            r"ran out of memory.*more memory",
        ),
        (Failure("INTERNAL_FAILURE", "oops"), r"broke inside Modal \(oops\).*Run it again"),
        (ValueError("a fault of ours"), r"container on Modal failed: ValueError: a fault of ours"),
        (Failure("TERMINATED"), r"container on Modal failed"),
    ],
    ids=["time-out", "memory", "internal", "exception", "terminated"],
)
def test_a_container_s_failure_is_a_sentence(failure: Exception, words: str) -> None:
    @on_modal
    async def failing(plane: ControlPlane, client: modal.Client) -> None:
        plane.handlers["VllmEngine.measure"] = measure("one", then=failure)
        container = await ModalCloud(client=client).start(RENTAL, lambda stage: None)
        with pytest.raises(EngineError, match=words):  # it may overtake what was told just before it
            await everything(container)

    failing()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(Status.UNAUTHENTICATED, "Token validation failed"), r"does not accept this token.*modal token new"),
        (Fault(Status.RESOURCE_EXHAUSTED, "no more"), r"all the GPUs that its plan allows.*modal app list"),
        (Fault(Status.PERMISSION_DENIED, "not yours"), r"may not call the app"),
        (Fault(Status.UNAVAILABLE, "nobody home"), r"cannot be reached.*Check the network"),
    ],
    ids=["token", "quota", "permission", "network"],
)
def test_a_refusal_is_a_sentence_with_the_next_step(fault: Fault, words: str) -> None:
    @on_modal
    async def refused(plane: ControlPlane, client: modal.Client) -> None:
        plane.faults["*"] = fault
        with pytest.raises(EngineError, match=words):
            await ModalCloud(client=client).start(RENTAL, lambda stage: None)

    refused()


@on_modal
async def test_an_app_that_was_not_deployed_says_how_to_deploy_it(plane: ControlPlane, client: modal.Client) -> None:
    with pytest.raises(EngineError, match=r"not on Modal yet.*modal deploy modal_app\.py"):
        await ModalCloud("elsewhere", client).start(RENTAL, lambda stage: None)


@on_modal
async def test_a_container_of_another_version_says_so(plane: ControlPlane, client: modal.Client) -> None:
    async def older(parameters: dict[str, Any]) -> dict[str, Any]:
        return {**asdict(FACTS), "wire_version": 0}

    plane.handlers["VllmEngine.hello"] = older
    with pytest.raises(EngineError, match=r"another version.*Deploy it again"):
        await ModalCloud(client=client).start(RENTAL, lambda stage: None)


@on_modal
async def test_running_containers_are_counted_and_let_go(plane: ControlPlane, client: modal.Client) -> None:
    cloud = ModalCloud(client=client)
    assert await cloud.running(RENTAL) == 0

    await cloud.start(RENTAL, lambda stage: None)
    assert await cloud.running(RENTAL) == 1

    await cloud.let_go(RENTAL)
    assert plane.calls[0].variant.function.autoscaler_settings.scaledown_window == 2


@on_modal
async def test_prices_are_the_account_s_own_where_they_are_told(plane: ControlPlane, client: modal.Client) -> None:
    plane.rates = {"gpu_l4": "0.000230", "gpu_h100": "4.10", "cpu": "0.0000140"}

    rates = await ModalCloud(client=client).rates()

    assert rates.gpus["L4"] == pytest.approx(0.00023)  # it was told per second
    assert rates.gpus["H100"] == pytest.approx(4.10 / 3600)  # and this per hour
    assert rates.core == pytest.approx(0.000014)
    assert rates.source == "Modal's prices for this account today"


@on_modal
async def test_prices_are_the_dated_table_s_where_the_account_s_cannot_be_had(
    plane: ControlPlane, client: modal.Client
) -> None:
    plane.faults["WorkspaceBillingRates"] = Fault(Status.PERMISSION_DENIED, "not yours to see")

    rates = await ModalCloud(client=client).rates()

    assert rates.gpus["L4"] == pytest.approx(0.80 / 3600) and "list prices of" in rates.source


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of minutes would be waited for."""
    monkeypatch.setattr(modal_cloud, "LOOK_SECONDS", 0.3)
    monkeypatch.setattr(modal_cloud, "QUEUE_LIMIT_SECONDS", 5.0)
    monkeypatch.setattr(modal_cloud, "SILENCE_LIMIT_SECONDS", 3.0)
