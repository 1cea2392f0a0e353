"""Inference engines: one file and one row each. Nothing here loads torch or an engine's package."""

from __future__ import annotations

from engines import sglang, transformers, vllm
from engines.base import Engine, EngineError

ENGINES: tuple[Engine, ...] = (transformers.ENGINE, vllm.ENGINE, sglang.ENGINE)


def engine_named(name: str) -> Engine:
    for engine in ENGINES:
        if engine.name == name:
            return engine
    known = ", ".join(engine.name for engine in ENGINES)
    raise EngineError(f"There is no engine called {name!r}. Known engines: {known}.")
