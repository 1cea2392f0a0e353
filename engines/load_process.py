"""The load generator: a process of its own that sends requests when they are due and stamps every byte of the answers.

It runs beside the engine and does nothing else: no drawing, no JSON, no library, one thread. So neither the page nor
reading the answers can slow what is measured. Orders come on its standard input, what happened leaves on its standard
output, both as marshalled values behind their length; `engines.load` is the other end.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import marshal
import os
import selectors
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from engines.clock import WallOffset, be_punctual, monotonic_clock, receive, sleep_until, stamp_arrivals
from engines.http_answer import BrokenAnswer, HTTPAnswer

READ_BYTES = 1 << 16
SHIP_SECONDS = 0.05  # what happened leaves in bundles
CONNECT_SECONDS = 10.0
# An idle connection is dropped before the server drops it: uvicorn, which all three engines use, waits 5 s, and a
# request sent at that moment fails.
KEEP_ALIVE_SECONDS = 4.0
AHEAD_SECONDS = 0.25  # before a request is due its connection is made ready
LEAD_SECONDS = 0.002  # from when all is ready to the first request
FAILED_PAUSE_SECONDS = 0.5  # a server that refuses at once is not asked in a spin
LENGTH = struct.Struct("<I")

Address = tuple[Any, ...]  # as getaddrinfo gives it

# What happened, the first word of each event.
SENT, BYTES, ENDED = "sent", "bytes", "ended"


class Connection:
    """A connection to the server, with TLS or without. `ask` is the request on it, None while it is idle."""

    __slots__ = (
        "answer",
        "ask",
        "asked",
        "connected",
        "idle_since",
        "last",
        "other_addresses",
        "out",
        "socket",
        "tls",
        "tls_in",
        "tls_out",
        "writing",
    )

    def __init__(self, link: socket.socket, others: list[Address], context: ssl.SSLContext | None, name: str) -> None:
        self.socket, self.other_addresses = link, others
        self.connected = self.asked = False
        self.writing = True  # whether the selector tells when it can be written to; of a new one, when it is connected
        self.ask: Ask | None = None
        self.answer = HTTPAnswer()
        self.idle_since = self.last = monotonic_clock()
        self.out = b""  # still to be sent
        self.tls: ssl.SSLObject | None = None
        self.tls_in, self.tls_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        if context:
            self.tls = context.wrap_bio(self.tls_in, self.tls_out, server_hostname=name)


class Ask:
    """One request to be sent: `offset` s after the beginning, or at once by a user who asks again and again."""

    __slots__ = ("connection", "index", "payload", "planned", "stream", "waiting")

    def __init__(self, index: int, payload: bytes, planned: float, stream: int) -> None:
        self.index, self.payload, self.planned, self.stream = index, payload, planned, stream
        self.connection: Connection | None = None
        self.waiting = False  # due, but its connection is not there yet


class Generator:
    """Serves one order after the other: `{"requests": [(offset, payload), ...], "seconds": None or float}`."""

    def __init__(self, host: str, port: int, tls: bool, silence_seconds: float, address: str = "") -> None:
        self.selector = selectors.DefaultSelector()
        self.host, self.port, self.silence_seconds = host, port, silence_seconds
        self.address = address or host  # an IP address stays what somebody has looked at and allowed
        self.look_seconds = min(1.0, silence_seconds / 4)
        self.context = ssl.create_default_context() if tls else None
        self.idle: list[Connection] = []
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.offset = WallOffset()
        self.orders = b""
        self.outgoing = b""
        self.happened: list[tuple[Any, ...]] = []
        self.open: set[Connection] = set()
        self.ordered = False
        self.next_ship = self.longest_stall = 0.0
        os.set_blocking(sys.stdin.fileno(), False)
        os.set_blocking(sys.stdout.fileno(), False)
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._read_orders)

    # The loop

    def serve(self) -> None:
        """Until nobody gives orders any more."""
        while True:
            now = monotonic_clock()
            while self.timers and self.timers[0][0] <= now:
                due, _, act = heapq.heappop(self.timers)
                self._stalled(now - due)
                act()
                now = monotonic_clock()
            if self.ordered and now >= self.next_ship:
                self._stalled(now - self.next_ship)
                self._ship()
                now = monotonic_clock()
            until = self._next_moment()
            wait = None if until is None else max(0.0, until - now)
            # Selectors round up to whole milliseconds; the rest of a wait is slept by the clock.
            whole = None if wait is None else int(wait * 1000) / 1000
            ready = self.selector.select(whole)
            if not ready and until is not None and whole == 0:
                sleep_until(until)
            elif ready:
                self.offset.read()
                for key, mask in ready:
                    key.data(mask) if callable(key.data) else self._ready(key.data, mask)

    def _next_moment(self) -> float | None:
        moments = [self.timers[0][0]] if self.timers else []
        if self.ordered:
            moments.append(self.next_ship)
        return min(moments, default=None)

    def _at(self, moment: float, act: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.timers, (moment, self.count, act))

    def _stalled(self, seconds: float) -> None:
        self.longest_stall = max(self.longest_stall, seconds) if self.ordered else 0.0

    # Orders

    def _read_orders(self, mask: int) -> None:
        try:
            data = os.read(sys.stdin.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            sys.exit(0)
        self.orders += data
        while len(self.orders) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self.orders)
            if len(self.orders) < LENGTH.size + size:
                return
            order = marshal.loads(self.orders[LENGTH.size : LENGTH.size + size])
            self.orders = self.orders[LENGTH.size + size :]
            self._begin(order)

    def _begin(self, order: dict[str, Any]) -> None:
        self.ordered = True
        self.seconds: float | None = order["seconds"]
        self.requests: list[tuple[float, bytes]] = order["requests"]
        self.until = 0.0
        self.streams = 0
        self.under_way = len(self.requests)
        self.warming: set[Connection] = set()
        self.begun = False
        self.longest_stall = 0.0
        self.delays: list[float] = []
        self.reads = 0
        self.processor = time.process_time()
        self.wall = monotonic_clock()
        self.next_ship = self.wall + SHIP_SECONDS
        gc.disable()
        try:
            self.addresses = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)
        except OSError:
            self.addresses = []
        # Every request that is due at once has its open connection before the clock starts.
        self.asks = [
            Ask(index, payload, offset, self._stream()) for index, (offset, payload) in enumerate(self.requests)
        ]
        for ask in self.asks:
            if ask.planned < AHEAD_SECONDS:
                self._prepare(ask)
        self._maybe_start()
        self._at(monotonic_clock() + self.look_seconds, self._watch)

    def _stream(self) -> int:
        self.streams += 1
        return self.streams

    def _maybe_start(self) -> None:
        if self.begun or self.warming:
            return
        self.begun = True
        begin = monotonic_clock() + LEAD_SECONDS
        self.until = begin + (self.seconds or 0.0)
        for ask in self.asks:
            offset = ask.planned
            ask.planned = begin + offset
            if offset >= AHEAD_SECONDS:
                self._at(ask.planned - AHEAD_SECONDS, lambda ask=ask: self._prepare(ask))  # type: ignore[misc]
            self._at(ask.planned, lambda ask=ask: self._send(ask))  # type: ignore[misc]

    def _watch(self) -> None:
        """Now and then: connections that never came about, and servers that fell silent."""
        if not self.ordered:
            return
        now = monotonic_clock()
        for connection in list(self.open):
            if not connection.connected and now - connection.last > CONNECT_SECONDS:
                self._lost(connection, "unreachable", f"no connection within {CONNECT_SECONDS:g} s")
            elif connection.asked and now - connection.last > self.silence_seconds:
                self._lost(connection, "silent", f"{self.silence_seconds:g}")
        self._at(now + self.look_seconds, self._watch)

    def _finish(self) -> None:
        delays = sorted(self.delays)
        health = {
            "stamps": "kernel" if delays and 2 * len(delays) >= self.reads else "process",
            "processor_seconds": time.process_time() - self.processor,
            "seconds": monotonic_clock() - self.wall,
            "longest_stall": self.longest_stall,
            "reads": self.reads,
            "read_delays": [_quantile(delays, share) for share in (0.5, 0.99, 1.0)] if delays else [],
        }
        self.happened.append(("done", health))
        self.ordered = False
        self.timers.clear()
        self._ship()
        gc.enable()
        gc.collect()

    # Connections

    def _prepare(self, ask: Ask) -> None:
        """An open connection for it: one that is there and young enough, else a new one."""
        now = monotonic_clock()
        while self.idle:
            connection = self.idle.pop()
            if now - connection.idle_since < KEEP_ALIVE_SECONDS:
                self._assign(connection, ask)
                return
            self._close(connection)
        self._connect(ask, self.addresses, "its name is unknown")

    def _assign(self, connection: Connection, ask: Ask) -> None:
        connection.ask, ask.connection = ask, connection

    def _connect(self, ask: Ask, addresses: list[Address], reason: str) -> None:
        """Begin a connection for the request. `reason`: why there is none, if no address is left to try."""
        for place, (family, kind, protocol, _, address) in enumerate(addresses):
            link = socket.socket(family, kind, protocol)
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stamp_arrivals(link)
            try:
                link.connect(address)
            except BlockingIOError:
                pass
            except OSError as failure:
                link.close()
                reason = failure.strerror or str(failure)
                continue
            connection = Connection(link, addresses[place + 1 :], self.context, self.host)
            self.open.add(connection)
            self.selector.register(link, selectors.EVENT_WRITE | selectors.EVENT_READ, connection)
            self._assign(connection, ask)
            if not self.begun:
                self.warming.add(connection)
            return
        self._fail(ask, None, "unreachable", reason)

    def _established(self, connection: Connection) -> None:
        connection.connected = True
        self.warming.discard(connection)
        self._watch_writing(connection, False)
        ask = connection.ask
        if ask is not None and ask.waiting:
            self._send(ask)
        self._maybe_start()

    def _close(self, connection: Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)
        if connection in self.open:
            self.open.discard(connection)
            self.selector.unregister(connection.socket)
            connection.socket.close()
        self.warming.discard(connection)

    def _lost(self, connection: Connection, kind: str, reason: str) -> None:
        """The connection is of no use any more; its request, if it has one, has failed."""
        ask = connection.ask
        status = connection.answer.status if connection.asked else None
        self._close(connection)
        if ask is not None:
            self._fail(ask, status, kind, reason)
        self._maybe_start()

    # Requests

    def _send(self, ask: Ask) -> None:
        connection = ask.connection
        if connection is None:  # it could not even be prepared, and has been told so
            return
        if not connection.connected:
            ask.waiting = True
            return
        connection.answer = HTTPAnswer()
        connection.asked = True
        sent = connection.last = monotonic_clock()
        self._write(connection, ask.payload)
        self.happened.append((SENT, ask.stream, ask.index, ask.planned, sent))

    def _write(self, connection: Connection, data: bytes) -> None:
        if connection.tls:
            connection.tls.write(data)
            data = connection.tls_out.read()
        connection.out += data
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        try:
            while connection.out:
                sent = connection.socket.send(connection.out)
                connection.out = connection.out[sent:]
        except BlockingIOError:
            self._watch_writing(connection, True)
        except OSError as failure:
            connection.out = b""
            reason = failure.strerror or str(failure)
            # Told by the loop, since whoever writes is in the middle of something.
            self._at(monotonic_clock(), lambda: self._lost(connection, "broken", reason))
        else:
            self._watch_writing(connection, False)

    def _watch_writing(self, connection: Connection, writing: bool) -> None:
        if connection.writing != writing:
            connection.writing = writing
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self.selector.modify(connection.socket, events, connection)

    def _ready(self, connection: Connection, mask: int) -> None:
        if connection not in self.open:
            return  # closed by what came just before it
        if not connection.connected:
            self._connecting(connection, mask)
            return
        if mask & selectors.EVENT_WRITE:
            self._flush(connection)
        if mask & selectors.EVENT_READ:
            self._read(connection)

    def _connecting(self, connection: Connection, mask: int) -> None:
        if error := connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            ask = connection.ask
            self._close(connection)
            if ask is not None:
                self._connect(ask, connection.other_addresses, os.strerror(error))
            self._maybe_start()
            return
        if connection.tls is None:
            self._established(connection)
            return
        try:
            if mask & selectors.EVENT_READ:
                try:
                    data = connection.socket.recv(READ_BYTES)
                    connection.tls_in.write(data) if data else connection.tls_in.write_eof()
                except BlockingIOError:
                    pass
            try:
                connection.tls.do_handshake()
            except ssl.SSLWantReadError:
                connection.out += connection.tls_out.read()
                self._flush(connection)
                return
            connection.out += connection.tls_out.read()
            self._established(connection)
            self._flush(connection)
        except (ssl.SSLError, OSError) as failure:
            self._lost(connection, "unreachable", getattr(failure, "verify_message", "") or str(failure))

    def _read(self, connection: Connection) -> None:
        try:
            data, at, delay = receive(connection.socket, READ_BYTES, self.offset)
        except BlockingIOError:
            return
        except OSError as failure:
            self._lost(connection, "broken", failure.strerror or str(failure))
            return
        if not connection.asked:  # idle, or not yet asked: a server that speaks now is saying good-bye
            if not data or not connection.tls:
                self._retire(connection)
            else:
                connection.tls_in.write(data)  # a session ticket of TLS 1.3
            return
        self.reads += 1
        if delay is not None:
            self.delays.append(delay)
        connection.last = at
        try:
            self._answered(connection, data, at)
        except (BrokenAnswer, ssl.SSLError) as failure:
            self._lost(connection, "broken", str(failure))

    def _answered(self, connection: Connection, data: bytes, at: float) -> None:
        answer, ask = connection.answer, connection.ask
        assert ask is not None
        if data and connection.tls:
            connection.tls_in.write(data)
            plain = b""
            try:
                while piece := connection.tls.read(READ_BYTES):
                    plain += piece
                data = b""  # the server has said good-bye
                ended = True
            except ssl.SSLWantReadError:
                ended = False
            body = answer.feed(plain) if plain else b""
        else:
            ended = not data
            body = answer.feed(data) if data else b""
        if body:
            self.happened.append((BYTES, ask.stream, at, body))
        if ended:
            answer.closed()
        if answer.complete:
            self._complete(connection, ask, at)
        elif ended:
            self._lost(connection, "broken", "the connection was closed")

    def _complete(self, connection: Connection, ask: Ask, at: float) -> None:
        status = connection.answer.status
        self.happened.append((ENDED, ask.stream, ask.index, ask.planned, at, status, "", ""))
        connection.ask, connection.asked = None, False
        if connection.answer.reusable:
            connection.idle_since = monotonic_clock()
            self.idle.append(connection)
        else:
            self._close(connection)
        self._next(ask, failed=status != 200)

    def _retire(self, connection: Connection) -> None:
        """The server has closed a connection on which nothing was asked: another one takes its place."""
        ask = connection.ask
        self._close(connection)
        if ask is not None:
            ask.connection = None
            self._prepare(ask)

    def _fail(self, ask: Ask, status: int | None, kind: str, reason: str) -> None:
        ask.connection = None
        now = monotonic_clock()
        planned = ask.planned if self.begun else now
        self.happened.append((ENDED, ask.stream, ask.index, planned, now, status, kind, reason))
        if not self.begun:  # it failed before the clock started; the others still want to begin
            self.asks = [other for other in self.asks if other is not ask]
        self._next(ask, failed=True)

    def _next(self, ask: Ask, failed: bool) -> None:
        """A user who asks again and again does so at once, until the time is up."""
        if self.seconds is None:
            self._one_less()
            return
        again = Ask(ask.index, ask.payload, monotonic_clock(), self._stream())
        if failed:
            again.planned += FAILED_PAUSE_SECONDS
            self._at(again.planned, lambda: self._again(again))
        else:
            self._again(again)

    def _again(self, ask: Ask) -> None:
        if self.begun and ask.planned >= self.until:
            self._one_less()
            return
        ask.waiting = True
        self._prepare(ask)
        if ask.connection is not None and ask.connection.connected:
            self._send(ask)

    def _one_less(self) -> None:
        self.under_way -= 1
        if not self.under_way:
            self._at(monotonic_clock(), self._finish)

    # Telling

    def _ship(self) -> None:
        self.next_ship = monotonic_clock() + SHIP_SECONDS
        if self.happened:
            value = marshal.dumps(self.happened)
            self.outgoing += LENGTH.pack(len(value)) + value
            self.happened = []
        with contextlib.suppress(BlockingIOError):
            while self.outgoing:
                written = os.write(sys.stdout.fileno(), self.outgoing)
                self.outgoing = self.outgoing[written:]
        if self.outgoing and not self.ordered:  # nobody would try again otherwise
            self._at(monotonic_clock() + SHIP_SECONDS, self._ship)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    be_punctual()
    host, port, scheme, silence, *address = sys.argv[1:]
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        Generator(host, int(port), scheme == "https", float(silence), *address).serve()


if __name__ == "__main__":
    main()
