"""How many bytes a model's files say that decoding reads; the files are made by hand, of as few bytes as will do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from demo_model.bundled import default_model
from engines.base import Engine
from engines.local import LocalHost
from engines.model_shape import INDEX_FILE, ModelShape, has_prediction_head, read_shape

CONFIG = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
CACHE = 2 * 4 * 2 * 16 * 2  # keys and values, layers, heads, size of a head, bytes of a number
DENSE = {"model.embed_tokens.weight": 1000, "model.layers.0.mlp.up_proj.weight": 300}


def write_weights(path: Path, tensors: Mapping[str, int]) -> None:
    """A safetensors file: eight bytes with the header's length, the header, and tensors of so many zero bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_model(folder: Path, tensors: Mapping[str, int], config: Mapping[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_weights(folder / "model.safetensors", tensors)
    return str(folder)


@pytest.fixture
def shape(tmp_path: Path) -> Callable[..., ModelShape]:
    """The shape of a model of these tensors; `config` replaces what CONFIG says."""

    def make(tensors: Mapping[str, int], **config: Any) -> ModelShape:
        found = read_shape(write_model(tmp_path / "made", tensors, CONFIG | config))
        assert found is not None
        return found

    return make


# Weights


def test_an_embedding_that_is_also_the_output_head_is_read_in_every_step(shape: Callable[..., ModelShape]) -> None:
    assert shape(DENSE) == ModelShape(1000 + 300, CACHE)


def test_an_embedding_beside_an_output_head_is_only_looked_up(shape: Callable[..., ModelShape]) -> None:
    assert shape(DENSE | {"lm_head.weight": 900}).weight_bytes == 300 + 900


def test_other_senses_drafting_heads_and_tables_per_layer_are_not_read(shape: Callable[..., ModelShape]) -> None:
    unread = [
        "visual.blocks.0.attn.qkv.weight",
        "model.vision_tower.layers.0.mlp.weight",
        "model.audio_tower.layers.0.mlp.weight",
        "model.embed_vision.embedding.weight",
        "model.embed_audio.embedding.weight",
        "multi_modal_projector.linear.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.language_model.embed_tokens_per_layer.weight",
    ]
    assert shape(DENSE | dict.fromkeys(unread, 5000)).weight_bytes == 1300


EXPERTS = {
    "model.layers.0.mlp.experts.0.up_proj.weight": 400,
    "model.layers.0.mlp.experts.1.up_proj.weight": 400,
    "model.layers.0.mlp.gate.weight": 10,
    "model.layers.0.mlp.shared_experts.up_proj.weight": 50,
}


@pytest.mark.parametrize("count", ["num_experts", "num_local_experts", "n_routed_experts"])
@pytest.mark.parametrize("used", ["num_experts_per_tok", "top_k_experts", "moe_topk"])
def test_routed_experts_are_counted_apart_from_what_every_token_reads(
    shape: Callable[..., ModelShape], count: str, used: str
) -> None:
    found = shape(DENSE | EXPERTS, **{count: 4, used: 1})
    assert found == ModelShape(1300 + 10 + 50, CACHE, 800, 4, 1)


def test_experts_that_nobody_chooses_among_are_read_in_every_step(shape: Callable[..., ModelShape]) -> None:
    assert shape(DENSE | EXPERTS) == ModelShape(1300 + 10 + 50 + 800, CACHE)


def test_one_step_reads_the_weights_once_and_every_requests_keys_and_values() -> None:
    assert ModelShape(1000, 10).step_bytes(1, 50) == 1000 + 50 * 10
    assert ModelShape(1000, 10).step_bytes(4, 50) == 1000 + 4 * 50 * 10


def test_more_requests_touch_more_experts_but_never_more_than_there_are() -> None:
    mixture = ModelShape(1000, 0, expert_bytes=800, expert_count=4, experts_used=1)
    assert mixture.step_bytes(1, 0) == 1000 + 800 / 4
    assert mixture.step_bytes(2, 0) == 1000 + 800 * (1 - (3 / 4) ** 2)  # 7/16 of them
    assert mixture.step_bytes(100, 0) == pytest.approx(1800)


# Keys and values


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({}, CACHE, id="all layers alike"),
        # One layer of four keeps keys and values of the whole text
        pytest.param({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, CACHE // 4, id="linear layers"),
        pytest.param({"layer_types": ["sliding_attention", "full_attention"] * 2}, CACHE // 2, id="sliding layers"),
        pytest.param({"num_key_value_heads": None}, 2 * 4 * 8 * 16 * 2, id="as many heads as the queries have"),
        pytest.param({"head_dim": None, "hidden_size": 256}, 2 * 4 * 2 * (256 // 8) * 2, id="size of a head unsaid"),
        pytest.param({"text_config": {"num_hidden_layers": 8}}, 2 * CACHE, id="a text model inside another"),
        # One vector of 512 compressed numbers and 64 of its place, whatever the number of heads
        pytest.param({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 4 * (512 + 64) * 2, id="latent attention"),
    ],
)
def test_keys_and_values_of_one_token(shape: Callable[..., ModelShape], config: dict[str, Any], expected: int) -> None:
    assert shape(DENSE, **config).cache_bytes == expected


# Files


def test_a_model_of_several_files_is_their_sum(tmp_path: Path) -> None:
    model = write_model(tmp_path, DENSE, CONFIG)
    write_weights(tmp_path / "model-2.safetensors", {"model.layers.1.mlp.up_proj.weight": 70})
    found = read_shape(model)
    assert found is not None
    assert found.weight_bytes == 1370


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    model = write_model(tmp_path, DENSE, CONFIG)
    # The same weights again under names of their own, as some publishers add them
    write_weights(tmp_path / "consolidated.safetensors", {"tok_embeddings.weight": 1000, "layers.0.w1.weight": 300})
    index = {"weight_map": dict.fromkeys(DENSE, "model.safetensors")}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    found = read_shape(model)
    assert found is not None
    assert found.weight_bytes == 1300


def test_of_a_model_that_is_not_all_here_nothing_is_known(tmp_path: Path) -> None:
    model = write_model(tmp_path, DENSE, CONFIG)
    index = {"weight_map": {name: f"{place}.safetensors" for place, name in enumerate(DENSE)}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    assert read_shape(model) is None


HEADER = b'{"model.embed_tokens.weight": {"data_offsets": [0, 4]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,  # a header longer than any
        len(HEADER).to_bytes(8, "little") + HEADER[:-9],
        (9).to_bytes(8, "little") + b"not JSON.",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        *(
            len(header).to_bytes(8, "little") + header
            for header in (b'{"a": {"data_offsets": [4]}}', b'{"a": {"data_offsets": null}}', b'{"a": 5}', b'{"a": {}}')
        ),
    ],
)
def test_of_broken_weights_nothing_is_known(tmp_path: Path, content: bytes) -> None:
    model = write_model(tmp_path, DENSE, CONFIG)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert read_shape(model) is None


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        "{}",
        "\ud800",
        '{"num_hidden_layers": "four"}',
        '{"num_hidden_layers": 4}',
        '{"num_hidden_layers": 4, "num_attention_heads": 0, "num_key_value_heads": 2, "hidden_size": 128}',
        json.dumps(CONFIG | {"text_config": "inside"}),
        json.dumps(CONFIG | {"layer_types": 5}),
        json.dumps(CONFIG | {"num_experts": [8, 8], "num_experts_per_tok": 2}),
    ],
)
def test_of_a_broken_config_nothing_is_known(tmp_path: Path, config: str) -> None:
    model = write_model(tmp_path, DENSE, CONFIG)
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
    assert read_shape(model) is None


def test_a_folder_without_a_model_has_no_shape(tmp_path: Path) -> None:
    assert read_shape(str(tmp_path)) is None


# The hub's cache


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--owner--name" / "snapshots"
    old = write_model(snapshots / "aaaa", DENSE, CONFIG)
    write_model(snapshots / "0000", DENSE | {"model.norm.weight": 8}, CONFIG)
    os.utime(old, (1, 1))
    found = read_shape("owner/name")
    assert found is not None
    assert found.weight_bytes == 1308  # of the newer snapshot
    assert read_shape("owner/other") is None


def test_without_a_cache_folder_of_its_own_it_lies_in_the_hubs_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    write_model(tmp_path / "hub" / "models--owner--name" / "snapshots" / "aaaa", DENSE, CONFIG)
    assert read_shape("owner/name") == ModelShape(1300, CACHE)


# The prediction head


HEADS = ["num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers"]


@pytest.mark.parametrize("field", HEADS)
def test_a_head_goes_by_several_names(tmp_path: Path, field: str) -> None:
    assert has_prediction_head(write_model(tmp_path / "with", DENSE, CONFIG | {field: 1}))
    assert has_prediction_head(write_model(tmp_path / "inside", DENSE, CONFIG | {"text_config": {field: 2}}))
    assert not has_prediction_head(write_model(tmp_path / "without", DENSE, CONFIG | {field: 0}))


@pytest.mark.parametrize("config", [{}, {"text_config": None}, {"text_config": {}}, {"num_mtp_layers": None}])
def test_a_config_that_names_no_head_has_none(tmp_path: Path, config: dict[str, Any]) -> None:
    assert has_prediction_head(write_model(tmp_path, DENSE, CONFIG | config)) is False


def test_a_model_that_is_not_here_has_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert has_prediction_head("owner/name") is False
    assert has_prediction_head(str(tmp_path)) is False
    write_model(tmp_path / "hub" / "models--owner--name" / "snapshots" / "aaaa", DENSE, CONFIG | {HEADS[0]: 1})
    assert has_prediction_head("owner/name") is True


@pytest.mark.parametrize("config", ["", "[]", "\ud800", json.dumps(CONFIG | {"text_config": "inside"})])
def test_of_a_broken_config_no_head_is_known(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
    assert has_prediction_head(str(tmp_path)) is False


# The bundled model


def test_the_bundled_model_has_no_head(scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]) -> None:
    assert make_host(scripted()).has_prediction_head() is has_prediction_head(str(default_model())) is False


def test_of_the_bundled_model_every_tensor_is_read_in_every_step() -> None:
    path = default_model() / "model.safetensors"
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    tensors = path.stat().st_size - 8 - header
    # Its embedding is its output head. Keys and values: 9 layers, 1 head of 64 numbers of 2 bytes
    assert read_shape(str(default_model())) == ModelShape(tensors, 2 * 9 * 1 * 64 * 2)


def test_a_host_knows_the_shape_of_its_model(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    assert make_host(scripted()).model_shape() == read_shape(str(default_model()))
    assert make_host(scripted(), model="nobody/nothing-of-this-name").model_shape() is None
