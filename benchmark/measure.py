"""Runs one client in one case: its process, what it costs, and its report beside the truth."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from pathlib import Path

import psutil

from benchmark.cases import Case
from benchmark.compare import Score, score
from benchmark.running import RunningTruth
from benchmark.tools import PROJECT, Client, Order, ReportError
from engines.clock import monotonic_clock

LOOK_SECONDS = 0.2
LEAST_SHARE = 0.8  # of the time that the samples must reach over
LIMIT_SECONDS = 300
TAIL_CHARACTERS = 2000


class ProcessorWatch:
    """Samples of the processor time that a process and its children have used."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(psutil.Process(pid),), daemon=True)
        self._thread.start()

    def _watch(self, root: psutil.Process) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            total = 0.0
            try:
                for process in (root, *root.children(recursive=True)):
                    times = process.cpu_times()
                    total += times.user + times.system
            except psutil.NoSuchProcess:
                continue
            self.samples.append((monotonic_clock(), total))

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def cores(self, begin: float, end: float) -> float | None:
        """Cores used between two moments, or as much of that as the process lived; None where that is too little."""
        last = min(end, self.samples[-1][0]) if self.samples else begin
        before, after = self._at(begin), self._at(last)
        if before is None or after is None or last - begin < LEAST_SHARE * (end - begin):
            return None
        return (after - before) / (last - begin)

    def _at(self, moment: float) -> float | None:
        for (before, low), (after, high) in zip(self.samples, self.samples[1:], strict=False):
            if before <= moment <= after:
                return low + (high - low) * (moment - before) / (after - before)
        return None


def measure(client: Client, python: str, case: Case, truth: RunningTruth) -> Score:
    """Raises ReportError with the end of what the client said when it failed."""
    truth.follow(case.schedule)
    truth.prepare(case.prompts, case.tokens)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as place:
        order = Order(case, truth.base_url, truth.model, Path(place))
        command, told = client.start(order, python)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
            env={**os.environ, **client.variables},
        )
        watch = ProcessorWatch(process.pid)
        try:
            output, said = process.communicate(told, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired as failure:
            process.kill()
            process.communicate()
            raise ReportError(f"{client.words} did not end within {LIMIT_SECONDS} s") from failure
        finally:
            watch.end()
        if process.returncode:
            raise ReportError(f"{client.words} failed:\n{(output + said)[-TAIL_CHARACTERS:]}")
        # What came before is the client's own warm-up.
        truths = truth.answers()[-case.streams :]
        begin, end = min(one.asked for one in truths), max(one.moments[-1] for one in truths if one.moments)
        try:
            reports = client.read(order, output, {one.prompt: one for one in truths})
        except (OSError, ValueError, KeyError, IndexError) as failure:
            said = (output + said)[-TAIL_CHARACTERS:]
            raise ReportError(f"{client.words} left no report that can be read ({failure!r}):\n{said}") from failure
        return score(client.name, case.name, truths, reports, watch.cores(begin, end))
