"""Hugging Face Transformers: `transformers serve`, one request at a time. The naive baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engines.base import Engine, EngineConfig, EngineError, Request
from engines.model_facts import read_facts

# Of the machine's whole memory, whoever else is using it: with its own 0.9 it is killed beside two other engines.
CPU_CACHE_SHARE = 0.05
RANDOM_WEIGHTS_LAUNCHER = Path(__file__).parent / "transformers_random" / "serve_random.py"
GIB = 1 << 30
BLOCK_TOKENS = 256  # of continuous batching's cache, where its size is given


def serve_command(config: EngineConfig) -> list[str]:
    if config.speculation:
        raise EngineError("`transformers serve` has no speculative decoding: it stays in as the plain baseline.")
    if config.prefix_caching:
        raise EngineError("`transformers serve` keeps no prefix cache between requests: it stays in as the baseline.")
    if config.replicas > 1:
        raise EngineError("`transformers serve` runs one copy of the model only: set the copies to 1.")
    facts = read_facts(config.model)
    if config.continuous_batching and (facts.linear_attention or facts.full_attention):
        # Seen with 5.17 and 5.19: its worker dies of the first request.
        raise EngineError(
            "`transformers serve` cannot batch the requests of this model: its continuous batching knows neither "
            "linear attention nor layers whose heads differ from the others'."
        )
    device = "cpu" if config.device == "cpu" else "cuda:0" if config.tensor_parallel == 1 else "auto"
    program = ["transformers"]
    if config.random_weights:
        if device == "auto":
            raise EngineError("HF Transformers draws random weights on one GPU only: set the GPUs to 1.")
        program = ["python", str(RANDOM_WEIGHTS_LAUNCHER)]
    command = [*program, "serve", config.model, "--host", "127.0.0.1", "--port", str(config.port)]
    command += ["--device", device, "--dtype", config.dtype, "--log-level", "info"]
    if config.continuous_batching:
        command += ["--continuous-batching", "--attn-implementation", "sdpa"]
        if config.device == "cpu":
            command += ["--cb-max-memory-percent", str(CPU_CACHE_SHARE)]
        elif config.cache_gib is not None:
            command += _cache_flags(config)
    return command


def _cache_flags(config: EngineConfig) -> list[str]:
    facts = read_facts(config.model)
    if not facts.token_bytes:
        raise EngineError(
            "The cache of HF Transformers is counted in blocks, and this model's files do not say how large one is. "
            "Let the engines take turns on the GPU instead of sharing it."
        )
    assert config.cache_gib is not None
    blocks = max(1, int(config.cache_gib * GIB / facts.token_bytes / BLOCK_TOKENS))
    return ["--cb-block-size", str(BLOCK_TOKENS), "--cb-num-blocks", str(blocks)]


def variables(config: EngineConfig) -> dict[str, str]:
    if config.device == "cpu" and config.cpu_threads:
        return {"OMP_NUM_THREADS": str(config.cpu_threads)}
    return {}


def caveat(config: EngineConfig) -> str | None:
    if config.tensor_parallel == 1:
        return None
    return "HF Transformers spreads the model's layers over the GPUs, of which one computes at a time."


def request_fields(request: Request) -> dict[str, Any]:
    # It answers unknown fields such as ignore_eos with HTTP 422, and sends its final usage unasked.
    if request.fixed_length:
        return {"generation_config": json.dumps({"min_new_tokens": request.max_tokens})}
    return {}


ENGINE = Engine(
    name="transformers",
    label="HF Transformers",
    colour="#6B7280",
    package="transformers",
    serve_command=serve_command,
    variables=variables,
    request_fields=request_fields,
    phases=(
        (r"loading configuration file", "loading weights"),
        (r"Instantiating|Generate config", "loading weights"),
        (r"Application startup complete|Uvicorn running on", "warming up"),
    ),
    caveat=caveat,
    requirements={"cpu": "transformers-cpu.txt", "cuda": "transformers-cuda.txt"},
    install_gib=1.3,
)
