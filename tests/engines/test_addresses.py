"""Addresses that strangers type: every way we know to reach a private network through a public page."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from engines.addresses import lookup, on_this_machine, private_address, public_addresses, read_url, why_private
from engines.base import EngineError


@pytest.mark.parametrize(
    ("typed", "base_url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        (" http://gpu-box:8000/ ", "http://gpu-box:8000"),
        ("http://gpu-box:8000/v1", "http://gpu-box:8000"),
        ("http://gpu-box:8000/v1/", "http://gpu-box:8000"),
        ("http://gpu-box/v1/models", "http://gpu-box"),
        ("http://gpu-box/v1/chat/completions", "http://gpu-box"),
        ("https://openrouter.ai/api", "https://openrouter.ai/api"),
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api"),
        ("https://openrouter.ai:443/api//v1//", "https://openrouter.ai/api"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("HTTP://Gpu-Box:80", "http://gpu-box"),
    ],
)
def test_an_address_may_be_typed_with_or_without_its_end(typed: str, base_url: str) -> None:
    assert read_url(typed).base_url == base_url


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("", "Type the server's address"),
        ("ftp://gpu-box", "must begin with http"),
        ("file:///etc/passwd", "must begin with http"),
        ("gopher://gpu-box:70", "must begin with http"),
        ("http://me:secret@gpu-box", "must not hold a user"),
        ("http://me@gpu-box", "must not hold a user"),
        ("http://gpu-box?key=secret", "must end before"),
        ("http://gpu-box/v1#secret", "must end before"),
        ("http://8.8.8.8\\@127.0.0.1", "characters that an address cannot have"),
        ("http://8.8.8.8\r\nHost: inside", "characters that an address cannot have"),
        ("http://8.8.8.8 @127.0.0.1", "characters that an address cannot have"),
        ("http://gpu-box/'><script>", "characters that an address cannot have"),
        ("http://①②⑦.⓪.⓪.①", "no address of a server"),
        ("http://gpu-box:99999", "no address of a server"),
        ("http://gpu-box:0", "no address of a server"),
        ("http://", "no address of a server"),
        ("http://[::1", "no address of a server"),
        ("http://" + "a" * 600, "characters that an address cannot have"),
    ],
)
def test_what_is_no_address_is_refused_in_words(typed: str, words: str) -> None:
    with pytest.raises(EngineError) as refused:
        read_url(typed)
    assert words in refused.value.message and "secret" not in refused.value.message


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1",
        "http://127.9.9.9:8000",
        "http://127.1",
        "http://10.1.2.3",
        "http://172.16.0.1",
        "http://172.31.255.255",
        "http://192.168.0.1",
        "http://169.254.0.1",
        "http://169.254.169.254/latest/meta-data",
        "http://100.64.0.1",  # shared by the customers of a provider
        "http://100.100.100.200",  # Alibaba's metadata
        "http://168.63.129.16",  # Azure's
        "http://192.0.0.192",  # Oracle's
        "http://0.0.0.0",
        "http://0",
        "http://255.255.255.255",
        "http://224.0.0.1",
        "http://2130706433",
        "http://0x7f000001",
        "http://0x7f.1",
        "http://017700000001",
        "http://0177.0.0.1",
        "http://[::1]",
        "http://[::]",
        "http://[fc00::1]",
        "http://[fd00:ec2::254]",  # Amazon's metadata
        "http://[fe80::1]",
        "http://[fec0::1]",
        "http://[ff02::1]",
        "http://[::ffff:127.0.0.1]",
        "http://[::ffff:a9fe:a9fe]",
        "http://[::127.0.0.1]",
        "http://[64:ff9b::10.0.0.1]",
        "http://[64:ff9b:1::7f00:1]",
        "http://[2002:7f00:1::]",
        "http://localhost",
        "https://LOCALHOST:8443/v1",
    ],
)
def test_a_public_page_calls_no_private_address_however_it_is_written(url: str) -> None:
    reason = private_address(url)
    assert reason and "does not call" in reason and "it leads" in reason


@pytest.mark.parametrize("url", ["http://8.8.8.8", "https://1.1.1.1/api/v1", "http://[2606:4700::1111]:8000"])
def test_a_public_address_is_called(url: str) -> None:
    assert private_address(url) is None
    assert public_addresses(read_url(url)) == (read_url(url).host,)


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def answer(host: str, port: int, **settings: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", answer)


@pytest.mark.parametrize("addresses", [("10.0.0.7",), ("8.8.8.8", "10.0.0.7"), ("127.0.0.1", "8.8.8.8"), ("::1",)])
def test_a_name_that_leads_to_a_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]
) -> None:
    resolving(monkeypatch, *addresses)
    assert "does not call innocent.example" in (private_address("https://innocent.example") or "")


def test_a_name_that_leads_to_public_addresses_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "8.8.8.8", "8.8.8.8", "1.1.1.1")
    assert private_address("https://innocent.example") is None
    assert lookup(read_url("https://innocent.example")) == ("8.8.8.8", "1.1.1.1")


def test_an_address_that_cannot_be_read_is_no_public_one() -> None:
    assert why_private("elsewhere") == "its address cannot be read"


def test_loopback_addresses_are_on_this_machine() -> None:
    here = ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "8.8.8.8"]
    assert [on_this_machine(one) for one in here] == [True, True, True, True, False, False]
