"""Addresses that strangers type: what they may be, where they lead, and whether that is somebody's private network."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from engines.base import EngineError

DEFAULT_PORTS = {"http": 80, "https": 443}
MOST_CHARACTERS = 500
PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")
# They look public and answer from inside a cloud: Azure's own machines, Oracle's among those that are nobody's.
CLOUD_INSIDE = (ipaddress.ip_network("168.63.129.16/32"), ipaddress.ip_network("192.0.0.0/24"))
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in the last four bytes

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class ServerURL:
    """A server's address, taken apart. `path`: in front of /v1, e.g. "/api", without a slash at its end."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def base_url(self) -> str:
        """Without /v1."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def read_url(typed: str) -> ServerURL:
    """The address of an OpenAI-compatible server, typed with or without /v1. Raises EngineError.

    Nothing of what was typed is used but the parts named here, so that no two readers can read it differently.
    """
    text = typed.strip()
    if not text:
        raise EngineError("Type the server's address, such as http://127.0.0.1:8000.")
    if len(text) > MOST_CHARACTERS or not text.isprintable() or any(mark in text for mark in "\\ \"'<>"):
        raise EngineError("This is no address: it holds characters that an address cannot have.")
    text = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise EngineError("This is no address of a server: type one such as http://127.0.0.1:8000.") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise EngineError("The address must begin with http:// or https://.")
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise EngineError("The address must not hold a user and a password: a key goes into the key's own field.")
    if parts.query or parts.fragment:
        raise EngineError("The address must end before a ? or #: a key goes into the key's own field.")
    if port == 0 or not host or not (PLAIN_NAME.fullmatch(host) or _is_ip(host)):
        raise EngineError("This is no address of a server: type one such as http://127.0.0.1:8000.")
    path = re.sub(r"(/v1)?(/(models|chat/completions))?/*$", "", re.sub(r"/+", "/", parts.path))
    return ServerURL(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], path.rstrip("/"))


def lookup(url: ServerURL) -> tuple[str, ...]:
    """The IP addresses behind the host's name, each once, as the system orders them. Blocks; raises EngineError."""
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise EngineError(f"There is no host called {url.host}.") from None
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def public_addresses(url: ServerURL) -> tuple[str, ...]:
    """As `lookup`, for pages that strangers use: raises EngineError when any of the addresses is private.

    A name may lead elsewhere the next time somebody looks it up (DNS rebinding), so what connects afterwards must be
    given one of these and never the name: `Endpoint.address`.
    """
    addresses = lookup(url)
    for address in addresses:
        if reason := why_private(address):
            raise EngineError(f"This page does not call {url.host}: {reason}.")
    return addresses


def private_address(url: str) -> str | None:
    """Why a public page must not call this address, in words; None when it may, as far as can be told now."""
    try:
        public_addresses(read_url(url))
    except EngineError as error:
        return error.message
    return None


def why_private(address: str) -> str | None:
    """Why an IP address, as getaddrinfo writes it, is nobody's public server; None when it may be one."""
    try:
        ip: IPAddress = ipaddress.ip_address(address)
    except ValueError:
        return "its address cannot be read"
    for one in (ip, *_inside(ip)):
        if one.is_loopback or one.is_unspecified:
            return "it leads to the machine that this page runs on"
        if one.is_link_local or any(one in network for network in CLOUD_INSIDE):
            return "it leads to the inside of the machine's own network or cloud"
        if not one.is_global or one.is_multicast or one.is_reserved or getattr(one, "is_site_local", False):
            return "it leads into a private network"
    return None


def on_this_machine(address: str) -> bool:
    """Whether an IP address is a loopback one."""
    ip = ipaddress.ip_address(address)
    return any(one.is_loopback for one in (ip, *_inside(ip)))


def _inside(ip: IPAddress) -> list[IPAddress]:
    """IPv4 addresses that are written inside an IPv6 one, and are where it leads."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    inside: list[IPAddress | None] = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip in NAT64 or int(ip) >> 32 == 0 and int(ip) > 1:  # the latter: the old "compatible" form ::a.b.c.d
        inside.append(last)
    return [one for one in inside if one is not None]


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
