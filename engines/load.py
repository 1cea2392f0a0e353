"""This side of the load generator: orders for its process, and timelines out of what it stamped."""

from __future__ import annotations

import asyncio
import json
import marshal
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from engines.base import EngineError, Request
from engines.load_process import BYTES, LENGTH, SENT
from engines.openai_stream import ERROR_CHARACTERS, ChatStreamParser, Endpoint, without_key
from engines.timeline import Arrival, Timeline, TimelineBuilder

PROJECT = Path(__file__).parent.parent
# A long prefill sends nothing for minutes, so only silence between bytes is bounded, generously.
SILENCE_SECONDS = 600.0
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """How well the load generator itself was while it measured. Times are seconds.

    `stamps`: arrivals were stamped by the "kernel" as they came in, or by the "process" when it read them.
    `longest_stall`: the latest that it came to something that was due at a known moment.
    `read_delays`: between a kernel's stamp and the reading (p50, p99, largest); empty without such stamps.
    """

    stamps: Literal["kernel", "process"]
    seconds: float
    processor_seconds: float
    longest_stall: float
    reads: int
    read_delays: tuple[float, ...] = ()

    @property
    def processor_share(self) -> float | None:
        return self.processor_seconds / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Answered:
    """One request that has ended, well or not. `index`: its place in the order; `planned`: s on the run's clock."""

    index: int
    planned: float
    timeline: Timeline


class LoadGenerator:
    """A process of its own with a warm pool of connections to one endpoint: `async with LoadGenerator(endpoint)`.

    `origin`: the clock's reading at the start of the run, from which all moments count. A server that sends nothing for
    `silence_seconds` has failed.
    """

    def __init__(self, endpoint: Endpoint, origin: float = 0.0, silence_seconds: float = SILENCE_SECONDS) -> None:
        self.endpoint, self.origin, self.silence_seconds = endpoint, origin, silence_seconds
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> LoadGenerator:
        address = urlsplit(self.endpoint.base_url)
        host, port = address.hostname or "", address.port or DEFAULT_PORTS.get(address.scheme, 0)
        if address.scheme not in DEFAULT_PORTS or not host:
            raise EngineError(
                f"{self.endpoint.base_url} is no address of a server: it must begin with http:// or https://."
            )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-S", "-m", "engines.load_process", host, str(port), address.scheme, str(self.silence_seconds)),
            *([self.endpoint.address] if self.endpoint.address else []),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},  # -S: it needs no package, and starts in half the time
            start_new_session=True,  # Ctrl-C reaches the app alone
            limit=1 << 24,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        process = self._process
        assert process is not None and process.stdin is not None
        process.stdin.close()
        if exception[0] is not None and process.returncode is None:  # it may be in the middle of an order
            process.kill()
        await process.wait()

    @property
    def pid(self) -> int | None:
        """The process' number while it runs."""
        return self._process.pid if self._process else None

    async def answers(
        self,
        requests: Sequence[tuple[float, Request]],
        seconds: float | None = None,
        on_sent: Callable[[int], None] = lambda index: None,
        on_arrival: Callable[[int, Arrival], None] = lambda index, arrival: None,
        on_ended: Callable[[Answered], None] = lambda answered: None,
    ) -> tuple[list[Answered], GeneratorHealth]:
        """Send each request `offset` s after the beginning, whatever becomes of those before it, until all have ended.

        With `seconds` each is a user who asks again as soon as the answer is there, for that long. A request that fails
        is one with an error in its timeline. Raises EngineError only when the generator itself broke down.
        """
        process = self._process
        assert process is not None and process.stdin is not None, "use LoadGenerator as a context manager"
        orders = {"requests": [(offset, self._payload(request)) for offset, request in requests], "seconds": seconds}
        value = marshal.dumps(orders)
        streams: dict[int, _Stream] = {}
        ended: list[Answered] = []
        try:
            process.stdin.write(LENGTH.pack(len(value)) + value)
            await process.stdin.drain()
            while True:
                for event in await self._events(process):
                    if event[0] == "done":
                        return ended, GeneratorHealth(**{**event[1], "read_delays": tuple(event[1]["read_delays"])})
                    kind, number = event[0], event[1]
                    if kind == SENT:
                        _, _, index, planned, sent = event
                        streams[number] = _Stream(index, sent, self.endpoint.key)
                        on_sent(index)
                    elif kind == BYTES:
                        stream = streams[number]
                        for arrival in stream.read(event[2], event[3]):
                            on_arrival(stream.index, arrival)
                    else:
                        answered = self._answered(streams.pop(number, None), *event[2:])
                        ended.append(answered)
                        on_ended(answered)
        except (OSError, EOFError, asyncio.IncompleteReadError) as failure:
            raise EngineError("The load generator broke down.", await self._last_words(process)) from failure

    async def _events(self, process: asyncio.subprocess.Process) -> list[tuple[Any, ...]]:
        assert process.stdout is not None
        (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        events: list[tuple[Any, ...]] = marshal.loads(await process.stdout.readexactly(size))
        return events

    def _payload(self, request: Request) -> bytes:
        """The whole HTTP request, ready to be sent; it reaches the process through a pipe, where nobody else reads."""
        address = urlsplit(self.endpoint.base_url)
        body = json.dumps(self.endpoint.body(request)).encode()
        allowed = f"Authorization: Bearer {self.endpoint.key}\r\n" if self.endpoint.key else ""
        head = (
            f"POST {address.path.rstrip('/')}/v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\nUser-Agent: llm-inference-bake-off\r\n"
            f"{allowed}Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def _answered(
        self, stream: _Stream | None, index: int, planned: float, at: float, status: int | None, kind: str, reason: str
    ) -> Answered:
        # Without a stream it failed before it could be sent.
        builder = stream.builder if stream else TimelineBuilder(at, ChatStreamParser())
        error = self._error(kind, reason)
        if status not in (None, 200):
            said = stream.beginning.decode(errors="replace") if stream else ""
            said = without_key(said, self.endpoint.key)[:ERROR_CHARACTERS]
            error = f"{self.endpoint.engine.label} refused the request with HTTP {status}: {said}"
        timeline = builder.finish(at, error, self.origin)
        return Answered(index, planned - self.origin, timeline)

    def _error(self, kind: str, reason: str) -> str | None:
        label = self.endpoint.engine.label
        if kind == "unreachable":
            return f"{label} cannot be reached at {self.endpoint.base_url}: {reason}."
        if kind == "silent":
            return f"{label} sent nothing for {reason} s."
        return f"{label} broke off the answer: {without_key(reason, self.endpoint.key)}." if kind else None

    async def _last_words(self, process: asyncio.subprocess.Process) -> str:
        assert process.stderr is not None
        if process.returncode is None:
            process.kill()
        return (await process.stderr.read()).decode(errors="replace")


class _Stream:
    """A request under way: what has come of its answer."""

    __slots__ = ("_kept", "beginning", "builder", "index")

    def __init__(self, index: int, sent: float, key: str = "") -> None:
        self.index = index
        self.builder = TimelineBuilder(sent, ChatStreamParser(key))
        self.beginning = b""  # of the body, for the words of a refusal
        self._kept = ERROR_CHARACTERS + 6 * len(key)  # so that a key at the cut is whole, however it is written

    def read(self, at: float, data: bytes) -> list[Arrival]:
        if len(self.beginning) < self._kept:
            self.beginning = (self.beginning + data)[: self._kept]
        return self.builder.feed(at, data)
