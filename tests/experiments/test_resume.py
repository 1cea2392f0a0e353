"""Which result of an earlier run answers a plan's question, and which only looks like it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engines.base import Engine
from engines.local import LocalHost
from experiments import baseline, speculation
from experiments.base import Experiment, Plan
from experiments.result import EngineRow, ExperimentResult, RequestRow
from experiments.resume import measured_already
from experiments.speculation import SpeculationPlan
from tests.experiments.test_result import answer_at, result_of

MakeEngine = Callable[..., Engine]
MakeHost = Callable[..., LocalHost]
PLAN = Plan("Go.", ("quick", "slow"), dollars_per_hour=1.5)
SWEEP = SpeculationPlan("One?\nTwo?", ("quick",), draft_tokens=(1, 3))
BOTH: list[tuple[Experiment, Plan]] = [(baseline.EXPERIMENT, PLAN), (speculation.EXPERIMENT, SWEEP)]


@pytest.fixture
def host(scripted: MakeEngine, make_host: MakeHost) -> LocalHost:
    return make_host(scripted("quick"), scripted("slow"), model_label="a model", draft_model="/models/draft")


@pytest.fixture
def whole(host: LocalHost) -> ExperimentResult:
    """A baseline of both engines, as this host would write it."""
    return asked_of(host, result_of(quick=[100.0, None], slow=[50.0, 51.0]), PLAN)


@pytest.fixture
def swept(host: LocalHost) -> ExperimentResult:
    """Speculative decoding of one engine with one and with three draft tokens, by the host's draft model."""
    drafts = [{"speculation": {"draft_tokens": count, "draft_model": "/elsewhere/draft"}} for count in (1, 3)]
    rows = [EngineRow("quick", "Quick", "#0072B2")]
    rows += [
        EngineRow(f"quick+draft_model-{count}", "Quick", "#0072B2", f"{count} tokens", "quick", config=config)
        for count, config in zip((1, 3), drafts, strict=True)
    ]
    requests = tuple(RequestRow(row.name, 1, False, answer_at(100.0, 0.1), "prompt 1") for row in rows)
    result = replace(result_of(), experiment="speculation", id="speculation-1", engines=tuple(rows), requests=requests)
    return asked_of(host, result, SWEEP)


def asked_of(host: LocalHost, result: ExperimentResult, plan: Plan) -> ExperimentResult:
    hardware = {**asdict(host.hardware), "words": host.hardware.words}
    return replace(result, settings=asdict(plan), model=host.model_label, hardware=hardware)


def broken(result: ExperimentResult, name: str, **changes: str) -> ExperimentResult:
    rows = [replace(row, **changes) if row.name == name else row for row in result.engines]  # type: ignore[arg-type]
    return replace(result, engines=tuple(rows))


def test_a_whole_result_of_the_same_question_is_found_for_its_experiment(
    host: LocalHost, whole: ExperimentResult, swept: ExperimentResult, tmp_path: Path
) -> None:
    assert measured_already(BOTH, host, tmp_path / "nowhere") == {}
    first = whole.save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {"baseline": first}
    # Its settings hold tuples, which are lists in its file; its draft model lay in another folder.
    second = swept.save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {"baseline": first, "speculation": second}


def test_an_engine_that_cannot_do_it_here_counts_as_measured(
    host: LocalHost, whole: ExperimentResult, tmp_path: Path
) -> None:
    path = broken(whole, "slow", unavailable="It cannot do this.").save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {"baseline": path}


@pytest.mark.parametrize(
    "changed",
    [
        lambda result: replace(result, stopped_early=True),
        lambda result: broken(result, "slow", error="It could not start."),
        lambda result: replace(result, engines=result.engines[:1]),
        lambda result: replace(result, requests=result.requests[1:2]),  # the one that failed
        lambda result: replace(result, settings={**result.settings, "repeats": 4}),
        lambda result: replace(result, settings={**result.settings, "engines": ("slow", "quick")}),
        lambda result: replace(result, settings={"prompt": "Go."}),
        lambda result: replace(result, model="another model"),
        lambda result: replace(result, hardware={**result.hardware, "words": "Another CPU"}),
        lambda result: replace(result, hardware={}),
    ],
    ids="stopped error missing failed repeats engines older model machine unknown".split(),
)
def test_a_part_of_a_result_or_another_question_is_not_enough(
    host: LocalHost,
    whole: ExperimentResult,
    tmp_path: Path,
    changed: Callable[[ExperimentResult], ExperimentResult],
) -> None:
    changed(whole).save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {}


def test_every_variant_must_be_there_and_have_used_the_same_draft_model(
    host: LocalHost, scripted: MakeEngine, make_host: MakeHost, swept: ExperimentResult, tmp_path: Path
) -> None:
    swept.save(tmp_path)
    for draft in ("/models/another", None):
        engines = (scripted("quick"), scripted("slow"))
        assert measured_already(BOTH, make_host(*engines, model_label="a model", draft_model=draft), tmp_path) == {}
    replace(swept, engines=swept.engines[:2]).save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {}
    broken(swept, "quick+draft_model-3", error="no memory").save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {}


def test_a_plan_that_the_host_cannot_run_is_answered_by_nothing(
    scripted: MakeEngine, make_host: MakeHost, host: LocalHost, whole: ExperimentResult, tmp_path: Path
) -> None:
    plan = replace(SWEEP, method="draft_model")
    rows = replace(whole, experiment="speculation", id="speculation-2")
    asked_of(host, rows, plan).save(tmp_path)
    path = whole.save(tmp_path)
    draftless = make_host(scripted("quick"), scripted("slow"), model_label="a model")
    plans = [(speculation.EXPERIMENT, plan), BOTH[0]]
    assert measured_already(plans, draftless, tmp_path) == {"baseline": path}


def test_of_several_the_newest_is_named_and_what_cannot_be_read_is_passed_over(
    host: LocalHost, whole: ExperimentResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bakeoff")
    for day in ("22", "24", "23"):
        replace(whole, id=f"baseline-202611{day}-120000-abcdef").save(tmp_path)
    (tmp_path / "half.json").write_text(whole.to_json()[:500], encoding="utf-8")
    (tmp_path / "other.json").write_text(json.dumps({"name": "somebody else's"}), encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "notes.txt").write_text("no result", encoding="utf-8")
    found = measured_already(BOTH, host, tmp_path)
    assert found == {"baseline": tmp_path / "baseline-20261124-120000-abcdef.json"}
    passed = [f"{tmp_path / name} is passed over: This file " for name in ("folder.json", "half.json", "other.json")]
    assert len(caplog.messages) == 3
    assert all(message.startswith(words) for message, words in zip(caplog.messages, passed, strict=True))


def test_a_result_from_before_a_setting_existed_was_measured_by_its_default(
    host: LocalHost, swept: ExperimentResult, tmp_path: Path
) -> None:
    older = {name: value for name, value in swept.settings.items() if name != "simulated_acceptance"}
    path = replace(swept, settings=older).save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {"speculation": path}
    simulated = [(speculation.EXPERIMENT, replace(SWEEP, simulated_acceptance=(1.5,)))]
    assert measured_already(simulated, host, tmp_path) == {}


@pytest.mark.parametrize(("name", "value"), [("cache_gib", 8.0), ("random_weights", True), ("tensor_parallel", 2)])
def test_engines_that_had_another_part_of_the_machine_are_measured_anew(
    host: LocalHost, whole: ExperimentResult, tmp_path: Path, name: str, value: object
) -> None:
    now = asdict(host.config("quick"))
    as_now = replace(whole, engines=tuple(replace(row, config=now) for row in whole.engines))
    path = as_now.save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {"baseline": path}
    other = replace(whole, engines=tuple(replace(row, config={**now, name: value}) for row in whole.engines))
    other.save(tmp_path)
    assert measured_already(BOTH, host, tmp_path) == {}
