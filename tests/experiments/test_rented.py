"""Whole runs on rented machines: Modal's own client, a control plane on this machine, our containers' code in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import modal
import pytest
from grpclib import Status as GrpcStatus

import modal_app
from engines import modal_cloud, rented
from engines.base import Engine
from engines.modal_cloud import ModalCloud, stamped
from engines.rented import NOTHING_LEFT, RentedHost
from engines.scripted import Script, scripted_engine
from engines.spending import Limits
from experiments import rented as rented_runs
from experiments.base import EngineFailed, Event, Plan, PlanError, RunEnded, Spending, TokensArrived, TrialStarted
from experiments.baseline import EXPERIMENT
from experiments.concurrency import EXPERIMENT as CONCURRENCY
from experiments.container import Bench
from experiments.prefix_caching import EXPERIMENT as PREFIX
from experiments.rehearsal import RehearsalCloud
from experiments.rented import MODELS, Rent, RentedMachine, read_rent, rent_settings, run_rented
from experiments.report import figures, notes, text_table
from experiments.result import ExperimentResult
from experiments.speculation import EXPERIMENT as SPECULATION
from tests.conftest import MACHINE, wait_until
from tests.loopback import (
    ControlPlane,
    Failure,
    Fault,
    Preemption,
    Wait,
    connected,
    current_call,
    running_control_plane,
)

PLAN = Plan("Go on.", ("vllm", "sglang"), repeats=2, warmups=1, max_tokens=6)
RENT = Rent("bundled", "L4")


def engines(**script: Any) -> tuple[Engine, ...]:
    """Scripted engines under the names of those that are deployed."""
    settings = {"start": 0.05, "first_token": 0.005, "gap": 0.001, **script}
    return tuple(
        scripted_engine(name, label, colour, Script(**settings))
        for name, label, colour in (("vllm", "vLLM", "#0072B2"), ("sglang", "SGLang", "#D55E00"))
    )


class Rented:
    """A rented host over a control plane whose containers run our real code, with scripted engines in them."""

    def __init__(self, plane: ControlPlane, client: modal.Client, cache: Path, script: dict[str, Any]) -> None:
        self.plane, self.cache = plane, cache
        self.engines = engines(**script)
        self.benches: dict[str, Bench] = {}
        for engine in self.engines:
            name = modal_cloud.class_name(engine.name)
            plane.handlers[f"{name}.hello"] = self.hello(engine.name)
            plane.handlers[f"{name}.measure"] = self.measure(engine.name)
        self.host = RentedHost(ModalCloud(client=client), self.engines, cache / "page")
        self.events: list[Event] = []

    def bench(self, engine: str, parameters: dict[str, Any]) -> Bench:
        key = json.dumps([engine, parameters], sort_keys=True)
        if key not in self.benches:
            told = (parameters["model"], parameters["draft_model"], parameters["features"])
            self.benches[key] = Bench(engine, *told, self.cache, self.engines, hardware=MACHINE)
        return self.benches[key]

    def hello(self, engine: str) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]:
        async def handler(parameters: dict[str, Any]) -> dict[str, Any]:
            return self.bench(engine, parameters).hello()

        return handler

    def measure(self, engine: str) -> Callable[[dict[str, Any], str], AsyncIterator[str]]:
        async def handler(parameters: dict[str, Any], order: str) -> AsyncIterator[str]:
            items = self.bench(engine, parameters).measure(order)
            told = stamped(current_call.get().id, items)
            try:
                while (item := await asyncio.to_thread(next, told, None)) is not None:
                    yield item
            finally:
                while items.gi_running:  # a cancelled call's thread is still waiting for the next item
                    await asyncio.sleep(0.01)
                items.close()

        return handler

    def run(self, plan: Plan = PLAN, rent: Rent = RENT, experiment: Any = EXPERIMENT) -> ExperimentResult:
        machine = RentedMachine(self.host, rent, "a visitor")
        return asyncio.run(run_rented(experiment, plan, machine, self.events.append))

    def measuring_calls(self) -> list[Any]:
        return [call for call in self.plane.calls if call.name.endswith(".measure")]


@pytest.fixture(scope="module")
def modal_here() -> Iterator[tuple[ControlPlane, modal.Client]]:
    with running_control_plane() as (plane, url), connected(url) as client:
        modal_app.app.deploy(client=client)
        yield plane, client


@pytest.fixture
def rent_from(
    modal_here: tuple[ControlPlane, modal.Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Rented]]:
    """Make a rented host; its control plane forgets what the test before has done."""
    monkeypatch.setattr(modal_cloud, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(rented, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(rented_runs, "LOOK_SECONDS", 0.1)
    plane, client = modal_here
    made: list[Rented] = []

    def make(**script: Any) -> Rented:
        made.append(Rented(plane, client, tmp_path, script))
        return made[-1]

    monkeypatch.setattr(modal_cloud, "IDLE_SECONDS", 2)
    plane.rates = {}  # so that the dated table counts
    for kept in (plane.calls, plane.waits, plane.faults, plane.preemptions):
        kept.clear()
    yield make
    for one in made:
        one.host.close()
        for bench in one.benches.values():
            bench.close()


def test_a_whole_comparison_is_one_result(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()

    result = on_modal.run()

    assert [row.name for row in result.engines] == ["vllm", "sglang"]
    for row in result.engines:
        measured = result.measured(row.name)
        assert [request.metrics.output_tokens for request in measured] == [6, 6]
        assert row.hardware == MACHINE.words and row.network_seconds is not None and row.version
        first, second, third, *phases = row.start_phases
        assert (first, second, third) == ("waiting for a GPU", "starting the container", "loading our code")
        assert "loading weights" in phases
    assert (result.host, result.hardware["words"]) == ("modal", MACHINE.words)
    assert len(result.trials) == 2 * 3 and all(trial.generator for trial in result.trials)
    assert not result.stopped_early and not any(row.error for row in result.engines)
    assert result.model_shape and result.bandwidth
    assert result.settings["rent"]["gpu"] == "L4"


def test_a_rented_result_survives_its_file_and_can_be_told(rent_from: Callable[..., Rented]) -> None:
    result = rent_from().run()

    again = ExperimentResult.from_json(result.to_json())

    assert replace(again, settings={}) == replace(result, settings={})
    assert again.settings == json.loads(json.dumps(result.settings))
    assert {"speed", "start"} <= set(figures(again))
    said = "\n".join(notes(again))
    assert "Measured in containers on Modal: 1 x L4, 4 cores and 32 GiB for each engine." in said
    assert "GPU-seconds, about $" in said and "there and back" in said
    assert "vLLM" in text_table(again)


def test_what_it_costs_is_told_while_it_runs_and_kept(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from(gap=0.02)

    result = on_modal.run(replace(PLAN, max_tokens=40))

    told = [event.spent.dollars for event in on_modal.events if isinstance(event, Spending)]
    assert len(told) > 2 and told == sorted(told)
    assert result.spent and result.spent.dollars == pytest.approx(told[-1], rel=0.01)
    # $/s of an L4, 4 cores and 32 GiB; the container is counted for 5 s more, in which it ends.
    rate = 0.80 / 3600 + 4 * 0.0000131 + 32 * 0.00000222
    assert result.spent.dollars == pytest.approx(result.spent.container_seconds * rate)
    assert result.spent.container_seconds > 2 * 5
    assert result.price and result.price.dollars_per_hour == pytest.approx(rate * 3600)
    (line,) = on_modal.host.ledger.path.read_text().splitlines()
    assert json.loads(line)["dollars"] == pytest.approx(result.spent.dollars) and "a visitor" not in line


def test_trials_are_counted_over_all_containers(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()

    on_modal.run()

    counted = [(event.done, event.of) for event in on_modal.events if isinstance(event, TrialStarted)]
    assert {of for _, of in counted} == {6} and max(done for done, _ in counted) >= 4


def test_variants_of_one_engine_get_containers_of_their_own_one_after_the_other(
    rent_from: Callable[..., Rented],
) -> None:
    on_modal = rent_from()
    plan = PREFIX.read_plan(("vllm",), {"repeats": 1, "warmups": 0, "max_tokens": 3})

    result = on_modal.run(plan, experiment=PREFIX)

    assert len(on_modal.benches) == len(result.engines) == 2
    first, second = on_modal.measuring_calls()
    assert first.variant is not second.variant
    ends = {row.name: max(t.ended for t in result.trials if t.engine == row.name) for row in result.engines}
    begins = {row.name: min(t.began for t in result.trials if t.engine == row.name) for row in result.engines}
    assert begins[result.engines[1].name] > ends[result.engines[0].name]


def test_speculation_and_concurrency_run_in_containers_too(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()
    speculation = SPECULATION.read_plan(("vllm",), {"repeats": 1, "warmups": 0, "max_tokens": 6, "prompt": "Go on."})
    levels = CONCURRENCY.read_plan(("vllm",), {"levels": "1, 4", "repeats": 1, "warmups": 0, "max_tokens": 4})

    guessed = on_modal.run(speculation, experiment=SPECULATION)
    crowd = on_modal.run(levels, experiment=CONCURRENCY)

    assert [row.name for row in guessed.engines] == ["vllm", "vllm+draft_model-3"]
    assert guessed.speculation("vllm+draft_model-3").drafted > 0  # type: ignore[union-attr]
    assert len(crowd.measured("vllm", "4")) == 4 and not crowd.failures("vllm")


def test_nothing_is_left_running(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()

    on_modal.run()

    assert on_modal.host.status("vllm").phase in ("letting its container go", NOTHING_LEFT)
    wait_until(lambda: on_modal.host.status("vllm").phase == NOTHING_LEFT, 40)


def test_stopping_cancels_the_calls_and_keeps_what_was_measured(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from(gap=0.02)

    async def stopped() -> None:
        machine = RentedMachine(on_modal.host, RENT)
        plan = replace(PLAN, repeats=20, max_tokens=20)
        running = asyncio.ensure_future(run_rented(EXPERIMENT, plan, machine, on_modal.events.append))
        while not any(type(event).__name__ == "TrialEnded" for event in on_modal.events):
            await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(stopped())

    last = on_modal.events[-1]
    assert isinstance(last, RunEnded) and last.result.stopped_early and last.result.trials
    assert [call.cancelled for call in on_modal.measuring_calls()] == [True, True]
    assert on_modal.host.status("vllm").light == "down"


def test_a_spent_budget_stops_the_run_cleanly(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from(gap=0.02)
    on_modal.host.limits = Limits(per_run=50.0)
    plan = replace(PLAN, repeats=20, max_tokens=50, dollars_per_hour=3600.0)  # a dollar per second and engine

    result = on_modal.run(plan, replace(RENT, budget=6.0))

    assert result.stopped_early and result.trials
    assert "Stopped at its budget of $6.00: what was measured until then is shown." in result.labels
    assert [call.cancelled for call in on_modal.measuring_calls()] == [True, True]
    assert result.spent and 6.0 <= result.spent.dollars < 6.0 + 2 * 5 + 4  # type: ignore[operator]


def test_a_container_is_told_after_how_long_the_budget_is_spent(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()
    on_modal.host.limits = Limits(per_run=None)

    on_modal.run(replace(PLAN, dollars_per_hour=3600.0, engines=("vllm",)), replace(RENT, budget=100.0))

    (call,) = on_modal.measuring_calls()
    assert 90 < json.loads(call.arguments[0])["limit_seconds"] <= 100


def test_an_exhausted_day_is_told_and_rents_nothing(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()
    on_modal.host.limits = Limits(None, None, 0.000001)
    on_modal.run(replace(PLAN, engines=("vllm",)))
    calls = len(on_modal.plane.calls)

    result = on_modal.run()

    assert len(on_modal.plane.calls) == calls
    assert all("Nothing is left of this page's budget for today" in (row.error or "") for row in result.engines)


def forget_prices(on_modal: Rented) -> None:
    """No GPU's price is known any more."""
    asyncio.run(on_modal.host.rates())
    asked, rates = on_modal.host._rates  # type: ignore[misc]
    on_modal.host._rates = (asked, replace(rates, gpus={}))


def test_a_gpu_without_a_price_cannot_keep_a_budget(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()
    forget_prices(on_modal)

    result = on_modal.run(rent=replace(RENT, gpu="T4"))

    assert all("The price of the T4 is not known" in (row.error or "") for row in result.engines)
    assert on_modal.plane.calls == []


def test_without_any_limit_a_gpu_needs_no_price(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()
    on_modal.host.limits = Limits(None, None, None)
    forget_prices(on_modal)

    result = on_modal.run(rent=replace(RENT, gpu="T4"))

    assert result.spent and result.spent.dollars is None and result.spent.gpu_seconds > 0
    assert "at a price that is not known" in "\n".join(notes(result))


def test_one_engine_s_failure_leaves_the_other_s_result(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()

    async def killed(parameters: dict[str, Any], order: str) -> AsyncIterator[str]:
        yield f"life 0 {current_call.get().id}"
        raise Failure("FAILURE", "Container killed: out of memory (exit code 137)", container_lost=True)

    on_modal.plane.handlers["VllmEngine.measure"] = killed

    result = on_modal.run()

    vllm, sglang = result.engines
    assert "ran out of memory" in (vllm.error or "") and not sglang.error
    assert len(result.measured("sglang")) == 2
    assert on_modal.host.status("vllm").light == "failed"
    assert [event.row.name for event in on_modal.events if isinstance(event, EngineFailed)] == ["vllm"]


def test_an_engine_that_dies_in_its_container_shows_the_end_of_its_log(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from(fault="exit at start")

    result = on_modal.run(replace(PLAN, engines=("vllm",)))

    (row,) = result.engines
    assert row.error and "the script says so" in row.error + row.log_tail
    assert on_modal.host.status("vllm").light == "failed" and on_modal.host.status("vllm").log_tail


def test_without_a_token_every_lane_says_what_to_do(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()
    on_modal.plane.faults["*"] = Fault(GrpcStatus.UNAUTHENTICATED, "Token validation failed")

    result = on_modal.run()

    assert all("modal token new" in (row.error or "") for row in result.engines)


def test_a_preempted_container_s_work_is_measured_anew(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from(gap=0.02)
    on_modal.plane.preemptions["VllmEngine.measure"] = Preemption(after=8)

    result = on_modal.run(replace(PLAN, engines=("vllm",), max_tokens=40))

    (call,) = on_modal.measuring_calls()
    assert call.starts == 2
    assert len(result.measured("vllm")) == 2 and len(result.trials) == 3
    assert any("container away in mid-run; it was measured anew" in label for label in result.labels)


def test_a_kept_container_is_found_again_without_a_start(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()
    rent, plan = replace(RENT, keep_seconds=60), replace(PLAN, engines=("vllm",))

    first, second = on_modal.run(plan, rent), on_modal.run(plan, rent)

    assert first.engines[0].start_phases and not second.engines[0].start_phases
    assert on_modal.host.status("vllm").phase == "its container is kept for 60 s"
    assert first.spent and first.spent.container_seconds > 60


def test_the_queue_stands_in_the_start(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from()
    on_modal.plane.waits["VllmEngine"] = Wait(queued=1.5, starting=0.5)

    result = on_modal.run(replace(PLAN, engines=("vllm",)), replace(RENT, gpu_count=2))  # which none has kept

    # The container is this process, which lives longer than that: what belongs to which stage cannot be told here.
    phases = result.engines[0].start_phases
    assert phases["waiting for a GPU"] + phases["starting the container"] + phases["loading our code"] > 2.0


def test_closing_the_app_in_mid_run_cancels_its_calls(rent_from: Callable[..., Rented]) -> None:
    on_modal = rent_from(gap=0.05)

    async def closed() -> ExperimentResult:
        machine = RentedMachine(on_modal.host, RENT)
        plan = replace(PLAN, repeats=20, max_tokens=50)
        running = asyncio.ensure_future(run_rented(EXPERIMENT, plan, machine, on_modal.events.append))
        while not any(isinstance(event, TokensArrived) for event in on_modal.events):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(on_modal.host.close)
        return await running

    result = asyncio.run(closed())

    assert result.stopped_early
    assert [call.cancelled for call in on_modal.measuring_calls()] == [True, True]


# What can be rented


@contextmanager
def refused(field: str, words: str) -> Iterator[None]:
    with pytest.raises(PlanError, match=words) as caught:
        yield
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"model": " "}, "model", "Name a model"),
        ({"model": "/root/model"}, "model", "cannot read folders"),
        ({"gpu": "X999"}, "gpu", "no GPU called 'X999'"),
        ({"gpu_count": 0}, "gpu_count", "from 1 to 8"),
        ({"gpu_count": 4, "replicas": 4}, "replicas", "at most 8 GPUs"),
        ({"gpu": "A10", "gpu_count": 8}, "replicas", "at most 4 GPUs"),
        ({"keep_seconds": -1}, "keep_seconds", "from 0 to 1200"),
        ({"budget": 0.0}, "budget", "from 0.01 to 1000"),
    ],
)
def test_what_cannot_be_rented_is_told_where_it_was_typed(changes: dict[str, Any], field: str, words: str) -> None:
    with refused(field, words):
        replace(RENT, **changes)


@pytest.mark.parametrize(
    ("experiment", "gpu", "model"),
    [
        ("baseline", "L4", "Qwen/Qwen3.5-4B"),
        ("speculation", "L4", "Qwen/Qwen3.5-4B"),
        ("prefix-caching", "L4", "Qwen/Qwen3.5-4B"),
        ("concurrency", "H100!", "google/gemma-4-26B-A4B-it"),
    ],
)
def test_each_experiment_suggests_what_the_published_runs_used(experiment: str, gpu: str, model: str) -> None:
    host = RentedHost(RehearsalCloud(), engines())

    rent = read_rent(experiment, host, {})

    assert (rent.gpu, rent.model) == (gpu, model)


def test_a_model_with_a_prediction_head_speculates_with_it() -> None:
    host = RentedHost(RehearsalCloud(), engines())
    machine = RentedMachine(host, Rent(MODELS[0].id))

    keys = [one.key for one in SPECULATION.contenders(SPECULATION.read_plan(("vllm",), {}), machine)]

    assert keys == ["vllm", "vllm+mtp-3"]


def test_several_gpus_reach_the_engine_s_own_flags_and_the_container() -> None:
    host = RentedHost(RehearsalCloud(), modal_app.ENGINES)
    machine = RentedMachine(host, Rent("Qwen/Qwen3.5-4B", "H100!", gpu_count=2, replicas=2))
    (contender,) = EXPERIMENT.contenders(replace(PLAN, engines=("vllm",)), machine)

    command = contender.engine.serve_command(contender.config(machine))
    rental = machine.rental(contender)

    assert command[command.index("--tensor-parallel-size") + 1] == "2"
    assert command[command.index("--data-parallel-size") + 1] == "2"
    assert rental.gpu_words == "H100!:4"
    assert json.loads(rental.features) == {"replicas": 2, "tensor_parallel": 2}


def test_every_field_of_a_rent_can_be_set() -> None:
    host = RentedHost(RehearsalCloud(), engines())

    names = {setting.name for setting in rent_settings("baseline", host)}

    assert names == {field.name for field in Rent.__dataclass_fields__.values()}
