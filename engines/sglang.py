"""SGLang: `sglang serve`, and on the CPU the same server on plain PyTorch operators (see sglang_cpu/)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engines.base import Engine, EngineConfig, EngineError, Request, Speculation, usage_with_each_chunk
from engines.model_facts import read_facts

CPU_PLATFORM_FOLDER = Path(__file__).parent / "sglang_cpu"
CPU_CACHE_TOKENS = 65536
GIB = 1 << 30
# Beside other engines SGLang leaves this share of what was free when it started, and fails where more has gone since.
SHARED_GPU_SHARE = 0.98
STATE_SHARE = 0.6  # of a given cache, for the states of linear attention; the rest is for keys and values


def serve_command(config: EngineConfig) -> list[str]:
    if config.device == "cpu":
        if config.speculation:
            raise EngineError(
                "SGLang cannot speculate on this CPU: its draft and verify kernels exist for GPUs only. "
                "It stays in the comparison without speculation."
            )
        command = ["python", str(CPU_PLATFORM_FOLDER / "serve_cpu.py")]
    else:
        command = ["sglang", "serve"]
    command += ["--model-path", config.model]
    command += ["--host", "127.0.0.1", "--port", str(config.port)]
    command += ["--dtype", config.dtype, "--context-length", str(config.max_context)]
    command += ["--enable-cache-report"]
    if not config.prefix_caching:
        command += ["--disable-radix-cache"]
    if config.device == "cpu":
        command += ["--device", "cpu", "--sampling-backend", "pytorch", "--disable-overlap-schedule"]
        command += ["--mem-fraction-static", "0.1", "--max-total-tokens", str(CPU_CACHE_TOKENS)]
        # Without this an idle scheduler spins a whole core and spoils the other engines' numbers.
        command += ["--sleep-on-idle"]
    else:
        command += _memory_flags(config)
        command += ["--enable-memory-saver", "--enable-weights-cpu-backup"] if config.can_sleep else []
    if config.tensor_parallel > 1:
        command += ["--tp-size", str(config.tensor_parallel)]
    if config.replicas > 1:
        command += ["--dp-size", str(config.replicas)]
    if config.random_weights:
        command += _random_weights_flags(config)
    if config.speculation:
        command += _speculation_flags(config.speculation)
    return command


def _memory_flags(config: EngineConfig) -> list[str]:
    if config.cache_gib is None:
        return ["--mem-fraction-static", str(config.memory_share)]
    facts = read_facts(config.model)
    if not facts.token_bytes:
        raise EngineError(
            "SGLang's cache is counted in tokens, and this model's files do not say how large one is. "
            "Let the engines take turns on the GPU instead of sharing it."
        )
    # While it is another's turn an idle scheduler would spin a core, as on the CPU.
    flags = ["--sleep-on-idle", "--mem-fraction-static", str(SHARED_GPU_SHARE)]
    size = config.cache_gib * GIB
    if facts.state_bytes:
        # Speculation keeps further states for each request: one per draft token and one for the token after them.
        copies = 1 + (config.speculation.draft_tokens + 1 if config.speculation else 0)
        flags += ["--max-mamba-cache-size", str(max(1, int(STATE_SHARE * size / copies / facts.state_bytes)))]
        size *= 1 - STATE_SHARE
    return [*flags, "--max-total-tokens", str(int(size / facts.token_bytes))]


def _random_weights_flags(config: EngineConfig) -> list[str]:
    """Random weights are for machines without network, where FlashInfer's sampling kernels would be compiled at start.
    SGLang chooses the attention by itself: FlashAttention 3 on an H100, Triton where heads are wider than 256."""
    flags = ["--load-format", "dummy"]
    if config.device == "cuda":
        flags += ["--sampling-backend", "pytorch"]
    if full := read_facts(config.model).full_attention:
        flags += ["--json-model-override-args", json.dumps(full)]
    return flags


def _speculation_flags(speculation: Speculation) -> list[str]:
    if speculation.method == "ngram":
        return ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(speculation.draft_tokens)]
    # SGLang counts the token that verification itself yields among the draft tokens: hence one more.
    flags = ["--speculative-num-steps", str(speculation.draft_tokens), "--speculative-eagle-topk", "1"]
    flags += ["--speculative-num-draft-tokens", str(speculation.draft_tokens + 1)]
    if speculation.method == "mtp":
        flags = ["--speculative-algorithm", "NEXTN", *flags]
        return flags + (["--speculative-draft-model-path", speculation.draft_model] if speculation.draft_model else [])
    assert speculation.draft_model is not None
    return [
        "--speculative-algorithm",
        "STANDALONE",
        *flags,
        "--speculative-draft-model-path",
        speculation.draft_model,
    ]


def variables(config: EngineConfig) -> dict[str, str]:
    if config.device != "cpu":
        simulated = config.speculation.simulated_length if config.speculation else None
        # By default it rounds to one length or the other, so often that the mean is the one given.
        return {} if simulated is None else {"SGLANG_SIMULATE_ACC_LEN": f"{simulated:g}"}
    values = {"SGLANG_PLATFORM": "bakeoff_cpu", "PYTHONPATH": str(CPU_PLATFORM_FOLDER)}
    if config.cpu_threads:
        # With a thread on every core any other process stalls its barriers: measured 6-180 tok/s instead of 185.
        values["OMP_NUM_THREADS"] = str(config.cpu_threads)
    return values


def caveat(config: EngineConfig) -> str | None:
    """What the reader of a CPU's numbers must know. Measured for 2,017 prompt tokens of which 2,007 were cached: 103 of
    the 121 ms that remained were attention over all positions; over the 10 new ones alone it took 2.5 ms."""
    if config.device != "cpu":
        return None
    words = "On the CPU this is SGLang on plain PyTorch operators, without its fast CPU kernels (not on PyPI)."
    if config.prefix_caching:
        words += (
            " Those compute attention for every position of a prompt again, also where keys and values come from the "
            "cache; so a cached prefix saves the layers' other work, but not that."
        )
    return words


def request_fields(request: Request) -> dict[str, Any]:
    return {**usage_with_each_chunk(request), "return_spec_tokens_details": True}


ENGINE = Engine(
    name="sglang",
    label="SGLang",
    colour="#D55E00",
    package="sglang",
    serve_command=serve_command,
    variables=variables,
    request_fields=request_fields,
    phases=(
        (r"server_args=", "preparing the engine"),
        (r"Load weight begin", "loading weights"),
        (r"Load weight end", "preparing the engine"),
        (r"[Cc]apture .*graph.* begin|Compiling", "capturing graphs"),
        (r"Uvicorn running on", "warming up"),
    ),
    caveat=caveat,
    requirements={"cpu": "sglang-cpu.txt", "cuda": "sglang-cuda.txt"},
    install_gib=3.2,
    empty_caches_path="/flush_cache",
    sleep_path="/release_memory_occupation",
    wake_path="/resume_memory_occupation",
)
