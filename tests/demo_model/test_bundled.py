"""The bundled model's files, read by hand: what three engines' loaders expect to find, and what the card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo_model.bundled import WEIGHTS, default_model, draft_model, model_label, model_note
from demo_model.chat import CHAT_TEMPLATE, SPECIALS, prompt_text

FOLDERS = [WEIGHTS / "target", WEIGHTS / "draft"]
either = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return content


def read_safetensors(folder: Path) -> tuple[dict[str, Any], bytes]:
    """(header, tensors): eight bytes of length, that much JSON, then the raw tensors."""
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@either
def test_the_tensors_are_bfloat16_and_fill_the_file(folder: Path) -> None:
    header, data = read_safetensors(folder)
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    for tensor in tensors:
        begin, end = tensor["data_offsets"]
        assert tensor["dtype"] == "BF16"
        assert end - begin == 2 * int(np.prod(tensor["shape"]))
    assert sum(end - begin for begin, end in (tensor["data_offsets"] for tensor in tensors)) == len(data)


@either
def test_the_tensors_have_the_shapes_that_the_configuration_states(folder: Path) -> None:
    config = read_json(folder, "config.json")
    header, _ = read_safetensors(folder)
    shapes = {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    hidden = config["hidden_size"]
    queries, keys = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], hidden]
    assert config["tie_word_embeddings"] and "lm_head.weight" not in shapes
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        assert shapes[f"{name}.self_attn.q_proj.weight"] == [queries, hidden]
        assert shapes[f"{name}.self_attn.k_proj.weight"] == [keys, hidden]
        assert shapes[f"{name}.self_attn.v_proj.weight"] == [keys, hidden]
        assert shapes[f"{name}.self_attn.o_proj.weight"] == [hidden, queries]
        assert shapes[f"{name}.mlp.down_proj.weight"] == [hidden, config["intermediate_size"]]
    assert len(shapes) == 2 + 11 * config["num_hidden_layers"]


@either
def test_every_weight_is_a_finite_number(folder: Path) -> None:
    header, data = read_safetensors(folder)
    # bfloat16 is the upper half of a float32.
    values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(values).all()
    assert 0.001 < values.std() < 2


@either
def test_a_dense_qwen3_that_needs_no_code_of_ours_and_reads_4096_tokens(folder: Path) -> None:
    config = read_json(folder, "config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"] and "auto_map" not in config
    assert config["max_position_embeddings"] >= 4096


@either
def test_every_token_but_the_specials_is_printable_text(folder: Path) -> None:
    tokenizer = read_json(folder, "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    assert {token["content"]: token["id"] for token in tokenizer["added_tokens"]} == {
        special: place for place, special in enumerate(SPECIALS)
    }
    assert sorted(vocabulary.values()) == list(range(read_json(folder, "config.json")["vocab_size"]))
    for piece in set(vocabulary) - set(SPECIALS):
        text = piece.replace("Ġ", " ").replace("Ċ", "\n")  # how a byte-level vocabulary writes space and line break
        assert text.isascii() and text.replace("\n", "").isprintable(), piece


@either
def test_an_answer_ends_at_the_end_of_the_turn_or_of_the_text(folder: Path) -> None:
    ends = [SPECIALS.index("<|im_end|>"), SPECIALS.index("<|endoftext|>")]
    assert read_json(folder, "generation_config.json")["eos_token_id"] == ends
    assert read_json(folder, "config.json")["eos_token_id"] == ends[0]
    assert read_json(folder, "tokenizer_config.json")["chat_template"] == CHAT_TEMPLATE


def test_the_chat_template_and_the_training_text_are_the_same() -> None:
    from jinja2 import Template

    messages = [{"role": "user", "content": "What is a token?"}]
    rendered = Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    assert rendered == prompt_text("What is a token?")


def test_model_and_draft_share_one_vocabulary() -> None:
    target, draft = ((folder / "tokenizer.json").read_bytes() for folder in FOLDERS)
    assert target == draft


def test_all_weights_together_stay_within_40_megabytes() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 40e6


def test_the_default_model_is_the_bundled_one_and_brings_its_draft() -> None:
    model = str(default_model())
    assert (Path(model) / "config.json").is_file()
    assert model_label(model) == "inference-explainer-15M"
    assert "knows nothing else" in model_note(model)
    draft = draft_model(model)
    assert draft is not None and (draft / "config.json").is_file()


@pytest.mark.parametrize(
    ("model", "label"), [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("/data/models/Qwen3-0.6B", "Qwen3-0.6B")]
)
def test_another_model_is_called_by_its_id_or_folder_and_needs_no_note(model: str, label: str) -> None:
    assert (model_label(model), model_note(model), draft_model(model)) == (label, "", None)


def test_the_card_states_what_training_recorded() -> None:
    record = read_json(WEIGHTS, "training.json")
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    parameters = {folder.name: count_parameters(folder) for folder in FOLDERS}
    assert record["parameters"] == parameters
    for stated in (
        f"{parameters['target'] / 1e6:.1f} million",
        f"{parameters['draft'] / 1e6:.1f} million",
        f"{record['target_loss'][-1]:.3f}",
        f"{record['draft_divergence'][-1]:.3f}",
        f"{record['held_back_right']} of {record['held_back_phrasings']}",
    ):
        assert stated in card, stated


def count_parameters(folder: Path) -> int:
    header, _ = read_safetensors(folder)
    return sum(int(np.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")
