"""Speculative decoding: who takes part, what is asked, and what the counters and speeds come to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.base import Engine, Speculation, SpeculationCounters
from engines.local import LocalHost
from engines.model_shape import has_prediction_head
from engines.random_weights import make_model
from experiments.base import EngineFailed, PlanError, TrialStarted
from experiments.metrics import METRICS
from experiments.report import figures, notes, table
from experiments.result import EngineRow, ExperimentResult, RequestRow, TrialRow
from experiments.run import SIMULATED_LABEL, run
from experiments.speculation import EXPERIMENT, SpeculationPlan, best_method, contenders, headline, speed_up, trials
from tests.engines.tiny_shapes import TINY_GEMMA, TINY_QWEN
from tests.experiments.test_result import answer_at, result_of

MakeEngine = Callable[..., Engine]
MakeHost = Callable[..., LocalHost]


def plan_for(*engines: str, **settings: Any) -> SpeculationPlan:
    common = {"prompt": "One?\nTwo?", "repeats": 1, "warmups": 0, "max_tokens": 8, "method": "ngram"}
    return SpeculationPlan(engines=engines, **{**common, **settings})


def variant(engine: str, count: int) -> EngineRow:
    config = {"speculation": {"draft_tokens": count}}
    words = f"draft model, {count} tokens"
    return EngineRow(f"{engine}+draft_model-{count}", engine.title(), "#0072B2", words, engine, config=config)


def measured(
    speeds: dict[str, list[float]], counters: dict[str, SpeculationCounters] | None = None, *extra: EngineRow
) -> ExperimentResult:
    """A result by hand: decode speeds by row name ("quick", "quick+draft_model-3")."""
    rows = [
        variant(name.partition("+")[0], int(name.rpartition("-")[2]))
        if "+" in name
        else EngineRow(name, name.title(), "#0072B2")
        for name in speeds
    ]
    requests = [
        RequestRow(name, place + 1, False, answer_at(speed, 0.1), "prompt 1")
        for name, values in speeds.items()
        for place, speed in enumerate(values)
    ]
    trial_rows = [TrialRow(name, "prompt 1", 1, False, 0.0, 1.0, counted) for name, counted in (counters or {}).items()]
    return replace(
        result_of(),
        experiment="speculation",
        engines=(*rows, *extra),
        requests=tuple(requests),
        trials=tuple(trial_rows),
        settings={"temperature": 0.0},
    )


# The plan


@pytest.mark.parametrize("counts", [(), (0,), (9,), (3, -1)])
def test_draft_tokens_outside_their_range_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="Draft tokens must be whole numbers from 1 to 8") as caught:
        plan_for("quick", draft_tokens=counts)
    assert caught.value.field == "draft_tokens"


def test_what_is_typed_becomes_a_sweep() -> None:
    plan = EXPERIMENT.read_plan(
        ("quick",), {"draft_tokens": "1, 2,3", "method": "A look-up in the text so far (n-gram)"}
    )
    assert isinstance(plan, SpeculationPlan)
    assert (plan.draft_tokens, plan.method) == ((1, 2, 3), "ngram")
    assert len(plan.prompts) == 4  # the default asks four
    with pytest.raises(PlanError, match="whole numbers with commas"):
        EXPERIMENT.read_plan(("quick",), {"draft_tokens": "1 to 3"})


def test_every_prompt_is_asked_in_each_repeat_and_the_first_warms_up() -> None:
    asked = trials(plan_for("quick", repeats=2, warmups=1), ())
    assert [(trial.warmup, trial.repeat, trial.group, trial.prompts) for trial in asked] == [
        (True, 1, "", ("One?",)),
        (False, 1, "prompt 1", ("One?",)),
        (False, 1, "prompt 2", ("Two?",)),
        (False, 2, "prompt 1", ("One?",)),
        (False, 2, "prompt 2", ("Two?",)),
    ]


# Who takes part


def test_each_engine_comes_without_and_with_each_number_of_draft_tokens(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted("quick"), scripted("unable", speculates=False))
    found = contenders(plan_for("quick", "unable", draft_tokens=(3, 1)), host)
    assert [(one.key, one.compared_with) for one in found] == [
        ("quick", ""),
        ("quick+ngram-1", "quick"),
        ("quick+ngram-3", "quick"),
        ("unable", ""),
        ("unable+ngram-1", "unable"),
        ("unable+ngram-3", "unable"),
    ]
    assert [bool(one.unavailable) for one in found] == [False, False, False, False, True, True]
    assert found[1].variant == "n-gram look-up, 1 token" and found[2].variant == "n-gram look-up, 3 tokens"
    assert found[-1].unavailable == "Unable's script has no speculation."


@pytest.mark.parametrize(
    ("config", "draft", "method"),
    [
        ({"num_nextn_predict_layers": 1}, "/draft", "mtp"),
        ({"text_config": {"mtp_num_hidden_layers": 1}}, None, "mtp"),
        ({"model_type": "qwen3"}, "/draft", "draft_model"),
        ({"model_type": "qwen3", "num_nextn_predict_layers": 0}, None, "ngram"),
    ],
)
def test_the_method_is_what_the_model_offers(
    tmp_path: Path, config: dict[str, Any], draft: str | None, method: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = has_prediction_head(str(tmp_path))
    host: Any = SimpleNamespace(has_prediction_head=lambda: head, draft_model=draft)
    assert best_method(host) == method


def test_a_draft_model_that_is_not_there_is_said_where_the_method_was_chosen(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    with pytest.raises(PlanError, match="brings no draft model") as caught:
        contenders(plan_for("quick", method="draft_model"), make_host(scripted("quick")))
    assert caught.value.field == "method"


# What it comes to


def test_the_speed_up_is_the_ratio_to_the_same_engine_without() -> None:
    result = measured({"quick": [100.0, 100.0], "quick+draft_model-3": [150.0, 150.0], "slow": [10.0, 10.0]})
    plain, with_draft, _ = result.engines
    gain = speed_up(result, with_draft)
    assert gain is not None and gain.value == pytest.approx(1.5)
    assert speed_up(result, plain) is None


COUNTED = SpeculationCounters(steps=100, drafted=300, accepted=210, accepted_at=(90, 70, 50))


def test_the_headline_says_how_much_and_how_good_the_guesses_were() -> None:
    unable = EngineRow("slow+draft_model-3", "Slow", "#000000", "draft model, 3 tokens", "slow", "It cannot.")
    speeds = {"quick": [99.0, 101.0, 100.0], "quick+draft_model-3": [149.0, 151.0, 150.0], "slow": [50.0, 50.0, 50.0]}
    words = headline(measured(speeds, {"quick+draft_model-3": COUNTED}, unable))
    # 210 / 300 accepted; 1 + 210 / 100 tokens per step
    assert words.startswith("Quick, draft model, 3 tokens: 1.50× as fast as without (95 % interval 1.4")
    assert ": 70% of the drafts accepted, 3.10 tokens per step. Slow cannot speculate here." in words


def test_a_loss_is_told_as_a_loss_and_noise_as_noise() -> None:
    loss = headline(measured({"quick": [100.0, 101.0, 99.0], "quick+draft_model-3": [80.0, 81.0, 79.0]}))
    assert "0.80× the speed without, so here it costs more than it saves" in loss
    noise = headline(measured({"quick": [90.0, 110.0, 100.0], "quick+draft_model-3": [95.0, 108.0, 104.0]}))
    assert "no measurable difference" in noise
    assert headline(measured({"quick": [100.0]})) == "No speed-up could be measured."


def test_of_a_sweep_the_headline_tells_the_best() -> None:
    speeds = {
        "quick": [100.0],
        "quick+draft_model-1": [140.0],
        "quick+draft_model-3": [160.0],
        "quick+draft_model-5": [150.0],
    }
    assert headline(measured(speeds)).startswith("Quick, draft model, 3 tokens: 1.60×")


def test_the_table_shows_rate_length_and_positions_and_dashes_for_what_was_not_counted() -> None:
    told = table(
        measured({"quick": [100.0, 100.0], "quick+draft_model-3": [150.0, 150.0]}, {"quick+draft_model-3": COUNTED})
    )
    plain, with_draft = (dict(zip(told.headings, row, strict=True)) for row in told.rows)
    assert (plain["Speed-up"], plain["Drafts accepted"], plain["Tokens per step"]) == ("–", "–", "–")
    assert with_draft["Speed-up"] == "1.50× (1.50–1.50)"
    assert (with_draft["Drafts accepted"], with_draft["Tokens per step"]) == ("70%", "3.10")
    assert with_draft["Accepted at position 1, 2 …"] == "90%, 70%, 50%"


def test_the_charts_are_drawn_for_what_there_is() -> None:
    plain = measured({"quick": [100.0, 100.0]})
    assert set(figures(plain)) == {"speed"}
    speeds = {"quick": [100.0, 100.0], "quick+draft_model-1": [140.0, 140.0], "quick+draft_model-3": [160.0, 160.0]}
    swept = figures(measured(speeds, {"quick+draft_model-3": COUNTED}))
    assert set(swept) == {"speed", "acceptance", "sweep"}
    (bars,) = swept["acceptance"].data
    assert list(bars.y) == pytest.approx([90, 70, 50])
    assert list(swept["sweep"].data[0].x) == [1, 3] and list(swept["sweep"].data[0].y) == pytest.approx([140, 160])
    written = " ".join(note.text for note in swept["speed"].layout.annotations)
    assert "<b>1.60×</b>" in written and "Test CPU" in written


# A run against a server whose guesses are known


def test_counters_and_speed_up_of_a_scripted_engine_agree_with_its_script(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted("quick", gap=0.02, accepted=(1, 0, 2)), scripted("unable", speculates=False))
    events: list[object] = []
    plan = plan_for("quick", "unable", draft_tokens=(2,), max_tokens=15, repeats=2)

    result = asyncio.run(run(EXPERIMENT, plan, host, events.append))

    # Steps yield 2, 1, 3, 2, 1, 3, 2 and one more of the 15 tokens: 8 steps, 16 drafted; accepted 1 0 2 1 0 2 1 0.
    counted = result.speculation("quick+ngram-2")
    assert counted == SpeculationCounters(32, 64, 28, (20, 8))  # four requests: 2 prompts x 2 repeats
    assert result.speculation("quick") is None
    # Without: 14 gaps for 14 tokens after the first; with: 7 gaps for the 13 after the first two.
    gain = speed_up(result, next(row for row in result.engines if row.name == "quick+ngram-2"))
    assert gain is not None and 1.5 < gain.value < 2.1  # (13 / 7) / (14 / 14) = 1.86
    assert [event.row.name for event in events if isinstance(event, EngineFailed)] == ["unable+ngram-2"]
    assert notes(result).count("Unable: Unable's script has no speculation.") == 1
    assert len(result.distribution("unable", METRICS["ttft"]).values) == 4  # it stays as its own baseline
    started = [event for event in events if isinstance(event, TrialStarted)]
    assert [event.done for event in started] == list(range(12)) and {event.of for event in started} == {12}
    assert ExperimentResult.from_json(result.to_json()).to_json() == result.to_json()


# Simulated acceptance


@pytest.fixture
def random_host(scripted: MakeEngine, make_host: MakeHost, tmp_path: Path) -> LocalHost:
    """A host whose model has a prediction head and random weights, as its engine's script takes it."""
    return make_host(scripted("quick", accepted=(1, 0)), model=str(make_model(TINY_QWEN, (), tmp_path)))


def test_each_simulated_length_makes_one_contender_with_one_draft_token(random_host: LocalHost) -> None:
    plan = plan_for("quick", method=None, draft_tokens=(3,), simulated_acceptance=(1.8, 1.0, 1.8))
    found = contenders(plan, random_host)
    assert [(one.key, one.variant) for one in found] == [
        ("quick", ""),
        ("quick+mtp-simulated-1", "simulated acceptance length 1"),
        ("quick+mtp-simulated-1.8", "simulated acceptance length 1.8"),
    ]
    assert [one.changes for one in found[1:]] == [
        {"speculation": Speculation("mtp", 1, simulated_length=length)} for length in (1.0, 1.8)
    ]
    assert EXPERIMENT.read_plan(("quick",), {"simulated_acceptance": "1.0, 1.8"}).simulated_acceptance == (1.0, 1.8)  # type: ignore[attr-defined]


@pytest.mark.parametrize("typed", ["2.5", "0.5", "nan"])
def test_a_simulated_length_that_one_draft_cannot_give_is_refused(typed: str) -> None:
    with pytest.raises(PlanError, match="Simulated acceptance lengths must be a number from 1 to 2") as caught:
        EXPERIMENT.read_plan(("quick",), {"simulated_acceptance": typed})
    assert caught.value.field == "simulated_acceptance"
    with pytest.raises(PlanError, match="Simulated acceptance must be numbers with commas between them, not 'half'"):
        EXPERIMENT.read_plan(("quick",), {"simulated_acceptance": "half"})


def test_acceptance_is_simulated_neither_for_a_real_model_nor_without_a_prediction_head(
    scripted: MakeEngine, make_host: MakeHost, random_host: LocalHost, tmp_path: Path
) -> None:
    plan = plan_for("quick", method=None, simulated_acceptance=(1.5,))
    with pytest.raises(PlanError, match="only for a model with random weights"):
        contenders(plan, make_host(scripted("quick")))
    headless = make_host(scripted("quick"), model=str(make_model(TINY_GEMMA, (), tmp_path)))
    with pytest.raises(PlanError, match="this model has none"):
        contenders(plan, headless)
    with pytest.raises(PlanError, match="told to guess in another way"):
        contenders(replace(plan, method="ngram"), random_host)


def test_what_was_simulated_says_so_in_labels_notes_pictures_and_words(random_host: LocalHost) -> None:
    plan = plan_for("quick", method=None, simulated_acceptance=(1.5, 2.0))
    result = asyncio.run(run(EXPERIMENT, plan, random_host, lambda event: None))
    assert SIMULATED_LABEL in result.labels
    assert SIMULATED_LABEL in notes(result)
    told = [row[0] for row in table(result).rows[1:]]
    assert told == ["Quick, simulated acceptance length 1.5", "Quick, simulated acceptance length 2"]
    assert "simulated acceptance length" in headline(result)
    drawn = figures(result)
    for name in ("speed", "sweep"):
        assert "Simulated acceptance: the engines kept as many drafts" in drawn[name].to_json()
    sweep = drawn["sweep"]
    assert [list(trace.x) for trace in sweep.data] == [[1.5, 2.0]]
    assert sweep.layout.xaxis.title.text == "simulated acceptance length, tokens per step"
    plain = asyncio.run(run(EXPERIMENT, plan_for("quick"), random_host, lambda event: None))
    assert SIMULATED_LABEL not in plain.labels
