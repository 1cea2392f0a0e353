"""Tiny models with random weights behind the real engine servers that know their architectures on a CPU."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import engine_named
from engines.base import Request
from engines.hardware import this_machine
from engines.load import LoadGenerator
from engines.local import LocalHost, Serving
from engines.random_weights import Shape, make_model
from tests.engines.tiny_shapes import TINY_GEMMA, TINY_QWEN

pytestmark = pytest.mark.engines
WORDS = "one two three four"


# vLLM's CPU build lacks torchvision, which it wants for Qwen3.5; SGLang has no CPU kernels for either architecture.
@pytest.fixture(
    scope="module",
    params=[("transformers", TINY_QWEN), ("transformers", TINY_GEMMA), ("vllm", TINY_GEMMA)],
    ids=["transformers-qwen", "transformers-gemma", "vllm-gemma"],
)
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    if this_machine().device != "cpu":
        pytest.skip("these tests serve on the CPU; this machine has a GPU")
    name, shape = request.param
    assert isinstance(shape, Shape)
    folder: Path = make_model(shape, [WORDS], tmp_path_factory.mktemp("cache"))
    host = LocalHost((engine_named(name),), str(folder))
    yield host.ready(name)
    host.close()


@pytest.mark.parametrize("at_once", [1, 3])
def test_every_token_is_a_chunk_and_every_word_of_the_prompt_a_token(serving: Serving, at_once: int) -> None:
    async def ask() -> list[tuple[object, ...]]:
        async with LoadGenerator(serving.endpoint) as load:
            answered, _ = await load.answers([(0.0, Request(WORDS, max_tokens=24))] * at_once)
        return [
            (
                one.timeline.error,
                one.timeline.usage.prompt_tokens,
                one.timeline.usage.output_tokens,
                [arrival.tokens for arrival in one.timeline.arrivals],
                len(one.timeline.text.split()),
            )
            for one in answered
        ]

    assert asyncio.run(ask()) == [(None, 4 + 2, 24, [1] * 24, 24)] * at_once
