"""One engine's server: its start in phases, why it died, whose answer it takes for its own, and that it stops."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from engines import server as server_module
from engines.base import Engine, EngineConfig, EngineError
from engines.environments import Environment
from engines.server import Server, check_model, death_reason, free_port
from tests.conftest import wait_until

Serve = Callable[..., Server]
SLEEP = "import time; time.sleep(600)"
HEALTHY = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


@pytest.fixture
def serve(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a server of the engine; all servers are stopped at the end of the test."""
    monkeypatch.setattr(server_module, "HEALTH_LOOK_SECONDS", 0.05)  # these are ready sooner than real engines
    servers: list[Server] = []

    def start(engine: Engine, model: str = model, port: int | None = None, **settings: object) -> Server:
        config = EngineConfig(model=model, port=port or free_port())
        log_file = settings.pop("log_file", tmp_path / "logs" / "engine.log")
        server = Server(engine, config, Environment(engine, "cpu"), log_file, **settings)  # type: ignore[arg-type]
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def running(*words: str, **variables: str) -> Engine:
    """An engine row that runs this command with its port as the last word."""
    return Engine(
        name="own",
        label="Own",
        colour="#000000",
        package="aiohttp",
        serve_command=lambda config: [*words, str(config.port)],
        variables=lambda config: variables,
        request_fields=lambda request: {},
    )


def program(source: str, **variables: str) -> Engine:
    return running("python", "-c", source, **variables)


@contextmanager
def another_program_on(port: int) -> Iterator[None]:
    """A healthy server of somebody else."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Health) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield
        server.shutdown()


def tree(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


def failure(server: Server, limit_seconds: float = 10) -> EngineError:
    with pytest.raises(EngineError) as caught:
        server.wait_until_ready(limit_seconds)
    return caught.value


# A good start


def test_the_phases_follow_the_log_and_each_has_its_time(
    scripted: Callable[..., Engine], serve: Serve, tmp_path: Path
) -> None:
    seen: list[str] = []
    began = time.perf_counter()
    server = serve(scripted(start=0.6), on_phase=seen.append)  # half of it loads, half of it warms up: 0.3 s each
    assert server.phase == "importing"
    server.wait_until_ready(20)
    took = time.perf_counter() - began

    assert seen == ["loading weights", "warming up", "ready"]
    assert server.phase == "ready"
    seconds = {phase.name: phase.seconds for phase in server.phases}
    assert list(seconds) == ["importing", "loading weights", "warming up"]
    assert seconds["loading weights"] == pytest.approx(0.3, abs=0.15)
    assert seconds["warming up"] >= 0.25
    assert sum(seconds.values()) == pytest.approx(took, abs=0.1)  # no moment belongs to two phases, or to none
    assert server.processor_seconds() > 0.05  # importing alone took that
    assert server.endpoint.base_url == f"http://127.0.0.1:{server.config.port}"

    log = (tmp_path / "logs" / "engine.log").read_text().splitlines()
    assert log[0] == f"$ {server.shown_command}"
    assert log[1:] == ["scripted: loading weights", "scripted: warming up", "scripted: serving"]
    assert server.log_tail.splitlines() == log[1:]


def test_the_command_is_shown_as_one_would_type_it(serve: Serve) -> None:
    server = serve(program(SLEEP, GREETING="it's me"), port=free_port())
    shown = f"GREETING='it'\"'\"'s me' python -c 'import time; time.sleep(600)' {server.config.port}"
    assert server.shown_command == shown


def test_a_model_on_this_machine_is_not_looked_up_on_the_hub(serve: Serve) -> None:
    show = "import os; print(os.environ.get('HF_HUB_OFFLINE'), os.environ['GIVEN'])"
    here = serve(program(show, GIVEN="yes"))
    elsewhere = serve(program(show, GIVEN="yes"), model="organisation/model")
    assert failure(here).log_tail == "1 yes"
    assert failure(elsewhere).log_tail == "None yes"


def test_a_log_that_cannot_be_written_does_not_hold_the_engine_up(serve: Serve) -> None:
    # Far more than a pipe holds: were nobody reading, the engine would wait for ever before it serves.
    chatty = "print('words ' * 100_000, flush=True); print('last words', flush=True)"
    server = serve(program(chatty + HEALTHY), log_file=Path("/dev/full"))  # a disk without any space left
    server.wait_until_ready(10)
    assert server.log_tail.endswith("last words")


def test_a_log_that_cannot_be_opened_is_said(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"^Cannot write the log .*/file/engine\.log: "):
        serve(program(SLEEP), log_file=tmp_path / "file" / "engine.log")


# What is refused before anything starts


def test_a_port_that_is_taken_is_refused(scripted: Callable[..., Engine], serve: Serve) -> None:
    port = free_port()
    with another_program_on(port), pytest.raises(EngineError, match=f"^Port {port} is taken by another program.$"):
        serve(scripted(), port=port)
    assert psutil.Process().children() == []


def test_a_folder_without_a_model_is_refused(scripted: Callable[..., Engine], serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^There is no model in /no/such: there is no such folder\.$"):
        serve(scripted(), model="/no/such")
    with pytest.raises(EngineError, match=rf"^There is no model in {tmp_path}: it holds no config\.json\.$"):
        serve(scripted(), model=str(tmp_path))
    assert psutil.Process().children() == []


@pytest.mark.parametrize("name", ["", "  ", "./here", "../there", "~/models/none"])
def test_what_looks_like_a_folder_must_be_one(name: str) -> None:
    with pytest.raises(EngineError):
        check_model(name)


def test_other_names_are_left_to_the_model_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_model("Qwen/Qwen3-0.6B")
    check_model(model)
    monkeypatch.setenv("HOME", str(Path(model).parent))
    check_model(f"~/{Path(model).name}")


# Whose answer it is


def test_another_programs_answer_on_the_port_is_not_taken_for_the_engines(serve: Serve) -> None:
    server = serve(program(SLEEP))
    with another_program_on(server.config.port):
        error = failure(server, limit_seconds=0.6)
    assert error.message == "Own was not ready after 1 s (last phase: importing)."


def test_a_port_that_is_taken_meanwhile_is_the_reason_of_death(scripted: Callable[..., Engine], serve: Serve) -> None:
    server = serve(scripted(start=0.3))
    with another_program_on(server.config.port):
        error = failure(server)
    assert error.message == (
        "Quick stopped with exit code 1 while warming up: its port was taken by another program meanwhile. "
        "Run it again."
    )


# Death


def test_death_at_the_start_gives_the_reason_and_the_logs_tail(scripted: Callable[..., Engine], serve: Serve) -> None:
    deaths: list[EngineError] = []
    server = serve(scripted(fault="exit at start"), on_death=deaths.append)
    error = failure(server)
    assert error.message == "Quick stopped with exit code 1 while loading weights: RuntimeError: the script says so"
    assert error.log_tail.splitlines()[0] == "scripted: loading weights"
    assert error.log_tail.splitlines()[-1] == "RuntimeError: the script says so"
    assert deaths == []  # it was raised instead


def test_the_tail_is_the_last_thirty_lines_that_say_something(serve: Serve) -> None:
    error = failure(serve(program("for n in range(100): print(f'line {n}\\n\\n')")))
    assert error.log_tail.splitlines() == [f"line {number}" for number in range(70, 100)]


def test_death_by_a_signal_is_told(serve: Serve) -> None:
    error = failure(serve(program("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")))
    assert error.message == "Own was ended by signal 9 while importing."


def test_a_program_that_is_not_there_is_named(serve: Serve) -> None:
    error = failure(serve(running("no-such-program")))
    assert error.message.startswith("Own stopped with exit code 127 while importing")
    assert re.match(r"cannot start .*/no-such-program: ", error.log_tail)


def test_death_while_serving_is_reported_once(serve: Serve) -> None:
    deaths: list[EngineError] = []
    server = serve(program("print('up', flush=True)" + HEALTHY), on_death=deaths.append)
    server.wait_until_ready(10)
    (process,) = tree(server)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: deaths != [])
    server.stop()
    assert [(death.message, death.log_tail) for death in deaths] == [
        ("Own was ended by signal 9 while it was serving.", "up")
    ]
    assert not server.running()


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (["torch.OutOfMemoryError: CUDA out of memory. Tried"], "the GPU's memory is full. Lower the memory share"),
        (["OSError: [Errno 28] No space left on device"], "the disk is full."),
        (["[Errno 98] Address already in use"], "its port was taken by another program meanwhile."),
        (["OSError: /m is not a local folder and is not a valid model identifier"], "the model was not found."),
        (["ValueError: first", "more", "KeyError: 'last'", "bye"], "KeyError: 'last'"),
        (["(EngineCore pid=7) ERROR [core.py] pydantic.ValidationError: 1 field"], "ValidationError: 1 field"),
        (["all is well", "0 errors"], ""),
        ([], ""),
    ],
)
def test_the_reason_comes_from_the_last_lines(tail: list[str], reason: str) -> None:
    assert death_reason(tail).startswith(reason)
    assert bool(death_reason(tail)) == bool(reason)


# Never ready, and stopping


def test_a_server_that_is_never_ready_is_ended_at_the_limit(scripted: Callable[..., Engine], serve: Serve) -> None:
    server = serve(scripted(fault="never ready"))
    wait_until(lambda: "serving" in server.log_tail)  # it listens, and answers that it is not well
    processes = tree(server)
    error = failure(server, limit_seconds=0.8)
    assert error.message == "Quick was not ready after 1 s (last phase: warming up)."
    assert error.log_tail.endswith("scripted: serving")
    assert psutil.wait_procs(processes, timeout=1)[1] == []
    assert not server.running()


def test_stopping_leaves_no_process_and_is_no_death(serve: Serve) -> None:
    deaths: list[EngineError] = []
    server = serve(program(HEALTHY), on_death=deaths.append)
    server.wait_until_ready(10)
    processes = tree(server)
    server.stop()
    assert psutil.wait_procs(processes, timeout=1)[1] == []
    assert not server.running()
    assert server.processor_seconds() == 0  # nobody is left who could use any
    assert deaths == []
    server.stop()  # once more does no harm


def test_who_waits_for_a_server_that_is_stopped_is_told_so(serve: Serve) -> None:
    server = serve(program(SLEEP))
    threading.Timer(0.1, server.stop).start()
    assert failure(server).message == "Own was stopped while it started."


def test_where_the_system_shows_nobody_s_sockets_an_answer_must_do(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil.Process, "net_connections", lambda self, kind: [])
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [])
    server = serve(program(HEALTHY))

    server.wait_until_ready(20)

    assert server.running()
