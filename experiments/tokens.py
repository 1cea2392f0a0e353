"""How many tokens a text has for a model, without loading the model or anything large."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from demo_model.bundled import default_model
from experiments.wire import BUNDLED


def count_tokens(model: str, text: str) -> tuple[int, bool]:
    """Tokens of `text` and True, by the model's own tokenizer where that is on this machine; else its bytes, which no
    tokenizer of the offered models exceeds, and False."""
    path = _tokenizer_file(model)
    if path is None:
        return len(text.encode()), False
    return len(_tokenizer(path).encode(text, add_special_tokens=False).ids), True


def _tokenizer_file(model: str) -> str | None:
    """Nothing is downloaded for it. An empty name is no model."""
    if not model:
        return None
    folder = default_model() if model == BUNDLED else Path(model).expanduser()
    if (path := folder / "tokenizer.json").is_file():
        return str(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "tokenizer.json")
    except HFValidationError:  # a folder without one
        return None
    return found if isinstance(found, str) else None


@cache
def _tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)
