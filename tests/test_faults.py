"""Faults, one by one: each leaves clear words, no orphan process and no lost result, and the next run works."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmark.visitors import Seen, Stream, Visitor
from engines.base import Engine
from engines.local import LocalHost
from engines.server import free_port
from experiments.background import BackgroundRun
from experiments.base import EngineFailed, Plan, RequestEnded, TokensArrived
from experiments.baseline import EXPERIMENT
from experiments.library import Library
from experiments.metrics import METRICS
from experiments.result import ExperimentResult, ResultError
from tests.conftest import mounted_disk, wait_until
from tests.running_app import RunningApp, alive
from tests.ui.test_tab import tab_over
from ui.session import Sessions
from ui.tab import _finished

MakeEngine = Callable[..., Engine]
MakeHost = Callable[..., LocalHost]


def plan(*engines: str, **settings: object) -> Plan:
    common = {"prompt": "Go.", "engines": engines, "repeats": 1, "warmups": 0, "max_tokens": 20, "race": True}
    return Plan(**{**common, **settings})  # type: ignore[arg-type]


def ended(background: BackgroundRun) -> ExperimentResult:
    assert background.finished.wait(20)
    assert background.failure is None
    assert background.result is not None
    return background.result


def measure(host: LocalHost, *engines: str, **settings: object) -> ExperimentResult:
    return ended(BackgroundRun(EXPERIMENT, plan(*engines, **settings), host))


def load_processes() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "engines.load_process" in one.cmdline()]


def errors(result: ExperimentResult, engine: str) -> list[str | None]:
    return [row.timeline.error for row in result.measured(engine)]


def streaming(background: BackgroundRun, engine: str, tokens: int = 3) -> None:
    """Returns once this engine's answer is under way."""
    wait_until(lambda: sum(isinstance(e, TokensArrived) and e.engine == engine for e in background.events) >= tokens)


# The engine, and the way to it


@pytest.mark.parametrize(
    ("fault", "words", "kept"),
    [
        ("http 429", 'Faulty refused the request with HTTP 429: {"error": {"message": "the script says so"}}', 0),
        ("http 500", 'Faulty refused the request with HTTP 500: {"error": {"message": "the script says so"}}', 0),
        ("http 503", 'Faulty refused the request with HTTP 503: {"error": {"message": "the script says so"}}', 0),
        ("half a chunk", "Faulty broke off the answer: the connection was closed.", 5),
        ("close in mid-stream", "Faulty broke off the answer: ", 5),
        ("reset", "Faulty broke off the answer: Connection reset by peer.", 5),
        ("not json", "The engine sent something that is not JSON: {broken", 5),
        ("hang", "Faulty sent nothing for 0.4 s.", 5),
    ],
)
def test_a_request_that_goes_wrong_says_why_and_harms_neither_the_others_nor_the_next_run(
    scripted: MakeEngine, make_host: MakeHost, tmp_path: Path, fault: str, words: str, kept: int
) -> None:
    faulty = scripted("faulty", fault=fault, fault_after_tokens=5, fault_requests=1)
    host = make_host(faulty, scripted("sound"), silence_seconds=0.4)
    library = Library(tmp_path / "results", tmp_path / "none")
    first = measure(host, "sound")
    first.save(library.folder)
    result = measure(host, "faulty", "sound")
    (said,) = errors(result, "faulty")
    assert said is not None and said.startswith(words)
    assert len(result.measured("faulty")[0].timeline.arrivals) == kept
    assert result.distribution("faulty", METRICS["decode_speed"]).values == ()  # what failed is in no statistic
    assert errors(result, "sound") == [None]
    result.save(library.folder)
    assert load_processes() == []
    after = measure(host, "faulty", "sound")
    assert errors(after, "faulty") == errors(after, "sound") == [None]
    assert {entry.id for entry in library.entries()} == {first.id, result.id}


def test_an_engine_killed_in_mid_run_is_told_and_the_next_run_starts_it_again(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted("victim", gap=0.02), scripted("sound", gap=0.02))
    background = BackgroundRun(EXPERIMENT, plan("victim", "sound", repeats=2), host)
    streaming(background, "victim")
    server = host._slots["victim"].server
    assert server is not None
    processes = psutil.Process(server.pid).children(recursive=True)
    for process in processes:
        process.kill()
    result = ended(background)
    first, second = errors(result, "victim")
    assert first is not None and first.startswith("Victim broke off the answer")
    assert second is not None and second.startswith("Victim cannot be reached at ")
    assert errors(result, "sound") == [None, None]
    wait_until(lambda: host.status("victim").light == "failed")
    assert host.status("victim").error == "Victim was ended by signal 9 while it was serving."
    assert alive(processes) == [] and load_processes() == []
    assert errors(measure(host, "victim"), "victim") == [None]


def test_stop_ends_an_engine_that_hangs_at_once_whatever_the_limit_of_silence(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted("hanging", fault="hang", fault_after_tokens=2, fault_requests=1))
    assert host.silence_seconds == 600
    background = BackgroundRun(EXPERIMENT, plan("hanging"), host)
    streaming(background, "hanging", 2)
    asked = time.monotonic()
    background.stop()
    assert ended(background).stopped_early
    assert time.monotonic() - asked < 2
    wait_until(lambda: load_processes() == [])
    assert errors(measure(host, "hanging"), "hanging") == [None]


@pytest.mark.parametrize("race", [True, False])
def test_a_load_generator_that_is_killed_fails_its_own_contender_and_keeps_what_was_measured(
    scripted: MakeEngine, make_host: MakeHost, race: bool
) -> None:
    host = make_host(scripted("victim", gap=0.02), scripted("sound", gap=0.02))
    background = BackgroundRun(EXPERIMENT, plan("victim", "sound", repeats=3, race=race), host)
    wait_until(lambda: any(isinstance(e, RequestEnded) and e.row.engine == "victim" for e in background.events))
    streaming(background, "victim", 23)  # in its second answer
    endpoint = next(one for one in host.engines if one.name == "victim")
    server = host._slots[endpoint.name].server
    assert server is not None
    (mine,) = [one for one in load_processes() if str(server.config.port) in one.cmdline()]
    mine.kill()
    result = ended(background)
    row = next(engine for engine in result.engines if engine.name == "victim")
    assert row.error == "The load generator broke down."
    assert [e.row.name for e in background.events if isinstance(e, EngineFailed)] == ["victim"]
    assert errors(result, "victim") == [None]
    assert errors(result, "sound") == [None] * 3
    assert load_processes() == []
    assert errors(measure(host, "victim", "sound", repeats=2), "victim") == [None, None]


# The machine


STEPPED = """#!{python} -S
import runpy, sys, time
import engines.clock as clock
true, began, jump = time.time_ns, time.monotonic(), int({jump} * 1e9)
step = true() + 500_000_000
class Stamp:
    size = clock.TIMESPEC.size
    def unpack(self, value, unpack=clock.TIMESPEC.unpack):
        seconds, nanoseconds = unpack(value)
        at = seconds * 1_000_000_000 + nanoseconds
        return divmod(at + jump if at >= step else at, 1_000_000_000)
clock.TIMESPEC = Stamp()
time.time_ns = lambda: true() + (jump if true() >= step else 0)
sys.argv = sys.argv[3:]  # without -S -m, which this program stands for
runpy.run_module("engines.load_process", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("jump", [3600.0, 5.0, -5.0, -3600.0])
def test_a_wall_clock_that_is_set_in_mid_run_is_in_no_number(
    scripted: MakeEngine, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jump: float
) -> None:
    """The load generator's own wall clock and stamps are set, not the machine's, which others use."""
    host = make_host(scripted("steady", first_token=0.1, gap=0.02))
    host.ready("steady")
    program = tmp_path / "python"
    program.write_text(STEPPED.format(python=sys.executable, jump=jump))
    program.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(program))
        result = measure(host, "steady", repeats=2, max_tokens=40)
    assert errors(result, "steady") == [None, None]
    for row in result.measured("steady"):
        moments = [arrival.at for arrival in row.timeline.arrivals]
        assert moments == sorted(moments) and len(moments) == 40
        assert row.metrics.tpot == pytest.approx(0.02, rel=0.5)
        assert row.metrics.ttft is not None and 0.1 <= row.metrics.ttft < 1.0
        assert row.metrics.e2e is not None and row.metrics.e2e < 5.0
    assert errors(measure(host, "steady"), "steady") == [None]


def test_a_full_disk_keeps_the_run_on_the_page_and_the_earlier_ones_in_the_library(
    scripted: MakeEngine, make_host: MakeHost, tmp_path: Path
) -> None:
    host = make_host(scripted("sound"))
    tab = tab_over(host)
    with mounted_disk(tmp_path / "disk", "1m") as disk:
        sessions = Sessions(disk / "results", tmp_path / "none")
        first = BackgroundRun(EXPERIMENT, plan("sound"), host)
        assert "could not be kept" not in str(finished(tab, first, sessions)[tab.progress])
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free))
        second = BackgroundRun(EXPERIMENT, plan("sound"), host)
        frame = finished(tab, second, sessions)
        words = "This run could not be kept: No space left on device. It is shown here and can be downloaded below, "
        assert f"{words}as long as this page is open. The runs kept earlier are still there." in frame[tab.progress]
        assert frame[tab.result.run_id] == ended(second).id
        downloaded = Path(frame[tab.result.json]["value"]).read_text()
        assert ExperimentResult.from_json(downloaded).requests == ended(second).requests
        assert [entry.id for entry in sessions.library.entries()] == [ended(first).id]
        assert [path.name for path in sessions.results.iterdir()] == [f"{ended(first).id}.json"]  # no half file
        filler.unlink()
        third = BackgroundRun(EXPERIMENT, plan("sound"), host)
        assert finished(tab, third, sessions)[tab.progress] == ""
        assert {entry.id for entry in sessions.library.entries()} == {ended(first).id, ended(third).id}


def test_where_no_download_can_be_written_either_the_result_is_on_the_page_and_says_so(
    scripted: MakeEngine, make_host: MakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host(scripted("sound"))
    tab = tab_over(host)
    with mounted_disk(tmp_path / "disk", "1m") as disk:  # the charts as HTML alone are five times as large
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        sessions = Sessions(disk / "results", tmp_path / "none")
        background = BackgroundRun(EXPERIMENT, plan("sound"), host)
        frame = finished(tab, background, sessions)
        assert "There is no file to download: No space left on device." in frame[tab.result.headline]
        assert "Sound" in frame[tab.result.table]
        assert frame[tab.result.html]["interactive"] is False
        assert [entry.id for entry in sessions.library.entries()] == [ended(background).id]
        assert [path.name for path in sessions.files.iterdir()] == []


def finished(tab: Any, background: BackgroundRun, sessions: Sessions) -> dict[Any, Any]:
    ended(background)
    return _finished(tab, background, sessions)


def test_a_truncated_file_of_results_hides_no_other_and_says_what_ails_it(
    scripted: MakeEngine, make_host: MakeHost, tmp_path: Path
) -> None:
    host = make_host(scripted("sound"))
    library = Library(tmp_path / "results", tmp_path / "none")
    whole, cut = measure(host, "sound"), measure(host, "sound")
    whole.save(library.folder)
    path = cut.save(library.folder)
    assert len(library.entries()) == 2
    path.write_bytes(path.read_bytes()[:300])
    assert [entry.id for entry in library.entries()] == [whole.id]
    with pytest.raises(ResultError, match="This file is not a whole result"):
        library.load(cut.id)
    assert library.load(whole.id).requests == whole.requests
    again = measure(host, "sound")
    again.save(library.folder)
    assert {entry.id for entry in library.entries()} == {whole.id, again.id}


# The visitor and the app, over real connections


def engines_of(app: RunningApp) -> list[psutil.Process]:
    return [one for one in app.tree() if "engines.scripted" in " ".join(one.cmdline())]


def generators_of(app: RunningApp) -> list[psutil.Process]:
    return [one for one in app.tree() if "engines.load_process" in " ".join(one.cmdline())]


async def under_way(app: RunningApp, running: asyncio.Task[Stream]) -> None:
    """Returns once the run's requests are being sent."""
    while not generators_of(app):
        assert not running.done(), running.result().problem
        await asyncio.sleep(0.05)


@pytest.mark.browser  # real connections without a browser, but as slow
def test_a_browser_that_is_closed_in_mid_stream_ends_its_run_and_leaves_the_engines_to_the_next(
    tmp_path: Path,
) -> None:
    async def visit(url: str, app: RunningApp) -> tuple[Stream, list[int]]:
        seen = Seen()
        async with Visitor(url, seen, {}) as visitor:
            running = asyncio.create_task(visitor.run(tokens=1000))
            await under_way(app, running)
            engines = [one.pid for one in engines_of(app)]
            await asyncio.sleep(0.5)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        async with Visitor(url, seen, {}) as next_one:
            stream = await asyncio.wait_for(next_one.run(), 30)
        assert seen.failures == []
        return stream, engines

    with RunningApp("--scripted", "--port", str(free_port()), cache=tmp_path) as app:
        url = app.url()
        app.wait_for_log(": ready", count=3)
        stream, engines = asyncio.run(visit(url, app))
        assert stream.problem == "" and stream.ended is not None
        assert stream.started is not None and stream.started - stream.asked < 10  # it had not to wait for the other's
        assert [one.pid for one in engines_of(app)] == engines
        wait_until(lambda: generators_of(app) == [])
        assert "Traceback" not in app.log


@pytest.mark.browser
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_app_that_is_ended_in_mid_run_leaves_no_process_and_the_earlier_results(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def one_run(url: str) -> Stream:
        async with Visitor(url, Seen(), {}) as visitor:
            return await asyncio.wait_for(visitor.run(), 30)

    async def ended_in_mid_run(app: RunningApp, url: str) -> list[psutil.Process]:
        async with Visitor(url, Seen(), {}) as visitor:
            running = asyncio.create_task(visitor.run(tokens=1000))
            await under_way(app, running)
            processes = app.tree()
            os.kill(app.process.pid, number)
            await asyncio.wait([running], timeout=20)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            return processes

    with RunningApp("--scripted", "--port", str(free_port()), cache=tmp_path) as app:
        url = app.url()
        app.wait_for_log(": ready", count=3)
        assert asyncio.run(one_run(url)).problem == ""
        (kept,) = (tmp_path / "results").glob("*.json")
        processes = asyncio.run(ended_in_mid_run(app, url))
        code = app.process.wait(20)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        wait_until(lambda: alive(processes) == [], 15)
        assert len(processes) > 6
    assert kept.exists()
    with RunningApp("--scripted", "--port", str(free_port()), cache=tmp_path) as app:
        url = app.url()
        app.wait_for_log(": ready", count=3)
        assert asyncio.run(one_run(url)).problem == ""
    library = Library(tmp_path / "results", tmp_path / "none")
    assert kept.stem in {entry.id for entry in library.entries()}
    assert not list((tmp_path / "results").glob("*.part"))
