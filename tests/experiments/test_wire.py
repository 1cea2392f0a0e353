"""What travels between the page and a rented container comes out as it went in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from engines import ENGINES
from engines.base import EngineError, Speculation, SpeculationCounters, Usage
from engines.load import GeneratorHealth
from engines.local import Status
from engines.rented import RentedHost
from engines.server import PhaseTime
from engines.spending import Spent
from engines.timeline import Arrival, Timeline
from experiments import EXPERIMENTS, EXPERIMENTS_BY_NAME
from experiments.base import (
    Contender,
    EngineFailed,
    EngineReady,
    Event,
    Experiment,
    RequestEnded,
    RequestStarted,
    RunEnded,
    Spending,
    TokensArrived,
    Trial,
    TrialEnded,
    TrialStarted,
)
from experiments.library import RECORDINGS, read
from experiments.rehearsal import RehearsalCloud
from experiments.rented import MODELS, Rent, RentedMachine
from experiments.replay import schedule
from experiments.result import EngineRow, RequestRow, TrialRow
from experiments.wire import (
    BUNDLED,
    TOLD,
    Order,
    changes_from_json,
    changes_to_json,
    decoded,
    encoded,
    order_from_json,
    order_to_json,
)
from tests.experiments.test_result import LIMITS, result_of

COUNTED = SpeculationCounters(4, 12, 8, (4, 2, 2))
ROW = EngineRow(
    "quick+ngram-3",
    "Quick",
    "#0072B2",
    "n-gram look-up, 3 tokens",
    "quick",
    version="1.0",
    command="quick serve --port 8000",
    config={"model": "owner/model", "speculation": {"method": "ngram", "draft_tokens": 3, "draft_model": None}},
    installed={"quick": "1.0"},
    start_phases={"waiting for a GPU": 2.5, "importing": 4.0},
    caveat="A caveat.",
    hardware="NVIDIA L4 (22 GiB)",
    network_seconds=0.09,
)
TIMELINE = Timeline(
    5.0, (Arrival(0.1, " one", tokens=1), Arrival(0.2, "", True)), 0.25, Usage(7, 2, 3, COUNTED), "per chunk", "length"
)
HEALTH = GeneratorHealth("kernel", 2.0, 0.5, 0.001, 40, (0.001, 0.002, 0.003))
EVENTS: tuple[Event | Status, ...] = (
    EngineReady(ROW),
    EngineFailed(EngineRow("broken", "Broken", "#000000", error="It broke.", log_tail='line 1\n"line 2"')),
    EngineFailed(EngineRow("unable", "Unable", "#000000", unavailable="It cannot.")),
    TrialStarted(
        "quick", Trial("repeat 1 of 3", 1, False, ("One?", "Two?"), "2", 0.1, 20.0, True, ("quick",), 16), 9, 4
    ),
    TrialStarted("quick", Trial("warm-up 1 of 1", 1, True, ("One?",)), 1, 0),
    RequestStarted("quick", 3),
    TokensArrived("quick", Arrival(0.1, "é 😀 \n\"'</script>\u2028\x00", tokens=2), 3),
    TokensArrived("quick", Arrival(1 / 3, " thought", reasoning=True)),
    RequestEnded(RequestRow("quick", 1, False, TIMELINE, "prompt 1", 3, 4.75)),
    RequestEnded(RequestRow("quick", 1, True, Timeline(5.0, error="HTTP 500"))),
    TrialEnded(TrialRow("quick", "prompt 1", 1, False, 5.0, 7.5, COUNTED, True, HEALTH)),
    TrialEnded(TrialRow("quick", "", 1, True, 5.0, 7.5)),
    Spending(Spent(10.5, 21.0, 0.0036, "by hand"), 1.0),
    Spending(Spent(10.5, 21.0, None, "nobody says"), None),
    RunEnded(
        replace(result_of(), engines=(ROW,), labels=("A label.",), spent=Spent(1.0, 1.0, 0.1, "by hand"), **LIMITS)
    ),
    Status(
        "starting", "loading weights", 12.5, phases=(PhaseTime("importing", 4.0),), version="1.0", install_seconds=3.0
    ),
    Status("failed", error="It broke.", log_tail="line 1\nline 2"),
)


# Events


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_arrives_as_it_was_told(event: Event | Status) -> None:
    assert decoded(encoded([event])) == [event]


def test_every_kind_of_event_can_travel() -> None:
    assert {type(event) for event in EVENTS} == {*get_args(Event), Status} == set(TOLD.values())


def test_many_events_arrive_in_their_order() -> None:
    assert decoded(encoded(EVENTS)) == list(EVENTS)


def test_no_events_are_an_empty_list() -> None:
    assert encoded([]) == "[]"
    assert decoded("[]") == []


def test_a_runs_end_comes_back_without_the_requests_and_trials_that_came_before_it() -> None:
    result = replace(result_of(quick=[50.0]), trials=(TrialRow("quick", "", 1, False, 0.0, 1.0),))
    assert result.requests and result.trials
    assert decoded(encoded([RunEnded(result)])) == [RunEnded(replace(result, requests=(), trials=()))]


def test_a_request_whose_metrics_were_made_already_arrives_the_same() -> None:
    row = RequestRow("quick", 1, False, TIMELINE)
    assert row.metrics.output_tokens == 2
    assert encoded([RequestEnded(row)]) == encoded([RequestEnded(RequestRow("quick", 1, False, TIMELINE))])


@pytest.mark.parametrize("experiment", EXPERIMENTS_BY_NAME)
def test_everything_that_happened_in_a_recording_survives(experiment: str) -> None:
    (path,) = RECORDINGS.glob(f"{experiment}-2*.json")
    result = read(path)
    timed = [event for _, event in schedule(result)]
    events = [*timed[:-1], *map(TrialEnded, result.trials)]
    assert timed[-1] == RunEnded(result)
    assert len(result.trials) > 0
    assert decoded(encoded(events)) == events
    assert decoded(encoded(timed[-1:])) == [RunEnded(replace(result, requests=(), trials=()))]


@pytest.mark.parametrize(
    "item",
    [
        "",
        "restarted",
        "Traceback (most recent call last):",
        "null",
        "5",
        "[5]",
        "[null]",
        '["Status"]',
        '[["Status"]]',
        '[["Status", {}, 1]]',
        '[["Nothing", {}]]',
        "[[[], {}]]",
        '[["TrialEnded", {}]]',
        '[["Status", {"light": "purple"}]]',
        '[["RequestStarted", {"engine": "quick", "index": "first"}]]',
        '[["RequestStarted", {"engine": "quick"}], ["TokensArrived", null]]',
    ],
)
def test_what_is_no_event_is_refused_in_words(item: str) -> None:
    with pytest.raises(EngineError, match="^The container sent something that is no event: ") as caught:
        decoded(item)
    assert caught.value.message.endswith(item)


def test_of_a_long_item_that_is_no_event_the_beginning_is_told() -> None:
    with pytest.raises(EngineError) as caught:
        decoded("x" * 10_000)
    assert caught.value.message.endswith(f": {'x' * 120}")


def test_half_a_character_in_an_answer_does_not_end_the_run() -> None:
    event = TokensArrived("quick", Arrival(0.1, "half: \ud83d"))
    (again,) = decoded(encoded([event]))
    assert isinstance(again, TokensArrived)
    assert again.arrival.text.startswith("half: ")


# Orders


@pytest.fixture
def rented(tmp_path: Path) -> Callable[..., RentedMachine]:
    """What a run on rented machines runs on: `rented(model="bundled", gpu_count=2)`."""

    def make(model: str = MODELS[0].id, **rent: Any) -> RentedMachine:
        host = RentedHost(RehearsalCloud(), ENGINES, tmp_path / "cache")
        return RentedMachine(host, Rent(model, **rent))

    return make


def order_for(experiment: Experiment, machine: RentedMachine, **typed: Any) -> Order:
    plan = experiment.read_plan(tuple(engine.name for engine in ENGINES), typed)
    contenders = experiment.contenders(plan, machine)
    return Order(experiment.name, plan, contenders, contenders[-1].key, 123.5, leave=False)


def come_back(order: Order, draft_model: str | None = None) -> Order:
    return order_from_json(order_to_json(order), EXPERIMENTS, ENGINES, draft_model)


@pytest.mark.parametrize("model", [one.id for one in MODELS])
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_an_order_arrives_as_it_was_given(
    rented: Callable[..., RentedMachine], experiment: Experiment, model: str
) -> None:
    order = order_for(experiment, rented(model))
    again = come_back(order, draft_model=BUNDLED)
    assert again == order
    assert type(again.plan) is experiment.plan
    assert [one.engine for one in again.contenders] == [one.engine for one in order.contenders]


def test_an_order_keeps_what_was_typed(rented: Callable[..., RentedMachine]) -> None:
    typed = {"prompt": "Größe? “Ja”\nTwo?", "draft_tokens": "1, 5", "max_tokens": 64.0, "repeats": 2}
    plan = come_back(order_for(EXPERIMENTS_BY_NAME["speculation"], rented(), **typed)).plan
    assert (plan.prompts, plan.draft_tokens, plan.max_tokens) == (("Größe? “Ja”", "Two?"), (1, 5), 64)


def test_an_order_without_a_limit_lets_the_container_go(rented: Callable[..., RentedMachine]) -> None:
    order = replace(order_for(EXPERIMENTS[0], rented()), limit_seconds=None, leave=True)
    assert come_back(order) == order


def test_contenders_that_cannot_run_keep_their_reason(rented: Callable[..., RentedMachine]) -> None:
    order = order_for(EXPERIMENTS_BY_NAME["speculation"], rented())
    reasons = [one.unavailable for one in come_back(order).contenders]
    assert reasons == [one.unavailable for one in order.contenders]
    assert any("no speculative decoding" in reason for reason in reasons)


def test_the_bundled_draft_is_the_containers_own(rented: Callable[..., RentedMachine]) -> None:
    order = order_for(EXPERIMENTS_BY_NAME["speculation"], rented(BUNDLED))
    drafting = [one for one in come_back(order, "/root/weights/draft").contenders if one.changes]
    assert {one.changes["speculation"] for one in drafting} == {Speculation("draft_model", 3, "/root/weights/draft")}
    assert {one.changes["speculation"].draft_model for one in order.contenders if one.changes} == {BUNDLED}


def test_a_container_without_the_bundled_draft_says_so(rented: Callable[..., RentedMachine]) -> None:
    order = order_for(EXPERIMENTS_BY_NAME["speculation"], rented(BUNDLED))
    with pytest.raises(EngineError, match="needs the draft model's folder or name"):
        come_back(order)


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda told: {key: value for key, value in told.items() if key != name}


def with_contender(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda told: {**told, "contenders": [{**told["contenders"][0], **changes}]}


@pytest.mark.parametrize(
    "broken",
    [
        lambda told: None,
        lambda told: [],
        lambda told: {},
        lambda told: {**told, "experiment": "unheard of"},
        lambda told: {**told, "contenders": 5},
        lambda told: {**told, "plan": {**told["plan"], "repeats": 0}},
        lambda told: {**told, "plan": {**told["plan"], "prompt": " "}},
        lambda told: {**told, "plan": {}},
        without("only"),
        without("leave"),
        with_contender(engine="unheard of"),
        with_contender(changes="not JSON"),
        with_contender(changes={}),
        with_contender(changes='{"speculation": {"method": "ngram", "speed": 5}}'),
        with_contender(changes="[]"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_in_words(
    rented: Callable[..., RentedMachine], broken: Callable[[dict[str, Any]], object]
) -> None:
    told = json.loads(order_to_json(order_for(EXPERIMENTS[0], rented())))
    with pytest.raises(EngineError, match="^The container does not understand its order: "):
        order_from_json(json.dumps(broken(told)), EXPERIMENTS, ENGINES)


def test_an_order_that_is_no_json_is_refused_in_words() -> None:
    with pytest.raises(EngineError, match="^The container does not understand its order: "):
        order_from_json("run!", EXPERIMENTS, ENGINES)


# Changes of a configuration


DRAFT = Speculation("draft_model", 4, "/models/draft")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix_caching": True},
        {"continuous_batching": True, "tensor_parallel": 2, "replicas": 4},
        {"speculation": Speculation("mtp", 3), "prefix_caching": False},
        {"speculation": DRAFT},
        {"speculation": None},
    ],
)
def test_changes_arrive_as_they_were_made(changes: dict[str, Any]) -> None:
    assert changes_from_json(changes_to_json(changes)) == changes


def test_changes_read_the_same_in_whatever_order_they_were_made() -> None:
    changes = {"speculation": DRAFT, "tensor_parallel": 2, "prefix_caching": True}
    assert changes_to_json(changes) == changes_to_json(dict(reversed(changes.items())))
    assert changes_to_json(changes) != changes_to_json({**changes, "tensor_parallel": 4})


def test_only_the_bundled_draft_is_replaced_by_the_containers_own() -> None:
    for speculation in (DRAFT, Speculation("ngram", 3)):
        text = changes_to_json({"speculation": speculation})
        assert changes_from_json(text, "/root/weights/draft") == {"speculation": speculation}
    text = changes_to_json({"speculation": replace(DRAFT, draft_model=BUNDLED)})
    assert changes_from_json(text, "/root/draft") == {"speculation": replace(DRAFT, draft_model="/root/draft")}


def test_every_contender_of_a_run_has_containers_of_its_own(rented: Callable[..., RentedMachine]) -> None:
    machine = rented(gpu_count=2, replicas=2)
    contenders: tuple[Contender, ...] = order_for(
        EXPERIMENTS_BY_NAME["speculation"], machine, draft_tokens="1, 3"
    ).contenders
    rentals = [machine.rental(one) for one in contenders]
    assert len(set(rentals)) == len(contenders) == 3 * len(ENGINES)
    assert rentals == [machine.rental(one) for one in contenders]
    assert {rental.gpu_words for rental in rentals} == {"L4:4"}  # 2 GPUs for each of 2 copies
    assert changes_from_json(rentals[0].features) == {"tensor_parallel": 2, "replicas": 2}
