"""The clients that are compared, one row each: how it is started, and how its report is read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmark.cases import Case
from benchmark.compare import Reported
from benchmark.running import TrueAnswer
from demo_model.bundled import default_model
from engines import engine_named
from engines.base import Device
from engines.clock import WallOffset
from engines.environments import Environment
from experiments.cross_check import BENCH, as_words

PROJECT = Path(__file__).parent.parent
NAMED_ANSWER = re.compile(r"\s*(w\d{4})")


class ReportError(Exception):
    """A client's report that cannot be read, or tells of nothing."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a client is to do."""

    case: Case
    base_url: str
    model: str
    folder: Path  # for its files

    def question(self, answer: str) -> str:
        """The prompt to which an answer belongs: its first word is the prompt's last one."""
        named = NAMED_ANSWER.match(answer)
        found = [prompt for prompt in self.case.prompts if named and prompt.endswith(named.group(1))]
        if not found:
            raise ReportError(f"an answer belongs to no question: {answer[:40]!r}")
        return found[0]


@dataclass(frozen=True, slots=True)
class Client:
    """`start` gives the command and what it reads from its standard input. `read` gives its report, from its standard
    output and its files. `environment` has its packages; None: the app's own."""

    name: str
    words: str
    start: Callable[[Order, str], tuple[list[str], str]]
    read: Callable[[Order, str, dict[str, TrueAnswer]], list[Reported]]
    environment: Callable[[], Environment] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


# Libraries, with the loop that anybody would write around them


def _start_library(name: str) -> Callable[[Order, str], tuple[list[str], str]]:
    def start(order: Order, python: str) -> tuple[list[str], str]:
        told = {
            "base_url": order.base_url,
            "model": order.model,
            "prompts": order.case.prompts,
            "tokens": order.case.tokens,
        }
        return [python, "-m", "benchmark.one_client", name], json.dumps(told)

    return start


def _read_library(order: Order, output: str, truths: dict[str, TrueAnswer]) -> list[Reported]:
    """Ours brings its own metrics; the others get theirs by the token here, so that only their clock is compared."""
    found = []
    for seen in json.loads(output):
        moments = tuple(seen["moments"])
        if not moments:
            continue
        if "gaps" in seen:
            found.append(Reported(seen["prompt"], seen["ttft"], seen["tpot"], tuple(seen["gaps"]), moments))
            continue
        each = order.case.tokens_per_chunk
        gaps = tuple((after - before) / each for before, after in pairwise(moments) for _ in range(each))
        tpot = (moments[-1] - moments[0]) / (seen["tokens"] - each) if seen["tokens"] > each else None
        found.append(Reported(seen["prompt"], moments[0] - seen["sent"], tpot, gaps, moments))
    return found


# vllm bench serve


def _conversations(order: Order, lines: bool) -> Path:
    turns = [{"conversations": [{"value": prompt}, {"value": "none"}]} for prompt in order.case.prompts]
    path = order.folder / "prompts.json"
    path.write_text("\n".join(map(json.dumps, turns)) if lines else json.dumps(turns), encoding="utf-8")
    return path


def _start_vllm(order: Order, python: str) -> tuple[list[str], str]:
    options = {
        "backend": "openai-chat",
        "base-url": order.base_url,
        "endpoint": "/v1/chat/completions",
        "model": order.model,
        "tokenizer": default_model(),
        "dataset-name": "sharegpt",
        "dataset-path": _conversations(order, lines=False),
        "sharegpt-output-len": order.case.tokens,
        "num-prompts": order.case.streams,
        "num-warmups": order.case.streams,
        "request-rate": "inf",
        "temperature": 0,
        "result-dir": order.folder,
        "result-filename": "result.json",
    }
    flags = ("--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm", "--disable-shuffle")
    return [python, "-c", BENCH, *as_words(options, *flags)], ""


def _read_vllm(order: Order, output: str, truths: dict[str, TrueAnswer]) -> list[Reported]:
    """Its TPOT is (E2E - TTFT) / (tokens - 1), its ITL the gaps between chunks; its clock is ours.

    It takes the delta with the role for the first token, and the closing one for the last: among its moments, but for
    these two, are the chunks.
    """
    value = json.loads((order.folder / "result.json").read_text(encoding="utf-8"))
    rows = zip(
        *(value[name] for name in ("generated_texts", "start_times", "ttfts", "itls", "output_lens")), strict=True
    )
    found = []
    for text, start, ttft, gaps, tokens in rows:
        if not text:
            continue
        tpot = sum(gaps) / (tokens - 1) if tokens > 1 else None
        moments = _moments(start + ttft, gaps)
        moments = moments[1:-1] if len(moments) == order.case.chunks + 2 else moments
        found.append(Reported(order.question(text), ttft, tpot, tuple(gaps), moments))
    return found


def _moments(first: float, gaps: list[float]) -> tuple[float, ...]:
    moments = [first]
    for gap in gaps:
        moments.append(moments[-1] + gap)
    return tuple(moments)


# SGLang's bench_serving

# serve_cpu: what SGLang needs to be imported beside a CPU build of torch.
SGLANG_BENCH = "import serve_cpu; import sglang.benchmark.serving as serving; serving.cli_main()"


def _start_sglang(order: Order, python: str) -> tuple[list[str], str]:
    options = {
        "backend": "sglang-oai-chat",
        "base-url": order.base_url,
        "model": order.model,
        "tokenizer": default_model(),
        "dataset-name": "custom",
        "dataset-path": _conversations(order, lines=True),
        "sharegpt-output-len": order.case.tokens,
        "num-prompts": order.case.streams,
        "warmup-requests": order.case.streams,
        "request-rate": "inf",
        "output-file": order.folder / "result.jsonl",
    }
    return [python, "-c", SGLANG_BENCH, *as_words(options, "--output-details", "--disable-tqdm")], ""


def _read_sglang(order: Order, output: str, truths: dict[str, TrueAnswer]) -> list[Reported]:
    """It does not tell when it sent a request, so its moments count from the request's arrival at the server."""
    value = json.loads((order.folder / "result.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    found = []
    for text, ttft, gaps, tokens in zip(
        *(value[name] for name in ("generated_texts", "ttfts", "itls", "output_lens")), strict=True
    ):
        if not text:
            continue
        prompt = order.question(text)
        moments = _moments(truths[prompt].asked + ttft, gaps)
        # Its TPOT ends with the line [DONE], which it does not report; the truth server sends it with the last token.
        found.append(Reported(prompt, ttft, sum(gaps) / (tokens - 1) if tokens > 1 else None, tuple(gaps), moments))
    return found


# GuideLLM


def _start_guidellm(order: Order, python: str) -> tuple[list[str], str]:
    prompts = order.folder / "prompts.jsonl"
    rows = [{"prompt": prompt, "output_tokens_count": order.case.tokens} for prompt in order.case.prompts]
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = {
        "backend": f"kind=openai_http,target={order.base_url},model={order.model},request_format=/v1/chat/completions",
        "profile": f"kind=concurrent,streams={order.case.streams}",
        "constraint": f"kind=max_requests,count={order.case.streams}",
        "data": f"kind=json_file,path={prompts}",
        "tokenizer": f"kind=huggingface_auto,model={default_model()}",
        "output": f"kind=json,path={order.folder / 'result.json'}",
    }
    return [python, "-m", "guidellm", "run", *as_words(options, "--disable-console")], ""


def _read_guidellm(order: Order, output: str, truths: dict[str, TrueAnswer]) -> list[Reported]:
    """It keeps the first and the last token of a request, on the wall clock. What it calls ITL is our TPOT; what it
    calls TPOT has the first token's wait in it, and is compared with nothing."""
    value = json.loads((order.folder / "result.json").read_text(encoding="utf-8"))
    offset = WallOffset()
    found = []
    for one in value["benchmarks"][0]["requests"]["successful"]:
        timings = one["info"]["timings"]
        moments = tuple(timings[name] - offset.seconds for name in ("first_token_iteration", "last_token_iteration"))
        tpot = one["inter_token_latency_ms"]
        found.append(
            Reported(
                order.question(one["output"]),
                one["time_to_first_token_ms"] / 1000,
                None if tpot is None else tpot / 1000,
                None,
                moments,
            )
        )
    return found


def _environment(engine: str) -> Callable[[], Environment]:
    return lambda: Environment(engine_named(engine), "cpu")


@dataclass(frozen=True, slots=True)
class Tool:
    """A client with an environment of its own."""

    name: str
    label: str
    requirements: Mapping[Device, str]
    install_gib: float

    def package_for(self, device: Device) -> str:
        return self.name


GUIDELLM = Tool("guidellm", "GuideLLM", {"cpu": str(Path(__file__).parent / "guidellm.txt")}, 3.0)
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
SGLANG_VARIABLES = {**OFFLINE, "PYTHONPATH": str(PROJECT / "engines" / "sglang_cpu")}

CLIENTS: tuple[Client, ...] = (
    Client("ours", "this project", _start_library("ours"), _read_library),
    Client("aiohttp", "aiohttp", _start_library("aiohttp"), _read_library),
    Client("httpx", "httpx", _start_library("httpx"), _read_library),
    Client("openai", "openai package", _start_library("openai"), _read_library),
    Client("vllm", "vllm bench serve", _start_vllm, _read_vllm, _environment("vllm"), OFFLINE),
    Client("sglang", "SGLang bench_serving", _start_sglang, _read_sglang, _environment("sglang"), SGLANG_VARIABLES),
    Client("guidellm", "GuideLLM", _start_guidellm, _read_guidellm, lambda: Environment(GUIDELLM, "cpu"), OFFLINE),
)


def python_of(client: Client) -> str:
    """The Python that runs it; installs its environment when it is not there."""
    if client.environment is None:
        return sys.executable
    environment = client.environment()
    environment.ensure(lambda message: print(f"{client.words}: {message}", file=sys.stderr))
    return environment.program("python")
