"""The model that every machine can run. Until the trained one is in, a small one with random weights."""

from __future__ import annotations

import json
from pathlib import Path

from demo_model.random_model import MARKER_FILE, make_random_model
from engines.environments import cache_folder


def default_model() -> Path:
    """The folder of the default model, made there if need be."""
    return make_random_model(cache_folder() / "models" / "random-qwen3-3M")


def model_note(model: str) -> str:
    """What must be said beside everything that this model wrote or that was measured with it; mostly nothing."""
    marker = Path(model).expanduser() / MARKER_FILE
    return str(json.loads(marker.read_text(encoding="utf-8"))["note"]) if marker.is_file() else ""


def model_label(model: str) -> str:
    """How the model is called on the page and under the figures: the last part of a path, else its id."""
    marker = Path(model).expanduser() / MARKER_FILE
    if marker.is_file():
        return str(json.loads(marker.read_text(encoding="utf-8"))["name"])
    return Path(model).name if Path(model).is_absolute() else model
