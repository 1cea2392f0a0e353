"""The two architectures in a size that any machine serves: few layers, few experts, a thousand words."""

from __future__ import annotations

from dataclasses import replace

from engines.random_weights import GEMMA_4_26B_A4B, QWEN3_5_4B

VOCABULARY = 1024

TINY_QWEN = replace(
    QWEN3_5_4B,
    name="tiny-qwen3.5",
    label="Tiny Qwen3.5",
    config={
        **QWEN3_5_4B.config,
        "image_token_id": 1003,
        "video_token_id": 1004,
        "vision_start_token_id": 1001,
        "vision_end_token_id": 1002,
        "text_config": {
            **QWEN3_5_4B.config["text_config"],
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": {
                **QWEN3_5_4B.config["text_config"]["rope_parameters"],
                "mrope_section": [3, 3, 2],
            },
        },
        "vision_config": {
            **QWEN3_5_4B.config["vision_config"],
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
        },
    },
    special={1001: "<|vision_start|>", 1002: "<|vision_end|>", 1003: "<|image_pad|>", 1004: "<|video_pad|>"},
)

TINY_GEMMA = replace(
    GEMMA_4_26B_A4B,
    name="tiny-gemma-4",
    label="Tiny Gemma-4",
    config={
        **GEMMA_4_26B_A4B.config,
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "sliding_window": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
)
