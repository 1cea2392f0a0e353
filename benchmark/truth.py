"""The truth server: OpenAI-compatible, emits tokens on a schedule, and stamps each chunk as it goes out.

It runs in a process of its own, serves whole answers prepared beforehand, and does nothing while it waits. What a
client reports is compared with its stamps, so that an error is the client's. Its own lateness is kept too.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import functools
import gc
import heapq
import json
import random
import re
import selectors
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from engines.clock import WallOffset, be_punctual, monotonic_clock, receive, sleep_until, stamp_arrivals

MODEL = "truth"
READ_BYTES = 1 << 16
NAMED_PROMPT = re.compile(r" w\d{4}$")
LOOK_SECONDS = 0.001  # at the sockets, between chunks


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the server says what. Times are seconds.

    A chunk carries `tokens_per_chunk` tokens, one number after the other, again and again. `burst` chunks are handed
    over at once, then comes as much silence as they would have taken one by one. After `stall_after` chunks the answer
    stands still for `stall`. `gaps` "random": exponential, with `gap` as their mean, the same for the same prompt.
    `phases` "spread": answers that were asked for together do not tick together, but apart within one gap.

    The first token is " w0000", or the word of that form with which the prompt ends: so an answer tells its question.
    """

    first_token: float = 0.1
    gap: float = 0.01
    gaps: Literal["fixed", "random"] = "fixed"
    phases: Literal["together", "spread"] = "together"
    tokens_per_chunk: tuple[int, ...] = (1,)
    burst: int = 1
    stall_after: int = 0
    stall: float = 0.0
    role: Literal["at once", "with the first token", "never"] = "at once"  # of a delta with a role and no text
    empty_every: int = 0  # every so many chunks another one with an empty delta
    comment_every: int = 0  # every so many chunks a comment of the event stream
    reasoning_tokens: int = 0
    reasoning_name: Literal["reasoning", "reasoning_content"] = "reasoning_content"
    usage: Literal["continuous", "final", "none"] = "final"
    framing: Literal["chunked", "close"] = "chunked"
    line_end: Literal["\n", "\r\n"] = "\n"
    halves: bool = False  # every event is handed over in two pieces
    keep_alive: bool = True
    cut_after: int = 0  # chunks, then the connection is closed
    status: int = 200

    @classmethod
    def of(cls, value: dict[str, Any]) -> Schedule:
        known = {field.name for field in fields(cls)}
        if unknown := set(value) - known:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        value = {**value, "tokens_per_chunk": tuple(value.get("tokens_per_chunk", (1,)))}
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that are handed to the kernel `at` s after the request came in. `tokens`: of text that they carry."""

    at: float
    data: bytes
    tokens: int = 0


@functools.lru_cache(maxsize=4096)
def pieces(
    schedule: Schedule, tokens: int, prompt_tokens: int, seed: str, continuous: bool, closing: bool
) -> tuple[Piece, ...]:
    """A whole answer of `tokens` tokens. `continuous`, `closing`: usage was asked for with each chunk, at the end.

    Kept, so that whoever asked before (to warm up) does not make the server late for the others.
    """
    return tuple(_pieces(schedule, tokens, prompt_tokens, random.Random(seed), continuous, closing))


def _pieces(
    schedule: Schedule, tokens: int, prompt_tokens: int, chance: random.Random, continuous: bool, closing: bool
) -> Iterator[Piece]:

    def event(value: dict[str, Any] | None, delta: dict[str, str] | None = None, reason: str | None = None) -> bytes:
        if value is None:
            value = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        whole = {"id": "chatcmpl-truth", "object": "chat.completion.chunk", "created": 1, "model": MODEL, **value}
        return f"data: {json.dumps(whole)}{schedule.line_end * 2}".encode()

    def usage(count: int) -> dict[str, int]:
        return {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}

    def framed(data: bytes) -> bytes:
        return data if schedule.framing == "close" else b"%x\r\n%s\r\n" % (len(data), data)

    head = f"HTTP/1.1 {schedule.status} {'OK' if schedule.status == 200 else 'Refused'}\r\nContent-Type: "
    head += "text/event-stream; charset=utf-8\r\n" if schedule.status == 200 else "application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n" if schedule.framing == "chunked" else ""
    head += "\r\n" if schedule.keep_alive and schedule.framing == "chunked" else "Connection: close\r\n\r\n"
    end = b"0\r\n\r\n" if schedule.framing == "chunked" else b""
    if schedule.status != 200:
        yield Piece(0.0, head.encode() + framed(b'{"error": {"message": "the schedule says so"}}') + end)
        return
    role = framed(event(None, {"role": "assistant", "content": ""}))
    yield Piece(0.0, head.encode() + (role if schedule.role == "at once" else b""))
    at = schedule.first_token + (chance.random() * schedule.gap if schedule.phases == "spread" else 0.0)
    if schedule.role == "with the first token":
        yield Piece(at, role)
    sent = chunks = 0
    while sent < tokens:
        count = min(schedule.tokens_per_chunk[chunks % len(schedule.tokens_per_chunk)], tokens - sent)
        name = schedule.reasoning_name if sent < schedule.reasoning_tokens else "content"
        text = "".join(f" w{sent + place:04d}" for place in range(count))
        sent += count
        chunks += 1
        value: dict[str, Any] = {"choices": [{"index": 0, "delta": {name: text}, "finish_reason": None}]}
        if schedule.usage == "continuous" or (continuous and schedule.usage != "none"):
            value["usage"] = usage(sent)
        data = framed(event(value))
        if schedule.halves:
            middle = len(data) // 2
            yield Piece(at, data[:middle])
            at += schedule.gap / 4
            yield Piece(at, data[middle:], count)
        else:
            yield Piece(at, data, count)
        if schedule.cut_after and chunks == schedule.cut_after:
            return
        extra = b""
        if schedule.empty_every and chunks % schedule.empty_every == 0:
            extra += framed(event(None, {"content": ""}))
        if schedule.comment_every and chunks % schedule.comment_every == 0:
            extra += framed(f": still there{schedule.line_end * 2}".encode())
        if extra:
            yield Piece(at + schedule.gap / 4, extra)
        if sent == tokens:
            break
        gap = chance.expovariate(1 / schedule.gap) if schedule.gaps == "random" else schedule.gap
        if schedule.burst > 1:
            gap = schedule.burst * schedule.gap if chunks % schedule.burst == 0 else 0.0
        at += gap + (schedule.stall if schedule.stall_after == chunks else 0.0)
    last = framed(event(None, {}, "length"))
    if schedule.usage != "none" and (closing or continuous or schedule.usage == "continuous"):
        last += framed(event({"choices": [], "usage": usage(sent)}))
    yield Piece(at, last + framed(f"data: [DONE]{schedule.line_end * 2}".encode()) + end)


class _Answer:
    """One answer under way, and its truth."""

    __slots__ = ("asked", "late", "link", "moments", "next", "pieces", "prompt", "schedule", "tokens")

    def __init__(self, link: _Link, asked: float, prompt: str, schedule: Schedule, whole: tuple[Piece, ...]) -> None:
        self.link, self.asked, self.prompt, self.schedule, self.pieces = link, asked, prompt, schedule, whole
        self.next = 0
        self.moments = array.array("d")  # when each chunk with tokens was handed to the kernel
        self.tokens = array.array("i")
        self.late = array.array("d")  # s behind the schedule


class _Link:
    __slots__ = ("answer", "data", "out", "socket", "writing")

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.data, self.out = connection, b"", b""
        self.writing = False
        self.answer: _Answer | None = None


class TruthServer:
    """Serves until it is ended. `/truth` gives what was said when; `/schedule` takes a new schedule and forgets it;
    `/prepare` makes answers beforehand, so that making them does not delay others."""

    def __init__(self, port: int, schedule: Schedule) -> None:
        self.schedule = schedule
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.offset = WallOffset()
        self.due: list[tuple[float, int, _Answer]] = []
        self.answers: list[_Answer] = []
        self.count = 0

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def serve(self) -> None:
        gc.disable()
        looked = 0.0
        while True:
            now = monotonic_clock()
            while self.due and self.due[0][0] <= now:
                self._hand_over(heapq.heappop(self.due)[2])
                now = monotonic_clock()
            wait = self.due[0][0] - now if self.due else None
            if wait is not None and wait < LOOK_SECONDS and now - looked < LOOK_SECONDS:
                sleep_until(self.due[0][0])
                continue
            ready = self.selector.select(None if wait is None else int(max(wait, 0.0) * 1000) / 1000)
            looked = monotonic_clock()
            if ready:
                self.offset.read()
            for key, mask in ready:
                if key.fileobj is self.listener:
                    self._accept()
                elif mask & selectors.EVENT_WRITE:
                    self._flush(key.data)
                else:
                    self._read(key.data)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self.listener.accept()
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                stamp_arrivals(connection)
                self.selector.register(connection, selectors.EVENT_READ, _Link(connection))

    def _read(self, link: _Link) -> None:
        try:
            data, at, _ = receive(link.socket, READ_BYTES, self.offset)
        except BlockingIOError:
            return
        except OSError:
            data, at = b"", 0.0
        if not data:
            self._close(link)
            return
        link.data += data
        head, found, rest = link.data.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.lower().startswith(b"content-length:")), 0)
        if len(rest) < length:
            return
        body, link.data = rest[:length], rest[length:]
        method, path, _ = lines[0].decode().split(" ", 2)
        if path == "/v1/chat/completions":
            self._answer(link, at, json.loads(body))
        else:
            self._tell(link, path, json.loads(body or b"null"))

    def _answer(self, link: _Link, at: float, body: dict[str, Any]) -> None:
        prompt = body["messages"][-1]["content"]
        if isinstance(prompt, list):
            prompt = "".join(part.get("text", "") for part in prompt)
        tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        options = body.get("stream_options") or {}
        closing, continuous = bool(options.get("include_usage")), bool(options.get("continuous_usage_stats"))
        whole = self._pieces(prompt, tokens, continuous, closing)
        link.answer = _Answer(link, at, prompt, self.schedule, whole)
        self.answers.append(link.answer)
        self._schedule(link.answer)

    def _pieces(self, prompt: str, tokens: int, continuous: bool, closing: bool) -> tuple[Piece, ...]:
        seed = "" if (self.schedule.gaps, self.schedule.phases) == ("fixed", "together") else prompt
        whole = pieces(self.schedule, tokens, len(prompt.split()), seed, continuous, closing)
        if named := NAMED_PROMPT.search(prompt):
            first = next(place for place, piece in enumerate(whole) if piece.tokens)
            told = whole[first].data.replace(b" w0000", named.group().encode(), 1)
            whole = (*whole[:first], replace(whole[first], data=told), *whole[first + 1 :])
        return whole

    def _schedule(self, answer: _Answer) -> None:
        self.count += 1
        heapq.heappush(self.due, (answer.asked + answer.pieces[answer.next].at, self.count, answer))

    def _hand_over(self, answer: _Answer) -> None:
        link = answer.link
        if link.answer is not answer:
            return  # its connection is gone
        piece = answer.pieces[answer.next]
        answer.next += 1
        link.out += piece.data
        moment = monotonic_clock()
        self._flush(link)
        if piece.tokens:
            answer.moments.append(moment)
            answer.tokens.append(piece.tokens)
            answer.late.append(moment - answer.asked - piece.at)
        if answer.next < len(answer.pieces):
            self._schedule(answer)
            return
        link.answer = None
        if not (answer.schedule.keep_alive and answer.schedule.framing == "chunked") or answer.schedule.cut_after:
            self._close(link)

    def _flush(self, link: _Link) -> None:
        try:
            while link.out:
                link.out = link.out[link.socket.send(link.out) :]
        except BlockingIOError:
            self._watch_writing(link, True)
        except OSError:
            self._close(link)
        else:
            self._watch_writing(link, False)

    def _watch_writing(self, link: _Link, writing: bool) -> None:
        if link.writing != writing:
            link.writing = writing
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self.selector.modify(link.socket, events, link)

    def _close(self, link: _Link) -> None:
        link.answer = None
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(link.socket)
        link.socket.close()

    def _tell(self, link: _Link, path: str, body: Any) -> None:
        status = 200
        answer: dict[str, Any] = {}
        if path == "/schedule":
            try:
                self.schedule = Schedule.of(body)
                self.answers = []
                gc.collect()
            except (TypeError, ValueError) as failure:
                status, answer = 400, {"error": str(failure)}
        elif path == "/prepare":
            for prompt in body["prompts"]:
                for continuous, closing in ((False, False), (False, True), (True, True)):
                    self._pieces(prompt, body["tokens"], continuous, closing)
        elif path == "/truth":
            answer = {
                "schedule": asdict(self.schedule),
                "answers": [
                    {
                        "prompt": one.prompt,
                        "asked": one.asked,
                        "moments": one.moments.tolist(),
                        "tokens": one.tokens.tolist(),
                        "late": one.late.tolist(),
                        "finished": one.next == len(one.pieces),
                    }
                    for one in self.answers
                ],
            }
        elif path == "/v1/models":
            answer = {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]}
        elif path != "/health":
            status, answer = 404, {"error": f"nothing at {path}"}
        data = json.dumps(answer).encode()
        link.out += b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
            status,
            len(data),
        )
        link.out += data
        self._flush(link)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--schedule", type=json.loads, default={})
    options = parser.parse_args()
    be_punctual()
    server = TruthServer(options.port, Schedule.of(options.schedule))
    print(f"truth: port {server.port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve()


if __name__ == "__main__":
    main()
