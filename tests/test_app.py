"""`python app.py` as its users start it: the page answers, and whatever ends the app ends its engines too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from app import _parser, make_host
from engines.local import LocalHost
from engines.server import free_port
from tests.conftest import wait_until
from tests.running_app import PROJECT, RunningApp, alive

STRAIGHT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to this machine, past any proxy


def get(url: str) -> tuple[int, str, bytes]:
    with STRAIGHT.open(url, timeout=10) as answer:
        return answer.status, answer.headers.get_content_type(), answer.read()


def test_the_page_answers_and_a_plain_kill_ends_the_app_with_all_its_engines(tmp_path: Path) -> None:
    port = free_port()
    with RunningApp("--scripted", "--port", str(port), cache=tmp_path) as app:
        url = app.url()
        assert url == f"http://127.0.0.1:{port}/"
        status, kind, page = get(url)
        assert (status, kind) == (200, "text/html")
        assert b"LLM Inference Bake-Off" in page
        # The plotting library, for exports in the browser, comes from our own server.
        status, kind, library = get(f"{url}assets/plotly.min.js")
        assert (status, kind) == (200, "text/javascript")
        assert len(library) > 1_000_000 and b"plotly.js" in library[:200]
        app.wait_for_log(": ready", count=3)
        processes = app.tree()
        assert len(processes) >= 6  # three engines, each with its keeper
        app.process.terminate()
        assert app.process.wait(20) == 0
        assert alive(processes) == []
        assert "Traceback" not in app.log


def test_killing_the_app_outright_leaves_no_engine_behind(tmp_path: Path) -> None:
    with RunningApp("--scripted", "--port", str(free_port()), cache=tmp_path) as app:
        app.wait_for_log(": ready", count=3)  # which is before the page is up
        processes = app.tree()
        assert len(processes) >= 6
        app.process.send_signal(signal.SIGKILL)
        app.process.wait(5)
        wait_until(lambda: alive(processes) == [], 15)


def test_an_engine_that_nobody_knows_exits_with_two_and_a_sentence(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "app.py", "--engine", "llamafile"],
        cwd=PROJECT,
        env={**os.environ, "BAKEOFF_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    message = "There is no engine called 'llamafile'. Known engines: transformers, vllm, sglang."
    assert (ended.returncode, ended.stderr.strip(), ended.stdout) == (2, message, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--random-weights", "gpt-5"],
            "There is no shape called 'gpt-5'. Known shapes: qwen3.5-4b, gemma-4-26b-a4b.",
        ),
        (
            ["--random-weights", "qwen3.5-4b", "--model", "x"],
            "--random-weights makes a model on this machine: it goes with neither --model nor --host.",
        ),
    ],
)
def test_random_weights_that_cannot_be_exit_with_two_and_a_sentence(
    tmp_path: Path, options: list[str], message: str
) -> None:
    environment = {**os.environ, "BAKEOFF_CACHE": str(tmp_path)}
    command = [sys.executable, "app.py", *options]
    ended = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stderr.strip()) == (2, message)


def test_a_page_of_random_weights_has_them_in_its_cache_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path))
    host = make_host(_parser().parse_args(["--scripted", "--random-weights", "qwen3.5-4b"]))
    assert (host.model_label, host.model_note) == (
        "Qwen3.5-4B (random weights)",
        "random weights: speed is real, text is not",
    )
    assert isinstance(host, LocalHost) and Path(host.model).parent == tmp_path / "models"
    host.close()
