"""The one clock, and the kernel's stamps on it."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator

import pytest

from engines.clock import WallOffset, be_punctual, monotonic_clock, receive, sleep_until, stamp_arrivals

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel stamps packets on Linux alone")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as near,
        listener.accept()[0] as far,
    ):
        yield near, far


@LINUX
def test_the_kernel_tells_when_bytes_came_and_not_when_they_are_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    assert stamp_arrivals(near)
    far.sendall(b"the kernel begins to stamp in a moment")
    time.sleep(0.05)
    near.recv(100)
    before = monotonic_clock()
    far.sendall(b"x")
    after = monotonic_clock()
    time.sleep(0.2)
    data, at, delay = receive(near, 100, WallOffset())
    assert data == b"x"
    assert before - 1e-3 < at < after + 0.05
    assert delay is not None and 0.1 < delay < 1.0  # the 0.2 s in which nobody read


def test_without_a_stamp_it_is_the_moment_of_reading(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.sendall(b"x")
    time.sleep(0.05)
    before = monotonic_clock()
    data, at, delay = receive(near, 100, WallOffset())
    assert (data, delay) == (b"x", None)
    assert before <= at <= monotonic_clock()


@LINUX
@pytest.mark.parametrize("shift", [-3600.0, 3600.0])
def test_a_stamp_from_before_the_wall_clock_was_set_is_not_used(
    pair: tuple[socket.socket, socket.socket], shift: float
) -> None:
    near, far = pair
    stamp_arrivals(near)
    far.sendall(b"x")
    time.sleep(0.02)
    offset = WallOffset()
    offset.seconds += shift  # as if the wall clock had been set by an hour after the packet came
    before = monotonic_clock()
    _, at, delay = receive(near, 100, offset)
    assert delay is None and before <= at <= monotonic_clock()


def test_the_end_of_a_connection_is_no_bytes(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    stamp_arrivals(near)
    far.close()
    assert receive(near, 100, WallOffset())[0] == b""


def test_the_wall_clock_is_read_where_the_monotonic_one_is() -> None:
    assert time.time() - monotonic_clock() == pytest.approx(WallOffset().seconds, abs=0.01)


def test_a_sleep_ends_at_its_moment() -> None:
    be_punctual()
    late = []
    for _ in range(20):
        moment = monotonic_clock() + 0.001
        sleep_until(moment)
        late.append(monotonic_clock() - moment)
    assert 0 <= min(late) < 0.002  # the best of many: others may hold the processor
    sleep_until(monotonic_clock() - 1)  # gone by: no wait, no error


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux stamps")
@pytest.mark.parametrize("step", [5.0, -5.0])
def test_what_came_in_before_the_wall_clock_was_set_is_not_stamped_by_it(
    monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    true = time.time_ns
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        stamp_arrivals(ours)
        theirs, _ = server.accept()
        with theirs:
            offset = WallOffset()
            theirs.sendall(b"before")
            time.sleep(0.05)
            monkeypatch.setattr(time, "time_ns", lambda: true() + int(step * 1e9))
            offset.read()
            data, at, delay = receive(ours, 100, offset)
            assert (data, delay) == (b"before", None)
            assert abs(at - time.perf_counter()) < 0.5
            offset.read()  # the clock runs on from there
            assert offset.steady
