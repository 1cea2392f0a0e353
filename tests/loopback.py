"""Modal's control plane on 127.0.0.1, just big enough that the real `modal` client deploys to it and calls it.

The client is the real one; what a container does is up to the test: `plane.handlers["VllmEngine.hello"]` runs in its
place. Nothing is built, no code of the deployed app runs, and no address but the loopback one is used.

It stands on private modules of modal (`modal_proto`, `modal._serialization`, `modal._utils.grpc_testing`), none of
which promise to stay as they are: hence the exact pin of modal (1.6.4) in the requirements.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import hashlib
import inspect
import itertools
import math
import os
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpclib.events
import grpclib.server
import modal
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal._serialization import deserialize_data_format, deserialize_params, pickle_exception, serialize
from modal._utils.grpc_testing import patch_mock_servicer
from modal_proto import api_grpc
from modal_proto import api_pb2 as proto

TOKEN = ("ak-loopback", "as-loopback")
GPUS = set("T4 L4 A10 L40S A100 A100-40GB A100-80GB RTX-PRO-6000 H100 H100! H200 B200 B200+ B300".split())
BUILDER = "2025.06"
DEFAULT_SCALEDOWN = 60.0
# On Modal, a spawned call's arguments beyond 8 KiB are uploaded to a blob store first; there is none here.
LARGEST_ARGUMENTS = 64 * 1024 * 1024
# A generator's ending may overtake its last items on Modal. Here it waits for them, but not for a reader that is gone.
ITEMS_FIRST_SECONDS = 1.0
ENVIRONMENT = proto.EnvironmentMetadata(name="main", settings=proto.EnvironmentSettings(image_builder_version=BUILDER))
ALWAYS = {
    "AppClientDisconnect": Empty(),
    "AppHeartbeat": Empty(),
    "ClientHello": proto.ClientHelloResponse(),
    "EnvironmentGetOrCreate": proto.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=ENVIRONMENT),
    "MountBatchedCheckExistence": proto.MountBatchedCheckExistenceResponse(),
    "MountPutFile": proto.MountPutFileResponse(exists=True),
    "WorkspaceNameLookup": proto.WorkspaceNameLookupResponse(username="loopback"),
}


class Failure(Exception):
    """Raised by a handler: the call ends as Modal ends it where no exception of the user's code is to blame.

    `status` is the end of a `GENERIC_STATUS_...`: TIMEOUT gives the caller a FunctionTimeoutError with the text,
    INTERNAL_FAILURE an InternalFailure, every other (FAILURE of a container out of memory, say) a RemoteError. With
    `container_lost` the call's container is gone, too.
    """

    def __init__(self, status: str, text: str = "", container_lost: bool = False) -> None:
        super().__init__(text)
        self.status, self.container_lost = status, container_lost


@dataclass
class Fault:
    """An error of the control plane itself. The client tries again thrice, within a second, where it is UNAVAILABLE."""

    status: Status
    text: str = ""
    times: float = math.inf


@dataclass
class Wait:
    """How long a call that finds no container waits: for a place (no runner), then while it starts (one runner)."""

    queued: float = 0.0
    starting: float = 0.0


@dataclass
class Preemption:
    """The next call of a generator is interrupted after so many items, and its handler starts once more.

    The client sees the items of both starts. With `numbered_anew` the second numbers its items from 1 again, as the
    container's half of modal does, and the client drops the numbers that it has already seen.
    """

    after: int
    numbered_anew: bool = False


@dataclass(eq=False)
class Container:
    started: bool = False
    calls: int = 1
    idle: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class Variant:
    """A pool of containers: a class or function (`name`) of an app, with options and parameters of its own.

    `function` is the deployed definition with the options applied; `options` is what `with_options` sent.
    """

    id: str
    app: str
    function: proto.Function
    options: proto.FunctionOptions = field(default_factory=proto.FunctionOptions)
    parameters: dict[str, Any] = field(default_factory=dict)
    containers: list[Container] = field(default_factory=list)
    queued: int = 0

    @property
    def name(self) -> str:
        return self.function.function_name.removesuffix(".*")

    @property
    def gpu(self) -> str:
        """As it is written in code: "H100!", "A100-80GB:2", or "" for none."""
        asked = self.function.resources.gpu_config
        return f"{asked.gpu_type}:{asked.count}".removesuffix(":1") if asked.count else ""

    def container_with_room(self) -> Container | None:
        most = self.function.max_concurrent_inputs or 1
        return next((container for container in self.containers if container.started and container.calls < most), None)

    def may_start_another(self) -> bool:
        return len(self.containers) + self.queued < (self.function.concurrency_limit or math.inf)


@dataclass(eq=False)
class Call:
    """One call of a handler, whose key is `name`. `stage`: queued, starting, running, ended.

    `cancelled` is None until a cancel arrives, then whether that asked to terminate the containers. `starts` counts
    the handler's starts, `items` are what a generator has yielded, over all starts.
    """

    id: str
    name: str
    variant: Variant
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    stage: str = "queued"
    starts: int = 0
    items: list[Any] = field(default_factory=list)
    cancelled: bool | None = None
    container: Container | None = None
    output: proto.FunctionGetOutputsItem | None = None
    chunks: list[proto.DataChunk] = field(default_factory=list)
    delivered: int = 0
    task: Any = None


current_call: contextvars.ContextVar[Call] = contextvars.ContextVar("current_call")
"""A handler's own call, as `modal.current_function_call_id()` tells a container."""


def answered(plane: type) -> type:
    """Make an RPC of each method that is named like one and answers a `request`, at once or when awaited."""

    def unary(answer: Callable[[Any, Any], Any]) -> Any:
        async def method(plane: ControlPlane, stream: Any) -> None:
            answered = answer(plane, await stream.recv_message())
            await stream.send_message(await answered if inspect.isawaitable(answered) else answered)

        return method

    for name, method in tuple(vars(plane).items()):
        if name[0].isupper() and "request" in inspect.signature(method).parameters:
            setattr(plane, name, unary(method))
    for name, answer in ALWAYS.items():
        setattr(plane, name, unary(lambda plane, request, answer=answer: answer))
    return plane


@patch_mock_servicer
@answered
class ControlPlane(api_grpc.ModalClientBase):
    """What a test sets, then what has happened. From another thread, touch these attributes only."""

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[..., Any]] = {}  # by "Class.method", or a function's name
        self.waits: dict[str, Wait] = {}  # by class or function
        self.preemptions: dict[str, Preemption] = {}  # by "Class.method"
        self.faults: dict[str, Fault] = {}  # by RPC, or "*"
        self.token: tuple[str, str] | None = None  # the only one let in; None lets all in
        self.build_failure = ""  # what every image build fails with
        self.named_secrets: dict[str, set[str]] = {}  # the workspace's secrets: their keys
        self.rates = {"gpu_h100": "0.001", "gpu_a100_80gb": "0.0007", "cpu": "0.00001", "memory": "0.000002"}

        self.apps: dict[str, proto.AppPublishRequest] = {}  # by name
        self.functions: dict[str, proto.Function] = {}  # by tag
        self.images: dict[str, proto.Image] = {}
        self.volumes: dict[str, str] = {}  # id by name
        self.secrets: dict[str, set[str]] = {}  # keys by id
        self.variants: dict[str, Variant] = {}  # by function id, unbound ones too
        self.calls: list[Call] = []
        self.requests: list[str] = []  # the RPCs' names
        self._numbers = itertools.count(1)
        self._changed = asyncio.Event()

    def image_layers(self, function: proto.Function) -> list[proto.Image]:
        """The function's image and all that it stands on, the lowest first."""
        layers: list[proto.Image] = []
        below = function.image_id
        while below:
            layers.insert(0, self.images[below])
            below = layers[0].base_images[0].image_id if layers[0].base_images else ""
        return layers

    def dockerfile(self, function: proto.Function) -> list[str]:
        """Every command that builds the function's image, in order."""
        return [command for layer in self.image_layers(function) for command in layer.dockerfile_commands]

    def mounted_volumes(self, function: proto.Function) -> dict[str, str]:
        """Volume names by the path that they are mounted at."""
        names = {identity: name for name, identity in self.volumes.items()}
        return {mount.mount_path: names[mount.volume_id] for mount in function.volume_mounts}

    def secret_keys(self, function: proto.Function) -> set[str]:
        """The environment variables that the function's secrets set."""
        return set().union(*(self.secrets[identity] for identity in function.secret_ids))

    def containers(self, app: str) -> list[Container]:
        """Those of the app that run or start."""
        return [one for variant in self.variants.values() if variant.app == app for one in variant.containers]

    async def check_request(self, event: grpclib.events.RecvRequest) -> None:
        """Note the RPC; raise GRPCError where the token is wrong or a fault is set."""
        name = event.method_name.rpartition("/")[2]
        self.requests.append(name)
        sent = (event.metadata.get("x-modal-token-id"), event.metadata.get("x-modal-token-secret"))
        if self.token and sent != self.token:
            raise GRPCError(Status.UNAUTHENTICATED, "Token validation failed")
        fault = self.faults.get(name) or self.faults.get("*")
        if fault and fault.times > 0:
            fault.times -= 1
            raise GRPCError(fault.status, fault.text)

    def _identity(self, prefix: str) -> str:
        return f"{prefix}-{next(self._numbers)}"

    def _tick(self) -> None:
        """Wake everyone who waits for something to change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _until(self, ready: Callable[[], Any], seconds: float | None = None) -> bool:
        """Whether it became so in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not ready():
                    await self._changed.wait()
        return bool(ready())

    # Calls and containers.

    async def _work(self, call: Call) -> None:
        status, ending, lost, form = "SUCCESS", {}, False, proto.DATA_FORMAT_PICKLE
        try:
            call.container = await self._container(call)
            call.stage = "running"
            self._tick()
            ending["data"], form = await self._handle(call)
        except asyncio.CancelledError:
            status, lost = "TERMINATED", bool(call.cancelled)  # a container reports it so, without a word
        except Failure as failure:
            status, lost, ending["exception"] = failure.status, failure.container_lost, str(failure)
        except Exception as error:
            data, status = pickle_exception(error), "FAILURE"
            ending = {"exception": repr(error), "traceback": traceback.format_exc(), "data": data}
        if call.container:
            self._leave(call.variant, call.container, lost)
        result = proto.GenericResult(status=f"GENERIC_STATUS_{status}", **ending)
        call.output, call.stage = proto.FunctionGetOutputsItem(result=result, data_format=form), "ended"
        self._tick()

    async def _container(self, call: Call) -> Container:
        """A place for the call in one of its variant's containers, as soon as there is one."""
        variant, wait = call.variant, self.waits.get(call.variant.name, Wait())
        await self._until(lambda: variant.container_with_room() or variant.may_start_another())
        if container := variant.container_with_room():
            container.calls += 1
            if container.idle:
                container.idle.cancel()
            return container
        variant.queued += 1
        try:
            await asyncio.sleep(wait.queued)
        finally:
            variant.queued -= 1
        container, call.stage = Container(), "starting"
        variant.containers.append(container)
        try:
            await asyncio.sleep(wait.starting)
        except asyncio.CancelledError:
            self._drop(variant, container)
            raise
        container.started = True
        return container

    def _leave(self, variant: Variant, container: Container, lost: bool) -> None:
        container.calls -= 1
        if lost:
            self._drop(variant, container)
        elif not container.calls:
            window = variant.function.task_idle_timeout_secs or DEFAULT_SCALEDOWN
            container.idle = asyncio.get_running_loop().call_later(window, self._drop, variant, container)

    def _drop(self, variant: Variant, container: Container) -> None:
        if container in variant.containers:
            variant.containers.remove(container)
        self._tick()

    async def _handle(self, call: Call) -> tuple[bytes, int]:
        """Run the handler, a preempted generator's twice; the call's result and its format on the wire."""
        current_call.set(call)
        if call.name not in self.handlers:
            raise Failure("FAILURE", f"the test has no handler for {call.name}")
        index, preemption = 0, self.preemptions.pop(call.name, None)
        while True:
            call.starts += 1
            answer = self.handlers[call.name](call.variant.parameters, *call.arguments, **call.keywords)
            if not hasattr(answer, "__aiter__"):
                return serialize(await answer), proto.DATA_FORMAT_PICKLE
            async with contextlib.aclosing(answer):
                async for item in answer:
                    index += 1
                    call.items.append(item)
                    chunk = proto.DataChunk(data_format=proto.DATA_FORMAT_PICKLE, data=serialize(item), index=index)
                    call.chunks.append(chunk)
                    self._tick()
                    await asyncio.sleep(0)  # each item leaves before the next is made
                    if preemption and index == preemption.after:
                        break
                else:
                    done = proto.GeneratorDone(items_total=index)
                    return done.SerializeToString(), proto.DATA_FORMAT_GENERATOR_DONE
            index, preemption = 0 if preemption.numbered_anew else index, None

    def _call(self, request: Any) -> Call:
        return _found({call.id: call for call in self.calls}, request.function_call_id, "Function call")

    def FunctionMap(self, request: proto.FunctionMapRequest) -> proto.FunctionMapResponse:
        variant, (item,) = self.variants[request.function_id], request.pipelined_inputs
        arguments, keywords = deserialize_data_format(item.input.args, item.input.data_format, None)
        name = f"{variant.name}.{item.input.method_name}".removesuffix(".")
        call = Call(self._identity("fc"), name, variant, arguments, keywords)
        self.calls.append(call)
        call.task = asyncio.create_task(self._work(call), name=call.id)
        answered = proto.FunctionPutInputsResponseItem(input_id=self._identity("in"), input_jwt="none")
        return proto.FunctionMapResponse(function_call_id=call.id, pipelined_inputs=[answered])

    async def FunctionGetOutputs(self, request: proto.FunctionGetOutputsRequest) -> proto.FunctionGetOutputsResponse:
        call = self._call(request)
        if not await self._until(lambda: call.output, request.timeout):
            return proto.FunctionGetOutputsResponse(num_unfinished_inputs=1)
        await self._until(lambda: call.delivered == len(call.chunks), ITEMS_FIRST_SECONDS)
        return proto.FunctionGetOutputsResponse(outputs=[call.output])

    async def FunctionCallGetDataOut(self, stream: Any) -> None:
        request = await stream.recv_message()
        call, position = self._call(request), 0
        while True:  # until the reader leaves: the client asks again at once where a stream ends
            while position == len(call.chunks):
                await self._changed.wait()
            chunk, position = call.chunks[position], position + 1
            if chunk.index > request.last_index:
                await stream.send_message(chunk)
            call.delivered = max(call.delivered, position)
            self._tick()

    def FunctionCallCancel(self, request: proto.FunctionCallCancelRequest) -> Empty:
        call = self._call(request)
        call.cancelled = request.terminate_containers
        call.task.cancel()
        return Empty()

    def FunctionUpdateSchedulingParams(
        self, request: proto.FunctionUpdateSchedulingParamsRequest
    ) -> proto.FunctionUpdateSchedulingParamsResponse:
        self.variants[request.function_id].function.autoscaler_settings.CopyFrom(request.settings)
        return proto.FunctionUpdateSchedulingParamsResponse()

    def FunctionGetCurrentStats(self, request: proto.FunctionGetCurrentStatsRequest) -> proto.FunctionStats:
        variant = self.variants[request.function_id]
        stages = [call.stage for call in self.calls if call.variant is variant]
        backlog, running = stages.count("queued") + stages.count("starting"), stages.count("running")
        return proto.FunctionStats(backlog=backlog, num_total_tasks=len(variant.containers), num_running_inputs=running)

    # Looking up what is deployed.

    def _app(self, name: str) -> proto.AppPublishRequest:
        return _found({**self.apps, **{app.app_id: app for app in self.apps.values()}}, name, "App")

    def FunctionGet(self, request: proto.FunctionGetRequest) -> proto.FunctionGetResponse:
        identity = _found(self._app(request.app_name).function_ids, request.object_tag, "Function")
        function = self.variants[identity].function
        about, data = _handle(function), _function_data([function])
        return proto.FunctionGetResponse(function_id=identity, handle_metadata=about, function=data)

    def ClassGet(self, request: proto.ClassGetRequest) -> proto.ClassGetResponse:
        identity = _found(self._app(request.app_name).class_ids, request.object_tag, "Cls")
        return proto.ClassGetResponse(class_id=identity)

    def FunctionBindParams(self, request: proto.FunctionBindParamsRequest) -> proto.FunctionBindParamsResponse:
        base, identity = self.variants[request.function_id], _digest("fu", request)
        _, parameters = deserialize_params(request.serialized_params, base.function, None)
        function = _with_options(base.function, request.function_options)
        _refuse_unknown_gpu(function)
        # The same options and parameters are the same pool, whoever asks; a new deployment changes what it runs.
        new = Variant(identity, base.app, function, request.function_options, parameters)
        self.variants.setdefault(identity, new).function = function
        return proto.FunctionBindParamsResponse(bound_function_id=identity, handle_metadata=_handle(base.function))

    def AppGetByDeploymentName(self, request: proto.AppGetByDeploymentNameRequest) -> Any:
        known = self.apps.get(request.name, proto.AppPublishRequest())
        return proto.AppGetByDeploymentNameResponse(app_id=known.app_id)

    def AppGetLayout(self, request: proto.AppGetLayoutRequest) -> proto.AppGetLayoutResponse:
        app = self._app(request.app_id)
        layout = proto.AppLayout(function_ids=app.function_ids, class_ids=app.class_ids)
        return proto.AppGetLayoutResponse(app_layout=layout)

    def AppGetOrCreate(self, request: proto.AppGetOrCreateRequest) -> proto.AppGetOrCreateResponse:
        app, lifecycle = self._app(request.app_name), proto.AppLifecycle(app_state=proto.APP_STATE_DEPLOYED)
        about = proto.AppHandleMetadata(description=app.name, functions=app.function_ids, lifecycle=lifecycle)
        return proto.AppGetOrCreateResponse(app_id=app.app_id, handle_metadata=about)

    def AppList(self, request: proto.AppListRequest) -> proto.AppListResponse:
        listed, state = proto.AppListResponse(), proto.APP_STATE_DEPLOYED
        for app in self.apps.values():
            running = len(self.containers(app.name))
            listed.apps.add(app_id=app.app_id, description=app.name, state=state, n_running_tasks=running)
        return listed

    def WorkspaceBillingRates(self, request: Any) -> proto.WorkspaceBillingRatesResponse:
        return proto.WorkspaceBillingRatesResponse(rates=self.rates, formatted=str(self.rates))

    # Deploying.

    def AppPublish(self, request: proto.AppPublishRequest) -> proto.AppPublishResponse:
        self.apps[request.name] = request
        return proto.AppPublishResponse(url="https://loopback.invalid/app", deployed_at=time.time())

    def FunctionPrecreate(self, request: proto.FunctionPrecreateRequest) -> proto.FunctionPrecreateResponse:
        identity = request.existing_function_id or self._identity("fu")
        return proto.FunctionPrecreateResponse(function_id=identity, handle_metadata=_handle(request))

    def FunctionCreate(self, request: proto.FunctionCreateRequest) -> proto.FunctionCreateResponse:
        ranked = [one.function for one in request.function_data.ranked_functions] or [request.function]
        for function in ranked:
            _refuse_unknown_gpu(function)
        function, identity = ranked[0], request.existing_function_id or self._identity("fu")
        self.functions[function.function_name] = function
        self.variants.setdefault(identity, Variant(identity, function.app_name, function)).function = function
        about, data = _handle(function), _function_data(ranked)
        return proto.FunctionCreateResponse(function_id=identity, function_data=data, handle_metadata=about)

    def ImageGetOrCreate(self, request: proto.ImageGetOrCreateRequest) -> proto.ImageGetOrCreateResponse:
        identity, about = _digest("im", request.image), proto.ImageMetadata(image_builder_version=BUILDER)
        self.images[identity] = request.image
        status = "GENERIC_STATUS_FAILURE" if self.build_failure else "GENERIC_STATUS_SUCCESS"
        result = proto.GenericResult(status=status, exception=self.build_failure)
        return proto.ImageGetOrCreateResponse(image_id=identity, metadata=about, result=result)

    def VolumeGetOrCreate(self, request: proto.VolumeGetOrCreateRequest) -> proto.VolumeGetOrCreateResponse:
        name, about = request.deployment_name, proto.VolumeMetadata(version=request.version)
        if request.object_creation_type == proto.OBJECT_CREATION_TYPE_UNSPECIFIED:
            _found(self.volumes, name, "Volume")
        identity = self.volumes.setdefault(name, self._identity("vo"))
        return proto.VolumeGetOrCreateResponse(volume_id=identity, version=request.version, metadata=about)

    def SecretGetOrCreate(self, request: proto.SecretGetOrCreateRequest) -> proto.SecretGetOrCreateResponse:
        by_name = request.object_creation_type == proto.OBJECT_CREATION_TYPE_UNSPECIFIED
        keys = _found(self.named_secrets, request.deployment_name, "Secret") if by_name else set(request.env_dict)
        identity = self._identity("st")
        self.secrets[identity] = keys
        return proto.SecretGetOrCreateResponse(secret_id=identity)

    def MountGetOrCreate(self, request: Any) -> proto.MountGetOrCreateResponse:
        about = proto.MountHandleMetadata(content_checksum_sha256_hex="00")
        return proto.MountGetOrCreateResponse(mount_id=self._identity("mo"), handle_metadata=about)

    def AppCreate(self, request: proto.AppCreateRequest) -> proto.AppCreateResponse:
        return proto.AppCreateResponse(app_id=self._identity("ap"))

    def ClassCreate(self, request: proto.ClassCreateRequest) -> proto.ClassCreateResponse:
        return proto.ClassCreateResponse(class_id=request.existing_class_id or self._identity("cs"))


def _found(known: dict[str, Any], name: str, kind: str) -> Any:
    if name not in known:
        raise GRPCError(Status.NOT_FOUND, f"{kind} '{name}' not found in environment 'main'")
    return known[name]


def _digest(prefix: str, message: Any) -> str:
    return f"{prefix}-{hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()[:12]}"


def _refuse_unknown_gpu(function: proto.Function) -> None:
    asked = function.resources.gpu_config
    if asked.count and asked.gpu_type not in GPUS:
        raise GRPCError(Status.INVALID_ARGUMENT, f"unknown GPU {asked.gpu_type}")


def _with_options(function: proto.Function, options: proto.FunctionOptions) -> proto.Function:
    """The definition that a variant runs with; what the options leave out stays."""
    changed = proto.Function()
    changed.CopyFrom(function)
    changed.resources.MergeFrom(options.resources)
    for name in ("timeout_secs", "task_idle_timeout_secs", "concurrency_limit", "max_concurrent_inputs"):
        if options.HasField(name):
            setattr(changed, name, getattr(options, name))
    for name in ("secret_ids", "volume_mounts"):
        if getattr(options, f"replace_{name}"):
            changed.ClearField(name)
            getattr(changed, name).MergeFrom(getattr(options, name))
    return changed


def _function_data(ranked: list[proto.Function]) -> proto.FunctionData:
    data = proto.FunctionData(function_name=ranked[0].function_name, is_class=ranked[0].is_class)
    for rank, function in enumerate(ranked):
        data.ranked_functions.add(rank=rank, function=function)
    return data


def _handle(defined: Any, method: str = "") -> proto.FunctionHandleMetadata:
    """What a client learns about a function (its definition, or the request before that) or one of its methods."""
    about = proto.FunctionHandleMetadata(
        function_name=defined.function_name,
        function_type=defined.function_type,
        supported_input_formats=defined.supported_input_formats,
        supported_output_formats=defined.supported_output_formats,
        use_method_name=method,
        is_method=bool(method),
        max_object_size_bytes=LARGEST_ARGUMENTS,
        max_async_object_size_bytes=LARGEST_ARGUMENTS,
        web_url=f"https://{defined.function_name}.loopback.invalid" if defined.webhook_config.type else "",
    )
    if isinstance(defined, proto.Function):
        about.class_parameter_info.CopyFrom(defined.class_parameter_info)
    for name, part in getattr(defined, "method_definitions", {}).items():
        about.method_handle_metadata[name].CopyFrom(_handle(part, name))
    return about


def connected(url: str, token: tuple[str, str] = TOKEN) -> modal.Client:
    """A client of the control plane at the address; enter it with `async with`, or `with` outside of async code."""
    return modal.Client(url, proto.CLIENT_TYPE_CLIENT, token)


def client_environment(url: str, token: tuple[str, str] = TOKEN) -> dict[str, str]:
    """The variables that point a `modal` command, or a client from the environment, at the address."""
    settings = {"MODAL_SERVER_URL": url, "MODAL_TOKEN_ID": token[0], "MODAL_TOKEN_SECRET": token[1]}
    return {**settings, "MODAL_CONFIG_PATH": os.devnull}  # whatever the developer's own account is, it is not used


@contextlib.asynccontextmanager
async def control_plane() -> AsyncIterator[tuple[ControlPlane, str]]:
    """A control plane on this event loop, and its address. Block the loop, and nobody answers the client."""
    plane = ControlPlane()
    server = grpclib.server.Server([plane])
    grpclib.events.listen(server, grpclib.events.RecvRequest, plane.check_request)
    await server.start("127.0.0.1", 0)
    try:
        assert server._server is not None
        yield plane, f"http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}"
    finally:
        for call in plane.calls:
            call.task.cancel()
        await asyncio.gather(*(call.task for call in plane.calls), return_exceptions=True)
        server.close()
        await server.wait_closed()


@contextlib.contextmanager
def running_control_plane() -> Iterator[tuple[ControlPlane, str]]:
    """The same on an event loop and thread of its own, for synchronous code and for commands in other processes."""
    started: concurrent.futures.Future[tuple[Any, ...]] = concurrent.futures.Future()

    async def serve() -> None:
        leave = asyncio.Event()
        async with control_plane() as (plane, url):
            started.set_result((plane, url, asyncio.get_running_loop(), leave))
            await leave.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="control plane", daemon=True)
    thread.start()
    plane, url, loop, leave = started.result(10)
    try:
        yield plane, url
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join(10)
