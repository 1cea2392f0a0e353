"""An engine that follows a script: a real server process that streams known tokens at a known pace, or fails on cue.

Tests and the page's own development use it in place of mocks. `python app.py --scripted` races three of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from engines import vllm
from engines.base import Engine, EngineConfig, EngineError, SpeculationCounters, usage_with_each_chunk

Fault = Literal[
    "",
    "exit at start",
    "never ready",
    "http 429",
    "http 500",
    "http 503",
    "exit in mid-stream",
    "close in mid-stream",
    "half a chunk",
    "reset",
    "not json",
    "error event",
    "no tokens",
    "hang",
    "key in the answer",
]
TEXT = "An engine that follows its script writes these words again and again ."
TEMPLATE_TOKENS = 6  # that the chat template adds to the prompt's words
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
    at_once: int = 0  # requests answered at the same time; the rest wait; 0: any number
    seconds_per_prompt_word: float = 0.0  # of reading the prompt; a prefix in the cache costs nothing
    caches: bool = True  # can keep prefixes, when told to
    speculates: bool = True  # can speculate, when told to: a chunk then carries what one step yields
    accepted: tuple[int, ...] = (1, 0, 2)  # draft tokens accepted, step by step, again and again
    fault: Fault = ""
    fault_after_tokens: int = 8
    fault_requests: int = 0  # after which the fault is over; 0: never
    key: str = ""  # that requests must carry; one that does not is refused with the one it carried
    models: tuple[str, ...] = ("scripted",)  # that it says it serves
    refused_above: int = 0  # requests at a time, from which on others get HTTP 429; 0: none


def scripted_engine(name: str, label: str, colour: str, script: Script) -> Engine:
    """A row for the table of engines that runs `script` in the app's own environment."""

    def serve_command(config: EngineConfig) -> list[str]:
        if config.speculation and not script.speculates:
            raise EngineError(f"{label}'s script has no speculation.")
        if config.prefix_caching and not script.caches:
            raise EngineError(f"{label}'s script has no prefix cache.")
        words = json.dumps(asdict(script))
        command = ["python", "-m", "engines.scripted", "--port", str(config.port), "--script", words]
        command += ["--draft-tokens", str(config.speculation.draft_tokens)] if config.speculation else []
        return command + (["--prefix-caching"] if config.prefix_caching else [])

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
        empty_caches_path="/reset_prefix_cache" if script.caches else "",
        read_counters=vllm.read_counters,
    )


SCRIPTED_ENGINES = (
    scripted_engine("slow", "Slow script", "#6B7280", Script(first_token=0.15, gap=0.016)),
    scripted_engine("quick", "Quick script", "#0072B2", Script(first_token=0.05, gap=0.006)),
    scripted_engine("bursty", "Bursty script", "#D55E00", Script(first_token=0.08, gap=0.03, tokens_per_chunk=4)),
)


class _Server:
    """What the script's server remembers between requests."""

    def __init__(self, script: Script, draft_tokens: int, prefix_caching: bool) -> None:
        self.script, self.draft_tokens, self.prefix_caching = script, draft_tokens, prefix_caching
        self.room = asyncio.Semaphore(script.at_once or 1_000_000)
        self.prefixes: list[list[str]] = []
        self.counted = SpeculationCounters()
        self.under_way = self.asked = 0
        self.given = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        fault = self.fault
        self.asked += 1
        if fault.startswith("http "):
            said = {"error": {"message": "the script says so"}}
            status = int(fault.removeprefix("http "))
            later = {"Retry-After": "30"} if status in (429, 503) else {}
            return web.json_response(said, status=status, headers=later)
        self.under_way += 1
        try:
            return await self._answer(request, fault)
        finally:
            self.under_way -= 1

    @property
    def fault(self) -> Fault:
        """The script's, until as many requests as it is for have come."""
        over = self.script.fault_requests and self.asked >= self.script.fault_requests
        return "" if over else self.script.fault

    async def models(self, request: web.Request) -> web.Response:
        listed = [{"id": model, "object": "model", "owned_by": "scripted"} for model in self.script.models]
        return self._refusal(request) or web.json_response({"object": "list", "data": listed})

    def _refusal(self, request: web.Request) -> web.Response | None:
        """As thoughtless as real servers: it repeats what it was given."""
        script, given = self.script, request.headers.get("Authorization", "")
        if script.key and given != f"Bearer {script.key}":
            said = f"Incorrect API key provided: {given.removeprefix('Bearer ')}."
            return web.json_response({"error": {"message": said}}, status=401)
        if script.refused_above and self.under_way >= script.refused_above:
            return web.json_response({"error": {"message": "Too many requests at once."}}, status=429)
        return None

    async def _answer(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        body = await request.json()
        self.given = request.headers.get("Authorization", "")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async with self.room:
            async for line in self._events(body, fault):
                if line is None:
                    if fault == "exit in mid-stream":
                        print("scripted: ending in mid-stream", flush=True)
                        os._exit(3)
                    _cut(request, fault)
                    return response
                await response.write(line)
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    async def empty_caches(self, request: web.Request) -> web.Response:
        self.prefixes.clear()
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        """vLLM's names: its counters are read the same way."""
        values = {"drafts": self.counted.steps, "draft_tokens": self.counted.drafted}
        values["accepted_tokens"] = self.counted.accepted
        lines = [f"vllm:spec_decode_num_{name}_total {value}" for name, value in values.items()]
        for position, count in enumerate(self.counted.accepted_at):
            lines.append(f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{position}"}} {count}')
        return web.Response(text="\n".join(lines if self.draft_tokens else []) + "\n")

    def _from_cache(self, prompt: list[str]) -> int:
        """Words of the prompt that an earlier prompt began with; the last one is always read anew."""
        if not self.prefix_caching:
            return 0
        known = max((_shared(prompt, earlier) for earlier in self.prefixes), default=0)
        self.prefixes.append(prompt)
        return min(known, len(prompt) - 1)

    def _step(self, place: int) -> int:
        """Tokens of the next chunk; counts what speculation did."""
        if not self.draft_tokens:
            return self.script.tokens_per_chunk
        accepted = min(self.script.accepted[place % len(self.script.accepted)], self.draft_tokens)
        at = tuple(int(position < accepted) for position in range(self.draft_tokens))
        self.counted = self.counted.plus(SpeculationCounters(1, self.draft_tokens, accepted, at))
        return accepted + 1

    async def _events(self, body: dict[str, Any], fault: Fault) -> AsyncIterator[bytes | None]:
        """The answer's events; None where the connection is to be cut."""
        script, wanted = self.script, int(body["max_tokens"])
        yield _event({"role": "assistant", "content": ""})
        prompt = str(body["messages"][-1]["content"]).split()
        cached = self._from_cache(prompt)
        await asyncio.sleep(script.first_token + (len(prompt) - cached) * script.seconds_per_prompt_word)
        words = script.text.split(" ")
        sent = steps = 0
        while sent < wanted and fault != "no tokens":
            count = min(self._step(steps), wanted - sent)
            steps += 1
            text = "".join(f" {words[(sent + place) % len(words)]}" for place in range(count))
            if fault and sent >= script.fault_after_tokens:
                if fault == "not json":
                    yield b"data: {broken\n\n"
                elif fault == "error event":
                    yield b'data: {"error": {"message": "out of cache blocks"}}\n\n'
                elif fault == "key in the answer":
                    text = f" {self.given}"
                elif fault == "hang":
                    await asyncio.sleep(3600)
                elif fault in ("exit in mid-stream", "close in mid-stream", "half a chunk", "reset"):
                    yield None
                    return
            key = "reasoning_content" if sent < script.reasoning_tokens else "content"
            sent += count
            usage = _usage(len(prompt), sent, cached) if script.usage == "continuous" else None
            yield _event({key: text}, usage=usage)
            if sent < wanted:
                await asyncio.sleep(script.gap)
        yield _event({}, finish_reason="length")
        if script.usage != "none":
            closing = {"choices": [], "usage": _usage(len(prompt), sent, cached)}
            yield b"data: " + json.dumps(closing).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


def _cut(request: web.Request, fault: Fault) -> None:
    """End the connection in the middle of the answer, as the fault says."""
    transport = request.transport
    assert transport is not None
    if fault == "half a chunk":
        transport.write(b'80\r\ndata: {"choices": [{"ind')  # 128 bytes were promised
    elif fault == "reset":
        link = transport.get_extra_info("socket")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
        return
    transport.close()


def _shared(prompt: list[str], earlier: list[str]) -> int:
    count = 0
    for mine, theirs in zip(prompt, earlier, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def _usage(prompt: int, tokens: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": TEMPLATE_TOKENS + prompt,
        "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _event(delta: dict[str, str], usage: dict[str, Any] | None = None, finish_reason: str | None = None) -> bytes:
    event: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
    if usage:
        event["usage"] = usage
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def _serve(port: int, server: _Server) -> None:
    script = server.script

    async def health(request: web.Request) -> web.Response:
        return web.Response(status=503 if script.fault == "never ready" else 200)

    application = web.Application()
    application.router.add_get("/health", health)
    application.router.add_get("/metrics", server.metrics)
    application.router.add_get("/v1/models", server.models)
    application.router.add_post("/reset_prefix_cache", server.empty_caches)
    application.router.add_post("/v1/chat/completions", server.answer)
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
    parser.add_argument("--draft-tokens", type=int, default=0)
    parser.add_argument("--prefix-caching", action="store_true")
    options = parser.parse_args(arguments)
    server = _Server(Script(**options.script), options.draft_tokens, options.prefix_caching)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(options.port, server))


if __name__ == "__main__":
    main(sys.argv[1:])
