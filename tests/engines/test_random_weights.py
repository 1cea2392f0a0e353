"""Models that have a shape and no weights: their folders, their tokenizer, and what the engines are told of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from demo_model.bundled import model_label, model_note
from engines import engine_named
from engines.base import EngineConfig, EngineError, Speculation
from engines.hardware import Hardware
from engines.local import TOGETHER_LABEL, LocalHost, shared_cache_gib
from engines.model_facts import read_facts
from engines.model_shape import has_prediction_head, has_random_weights, read_shape
from engines.random_weights import (
    CHAT_TEMPLATE,
    END,
    GEMMA_4_26B_A4B,
    PADDING,
    QWEN3_5_4B,
    SHAPES,
    Shape,
    make_model,
    make_vocabulary,
    shape_named,
)
from experiments import EXPERIMENTS
from experiments.prompt_words import prompt_words
from tests.engines.tiny_shapes import TINY_GEMMA, TINY_QWEN

H100 = Hardware("a CPU", 16, 128.0, "NVIDIA H100 80GB HBM3", 79.6, 1)
GIB = 1 << 30
ALL = pytest.mark.parametrize("shape", [*SHAPES, TINY_QWEN, TINY_GEMMA], ids=lambda shape: shape.name)


def on_gpu(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cuda", port=8123, random_weights=True)


@ALL
def test_every_word_of_the_vocabulary_is_one_id_and_comes_back_as_itself(shape: Shape, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(make_model(shape, ["Hello there."], tmp_path) / "tokenizer.json"))
    words = make_vocabulary(shape, ["Hello there."])
    assert len(words) == len(set(words)) == tokenizer.get_vocab_size() == shape.vocabulary_size
    assert all(tokenizer.encode(word).ids == [place] for place, word in enumerate(words))
    hidden = {*shape.special.values(), END, PADDING}
    assert [word for place, word in enumerate(words) if tokenizer.decode([place]) != word] == [
        word for word in words if word in hidden
    ]
    assert not hidden & set(words[:100])  # what an engine picks when all scores are alike is seen
    assert all(word.isprintable() and not any(letter.isspace() for letter in word) for word in words)


@ALL
def test_a_prompt_of_n_words_is_n_tokens_and_two_of_the_template(shape: Shape, tmp_path: Path) -> None:
    known = prompt_words(EXPERIMENTS)
    folder = make_model(shape, known, tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == CHAT_TEMPLATE == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for prompt in (known, ["poem"] * 2000, ["these", "are", "unheard-of,", "words!"]):
        jinja = pytest.importorskip("jinja2")
        message = {"role": "user", "content": " ".join(prompt)}
        told = jinja.Template(CHAT_TEMPLATE).render(messages=[message], add_generation_prompt=True)
        assert len(tokenizer.encode(told).ids) == len(prompt) + 2
    ids = tokenizer.encode(" ".join(known)).ids
    assert len(set(ids)) == len(known)  # different questions are different to a cache of prefixes


def test_the_sizes_are_those_of_the_models_as_transformers_builds_them(tmp_path: Path) -> None:
    """Counted in Transformers 5.17 and 5.19: the architectures on the meta device, without the part that sees."""
    text = {
        shape.name: sum(math.prod(size) for name, size in shape.tensors(shape.config).items() if "mtp" not in name)
        for shape in SHAPES
    }
    assert text == {"qwen3.5-4b": 4_205_751_296, "gemma-4-26b-a4b": 25_233_141_760}


def test_the_memory_ceiling_is_known_without_weights(tmp_path: Path) -> None:
    qwen, gemma = (read_shape(str(make_model(shape, (), tmp_path))) for shape in SHAPES)
    assert qwen is not None and gemma is not None
    # All 4.21 B in 2 bytes; 8 full layers x (keys, values) x 4 heads x 256 x 2 bytes.
    assert (qwen.weight_bytes, qwen.expert_bytes, qwen.cache_bytes) == (2 * 4_205_751_296, 0, 8 * 2 * 4 * 256 * 2)
    experts = 30 * 128 * 3 * 704 * 2816 * 2
    assert (gemma.expert_bytes, gemma.expert_count, gemma.experts_used) == (experts, 128, 8)
    assert gemma.weight_bytes + gemma.expert_bytes == 2 * 25_233_141_760
    assert gemma.cache_bytes == 5 * 2 * 2 * 512 * 2  # its full layers have 2 heads of 512


def test_the_folder_says_what_it_is_wherever_the_model_is_named(tmp_path: Path) -> None:
    folder = str(make_model(QWEN3_5_4B, (), tmp_path))
    assert model_label(folder) == "Qwen3.5-4B (random weights)"
    assert model_note(folder) == "random weights: speed is real, text is not"
    experts = "random weights: speed is real, text is not; answers that repeat the same words use few of the experts"
    assert model_note(str(make_model(GEMMA_4_26B_A4B, (), tmp_path))).startswith(experts)
    assert has_random_weights(folder) and not has_random_weights(str(tmp_path))
    assert has_prediction_head(folder)
    assert not has_prediction_head(str(make_model(GEMMA_4_26B_A4B, (), tmp_path)))
    host = LocalHost((engine_named("vllm"),), folder, cache=tmp_path, hardware=H100)
    assert host.config("vllm").random_weights


def test_the_same_model_is_made_once_and_other_words_make_another(tmp_path: Path) -> None:
    first = make_model(TINY_GEMMA, ["one"], tmp_path)
    before = (first / "config.json").stat().st_mtime_ns
    assert make_model(TINY_GEMMA, ["one"], tmp_path) == first
    assert (first / "config.json").stat().st_mtime_ns == before
    assert make_model(TINY_GEMMA, ["two"], tmp_path) != first
    assert [path for path in (tmp_path / "models").iterdir() if path.name.endswith(".part")] == []


def test_a_shape_that_is_not_known_and_a_cache_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as unknown:
        shape_named("gpt-5")
    assert unknown.value.message == "There is no shape called 'gpt-5'. Known shapes: qwen3.5-4b, gemma-4-26b-a4b."
    (tmp_path / "models").write_text("a file")
    with pytest.raises(EngineError, match="Cannot write the model's folder in"):
        make_model(TINY_GEMMA, (), tmp_path)


def test_vllm_draws_the_weights_leaves_the_eyes_out_and_compiles_nothing_for_flashinfer(tmp_path: Path) -> None:
    vllm, folder = engine_named("vllm"), make_model(TINY_QWEN, (), tmp_path)
    plain = vllm.serve_command(replace(on_gpu(folder), random_weights=False))
    added = ["--load-format", "dummy", "--limit-mm-per-prompt", '{"image": 0, "video": 0}']
    assert vllm.serve_command(on_gpu(folder)) == [*plain, *added, "--gdn-prefill-backend", "triton"]
    assert vllm.variables(on_gpu(folder))["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    on_cpu = replace(on_gpu(folder), device="cpu")
    assert vllm.serve_command(on_cpu)[-4:] == added
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in vllm.variables(on_cpu)
    gemma = on_gpu(make_model(TINY_GEMMA, (), tmp_path))
    assert vllm.serve_command(gemma)[-2:] == ["--load-format", "dummy"]


def test_sglang_draws_the_weights_and_is_told_of_gemmas_two_kinds_of_heads(tmp_path: Path) -> None:
    sglang, gemma = engine_named("sglang"), make_model(GEMMA_4_26B_A4B, (), tmp_path)
    plain = sglang.serve_command(replace(on_gpu(gemma), random_weights=False))
    heads = {"head_dim": 512, "v_head_dim": 512, "num_key_value_heads": 2}
    heads |= {"swa_head_dim": 256, "swa_v_head_dim": 256, "swa_num_key_value_heads": 8}
    *added, told = sglang.serve_command(on_gpu(gemma))[len(plain) :]
    assert added == ["--load-format", "dummy", "--sampling-backend", "pytorch", "--json-model-override-args"]
    assert json.loads(told) == heads
    qwen = sglang.serve_command(on_gpu(make_model(TINY_QWEN, (), tmp_path)))
    assert qwen[-4:] == ["--load-format", "dummy", "--sampling-backend", "pytorch"]


def test_transformers_is_started_by_our_launcher_with_the_same_arguments(tmp_path: Path) -> None:
    row, folder = engine_named("transformers"), make_model(TINY_QWEN, (), tmp_path)
    plain = row.serve_command(replace(on_gpu(folder), random_weights=False))
    program, launcher, *arguments = row.serve_command(on_gpu(folder))
    assert (program, arguments) == ("python", plain[1:])
    assert Path(launcher).is_file() and Path(launcher).name == "serve_random.py"
    with pytest.raises(EngineError, match="on one GPU only"):
        row.serve_command(replace(on_gpu(folder), tensor_parallel=2))


@pytest.mark.parametrize("shape", [TINY_QWEN, TINY_GEMMA], ids=lambda shape: shape.name)
def test_transformers_cannot_batch_these_architectures_and_says_why(shape: Shape, tmp_path: Path) -> None:
    config = replace(on_gpu(make_model(shape, (), tmp_path)), continuous_batching=True)
    with pytest.raises(EngineError, match="cannot batch the requests of this model"):
        engine_named("transformers").serve_command(config)


SIMULATED = Speculation("mtp", 1, simulated_length=1.8)


def test_simulated_acceptance_in_each_engines_words(tmp_path: Path) -> None:
    config = replace(on_gpu(make_model(TINY_QWEN, (), tmp_path)), speculation=SIMULATED)
    assert json.loads(engine_named("vllm").serve_command(config)[-1]) == {
        "method": "mtp",
        "num_speculative_tokens": 1,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_length": 1.8,
    }
    sglang = engine_named("sglang")
    assert sglang.variables(config) == {"SGLANG_SIMULATE_ACC_LEN": "1.8"}
    assert sglang.variables(replace(config, speculation=Speculation("mtp", 1))) == {}
    assert sglang.serve_command(config)[-8:] == [
        *("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "1"),
        *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"),
    ]


@pytest.mark.parametrize("length", [0.9, 2.1, -1.0, float("nan")])
def test_an_acceptance_that_one_draft_token_cannot_give_is_refused(length: float) -> None:
    with pytest.raises(EngineError, match="must lie between 1 and 2"):
        Speculation("mtp", 1, simulated_length=length)


def test_engines_that_share_a_gpu_get_a_cache_of_fixed_size(tmp_path: Path) -> None:
    folder = make_model(QWEN3_5_4B, (), tmp_path)
    names = ("transformers", "vllm", "sglang")
    host = LocalHost(tuple(map(engine_named, names)), str(folder), cache=tmp_path, hardware=H100, together=True)
    config = replace(host.config("vllm"), port=8123)
    # 0.92 x 79.6 GiB / 3 - 7.8 GiB of weights - 4 GiB
    assert (config.cache_gib, host.resident_together, host.said) == (12.6, True, (TOGETHER_LABEL,))
    vllm = " ".join(engine_named("vllm").serve_command(config))
    assert f"--gpu-memory-utilization 0.05 --kv-cache-memory-bytes {round(12.6 * GIB)}" in vllm
    facts = read_facts(str(folder))
    # 24 linear layers x (32 x 128 x 128 x 4 bytes + 3 x 8192 x 2 bytes); 8 full ones x 2 x 4 x 256 x 2 bytes
    assert (facts.state_bytes, facts.token_bytes) == (24 * (2_097_152 + 49_152), 32_768)
    sglang = " ".join(engine_named("sglang").serve_command(config))
    assert "--sleep-on-idle --mem-fraction-static 0.98 --max-mamba-cache-size 157 --max-total-tokens 165150" in sglang
    speculating = engine_named("sglang").serve_command(replace(config, speculation=SIMULATED))
    assert speculating[speculating.index("--max-mamba-cache-size") + 1] == "52"  # each request keeps three states
    alone = LocalHost(host.engines, str(folder), cache=tmp_path, hardware=H100)
    assert (alone.config("vllm").cache_gib, alone.resident_together, alone.said) == (None, False, ())
    on_cpu = LocalHost(host.engines, str(folder), cache=tmp_path, hardware=Hardware("a CPU", 2, 24.0), together=True)
    assert (on_cpu.config("vllm").cache_gib, on_cpu.said) == (None, ())


def test_engines_that_do_not_fit_on_the_gpu_together_are_refused(tmp_path: Path) -> None:
    gemma = str(make_model(GEMMA_4_26B_A4B, (), tmp_path))
    with pytest.raises(EngineError) as refused:
        LocalHost(tuple(map(engine_named, ("vllm", "sglang"))), gemma, hardware=H100, together=True)
    assert refused.value.message == (
        "2 engines do not fit on the GPU together: each needs 47 GiB for the weights and about 5 GiB more, and there "
        "are 80 GiB. Let them take turns."
    )
    with pytest.raises(EngineError, match="only where it is known how large the model is"):
        shared_cache_gib(H100, None, 2)


def test_a_model_whose_files_are_not_here_has_no_facts(tmp_path: Path) -> None:
    facts = read_facts("somebody/something-not-here")
    assert (facts.sees, facts.linear_attention, facts.token_bytes, facts.full_attention) == (False, False, 0, {})
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    assert read_facts(str(tmp_path)) == facts
    for name in ("sglang", "transformers"):
        config = EngineConfig("nobody/nothing", device="cuda", cache_gib=4.0, continuous_batching=name != "sglang")
        with pytest.raises(EngineError, match="do not say how large one is"):
            engine_named(name).serve_command(config)
