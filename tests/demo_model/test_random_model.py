"""The bundled model's files, read by hand: what three engines' loaders expect to find."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo_model.bundled import default_model, model_label, model_note
from demo_model.random_model import MARKER_FILE, NOTE, make_random_model


def read_json(model: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(model) / name).read_text(encoding="utf-8"))
    return content


def read_safetensors(model: str) -> tuple[dict[str, Any], bytes]:
    """(header, tensors): eight bytes of length, that much JSON, then the raw tensors."""
    content = (Path(model) / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_the_tensors_fill_the_file_without_gap_or_overlap(model: str) -> None:
    header, data = read_safetensors(model)
    assert header.pop("__metadata__") == {"format": "pt"}
    place = 0
    for tensor in header.values():
        begin, end = tensor["data_offsets"]
        assert tensor["dtype"] == "BF16"
        assert begin == place
        assert end - begin == 2 * int(np.prod(tensor["shape"]))
        place = end
    assert place == len(data)


def test_the_tensors_begin_on_a_multiple_of_eight_bytes(model: str) -> None:
    length = int.from_bytes((Path(model) / "model.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0


def test_the_tensors_have_the_shapes_that_the_configuration_states(model: str) -> None:
    config = read_json(model, "config.json")
    header, _ = read_safetensors(model)
    shapes = {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    queries, keys = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == [vocabulary, hidden]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        assert shapes[f"{name}.self_attn.q_proj.weight"] == [queries, hidden]
        assert shapes[f"{name}.self_attn.k_proj.weight"] == [keys, hidden]
        assert shapes[f"{name}.self_attn.v_proj.weight"] == [keys, hidden]
        assert shapes[f"{name}.self_attn.o_proj.weight"] == [hidden, queries]
        assert shapes[f"{name}.mlp.down_proj.weight"] == [hidden, config["intermediate_size"]]
    assert len(shapes) == 3 + 11 * config["num_hidden_layers"]


def test_the_weights_are_finite_numbers_of_the_intended_size(model: str) -> None:
    header, data = read_safetensors(model)
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            # bfloat16 is the upper half of a float32.
            values = (np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
            assert np.isfinite(values).all(), name
            assert np.all(values == 1) if "norm" in name else 0.01 < values.std() < 2, name


def test_special_tokens_can_never_win_so_that_every_answer_is_text(model: str) -> None:
    header, data = read_safetensors(model)
    begin, _ = header["lm_head.weight"]["data_offsets"]
    _, columns = header["lm_head.weight"]["shape"]
    rows = np.frombuffer(data[begin : begin + 2 * 5 * columns], "<u2").reshape(5, columns)
    assert not rows[:4].any()
    assert rows[4].all()


def test_every_token_but_the_specials_is_printable_text(model: str) -> None:
    tokenizer = read_json(model, "tokenizer.json")
    vocabulary = [piece for piece, _ in tokenizer["model"]["vocab"]]
    specials = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    assert specials == {place: vocabulary[place] for place in range(4)}
    assert len(vocabulary) == len(set(vocabulary)) == read_json(model, "config.json")["vocab_size"]
    for piece in vocabulary[4:]:
        text = piece.replace("▁", " ")
        assert text == "\n" or text.isprintable()
        assert text.isascii()


def test_any_english_prompt_can_be_spelled(model: str) -> None:
    pieces = {piece for piece, _ in read_json(model, "tokenizer.json")["model"]["vocab"]}
    prompt = "Write a short paragraph about LLM inference serving optimizations: 3 > 2, isn't it?\n"
    assert {letter.replace(" ", "▁") for letter in prompt} <= pieces


def test_the_same_bytes_come_out_every_time(model: str, tmp_path: Path) -> None:
    again = make_random_model(tmp_path / "again")
    names = sorted(path.name for path in again.iterdir())
    assert names == sorted(path.name for path in Path(model).iterdir())
    for name in names:
        assert (again / name).read_bytes() == (Path(model) / name).read_bytes()


def test_the_marker_is_written_last_so_that_half_a_model_is_made_again(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model")
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert written[MARKER_FILE] == max(written.values())
    # What an interrupted first attempt leaves behind: some files, no marker.
    (folder / MARKER_FILE).unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    make_random_model(folder)
    assert (folder / "model.safetensors").stat().st_size > 1_000_000
    assert (folder / MARKER_FILE).exists()


def test_a_whole_model_is_left_as_it_is(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model")
    os.utime(folder / "model.safetensors", (1, 1))
    assert make_random_model(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime == 1


def test_the_model_names_itself_and_says_that_its_words_mean_nothing(model: str) -> None:
    assert (model_label(model), model_note(model)) == ("random-qwen3-3M", NOTE)


@pytest.mark.parametrize(
    ("model", "label"), [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("/data/models/Qwen3-0.6B", "Qwen3-0.6B")]
)
def test_another_model_is_called_by_its_id_or_folder_and_needs_no_note(model: str, label: str) -> None:
    assert (model_label(model), model_note(model)) == (label, "")


def test_the_default_model_is_made_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path))
    folder = default_model()
    assert tmp_path in folder.parents
    assert (folder / "config.json").is_file()
