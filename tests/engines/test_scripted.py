"""What the scripted engine sends, and each of its faults as the page's own client and clock see it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import psutil
import pytest

from engines.base import Request, Usage
from engines.load import LoadGenerator
from engines.local import LocalHost
from engines.scripted import SCRIPTED_ENGINES, Fault, Script, scripted_engine
from engines.timeline import Timeline
from tests.conftest import MACHINE, wait_until

SCRIPTS = {
    "plain": Script(first_token=0.1, gap=0.02, text="one two three"),
    "fours": Script(gap=0.001, tokens_per_chunk=4, usage="final"),
    "thoughtful": Script(gap=0.001, usage="none", reasoning_tokens=3, text="a b c d e"),
}
# These begin to serve; "exit at start" and "never ready" do not, and are seen by the host alone.
FAULTS_WHILE_SERVING = (
    "http 429",
    "http 500",
    "http 503",
    "exit in mid-stream",
    "close in mid-stream",
    "half a chunk",
    "reset",
    "not json",
    "error event",
    "no tokens",
    "hang",
    "key in the answer",
)


@dataclass(frozen=True)
class Engines:
    host: LocalHost

    def ask(self, name: str, tokens: int = 10) -> Timeline:
        async def one_request() -> Timeline:
            async with LoadGenerator(self.host.ready(name).endpoint, silence_seconds=0.3) as load:
                answers, _ = await load.answers([(0.0, Request("Why?", tokens))])
                return answers[0].timeline

        return asyncio.run(one_request())


@pytest.fixture(scope="module")
def engines(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """One engine per script and per fault, started together."""
    faults = {fault: Script(gap=0.001, fault=fault, fault_after_tokens=5) for fault in FAULTS_WHILE_SERVING}
    rows = [scripted_engine(name, "Scripted", "#000000", script) for name, script in {**SCRIPTS, **faults}.items()]
    host = LocalHost(rows, model, cache=tmp_path_factory.mktemp("cache"), hardware=MACHINE)
    host.open()
    yield Engines(host)
    host.close()
    assert psutil.Process().children(recursive=True) == []


def test_the_words_come_one_by_one_at_their_pace(engines: Engines) -> None:
    timeline = engines.ask("plain", tokens=5)
    assert [arrival.text for arrival in timeline.arrivals] == [" one", " two", " three", " one", " two"]
    assert [arrival.tokens for arrival in timeline.arrivals] == [1] * 5
    assert timeline.arrivals[0].at >= 0.1
    assert timeline.arrivals[-1].at >= 0.1 + 4 * 0.02  # four gaps between five tokens
    assert (timeline.finish_reason, timeline.error) == ("length", None)
    assert timeline.usage == Usage(prompt_tokens=7, output_tokens=5, cached_tokens=0)
    assert timeline.token_source == "per chunk"


def test_chunks_of_four_tokens_whose_count_comes_at_the_end(engines: Engines) -> None:
    timeline = engines.ask("fours", tokens=10)
    assert [len(arrival.text.split()) for arrival in timeline.arrivals] == [4, 4, 2]  # 10 = 4 + 4 + 2
    assert [arrival.tokens for arrival in timeline.arrivals] == [None] * 3
    assert (timeline.usage.output_tokens, timeline.token_source) == (10, "final usage")


def test_tokens_that_nobody_counts(engines: Engines) -> None:
    timeline = engines.ask("thoughtful")
    assert (timeline.usage, timeline.token_source, len(timeline.arrivals)) == (Usage(), "estimated", 10)


def test_reasoning_comes_first_and_is_not_part_of_the_text(engines: Engines) -> None:
    timeline = engines.ask("thoughtful", tokens=5)
    assert [arrival.reasoning for arrival in timeline.arrivals] == [True] * 3 + [False] * 2
    assert timeline.text == " d e"


@pytest.mark.parametrize(
    ("fault", "arrivals", "error"),
    [
        ("http 500", 0, 'Scripted refused the request with HTTP 500: {"error": {"message": "the script says so"}}'),
        ("http 429", 0, "Scripted refused the request with HTTP 429: "),
        ("http 503", 0, "Scripted refused the request with HTTP 503: "),
        ("half a chunk", 5, "Scripted broke off the answer: the connection was closed."),
        ("reset", 5, "Scripted broke off the answer: Connection reset by peer."),
        ("exit in mid-stream", 5, "Scripted broke off the answer: "),
        ("close in mid-stream", 5, "Scripted broke off the answer: "),
        ("not json", 5, "The engine sent something that is not JSON: {broken"),
        ("error event", 5, "The engine reported an error: out of cache blocks"),
        ("no tokens", 0, "The engine ended its answer without a single token."),
        ("hang", 5, "Scripted sent nothing for 0.3 s."),
    ],
)
def test_a_fault_ends_the_timeline_with_its_error_and_keeps_what_came_before(
    engines: Engines, fault: str, arrivals: int, error: str
) -> None:
    timeline = engines.ask(fault)
    assert timeline.error is not None and timeline.error.startswith(error)
    assert len(timeline.arrivals) == arrivals
    assert timeline.closed is not None


def test_a_cut_connection_leaves_the_engine_serving_and_an_exit_does_not(engines: Engines) -> None:
    engines.ask("close in mid-stream")
    engines.ask("exit in mid-stream")
    wait_until(lambda: engines.host.status("exit in mid-stream").light == "failed")
    status = engines.host.status("exit in mid-stream")
    assert status.error == "Scripted stopped with exit code 3 while it was serving."
    assert status.log_tail.endswith("scripted: ending in mid-stream")
    assert engines.host.status("close in mid-stream").light == "ready"


def test_no_fault_is_forgotten_here() -> None:
    assert {*FAULTS_WHILE_SERVING, "", "exit at start", "never ready"} == set(get_args(Fault))


def test_the_engines_of_the_demonstration_differ_and_say_that_they_are_none() -> None:
    assert len({engine.name for engine in SCRIPTED_ENGINES}) == len({engine.colour for engine in SCRIPTED_ENGINES}) == 3
    for engine in SCRIPTED_ENGINES:
        assert engine.label.endswith("script")
