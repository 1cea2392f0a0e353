"""Models that have a published shape and no weights, for machines that no weights can be brought to.

How fast a model is does not depend on the values of its weights, but on how many there are and how they are joined.
So an engine that fills the real architecture with random numbers runs at the real speed and writes nonsense. What does
depend on them, and is therefore not shown by such a model: when an answer ends (so its length is fixed), and how many
of its own guesses speculation keeps (so that is simulated, and says so).

`make_model` writes a folder that an engine takes for the model: its configuration, a tokenizer, and no weights. The
tokenizer has one printable word per id, so that a prompt of N words is N tokens and every token is a chunk of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.base import EngineError
from engines.environments import cache_folder
from engines.model_shape import MARKER_FILE

LABEL = "random weights: speed is real, text is not"
# Random weights soon repeat themselves, and users who ask the same at temperature 0 write the same.
EXPERTS_NOTE = "; answers that repeat the same words use few of the experts, which flatters many users at once"
LABEL_FILE = "bakeoff.json"  # which demo_model.bundled reads: how the model is called, and what is said beside it
WEIGHT_BYTES = 2  # bfloat16
# Role, prompt, role: the template adds two words of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")
UNKNOWN, END, PADDING = "<unknown>", "<end>", "<padding>"
Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's published shape. `tensors`: name and size of every weight that decoding or its own speculation can
    read; `special`: ids that the configuration names, and their words."""

    name: str
    label: str
    config: Mapping[str, Any]
    tensors: Callable[[Mapping[str, Any]], Tensors]
    special: Mapping[int, str] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> Mapping[str, Any]:
        text: Mapping[str, Any] = self.config.get("text_config", self.config)
        return text

    @property
    def note(self) -> str:
        """What must be said beside everything that is measured with it."""
        return f"{LABEL}{EXPERTS_NOTE}" if self.text.get("num_experts") else LABEL

    @property
    def vocabulary_size(self) -> int:
        return int(self.text["vocab_size"])


def _qwen3_5_tensors(config: Mapping[str, Any]) -> Tensors:
    """Three of four layers have linear attention (Gated DeltaNet); the full ones gate their output, hence twice q."""
    text = config["text_config"]
    hidden, inner, size = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    heads, key_heads = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values, states = text["linear_num_value_heads"] * text["linear_value_head_dim"], text["linear_num_value_heads"]
    mixed = 2 * keys + values

    def layer(full: bool) -> Tensors:
        attention: Tensors = {
            "linear_attn.in_proj_qkv.weight": (mixed, hidden),
            "linear_attn.in_proj_z.weight": (values, hidden),
            "linear_attn.in_proj_b.weight": (states, hidden),
            "linear_attn.in_proj_a.weight": (states, hidden),
            "linear_attn.conv1d.weight": (mixed, 1, text["linear_conv_kernel_dim"]),
            "linear_attn.dt_bias": (states,),
            "linear_attn.A_log": (states,),
            "linear_attn.norm.weight": (text["linear_value_head_dim"],),
            "linear_attn.out_proj.weight": (hidden, values),
        }
        if full:
            attention = {
                "self_attn.q_proj.weight": (2 * heads, hidden),
                "self_attn.k_proj.weight": (key_heads, hidden),
                "self_attn.v_proj.weight": (key_heads, hidden),
                "self_attn.o_proj.weight": (hidden, heads),
                "self_attn.q_norm.weight": (size,),
                "self_attn.k_norm.weight": (size,),
            }
        return {
            **attention,
            **_dense(hidden, inner),
            **{f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")},
        }

    part = "model.language_model"
    layers = [layer(kind == "full_attention") for kind in text["layer_types"]]
    found: Tensors = {f"{part}.embed_tokens.weight": (text["vocab_size"], hidden), f"{part}.norm.weight": (hidden,)}
    found |= {f"{part}.layers.{place}.{name}": size for place, one in enumerate(layers) for name, size in one.items()}
    found |= {"mtp.fc.weight": (hidden, 2 * hidden)}
    found |= {f"mtp.{norm}.weight": (hidden,) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    heads_of_mtp = range(text["mtp_num_hidden_layers"])
    return found | {f"mtp.layers.{place}.{name}": size for place in heads_of_mtp for name, size in layer(True).items()}


def _gemma4_tensors(config: Mapping[str, Any]) -> Tensors:
    """Each layer has a dense part and experts beside it; its full layers use their keys as values."""
    hidden, experts, inner = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    norms = ["input", "post_attention"]
    norms += [f"{side}_feedforward" for side in ("pre", "post")]
    outer = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")

    def layer(full: bool) -> Tensors:
        size = config["global_head_dim" if full else "head_dim"]
        heads = config["num_attention_heads"] * size
        key_heads = config["num_global_key_value_heads" if full else "num_key_value_heads"] * size
        projected = ("k_proj",) if full else ("k_proj", "v_proj")
        return {
            "self_attn.q_proj.weight": (heads, hidden),
            **{f"self_attn.{name}.weight": (key_heads, hidden) for name in projected},
            "self_attn.o_proj.weight": (hidden, heads),
            "self_attn.q_norm.weight": (size,),
            "self_attn.k_norm.weight": (size,),
            **_dense(hidden, config["intermediate_size"]),
            **{f"{norm}_layernorm.weight": (hidden,) for norm in norms},
            **{f"{norm}.weight": (hidden,) for norm in outer},
            "router.scale": (hidden,),
            "router.per_expert_scale": (experts,),
            "router.proj.weight": (experts, hidden),
            "experts.gate_up_proj": (experts, 2 * inner, hidden),
            "experts.down_proj": (experts, hidden, inner),
        }

    layers = [layer(kind == "full_attention") for kind in config["layer_types"]]
    found: Tensors = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    return found | {
        f"model.layers.{place}.{name}": size for place, one in enumerate(layers) for name, size in one.items()
    }


def _dense(hidden: int, inner: int) -> Tensors:
    return {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


QWEN3_5_SPECIAL = {
    248053: "<|vision_start|>",
    248054: "<|vision_end|>",
    248056: "<|image_pad|>",
    248057: "<|video_pad|>",
}
# SGLang makes a processor of pictures for this architecture although only text is asked; these files let it.
QWEN3_5_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
    },
}

QWEN3_5_4B = Shape(
    name="qwen3.5-4b",
    label="Qwen3.5-4B",
    config={
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "text_config": {
            "model_type": "qwen3_5_text",
            "dtype": "bfloat16",
            "vocab_size": 248320,
            "hidden_size": 2560,
            "intermediate_size": 9216,
            "num_hidden_layers": 32,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
            "full_attention_interval": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "attn_output_gate": True,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "mamba_ssm_dtype": "float32",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": True,
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000.0,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
            },
        },
        # No text passes through it; the architecture is not built without.
        "vision_config": {
            "model_type": "qwen3_5",
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "in_channels": 3,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": [],
        },
    },
    tensors=_qwen3_5_tensors,
    special=QWEN3_5_SPECIAL,
    files=QWEN3_5_FILES,
    # For this architecture Transformers 5.19 takes a class of its own whatever the folder says, and reads none of ours
    # words with it; unless the folder names code of its own, which is not there and never loaded.
    tokenizer_settings={"auto_map": {"AutoTokenizer": ["no_code.Tokenizer", "no_code.Tokenizer"]}},
)

GEMMA_4_26B_A4B = Shape(
    name="gemma-4-26b-a4b",
    label="Gemma-4-26B-A4B",
    config={
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "vocab_size": 262144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 5,
        "sliding_window": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 262144,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1000000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    tensors=_gemma4_tensors,
)

SHAPES = (QWEN3_5_4B, GEMMA_4_26B_A4B)


def shape_named(name: str) -> Shape:
    """Raises EngineError for a name that is not in the table."""
    for shape in SHAPES:
        if shape.name == name:
            return shape
    known = ", ".join(shape.name for shape in SHAPES)
    raise EngineError(f"There is no shape called {name!r}. Known shapes: {known}.")


def make_model(shape: Shape, words: Iterable[str] = (), cache: Path | None = None) -> Path:
    """The folder of a model of this shape, made in the cache unless it is there. Raises EngineError.

    `words`: what prompts consist of, each of which gets an id of its own; all others share one, so that they count as
    one token each but cannot be told apart.
    """
    files = _files(shape, words)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:10]
    root = (cache or cache_folder()) / "models"
    folder = root / f"{shape.name}-random-{digest}"
    if (folder / MARKER_FILE).is_file():
        return folder
    partial = root / f"{folder.name}.{secrets.token_hex(4)}.part"
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=1)
            (partial / name).write_text(text, encoding="utf-8")
        try:
            os.rename(partial, folder)  # in one step: an engine never reads half a model
        except OSError:
            if not (folder / MARKER_FILE).is_file():  # else another program made it meanwhile
                raise
    except OSError as failure:
        raise EngineError(f"Cannot write the model's folder in {root}: {failure.strerror}.") from failure
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _files(shape: Shape, words: Iterable[str]) -> dict[str, Any]:
    """Name -> content of every file of the model's folder."""
    vocabulary = make_vocabulary(shape, words)
    end, padding = vocabulary.index(END), vocabulary.index(PADDING)
    ids = {"eos_token_id": end, "pad_token_id": padding, "bos_token_id": None}
    config: dict[str, Any] = {**shape.config, **ids}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], **ids}
    sizes = {name: WEIGHT_BYTES * math.prod(size) for name, size in shape.tensors(shape.config).items()}
    return {
        "config.json": config,
        "generation_config.json": {**ids, "do_sample": False},
        "tokenizer.json": _tokenizer(vocabulary, shape),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.get("text_config", config)["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "unk_token": UNKNOWN,
            "eos_token": END,
            "pad_token": PADDING,
            "chat_template": CHAT_TEMPLATE,
            **shape.tokenizer_settings,
        },
        "chat_template.jinja": CHAT_TEMPLATE,
        **shape.files,
        LABEL_FILE: {"name": f"{shape.label} (random weights)", "note": shape.note},
        MARKER_FILE: {"shape": shape.name, "tensor_bytes": sizes},
    }


def make_vocabulary(shape: Shape, words: Iterable[str] = ()) -> list[str]:
    """One word per id, all different. The special ones, which no answer shows, come last: what an engine picks when all
    scores are the same is the first."""
    size = shape.vocabulary_size
    known = list(dict.fromkeys([*ROLES, UNKNOWN, *sorted({word for text in words for word in text.split()})]))
    special = {**shape.special, size - 2: PADDING, size - 1: END}
    taken = {*known, *special.values()}
    ordinary = itertools.chain(known, (word for word in _invented_words() if word not in taken))
    return [special[place] if place in special else next(ordinary) for place in range(size)]


def _invented_words() -> Iterator[str]:
    """A million words that can be read aloud: "bababa", "babace", ..."""
    syllables = [first + second for first in "bcdfghjklmnprstvwxyz" for second in "aeiou"]
    yield from map("".join, itertools.product(syllables, repeat=3))


def _tokenizer(vocabulary: list[str], shape: Shape) -> str:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = [*shape.special.values(), PADDING, END]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    text: str = tokenizer.to_str()
    return text
