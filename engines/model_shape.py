"""How many bytes a model reads from memory to decode, from its files: what bounds any engine at small batches."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Not read while text is decoded: other senses, heads that only speculation uses, tables of which a token reads a row.
UNUSED = re.compile(
    r"(^|\.)(visual|vision\w*|audio\w*|multi_modal_projector|embed_vision|embed_audio|mtp\w*|embed_tokens_per_layer)\."
)
EXPERTS = re.compile(r"\.experts\.")
EMBEDDING = re.compile(r"(^|\.)embed_tokens\.")
# How the configurations of models with a multi-token-prediction head call it.
HEAD_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_USED = ("num_experts_per_tok", "top_k_experts", "moe_topk")
CACHE_VALUE_BYTES = 2  # keys and values in 16 bits, as all three engines keep them unless told otherwise
LARGEST_HEADER = 100_000_000  # bytes; a longer one is no safetensors file
INDEX_FILE = "model.safetensors.index.json"
MARKER_FILE = "random_weights.json"  # in the folder of a model that has a shape and no weights


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Bytes that decoding reads. `weight_bytes`: in every step; `expert_bytes`: all routed experts together, of whose
    `expert_count` each token uses `experts_used`; `cache_bytes`: keys and values of one token of the context."""

    weight_bytes: int
    cache_bytes: int
    expert_bytes: int = 0
    expert_count: int = 0
    experts_used: int = 0

    def step_bytes(self, requests: int, context: float) -> float:
        """Bytes of one decode step for so many requests of `context` tokens each.

        Each token picks its experts as if by chance, so N tokens touch 1 - (1 - used / count)^N of them.
        """
        touched = 1 - (1 - self.experts_used / self.expert_count) ** requests if self.expert_count else 0.0
        return self.weight_bytes + touched * self.expert_bytes + requests * context * self.cache_bytes


def has_prediction_head(model: str) -> bool:
    """Whether the model can guess its own next tokens; False also where its files are not here."""
    folder = model_folder(model)
    if folder is None:
        return False
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parts = (values, values.get("text_config") or {})
        return any(bool(part.get(field)) for part in parts for field in HEAD_FIELDS)
    except (OSError, ValueError, AttributeError):
        return False


def read_shape(model: str) -> ModelShape | None:
    """The shape of a model in a folder or in the hub's cache; None where its files are not here or not understood."""
    folder = model_folder(model)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= config.get("text_config") or {}
        sizes: dict[str, int] = _sizes_without_weights(folder)
        for path in _weight_files(folder):
            sizes |= _tensor_bytes(path)
        return _shape(config, sizes) if sizes else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return None  # a model whose shape we cannot read can still be measured; its ceiling is a dash


def model_folder(model: str) -> Path | None:
    """The folder itself, or of `owner/name` the newest snapshot in the hub's cache; None before one is here."""
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    snapshots = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    return max(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, default=None)


def _sizes_without_weights(folder: Path) -> dict[str, int]:
    """Of a model that has a shape and no weights: its folder says how large each tensor is."""
    marker = folder / MARKER_FILE
    sizes: dict[str, int] = json.loads(marker.read_text(encoding="utf-8"))["tensor_bytes"] if marker.is_file() else {}
    return sizes


def has_random_weights(model: str) -> bool:
    """Whether the folder was made by engines/random_weights.py."""
    folder = model_folder(model)
    return folder is not None and (folder / MARKER_FILE).is_file()


def _weight_files(folder: Path) -> list[Path]:
    """Those that the index names, where there is one: beside them may lie the same weights under other names."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in sorted(set(weight_map.values()))]


def _tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor, from the file's header: eight bytes of length, then that much JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
    return {
        name: tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for name, tensor in header.items()
        if name != "__metadata__"
    }


def _shape(config: dict[str, Any], sizes: dict[str, int]) -> ModelShape:
    used = {name: size for name, size in sizes.items() if not UNUSED.search(name)}
    experts = sum(size for name, size in used.items() if EXPERTS.search(name))
    dense = sum(size for name, size in used.items() if not EXPERTS.search(name))
    if any("lm_head" in name for name in used):
        # Then the embedding is a table of its own, of which a step reads one row per token.
        dense -= sum(size for name, size in used.items() if EMBEDDING.search(name))
    count, chosen = (
        next((int(config[key]) for key in keys if config.get(key)), 0) for keys in (EXPERT_COUNTS, EXPERTS_USED)
    )
    if not (count and chosen):  # what is called an expert but not chosen among is read in every step
        dense, experts, count, chosen = dense + experts, 0, 0, 0
    return ModelShape(dense, _cache_bytes(config), experts, count, chosen)


def _cache_bytes(config: dict[str, Any]) -> int:
    """Layers with full attention only: linear ones keep a state of fixed size, sliding ones a window."""
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or ["full_attention"] * layers
    full = sum(1 for kind in kinds if kind == "full_attention")
    if config.get("kv_lora_rank"):  # latent attention keeps one compressed vector for all heads
        return full * (int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])) * CACHE_VALUE_BYTES
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    if config.get("global_head_dim"):  # Gemma 4: full layers have fewer and wider heads than sliding ones
        size = int(config["global_head_dim"])
        heads = int((config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")) or heads)
    return 2 * full * heads * size * CACHE_VALUE_BYTES
