"""The words of every prompt that an experiment asks by default: what a tokenizer must tell apart."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.base import Experiment


def prompt_words(experiments: Iterable[Experiment]) -> list[str]:
    """Each word once, as white space divides the texts of the experiments' settings."""
    texts = [
        str(setting.default) for one in experiments for setting in one.settings if setting.kind in ("text", "line")
    ]
    return sorted({word for text in texts for word in text.split()})
