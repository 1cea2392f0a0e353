"""One HTTP answer out of bytes cut anywhere."""

from __future__ import annotations

import pytest

from engines.http_answer import BrokenAnswer, HTTPAnswer

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;name=value\r\n world\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 422 Unprocessable Entity\r\ncontent-length: 11\r\n\r\nhello world"
CLOSING = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello world"


def fed(*blocks: bytes, closed: bool = False) -> tuple[HTTPAnswer, bytes]:
    answer = HTTPAnswer()
    body = b"".join(answer.feed(block) for block in blocks)
    if closed:
        answer.closed()
    return answer, body


@pytest.mark.parametrize(
    ("data", "status", "reusable"), [(CHUNKED, 200, True), (SIZED, 422, True), (CLOSING, 200, False)]
)
def test_an_answer_cut_anywhere_is_the_same(data: bytes, status: int, reusable: bool) -> None:
    cuts = [[data], [data[place : place + 1] for place in range(len(data))]]
    cuts += [[data[:place], data[place:]] for place in range(1, len(data))]
    for blocks in cuts:
        answer, body = fed(*blocks, closed=data is CLOSING)
        assert (answer.status, body, answer.complete) == (status, b"hello world", True), blocks
        assert answer.reusable == reusable


def test_each_block_gives_the_body_bytes_that_came_in_it() -> None:
    # What came in which read is what the stamps belong to.
    answer = HTTPAnswer()
    blocks = [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        b"3\r\none\r\n",
        b"5\r\nth",
        b"ree\r\n3\r\nsix\r\n",
    ]
    assert [answer.feed(block) for block in blocks] == [b"", b"one", b"th", b"reesix"]
    assert not answer.complete


def test_an_answer_ends_with_its_last_chunk_and_not_with_bytes_that_look_like_it() -> None:
    answer, body = fed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nx0\r\n\r\n\r\n")
    assert (body, answer.complete) == (b"x0\r\n\r\n", False)


def test_trailers_belong_to_the_end() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
    answer, body = fed(head, b"0\r\nX-Checksum: 1\r\n")
    assert (body, answer.complete) == (b"x", False)
    answer.feed(b"\r\n")
    assert answer.complete


def test_an_interim_answer_is_passed_over() -> None:
    answer, body = fed(b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED)
    assert (answer.status, body) == (422, b"hello world")


@pytest.mark.parametrize(
    ("head", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
    ],
)
def test_an_answer_without_a_body_says_whether_the_connection_may_go_on(head: bytes, reusable: bool) -> None:
    answer, body = fed(head)
    assert (answer.complete, answer.reusable, body) == (True, reusable, b"")


def test_a_connection_closed_in_mid_answer_leaves_it_incomplete() -> None:
    for data in (b"", CHUNKED[:-5], SIZED[:-1]):
        answer, _ = fed(data, closed=True)
        assert not answer.complete and not answer.reusable


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 abc\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "no number"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnothex\r\n", "chunk's size"),
        (b"x" * 70_000, "no end"),
    ],
)
def test_what_is_no_answer_is_told(data: bytes, words: str) -> None:
    with pytest.raises(BrokenAnswer, match=words):
        fed(data)
