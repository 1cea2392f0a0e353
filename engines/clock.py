"""The one clock, and what the kernel knows better: when bytes arrived, however late this process reads them.

Moments are seconds of `time.perf_counter`, on Linux CLOCK_MONOTONIC, which all processes of a machine share. On Linux
the kernel stamps each packet as it comes in (SO_TIMESTAMPNS, socket(7)), on the wall clock. Whoever shares its cores
with an engine is often scheduled late; such a stamp stays right.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time
from collections.abc import Callable

Clock = Callable[[], float]
monotonic_clock: Clock = time.perf_counter

SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module does not name it
TIMESPEC = struct.Struct("qq")
STAMP_BYTES = socket.CMSG_SPACE(TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0
NANOSECONDS = 1e-9
STEP_SECONDS = 0.02  # a clock that is only slewed gains a millisecond in two seconds at most
LONGEST_DELAY = 60.0  # s between a packet and our reading it; a stamp older than that is of another clock


def stamp_arrivals(connection: socket.socket) -> bool:
    """Have the kernel stamp what arrives on this TCP connection; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        connection.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True


class WallOffset:
    """What the wall clock shows minus the monotonic clock, in seconds.

    It is read anew each time: the wall clock may be set while a request runs. Stamps that are read just after such a
    step may have been made before it, and are not used (`steady` is then False).
    """

    __slots__ = ("seconds", "steady")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.read()
        self.steady = True

    def read(self) -> None:
        before = time.perf_counter()
        wall = time.time_ns()
        # Halfway between the two readings around it; whoever loses the processor in between reads again.
        if (after := time.perf_counter()) - before > 2e-5:
            before = time.perf_counter()
            wall = time.time_ns()
            after = time.perf_counter()
        seconds = wall * NANOSECONDS - (before + after) / 2
        self.steady = abs(seconds - self.seconds) < STEP_SECONDS
        self.seconds = seconds


def receive(connection: socket.socket, size: int, offset: WallOffset) -> tuple[bytes, float, float | None]:
    """(bytes, when they arrived, s by which we read them late). Where the kernel gave no stamp, the moment of reading,
    and None. Of several packets read together the kernel tells the last one's moment. Raises as `recvmsg` does."""
    data, ancillary, _, _ = connection.recvmsg(size, STAMP_BYTES)
    now = time.perf_counter()
    for _, kind, value in ancillary:
        if kind == SO_TIMESTAMPNS and len(value) == TIMESPEC.size:
            seconds, nanoseconds = TIMESPEC.unpack(value)
            at = seconds - offset.seconds + nanoseconds * NANOSECONDS
            if offset.steady and 0.0 <= now - at < LONGEST_DELAY:
                return data, at, now - at
    return data, now, None


def sleep_until(moment: float) -> None:
    """Sleep to `moment`, to some tens of microseconds: for the last part of a wait that a selector would round up."""
    if (left := moment - time.perf_counter()) > 0:
        time.sleep(left)


def be_punctual() -> None:
    """Have the kernel wake this process when it asked to be woken, not up to 50 microseconds later, and keep its code
    in memory (Linux, as far as that is allowed).

    On a machine that reclaims idle programs' pages this process was seen to stand still for 0.6 s in mid-answer.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK, ns
        library.mlockall(1)  # MCL_CURRENT: what it allocates later is not on the disk anyway
