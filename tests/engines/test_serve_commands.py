"""Each engine's command line as text, word by word, and what it says that it cannot do."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import engines
from engines import ENGINES, engine_named
from engines.base import EngineConfig, EngineError, Request, Speculation

CPU = EngineConfig(model="/models/small", port=8123)
GPU = replace(CPU, device="cuda", memory_share=0.9)
MTP = Speculation("mtp", 3)
DRAFT = Speculation("draft_model", 4, "/models/draft")
NGRAM = Speculation("ngram", 5)
SGLANG_CPU = str(Path(engines.__file__).parent / "sglang_cpu")

VLLM_CPU = (
    "python -m vllm.entrypoints.openai.api_server --model /models/small --host 127.0.0.1 --port 8123"
    " --dtype bfloat16 --max-model-len 4096"
)
VLLM_GPU = (
    "vllm serve /models/small --gpu-memory-utilization 0.9 --host 127.0.0.1 --port 8123"
    " --dtype bfloat16 --max-model-len 4096"
)
COUNTS = "--enable-prompt-tokens-details"
SGLANG_HEAD = "--model-path /models/small --host 127.0.0.1 --port 8123 --dtype bfloat16 --context-length 4096"
SGLANG_CPU_HEAD = f"python {SGLANG_CPU}/serve_cpu.py {SGLANG_HEAD} --enable-cache-report"
SGLANG_CPU_TAIL = (
    "--device cpu --sampling-backend pytorch --disable-overlap-schedule"
    " --mem-fraction-static 0.1 --max-total-tokens 65536 --sleep-on-idle"
)
SGLANG_CPU_VARIABLES = {"SGLANG_PLATFORM": "bakeoff_cpu", "PYTHONPATH": SGLANG_CPU}
SGLANG_GPU = f"sglang serve {SGLANG_HEAD} --enable-cache-report"
TRANSFORMERS = "transformers serve /models/small --host 127.0.0.1 --port 8123"


def caching(config: EngineConfig) -> EngineConfig:
    return replace(config, prefix_caching=True)


def speculating(config: EngineConfig, speculation: Speculation) -> EngineConfig:
    return replace(config, speculation=speculation)


@pytest.mark.parametrize(
    ("engine", "config", "command"),
    [
        ("vllm", CPU, f"{VLLM_CPU} --no-enable-prefix-caching {COUNTS}"),
        ("vllm", caching(CPU), f"{VLLM_CPU} --enable-prefix-caching {COUNTS}"),
        ("vllm", GPU, f"{VLLM_GPU} --no-enable-prefix-caching {COUNTS}"),
        ("vllm", caching(GPU), f"{VLLM_GPU} --enable-prefix-caching {COUNTS}"),
        ("sglang", CPU, f"{SGLANG_CPU_HEAD} --disable-radix-cache {SGLANG_CPU_TAIL}"),
        ("sglang", caching(CPU), f"{SGLANG_CPU_HEAD} {SGLANG_CPU_TAIL}"),
        ("sglang", GPU, f"{SGLANG_GPU} --disable-radix-cache --mem-fraction-static 0.9"),
        ("sglang", caching(GPU), f"{SGLANG_GPU} --mem-fraction-static 0.9"),
        ("transformers", CPU, f"{TRANSFORMERS} --device cpu --dtype bfloat16 --log-level info"),
        ("transformers", GPU, f"{TRANSFORMERS} --device cuda:0 --dtype bfloat16 --log-level info"),
    ],
)
def test_the_plain_command(engine: str, config: EngineConfig, command: str) -> None:
    assert engine_named(engine).serve_command(config) == shlex.split(command)


@pytest.mark.parametrize(
    ("engine", "config", "flags"),
    [
        (
            "vllm",
            speculating(GPU, MTP),
            """--speculative-config '{"method": "mtp", "num_speculative_tokens": 3}'""",
        ),
        (
            "vllm",
            speculating(GPU, DRAFT),
            """--speculative-config
            '{"method": "draft_model", "num_speculative_tokens": 4, "model": "/models/draft"}'""",
        ),
        (
            "vllm",
            speculating(CPU, NGRAM),
            """--speculative-config '{"method": "ngram", "num_speculative_tokens": 5}'""",
        ),
        (  # SGLang counts the token that verification yields too: 3 + 1 = 4 and 4 + 1 = 5
            "sglang",
            speculating(GPU, MTP),
            """--speculative-algorithm NEXTN --speculative-num-steps 3 --speculative-eagle-topk 1
            --speculative-num-draft-tokens 4""",
        ),
        (
            "sglang",
            speculating(GPU, replace(MTP, draft_model="/models/head")),
            """--speculative-algorithm NEXTN --speculative-num-steps 3 --speculative-eagle-topk 1
            --speculative-num-draft-tokens 4 --speculative-draft-model-path /models/head""",
        ),
        (
            "sglang",
            speculating(GPU, DRAFT),
            """--speculative-algorithm STANDALONE --speculative-num-steps 4 --speculative-eagle-topk 1
            --speculative-num-draft-tokens 5 --speculative-draft-model-path /models/draft""",
        ),
        (
            "sglang",
            speculating(GPU, NGRAM),
            "--speculative-algorithm NGRAM --speculative-num-draft-tokens 5",
        ),
    ],
)
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_speculation_only_adds_its_flags(engine: str, config: EngineConfig, flags: str, prefix_caching: bool) -> None:
    row = engine_named(engine)
    config = replace(config, prefix_caching=prefix_caching)
    assert row.serve_command(config) == row.serve_command(replace(config, speculation=None)) + shlex.split(flags)


def test_the_context_and_the_dtype_are_passed_on() -> None:
    config = replace(GPU, max_context=1234, dtype="float16")
    assert "--dtype float16 --max-model-len 1234" in shlex.join(engine_named("vllm").serve_command(config))
    assert "--dtype float16 --context-length 1234" in shlex.join(engine_named("sglang").serve_command(config))
    assert "--dtype float16" in shlex.join(engine_named("transformers").serve_command(config))


def test_a_blank_or_a_quote_in_the_models_path_stays_one_word() -> None:
    config = replace(CPU, model="/my models/it's; small")  # no shell ever sees it
    for engine in ENGINES:
        assert "/my models/it's; small" in engine.serve_command(config)


@pytest.mark.parametrize(
    ("engine", "config", "words"),
    [
        ("sglang", speculating(CPU, MTP), "SGLang cannot speculate on this CPU"),
        ("sglang", speculating(CPU, DRAFT), "SGLang cannot speculate on this CPU"),
        ("sglang", caching(speculating(CPU, NGRAM)), "SGLang cannot speculate on this CPU"),
        ("transformers", speculating(CPU, NGRAM), "no speculative decoding"),
        ("transformers", speculating(GPU, DRAFT), "no speculative decoding"),
        ("transformers", caching(CPU), "keeps no prefix cache"),
        ("transformers", caching(GPU), "keeps no prefix cache"),
    ],
)
def test_what_an_engine_cannot_do_is_said_before_it_starts(engine: str, config: EngineConfig, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        engine_named(engine).serve_command(config)


@pytest.mark.parametrize(
    ("engine", "config", "variables"),
    [
        (
            "vllm",
            CPU,
            {"VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        ),
        ("vllm", GPU, {"VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}),
        ("sglang", CPU, SGLANG_CPU_VARIABLES),
        ("sglang", GPU, {}),
        ("sglang", replace(CPU, cpu_threads=3), {**SGLANG_CPU_VARIABLES, "OMP_NUM_THREADS": "3"}),
        ("transformers", CPU, {}),
        ("transformers", GPU, {}),
        ("transformers", replace(CPU, cpu_threads=3), {"OMP_NUM_THREADS": "3"}),
        ("transformers", replace(GPU, cpu_threads=3), {}),
    ],
)
def test_the_variables_of_the_surroundings(engine: str, config: EngineConfig, variables: dict[str, str]) -> None:
    assert engine_named(engine).variables(config) == variables


EVERY_CHUNK_COUNTS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    ("engine", "fixed_length", "fields"),
    [
        ("vllm", True, {**EVERY_CHUNK_COUNTS, "ignore_eos": True}),
        ("vllm", False, EVERY_CHUNK_COUNTS),
        ("sglang", True, {**EVERY_CHUNK_COUNTS, "ignore_eos": True, "return_spec_tokens_details": True}),
        ("sglang", False, {**EVERY_CHUNK_COUNTS, "return_spec_tokens_details": True}),
        # It answers stream_options and ignore_eos with HTTP 422; a minimum as long as the maximum fixes the length.
        ("transformers", True, {"generation_config": json.dumps({"min_new_tokens": 64})}),
        ("transformers", False, {}),
    ],
)
def test_the_fields_of_a_request(engine: str, fixed_length: bool, fields: dict[str, Any]) -> None:
    request = Request("Why?", max_tokens=64, fixed_length=fixed_length)
    assert engine_named(engine).request_fields(request) == fields


def test_only_sglang_on_the_cpu_has_a_caveat() -> None:
    with_caveat = {(engine.name, config.device) for engine in ENGINES for config in (CPU, GPU) if engine.caveat(config)}
    assert with_caveat == {("sglang", "cpu")}


def test_sglang_on_the_cpu_says_what_a_cached_prefix_does_not_save() -> None:
    caveat = engine_named("sglang").caveat
    assert "for every position of a prompt again" in (caveat(replace(CPU, prefix_caching=True)) or "")
    assert "again" not in (caveat(CPU) or "")
    assert caveat(replace(GPU, prefix_caching=True)) is None


def test_continuous_batching_of_transformers_leaves_memory_to_the_others_on_a_cpu() -> None:
    command = engine_named("transformers").serve_command
    flag = "--cb-max-memory-percent"  # of all memory, and 90 of 100 by default
    batching = command(replace(CPU, continuous_batching=True))
    assert float(batching[batching.index(flag) + 1]) <= 0.1
    assert "--continuous-batching" in batching
    assert flag not in command(replace(GPU, continuous_batching=True))
    assert not {flag, "--continuous-batching"} & set(command(CPU))


@pytest.mark.parametrize(
    ("engine", "changes", "flags"),
    [
        ("vllm", {"tensor_parallel": 2}, "--tensor-parallel-size 2"),
        ("vllm", {"replicas": 4}, "--data-parallel-size 4"),
        ("vllm", {"tensor_parallel": 2, "replicas": 4}, "--tensor-parallel-size 2 --data-parallel-size 4"),
        ("vllm", {"can_sleep": True}, "--enable-sleep-mode"),
        ("sglang", {"tensor_parallel": 2}, "--tp-size 2"),
        ("sglang", {"replicas": 4}, "--dp-size 4"),
        ("sglang", {"tensor_parallel": 2, "replicas": 4}, "--tp-size 2 --dp-size 4"),
        ("sglang", {"can_sleep": True}, "--enable-memory-saver --enable-weights-cpu-backup"),
    ],
)
def test_several_gpus_copies_and_sleep_only_add_their_flags(engine: str, changes: dict[str, Any], flags: str) -> None:
    row = engine_named(engine)
    plain, more = row.serve_command(GPU), row.serve_command(replace(GPU, **changes))
    added = shlex.split(flags)
    place = more.index(added[0])
    assert more[place : place + len(added)] == added
    assert more[:place] + more[place + len(added) :] == plain


def test_one_gpu_and_one_copy_that_never_sleeps_need_no_flags() -> None:
    assert (GPU.tensor_parallel, GPU.replicas, GPU.can_sleep) == (1, 1, False)
    for engine in ENGINES:
        for config in (CPU, GPU):
            words = " ".join(engine.serve_command(config))
            assert not re.search(r"parallel|--tp-size|--dp-size|sleep-mode|memory-saver|backup", words)


def test_an_engine_that_can_sleep_says_where_it_is_told_to() -> None:
    for engine in ENGINES:
        can = engine.serve_command(replace(GPU, can_sleep=True)) != engine.serve_command(GPU)
        assert (bool(engine.sleep_path), bool(engine.wake_path)) == (can, can)


def test_a_processor_has_nothing_to_empty_for_a_snapshot() -> None:
    for engine in ENGINES:
        assert engine.serve_command(replace(CPU, can_sleep=True)) == engine.serve_command(CPU)


def test_transformers_spreads_a_model_over_several_gpus_and_says_what_that_means() -> None:
    transformers, several = engine_named("transformers"), replace(GPU, tensor_parallel=2)
    plain = f"{TRANSFORMERS} --device auto --dtype bfloat16 --log-level info"
    assert transformers.serve_command(several) == shlex.split(plain)
    assert "of which one computes at a time" in (transformers.caveat(several) or "")


def test_transformers_runs_one_copy_only() -> None:
    with pytest.raises(EngineError, match=r"one copy of the model only: set the copies to 1\.$"):
        engine_named("transformers").serve_command(replace(GPU, replicas=2))


@pytest.mark.parametrize("changes", [{"tensor_parallel": 0}, {"replicas": 0}, {"tensor_parallel": -1}])
def test_an_engine_has_at_least_one_gpu_and_one_copy(changes: dict[str, int]) -> None:
    with pytest.raises(EngineError, match="at least one GPU per copy of the model, and at least one copy"):
        replace(GPU, **changes)


def test_an_unknown_engine_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(EngineError, match=r"no engine called 'vlm'. Known engines: transformers, vllm, sglang\.$"):
        engine_named("vlm")


@pytest.mark.parametrize("share", [0, 1, -0.1, 85])
def test_a_share_of_memory_lies_between_none_and_all(share: float) -> None:
    with pytest.raises(EngineError, match=f"between 0 and 1, not {share}"):
        replace(CPU, memory_share=share)


def test_a_context_has_at_least_one_token() -> None:
    assert replace(CPU, max_context=1).max_context == 1
    with pytest.raises(EngineError, match="at least 1 token, not 0"):
        replace(CPU, max_context=0)


def test_speculation_drafts_something_with_something() -> None:
    with pytest.raises(EngineError, match="at least one draft token"):
        Speculation("mtp", 0)
    with pytest.raises(EngineError, match="needs the draft model's folder or name"):
        Speculation("draft_model", 4)
