"""The words of every prompt that an experiment asks by default, and models whose tokenizer tells them apart."""

from __future__ import annotations

from collections.abc import Iterable

from engines.base import EngineError
from engines.random_weights import make_model, shape_named
from experiments import EXPERIMENTS
from experiments.base import Experiment


def prompt_words(experiments: Iterable[Experiment]) -> list[str]:
    """Each word once, as white space divides the texts of the experiments' settings."""
    texts = [
        str(setting.default) for one in experiments for setting in one.settings if setting.kind in ("text", "line")
    ]
    return sorted({word for text in texts for word in text.split()})


def random_model(shape: str, model: str | None, host: str) -> str:
    """The folder of a model of this shape with random weights, as a command line asks for it. `model`, `host`: what it
    says beside that. Raises EngineError."""
    if model or host != "local":
        raise EngineError("--random-weights makes a model on this machine: it goes with neither --model nor --host.")
    return str(make_model(shape_named(shape), prompt_words(EXPERIMENTS)))
