"""The OpenAI-compatible chat stream: bytes of server-sent events into chunks (pure), and the client around it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import aiohttp

from engines.base import Chunk, Engine, EngineError, Request, SpeculationCounters, Usage

# A long prefill sends nothing for minutes, so only silence between bytes is bounded, generously.
SILENCE_LIMIT_SECONDS = 600
CONNECT_LIMIT_SECONDS = 10
# An idle connection is dropped before the server drops it: uvicorn, which all three engines use, waits 5 s, and a
# request sent at that moment fails ("Server disconnected").
KEEP_ALIVE_SECONDS = 4
READ_BUFFER_BYTES = 1 << 22  # the default 64 KiB throttles long contexts
ERROR_CHARACTERS = 500


class ChatStreamParser:
    """Feeds on blocks of bytes cut anywhere, gives whole chunks. One parser per request."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, block: bytes) -> list[Chunk]:
        *lines, self._rest = (self._rest + block).split(b"\n")
        chunks = []
        for line in lines:
            payload = line.strip()
            if payload.startswith(b"data:"):
                payload = payload[5:].strip()
                if payload and payload != b"[DONE]":
                    chunks.append(parse_chunk(payload))
        return chunks


def parse_chunk(payload: bytes) -> Chunk:
    """One event's JSON. What is no chunk (an error object, broken JSON) becomes a chunk that carries an error."""
    try:
        event = json.loads(payload)
    except ValueError:
        return Chunk(error=f"The engine sent something that is not JSON: {payload[:120].decode(errors='replace')}")
    if not isinstance(event, dict):
        return Chunk(error="The engine sent an event that is not an object.")
    if event.get("error") is not None:
        return Chunk(error=f"The engine reported an error: {_error_text(event['error'])}")
    usage = _usage(event)
    choices = event.get("choices") or []
    if not choices:  # the closing usage comes without choices
        return Chunk(usage=usage)
    delta = choices[0].get("delta") or {}
    return Chunk(
        text=delta.get("content") or "",
        # vLLM calls it reasoning, SGLang reasoning_content.
        reasoning=delta.get("reasoning") or delta.get("reasoning_content") or "",
        usage=usage,
        finish_reason=choices[0].get("finish_reason"),
    )


def _usage(event: dict[str, Any]) -> Usage | None:
    value, speculation = event.get("usage"), _speculation(event.get("sglext"))
    if not isinstance(value, dict):
        return Usage(speculation=speculation) if speculation else None
    details = value.get("prompt_tokens_details") or {}
    return Usage(value.get("prompt_tokens"), value.get("completion_tokens"), details.get("cached_tokens"), speculation)


def _speculation(extension: Any) -> SpeculationCounters | None:
    """SGLang's own count of one request, which it sends with the last chunk when asked."""
    details = extension.get("spec_tokens_details") if isinstance(extension, dict) else None
    if not isinstance(details, dict):
        return None
    steps_with = details.get("spec_correct_drafts_histogram") or []  # steps in which 0, 1, 2 ... were accepted
    return SpeculationCounters(
        steps=details.get("spec_verify_ct", 0),
        drafted=details.get("spec_num_proposed_drafts", 0),
        accepted=details.get("spec_num_correct_drafts", 0),
        accepted_at=tuple(sum(steps_with[place:]) for place in range(1, len(steps_with))),
    )


def _error_text(value: Any) -> str:
    text = value.get("message") if isinstance(value, dict) else value
    return str(text)[:ERROR_CHARACTERS]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a running engine answers: `base_url` without /v1, and the model id that its requests name."""

    engine: Engine
    base_url: str
    model: str

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "stream": True,
            **self.engine.request_fields(request),
        }


class ChatClient:
    """One warm pool of connections to one endpoint: `async with ChatClient(endpoint) as client`.

    `connections` bounds how many requests may be open at once; the pool never caps below it.
    """

    def __init__(self, endpoint: Endpoint, connections: int = 1) -> None:
        self.endpoint = endpoint
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ChatClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_LIMIT_SECONDS, sock_read=SILENCE_LIMIT_SECONDS
            ),
            read_bufsize=READ_BUFFER_BYTES,
            trust_env=False,  # a proxy between us and a server on this machine would be measured too
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def blocks(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The answer's bytes as they leave the socket. Raises EngineError for whatever goes wrong."""
        assert self._session is not None, "use ChatClient as a context manager"
        label, url = self.endpoint.engine.label, f"{self.endpoint.base_url}/v1/chat/completions"
        try:
            async with self._session.post(url, json=self.endpoint.body(request)) as response:
                if response.status != 200:
                    answer = (await response.text())[:ERROR_CHARACTERS]
                    raise EngineError(f"{label} refused the request with HTTP {response.status}: {answer}")
                async for block in response.content.iter_any():
                    yield block
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as failure:
            raise EngineError(f"{label} cannot be reached at {self.endpoint.base_url}.") from failure
        except TimeoutError as failure:  # before ClientError, which aiohttp's timeouts are as well
            raise EngineError(f"{label} sent nothing for {SILENCE_LIMIT_SECONDS} s.") from failure
        except (aiohttp.ClientError, ConnectionError) as failure:
            raise EngineError(f"{label} broke off the answer: {failure or type(failure).__name__}.") from failure

    async def counters(self) -> SpeculationCounters | None:
        """What the engine has counted since it started; None where it has no such counters."""
        read = self.endpoint.engine.read_counters
        return read(await self._exchange("GET", "/metrics")) if read else None

    async def empty_caches(self) -> bool:
        """Make the engine forget every cached prefix; False where it keeps none."""
        path = self.endpoint.engine.empty_caches_path
        if path:
            await self._exchange("POST", path)
        return bool(path)

    async def _exchange(self, method: str, path: str) -> str:
        assert self._session is not None, "use ChatClient as a context manager"
        label = self.endpoint.engine.label
        try:
            async with self._session.request(method, f"{self.endpoint.base_url}{path}") as response:
                text = await response.text()
                if response.status != 200:
                    raise EngineError(f"{label} answered {path} with HTTP {response.status}: {text[:ERROR_CHARACTERS]}")
                return text
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as failure:
            raise EngineError(f"{label} did not answer {path}: {failure or type(failure).__name__}.") from failure
