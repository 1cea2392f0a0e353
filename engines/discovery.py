"""Asks a server that somebody has named which models it has, how far away it is, and says what is wrong in words."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.addresses import ServerURL, lookup, on_this_machine, public_addresses
from engines.base import EngineError
from engines.client import http_client
from engines.clock import monotonic_clock
from engines.openai_stream import without_key

if TYPE_CHECKING:
    import httpx2

LIMIT_SECONDS = 20.0  # for everything
CONNECT_SECONDS = 5.0
ROUND_TRIPS = 5
MOST_BYTES = 8 << 20  # of a list: OpenRouter's has 1 MB
MOST_MODELS = 5000
MOST_WORDS = 200  # characters of what a server says about an error


@dataclass(frozen=True, slots=True)
class Found:
    """What a server said. `address`: the IP address that answered; `owner`: what it calls itself (`owned_by`).

    `round_trip_seconds`: the shortest time from asking for the list on an open connection to the answer's first byte.
    """

    address: str
    models: tuple[str, ...]
    owner: str
    round_trip_seconds: float

    @property
    def on_this_machine(self) -> bool:
        return on_this_machine(self.address)


class NoModelList(EngineError):
    """It answers, but its list of models cannot be read; it may serve all the same. `found`: the rest that is known."""

    found: Found | None = None


async def look(url: ServerURL, key: str = "", public: bool = False) -> Found:
    """Raises EngineError, in words that say what to change, and NoModelList. `public`: private addresses are refused.

    The name is looked up once; what is returned is the address that answered, to be used from then on.
    """
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            addresses = await asyncio.to_thread(public_addresses if public else lookup, url)
            address = await _answering(url, addresses)
            return await _asked(url, key, address)
    except TimeoutError:
        raise EngineError(f"{url.base_url} did not answer within {LIMIT_SECONDS:g} s.") from None


async def _answering(url: ServerURL, addresses: tuple[str, ...]) -> str:
    """The first of the addresses that takes a connection."""
    reason = ""
    for address in addresses:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(address, url.port)
        except TimeoutError:
            reason = reason or f"{url.host} did not answer at port {url.port} within {CONNECT_SECONDS:g} s."
        except ConnectionRefusedError:
            reason = f"{url.host} is there, but nothing answers at port {url.port}. Is the server running?"
        except (OSError, socket.gaierror) as failure:
            reason = reason or f"{url.host} cannot be reached: {failure.strerror or failure}."
        else:
            writer.close()
            return address
    raise EngineError(reason or f"{url.host} has no address.")


async def _asked(url: ServerURL, key: str, address: str) -> Found:
    import httpx2

    asked = f"{url.base_url}/v1/models"
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
    trips: list[float] = []
    models: tuple[str, ...] = ()
    owner = ""
    try:
        async with http_client(address, httpx2.Timeout(LIMIT_SECONDS, connect=CONNECT_SECONDS)) as client:
            for _ in range(ROUND_TRIPS):
                began = monotonic_clock()
                async with client.stream("GET", asked, headers=headers) as answer:
                    trips.append(monotonic_clock() - began)
                    body = b""
                    async for block in answer.aiter_raw():  # not unpacked: a small one may become a huge one
                        body += block
                        if len(body) > MOST_BYTES:
                            raise NoModelList(f"{asked} sends more than {MOST_BYTES >> 20} MB: that is no model list.")
                if answer.status_code != 200:
                    raise _refused(asked, answer, body, key)
            models, owner = _read(asked, body, key)
    except NoModelList as error:
        error.found = Found(address, (), "", min(trips[1:] or trips))
        raise
    except httpx2.ConnectError as failure:
        raise EngineError(_unconnected(url, failure)) from None
    except httpx2.TimeoutException:
        raise EngineError(f"{url.base_url} took the connection and then did not answer.") from None
    except httpx2.RemoteProtocolError:
        raise EngineError(f"What answers at {url.base_url} is no web server, or wants https:// in front.") from None
    except httpx2.HTTPError as failure:
        raise EngineError(f"{url.base_url} broke off its answer: {without_key(str(failure), key)}.") from None
    # The first one may have opened the connection.
    return Found(address, models, owner, min(trips[1:] or trips))


def _refused(asked: str, answer: httpx2.Response, body: bytes, key: str) -> EngineError:
    code = answer.status_code
    said = _said(body, key)
    if code in (401, 403):
        wrong = "does not take this key" if key else "wants a key"
        return EngineError(f"{asked} {wrong} (HTTP {code}){said}")
    if code in (404, 405):
        return NoModelList(
            f"{asked} does not exist (HTTP {code}): this is no OpenAI-compatible address, or its path is another one."
        )
    if code in (301, 302, 303, 307, 308):
        return EngineError(f"{asked} leads elsewhere (HTTP {code}). Type the address that it leads to.")
    if code == 429:
        return EngineError(f"{asked} has been asked too often (HTTP 429){said}")
    # A list that fails need not mean that nothing is served: transformers' reads a folder that may not be there.
    return (NoModelList if code >= 500 else EngineError)(f"{asked} answered with HTTP {code}{said}")


def _said(body: bytes, key: str) -> str:
    """The server's own words behind a colon, without the key; only a full stop where it has none."""
    text = body.decode(errors="replace")
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = "" if "<" in text else text  # a page for people
    if isinstance(value, dict):
        error = value.get("error", value.get("detail", value.get("message", "")))
        value = error.get("message", "") if isinstance(error, dict) else error
    words = " ".join(without_key(str(value or ""), key).split())[:MOST_WORDS]
    return f": {words}" if words else "."


def _read(asked: str, body: bytes, key: str) -> tuple[tuple[str, ...], str]:
    """The models' ids and who owns them."""
    try:
        value = json.loads(body)
    except ValueError:
        what = "an empty answer" if not body.strip() else "something that is not JSON"
        raise NoModelList(f"{asked} gives {what}, so it is no list of models.") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise NoModelList(f"{asked} gives no list of models: this is no OpenAI-compatible address.")
    named = [row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str) and row["id"]]
    models = dict.fromkeys(without_key(row["id"], key) for row in named[:MOST_MODELS])
    owners = {str(row.get("owned_by") or "") for row in named}
    return tuple(models), without_key(owners.pop(), key) if len(owners) == 1 else ""


def _unconnected(url: ServerURL, failure: Exception) -> str:
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"{url.host} has a certificate that cannot be trusted: {cause.verify_message}."
        if isinstance(cause, ssl.SSLError):
            return f"{url.host} does not speak TLS at port {url.port}. Is it http:// and not https://?"
        cause = cause.__cause__ or cause.__context__
    return f"{url.base_url} cannot be reached."
