"""Looking for a server's models: what is found, and what is wrong in words."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from benchmark.running import RunningTruth
from engines import discovery
from engines.addresses import read_url
from engines.base import EngineError
from engines.discovery import Found, NoModelList, look
from engines.server import free_port
from tests.scripted_server import scripted_server

KEY = "sk-a/very+secret=key"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def found(handler: Handler, key: str = "", path: str = "") -> Found | EngineError:
    """What looking at a server with this handler at /v1/models gives."""

    async def ask() -> Found | EngineError:
        application = web.Application()
        application.router.add_get(f"{path}/v1/models", handler)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            return await look(read_url(f"http://127.0.0.1:{port}{path}"), key)
        except EngineError as error:
            return error
        finally:
            await runner.cleanup()

    return asyncio.run(ask())


def answering(body: Any, status: int = 200, **settings: Any) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        if isinstance(body, str):
            return web.Response(text=body, status=status, **settings)
        return web.json_response(body, status=status, **settings)

    return handler


def problem(handler: Handler, key: str = "") -> str:
    error = found(handler, key)
    assert isinstance(error, EngineError)
    return error.message


def looked(url: str, key: str = "", public: bool = False) -> Found:
    return asyncio.run(look(read_url(url), key, public))


def refusal(url: str, key: str = "", public: bool = False) -> str:
    with pytest.raises(EngineError) as refused:
        looked(url, key, public)
    return refused.value.message


def test_a_server_tells_its_models_and_how_far_away_it_is() -> None:
    with scripted_server(models=("small", "large", "small")) as url:
        answer = looked(f"{url}/v1")
    assert (answer.models, answer.owner, answer.address) == (("small", "large"), "scripted", "127.0.0.1")
    assert 0 < answer.round_trip_seconds < 1 and answer.on_this_machine


def test_a_path_in_front_and_the_key_reach_the_server() -> None:
    async def handler(request: web.Request) -> web.Response:
        seen.append((request.headers["Authorization"], request.headers["Host"]))
        return web.json_response({"data": [{"id": "m"}]})

    seen: list[tuple[str, str]] = []
    answer = found(handler, KEY, "/api")
    assert isinstance(answer, Found) and answer.models == ("m",)
    assert {key for key, _ in seen} == {f"Bearer {KEY}"} and seen[0][1].startswith("127.0.0.1:")


def test_the_round_trip_is_the_shortest_of_several() -> None:
    async def handler(request: web.Request) -> web.Response:
        seen.append(request.path)
        await asyncio.sleep(0.2 if len(seen) < discovery.ROUND_TRIPS else 0.03)
        return web.json_response({"data": []})

    seen: list[str] = []
    answer = found(handler)
    assert isinstance(answer, Found) and 0.03 <= answer.round_trip_seconds < 0.15


def test_the_truth_server_can_be_looked_at(truth: RunningTruth) -> None:
    assert looked(truth.base_url).models == (truth.model,)


def test_a_wrong_key_is_told_without_the_key() -> None:
    with scripted_server(key="sk-the-right-one") as url:
        assert looked(url, "sk-the-right-one").models == ("scripted",)
        words = refusal(url, KEY)
        assert "does not take this key (HTTP 401): Incorrect API key provided: [key]." in words
        assert KEY not in words and "right" not in words
        assert "wants a key (HTTP 401)" in refusal(url)


@pytest.mark.parametrize("written", [KEY, KEY.replace("/", "\\/"), "sk-a%2Fvery%2Bsecret%3Dkey"])
def test_a_key_is_covered_however_a_server_repeats_it(written: str) -> None:
    words = problem(answering(f"no: {written}", status=500), KEY)
    assert "secret" not in words and "HTTP 500" in words and "[key]" in words


def test_a_key_is_covered_before_what_a_server_says_is_cut() -> None:
    for padding in range(discovery.MOST_WORDS - len(KEY), discovery.MOST_WORDS, 3):
        assert "sk-a" not in problem(answering("x" * padding + KEY, status=500), KEY)


def test_a_key_in_a_models_name_is_covered() -> None:
    answer = found(answering({"data": [{"id": f"mine-{KEY}", "owned_by": KEY}]}), KEY)
    assert isinstance(answer, Found) and answer.models == ("mine-[key]",) and KEY not in answer.owner


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (answering("not found", 404), "no OpenAI-compatible address"),
        (answering("<html>hello</html>"), "something that is not JSON"),
        (answering(""), "an empty answer"),
        (answering({"hello": "there"}), "no list of models"),
        (answering(["m"] * 3), ""),
        (answering({"error": {"message": "Slow down."}}, 429), "asked too often (HTTP 429): Slow down."),
        (answering("<h1>Oh no</h1>", 502), "HTTP 502."),
        (answering("", 307, headers={"Location": "http://127.0.0.1:9/v1/models"}), "leads elsewhere (HTTP 307)"),
    ],
)
def test_what_is_no_list_of_models_is_told_in_words(handler: Handler, words: str) -> None:
    answer = found(handler)
    if words:
        assert isinstance(answer, EngineError) and words in answer.message
    else:
        assert isinstance(answer, Found) and answer.models == ()


@pytest.mark.parametrize("handler", [answering(""), answering("Oh no", 500), answering("", 404)])
def test_a_list_that_cannot_be_read_still_says_where_the_server_is(handler: Handler) -> None:
    """mlx_lm.server answers with nothing, transformers with HTTP 500, where the hub's cache folder does not exist."""
    error = found(handler)
    assert isinstance(error, NoModelList) and error.found is not None
    assert error.found.address == "127.0.0.1" and error.found.models == ()


def test_a_list_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "MOST_BYTES", 1 << 20)
    assert "that is no model list" in problem(answering("x" * (3 << 20)))


def test_nobody_at_the_port_is_told() -> None:
    assert "nothing answers at port" in refusal(f"http://127.0.0.1:{free_port()}")


def test_an_unknown_name_is_told() -> None:
    assert refusal("http://no-such-host.invalid") == "There is no host called no-such-host.invalid."


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "LIMIT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "did not" in refusal(url) and "answer" in refusal(url)


def test_a_server_without_tls_is_told_from_one_with() -> None:
    with scripted_server() as url:
        assert "does not speak TLS" in refusal(url.replace("http://", "https://"))


def test_a_certificate_must_be_the_names_and_vouched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    async def ask() -> list[str]:
        application = web.Application()
        application.router.add_get("/v1/models", answering({"data": [{"id": "m"}]}))
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        said = []
        try:
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
            for name in ("localhost", "127.0.0.1"):
                try:
                    said += (await look(read_url(f"https://{name}:{runner.addresses[0][1]}"))).models
                except EngineError as error:
                    said.append(error.message)
        finally:
            await runner.cleanup()
        return said

    assert all("certificate that cannot be trusted" in words for words in asyncio.run(ask()))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    named, numbered = asyncio.run(ask())
    assert named == "m" and "certificate that cannot be trusted" in numbered


def test_what_is_no_web_server_is_told() -> None:
    async def ask() -> str:
        async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ready\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(rude, "127.0.0.1", 0)
        async with server:
            try:
                await look(read_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
            except EngineError as error:
                return error.message
        return ""

    assert "is no web server" in asyncio.run(ask())


def test_a_public_page_refuses_private_addresses_before_it_connects() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        words = refusal(f"http://127.0.0.1:{listening.getsockname()[1]}", public=True)
        with pytest.raises(TimeoutError):
            listening.accept()
    assert "does not call 127.0.0.1" in words


def test_a_name_is_looked_up_once_and_what_was_found_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a name could lead to a public address while it is checked, and to a private one right after."""
    with scripted_server() as url:
        port = int(url.rpartition(":")[2])
        asked: list[str] = []

        def once(looked_up: Any) -> tuple[str, ...]:
            asked.append(looked_up.host)
            return ("127.0.0.1",)

        monkeypatch.setattr(discovery, "public_addresses", once)
        # Nobody else can look this name up: whoever tried again would fail.
        where = replace(read_url("http://innocent.invalid"), port=port)
        answer = asyncio.run(look(where, public=True))
    assert asked == ["innocent.invalid"] and answer.address == "127.0.0.1"
