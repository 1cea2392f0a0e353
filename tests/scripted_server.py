"""A scripted engine that somebody else has started: a process of its own on a free port."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from engines.server import free_port
from tests.conftest import wait_until
from tests.running_app import PROJECT


@contextmanager
def scripted_server(prefix_caching: bool = False, draft_tokens: int = 0, **script: object) -> Iterator[str]:
    """Its address, without /v1, while it answers. `script`: fields of `engines.scripted.Script`."""
    port = free_port()
    settings = {"start": 0.0, "first_token": 0.005, "gap": 0.001, **script}
    command = [sys.executable, "-m", "engines.scripted", "--port", str(port), "--script", json.dumps(settings)]
    command += ["--prefix-caching"] if prefix_caching else []
    command += ["--draft-tokens", str(draft_tokens)] if draft_tokens else []
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def answers(port: int) -> bool:
    with socket.socket() as link:
        return link.connect_ex(("127.0.0.1", port)) == 0
