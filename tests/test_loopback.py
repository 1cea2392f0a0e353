from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any

import modal
import modal.experimental
import pytest
from grpclib import Status
from modal import exception

from tests.loopback import (
    TOKEN,
    ControlPlane,
    Failure,
    Fault,
    Preemption,
    Wait,
    client_environment,
    connected,
    control_plane,
    current_call,
    running_control_plane,
)

APP = "race"
SOURCE = """
import modal

app = modal.App("race")
cache = modal.Volume.from_name("weights", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.11").pip_install("vllm==0.11.2").env({"HF_HUB_CACHE": "/cache"})
)

@app.cls(
    image=image, gpu="A100-80GB", volumes={"/cache": cache}, timeout=1200, scaledown_window=90, max_containers=2,
    secrets=[modal.Secret.from_dict({"HF_TOKEN": "none"})], memory=4096, cpu=2.0, enable_memory_snapshot=True,
    serialized=True,
)
@modal.concurrent(max_inputs=4)
class VllmEngine:
    model: str = modal.parameter()
    features: str = modal.parameter(default="{}")

    @modal.method()
    def hello(self) -> str: ...

    @modal.method()
    def measure(self, order: dict):
        yield

@app.function(gpu=["H100!", "A100-80GB"], min_containers=1, serialized=True)
@modal.asgi_app(requires_proxy_auth=True)
def page(): ...
"""
Test = Callable[[ControlPlane, modal.Client], Coroutine[Any, Any, None]]


def race() -> modal.App:
    defined: dict[str, Any] = {"__name__": "race_app"}
    # Not with this module's `annotations`: modal takes a parameter's type as it is written, and knows no "str".
    exec(compile(SOURCE, "race_app.py", "exec", dont_inherit=True), defined)
    return defined["app"]


def deployed(test: Test) -> Callable[[], None]:
    """Run the test on an event loop of its own, with the race deployed and handlers that answer at once."""

    @wraps(test)
    def run() -> None:
        async def all_of_it() -> None:
            async with control_plane() as (plane, url), connected(url) as client:
                await race().deploy.aio(client=client)
                plane.handlers = {"VllmEngine.hello": hello, "VllmEngine.measure": measure}
                await test(plane, client)

        asyncio.run(asyncio.wait_for(all_of_it(), 15))

    del run.__wrapped__  # else pytest takes the test's own parameters for fixtures
    return run


async def hello(parameters: dict[str, Any]) -> str:
    return f"hello from {parameters['model']}"


async def measure(parameters: dict[str, Any], order: dict[str, Any]) -> AsyncIterator[bytes]:
    for number in range(order["items"]):
        yield b"%d" % number


def engine(client: modal.Client, **options: Any) -> Any:
    found = modal.Cls.from_name(APP, "VllmEngine", client=client)
    return (found.with_options(**options) if options else found)(model="m", features="{}")


async def until(ready: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not ready():
            await asyncio.sleep(0.005)


async def all_items(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


@deployed
async def test_a_deployment_is_kept_whole(plane: ControlPlane, client: modal.Client) -> None:
    found = plane.functions["VllmEngine.*"]
    assert found.resources.gpu_config.gpu_type == "A100-80GB"
    assert (found.resources.memory_mb, found.resources.milli_cpu) == (4096, 2000)
    assert (found.timeout_secs, found.task_idle_timeout_secs, found.concurrency_limit) == (1200, 90, 2)
    assert found.max_concurrent_inputs == 4
    assert found.checkpointing_enabled
    assert plane.secret_keys(found) == {"HF_TOKEN"}
    assert plane.mounted_volumes(found) == {"/cache": "weights"}
    commands = plane.dockerfile(found)
    assert commands[0].startswith("FROM python:3.11")
    assert "vllm==0.11.2" in "\n".join(commands)
    assert commands[-1] == "ENV HF_HUB_CACHE=/cache"
    assert plane.functions["page"].webhook_config.requires_proxy_auth
    assert plane.functions["page"].autoscaler_settings.min_containers == 1
    assert set(plane.apps[APP].function_ids) == {"VllmEngine.*", "page"}
    assert set(plane.apps[APP].class_ids) == {"VllmEngine"}


@deployed
async def test_a_second_deployment_keeps_the_ids(plane: ControlPlane, client: modal.Client) -> None:
    first = plane.apps[APP]
    await race().deploy.aio(client=client)
    assert plane.apps[APP] == first


@deployed
async def test_a_spawned_call_is_answered_by_the_handler(plane: ControlPlane, client: modal.Client) -> None:
    call = await engine(client).hello.spawn.aio()
    assert await call.get.aio(timeout=5) == "hello from m"
    assert plane.calls[0].id == call.object_id
    assert plane.calls[0].variant.parameters == {"model": "m", "features": "{}"}
    assert plane.calls[0].variant.gpu == "A100-80GB"


@deployed
async def test_each_call_knows_the_options_of_its_variant(plane: ControlPlane, client: modal.Client) -> None:
    quick = engine(client, gpu="H100!", scaledown_window=60, max_containers=1, timeout=700)
    await quick.hello.remote.aio()
    await engine(client, gpu="A100-80GB:2").hello.remote.aio()
    await engine(client).hello.remote.aio()
    assert [call.variant.gpu for call in plane.calls] == ["H100!", "A100-80GB:2", "A100-80GB"]
    sent, applied = plane.calls[0].variant.options, plane.calls[0].variant.function
    assert (sent.task_idle_timeout_secs, sent.concurrency_limit, sent.timeout_secs) == (60, 1, 700)
    assert (applied.task_idle_timeout_secs, applied.concurrency_limit, applied.timeout_secs) == (60, 1, 700)
    assert plane.mounted_volumes(applied) == {"/cache": "weights"}


@deployed
async def test_the_same_options_and_parameters_are_the_same_variant(plane: ControlPlane, client: modal.Client) -> None:
    await engine(client, gpu="H100!").hello.remote.aio()
    await engine(client, gpu="H100!").hello.remote.aio()
    first, second = plane.calls
    assert first.variant is second.variant
    assert len(plane.containers(APP)) == 1


@deployed
async def test_an_unknown_gpu_is_refused(plane: ControlPlane, client: modal.Client) -> None:
    with pytest.raises(exception.InvalidError, match="unknown GPU X999"):
        await engine(client, gpu="X999").hello.remote.aio()


@deployed
async def test_large_arguments_arrive(plane: ControlPlane, client: modal.Client) -> None:
    async def echo(parameters: dict[str, Any], text: str, times: int = 1) -> str:
        return text * times

    plane.handlers["VllmEngine.hello"] = echo
    call = await engine(client).hello.spawn.aio("a" * 100_000, times=2)
    assert await call.get.aio() == "a" * 200_000


@deployed
async def test_items_of_a_generator_arrive_one_after_the_other(plane: ControlPlane, client: modal.Client) -> None:
    seen = asyncio.Semaphore(0)

    async def waits_for_its_reader(parameters: dict[str, Any], order: dict[str, Any]) -> AsyncIterator[bytes | str]:
        for item in (b"one", "two", b"three"):
            yield item
            await seen.acquire()

    plane.handlers["VllmEngine.measure"] = waits_for_its_reader
    stream = engine(client).measure.remote_gen.aio({})
    for count, expected in enumerate((b"one", "two", b"three"), start=1):
        assert await anext(stream) == expected
        assert len(plane.calls[0].items) == count
        seen.release()
    assert await all_items(stream) == []


@deployed
async def test_a_call_waits_for_a_place_then_for_its_container(plane: ControlPlane, client: modal.Client) -> None:
    plane.waits["VllmEngine"] = Wait(queued=0.3, starting=0.3)
    measured = engine(client).measure
    seen = []

    async def watch() -> None:
        while True:
            stats = await measured.get_current_stats.aio()
            state = (stats.backlog, stats.num_total_runners, stats.num_running_inputs)
            if not seen or seen[-1] != state:
                seen.append(state)

    watching = asyncio.create_task(watch())
    stream = measured.remote_gen.aio({"items": 1})
    assert await anext(stream) == b"0"
    await until(lambda: seen[-1] == (0, 1, 0))
    watching.cancel()
    assert [state for state in seen if state[0]] == [(1, 0, 0), (1, 1, 0)]
    await stream.aclose()
    await engine(client).hello.remote.aio()
    assert len(plane.containers(APP)) == 1  # still warm


@deployed
async def test_a_call_that_finds_no_place_waits_until_it_is_cancelled(
    plane: ControlPlane, client: modal.Client
) -> None:
    plane.waits["VllmEngine"] = Wait(queued=float("inf"))
    call = await engine(client).hello.spawn.aio()
    with pytest.raises(TimeoutError):
        await call.get.aio(timeout=0.1)
    await call.cancel.aio()
    with pytest.raises(exception.RemoteError):
        await call.get.aio(timeout=5)
    assert (plane.calls[0].starts, plane.calls[0].cancelled, plane.containers(APP)) == (0, False, [])


@deployed
async def test_inputs_beyond_the_largest_pool_wait_for_a_free_container(
    plane: ControlPlane, client: modal.Client
) -> None:
    go = asyncio.Event()

    async def slow(parameters: dict[str, Any]) -> str:
        await go.wait()
        return "done"

    plane.handlers["VllmEngine.hello"] = slow
    plane.waits["VllmEngine"] = Wait(starting=0.4)
    only = engine(client, max_containers=1)
    calls = [await only.hello.spawn.aio() for _ in range(6)]
    assert [call.stage for call in plane.calls] == ["starting"] + 5 * ["queued"]
    await until(lambda: [call.stage for call in plane.calls] == 4 * ["running"] + 2 * ["queued"])
    go.set()
    assert [await call.get.aio() for call in calls] == 6 * ["done"]
    assert len(plane.containers(APP)) == 1


@deployed
async def test_an_idle_container_goes_after_its_window(plane: ControlPlane, client: modal.Client) -> None:
    await engine(client, scaledown_window=2).hello.remote.aio()
    assert len(plane.containers(APP)) == 1
    await until(lambda: not plane.containers(APP))


@deployed
async def test_a_cancel_by_id_ends_the_handler_and_its_container(plane: ControlPlane, client: modal.Client) -> None:
    ended = asyncio.Event()

    async def endless(parameters: dict[str, Any], order: dict[str, Any]) -> AsyncIterator[str]:
        try:
            yield current_call.get().id  # the only way: a generator's caller is never told the id of its call
            await asyncio.Event().wait()
        finally:
            ended.set()

    plane.handlers["VllmEngine.measure"] = endless
    stream = engine(client).measure.remote_gen.aio({})
    identity = await anext(stream)
    (app,) = await modal.experimental.list_deployed_apps.aio(client=client)
    assert (app.name, app.containers) == (APP, 1)
    await modal.FunctionCall.from_id(identity, client=client).cancel.aio(terminate_containers=True)
    with pytest.raises(exception.RemoteError):
        await anext(stream)
    assert ended.is_set()
    assert plane.calls[0].cancelled is True
    (app,) = await modal.experimental.list_deployed_apps.aio(client=client)
    assert app.containers == 0


@deployed
async def test_a_reader_that_stops_does_not_cancel_the_call(plane: ControlPlane, client: modal.Client) -> None:
    go = asyncio.Event()

    async def patient(parameters: dict[str, Any], order: dict[str, Any]) -> AsyncIterator[int]:
        yield 1
        await go.wait()
        yield 2

    plane.handlers["VllmEngine.measure"] = patient
    stream = engine(client).measure.remote_gen.aio({})
    assert await anext(stream) == 1
    await stream.aclose()
    await asyncio.sleep(0.1)
    assert plane.calls[0].stage == "running"
    assert "FunctionCallCancel" not in plane.requests
    go.set()
    await until(lambda: plane.calls[0].stage == "ended")
    assert plane.calls[0].items == [1, 2]


class TooLong(Exception):
    pass


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (TooLong("4097 tokens"), TooLong, "4097 tokens"),
        (Failure("TIMEOUT", "input took too long"), exception.FunctionTimeoutError, "input took too long"),
        (Failure("INTERNAL_FAILURE", "worker lost"), exception.InternalFailure, "worker lost"),
        (Failure("FAILURE", "out of memory", container_lost=True), exception.RemoteError, "out of memory"),
        (Failure("TERMINATED"), exception.RemoteError, ""),
    ],
)
def test_a_handler_s_failure_is_the_caller_s_exception(
    raised: Exception, expected: type[Exception], message: str
) -> None:
    async def failing(parameters: dict[str, Any]) -> None:
        raise raised

    async def failing_midway(parameters: dict[str, Any], order: dict[str, Any]) -> AsyncIterator[int]:
        yield 1
        raise raised

    @deployed
    async def check(plane: ControlPlane, client: modal.Client) -> None:
        plane.handlers = {"VllmEngine.hello": failing, "VllmEngine.measure": failing_midway}
        call = await engine(client).hello.spawn.aio()
        with pytest.raises(expected) as caught:
            await call.get.aio(timeout=5)
        assert (type(caught.value), str(caught.value)) == (expected, message)
        assert len(plane.containers(APP)) == (0 if getattr(raised, "container_lost", False) else 1)
        stream = engine(client).measure.remote_gen.aio({})
        assert await anext(stream) == 1
        with pytest.raises(expected):
            await anext(stream)

    check()


@pytest.mark.parametrize(
    ("numbered_anew", "expected"), [(False, [b"0", b"1", b"0", b"1", b"2"]), (True, [b"0", b"1", b"2"])]
)
def test_a_preempted_generator_starts_twice(numbered_anew: bool, expected: list[bytes]) -> None:
    @deployed
    async def check(plane: ControlPlane, client: modal.Client) -> None:
        plane.preemptions["VllmEngine.measure"] = Preemption(after=2, numbered_anew=numbered_anew)
        measured = engine(client).measure
        assert await all_items(measured.remote_gen.aio({"items": 3})) == expected
        assert await all_items(measured.remote_gen.aio({"items": 3})) == [b"0", b"1", b"2"]
        assert [call.starts for call in plane.calls] == [2, 1]

    check()


@deployed
async def test_a_wrong_token_is_told_at_the_first_use(plane: ControlPlane, client: modal.Client) -> None:
    plane.token = TOKEN
    await engine(client).hello.remote.aio()
    plane.token = ("ak-other", "as-other")
    with pytest.raises(exception.AuthError, match="Token validation failed"):
        await engine(client).hello.remote.aio()


@deployed
async def test_what_is_not_deployed_is_told_at_the_first_use(plane: ControlPlane, client: modal.Client) -> None:
    nowhere = modal.Cls.from_name("nowhere", "VllmEngine", client=client)(model="m").hello
    with pytest.raises(exception.NotFoundError) as caught:
        await nowhere.spawn.aio()
    assert str(caught.value) == (
        "Lookup failed for Cls 'VllmEngine' from the 'nowhere' app: App 'nowhere' not found in environment 'main'."
    )
    with pytest.raises(exception.NotFoundError, match="'SglangEngine' from the 'race' app"):
        await modal.Cls.from_name(APP, "SglangEngine", client=client)().hello.spawn.aio()
    with pytest.raises(exception.NotFoundError, match="no method"):
        await engine(client).goodbye.spawn.aio()
    with pytest.raises(exception.NotFoundError, match="fc-404"):
        await modal.FunctionCall.from_id("fc-404", client=client).cancel.aio()


@deployed
async def test_faults_of_the_control_plane_are_the_client_s_exceptions(
    plane: ControlPlane, client: modal.Client
) -> None:
    plane.faults["FunctionMap"] = Fault(Status.RESOURCE_EXHAUSTED, "too many inputs")
    with pytest.raises(exception.ResourceExhaustedError, match="too many inputs"):
        await engine(client).hello.spawn.aio()
    plane.faults["FunctionMap"] = Fault(Status.UNAVAILABLE, "try later", times=2)
    assert await engine(client).hello.remote.aio() == "hello from m"
    plane.faults["*"] = Fault(Status.UNAVAILABLE, "try later")
    with pytest.raises(exception.ServiceError, match="try later"):
        await engine(client).hello.spawn.aio()


@deployed
async def test_the_workspace_s_rates(plane: ControlPlane, client: modal.Client) -> None:
    workspace = modal.Workspace.from_context(client=client)
    rates = await workspace.billing.rates.aio()
    assert {name: str(rate) for name, rate in rates.items()} == {**plane.rates, "cpu": "0.00001"}
    plane.faults["WorkspaceBillingRates"] = Fault(Status.PERMISSION_DENIED, "owners only")
    with pytest.raises(exception.PermissionDeniedError, match="owners only"):
        await workspace.billing.rates.aio()


@deployed
async def test_an_app_is_looked_up_by_its_name(plane: ControlPlane, client: modal.Client) -> None:
    assert (await modal.App.lookup.aio(APP, client=client)).app_id == plane.apps[APP].app_id
    with pytest.raises(exception.NotFoundError):
        await modal.App.lookup.aio("nowhere", client=client)


def test_a_deployment_fails_where_an_image_a_secret_or_a_volume_does() -> None:
    async def deploy(plane: ControlPlane, client: modal.Client, **settings: Any) -> None:
        app = modal.App("small")
        app.function(serialized=True, name="nothing", **settings)(lambda: None)
        await app.deploy.aio(client=client)

    async def check() -> None:
        async with control_plane() as (plane, url), connected(url) as client:
            secret, volume = modal.Secret.from_name("hugging-face"), modal.Volume.from_name("weights")
            with pytest.raises(exception.NotFoundError, match="hugging-face"):
                await deploy(plane, client, secrets=[secret])
            with pytest.raises(exception.NotFoundError, match="weights"):
                await deploy(plane, client, volumes={"/weights": volume})
            plane.named_secrets["hugging-face"] = {"HF_TOKEN"}
            await deploy(plane, client, secrets=[secret])
            assert plane.secret_keys(plane.functions["nothing"]) == {"HF_TOKEN"}
            plane.build_failure = "no matching distribution"
            with pytest.raises(exception.RemoteError, match="no matching distribution"):
                await deploy(plane, client, image=modal.Image.debian_slim().pip_install("no-such-package"))

    asyncio.run(check())


def test_the_command_line_deploys_and_a_synchronous_client_calls(tmp_path: Path) -> None:
    (tmp_path / "race_app.py").write_text(SOURCE)
    with running_control_plane() as (plane, url):
        plane.token = TOKEN
        plane.handlers = {"VllmEngine.hello": hello, "VllmEngine.measure": measure}
        command = [sys.executable, "-m", "modal", "deploy", "race_app.py"]
        environment = {**os.environ, **client_environment(url)}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        command = [sys.executable, "-m", "modal", "app", "list", "--json"]
        with connected(url) as client:
            assert engine(client).hello.remote() == "hello from m"
            assert list(engine(client).measure.remote_gen({"items": 2})) == [b"0", b"1"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert plane.apps[APP].app_id in ran.stdout
        environment["MODAL_TOKEN_SECRET"] = "as-wrong"
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 1
        assert "Token validation failed" in ran.stdout + ran.stderr
