"""What came of one request: every arrival with its moment, built from stamped blocks of bytes.

A block is stamped as it comes in, before a byte of it is parsed, so parsing never enters a number.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from engines.base import Chunk, EngineError, Request, Usage
from engines.clock import Clock, monotonic_clock

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


class TimelineBuilder:
    """Builds the timeline of one request that was sent at the moment `sent`. Moments are those of the one clock.

    `error`: what the engine said went wrong, within its answer; nothing after it is read.
    """

    __slots__ = ("arrivals", "error", "_finish_reason", "_parser", "_reported", "_sent", "_usage")

    def __init__(self, sent: float, parser: ChunkParser) -> None:
        self.arrivals: list[Arrival] = []
        self.error: str | None = None
        self._sent, self._parser = sent, parser
        self._usage: Usage | None = None
        self._reported = 0  # tokens so far, from usage that came with chunks
        self._finish_reason: str | None = None

    def feed(self, at: float, block: bytes) -> list[Arrival]:
        """The arrivals in a block that came at the moment `at`."""
        if self.error:
            return []
        new: list[Arrival] = []
        for chunk in self._parser.feed(block):
            self._usage = _joined(self._usage, chunk.usage)
            self._finish_reason = chunk.finish_reason or self._finish_reason
            if chunk.error:
                self.error = chunk.error
                break
            if not chunk.has_output:
                continue
            tokens = None
            if chunk.usage and chunk.usage.output_tokens is not None:
                tokens = chunk.usage.output_tokens - self._reported
                self._reported = chunk.usage.output_tokens
            for text, reasoning in ((chunk.reasoning, True), (chunk.text, False)):
                if text:
                    new.append(Arrival(at - self._sent, text, reasoning, tokens))
                    tokens = None if tokens is None else 0  # counted with the first of the two
        self.arrivals += new
        return new

    def finish(self, closed: float, error: str | None = None, origin: float = 0.0) -> Timeline:
        """The timeline of an answer that ended at the moment `closed`. `origin`: the moment at which the run began."""
        error = self.error or error
        if error is None and not self.arrivals:
            error = "The engine ended its answer without a single token."
        elif error is None and self._finish_reason is None:
            error = "The engine's answer broke off before its end."
        timeline = Timeline(
            sent=self._sent - origin,
            arrivals=tuple(self.arrivals),
            closed=closed - self._sent,
            usage=self._usage or Usage(),
            finish_reason=self._finish_reason,
            error=error,
        )
        return _with_counted_tokens(timeline)


async def record(
    request: Request,
    blocks: Callable[[Request], AsyncGenerator[bytes, None]],
    parser: ChunkParser,
    on_arrival: Callable[[Arrival], None] = lambda arrival: None,
    clock: Clock = monotonic_clock,
    origin: float = 0.0,
) -> Timeline:
    """Send a single `request`, stamp every block that comes back as it is read, and return its timeline.

    A failure of the engine ends the timeline with its `error`, and keeps what came before it.
    `origin` is the clock's reading at the start of the run.
    """
    builder = TimelineBuilder(clock(), parser)
    error: str | None = None
    try:
        async with aclosing(blocks(request)) as stream:
            async for block in stream:
                for arrival in builder.feed(clock(), block):
                    on_arrival(arrival)
                if builder.error:
                    break
    except EngineError as failure:
        error = failure.message
    return builder.finish(clock(), error, origin)


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
