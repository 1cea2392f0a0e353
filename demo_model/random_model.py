"""Make a small Qwen3-architecture model whose weights are random and whose tokens are all printable text.

It lets every engine be started, raced and measured on a machine that can reach no model hub: an engine's
speed does not depend on what the weights say. Its words mean nothing, and the page says so.

    python -m demo_model.random_model FOLDER

Needs only numpy: the safetensors format is a JSON header in front of the raw tensors, and tokenizer.json
is plain JSON, so no engine's environment has to exist yet.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import numpy as np

SEED = 42
HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, FEED_FORWARD = 256, 4, 4, 2, 64, 768
MAX_CONTEXT = 4096
MARKER_FILE = "bakeoff.json"  # written last: a folder that has it is whole
NOTE = "Random weights: the speed is real, the words mean nothing."

END_OF_TEXT, TURN_START, TURN_END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
WORDS = """
a about above accept across after again all also an and answer any are as ask at attention baseline batch be because
been before begin below best better between block both build but by cache can card chart choose chunk clear click
clock come compare compute concurrency context continuous copy core cost count curve data decode deep delay demo did
differ do does done down draft draw each early empty end engine enough even every exact experiment explain fact far
fast few figure fill find first fit flat for free from full gain gap get give go good graph great grow had half hand
has have head help here high hold how if in inference into is it its just keep kernel key kind know language large
last late latency layer lead learn less let level light like limit line list little live load long look lost low made
make many mark match may mean measure memory method might model more most move much must name near need network never
new next no not note now number of off often old on once one only open or order other our out over own page pair
part pass past people per percent place plain plan play point pool prefill prefix print probe process prompt proof
prove push put query question queue quick quiet race rank rate reach read ready real reason record repeat replay
request rest result right row run same sample save say scale schedule score second see send sequence serve set shape
share short should show side simple single size slow small so some source space speculate speed spread stage stand
start state steady step still stop stream strong such sum sure system table take tell test than that the their them
then there these they thing think this thread through throughput time to token together too top total trace train
true try turn two under until up use user value very wait walk want warm was watch wave way we weight well what when
where which while who whole why wide will window with without word work would write wrong year yet you your
""".split()

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def make_random_model(folder: Path) -> Path:
    """Write the model into `folder` unless a whole one is there; returns the folder."""
    if (folder / MARKER_FILE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary()
    _write_json(folder / "config.json", _model_config(len(vocabulary)))
    _write_json(folder / "generation_config.json", {"eos_token_id": [0, 2], "pad_token_id": 0})
    _write_json(folder / "tokenizer.json", _tokenizer(vocabulary))
    _write_json(folder / "tokenizer_config.json", tokenizer_settings())
    _write_safetensors(folder / "model.safetensors", _weights(len(vocabulary)))
    _write_json(folder / MARKER_FILE, {"name": "random-qwen3-3M", "note": NOTE})
    return folder


def _vocabulary() -> list[tuple[str, float]]:
    """(piece, score) rows of a Unigram tokenizer; whole words score above spelling them out."""
    specials = [(piece, 0.0) for piece in (END_OF_TEXT, TURN_START, TURN_END, UNKNOWN)]
    words = [(f"▁{word}", -6.0) for word in sorted(set(WORDS)) if len(word) > 1]
    letters = [(letter, -10.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    spaced = [(f"▁{letter}", -9.0) for letter in string.ascii_letters + string.digits]
    return [*specials, *words, *letters, *spaced, ("▁", -10.0), ("\n", -10.0)]


def _tokenizer(vocabulary: list[tuple[str, float]]) -> dict[str, object]:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": vocabulary[index][0],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index in range(4)
        ],
        "normalizer": None,
        "pre_tokenizer": metaspace,
        "post_processor": None,
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary, "byte_fallback": False},
    }


def tokenizer_settings() -> dict[str, object]:
    """tokenizer_config.json of both models of this folder: special tokens and the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_CONTEXT,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _model_config(vocabulary_size: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary_size,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": LAYERS,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def _weights(vocabulary_size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(SEED)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        values: np.ndarray = random.standard_normal((rows, columns)) * scale / np.sqrt(columns)
        return values.astype(np.float32)

    ones = np.ones
    head = matrix(vocabulary_size, HIDDEN, scale=4.0)
    head[:4] = 0.0  # special tokens never win the argmax, so every output token is text
    weights = {
        "model.embed_tokens.weight": matrix(vocabulary_size, HIDDEN, scale=16.0),
        "model.norm.weight": ones(HIDDEN, np.float32),
        "lm_head.weight": head,
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        weights |= {
            f"{name}input_layernorm.weight": ones(HIDDEN, np.float32),
            f"{name}post_attention_layernorm.weight": ones(HIDDEN, np.float32),
            f"{name}self_attn.q_proj.weight": matrix(HEADS * HEAD_SIZE, HIDDEN),
            f"{name}self_attn.k_proj.weight": matrix(KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
            f"{name}self_attn.v_proj.weight": matrix(KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN, scale=4.0),
            f"{name}self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_SIZE, scale=4.0),
            f"{name}self_attn.q_norm.weight": ones(HEAD_SIZE, np.float32),
            f"{name}self_attn.k_norm.weight": ones(HEAD_SIZE, np.float32),
            f"{name}mlp.gate_proj.weight": matrix(FEED_FORWARD, HIDDEN),
            f"{name}mlp.up_proj.weight": matrix(FEED_FORWARD, HIDDEN),
            f"{name}mlp.down_proj.weight": matrix(HIDDEN, FEED_FORWARD, scale=4.0),
        }
    return weights


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """bfloat16 is the upper half of a float32, so it is written as that half (rounded to nearest)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, tensor in tensors.items():
        blob = ((tensor.view(np.uint32) + 0x8000) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(blobs))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    print(make_random_model(Path(sys.argv[1])))
