"""The one clock: what is stamped when, how tokens are counted, and how a timeline ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

import pytest

from engines.base import Chunk, EngineError, Request, Usage
from engines.timeline import Arrival, Timeline, record

REQUEST = Request("Why is the sky blue?")
END = Chunk(finish_reason="length")


class Chunks:
    """A parser for blocks that are the number of the next list of chunks."""

    def __init__(self, *blocks: list[Chunk]) -> None:
        self.blocks = blocks

    def feed(self, block: bytes) -> list[Chunk]:
        return self.blocks[int(block)]


def measured(*blocks: list[Chunk] | Exception, ticks: Iterable[float], origin: float = 0.0) -> Timeline:
    """The timeline of an answer of these blocks, when the clock reads `ticks` one after the other: one at the
    sending, one per block, one at the end."""

    async def send(request: Request) -> AsyncGenerator[bytes, None]:
        for number, block in enumerate(blocks):
            if isinstance(block, Exception):
                raise block
            yield b"%d" % number

    parser = Chunks(*[block for block in blocks if isinstance(block, list)])
    return asyncio.run(record(REQUEST, send, parser, clock=iter(ticks).__next__, origin=origin))


def words(count: int, first: int = 0) -> list[Chunk]:
    return [Chunk(text=f" {number}") for number in range(first, first + count)]


def test_every_arrival_is_kept_with_its_time_since_the_sending() -> None:
    # sent at 5.00 s; blocks at 5.25, 5.26, 5.76 and 5.77 s: the gaps 10, 500 and 10 ms stay apart; closed at 5.80 s
    timeline = measured(*([word] for word in words(3)), [Chunk(" 3"), END], ticks=[5, 5.25, 5.26, 5.76, 5.77, 5.80])
    assert [arrival.at for arrival in timeline.arrivals] == pytest.approx([0.25, 0.26, 0.76, 0.77])
    assert timeline.closed == pytest.approx(0.80)
    assert timeline.text == " 0 1 2 3"
    assert (timeline.finish_reason, timeline.error) == ("length", None)


def test_sent_is_on_the_clock_of_the_run() -> None:
    # the run began when the clock read 100, the request was sent at 103.5: 103.5 - 100 = 3.5 s into the run
    timeline = measured([*words(1), END], ticks=[103.5, 104, 105], origin=100)
    assert timeline.sent == pytest.approx(3.5)
    assert timeline.arrivals[0].at == pytest.approx(0.5)  # 104 - 103.5, not 104 - 100


def test_chunks_of_one_block_share_its_time() -> None:
    timeline = measured(words(2), [*words(1, first=2), END], ticks=[0, 1, 2, 3])
    assert [arrival.at for arrival in timeline.arrivals] == [1, 1, 2]


def test_parsing_never_enters_a_number() -> None:
    now = 0.0

    class SlowParser(Chunks):
        def feed(self, block: bytes) -> list[Chunk]:
            nonlocal now
            now += 50
            return super().feed(block)

    async def send(request: Request) -> AsyncGenerator[bytes, None]:
        nonlocal now
        now += 0.25
        yield b"0"

    timeline = asyncio.run(record(REQUEST, send, SlowParser([*words(1), END]), clock=lambda: now))
    assert timeline.arrivals[0].at == 0.25  # the 50 s of parsing come after the stamp


def test_a_role_only_delta_is_no_token() -> None:
    timeline = measured([Chunk()], [*words(1), END], ticks=[0, 1, 2, 3])
    assert [(arrival.at, arrival.text) for arrival in timeline.arrivals] == [(2, " 0")]


def test_each_arrival_is_told_while_the_answer_still_streams() -> None:
    story: list[str] = []

    async def send(request: Request) -> AsyncGenerator[bytes, None]:
        for number in range(2):
            story.append(f"block {number}")
            yield b"%d" % number

    def told(arrival: Arrival) -> None:
        story.append(f"told{arrival.text}")

    asyncio.run(record(REQUEST, send, Chunks(words(1), [*words(1, first=1), END]), on_arrival=told))
    assert story == ["block 0", "told 0", "block 1", "told 1"]


def test_tokens_per_chunk_are_the_steps_of_the_cumulative_usage() -> None:
    # cumulative 1, 5, 7 output tokens: the chunks carry 1 - 0 = 1, 5 - 1 = 4 and 7 - 5 = 2
    chunks = [Chunk(text, usage=Usage(9, total, 3)) for text, total in (("a", 1), ("b", 5), ("c", 7))]
    timeline = measured(*([chunk] for chunk in chunks), [END], ticks=range(6))
    assert [arrival.tokens for arrival in timeline.arrivals] == [1, 4, 2]
    assert timeline.token_source == "per chunk"
    assert timeline.usage == Usage(prompt_tokens=9, output_tokens=7, cached_tokens=3)


def test_a_token_whose_text_is_held_back_counts_with_the_next_text() -> None:
    # the second token is half a character: its chunk has no text; 3 - 1 = 2 tokens arrive with the third
    held_back = [Chunk("a", usage=Usage(1, 1)), Chunk(usage=Usage(1, 2)), Chunk("é", usage=Usage(1, 3)), END]
    timeline = measured(*([chunk] for chunk in held_back), ticks=range(6))
    assert [(arrival.at, arrival.tokens) for arrival in timeline.arrivals] == [(1, 1), (3, 2)]


def test_a_chunk_of_reasoning_and_text_counts_its_tokens_once() -> None:
    timeline = measured([Chunk("So", "hm", usage=Usage(1, 3)), END], ticks=range(3))
    assert [(a.text, a.reasoning, a.tokens) for a in timeline.arrivals] == [("hm", True, 3), ("So", False, 0)]
    assert timeline.text == "So"


@pytest.mark.parametrize(
    ("total", "tokens", "source"),
    [
        pytest.param(3, [1, 1, 1], "final usage", id="3 chunks, 3 tokens: one each"),
        pytest.param(5, [None, None, None], "final usage", id="3 chunks, 5 tokens: nobody knows which"),
        pytest.param(None, [None, None, None], "estimated", id="3 chunks, nothing reported"),
    ],
)
def test_tokens_that_come_with_the_closing_usage(total: int | None, tokens: list[int | None], source: str) -> None:
    closing = [] if total is None else [Chunk(usage=Usage(9, total))]
    timeline = measured(words(3), [END, *closing], ticks=range(4))
    assert [arrival.tokens for arrival in timeline.arrivals] == tokens
    assert timeline.token_source == source
    assert timeline.usage.output_tokens == total


@pytest.mark.parametrize(
    "failure",
    [EngineError("out of memory"), [Chunk(error="out of memory"), *words(1, first=9)]],
    ids=["raised", "told"],
)
def test_a_failure_ends_the_timeline_and_keeps_what_came_before(failure: list[Chunk] | Exception) -> None:
    timeline = measured(words(2), failure, ticks=[0, 1, 2, 3])
    assert timeline.error == "out of memory"
    assert timeline.text == " 0 1"
    assert timeline.closed is not None


def test_an_answer_without_a_single_token_is_an_error() -> None:
    timeline = measured([Chunk()], [END], ticks=range(4))
    assert timeline.error == "The engine ended its answer without a single token."


def test_an_answer_that_stops_without_a_finish_reason_broke_off() -> None:
    timeline = measured(words(2), ticks=range(3))
    assert timeline.error == "The engine's answer broke off before its end."
    assert len(timeline.arrivals) == 2


def test_an_error_of_our_own_is_not_taken_for_the_engines() -> None:
    with pytest.raises(ZeroDivisionError):
        measured(words(1), ZeroDivisionError(), ticks=range(4))


def test_a_stream_is_closed_when_its_request_ends_however_it_ends() -> None:
    closed: list[bool] = []

    async def send(request: Request) -> AsyncGenerator[bytes, None]:
        try:
            yield b"0"
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def fail_at_the_first_chunk() -> None:
        await record(REQUEST, send, Chunks([Chunk(error="out of memory")]))
        assert closed == [True]  # already, and not when the garbage collector comes by

    asyncio.run(fail_at_the_first_chunk())
    closed.clear()

    async def cancel_after_the_first_arrival() -> None:
        arrived = asyncio.Event()
        parser = Chunks(words(1))
        task = asyncio.create_task(record(REQUEST, send, parser, on_arrival=lambda arrival: arrived.set()))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [True]

    asyncio.run(cancel_after_the_first_arrival())
