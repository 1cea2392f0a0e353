from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.base import EngineError
from engines.cloud import WIRE_VERSION
from engines.local import LocalHost, Status
from engines.modal_cloud import read_facts
from experiments import container as container_module
from experiments.base import EngineFailed, Event, Plan, RequestEnded, RunEnded, TrialEnded
from experiments.baseline import EXPERIMENT
from experiments.container import Bench
from experiments.prefix_caching import EXPERIMENT as PREFIX
from experiments.run import run
from experiments.wire import Order, decoded, order_to_json
from tests.conftest import MACHINE, wait_until
from tests.running_app import alive

PLAN = Plan("Go on.", ("quick", "slow"), repeats=2, warmups=1, max_tokens=6)
Make = Callable[..., Any]


@pytest.fixture
def make_bench(scripted: Make, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """A container's bench over two scripted engines, of which it serves the one called `quick`."""
    made: list[Bench] = []

    def make(features: str = "{}", **script: object) -> Bench:
        engines = (scripted("quick", **script), scripted("slow"))
        made.append(Bench("quick", "bundled", "", features, tmp_path / "cache", engines, hardware=MACHINE))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def order(bench: Bench, plan: Plan = PLAN, **changes: Any) -> str:
    contenders = EXPERIMENT.contenders(plan, bench.host)
    return order_to_json(Order("baseline", plan, contenders, "quick", **changes))


def events_of(bench: Bench, text: str) -> list[Event | Status]:
    return [event for item in bench.measure(text) for event in decoded(item)]


def told(events: list[Any]) -> list[tuple[Any, ...]]:
    """What happened, without moments and without what only one side says: kinds, places and texts."""
    found: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case Status():
                continue
            case RequestEnded(row):
                timeline = row.timeline
                counts = [arrival.tokens for arrival in timeline.arrivals]
                found.append(("ended", row.engine, row.repeat, row.warmup, timeline.text, counts, timeline.usage))
            case TrialEnded(row):
                found.append(("trial", row.engine, row.repeat, row.warmup))
            case _:
                found.append((type(event).__name__,))
    return found


def test_the_events_are_those_of_the_local_host_for_the_same_workload(
    make_bench: Callable[..., Bench], make_host: Callable[..., LocalHost], scripted: Make
) -> None:
    local: list[Event] = []
    host = make_host(scripted("quick"))
    asyncio.run(run(EXPERIMENT, replace(PLAN, engines=("quick",)), host, local.append))

    bench = make_bench()
    events = events_of(bench, order(bench))

    assert told(events) == told(local)
    assert told(local).count(("TokensArrived",)) == 3 * 6  # a warm-up and two repeats of six tokens


def test_only_the_ordered_contender_is_run_and_counted(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()

    (*_, last) = events_of(bench, order(bench))

    assert isinstance(last, RunEnded)
    assert [row.name for row in last.result.engines] == ["quick"]
    assert last.result.model_shape is not None and last.result.bandwidth is not None


def test_the_engine_s_phases_are_told_while_it_starts(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(start=0.6)

    phases = [event.phase for event in events_of(bench, order(bench)) if isinstance(event, Status)]

    assert [phase for phase in phases if phase in ("loading weights", "warming up")] == [
        "loading weights",
        "warming up",
    ]


def test_a_second_order_finds_the_engine_running(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()

    first, second = events_of(bench, order(bench)), events_of(bench, order(bench))

    assert "starting" in [event.light for event in first if isinstance(event, Status)]
    assert "starting" not in [event.light for event in second if isinstance(event, Status)]


def test_an_engine_that_cannot_start_is_told_with_the_end_of_its_log(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(fault="exit at start")

    failed = next(event for event in events_of(bench, order(bench)) if isinstance(event, EngineFailed))

    assert failed.row.error and "the script says so" in failed.row.error + failed.row.log_tail


def test_a_container_stops_by_itself_when_its_time_is_up(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(gap=0.2)
    long = replace(PLAN, repeats=20, max_tokens=50)

    (*_, last) = events_of(bench, order(bench, long, limit_seconds=1.5))

    assert isinstance(last, RunEnded) and last.result.stopped_early


def test_closing_the_stream_stops_the_run_and_leaves_the_engine_idle(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(gap=0.05)
    long = order(bench, replace(PLAN, repeats=20, max_tokens=200))

    items = bench.measure(long)
    while not any(type(event).__name__ == "TokensArrived" for event in decoded(next(items))):
        pass
    items.close()

    assert bench.host.status("quick").light == "ready"
    again = events_of(bench, order(bench, replace(PLAN, max_tokens=2)))
    assert isinstance(again[-1], RunEnded) and not again[-1].result.stopped_early


def test_silence_is_broken_every_few_seconds(make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_module, "ALIVE_SECONDS", 0.3)
    bench = make_bench(first_token=1.5)

    items = list(bench.measure(order(bench, replace(PLAN, repeats=1, warmups=0))))

    assert items.count("[]") >= 3


@pytest.mark.parametrize("text", ["", "[]", '{"experiment": "baseline"}', '{"experiment": "none"}'])
def test_an_order_that_cannot_be_read_is_refused(make_bench: Callable[..., Bench], text: str) -> None:
    with pytest.raises(EngineError, match="does not understand its order"):
        events_of(make_bench(), text)


def test_an_order_for_nobody_is_refused(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    text = json.dumps({**json.loads(order(bench)), "only": "somebody"})

    with pytest.raises(EngineError, match="no contender called 'somebody'"):
        events_of(bench, text)


def test_a_variant_is_served_as_its_features_say(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench('{"prefix_caching": true}')
    plan = PREFIX.read_plan(("quick",), {"repeats": 1, "warmups": 0, "max_tokens": 2})
    contenders = PREFIX.contenders(plan, bench.host)
    cached = next(one for one in contenders if one.changes.get("prefix_caching"))

    events = events_of(bench, order_to_json(Order(PREFIX.name, plan, contenders, cached.key)))

    (ready,) = [event.row for event in events if type(event).__name__ == "EngineReady"]
    assert ready.name == cached.key and ready.config["prefix_caching"] is True


def test_a_container_says_what_it_is(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()

    first, second = read_facts(bench.hello()), read_facts(bench.hello())

    assert (first.calls, second.calls) == (0, 1)
    assert first.hardware == MACHINE and first.wire_version == WIRE_VERSION
    assert 0 < first.import_seconds <= first.alive_seconds


def test_freezing_starts_the_engine_and_empties_its_memory_and_thawing_fills_it(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[str] = []
    monkeypatch.setattr(container_module, "_post", lambda url: posted.append(url.partition("/")[2].partition("/")[2]))
    bench = make_bench()
    bench.engine = replace(bench.engine, sleep_path="/sleep?level=1", wake_path="/wake_up")

    bench.freeze()
    bench.thaw()

    assert [path.partition("/")[2] for path in posted] == ["sleep?level=1", "wake_up"]
    assert read_facts(bench.hello()).from_snapshot


def test_an_engine_that_does_not_wake_is_told(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.engine = replace(bench.engine, wake_path="/no-such-path")

    with pytest.raises(EngineError, match="did not obey"):
        bench.thaw()


def test_a_closed_container_leaves_no_process(make_bench: Callable[..., Bench]) -> None:
    import psutil

    bench = make_bench()
    events_of(bench, order(bench, replace(PLAN, repeats=1)))
    children = psutil.Process().children(recursive=True)
    assert children

    bench.close()

    wait_until(lambda: not alive(children))
