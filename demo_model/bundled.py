"""The model that comes with the project, its draft, and what must be said about a model wherever it is used.

A bundled model's folder holds, beside what engines load, `bakeoff.json`: its name, its note, and its draft's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
MARKER_FILE = "bakeoff.json"


def default_model() -> Path:
    """The folder of the default model."""
    return WEIGHTS / "target"


def draft_model(model: str) -> Path | None:
    """The folder of the draft model that comes with `model`; None where there is none."""
    draft = _marker(model).get("draft")
    return (Path(model).expanduser() / draft).resolve() if draft else None


def model_note(model: str) -> str:
    """What must be said beside everything that this model wrote or that was measured with it; mostly nothing."""
    return str(_marker(model).get("note", ""))


def model_label(model: str) -> str:
    """How the model is called on the page and under the figures: the last part of a path, else its id."""
    name = _marker(model).get("name")
    return str(name) if name else Path(model).name if Path(model).is_absolute() else model


def _marker(model: str) -> dict[str, Any]:
    path = Path(model).expanduser() / MARKER_FILE
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
