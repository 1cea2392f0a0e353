"""Bytes of server-sent events into chunks, and what a request says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engines import ENGINES
from engines.base import Chunk, Request, SpeculationCounters, Usage
from engines.openai_stream import ERROR_CHARACTERS, ChatStreamParser, Endpoint, parse_chunk, without_key

REQUEST = Request("Why?", max_tokens=3)


def event(delta: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}], **more}).encode()


STREAM = b"\n\n".join(
    [
        b": a comment keeps the connection open",
        b"data: " + event({"role": "assistant", "content": ""}),
        b"event: message\ndata: " + json.dumps(json.loads(event({"content": "né"})), ensure_ascii=False).encode(),
        b"data:" + event({"content": " two"}),  # the blank after the colon is optional
        b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}',
        b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}',
        b"data: [DONE]",
        b"",
    ]
)
CHUNKS = [Chunk(), Chunk("né"), Chunk(" two"), Chunk(finish_reason="stop"), Chunk(usage=Usage(4, 2))]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_stream_cut_at_any_byte_gives_the_same_chunks(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    for cut in range(len(stream) + 1):  # one of the cuts lies inside the two bytes of é
        parser = ChatStreamParser()
        assert parser.feed(stream[:cut]) + parser.feed(stream[cut:]) == CHUNKS, f"cut at byte {cut}"


def test_a_stream_that_comes_byte_by_byte_gives_the_same_chunks() -> None:
    parser = ChatStreamParser()
    assert [chunk for byte in STREAM for chunk in parser.feed(bytes([byte]))] == CHUNKS


def test_a_line_without_its_end_waits_for_it() -> None:
    parser = ChatStreamParser()
    assert parser.feed(b"data: " + event({"content": "x"})) == []
    assert parser.feed(b"\n") == [Chunk("x")]


def test_sglangs_count_of_its_speculation_comes_with_the_usage() -> None:
    # 10 steps of 3 drafts: in 2 none was accepted, in 3 one, in 1 two, in 4 all three; 3 + 2 + 12 = 17.
    details = {"spec_verify_ct": 10, "spec_num_proposed_drafts": 30, "spec_num_correct_drafts": 17}
    details["spec_correct_drafts_histogram"] = [2, 3, 1, 4]  # type: ignore[assignment]
    chunk = parse_chunk(json.dumps({"choices": [], "sglext": {"spec_tokens_details": details}}).encode())
    assert chunk.usage == Usage(speculation=SpeculationCounters(10, 30, 17, (8, 5, 4)))
    assert parse_chunk(b'{"choices": [], "sglext": {"routed_experts": null}}').usage is None


def test_the_role_and_an_empty_text_are_no_output() -> None:
    assert not parse_chunk(event({"role": "assistant", "content": ""})).has_output
    assert not parse_chunk(event({"role": "assistant", "content": None})).has_output
    assert parse_chunk(event({"content": " "})).has_output  # a blank is a token


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"], ids=["vLLM's word", "SGLang's word"])
def test_reasoning_is_told_from_text(key: str) -> None:
    assert parse_chunk(event({key: "hm"})) == Chunk(reasoning="hm")


def test_usage_comes_with_chunks_too_and_names_cached_tokens() -> None:
    usage = {"prompt_tokens": 40, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 32}}
    assert parse_chunk(event({"content": "x"}, usage=usage)) == Chunk("x", usage=Usage(40, 6, 32))


def test_what_the_server_does_not_report_is_none_and_not_zero() -> None:
    assert parse_chunk(event({"content": "x"}, usage=None)).usage is None
    details_are_null = {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": None}
    assert parse_chunk(event({}, usage=details_are_null)).usage == Usage(4, 2, None)
    assert parse_chunk(event({}, usage={})).usage == Usage(None, None, None)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"{broken", "sent something that is not JSON: {broken"),
        (b"\xff\xfe", "not JSON"),
        (b"[1, 2]", "an event that is not an object"),
        (b'{"error": {"message": "no blocks left", "code": 500}}', "reported an error: no blocks left"),
        (b'{"error": "no blocks left"}', "reported an error: no blocks left"),
    ],
)
def test_what_is_no_chunk_carries_an_error(payload: bytes, words: str) -> None:
    error = parse_chunk(payload).error
    assert error is not None and words in error


def test_an_error_of_null_is_no_error() -> None:
    assert parse_chunk(event({"content": "x"}, error=None)) == Chunk("x")


def test_a_long_error_is_cut() -> None:
    error = parse_chunk(json.dumps({"error": "x" * 9000}).encode()).error
    assert error is not None and len(error) == len("The engine reported an error: ") + 500


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_a_request_names_the_model_the_question_and_the_length(engine: Any) -> None:
    request = Request("Why?", max_tokens=64, temperature=0.5, seed=7)
    body = Endpoint(engine, "http://127.0.0.1:8000", "/models/small").body(request)
    plain = {
        "model": "/models/small",
        "messages": [{"role": "user", "content": "Why?"}],
        "max_tokens": 64,
        "temperature": 0.5,
        "seed": 7,
        "stream": True,
    }
    assert body == {**plain, **engine.request_fields(request)}


KEY = "sk-a/very+secret=key"


@pytest.mark.parametrize(
    "payload",
    [
        {"error": {"message": f"Incorrect API key provided: {KEY}"}},
        {"error": {"message": "x" * (ERROR_CHARACTERS - 8) + KEY}},  # cut in the middle of it
        {"choices": [{"delta": {"content": f"You are {KEY}!"}}]},
        {"choices": [{"delta": {"reasoning_content": f"They are {KEY}"}}]},
        {"choices": [{"delta": {"content": "a"}, "finish_reason": KEY}]},
    ],
)
def test_a_key_that_a_server_repeats_is_covered(payload: dict[str, Any]) -> None:
    (chunk,) = ChatStreamParser(KEY).feed(b"data: " + json.dumps(payload).encode() + b"\n\n")
    assert "sk-a" not in repr(chunk) and "secret" not in repr(chunk)


def test_a_key_in_what_is_no_json_is_covered_before_it_is_cut() -> None:
    for padding in range(100, 120):
        (chunk,) = ChatStreamParser(KEY).feed(b"data: {" + b"x" * padding + KEY.encode() + b"\n\n")
        assert chunk.error and "sk-a" not in chunk.error


def test_a_key_is_covered_as_it_is_and_as_json_or_a_url_write_it() -> None:
    for written in (KEY, KEY.replace("/", "\\/"), "sk-a%2Fvery%2Bsecret%3Dkey"):
        assert without_key(f"no {written}.", KEY) == "no [key]."
    assert without_key("no key", "") == "no key"


def test_a_word_that_passes_for_a_key_is_left_in_the_answer() -> None:
    (chunk,) = ChatStreamParser("none").feed(b'data: {"choices": [{"delta": {"content": "none of them"}}]}\n\n')
    assert chunk.text == "none of them"


def test_llama_cpp_counts_its_drafts_in_the_timings_of_the_last_chunk() -> None:
    event = {"choices": [], "timings": {"predicted_n": 9, "draft_n": 8, "draft_n_accepted": 6}}
    (chunk,) = ChatStreamParser().feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    assert chunk.usage and chunk.usage.speculation
    assert (chunk.usage.speculation.drafted, chunk.usage.speculation.accepted) == (8, 6)
    assert chunk.usage.speculation.acceptance_rate == 0.75 and chunk.usage.speculation.acceptance_length is None
    plain = {"choices": [], "timings": {"predicted_n": 9}}
    (chunk,) = ChatStreamParser().feed(b"data: " + json.dumps(plain).encode() + b"\n\n")
    assert chunk.usage is None
