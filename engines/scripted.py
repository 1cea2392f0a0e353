"""An engine that follows a script: a real server process that streams known tokens at a known pace, or fails on cue.

Tests and the page's own development use it in place of mocks. `python app.py --scripted` races three of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from engines.base import Engine, EngineConfig, usage_with_each_chunk

Fault = Literal[
    "",
    "exit at start",
    "never ready",
    "http 500",
    "exit in mid-stream",
    "close in mid-stream",
    "not json",
    "error event",
    "no tokens",
    "hang",
]
TEXT = "An engine that follows its script writes these words again and again ."
PROJECT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Script:
    """What the server does. Times are seconds; `usage`: are tokens reported with each chunk, at the end, never."""

    start: float = 0.3
    first_token: float = 0.02
    gap: float = 0.005  # between chunks
    tokens_per_chunk: int = 1
    usage: Literal["continuous", "final", "none"] = "continuous"
    reasoning_tokens: int = 0
    text: str = TEXT
    fault: Fault = ""
    fault_after_tokens: int = 8


def scripted_engine(name: str, label: str, colour: str, script: Script) -> Engine:
    """A row for the table of engines that runs `script` in the app's own environment."""

    def serve_command(config: EngineConfig) -> list[str]:
        words = json.dumps(asdict(script))
        return ["python", "-m", "engines.scripted", "--port", str(config.port), "--script", words]

    return Engine(
        name=name,
        label=label,
        colour=colour,
        package="aiohttp",
        serve_command=serve_command,
        variables=lambda config: {"PYTHONPATH": str(PROJECT)},
        request_fields=usage_with_each_chunk,
        phases=((r"loading weights", "loading weights"), (r"warming up", "warming up")),
        caveat=lambda config: f"{label} follows a script: these are no engine's numbers.",
    )


SCRIPTED_ENGINES = (
    scripted_engine("slow", "Slow script", "#6B7280", Script(first_token=0.15, gap=0.016)),
    scripted_engine("quick", "Quick script", "#0072B2", Script(first_token=0.05, gap=0.006)),
    scripted_engine("bursty", "Bursty script", "#D55E00", Script(first_token=0.08, gap=0.03, tokens_per_chunk=4)),
)


async def _answer(request: web.Request, script: Script) -> web.StreamResponse:
    if script.fault == "http 500":
        return web.json_response({"error": {"message": "the script says so"}}, status=500)
    body = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    async for line in _events(script, body):
        if line is None:
            if script.fault == "exit in mid-stream":
                print("scripted: ending in mid-stream", flush=True)
                os._exit(3)
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write(line)
    with contextlib.suppress(ConnectionError):
        await response.write_eof()
    return response


async def _events(script: Script, body: dict[str, Any]) -> AsyncIterator[bytes | None]:
    """The answer's events; None where the connection is to be cut."""
    wanted = int(body["max_tokens"])
    yield _event({"role": "assistant", "content": ""})
    await asyncio.sleep(script.first_token)
    words = script.text.split()
    sent = 0
    while sent < wanted and script.fault != "no tokens":
        count = min(script.tokens_per_chunk, wanted - sent)
        text = "".join(f" {words[(sent + place) % len(words)]}" for place in range(count))
        if script.fault and sent >= script.fault_after_tokens:
            if script.fault == "not json":
                yield b"data: {broken\n\n"
            elif script.fault == "error event":
                yield b'data: {"error": {"message": "out of cache blocks"}}\n\n'
            elif script.fault == "hang":
                await asyncio.sleep(3600)
            elif script.fault in ("exit in mid-stream", "close in mid-stream"):
                yield None
                return
        key = "reasoning_content" if sent < script.reasoning_tokens else "content"
        sent += count
        yield _event({key: text}, usage=_usage(sent) if script.usage == "continuous" else None)
        if sent < wanted:
            await asyncio.sleep(script.gap)
    yield _event({}, finish_reason="length")
    if script.usage != "none":
        yield b"data: " + json.dumps({"choices": [], "usage": _usage(sent)}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def _usage(tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": 7, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 0}}


def _event(delta: dict[str, str], usage: dict[str, Any] | None = None, finish_reason: str | None = None) -> bytes:
    event: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
    if usage:
        event["usage"] = usage
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def _serve(port: int, script: Script) -> None:
    async def health(request: web.Request) -> web.Response:
        return web.Response(status=503 if script.fault == "never ready" else 200)

    application = web.Application()
    application.router.add_get("/health", health)
    application.router.add_post("/v1/chat/completions", lambda request: _answer(request, script))
    print("scripted: loading weights", flush=True)
    await asyncio.sleep(script.start / 2)
    if script.fault == "exit at start":
        raise RuntimeError("the script says so")
    print("scripted: warming up", flush=True)
    await asyncio.sleep(script.start / 2)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("scripted: serving", flush=True)
    await asyncio.Event().wait()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--script", type=json.loads, default={})
    options = parser.parse_args(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(options.port, Script(**options.script)))


if __name__ == "__main__":
    main(sys.argv[1:])
