"""Many visitors on one page: real connections that speak the browser's protocol, and what each of them waited for.

`python -m benchmark.visitors --visitors 50 --minutes 30` starts the page over scripted engines in a process of its own
and sends visitors to it. Each opens the page, keeps its heartbeat, asks for the lights every second, and by turns
watches a recorded run and starts one of its own, which waits in the line. Half of those who watch leave in mid-stream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import psutil

from engines.clock import monotonic_clock
from engines.scripted import SCRIPTED_ENGINES
from experiments.base import TokensArrived
from experiments.library import RECORDINGS, read
from experiments.replay import schedule
from experiments.result import ExperimentResult, engine_of

PROJECT = Path(__file__).parent.parent
API = "gradio_api"
LOOK_SECONDS = 1.0  # between two questions for the lights, as the page asks them
WATCH_SECONDS = 25.0  # at most, of a recording
STAY_ACTIONS = 4  # after which somebody leaves and somebody else comes
ARRIVAL_SECONDS = 0.3  # between one visitor and the next at the beginning
STALL_SECONDS = 2.0  # no stream may stand still for longer
START_SECONDS = 90.0
WARM = "What every visitor finds first is ready."  # as ui/page.py says it, which would bring Gradio into this process
STARTED = b"Waiting until the engines are ready"  # what a run's first frame says
WAITING = b"next in line"
PROBLEM = b"problem-box"
MEBIBYTE = 1 << 20
TIMED_OUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)

Doing = Literal["watch", "run"]


class VisitError(Exception):
    """The page did not answer as it answers a browser."""


# What was seen


@dataclass(slots=True)
class Stream:
    """One answer of the page that came by and by. Moments are seconds on this process' clock.

    `allowed`: the longest silence that is in the recording itself. `asked` and `joined`: when the request was sent and
    when the page had taken it; `started`: the run's first frame, None for one that never started.
    """

    doing: Doing
    allowed: float
    asked: float
    joined: float = 0.0
    started: float | None = None
    ended: float | None = None
    messages: int = 0
    bytes: int = 0
    gaps: list[float] = field(default_factory=list)
    left: bool = False  # the visitor went away before the end
    problem: str = ""

    @property
    def longest(self) -> float:
        """Beyond the recording's own silence."""
        return max([0.0, *self.gaps]) - self.allowed


@dataclass(frozen=True, slots=True)
class Sample:
    """The app at one moment: its own process, then the processes under it. Bytes, and cores used since the last one."""

    at: float
    rss: int
    cores: float
    threads: int
    files: int  # open file descriptors, sockets among them
    sockets: int
    temporary_files: int
    temporary_bytes: int
    engines_cores: float
    waited: float  # s per second that the app's threads were ready and had no core; 0 where nobody tells
    processes: int
    visitors: int


@dataclass(slots=True)
class Seen:
    streams: list[Stream] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)  # s that a question for the lights took
    openings: list[float] = field(default_factory=list)  # s until a page's load events were answered
    samples: list[Sample] = field(default_factory=list)
    own_lateness: list[float] = field(default_factory=list)  # of this process' loop
    visitors: int = 0
    failures: list[str] = field(default_factory=list)


# One visitor


class Page:
    """The page as one visitor has it: what its configuration says of components and events."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.events = config["dependencies"]
        self.components = {one["id"]: one for one in config["components"]}
        self.by_name = {name: one["id"] for one in config["components"] if (name := one["props"].get("elem_id"))}
        tabs = [one for one in config["components"] if one["type"] == "tabitem"]
        self.by_name |= {f"tab {one['props']['id']}": one["id"] for one in tabs}

    def on(self, event: str, name: str | None = None) -> list[dict[str, Any]]:
        """The events of that kind, of the component with that id in the document or of any."""
        wanted = self.by_name[name] if name else None
        return [
            one
            for one in self.events
            if one["backend_fn"] and any(kind == event and wanted in (None, of) for of, kind in one["targets"])
        ]

    def values(self, event: dict[str, Any], changed: dict[str, Any]) -> list[Any]:
        """The values of the event's inputs as the page came with them, but for those `changed` by id or label."""
        values = []
        for number in event["inputs"]:
            one = self.components[number]
            name = one["props"].get("elem_id") or one["props"].get("label")
            values.append(changed.get(name, one["props"].get("value")))
        return values


class Visitor:
    """A browser's worth of connections. `async with` opens the page, and leaves it as closing the browser does."""

    def __init__(self, url: str, seen: Seen, recordings: dict[str, tuple[str, float]]) -> None:
        self.url, self.seen, self.recordings = url, seen, recordings
        self.session_hash = secrets.token_hex(6)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Visitor:
        self._http = aiohttp.ClientSession(timeout=TIMED_OUT, connector=aiohttp.TCPConnector(limit=0))
        try:
            began = monotonic_clock()
            html = await self._get("")
            found = re.search(r"window\.gradio_config\s*=\s*(\{.*?\});?</script>", html, re.DOTALL)
            if not found:
                raise VisitError("The page's source holds no configuration.")
            self.page = Page(json.loads(found.group(1)))
            self._tasks.append(asyncio.create_task(self._heartbeat()))
            for event in [*self.page.on("select", "tab baseline"), *self.page.on("load")]:
                await self._ask(event)
            self.seen.openings.append(monotonic_clock() - began)
            self._tasks.append(asyncio.create_task(self._look()))
        except BaseException:
            await self._leave()
            raise
        self.seen.visitors += 1
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._leave()

    async def _leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        self.seen.failures += [f"{type(one).__name__}: {one}" for one in outcomes if isinstance(one, Exception)]
        await self._http.close()

    async def _get(self, path: str) -> str:
        async with self._http.get(self.url + path) as answer:
            answer.raise_for_status()
            return await answer.text()

    async def _heartbeat(self) -> None:
        async with self._http.get(f"{self.url}{API}/heartbeat/{self.session_hash}") as answer:
            async for _ in answer.content:
                pass

    async def _look(self) -> None:
        """The lights, once a second; the page answers with what has changed."""
        await asyncio.sleep(random.random() * LOOK_SECONDS)
        version = ""
        while True:
            began = monotonic_clock()
            async with self._http.get(f"{self.url}lights.json", params={"since": version}) as answer:
                if answer.status == 200:
                    version = (await answer.json())["version"]
                elif answer.status != 204:
                    raise VisitError(f"HTTP {answer.status} for the lights")
            took = monotonic_clock() - began
            self.seen.looks.append(took)
            await asyncio.sleep(max(0.0, LOOK_SECONDS - took))

    def _body(self, event: dict[str, Any], data: list[Any]) -> dict[str, Any]:
        trigger = event["targets"][0][0]
        common = {"fn_index": event["id"], "trigger_id": trigger, "session_hash": self.session_hash}
        return {"data": data, "event_data": None, **common}

    async def _ask(self, event: dict[str, Any]) -> None:
        """An event outside of Gradio's queue: one question, one answer."""
        body = self._body(event, [None] * len(event["inputs"]))
        async with self._http.post(f"{self.url}{API}/run/predict", json=body) as answer:
            said = await answer.read()
            if answer.status != 200:
                raise VisitError(f"HTTP {answer.status} for event {event['id']}: {said[:200]!r}")

    async def watch(self, experiment: str, leave_after: float | None) -> Stream:
        """Replay the experiment's recording; `leave_after`: seconds, then the visitor goes away in mid-stream."""
        for entered in self.page.on("select", f"tab {experiment}"):
            await self._ask(entered)
        name, silence = self.recordings[experiment]
        (event,) = self.page.on("click", f"{experiment}-replay")
        return await self._stream(Stream("watch", silence, monotonic_clock()), event, [name], experiment, leave_after)

    async def run(self, tokens: int = 48) -> Stream:
        """One short run of all engines, at its place in the line."""
        (event,) = self.page.on("click", "baseline-run")
        short = {"baseline-repeats": 1, "baseline-warmups": 0, "baseline-max-tokens": tokens, "baseline-race": True}
        data = self.page.values(event, short)
        return await self._stream(Stream("run", 0.0, monotonic_clock()), event, data, "baseline", None)

    async def _stream(
        self, stream: Stream, event: dict[str, Any], data: list[Any], experiment: str, leave_after: float | None
    ) -> Stream:
        self.seen.streams.append(stream)
        body = self._body(event, data)
        stop = None if leave_after is None else asyncio.create_task(self._stop(experiment, leave_after))
        try:
            async with self._http.post(f"{self.url}{API}/queue/join", json=body) as answer:
                if answer.status != 200:
                    raise VisitError(f"HTTP {answer.status}: {(await answer.text())[:200]}")
            stream.joined = monotonic_clock()
            async with self._http.get(f"{self.url}{API}/queue/data", params={"session_hash": self.session_hash}) as sse:
                await self._read(stream, sse)
        except asyncio.CancelledError:
            stream.left = True
            raise
        except (aiohttp.ClientError, TimeoutError, VisitError) as failure:
            stream.problem = f"{type(failure).__name__}: {failure}"
        finally:
            if stop:
                stop.cancel()
        return stream

    async def _stop(self, experiment: str, after: float) -> None:
        await asyncio.sleep(after)
        (event,) = self.page.on("click", f"{experiment}-stop")
        await self._ask(event)

    async def _read(self, stream: Stream, sse: aiohttp.ClientResponse) -> None:
        last = stream.asked
        buffer = b""
        async for piece in sse.content.iter_any():
            now = monotonic_clock()
            stream.gaps.append(now - last)
            last = now
            stream.bytes += len(piece)
            *whole, buffer = (buffer + piece).split(b"\n\n")
            for line in whole:
                stream.messages += 1
                if stream.started is None and STARTED in line:
                    stream.started = now
                if PROBLEM in line:
                    stream.problem = line.decode(errors="replace")[:400]
                if b'"msg":"process_completed"' in line[:400] or b'"process_completed"' in line[:400]:
                    stream.ended = now
                    message = json.loads(line.removeprefix(b"data: "))
                    if not message["success"]:
                        stream.problem = f"the page said: {str(message['output'])[:300]}"


# All of them


async def come_and_go(url: str, seen: Seen, recordings: dict[str, tuple[str, float]], place: int, until: float) -> None:
    """One place on the page: a visitor who does a few things, then leaves it to the next one, until the time is up."""
    chance = random.Random(place)  # the same visits each time
    await asyncio.sleep(place * ARRIVAL_SECONDS)
    while monotonic_clock() < until:
        try:
            async with Visitor(url, seen, recordings) as visitor:
                for turn in range(STAY_ACTIONS):
                    if monotonic_clock() >= until:
                        return
                    if (place + turn) % 2:
                        await visitor.run()
                        continue
                    experiment = chance.choice(sorted(recordings))
                    if turn == STAY_ACTIONS - 1 or chance.random() < 0.5:
                        watched = asyncio.create_task(visitor.watch(experiment, None))
                        await asyncio.wait([watched], timeout=WATCH_SECONDS * chance.random())
                        watched.cancel()  # closed in mid-stream, and gone
                        await asyncio.gather(watched, return_exceptions=True)
                        break
                    await visitor.watch(experiment, WATCH_SECONDS)
                    await asyncio.sleep(chance.random())
        except (aiohttp.ClientError, VisitError, TimeoutError) as failure:
            seen.failures.append(f"{type(failure).__name__}: {failure}")
            await asyncio.sleep(1.0)


async def sample(seen: Seen, process: psutil.Process, temporary: Path | None, began: float) -> None:
    """Once a second: the app's memory, processor, threads, sockets and files."""
    before: dict[int, float] = {}
    waited_before = 0.0
    last = monotonic_clock()
    while True:
        await asyncio.sleep(1.0)
        now = monotonic_clock()
        seen.own_lateness.append(max(0.0, now - last - 1.0))
        with contextlib.suppress(psutil.NoSuchProcess):
            used = {}
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it ended meanwhile
                    used[one.pid] = sum(one.cpu_times()[:2])
            spent = {pid: seconds - before.get(pid, 0.0) for pid, seconds in used.items()}
            own = spent.pop(process.pid, 0.0) / (now - last)
            others = sum(spent.values()) / (now - last)
            count, size = _size(temporary) if temporary else (0, 0)
            first = not before
            before = used
            taken = Sample(
                now - began,
                process.memory_info().rss,
                0.0 if first else own,
                process.num_threads(),
                process.num_fds(),
                len(process.net_connections(kind="tcp")),
                count,
                size,
                0.0 if first else others,
                0.0 if first else max(0.0, _waited(process.pid) - waited_before) / (now - last),
                len(spent),
                seen.visitors,
            )
            seen.samples.append(taken)
            waited_before = _waited(process.pid)
        last = monotonic_clock()


def _waited(pid: int) -> float:
    """Seconds that the process' living threads have waited for a core so far, as Linux tells."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            total += int(thread.read_text().split()[1])
    return total / 1e9


def _size(folder: Path) -> tuple[int, int]:
    count = size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            if path.is_file():
                count, size = count + 1, size + path.stat().st_size
    return count, size


async def visit(
    url: str,
    process: psutil.Process | None,
    temporary: Path | None,
    recordings: dict[str, tuple[str, float]],
    visitors: int,
    seconds: float,
    seen: Seen | None = None,
    say: float | None = None,
) -> Seen:
    """Send visitors for `seconds`; whoever is in the line then is waited for. `say`: report every so many seconds."""
    seen = seen or Seen()
    began = monotonic_clock()
    watching = [asyncio.create_task(sample(seen, process, temporary, began))] if process else []
    if say:
        watching.append(asyncio.create_task(_tell(seen, say)))
    places = [come_and_go(url, seen, recordings, place, began + seconds) for place in range(visitors)]
    await asyncio.gather(*places)
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    return seen


async def _tell(seen: Seen, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        print(line_of(seen), flush=True)


# The page


def for_scripted_engines(result: ExperimentResult) -> ExperimentResult:
    """A recording of the real engines as if the scripted ones had made it, so that it plays in their lanes."""
    real = list(dict.fromkeys(engine_of(row.name) for row in result.engines))
    names = {name: SCRIPTED_ENGINES[place % len(SCRIPTED_ENGINES)].name for place, name in enumerate(real)}

    def renamed(key: str) -> str:
        return names[engine_of(key)] + key[len(engine_of(key)) :] if key else key

    return replace(
        result,
        engines=tuple(
            replace(row, name=renamed(row.name), compared_with=renamed(row.compared_with)) for row in result.engines
        ),
        requests=tuple(replace(row, engine=renamed(row.engine)) for row in result.requests),
        trials=tuple(replace(row, engine=renamed(row.engine)) for row in result.trials),
    )


def longest_silence(result: ExperimentResult) -> float:
    """Seconds in which a replay has nothing to show."""
    moments = [0.0] + [at for at, event in schedule(result) if isinstance(event, TokensArrived)]
    moments.append(schedule(result)[-1][0])
    return max(after - before for before, after in zip(moments, moments[1:], strict=False))


@contextlib.contextmanager
def running_page(folder: Path, arguments: tuple[str, ...] = ()) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`python app.py --scripted` with all that it writes under `folder`; yields its address and its process."""
    temporary = folder / "temporary"
    temporary.mkdir(parents=True, exist_ok=True)
    log = folder / "app.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--scripted", "--recordings", str(folder / "recordings"), *arguments],
            cwd=PROJECT,
            env={
                **os.environ,
                "BAKEOFF_CACHE": str(folder / "cache"),
                "TMPDIR": str(temporary),
                "GRADIO_TEMP_DIR": str(temporary / "gradio"),
                "PYTHONUNBUFFERED": "1",
            },
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        deadline = monotonic_clock() + START_SECONDS
        while not (found := re.search(r"The page is up: (http://\S+/)", log.read_text())):
            if process.poll() is not None or monotonic_clock() > deadline:
                raise VisitError(f"The page did not come up:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        # Fifty at once come to a page that has stood for a while, not while it draws what all will ask for.
        while WARM not in log.read_text() and process.poll() is None and monotonic_clock() < deadline:
            time.sleep(0.1)
        yield found.group(1), process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_recordings(folder: Path) -> dict[str, tuple[str, float]]:
    """The recordings that came with the app, in the scripted engines' lanes: experiment -> (id, longest silence)."""
    found = {}
    for path in sorted(RECORDINGS.glob("*.json")):
        result = for_scripted_engines(read(path))
        result.save(folder)
        found[result.experiment] = (result.id, longest_silence(result))
    return found


# What came of it


def order_violations(streams: list[Stream]) -> int:
    """Pairs of runs of which the one that had joined before the other was even asked for started later."""
    runs = sorted((one for one in streams if one.doing == "run" and one.started is not None), key=lambda one: one.asked)
    wrong = 0
    for place, first in enumerate(runs):
        for second in runs[place + 1 :]:
            wrong += first.joined < second.asked and first.started > second.started  # type: ignore[operator]
    return wrong


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def slope(samples: list[Sample], after: float) -> float:
    """MiB per minute that the app's memory grew by, from `after` s on: least squares."""
    points = [(one.at / 60, one.rss / MEBIBYTE) for one in samples if one.at >= after]
    if len(points) < 2:
        return float("nan")
    mean_at, mean_size = (sum(column) / len(points) for column in zip(*points, strict=True))
    above = sum((at - mean_at) * (size - mean_size) for at, size in points)
    return float(above / sum((at - mean_at) ** 2 for at, _ in points))


def line_of(seen: Seen) -> str:
    last = seen.samples[-1] if seen.samples else None
    ended = [one for one in seen.streams if one.ended is not None]
    runs = sum(one.doing == "run" for one in ended)
    worst = max((one.longest for one in seen.streams), default=0.0)
    troubles = len([one for one in seen.streams if one.problem]) + len(seen.failures)
    told = f"{runs} runs and {len(ended) - runs} replays ended, worst gap {worst:.2f} s, {troubles} failures"
    if last:
        told = (
            f"{last.at:5.0f} s: {last.rss / MEBIBYTE:.0f} MiB, {last.cores:.2f} cores + {last.engines_cores:.2f} below "
            f"({last.waited:.1f} s/s waited for one), "
            f"{last.threads} threads, {last.files} open files, {last.temporary_files} temporary files "
            f"({last.temporary_bytes / MEBIBYTE:.1f} MiB), {last.visitors} visitors so far; {told}"
        )
    return told


def summary(seen: Seen) -> dict[str, Any]:
    """The numbers of a visit. Times are seconds."""
    told: dict[str, Any] = {"visitors": seen.visitors}
    for doing in ("watch", "run"):
        streams = [one for one in seen.streams if one.doing == doing]
        gaps = [gap for one in streams for gap in one.gaps]
        told[doing] = {
            "streams": len(streams),
            "ended": sum(one.ended is not None for one in streams),
            "left": sum(one.left for one in streams),
            "messages": sum(one.messages for one in streams),
            "mebibytes": round(sum(one.bytes for one in streams) / MEBIBYTE, 1),
            "gap_p50": quantile(gaps, 0.5),
            "gap_p99": quantile(gaps, 0.99),
            "gap_max": max(gaps, default=0.0),
            "longest_stall": max((one.longest for one in streams), default=0.0),
            "problems": [one.problem for one in streams if one.problem],
        }
    told["stalls_over_limit"] = sum(one.longest > STALL_SECONDS for one in seen.streams)
    told["order_violations"] = order_violations(seen.streams)
    told["waits"] = [
        quantile([one.started - one.asked for one in seen.streams if one.doing == "run" and one.started], share)
        for share in (0.5, 1.0)
    ]
    for name, values in (("look", seen.looks), ("opening", seen.openings), ("own_lateness", seen.own_lateness)):
        told[name] = {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99), "max": max(values, default=0.0)}
    told["failures"] = seen.failures
    if seen.samples:
        told["memory_mib"] = {
            f"{minute} min": round(min(seen.samples, key=lambda one: abs(one.at - 60 * minute)).rss / MEBIBYTE)
            for minute in (1, 2, 5, 10, 15, 20, 25, 30)
            if seen.samples[-1].at >= 60 * minute - 5
        }
        told["slope_mib_per_minute"] = slope(seen.samples, min(120.0, seen.samples[-1].at / 3))
        told["cores"] = quantile([one.cores for one in seen.samples], 0.5)
        told["waited_for_cores"] = quantile([one.waited for one in seen.samples], 0.5)
        told["engines_cores"] = quantile([one.engines_cores for one in seen.samples], 0.5)
        told["last"] = asdict(seen.samples[-1])
    return told


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Send many visitors to the page and see whether any of them waits.")
    parser.add_argument("--visitors", type=int, default=50, help="at once")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, help="folder for the numbers of every second, as JSON")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="bakeoff-visitors-"))
    try:
        recordings = make_recordings(folder / "recordings")
        with running_page(folder) as (url, process):
            every = max(10.0, options.minutes)
            app = psutil.Process(process.pid)
            seconds = options.minutes * 60
            temporary = folder / "temporary"
            seen = asyncio.run(visit(url, app, temporary, recordings, options.visitors, seconds, say=every))
        code = process.returncode
        told = summary(seen) | {"exit_code": code}
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            everything = {"summary": told, "samples": [asdict(one) for one in seen.samples]}
            (options.out / "visitors.json").write_text(json.dumps(everything, indent=1))
            shutil.copy(folder / "app.log", options.out / "visitors-app.log")
        print(json.dumps(told, indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    troubles = told["failures"] or told["watch"]["problems"] or told["run"]["problems"]
    return int(bool(troubles or told["stalls_over_limit"] or told["order_violations"] or code))


if __name__ == "__main__":
    sys.exit(main())
