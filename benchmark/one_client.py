"""One client library against a server, in a process of its own: `python -m benchmark.one_client ours <order>`.

Each sends all requests at once over connections that a round of short answers has opened, and stamps each chunk as soon
as its library hands it over. As any tool does, it then reads the chunk's JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from engines import engine_named
from engines.base import Request
from engines.clock import monotonic_clock
from engines.load import LoadGenerator
from engines.openai_stream import Endpoint
from experiments.metrics import RequestMetrics

WARM_TOKENS = 8


class Seen:
    """What a client saw of one answer."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.sent = 0.0
        self.moments: list[float] = []
        self.tokens = 0

    def chunk(self, at: float, data: str | bytes) -> None:
        """One line of the event stream that came at the moment `at`."""
        line = data.strip()
        prefix, end = ("data: ", "data: [DONE]") if isinstance(line, str) else (b"data: ", b"data: [DONE]")
        if not line.startswith(prefix) or line == end:  # type: ignore[arg-type]
            return
        event = json.loads(line[6:])
        self.tokens = (event.get("usage") or {}).get("completion_tokens", self.tokens)
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            self.moments.append(at)

    def told(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "sent": self.sent, "moments": self.moments, "tokens": self.tokens}


Ask = Callable[[Seen, dict[str, Any]], Awaitable[None]]


def body(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def with_aiohttp(base_url: str) -> AsyncIterator[Ask]:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(seen: Seen, what: dict[str, Any]) -> None:
            seen.sent = monotonic_clock()
            async with session.post(f"{base_url}/v1/chat/completions", json=what) as answer:
                async for line in answer.content:
                    seen.chunk(monotonic_clock(), line)

        yield ask


async def with_httpx(base_url: str) -> AsyncIterator[Ask]:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:

        async def ask(seen: Seen, what: dict[str, Any]) -> None:
            seen.sent = monotonic_clock()
            async with client.stream("POST", f"{base_url}/v1/chat/completions", json=what) as answer:
                async for line in answer.aiter_lines():
                    seen.chunk(monotonic_clock(), line)

        yield ask


async def with_openai(base_url: str) -> AsyncIterator[Ask]:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def ask(seen: Seen, what: dict[str, Any]) -> None:
            seen.sent = monotonic_clock()
            async for chunk in await client.chat.completions.create(**what):
                at = monotonic_clock()  # its own reading of the JSON cannot be left out
                if chunk.usage:
                    seen.tokens = chunk.usage.completion_tokens
                if chunk.choices and chunk.choices[0].delta.content:
                    seen.moments.append(at)

        yield ask


LIBRARIES = {"aiohttp": with_aiohttp, "httpx": with_httpx, "openai": with_openai}


async def theirs(library: str, order: dict[str, Any]) -> list[dict[str, Any]]:
    async for ask in LIBRARIES[library](order["base_url"]):
        for tokens in (WARM_TOKENS, order["tokens"]):
            gc.collect()
            gc.disable()  # as load generators do: none shall be blamed for Python's collector
            seen = [Seen(prompt) for prompt in order["prompts"]]
            await asyncio.gather(*(ask(one, body(order["model"], one.prompt, tokens)) for one in seen))
    return [one.told() for one in seen]


async def ours(order: dict[str, Any]) -> list[dict[str, Any]]:
    endpoint = Endpoint(engine_named("sglang"), order["base_url"], order["model"])
    async with LoadGenerator(endpoint) as load:
        for tokens in (WARM_TOKENS, order["tokens"]):
            answers, _ = await load.answers([(0.0, Request(prompt, tokens)) for prompt in order["prompts"]])
    told = []
    for answer in answers:
        if answer.timeline.error:
            continue
        metrics = RequestMetrics(answer.timeline, answer.planned)
        told.append(
            {
                "prompt": order["prompts"][answer.index],
                "sent": answer.timeline.sent,
                "moments": [answer.timeline.sent + arrival.at for arrival in answer.timeline.arrivals],
                "tokens": answer.timeline.usage.output_tokens,
                "ttft": metrics.ttft,
                "tpot": metrics.tpot,
                "gaps": metrics.inter_token_latencies,
            }
        )
    return told


def main() -> None:
    """Reads the order from the standard input, writes what was seen to the standard output."""
    client, order = sys.argv[1], json.load(sys.stdin)
    print(json.dumps(asyncio.run(ours(order) if client == "ours" else theirs(client, order))))


if __name__ == "__main__":
    main()
