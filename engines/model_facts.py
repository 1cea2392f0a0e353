"""What an engine must know of a model beside its name, read from the model's config.json before a server starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from engines.model_shape import CACHE_VALUE_BYTES, model_folder

STATE_VALUE_BYTES = 4  # linear attention keeps its state in 32 bits


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """All empty where the model's files are not here, or not understood.

    `sees`: it takes pictures beside text. `linear_attention`: some layers keep a state of fixed size in place of keys
    and values; `state_bytes` of all of them together, per request. `token_bytes`: keys and values of one token of the
    context, over all layers. `full_attention`: where its full layers have other heads than its sliding ones (Gemma 4),
    SGLang's names for both.
    """

    sees: bool = False
    linear_attention: bool = False
    state_bytes: int = 0
    token_bytes: int = 0
    full_attention: dict[str, int] = field(default_factory=dict)


def read_facts(model: str) -> ModelFacts:
    folder = model_folder(model)
    if folder is None:
        return ModelFacts()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        kinds = text.get("layer_types") or ["full_attention"] * int(text["num_hidden_layers"])
        linear = kinds.count("linear_attention")
        return ModelFacts(
            sees=bool(config.get("vision_config")),
            linear_attention=bool(linear),
            state_bytes=linear * _state_bytes(text) if linear else 0,
            token_bytes=_token_bytes(text, kinds),
            full_attention=_full_attention(text),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ModelFacts()


def _state_bytes(text: dict[str, Any]) -> int:
    """Of one linear layer and one request: a matrix per value head, and what its convolution looks back to."""
    key, value = int(text["linear_key_head_dim"]), int(text["linear_value_head_dim"])
    key_heads, value_heads = int(text["linear_num_key_heads"]), int(text["linear_num_value_heads"])
    behind = int(text["linear_conv_kernel_dim"]) - 1
    channels = 2 * key_heads * key + value_heads * value
    return value_heads * key * value * STATE_VALUE_BYTES + behind * channels * CACHE_VALUE_BYTES


def _token_bytes(text: dict[str, Any], kinds: list[str]) -> int:
    """Sliding layers are counted in full: a context shorter than their window fills them as it does the others."""
    size = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    heads = int(text.get("num_key_value_heads") or text["num_attention_heads"])
    of_kind = {"sliding_attention": heads * size, "full_attention": heads * size}
    if full := _full_attention(text):
        of_kind["full_attention"] = full["num_key_value_heads"] * full["head_dim"]
    return 2 * CACHE_VALUE_BYTES * sum(of_kind.get(kind, 0) for kind in kinds)


def _full_attention(text: dict[str, Any]) -> dict[str, int]:
    """Gemma 4 calls a full layer's heads `global_...`; SGLang calls a sliding layer's `swa_...` and full ones plainly,
    and translates only the configuration of the model that sees, not that of its text part alone (0.5.16)."""
    if not text.get("global_head_dim"):
        return {}
    size, heads = int(text["head_dim"]), int(text["num_key_value_heads"])
    full_heads = int((text.get("attention_k_eq_v") and text.get("num_global_key_value_heads")) or heads)
    return {
        "head_dim": int(text["global_head_dim"]),
        "v_head_dim": int(text["global_head_dim"]),
        "num_key_value_heads": full_heads,
        "swa_head_dim": size,
        "swa_v_head_dim": size,
        "swa_num_key_value_heads": heads,
    }
