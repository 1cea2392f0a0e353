"""The cross-check with vLLM's own benchmark, over a scripted engine and shell scripts in the benchmark's place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.base import Engine, EngineConfig
from engines.local import LocalHost, Serving
from engines.openai_stream import Endpoint
from engines.vllm import ENGINE
from experiments import cross_check
from experiments.base import DEFAULT_PROMPT
from experiments.cross_check import (
    BENCH,
    QUANTITIES,
    CrossCheckError,
    Measured,
    bench_command,
    compared,
    ours,
    read_bench,
    theirs,
)

SERVING = Serving(
    Endpoint(ENGINE, "http://127.0.0.1:1234", "served-name"), EngineConfig("/models/small"), "", None, {}, (), None
)
WRITTEN = {"completed": 2, "median_ttft_ms": 12.5, "median_tpot_ms": 3.25, "output_throughput": 410.0, "failed": 0}


# What is asked


def test_the_benchmark_gets_the_same_load_as_ours(tmp_path: Path) -> None:
    words = bench_command(SERVING, 8, 128, tmp_path)
    options = dict(zip(words, words[1:], strict=False))  # an option's value stands behind it
    assert options["--base-url"] + options["--endpoint"] == "http://127.0.0.1:1234/v1/chat/completions"
    assert (options["--model"], options["--tokenizer"]) == ("served-name", "/models/small")
    assert (options["--num-prompts"], options["--request-rate"], options["--temperature"]) == ("8", "inf", "0")
    assert "128" in words
    assert "--ignore-eos" in words
    assert Path(options["--dataset-path"]).parent == Path(options["--result-dir"]) == tmp_path
    assert all(isinstance(word, str) for word in words)


# Ours


def test_our_measurement_is_that_of_a_wave(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    found = asyncio.run(ours(make_host(scripted("vllm", first_token=0.05, gap=0.01)), 2, 6))
    # 50 ms to the first token and 10 for each of five more: 2 * 6 tokens / 0.1 s at most
    assert 45 < found.ttft_p50 < 150
    assert found.tpot_p50 is not None and 9 < found.tpot_p50 < 30
    assert 40 < found.tokens_per_second <= 125


def test_a_measurement_of_ours_that_failed_says_so(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    with pytest.raises(CrossCheckError, match="our own measurement of 1 requests failed"):
        asyncio.run(ours(make_host(scripted("vllm", fault="http 500")), 1, 6))


# Theirs


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    """A program that is called as vLLM's Python is; `$folder` is where its result belongs."""

    def make(script: str) -> str:
        program = tmp_path / "python"
        find = "code=$2; while [ $# -gt 1 ]; do case $1 in --result-dir) folder=$2;; esac; shift; done"
        program.write_text(f"#!/bin/sh\n{find}\n{script}\n")
        program.chmod(0o755)
        return str(program)

    return make


def test_their_result_is_read_from_the_file_that_it_writes(python: Callable[[str], str], tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    script = f'cp $folder/prompts* {seen}; echo "$code" > {seen}/code; env > {seen}/env; echo $folder > {seen}/folder\n'
    script += f"echo '{json.dumps(WRITTEN)}' > $folder/result.json"
    assert theirs(python(script), SERVING, 2, 16) == Measured(12.5, 3.25, 410.0)
    (prompts,) = seen.glob("prompts*")
    assert prompts.read_text().count(DEFAULT_PROMPT) == 2
    assert (seen / "code").read_text().strip() == BENCH
    assert "HF_HUB_OFFLINE=1" in (seen / "env").read_text().splitlines()
    assert not Path((seen / "folder").read_text().strip()).exists()  # nothing is left behind


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'no such model' >&2; exit 3", "no such model"),
        ("echo 'all is well'", "all is well"),  # but there is no result
        ("echo '{\"completed\": 1}' > $folder/result.json", "completed 1 of 2 requests"),
        ("echo 'no JSON' > $folder/result.json", "cannot be read"),
    ],
)
def test_a_benchmark_that_failed_says_so_in_its_own_words(
    python: Callable[[str], str], script: str, words: str
) -> None:
    with pytest.raises(CrossCheckError, match=words):
        theirs(python(script), SERVING, 2, 16)


def test_only_the_end_of_a_long_complaint_is_told(python: Callable[[str], str]) -> None:
    with pytest.raises(CrossCheckError) as caught:
        theirs(python("seq 100000; echo 'the reason'; exit 1"), SERVING, 1, 16)
    assert str(caught.value).endswith("the reason\n")
    assert len(str(caught.value)) < 2100


def test_a_benchmark_that_hangs_or_is_not_there_is_given_up(
    python: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cross_check, "BENCH_SECONDS", 0.2)
    with pytest.raises(CrossCheckError, match="timed out after 0.2 seconds"):
        theirs(python("exec sleep 60"), SERVING, 1, 16)
    with pytest.raises(CrossCheckError, match="No such file"):
        theirs(str(tmp_path / "nowhere"), SERVING, 1, 16)


def test_a_result_of_fewer_requests_is_no_result() -> None:
    assert read_bench(WRITTEN, 2) == Measured(12.5, 3.25, 410.0)
    with pytest.raises(CrossCheckError, match="completed 2 of 3 requests"):
        read_bench(WRITTEN, 3)


@pytest.mark.parametrize("name", ["completed", "median_ttft_ms", "median_tpot_ms", "output_throughput"])
def test_a_result_without_one_of_its_numbers_is_refused(name: str) -> None:
    with pytest.raises(CrossCheckError, match=f"has no '{name}'"):
        read_bench({key: value for key, value in WRITTEN.items() if key != name}, 2)


# Both beside each other


def rounds(*pairs: tuple[float, float]) -> list[tuple[Measured, Measured]]:
    """Of each pair the same number for all three quantities."""
    return [(Measured(one, one, one), Measured(other, other, other)) for one, other in pairs]


def test_every_quantity_has_its_line() -> None:
    one, other = Measured(10.0, 2.0, 400.0), Measured(20.0, 1.0, 400.0)
    lines = compared(8, [(one, other)])
    assert [line.quantity for line in lines] == list(QUANTITIES)
    assert [(line.ours.values, line.theirs.values) for line in lines] == [
        ((10.0,), (20.0,)),
        ((2.0,), (1.0,)),
        ((400.0,), (400.0,)),
    ]
    assert all(line.line.split()[0] == "8" for line in lines)


def test_measurements_whose_ratio_may_be_one_agree() -> None:
    line = compared(1, rounds((99.0, 101.0), (100.0, 100.0), (101.0, 99.0)))[0]
    assert line.agrees is True
    assert line.ratio is not None
    assert line.ratio.value == pytest.approx(1)
    assert line.line.endswith("agree")
    assert "100 ±2.48" in line.line  # 4.303 * 1 / √3


def test_measurements_whose_ratio_cannot_be_one_differ() -> None:
    line = compared(1, rounds((198.0, 99.0), (200.0, 100.0), (202.0, 101.0)))[0]
    assert line.agrees is False
    assert line.ratio is not None
    assert line.ratio.value == pytest.approx(2)
    assert line.line.endswith("differ")
    assert " 2.000 (1." in line.line


@pytest.mark.parametrize("pairs", [[(100.0, 100.0)], []])
def test_too_few_rounds_say_nothing(pairs: list[tuple[float, float]]) -> None:
    line = compared(32, rounds(*pairs))[0]
    assert line.agrees is None
    assert line.line.endswith("too few rounds")
