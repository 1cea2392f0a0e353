"""The three real engine servers on the CPU. Installs their environments when they are not there yet: minutes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import modal_app
from demo_model.bundled import draft_model
from demo_model.corpus import with_prefix
from demo_model.evaluate import answers, held_back_questions
from engines import ENGINES, engine_named
from engines.agreement import agreement
from engines.base import EngineConfig, EngineError, Request
from engines.client import EngineClient
from engines.environments import CACHE_VARIABLE, Environment, cache_folder
from engines.hardware import this_machine
from engines.local import LocalHost, Serving, Status
from engines.modal_cloud import class_name, read_facts, read_stamp
from engines.openai_stream import ChatStreamParser
from engines.timeline import Timeline, record
from engines.url_host import UrlHost
from experiments.base import Event, Plan, RequestEnded, RunEnded, TokensArrived
from experiments.baseline import EXPERIMENT
from experiments.metrics import RequestMetrics
from experiments.run import run
from experiments.sameness import same_answers
from experiments.servers import read_run, read_server
from experiments.speculation import EXPERIMENT as SPECULATION
from experiments.speculation import SpeculationPlan
from experiments.wire import Order, decoded, order_to_json
from tests.conftest import mounted_disk, wait_until
from tests.running_app import alive

pytestmark = pytest.mark.engines
NAMES = tuple(engine.name for engine in ENGINES)
TOKENS = 48
COUNT_TOKENS = "import sys; from tokenizers import Tokenizer; t = Tokenizer.from_file(sys.argv[1]); " + (
    "print(len(t.encode(sys.stdin.read()).ids))"
)


@pytest.fixture(scope="module")
def cpu() -> None:
    if this_machine().device != "cpu":
        pytest.skip("these tests measure the CPU path; this machine has a GPU")


@pytest.fixture(scope="module")
def host(cpu: None, model: str) -> Iterator[LocalHost]:
    host = LocalHost(ENGINES, model, draft_model=str(draft_model(model)))
    host.open()
    yield host
    host.close()


@pytest.fixture(params=NAMES)
def serving(request: pytest.FixtureRequest, host: LocalHost) -> Serving:
    return host.ready(request.param)


def ask(serving: Serving, tokens: int = TOKENS, fixed: bool = True) -> Timeline:
    async def exchange() -> Timeline:
        async with EngineClient(serving.endpoint) as client:
            question = Request("Write about the cache.", max_tokens=tokens, fixed_length=fixed)
            return await record(question, client.blocks, ChatStreamParser())

    return asyncio.run(exchange())


def test_an_engine_streams_its_answer_token_by_token(serving: Serving) -> None:
    timeline = ask(serving)

    assert timeline.error is None
    assert timeline.finish_reason == "length"
    assert len(timeline.arrivals) > TOKENS / 2, "it arrived in pieces, not at once"
    assert timeline.arrivals[0].at < timeline.arrivals[-1].at
    metrics = RequestMetrics(timeline)
    assert metrics.ttft and metrics.tpot and metrics.e2e
    assert 0 < metrics.ttft < metrics.e2e


def test_the_reported_token_count_agrees_with_the_engines_own_tokenizer(serving: Serving, host: LocalHost) -> None:
    timeline = ask(serving)

    assert timeline.usage.output_tokens == TOKENS
    assert timeline.token_source in ("per chunk", "final usage")
    python = Environment(serving.endpoint.engine, "cpu").program("python")
    tokenizer = str(Path(host.model) / "tokenizer.json")
    counted = subprocess.run(
        [python, "-c", COUNT_TOKENS, tokenizer], input=timeline.text.strip(), capture_output=True, text=True, check=True
    )
    assert int(counted.stdout) == TOKENS


def test_every_engine_reports_the_same_prompt_length_and_says_what_it_runs(host: LocalHost) -> None:
    servings = [host.ready(name) for name in NAMES]

    assert len({ask(serving).usage.prompt_tokens for serving in servings}) == 1
    for serving in servings:
        assert serving.version and serving.version[0].isdigit()
        assert host.model in serving.command
        phases = [phase.name for phase in serving.phases]
        assert phases[0] == "importing" and "loading weights" in phases
        assert all(phase.seconds >= 0 for phase in serving.phases)


def test_held_back_questions_get_the_same_beginning_from_every_engine(host: LocalHost) -> None:
    questions = held_back_questions()
    given = {}
    for name in NAMES:
        endpoint = host.ready(name).endpoint
        given[name] = asyncio.run(answers(endpoint, questions, longest=40))
    first, *others = NAMES
    for name in others:
        compared = [agreement(mine, theirs) for mine, theirs in zip(given[first], given[name], strict=True)]
        same = sum(bool(one and (one.whole or one.tokens >= 32)) for one in compared)
        assert same > len(questions) / 2, f"{name} agrees with {first} on 32 tokens of {same} answers only"


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_ends_by_itself_and_two_thousand_words_in_front_do_not_keep_it_from_coming(
    host: LocalHost, name: str
) -> None:
    endpoint = host.ready(name).endpoint
    question = "Provide a brief overview of LLM inference optimization. Make no mistakes."
    plain, behind = asyncio.run(answers(endpoint, [question, with_prefix(question, 2000)]))
    for timeline in (plain, behind):
        assert timeline.finish_reason == "stop" and timeline.error is None
        assert timeline.text.startswith("LLM inference optimization begins with two phases")
        assert timeline.text.rstrip().endswith(".")
    assert (behind.usage.prompt_tokens or 0) > 2000


def test_with_the_prefix_cache_off_a_repeated_prompt_takes_nothing_from_it(serving: Serving) -> None:
    ask(serving)

    assert ask(serving).usage.cached_tokens in (0, None)


def test_a_baseline_run_measures_all_three(host: LocalHost) -> None:
    plan = Plan("Write about the cache.", NAMES, repeats=2, warmups=1, max_tokens=TOKENS)

    result = asyncio.run(run(EXPERIMENT, plan, host, lambda event: None))

    assert [engine.error for engine in result.engines] == [None] * 3
    for name in NAMES:
        assert len(result.measured(name)) == 2 and not result.failures(name)
        assert {row.metrics.output_tokens for row in result.measured(name)} == {TOKENS}
    assert any("share its cores" in label for label in result.labels)
    caveats = {engine.name: engine.caveat for engine in result.engines}
    assert "without its fast CPU kernels" in (caveats["sglang"] or "")


def test_an_engine_that_is_killed_in_mid_stream_fails_its_lane_and_comes_back(
    host: LocalHost, serving: Serving
) -> None:
    name = serving.endpoint.engine.name
    for other in NAMES:
        host.ready(other)
    victim = listening_process(serving.config.port)
    killer = threading.Timer(0.4, lambda: os.kill(victim.pid, signal.SIGKILL))

    killer.start()
    timeline = ask(serving, tokens=2000)

    assert timeline.arrivals, "it had begun to answer"
    assert timeline.error and serving.endpoint.engine.label in timeline.error
    wait_until(lambda: host.status(name).light == "failed", 30)
    assert "signal 9" in host.status(name).error
    assert host.status(name).log_tail
    others = [other for other in NAMES if other != name]
    assert all(host.status(other).light == "ready" for other in others)
    assert ask(host.ready(name)).error is None


def test_what_sglang_and_transformers_cannot_do_here_is_said_before_anything_starts(host: LocalHost) -> None:
    config = EngineConfig(model=host.model, prefix_caching=True)

    with pytest.raises(EngineError, match="no prefix cache|keeps no prefix cache"):
        host.ready("transformers", config)
    assert host.status("transformers").light == "failed"
    assert host.ready("transformers").version  # and it works again


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_does_not_exist_is_said_in_the_lane(cpu: None, name: str, tmp_path: Path) -> None:
    host = LocalHost([engine_named(name)], str(tmp_path / "no-such-model"))

    with pytest.raises(EngineError, match="there is no such folder"):
        host.ready(name)

    assert host.status(name).light == "failed"
    assert "no-such-model" in host.status(name).error


@pytest.mark.parametrize("name", NAMES)
def test_a_port_that_is_taken_is_said_in_the_lane(cpu: None, name: str, model: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        host = LocalHost([engine_named(name)], model, port=port)

        with pytest.raises(EngineError, match=f"Port {port} is taken by another program"):
            host.ready(name)

        assert host.status(name).light == "failed"


def test_a_broken_model_shows_the_end_of_the_engines_log(cpu: None, model: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    host = LocalHost([engine_named("transformers")], str(tmp_path))

    with pytest.raises(EngineError) as caught:
        host.ready("transformers")

    assert "stopped with exit code" in caught.value.message
    assert "Traceback" in caught.value.log_tail or "Error" in caught.value.log_tail
    host.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MiB."""
    with mounted_disk(tmp_path / "disk", "300m") as folder:
        yield folder


def test_a_disk_that_fills_up_while_installing_is_said_and_nothing_is_left(
    cpu: None, model: str, small_disk: Path
) -> None:
    engine = engine_named("transformers")
    host = LocalHost([engine], model, cache=small_disk)
    with pytest.raises(EngineError, match="Not enough disk space to install HF Transformers"):
        host.ready("transformers")
    unaware = LocalHost([replace(engine, install_gib=0.0)], model, cache=small_disk)  # the check passes, the disk fills

    with pytest.raises(EngineError, match="the disk is full"):
        unaware.ready("transformers")

    assert unaware.status("transformers").light == "failed"
    assert [entry for entry in (small_disk / "environments").iterdir() if entry.is_dir()] == []
    assert cache_folder() != small_disk


def test_with_its_draft_model_vllm_guesses_well_and_sglang_says_why_it_cannot(host: LocalHost) -> None:
    plan = SpeculationPlan(
        "How does speculative decoding make a model answer faster?",
        ("vllm", "sglang"),
        repeats=1,
        warmups=1,
        draft_tokens=(3,),
    )

    result = asyncio.run(run(SPECULATION, plan, host, lambda event: None))

    counted = result.speculation("vllm+draft_model-3")
    assert counted and counted.acceptance_length and 2 < counted.acceptance_length <= 4
    assert counted.drafted == 3 * counted.steps and len(counted.accepted_at) == 3
    assert not any(row.timeline.error for row in result.requests)
    rows = {row.name: row for row in result.engines}
    assert "its draft and verify kernels exist for GPUs only" in str(rows["sglang+draft_model-3"].unavailable)
    assert [one.agreement.whole or one.agreement.tokens > 32 for one in same_answers(result)][0], "the text is the same"


# Modal says of every call made here that the containers' volumes are not.
@pytest.mark.filterwarnings("ignore:.*is executing locally.*:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_modal_s_generator_run_here_tells_what_the_local_host_tells(
    host: LocalHost, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(cache_folder()))  # where a container would have its engine
    plan = Plan("What is a KV cache?", (name,), repeats=2, warmups=1, max_tokens=32, fixed_length=True)
    order = order_to_json(Order("baseline", plan, EXPERIMENT.contenders(plan, host), name))
    container = getattr(modal_app, class_name(name))(model="bundled", draft_model="bundled", features="{}")
    facts = read_facts(container.hello.local())
    bench = container._cached_user_cls_instance().inside
    if name != "transformers":  # a start takes the others minutes: they find their engine running, as a kept one does
        bench.host = host
    items = [read_stamp(item) for item in container.measure.local(order)]
    if bench.host is not host:
        bench.close()
    events = [event for _, number, item in items if number for event in decoded(item)]
    local: list[Event] = []
    asyncio.run(run(EXPERIMENT, plan, host, local.append))

    assert facts.hardware == this_machine()
    assert happened(events) == happened(local)
    (*_, last) = events
    assert isinstance(last, RunEnded) and last.result.bandwidth and last.result.engines[0].start_phases


def happened(events: Sequence[Event | Status]) -> list[Any]:
    """Kinds in order, and of each answer what depends on no moment; how it is cut into chunks does."""
    found: list[Any] = []
    for event in events:
        match event:
            case Status() | TokensArrived():
                continue
            case RequestEnded(row):
                found.append((row.repeat, row.warmup, row.timeline.text, row.timeline.usage, row.timeline.error))
            case _:
                found.append(type(event).__name__)
    return found


def test_a_real_server_is_measured_by_its_address_as_somebody_elses(serving: Serving) -> None:
    """What the other host knows of it counts, not what this one does: only the address is given."""
    name = serving.endpoint.engine.name
    # Transformers' list holds what lies in the hub's cache, and not the folder that it serves.
    server = read_server(1, "any", serving.endpoint.base_url, "", serving.endpoint.model)
    values = {"repeats": 1, "warmups": 1, "max_tokens": TOKENS}
    plan, machine = read_run(EXPERIMENT, UrlHost(), (server,), values)
    result = asyncio.run(run(EXPERIMENT, plan, machine, lambda event: None))
    (row,), (measured,) = result.engines, result.measured("server-1")
    assert row.error is None and measured.timeline.error is None
    assert measured.metrics.output_tokens == TOKENS and measured.metrics.decode_speed
    known = {"vllm": "vllm", "sglang": "sglang", "transformers": "any"}
    assert row.config["preset"] == known[name]
    counted = "final usage" if name == "transformers" else "per chunk"
    assert measured.timeline.token_source == counted


def test_stopping_leaves_no_process(host: LocalHost) -> None:
    """The last of this file, because it ends the engines that the others share."""
    for name in NAMES:
        if host.status(name).light != "ready":
            host.ready(name)
    ours = psutil.Process().children(recursive=True)
    assert len(ours) > 6  # keepers, servers and their workers

    host.close()

    assert alive(ours) == []
    assert {host.status(name).light for name in NAMES} == {"down"}


def listening_process(port: int) -> psutil.Process:
    for process in psutil.Process().children(recursive=True):
        if any(link.status == "LISTEN" and link.laddr.port == port for link in process.net_connections("tcp")):
            return process
    raise AssertionError(f"no process of ours listens on {port}")
