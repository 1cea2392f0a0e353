"""The one clock: stamps what an engine sends, and keeps every arrival.

Nothing else in the project reads a clock to measure an engine. `record` stamps each block of bytes as it
leaves the socket, before a byte of it is parsed, so parsing never enters a number.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from engines.base import Chunk, EngineError, Request, Usage

Clock = Callable[[], float]
monotonic_clock: Clock = time.perf_counter

TokenSource = Literal["per chunk", "final usage", "estimated"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One chunk with text in it. `at`: seconds since the request was sent. `tokens`: how many output tokens it
    carries; None where the server did not say and it cannot be inferred."""

    at: float
    text: str
    reasoning: bool = False
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Timeline:
    """The moments of one request. Times are seconds; `sent` is on the run's own clock, the rest since `sent`.

    `token_source` says how the tokens were counted: "per chunk" as the server reported with every chunk,
    "final usage" from its closing report, "estimated" one per chunk because it reported nothing.
    """

    sent: float
    arrivals: tuple[Arrival, ...] = ()
    closed: float | None = None  # when the stream ended, error or not
    usage: Usage = Usage()
    token_source: TokenSource = "estimated"
    finish_reason: str | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(arrival.text for arrival in self.arrivals if not arrival.reasoning)


class ChunkParser(Protocol):
    def feed(self, block: bytes) -> list[Chunk]: ...


async def record(
    request: Request,
    blocks: Callable[[Request], AsyncGenerator[bytes, None]],
    parser: ChunkParser,
    on_arrival: Callable[[Arrival], None] = lambda arrival: None,
    clock: Clock = monotonic_clock,
    origin: float = 0.0,
) -> Timeline:
    """Send `request`, stamp everything that comes back, and return its timeline.

    A failure of the engine ends the timeline with its `error`, and keeps what came before it.
    `origin` is the clock's reading at the start of the run.
    """
    sent = clock()
    arrivals: list[Arrival] = []
    usage: Usage | None = None
    reported_tokens = 0  # cumulative, from usage that came with chunks
    finish_reason: str | None = None
    error: str | None = None
    try:
        async with aclosing(blocks(request)) as stream:
            async for block in stream:
                at = clock() - sent
                for chunk in parser.feed(block):
                    usage = _joined(usage, chunk.usage)
                    finish_reason = chunk.finish_reason or finish_reason
                    if chunk.error:
                        raise EngineError(chunk.error)
                    if not chunk.has_output:
                        continue
                    tokens = None
                    if chunk.usage and chunk.usage.output_tokens is not None:
                        tokens = chunk.usage.output_tokens - reported_tokens
                        reported_tokens = chunk.usage.output_tokens
                    for text, reasoning in ((chunk.reasoning, True), (chunk.text, False)):
                        if text:
                            arrival = Arrival(at, text, reasoning, tokens)
                            arrivals.append(arrival)
                            on_arrival(arrival)
                            tokens = None if tokens is None else 0  # counted with the first of the two
    except EngineError as failure:
        error = failure.message
    finally:
        closed = clock() - sent
    if error is None and not arrivals:
        error = "The engine ended its answer without a single token."
    elif error is None and finish_reason is None:
        error = "The engine's answer broke off before its end."
    timeline = Timeline(
        sent=sent - origin,
        arrivals=tuple(arrivals),
        closed=closed,
        usage=usage or Usage(),
        finish_reason=finish_reason,
        error=error,
    )
    return _with_counted_tokens(timeline)


def _joined(before: Usage | None, now: Usage | None) -> Usage | None:
    """The later report counts; what only the earlier one said is kept."""
    if before is None or now is None:
        return now or before
    return Usage(*(new if new is not None else old for old, new in zip(_fields(before), _fields(now), strict=True)))


def _fields(usage: Usage) -> tuple[Any, ...]:
    return usage.prompt_tokens, usage.output_tokens, usage.cached_tokens, usage.speculation


def _with_counted_tokens(timeline: Timeline) -> Timeline:
    """Decide where the token counts come from, and fill in those that follow from the final usage."""
    arrivals, total = timeline.arrivals, timeline.usage.output_tokens
    if arrivals and all(arrival.tokens is not None for arrival in arrivals):
        return replace(timeline, token_source="per chunk")
    if total is not None:
        if total == len(arrivals):  # as many chunks as tokens: one each
            arrivals = tuple(replace(arrival, tokens=1) for arrival in arrivals)
        return replace(timeline, arrivals=arrivals, token_source="final usage")
    return replace(timeline, token_source="estimated")
