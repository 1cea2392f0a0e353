"""The client for single requests and for what is asked in between, against a server in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from benchmark.running import RunningTruth
from benchmark.truth import Schedule
from engines import client as client_module
from engines import engine_named
from engines.base import EngineError, Request
from engines.client import EngineClient
from engines.openai_stream import ChatStreamParser, Endpoint
from engines.server import free_port
from engines.timeline import Timeline, record

REQUEST = Request("Why?", max_tokens=3)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def received(handler: Handler, requests: int = 1, **settings: Any) -> list[bytes | EngineError]:
    """What `requests` requests at once to a server with this handler give: all bytes, or the error."""

    async def one(client: EngineClient) -> bytes | EngineError:
        try:
            return b"".join([block async for block in client.blocks(REQUEST)])
        except EngineError as error:
            return error

    async def all_at_once() -> list[bytes | EngineError]:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            endpoint = Endpoint(engine_named("vllm"), f"http://127.0.0.1:{port}", "m")
            async with EngineClient(endpoint, **settings) as client:
                return await asyncio.gather(*(one(client) for _ in range(requests)))
        finally:
            await runner.cleanup()

    return asyncio.run(all_at_once())


async def answer(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    return web.Response(body=f"{body['messages'][0]['content']} {body['max_tokens']}".encode())


def test_the_client_sends_the_request_and_yields_the_answers_bytes() -> None:
    assert received(answer) == [b"Why? 3"]


def test_a_proxy_of_the_surroundings_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert received(answer) == [b"Why? 3"]


def test_an_endpoint_where_nobody_listens_cannot_be_reached() -> None:
    address = f"http://127.0.0.1:{free_port()}"

    async def ask() -> None:
        async with EngineClient(Endpoint(engine_named("vllm"), address, "m")) as client:
            async for _ in client.blocks(REQUEST):
                pass

    with pytest.raises(EngineError, match=f"^vLLM cannot be reached at {address}.$"):
        asyncio.run(ask())


def test_a_refusal_is_shown_with_the_servers_own_words() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"detail": "unknown field: ignore_eos"}, status=422)

    (error,) = received(refuse)
    assert isinstance(error, EngineError)
    assert error.message.startswith('vLLM refused the request with HTTP 422: {"detail": "unknown field: ignore_eos"}')


def test_a_connection_cut_in_mid_answer_is_told() -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: half")
        assert request.transport is not None
        request.transport.close()
        return response

    (error,) = received(cut)
    assert isinstance(error, EngineError)
    assert error.message.startswith("vLLM broke off the answer: ")


def test_silence_beyond_the_limit_is_told_as_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_LIMIT_SECONDS", 0.2)

    async def fall_silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: half")
        await asyncio.sleep(60)
        return response

    (error,) = received(fall_silent)
    assert isinstance(error, EngineError)
    assert error.message == "vLLM sent nothing for 0.2 s."


def test_the_models_that_a_server_offers_are_listed(truth: RunningTruth) -> None:
    async def listed() -> list[str]:
        async with EngineClient(Endpoint(engine_named("vllm"), truth.base_url, "truth")) as client:
            return await client.models()

    assert asyncio.run(listed()) == ["truth"]


def test_what_a_server_does_not_offer_is_told_with_its_words(truth: RunningTruth) -> None:
    async def ask(what: str) -> None:
        async with EngineClient(Endpoint(engine_named("vllm"), truth.base_url, "truth")) as client:
            await getattr(client, what)()

    with pytest.raises(EngineError, match=r"^vLLM refused /metrics with HTTP 404: "):
        asyncio.run(ask("counters"))
    with pytest.raises(EngineError, match=r"^vLLM refused /reset_prefix_cache with HTTP 404: "):
        asyncio.run(ask("empty_caches"))


def test_a_single_answer_is_stamped_by_the_same_clock(truth: RunningTruth) -> None:
    truth.follow(Schedule(first_token=0.05, gap=0.02))

    async def ask() -> Timeline:
        async with EngineClient(Endpoint(engine_named("vllm"), truth.base_url, "truth")) as client:
            return await record(Request("Why?", 5), client.blocks, ChatStreamParser())

    timeline = asyncio.run(ask())
    (true,) = truth.answers()
    moments = [timeline.sent + arrival.at for arrival in timeline.arrivals]
    assert timeline.error is None and moments == pytest.approx(true.moments, abs=0.05)
