"""What a frame of the page costs: with fifty visitors, each of whom gets ten a second, nothing may be done in vain."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import gradio as gr
from gradio.blocks import BlocksConfig
from starlette.datastructures import Headers

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEFT_AS_IT_IS = gr.skip()
# Each who watches or waits in line holds one of Gradio's places, of which there are 40 unless told.
VISITORS_AT_ONCE = 400
# What Gradio keeps of a page, 0.8 MB, stays for an hour after it was closed; so many are kept, the latest used.
SESSIONS_KEPT = 250
# The page's document, 0.9 MB, is the same for all who see it under one address; so many addresses are remembered.
DOCUMENTS_KEPT = 8
WHAT_MAKES_AN_ADDRESS = ("host", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-gradio-server")
QUERIES_GRADIO_READS = {"deep_link", "page"}
# Objects made before Python looks for circles of them: by default every 700, and among millions of recorded arrivals
# one such look held all streams up for a second.
LOOK_FOR_CIRCLES = (20_000, 20, 20)


def for_another(frame: dict[Any, Any]) -> dict[Any, Any]:
    """A frame that several visitors get. Gradio takes the value out of an update as it sends it, so that the second one
    would find none: each gets updates of its own."""
    return {part: dict(told) if isinstance(told, dict) else told for part, told in frame.items()}


def settle() -> None:
    """What is in memory now stays: Python need not look through it again and again for what could be thrown away."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*LOOK_FOR_CIRCLES)


class KeptDocument:
    """Gradio makes the page's document anew for each visitor, out of a deep copy of all that is on the page: 45 ms
    of processor time, in which no stream goes on. Nothing in it is any visitor's own, as long as nobody logs in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._kept: OrderedDict[tuple[str, ...], list[Message]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        if QUERIES_GRADIO_READS & parse_qs(scope.get("query_string", b"").decode("latin-1")).keys():
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = (scope["scheme"], scope.get("root_path", ""), *(headers.get(name, "") for name in WHAT_MAKES_AN_ADDRESS))
        messages = self._kept.get(key)
        if messages is None:
            messages = await self._made(scope, receive)
            if messages and messages[0].get("status") == 200:
                self._kept[key] = messages
                while len(self._kept) > DOCUMENTS_KEPT:
                    self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        for message in messages:  # a copy each: what comes behind writes its own headers into them
            await send({**message, "headers": list(message["headers"])} if "headers" in message else dict(message))

    async def _made(self, scope: Scope, receive: Receive) -> list[Message]:
        messages: list[Message] = []

        async def take(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, take)
        return messages


class _Described(BlocksConfig):
    """What a page is made of. Gradio copies it for each visitor and describes every component anew, which took 80 ms
    of the page's loop; a component as it was built is described once."""

    def __init__(self, page: gr.Blocks, described: dict[int, tuple[Any, dict[str, Any]]] | None = None) -> None:
        super().__init__(page)
        self.described = {} if described is None else described

    def __copy__(self) -> _Described:
        new = _Described(self.root_block, self.described)
        new.blocks, new.fns, new.fn_id = copy(self.blocks), copy(self.fns), self.fn_id
        new.renderables = copy(self.renderables)
        return new

    def config_for_block(  # type: ignore[override]
        self, _id: int, rendered_ids: list[int], block: Any, renderable: Any = None
    ) -> dict[str, Any]:
        page, given = self.root_block, block  # as Gradio gives it
        if renderable is not None or not page.is_running or page.blocks.get(_id) is not block:
            plain: dict[str, Any] = BlocksConfig.config_for_block(_id, rendered_ids, given, renderable)
            return plain
        if self.described.get(_id, (None,))[0] is not block:
            self.described[_id] = (block, BlocksConfig.config_for_block(_id, rendered_ids, given))
        described = self.described[_id][1]
        return {**described, "props": dict(described["props"])}  # Gradio writes the session's own value in there


class Page(gr.Blocks):
    """Blocks in which what a frame leaves as it is costs nothing.

    Gradio 6.31 builds such a component anew, with the schema of its values, for every frame of every visitor: a frame
    of one of our tabs, which has about thirty outputs and changes five of them, took 70 ms of processor time.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.max_threads = VISITORS_AT_ONCE
        self.state_session_capacity = SESSIONS_KEPT
        self.default_config = _Described(self)
        self.warm: Callable[[], None] = lambda: None  # makes what every visitor finds first

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        outputs = list(block_fn.outputs)
        values = _one_each(outputs, predictions)
        changed = [place for place, value in enumerate(values or []) if not _left(value)]
        if values is None or len(changed) == len(outputs):
            processed: list[Any] = await super().postprocess_data(block_fn, predictions, state)
            return processed
        shown: list[Any] = [dict(LEFT_AS_IT_IS) for _ in outputs]
        if changed:
            fewer = copy(block_fn)
            fewer.outputs = [outputs[place] for place in changed]
            given = [values[place] for place in changed]
            # Of a single output Gradio takes the bare value.
            processed = await super().postprocess_data(fewer, given if len(given) > 1 else given[0], state)
            for place, value in zip(changed, processed, strict=True):
                shown[place] = value
        return shown


def _left(value: Any) -> bool:
    return isinstance(value, dict) and value == LEFT_AS_IT_IS


def _one_each(outputs: list[Any], predictions: Any) -> list[Any] | None:
    """One value per output, in their order; None for what Gradio had better read itself."""
    if len(outputs) < 2:
        return None
    if isinstance(predictions, dict) and predictions and all(key in outputs for key in predictions):
        return [predictions.get(output, LEFT_AS_IT_IS) for output in outputs]
    if isinstance(predictions, list | tuple) and len(predictions) == len(outputs):
        return list(predictions)
    return None
