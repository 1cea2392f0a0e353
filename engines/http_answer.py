"""One HTTP/1.1 answer out of bytes cut anywhere: its status, its body, its end. Pure, and light enough for every read.

Measuring needs to know which bytes came in which read, and when the last one has come; a client library that knows
more asks more time per chunk than the engine takes to make it.
"""

from __future__ import annotations

HEAD_END = b"\r\n\r\n"
MOST_HEAD_BYTES = 1 << 16
BODILESS = (204, 304)


class BrokenAnswer(Exception):
    """The bytes are no HTTP answer."""


class HTTPAnswer:
    """Feed it what was read; it gives the body bytes in it. `complete`: the answer has ended.

    `reusable`: the connection may carry another request afterwards. `until_close`: only the server's closing the
    connection ends it. Raises BrokenAnswer.
    """

    __slots__ = ("_chunked", "_rest", "complete", "left", "reusable", "status", "until_close")

    def __init__(self) -> None:
        self.status: int | None = None
        self.complete = self.reusable = self.until_close = self._chunked = False
        self.left = 0  # body bytes still to come, of the chunk or of all
        self._rest = b""  # a head, a chunk's size or its closing line that has come in part

    def feed(self, data: bytes) -> bytes:
        if self.status is None:
            data = self._head(self._rest + data)
            if self.status is None:
                return b""
        if self._chunked:
            return self._chunks(data)
        if self.until_close:
            return data
        body = data[: self.left]
        self.left -= len(body)
        self.complete = self.left == 0
        return body

    def closed(self) -> None:
        """The server has closed the connection."""
        if self.status is not None and self.until_close:
            self.complete = True
        self.reusable = False

    def _head(self, data: bytes) -> bytes:
        """What follows the head; keeps what is no whole head yet."""
        while True:
            end = data.find(HEAD_END)
            if end < 0:
                if len(data) > MOST_HEAD_BYTES:
                    raise BrokenAnswer("its head has no end")
                self._rest = data
                return b""
            first, *lines = data[:end].split(b"\r\n")
            data = data[end + len(HEAD_END) :]
            version, _, rest = first.partition(b" ")
            code = rest[:3]
            if not version.startswith(b"HTTP/1.") or len(code) != 3 or not code.isdigit():
                raise BrokenAnswer(f"it begins with {first[:40]!r}, which is not HTTP/1.1")
            if not code.startswith(b"1"):  # an interim answer has another one behind it
                break
        self._rest = b""
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        connection = fields.get(b"connection", b"").lower()
        self.reusable = b"close" not in connection and (version != b"HTTP/1.0" or b"keep-alive" in connection)
        status = int(code)
        if status in BODILESS:
            self.complete = True
        elif b"chunked" in fields.get(b"transfer-encoding", b"").lower():
            self._chunked = True
        elif b"content-length" in fields:
            if not fields[b"content-length"].isdigit():
                raise BrokenAnswer("its length is no number")
            self.left = int(fields[b"content-length"])
            self.complete = self.left == 0
        else:
            self.until_close = True
            self.reusable = False
        self.status = status
        return data

    def _chunks(self, data: bytes) -> bytes:
        # Most reads hold exactly one whole chunk: "1a3\r\n", the bytes, "\r\n".
        body = b""
        if self._rest:
            data, self._rest = self._rest + data, b""
        while data and not self.complete:
            if self.left:
                piece = data[: self.left]
                self.left -= len(piece)
                data = data[len(piece) :]
                body = body + piece if body else piece
                continue
            end = data.find(b"\r\n")
            if end < 0:
                if len(data) > MOST_HEAD_BYTES:
                    raise BrokenAnswer("a chunk's size has no end")
                self._rest = data
                break
            if end == 0:  # what closes the chunk before it
                data = data[2:]
                continue
            try:
                size = int(data[:end].partition(b";")[0], 16)
            except ValueError:
                raise BrokenAnswer(f"a chunk's size is {data[:20]!r}") from None
            if size:
                data, self.left = data[end + 2 :], size
                continue
            trailer = data.find(HEAD_END, end)  # the last chunk, then trailers if there are any, then an empty line
            if trailer < 0:
                self._rest = data
                break
            self.complete = True
        return body
