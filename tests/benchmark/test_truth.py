"""The truth server: what its schedules say, and that its stamps are kept."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest

from benchmark.running import RunningTruth, TrueAnswer, TruthError
from benchmark.truth import Piece, Schedule, _pieces
from engines.clock import monotonic_clock
from engines.http_answer import HTTPAnswer
from engines.openai_stream import ChatStreamParser

PLAIN = Schedule(first_token=0.1, gap=0.01)


def pieces(schedule: Schedule, tokens: int = 8, continuous: bool = False, closing: bool = True) -> list[Piece]:
    return list(_pieces(schedule, tokens, 3, random.Random("seed"), continuous, closing))


def moments(schedule: Schedule, tokens: int = 8) -> list[float]:
    return [piece.at for piece in pieces(schedule, tokens) if piece.tokens]


def events(schedule: Schedule, tokens: int = 8, **asked: bool) -> Iterator[dict[str, Any]]:
    """The JSON of every event of a whole answer, put together as a client does."""
    answer = HTTPAnswer()
    body = b"".join(answer.feed(piece.data) for piece in pieces(schedule, tokens, **asked))
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (PLAIN, [0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17]),
        (replace(PLAIN, tokens_per_chunk=(4,)), [0.1, 0.11]),
        (replace(PLAIN, tokens_per_chunk=(1, 2)), [0.1, 0.11, 0.12, 0.13, 0.14, 0.15]),  # 1 2 1 2 1 and one left
        (replace(PLAIN, burst=4), [0.1, 0.1, 0.1, 0.1, 0.14, 0.14, 0.14, 0.14]),
        (replace(PLAIN, stall_after=3, stall=0.5), [0.1, 0.11, 0.12, 0.63, 0.64, 0.65, 0.66, 0.67]),
        (replace(PLAIN, first_token=2.0), [2.0, 2.01, 2.02, 2.03, 2.04, 2.05, 2.06, 2.07]),
        (replace(PLAIN, cut_after=2), [0.1, 0.11]),
    ],
)
def test_chunks_leave_when_the_schedule_says(schedule: Schedule, expected: list[float]) -> None:
    assert moments(schedule) == pytest.approx(expected)


def test_random_gaps_have_the_right_mean_and_are_the_same_again() -> None:
    schedule = replace(PLAIN, gaps="random")
    first = moments(schedule, tokens=2000)
    gaps = [after - before for before, after in pairwise(first)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.01, rel=0.1)
    assert len({round(gap, 6) for gap in gaps}) > 1000
    assert moments(schedule, tokens=2000) == first


def test_spread_answers_begin_apart_within_one_gap() -> None:
    schedule = replace(PLAIN, phases="spread")
    starts = [next(_pieces(schedule, 1, 1, random.Random(str(seed)), False, False)).at for seed in range(9)]
    assert set(starts) == {0.0}  # the head of the answer comes at once
    firsts = [
        next(piece.at for piece in _pieces(schedule, 1, 1, random.Random(str(seed)), False, False) if piece.tokens)
        for seed in range(50)
    ]
    assert 0.1 <= min(firsts) < 0.102 and 0.108 < max(firsts) <= 0.11


def test_an_answer_is_whole_however_it_is_said() -> None:
    whole = "".join(f" w{place:04d}" for place in range(8))
    for schedule in (
        PLAIN,
        replace(PLAIN, framing="close"),
        replace(PLAIN, halves=True),
        replace(PLAIN, line_end="\r\n"),
        replace(PLAIN, empty_every=2, comment_every=3),
        replace(PLAIN, role="never"),
        replace(PLAIN, role="with the first token"),
        replace(PLAIN, tokens_per_chunk=(3,)),
    ):
        parser, answer = ChatStreamParser(), HTTPAnswer()
        chunks = [chunk for piece in pieces(schedule) for chunk in parser.feed(answer.feed(piece.data))]
        assert "".join(chunk.text for chunk in chunks) == whole, schedule
        assert chunks[-1].usage is not None and chunks[-1].usage.output_tokens == 8
        assert sum(piece.tokens for piece in pieces(schedule)) == 8


def test_reasoning_comes_first_under_its_engines_name() -> None:
    for name in ("reasoning", "reasoning_content"):
        told = list(events(replace(PLAIN, reasoning_tokens=3, reasoning_name=name)))  # type: ignore[arg-type]
        deltas = [event["choices"][0]["delta"] for event in told if event["choices"]]
        assert [list(delta) for delta in deltas if "role" not in delta and delta] == [[name]] * 3 + [["content"]] * 5


@pytest.mark.parametrize(
    ("usage", "asked", "with_chunks", "at_the_end"),
    [
        ("final", {"continuous": False, "closing": True}, 0, 1),
        ("final", {"continuous": False, "closing": False}, 0, 0),
        ("final", {"continuous": True, "closing": True}, 8, 1),
        ("continuous", {"continuous": False, "closing": False}, 8, 1),
        ("none", {"continuous": True, "closing": True}, 0, 0),
    ],
)
def test_usage_is_said_as_asked_or_as_told(
    usage: Any, asked: dict[str, bool], with_chunks: int, at_the_end: int
) -> None:
    told = list(events(replace(PLAIN, usage=usage), **asked))
    assert sum("usage" in event for event in told if event["choices"]) == with_chunks
    assert sum(not event["choices"] for event in told) == at_the_end


def test_a_schedule_with_an_unknown_word_is_refused(truth: RunningTruth) -> None:
    with pytest.raises(ValueError, match="unknown: gpa"):
        Schedule.of({"gpa": 1})
    with pytest.raises(TruthError, match="unknown: gpa"):
        truth._exchange("/schedule", json.dumps({"gpa": 1}).encode())
    with pytest.raises(TruthError, match="nothing at /nowhere"):
        truth._exchange("/nowhere")
    truth.follow(PLAIN)


def ask(truth: RunningTruth, prompt: str, tokens: int) -> float:
    """Asks as simply as can be; returns when the request was sent. Reads until the server closes."""
    port = int(truth.base_url.rpartition(":")[2])
    body = json.dumps({"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}).encode()
    with socket.create_connection(("127.0.0.1", port)) as link:
        sent = monotonic_clock()
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        while link.recv(65536):
            pass
    return sent


def test_the_server_keeps_the_truth_of_each_answer(truth: RunningTruth) -> None:
    truth.follow(replace(PLAIN, keep_alive=False))
    sent = ask(truth, "a question w0042", 5)
    (answer,) = truth.answers()
    assert (answer.prompt, answer.tokens, answer.finished) == ("a question w0042", (1,) * 5, True)
    assert sent - 0.001 < answer.asked < sent + 0.05
    # The server was as late as it says: each chunk left at its time plus that.
    for place, (moment, late) in enumerate(zip(answer.moments, answer.late, strict=True)):
        assert moment == pytest.approx(answer.asked + 0.1 + place * 0.01 + late)
        assert 0 <= late < 0.05
    truth.follow(PLAIN)
    assert truth.answers() == []  # another schedule, another story


def test_an_answer_names_its_question(truth: RunningTruth) -> None:
    truth.follow(replace(PLAIN, keep_alive=False))
    truth.prepare(["a question w0042"], 5)
    port = int(truth.base_url.rpartition(":")[2])
    body = json.dumps({"messages": [{"role": "user", "content": "a question w0042"}], "max_tokens": 2}).encode()
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        said = b"".join(iter(lambda: link.recv(65536), b""))
    assert b'" w0042"' in said and b'" w0001"' in said and b'" w0000"' not in said


def test_a_true_answers_metrics_are_those_of_its_moments() -> None:
    # Asked at 10 s; 2 tokens at 10.5 s, 4 at 10.6 s, 4 at 10.9 s.
    answer = TrueAnswer("q", 10.0, (10.5, 10.6, 10.9), (2, 4, 4), (0.0, 0.0, 0.0), True)
    assert answer.ttft == pytest.approx(0.5)
    assert answer.tpot == pytest.approx(0.4 / 8)
    assert answer.inter_token_latencies == pytest.approx([0.025] * 4 + [0.075] * 4)


def test_every_field_of_a_schedule_survives_the_way_to_the_server(truth: RunningTruth) -> None:
    schedule = replace(PLAIN, tokens_per_chunk=(1, 2), stall_after=3, stall=0.5, role="never", phases="spread")
    truth.follow(schedule)
    assert Schedule.of(truth._exchange("/truth")["schedule"]) == schedule
    assert asdict(schedule)["tokens_per_chunk"] == (1, 2)
    truth.follow(PLAIN)
