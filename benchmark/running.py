"""The truth server from outside: start it, give it a schedule, ask it what was true."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmark.truth import MODEL, Schedule

PROJECT = Path(__file__).parent.parent
START_SECONDS = 10


class TruthError(Exception):
    """The truth server did not do what it should."""


@dataclass(frozen=True, slots=True)
class TrueAnswer:
    """What the server knows of one answer. Moments are seconds on the one clock.

    `asked`: when the request came in, by the kernel's stamp; `moments`: when each chunk with text was handed to the
    kernel; `tokens`: in each; `late`: s by which the server was behind its schedule with each.
    """

    prompt: str
    asked: float
    moments: tuple[float, ...]
    tokens: tuple[int, ...]
    late: tuple[float, ...]
    finished: bool

    @property
    def ttft(self) -> float:
        return self.moments[0] - self.asked

    @property
    def tpot(self) -> float:
        """From the first to the last chunk, per token after the first chunk's."""
        return (self.moments[-1] - self.moments[0]) / sum(self.tokens[1:])

    @property
    def gaps(self) -> list[float]:
        """Between chunks."""
        return [after - before for before, after in pairwise(self.moments)]

    @property
    def inter_token_latencies(self) -> list[float]:
        """A chunk of k tokens counts as k gaps of a k-th each."""
        return [gap / count for gap, count in zip(self.gaps, self.tokens[1:], strict=True) for _ in range(count)]


class RunningTruth:
    """`with RunningTruth() as truth:` a truth server of our own on a free port."""

    def __enter__(self) -> RunningTruth:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmark.truth"], stdout=subprocess.PIPE, text=True, cwd=PROJECT
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("truth: port "):
            raise TruthError("The truth server did not start.")
        self.base_url = f"http://127.0.0.1:{int(line.split()[-1])}"
        self.model = MODEL
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def follow(self, schedule: Schedule) -> None:
        """Answer by this schedule from now on, and forget what was answered before."""
        self._exchange("/schedule", json.dumps(asdict(schedule)).encode())

    def prepare(self, prompts: list[str], tokens: int) -> None:
        """Have these answers ready, so that making them does not delay others."""
        self._exchange("/prepare", json.dumps({"prompts": prompts, "tokens": tokens}).encode())

    def answers(self) -> list[TrueAnswer]:
        """Of all requests since the schedule was given, in the order in which they came."""
        return [
            TrueAnswer(
                one["prompt"],
                one["asked"],
                tuple(one["moments"]),
                tuple(one["tokens"]),
                tuple(one["late"]),
                one["finished"],
            )
            for one in self._exchange("/truth")["answers"]
        ]

    def _exchange(self, path: str, data: bytes | None = None) -> Any:
        try:
            with urllib.request.urlopen(f"{self.base_url}{path}", data, timeout=START_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refusal:
            raise TruthError(f"The truth server refused {path}: {refusal.read().decode(errors='replace')}") from refusal
