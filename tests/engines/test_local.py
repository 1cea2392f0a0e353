"""The host on this machine: what its lights show, what restarts an engine, and that closing leaves nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engines import engine_named, environments, local, server
from engines.base import Engine, EngineConfig, EngineError, Request
from engines.client import EngineClient
from engines.environments import Environment
from engines.local import LocalHost, Serving
from engines.openai_stream import ChatStreamParser
from engines.timeline import Arrival, Timeline, record
from tests.conftest import MACHINE, wait_until
from tests.engines.test_environments import lay_out, make_wheel

MakeEngine = Callable[..., Engine]
MakeHost = Callable[..., LocalHost]
ONE_GPU = replace(MACHINE, gpu="Test GPU", gpu_memory_gib=80.0, gpu_count=1)


@pytest.fixture(autouse=True)
def no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set up first in every test, so it looks last, when `make_host` has closed all hosts."""
    monkeypatch.setattr(server, "HEALTH_LOOK_SECONDS", 0.05)  # these engines are ready sooner than real ones
    yield
    assert psutil.Process().children(recursive=True) == []


def ask(serving: Serving, on_arrival: Callable[[Arrival], None] = lambda arrival: None, tokens: int = 12) -> Timeline:
    async def one_request() -> Timeline:
        async with EngineClient(serving.endpoint) as client:
            return await record(Request("Why?", tokens), client.blocks, ChatStreamParser(), on_arrival)

    return asyncio.run(one_request())


def processes() -> list[psutil.Process]:
    """The engines' own processes, without their keepers."""
    return [engine for keeper in psutil.Process().children() for engine in keeper.children()]


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[EngineError]]:
    errors: list[EngineError] = []

    def run() -> None:
        try:
            work()
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def lights(host: LocalHost) -> list[str]:
    return [status.light for status in host.statuses().values()]


def all_are(host: LocalHost, light: str) -> Callable[[], bool]:
    return lambda: set(lights(host)) == {light}


# One engine, from down to ready


def test_the_states_of_a_good_start_and_what_a_result_must_say(
    scripted: MakeEngine, make_host: MakeHost, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bakeoff")
    host = make_host(scripted(start=0.2))
    before = host.status("quick")
    assert (before.light, before.start_seconds, before.version) == ("down", None, None)

    serving = host.ready("quick")

    assert caplog.messages == [
        "Quick: starting: importing",
        "Quick: starting: loading weights",
        "Quick: starting: warming up",
        "Quick: ready",
    ]
    status = host.status("quick")
    assert (status.light, status.phase, status.error, status.install_seconds) == ("ready", "", "", None)
    assert [phase.name for phase in status.phases] == ["importing", "loading weights", "warming up"]
    assert status.start_seconds == pytest.approx(sum(phase.seconds for phase in status.phases))
    assert status.elapsed() < 1  # one stopwatch per light: it began anew with ready
    assert serving.config == replace(host.config("quick"), port=serving.config.port)
    assert (serving.config.model, serving.config.device) == (model, "cpu")
    assert serving.endpoint.base_url == f"http://127.0.0.1:{serving.config.port}"
    assert serving.command.startswith("PYTHONPATH=")
    assert serving.caveat == "Quick follows a script: these are no engine's numbers."
    assert (serving.phases, serving.version, serving.installed) == (status.phases, status.version, {})
    assert ask(serving).error is None
    assert (host.cache / "logs" / f"quick-{os.getpid()}.log").read_text().endswith("scripted: serving\n")


def test_one_core_is_left_free_of_an_engines_threads(scripted: MakeEngine, make_host: MakeHost) -> None:
    on = {cores: make_host(scripted(), hardware=replace(MACHINE, cores=cores)) for cores in (1, 2, 8)}
    assert {cores: host.config("quick").cpu_threads for cores, host in on.items()} == {1: 1, 2: 1, 8: 7}  # 8 - 1 = 7
    assert make_host(scripted(), hardware=ONE_GPU).config("quick").cpu_threads is None


def test_what_a_host_is_told_of_gpus_copies_and_sleep_reaches_its_engines(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    plain = make_host(scripted(), hardware=ONE_GPU).config("quick")
    assert (plain.tensor_parallel, plain.replicas, plain.can_sleep) == (1, 1, False)
    host = make_host(scripted(), hardware=ONE_GPU, tensor_parallel=2, replicas=3, can_sleep=True)
    assert host.config("quick") == replace(plain, tensor_parallel=2, replicas=3, can_sleep=True)


def test_it_is_busy_while_a_request_is_with_it(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted())
    with host.busy("quick"):
        assert host.status("quick").light == "down"  # an engine that is not ready cannot be busy
    host.ready("quick")
    with host.busy("quick"):
        assert host.status("quick").light == "busy"
    assert host.status("quick").light == "ready"


def test_another_configuration_restarts_it_and_the_same_does_not(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted())
    first = host.ready("quick")
    (process,) = processes()
    assert host.ready("quick") == first
    assert host.ready("quick", replace(first.config, port=1)) == first  # which port is the host's own affair
    assert processes() == [process]

    second = host.ready("quick", replace(first.config, prefix_caching=True))

    assert second.config.prefix_caching
    assert not process.is_running()
    assert len(processes()) == 1
    assert ask(second).error is None


def test_what_an_engine_cannot_do_is_said_before_it_is_installed(make_host: MakeHost) -> None:
    host = make_host(engine_named("transformers"))
    with pytest.raises(EngineError, match="keeps no prefix cache"):
        host.ready("transformers", replace(host.config("transformers"), prefix_caching=True))
    assert host.status("transformers").light == "failed"
    assert not (host.cache / "environments").exists()


# Failures


def test_a_failed_engine_works_again_the_next_time(scripted: MakeEngine, make_host: MakeHost) -> None:
    broken, sound = scripted(fault="exit at start"), scripted()
    is_broken = True

    def serve_command(config: EngineConfig) -> list[str]:
        return (broken if is_broken else sound).serve_command(config)

    host = make_host(replace(sound, serve_command=serve_command))
    with pytest.raises(EngineError) as caught:
        host.ready("quick")
    failed = host.status("quick")
    assert (failed.light, failed.phase) == ("failed", "")
    assert failed.error == caught.value.message
    assert failed.error.endswith("RuntimeError: the script says so")
    assert failed.log_tail.endswith("RuntimeError: the script says so")

    is_broken = False
    serving = host.ready("quick")

    status = host.status("quick")
    assert (status.light, status.error, status.log_tail) == ("ready", "", "")
    assert ask(serving).error is None


def test_an_engine_killed_in_mid_stream_fails_and_is_restarted_the_next_time(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted(gap=0.005))
    arrivals: list[Arrival] = []

    def kill_after_five(arrival: Arrival) -> None:
        arrivals.append(arrival)
        if len(arrivals) == 5:
            os.kill(processes()[0].pid, signal.SIGKILL)

    serving = host.ready("quick")
    with host.busy("quick"):
        timeline = ask(serving, kill_after_five, tokens=100)
        assert timeline.error is not None and timeline.error.startswith("Quick broke off the answer")
        assert 5 <= len(timeline.arrivals) < 100
        wait_until(lambda: host.status("quick").light == "failed")
    status = host.status("quick")
    assert status.light == "failed"  # and not ready again because the request is over
    assert status.error == "Quick was ended by signal 9 while it was serving."
    assert status.log_tail.endswith("scripted: serving")

    timeline = ask(host.ready("quick"))
    assert timeline.error is None and len(timeline.arrivals) == 12
    assert host.status("quick").error == ""


def test_a_port_that_is_taken_is_shown(scripted: MakeEngine, make_host: MakeHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host = make_host(scripted(), port=taken.getsockname()[1])
        with pytest.raises(EngineError, match="is taken by another program"):
            host.ready("quick")
    assert host.status("quick").error == f"Port {host._fixed_port} is taken by another program."
    assert host.ready("quick").config.port == host._fixed_port  # it is free now


def test_a_model_that_is_not_there_is_shown(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted(), model="/no/such")
    with pytest.raises(EngineError):
        host.ready("quick")
    assert host.status("quick").error == "There is no model in /no/such: there is no such folder."


# Installing


SMALL_ENGINE = """
import http.server, sys, torch
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


@pytest.fixture
def installed_engine(scripted: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that is installed from two small wheels, one of which is its server."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "torch", "2.1", {"torch.py": ""})
    make_wheel(wheels, "small_engine", "0.3", {"small_engine.py": SMALL_ENGINE})
    monkeypatch.setattr(environments, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    pins = tmp_path / "pins.txt"
    pins.write_text("torch==2.1\nsmall-engine==0.3\n")
    return replace(
        scripted("small"),
        package="small-engine",
        serve_command=lambda config: ["python", "-m", "small_engine", str(config.port)],
        variables=lambda config: {},
        requirements={"cpu": str(pins)},
    )


def test_an_environment_that_turns_out_to_be_broken_is_made_again_the_next_time(
    installed_engine: Engine, make_host: MakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bakeoff")
    host = make_host(installed_engine)
    environment = Environment(installed_engine, "cpu", host.cache)
    lay_out(environment, "torch-2.1", "small_engine-0.3", python=False)  # it seems whole, but torch itself is gone
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
    next(environment.folder.glob("lib/python*/site-packages")).joinpath("small_engine.py").write_text(SMALL_ENGINE)
    with pytest.raises(EngineError, match="while importing: ModuleNotFoundError: No module named 'torch'"):
        host.ready("small")
    caplog.clear()

    serving = host.ready("small")

    assert [message.partition(":")[2] for message in caplog.messages] == [
        " installing: waiting for its turn",  # later progress is told every few seconds only
        " starting: importing",
        " ready",
    ]
    assert (serving.version, serving.installed) == ("0.3", {"torch": "2.1", "small-engine": "0.3"})
    status = host.status("small")
    assert (status.light, status.version) == ("ready", "0.3")
    assert status.install_seconds is not None and status.install_seconds > 0.1


def test_closing_while_it_installs_returns_quickly_and_leaves_nothing(
    installed_engine: Engine, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # a package index that accepts, and never answers
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/")
        host = make_host(installed_engine)
        starting, errors = in_background(lambda: host.ready("small"))
        connection, _ = index.accept()  # pip waits by now
        assert host.status("small").light == "installing"
        assert host.status("small").phase == "installing torch 2.1"
        with connection:
            began = time.monotonic()
            host.close()
            assert time.monotonic() - began < 3
    starting.join(1)
    assert [error.message for error in errors] == ["The installation was cancelled."]
    assert host.status("small").light == "down"
    assert list((host.cache / "environments").glob("*/")) == []
    assert psutil.Process().children(recursive=True) == []


# Closing


def test_closing_while_it_starts_returns_quickly_and_leaves_nothing(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted(fault="never ready"))
    starting, errors = in_background(lambda: host.ready("quick"))
    wait_until(lambda: host.status("quick").phase == "warming up")
    began = time.monotonic()
    host.close()
    assert time.monotonic() - began < 3
    starting.join(1)
    assert [error.message for error in errors] == ["Quick was stopped while it started."]
    assert host.status("quick").light == "down"
    assert psutil.Process().children(recursive=True) == []
    with pytest.raises(EngineError, match=r"^The app is closing\.$"):
        host.ready("quick")


def test_a_server_that_starts_just_as_the_host_closes_is_stopped_too(scripted: MakeEngine, make_host: MakeHost) -> None:
    engine = scripted(fault="never ready")

    def closing_meanwhile(config: EngineConfig) -> dict[str, str]:  # called between the decision to start and the start
        closing.start()
        wait_until(host._closing.is_set)
        time.sleep(0.1)  # by now it has looked for a server, and found none yet
        return engine.variables(config)

    host = make_host(replace(engine, variables=closing_meanwhile))
    closing = threading.Thread(target=host.close)
    with pytest.raises(EngineError, match="was stopped while it started"):
        host.ready("quick")
    closing.join(1)
    assert not closing.is_alive()


# Engines that take turns


def test_on_one_gpu_an_engine_that_starts_stops_the_others(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted("first"), scripted("second"), hardware=ONE_GPU)
    assert (host.resident_together, host.config("first").device) == (False, "cuda")
    first = host.ready("first")
    assert first.config.device == "cuda"
    second = host.ready("second")
    assert lights(host) == ["down", "ready"]
    assert ask(first).error == f"First cannot be reached at {first.endpoint.base_url}."
    assert ask(second).error is None
    host.ready("second")
    assert len(processes()) == 1


def test_on_one_gpu_opening_starts_no_engine(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted("first"), scripted("second"), hardware=ONE_GPU)
    host.open()
    wait_until(lambda: all("starts when it is its turn" in status.phase for status in host.statuses().values()))
    assert lights(host) == ["down", "down"]
    assert processes() == []


def test_an_engine_that_is_stopped_while_it_starts_is_down_and_not_failed(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted("first", fault="never ready"), scripted("second"), hardware=ONE_GPU)
    starting, errors = in_background(lambda: host.ready("first"))
    wait_until(lambda: host.status("first").phase == "warming up")
    host.ready("second")
    starting.join(1)
    assert [error.message for error in errors] == ["First was stopped while it started."]
    assert (lights(host), host.status("first").error) == (["down", "ready"], "")


def test_on_a_cpu_all_engines_stay(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted("first"), scripted("second"))
    host.open()  # both at once
    wait_until(all_are(host, "ready"))
    assert [ask(host.ready(name)).error for name in ("first", "second")] == [None, None]
    assert len(processes()) == 2


# Waiting for a quiet processor


def spinning(flag: Path, scripted: MakeEngine) -> Engine:
    """A healthy engine, two of whose processes keep the cores busy as long as there is a file."""
    program = f"""
import http.server, os, sys, threading
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health)
if os.fork():
    threading.Thread(target=server.serve_forever).start()
while os.path.exists({str(flag)!r}):
    pass
"""
    return replace(
        scripted("spinning"), serve_command=lambda config: ["python", "-c", program, str(config.port)], phases=()
    )


def test_settling_waits_for_the_others_and_only_for_them_and_not_for_ever(
    scripted: MakeEngine, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flag = tmp_path / "spin"
    flag.touch()
    host = make_host(spinning(flag, scripted), scripted("quiet"))
    assert host.settle("quiet")  # nobody is there to wait for
    host.ready("quiet")
    host.ready("spinning")
    assert host.settle("spinning")  # its own noise is no matter

    with monkeypatch.context() as impatient:
        impatient.setattr(local, "SETTLE_LIMIT_SECONDS", 0.3)
        assert not host.settle("quiet")

    threading.Timer(0.3, flag.unlink).start()
    assert host.settle("quiet")
    assert not flag.exists()


# Pages


def test_engines_stop_some_time_after_the_last_page_closed_and_start_again_for_the_next(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted("first"), scripted("second"), page_grace_seconds=0.3)
    host.open()
    host.watch_pages()
    host.page_opened("a page")
    host.page_opened("another")
    wait_until(all_are(host, "ready"))
    before = processes()

    host.page_closed("a page")
    time.sleep(0.4)
    assert lights(host) == ["ready", "ready"]  # one page is still open

    host.page_closed("another")
    host.page_opened("another again")  # a reload, within the 0.3 s of grace
    time.sleep(0.4)
    assert processes() == before

    host.page_closed("another again")
    closed = time.monotonic()
    wait_until(all_are(host, "down"), seconds=5)
    assert time.monotonic() - closed > 0.3
    assert processes() == []

    host.page_opened("the next visitor's")
    wait_until(all_are(host, "ready"))


def test_a_run_keeps_its_engines_although_no_page_is_open(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted(), page_grace_seconds=0.2)
    host.open()
    host.watch_pages()
    host.page_opened("a page")
    with host.in_use():
        serving = host.ready("quick")
        host.page_closed("a page")
        time.sleep(0.5)
        assert ask(serving).error is None
    wait_until(all_are(host, "down"), seconds=5)


def test_engines_stop_when_nobody_comes_at_all(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted(), first_page_seconds=0.2, page_grace_seconds=600)
    host.open()
    wait_until(all_are(host, "ready"))
    host.watch_pages()
    wait_until(all_are(host, "down"), seconds=5)


def test_a_visitor_who_comes_while_the_engines_stop_finds_them_up(scripted: MakeEngine, make_host: MakeHost) -> None:
    def slow_to_stop(engine: Engine) -> Engine:
        slow = "import os, runpy, signal, time; stop = lambda *_: (time.sleep(0.2), os._exit(0));"
        slow += "signal.signal(signal.SIGTERM, stop); runpy.run_module('engines.scripted', run_name='__main__')"
        return replace(engine, serve_command=lambda config: ["python", "-c", slow, *engine.serve_command(config)[3:]])

    names = ("first", "second", "third")
    host = make_host(*(slow_to_stop(scripted(name)) for name in names), page_grace_seconds=0.1)
    host.open()
    host.watch_pages()
    host.page_opened("a page")
    wait_until(all_are(host, "ready"))
    host.page_closed("a page")
    wait_until(lambda: "down" in lights(host), seconds=5)  # the first has stopped, the second is about to
    time.sleep(0.05)
    host.page_opened("another")
    wait_until(all_are(host, "ready"))
    time.sleep(0.8)  # the second looks ready until it has ended; by now all that was to be stopped is
    assert lights(host) == ["ready"] * 3
    assert [ask(host.ready(name)).error for name in names] == [None] * 3


def test_an_engine_is_busy_until_the_last_of_its_requests_has_ended(scripted: MakeEngine, make_host: MakeHost) -> None:
    host = make_host(scripted())
    host.ready("quick")
    with host.busy("quick"):
        with host.busy("quick"):
            assert host.status("quick").light == "busy"
        assert host.status("quick").light == "busy"
    assert host.status("quick").light == "ready"


@pytest.mark.parametrize(
    ("message", "broken"),
    [
        ("X stopped with exit code 1 while importing: ModuleNotFoundError: No module named 'triton'", True),
        ("X stopped with exit code 1 while importing: ImportError: cannot import name 'a' from 'b'", True),
        ("X stopped with exit code 1 while importing: ImportError: libcuda.so.1: cannot open shared object", False),
        ("X stopped with exit code 1 while loading weights: ValueError: no", False),
    ],
)
def test_only_a_missing_package_makes_an_environment_again(message: str, broken: bool) -> None:
    assert local.names_missing_package(EngineError(message)) is broken
