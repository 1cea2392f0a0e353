"""The load generator against a server whose every moment is known, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trustme

from benchmark.running import RunningTruth, TrueAnswer
from benchmark.truth import Schedule
from engines import engine_named
from engines.base import EngineError, Request
from engines.clock import monotonic_clock
from engines.load import Answered, GeneratorHealth, LoadGenerator
from engines.openai_stream import Endpoint
from engines.server import free_port
from engines.timeline import Arrival

ENGINE = engine_named("vllm")
QUICK = Schedule(first_token=0.02, gap=0.005)


def endpoint(base_url: str) -> Endpoint:
    return Endpoint(ENGINE, base_url, "truth")


def loaded(
    base_url: str,
    offsets: list[float],
    tokens: int = 8,
    seconds: float | None = None,
    silence: float = 5.0,
    on_arrival: Callable[[int, Arrival], None] = lambda index, arrival: None,
) -> tuple[list[Answered], GeneratorHealth]:
    """The answers, in the order of their places, of one request per offset."""

    async def measure() -> tuple[list[Answered], GeneratorHealth]:
        async with LoadGenerator(endpoint(base_url), silence_seconds=silence) as load:
            requests = [(offset, Request(f"question {place}", tokens)) for place, offset in enumerate(offsets)]
            return await load.answers(requests, seconds, on_arrival=on_arrival)

    answers, health = asyncio.run(measure())
    return sorted(answers, key=lambda one: (one.index, one.timeline.sent)), health


def moments(answer: Answered) -> list[float]:
    return [answer.timeline.sent + arrival.at for arrival in answer.timeline.arrivals]


def true_answer(truth: RunningTruth, place: int) -> TrueAnswer:
    return next(answer for answer in truth.answers() if answer.prompt == f"question {place}")


# Against the truth. Bounds are wide, since tests share the processor; `make bench` says how close it really is.


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(QUICK, id="plain"),
        pytest.param(replace(QUICK, gaps="random"), id="random gaps"),
        pytest.param(replace(QUICK, tokens_per_chunk=(4,)), id="four tokens per chunk"),
        pytest.param(replace(QUICK, tokens_per_chunk=(1, 3, 2)), id="changing tokens per chunk"),
        pytest.param(replace(QUICK, stall_after=3, stall=0.2), id="a stall"),
        pytest.param(replace(QUICK, first_token=0.3), id="a slow first token"),
        pytest.param(replace(QUICK, role="never"), id="no role"),
        pytest.param(replace(QUICK, role="with the first token"), id="a role beside the first token"),
        pytest.param(replace(QUICK, phases="spread"), id="spread phases"),
        pytest.param(replace(QUICK, empty_every=2), id="empty deltas"),
        pytest.param(replace(QUICK, comment_every=1), id="comments"),
        pytest.param(replace(QUICK, reasoning_tokens=4), id="reasoning as SGLang says it"),
        pytest.param(replace(QUICK, reasoning_tokens=4, reasoning_name="reasoning"), id="reasoning as vLLM says it"),
        pytest.param(replace(QUICK, usage="continuous"), id="usage with each chunk"),
        pytest.param(replace(QUICK, framing="close"), id="ended by closing the connection"),
        pytest.param(replace(QUICK, line_end="\r\n"), id="other line ends"),
        pytest.param(replace(QUICK, halves=True), id="events cut in two"),
        pytest.param(replace(QUICK, keep_alive=False), id="no keep-alive"),
    ],
)
def test_what_is_measured_is_what_was_true(truth: RunningTruth, schedule: Schedule) -> None:
    truth.follow(schedule)
    ((answer,), health) = loaded(truth.base_url, [0.0], tokens=12)
    timeline, true = answer.timeline, true_answer(truth, 0)
    assert timeline.error is None
    # "close in two": the text is whole when the second half is there, which is the one that the server stamps.
    assert moments(answer) == pytest.approx(true.moments, abs=0.02)
    assert "".join(arrival.text for arrival in timeline.arrivals) == "".join(f" w{place:04d}" for place in range(12))
    assert [arrival.tokens for arrival in timeline.arrivals] == list(true.tokens)
    assert timeline.usage.output_tokens == 12
    assert [arrival.reasoning for arrival in timeline.arrivals].count(True) == schedule.reasoning_tokens
    assert timeline.arrivals[0].at == pytest.approx(true.ttft, abs=0.02)  # 8 s would be a wrong clock, 0 a wrong chunk
    assert health.reads >= len(true.moments)


def test_a_burst_is_read_together_and_nothing_is_lost(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, burst=4, gap=0.02))
    ((answer,), _) = loaded(truth.base_url, [0.0], tokens=12)
    true = true_answer(truth, 0)
    # 12 chunks in bursts of 4: 3 moments, 80 ms apart.
    assert [true.gaps[place] > 0.05 for place in (2, 3, 4, 7)] == [False, True, False, True]
    assert moments(answer) == pytest.approx(true.moments, abs=0.02)
    assert len(answer.timeline.arrivals) == 12


def test_without_usage_tokens_are_estimated(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, usage="none"))
    ((answer,), _) = loaded(truth.base_url, [0.0])
    assert (answer.timeline.token_source, answer.timeline.usage.output_tokens) == ("estimated", None)


@pytest.mark.skipif(not hasattr(socket, "CMSG_SPACE"), reason="the kernel's stamps need Linux")
def test_a_stamp_is_right_however_late_it_is_read(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, gap=0.15))

    async def measure() -> tuple[list[Answered], GeneratorHealth]:
        async with LoadGenerator(endpoint(truth.base_url)) as load:
            asked = asyncio.create_task(load.answers([(0.0, Request("question 0", 6))]))
            await asyncio.sleep(0.3)
            assert load.pid is not None
            while not asked.done():  # halts every 0.13 s, chunks every 0.15 s: they cannot keep missing each other
                os.kill(load.pid, signal.SIGSTOP)
                await asyncio.sleep(0.1)
                os.kill(load.pid, signal.SIGCONT)
                await asyncio.sleep(0.03)
            return await asked

    ((answer,), health) = asyncio.run(measure())
    assert health.stamps == "kernel"
    errors = [mine - true for mine, true in zip(moments(answer), true_answer(truth, 0).moments, strict=True)]
    assert max(map(abs, errors)) < 0.01
    assert health.read_delays[-1] > 0.02  # and it says how late it was
    assert health.longest_stall > 0.04


# When requests are sent


def test_each_request_is_sent_when_it_is_due(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, first_token=0.4))
    offsets = [0.0, 0.1, 0.2, 0.55]
    answers, _ = loaded(truth.base_url, offsets)
    planned = [answer.planned - answers[0].planned for answer in answers]
    assert planned == pytest.approx(offsets)
    for answer in answers:  # the first ones are not answered yet when the next are sent
        assert 0 <= answer.timeline.sent - answer.planned < 0.05
        assert true_answer(truth, answer.index).asked == pytest.approx(answer.timeline.sent, abs=0.02)


def test_connections_are_open_before_the_clock_starts(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, first_token=0.1))
    answers, _ = loaded(truth.base_url, [0.0] * 64, tokens=2)
    assert [answer.timeline.error for answer in answers] == [None] * 64
    assert max(answer.timeline.sent - answer.planned for answer in answers) < 0.1


def test_512_streams_lose_nothing(truth: RunningTruth) -> None:
    truth.follow(Schedule(first_token=0.5, gap=0.1))
    answers, _ = loaded(truth.base_url, [0.0] * 512, tokens=10)
    assert [answer.timeline.error for answer in answers] == [None] * 512
    assert sum(len(answer.timeline.arrivals) for answer in answers) == 5120


def test_one_pool_serves_order_after_order(truth: RunningTruth) -> None:
    truth.follow(QUICK)

    async def measure() -> list[int]:
        async with LoadGenerator(endpoint(truth.base_url)) as load:
            assert load.pid is not None
            found = []
            for _ in range(3):
                await load.answers([(0.0, Request("Why?", 2))] * 4)
                found.append(len(psutil.Process(load.pid).net_connections()))
            return found

    assert asyncio.run(measure()) == [4, 4, 4]


def test_users_who_ask_again_do_so_at_once_until_the_time_is_up(truth: RunningTruth) -> None:
    truth.follow(Schedule(first_token=0.05, gap=0.01))
    answers, _ = loaded(truth.base_url, [0.0, 0.0], tokens=6, seconds=0.5)
    begin = min(answer.planned for answer in answers)
    for user in (0, 1):
        mine = [answer for answer in answers if answer.index == user]
        # 0.05 + 5 x 0.01 = 0.1 s each: 5 fit into 0.5 s, one that has begun before the end is finished
        assert 3 <= len(mine) <= 6
        for before, after in zip(mine, mine[1:], strict=False):
            closed = before.timeline.closed
            assert closed is not None
            assert after.planned == pytest.approx(before.timeline.sent + closed, abs=0.05)
        assert max(answer.planned for answer in mine) < begin + 0.5


def test_each_arrival_is_told_while_the_answer_still_streams(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, gap=0.1))
    told: list[float] = []
    ((answer,), _) = loaded(truth.base_url, [0.0], tokens=6, on_arrival=lambda *_: told.append(monotonic_clock()))
    # The last chunk comes 0.5 s after the first, which had been told long before.
    assert len(told) == 6
    assert told[0] < moments(answer)[0] + 0.3 < moments(answer)[-1]


# Servers that misbehave


@contextmanager
def server(
    answer: Callable[[socket.socket], None], context: ssl.SSLContext | None = None, heads: list[bytes] | None = None
) -> Iterator[str]:
    """A server that reads one request per connection, keeps it in `heads` and then does `answer`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(link,), daemon=True).start()

    def one(link: socket.socket) -> None:
        try:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = context.wrap_socket(link, server_side=True) if context else link
            head = link.recv(65536)
            if heads is not None:
                heads.append(head)
            answer(link)
        except OSError:
            pass
        finally:
            link.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"{'https' if context else 'http'}://localhost:{listener.getsockname()[1]}"
    finally:
        listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'


def hangs(link: socket.socket) -> None:
    link.sendall(HEAD + b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK))
    threading.Event().wait(2)


@pytest.mark.parametrize(
    ("answer", "arrivals", "error"),
    [
        (lambda link: None, 0, "vLLM broke off the answer: the connection was closed."),
        (lambda link: link.sendall(b"\x16\x03\x01 no"), 0, "vLLM broke off the answer: the connection was closed."),
        (lambda link: link.sendall(b"SSH-2.0-x\r\n\r\n"), 0, "vLLM broke off the answer: it begins with b'SSH-2.0-x'"),
        (lambda link: link.sendall(HEAD + b"%x\r\n%s" % (99, CHUNK)), 1, "vLLM broke off the answer: the connection"),
        (lambda link: link.sendall(HEAD + b"zz\r\n"), 0, "vLLM broke off the answer: a chunk's size is b'zz"),
        (lambda link: link.sendall(HEAD + b"0\r\n\r\n"), 0, "The engine ended its answer without a single token."),
        (hangs, 1, "vLLM sent nothing for 0.5 s."),
        (
            lambda link: link.sendall(b"HTTP/1.1 429 Busy\r\nContent-Length: 9\r\n\r\nslow down"),
            0,
            "vLLM refused the request with HTTP 429: slow down",
        ),
    ],
)
def test_what_goes_wrong_is_told_and_what_came_before_it_is_kept(
    answer: Callable[[socket.socket], None], arrivals: int, error: str
) -> None:
    with server(answer) as base_url:
        ((answered,), _) = loaded(base_url, [0.0], silence=0.5)
    assert (answered.timeline.error or "").startswith(error)
    assert len(answered.timeline.arrivals) == arrivals


def test_a_server_that_resets_the_connection_is_told() -> None:
    def reset(link: socket.socket) -> None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with server(reset) as base_url:
        ((answered,), _) = loaded(base_url, [0.0])
    assert (answered.timeline.error or "").startswith("vLLM broke off the answer: ")


def test_a_server_cut_in_mid_answer_fails_that_answer_alone(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, cut_after=3))
    answers, _ = loaded(truth.base_url, [0.0, 0.1])
    assert [len(answer.timeline.arrivals) for answer in answers] == [3, 3]
    assert {answer.timeline.error for answer in answers} == {"vLLM broke off the answer: the connection was closed."}


def test_a_refusal_is_told_with_the_servers_words(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, status=503))
    ((answer,), _) = loaded(truth.base_url, [0.0])
    assert (answer.timeline.error or "").startswith(
        'vLLM refused the request with HTTP 503: {"error": {"message": "the'
    )


def test_an_address_where_nobody_listens_is_told() -> None:
    base_url = f"http://127.0.0.1:{free_port()}"
    answers, health = loaded(base_url, [0.0, 0.3])
    assert [answer.timeline.error for answer in answers] == [
        f"vLLM cannot be reached at {base_url}: Connection refused."
    ] * 2
    assert health.reads == 0


def test_a_user_whose_server_is_gone_asks_again_only_now_and_then() -> None:
    answers, _ = loaded(f"http://127.0.0.1:{free_port()}", [0.0], seconds=1.2)
    assert 2 <= len(answers) <= 4  # every half second


def test_a_name_that_nobody_knows_is_told() -> None:
    ((answer,), _) = loaded("http://no-such-host.invalid", [0.0])
    assert answer.timeline.error == "vLLM cannot be reached at http://no-such-host.invalid: its name is unknown."


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://localhost", "http://"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(EngineError, match="is no address of a server"):
        loaded(address, [0.0])


def test_a_connection_that_the_server_closed_meanwhile_is_replaced() -> None:
    def answer(link: socket.socket) -> None:
        data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(END), END)
        link.sendall(HEAD + data)  # without saying so it closes the connection after one answer

    END = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\n'

    async def measure(base_url: str) -> list[str | None]:
        async with LoadGenerator(endpoint(base_url)) as load:
            found = []
            for _ in range(3):
                answers, _ = await load.answers([(0.0, Request("Why?", 1))])
                found.append(answers[0].timeline.error)
                await asyncio.sleep(0.1)
            return found

    with server(answer) as base_url:
        assert asyncio.run(measure(base_url)) == [None] * 3


# The process


def test_a_generator_that_dies_is_told_and_not_waited_for(truth: RunningTruth) -> None:
    truth.follow(replace(QUICK, gap=1.0))

    async def measure() -> None:
        async with LoadGenerator(endpoint(truth.base_url)) as load:
            asked = asyncio.create_task(load.answers([(0.0, Request("Why?", 9))]))
            await asyncio.sleep(0.3)
            assert load.pid is not None
            os.kill(load.pid, signal.SIGKILL)
            await asked

    with pytest.raises(EngineError, match="load generator broke down"):
        asyncio.run(measure())


@pytest.mark.parametrize("cancelled", [False, True])
def test_no_process_is_left_behind(truth: RunningTruth, cancelled: bool) -> None:
    truth.follow(replace(QUICK, gap=1.0) if cancelled else QUICK)
    pids: list[int] = []

    async def measure() -> None:
        async with LoadGenerator(endpoint(truth.base_url)) as load:
            assert load.pid is not None
            pids.append(load.pid)
            await load.answers([(0.0, Request("Why?", 9))])

    async def cancel() -> None:
        task = asyncio.create_task(measure())
        await asyncio.sleep(0.4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel() if cancelled else measure())
    assert not psutil.pid_exists(pids[0])


# With TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def encryption(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


def test_an_encrypted_answer_is_measured_the_same(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    handed: list[float] = []

    def answer(link: socket.socket) -> None:
        link.sendall(HEAD)
        for place in range(5):
            reason = b'"stop"' if place == 4 else b"null"
            chunk = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": %s}]}\n\n' % reason
            handed.append(monotonic_clock())
            link.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            threading.Event().wait(0.03)
        link.sendall(b"0\r\n\r\n")
        threading.Event().wait(0.2)

    with server(answer, encryption(authority)) as base_url:
        ((answered,), health) = loaded(base_url, [0.0])
    assert answered.timeline.error is None
    assert moments(answered) == pytest.approx(handed, abs=0.02)
    assert health.reads >= 5


def test_a_certificate_that_nobody_vouches_for_is_told(authority: trustme.CA) -> None:
    with server(lambda link: None, encryption(authority)) as base_url:
        ((answered,), _) = loaded(base_url, [0.0])
    assert (answered.timeline.error or "").startswith(f"vLLM cannot be reached at {base_url}: ")
    assert "certificate" in (answered.timeline.error or "")


# Somebody else's servers: keys, and names that are not looked up again


def asked_of(base_url: str, key: str = "", address: str = "") -> Answered:
    """The answer to one request to an endpoint with a key, or of which the address is known."""

    async def measure() -> list[Answered]:
        where = Endpoint(ENGINE, base_url, "truth", key, address)
        async with LoadGenerator(where, silence_seconds=5.0) as load:
            assert load.pid is not None
            told.append(" ".join(psutil.Process(load.pid).cmdline()))
            told.append(repr(psutil.Process(load.pid).environ()))
            answers, _ = await load.answers([(0.0, Request("question", 3))])
            return answers

    told: list[str] = []
    (answered,) = asyncio.run(measure())
    assert not key or key not in told[0] + told[1]  # where other users of the machine could see it
    return answered


@contextmanager
def listening(heads: list[bytes], context: ssl.SSLContext | None = None, status: bytes = b"") -> Iterator[str]:
    """A server that keeps what it was asked, and answers with one token or refuses with all that it was asked."""

    def answer(link: socket.socket) -> None:
        if status:
            body = b"no: " + heads[-1]
            link.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
            return
        chunk = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\n'
        link.sendall(HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(chunk), chunk))

    with server(answer, context, heads) as base_url:
        yield base_url


def test_a_key_goes_with_the_request_and_is_seen_nowhere_else() -> None:
    heads: list[bytes] = []
    with listening(heads) as base_url:
        assert asked_of(f"{base_url}/api", "sk-very-secret").timeline.error is None
    assert heads[0].startswith(b"POST /api/v1/chat/completions HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer sk-very-secret\r\n" in heads[0]


def test_without_a_key_there_is_no_header_for_it() -> None:
    heads: list[bytes] = []
    with listening(heads) as base_url:
        asked_of(base_url)
    assert b"Authorization" not in heads[0]


def test_a_refusal_that_repeats_the_key_is_told_without_it() -> None:
    heads: list[bytes] = []
    with listening(heads, status=b"401 Unauthorized") as base_url:
        error = asked_of(base_url, "sk-very-secret").timeline.error or ""
    assert "HTTP 401" in error and "Bearer [key]" in error and "secret" not in error


def test_a_known_address_is_called_whatever_the_name_leads_to() -> None:
    heads: list[bytes] = []
    with listening(heads) as base_url:
        port = base_url.rpartition(":")[2]
        assert asked_of(f"http://innocent.invalid:{port}", address="127.0.0.1").timeline.error is None
        assert "its name is unknown" in (asked_of(f"http://innocent.invalid:{port}").timeline.error or "")
    assert f"\r\nHost: innocent.invalid:{port}\r\n".encode() in heads[0]


def test_the_certificate_must_still_be_the_names(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with listening([], encryption(authority)) as base_url:
        port = base_url.rpartition(":")[2]
        assert asked_of(f"https://localhost:{port}", address="127.0.0.1").timeline.error is None
        error = asked_of(f"https://innocent.invalid:{port}", address="127.0.0.1").timeline.error or ""
    assert "innocent.invalid" in error and "certificate" in error
