"""How a conversation becomes the model's text: special tokens, chat template, tokenizer settings."""

from __future__ import annotations

MAX_CONTEXT = 4096
END_OF_TEXT, TURN_START, TURN_END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
SPECIALS = [END_OF_TEXT, TURN_START, TURN_END, UNKNOWN]  # their ids are their places

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def prompt_text(question: str) -> str:
    """The chat template's text of one question."""
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"


def tokenizer_settings() -> dict[str, object]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_CONTEXT,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
