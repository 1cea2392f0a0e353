"""Results on disk: nothing is lost, nothing half written is ever read, and wrong files are refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engines.bandwidth import Bandwidth
from engines.base import SpeculationCounters, Usage
from engines.gpus import Price
from engines.model_shape import ModelShape
from engines.timeline import Arrival, Timeline
from experiments.metrics import METRICS
from experiments.result import SCHEMA, EngineRow, ExperimentResult, RequestRow, ResultError, TrialRow, new_id

SCHEMA_1 = Path(__file__).parent / "data" / "schema_1.json"  # from a real run of scripted engines
SCHEMA_2 = Path(__file__).parent / "data" / "schema_2.json"  # from a real run of the three engines on a CPU

OUTCOMES = list[float | None] | str


def result_of(warmups: int = 0, ttft: float = 0.1, **engines: OUTCOMES) -> ExperimentResult:
    """A baseline's result by hand: each engine's decode speeds in tok/s, None for a failed request, or the error
    with which it could not be started. Two tokens each, the second 1/speed seconds after the first."""
    rows, requests = [], []
    for name, outcomes in engines.items():
        error = outcomes if isinstance(outcomes, str) else None
        rows.append(EngineRow(name, name.title(), "#0072B2", version=None if error else "1.0", error=error))
        for number in range(warmups if not error else 0):
            requests.append(RequestRow(name, number + 1, True, answer_at(1.0, ttft)))
        for number, speed in enumerate([] if error else outcomes):
            assert not isinstance(speed, str)
            requests.append(RequestRow(name, number + 1, False, answer_at(speed, ttft)))
    return ExperimentResult(
        id="baseline-20261123-120000-abcdef",
        experiment="baseline",
        started="2026-11-23T12:00:00+00:00",
        host="local",
        hardware={"cpu": "Test CPU", "words": "Test CPU, 2 cores"},
        model="test-model",
        model_note="",
        settings={"prompt": "Go."},
        engines=tuple(rows),
        requests=tuple(requests),
    )


def answer_at(speed: float | None, ttft: float) -> Timeline:
    if speed is None:
        return Timeline(sent=0.0, error="The engine refused the request with HTTP 500.")
    arrivals = (Arrival(ttft, " one", tokens=1), Arrival(ttft + 1 / speed, " two", tokens=1))
    return Timeline(0.0, arrivals, arrivals[-1].at, Usage(7, 2, 0), "per chunk", "length")


@pytest.fixture
def sample() -> ExperimentResult:
    return ExperimentResult.from_json(SCHEMA_1.read_text(encoding="utf-8"))


def test_a_round_trip_through_json_keeps_every_arrival_and_everything_else(sample: ExperimentResult) -> None:
    again = ExperimentResult.from_json(sample.to_json())
    assert again == sample
    assert sum(len(row.timeline.arrivals) for row in again.requests) == 60


def test_variants_trials_and_what_speculation_did_survive_the_round_trip() -> None:
    counted = SpeculationCounters(4, 12, 8, (4, 2, 2))
    variant = EngineRow("quick+cache", "Quick", "#000000", "prefix cache", "quick", unavailable="It keeps none.")
    timeline = replace(answer_at(100.0, 0.1), usage=Usage(7, 2, 3, counted))
    request = RequestRow("quick+cache", 1, False, timeline, "prompt 1", 2, planned=0.25)
    trial = TrialRow("quick+cache", "prompt 1", 1, False, 0.5, 1.5, counted, True)
    result = replace(result_of(quick=[1.0]), engines=(variant,), requests=(request,), trials=(trial,))
    again = ExperimentResult.from_json(result.to_json())
    assert again == result
    assert (variant.engine, variant.title) == ("quick", "Quick, prefix cache")
    assert again.speculation("quick+cache") == counted
    assert again.requests[0].metrics.lateness == -0.25  # sent at 0, planned for 0.25


LIMITS = {
    "model_shape": ModelShape(1000, 10, 800, 8, 2),
    "bandwidth": Bandwidth(58.5e9, "measured: 2 threads reading 31 MB again and again"),
    "price": Price(3.95, "as typed"),
}


def test_what_bounds_a_result_and_what_it_costs_survive_the_round_trip() -> None:
    result = replace(result_of(quick=[1.0]), **LIMITS)  # type: ignore[arg-type]
    assert ExperimentResult.from_json(result.to_json()) == result


@pytest.mark.parametrize("schema", [1, 2])
def test_a_file_from_before_there_were_limits_loads_without_them(schema: int) -> None:
    if schema == 1:
        value = json.loads(SCHEMA_1.read_text(encoding="utf-8"))
    else:
        value = {**json.loads(result_of(quick=[1.0]).to_json()), "schema": 2}
        for name in LIMITS:
            del value[name]
    assert LIMITS.keys().isdisjoint(value)
    result = ExperimentResult.from_json(json.dumps(value))
    assert (result.schema, result.model_shape, result.bandwidth, result.price) == (schema, None, None, None)


def test_results_of_schema_2_keep_loading_and_know_no_load_generator() -> None:
    result = ExperimentResult.from_json(SCHEMA_2.read_text(encoding="utf-8"))
    assert (result.schema, len(result.trials), {trial.generator for trial in result.trials}) == (2, 36, {None})
    speeds = [result.distribution(row.name, METRICS["decode_speed"]).mean for row in result.engines]
    assert speeds == [pytest.approx(104.24, abs=0.01), pytest.approx(228.96, abs=0.01), pytest.approx(70.96, abs=0.01)]


def test_what_is_unknown_stays_unknown_through_json() -> None:
    arrivals = (Arrival(0.1, "é\n\"'</script>", tokens=None), Arrival(0.25, "", reasoning=True, tokens=0))
    request = RequestRow(
        "quick", 1, False, Timeline(0.5, arrivals, None, Usage(None, None, 3), "estimated", None, "cut")
    )
    result = replace(result_of(quick=[]), requests=(request,), stopped_early=True, labels=("a label",))
    again = ExperimentResult.from_json(result.to_json())
    assert again.requests == (request,)
    assert (again.stopped_early, again.labels) == (True, ("a label",))


def test_results_of_schema_1_keep_loading_with_the_same_numbers(sample: ExperimentResult) -> None:
    assert sample.schema == 1
    assert [engine.name for engine in sample.engines] == ["quick", "bursty", "thinking", "failing", "absent"]
    speeds = {engine.name: sample.distribution(engine.name, METRICS["decode_speed"]).mean for engine in sample.engines}
    assert speeds == {
        "quick": pytest.approx(94.657, abs=0.001),
        "bursty": pytest.approx(98.768, abs=0.001),
        "thinking": pytest.approx(92.620, abs=0.001),
        "failing": None,
        "absent": None,
    }
    assert sample.distribution("quick", METRICS["ttft"]).values == (0.02200717599998825, 0.02581990399994538)
    assert [len(sample.measured(engine.name)) for engine in sample.engines] == [2, 2, 2, 2, 0]
    thinking = sample.measured("thinking")[0].metrics
    assert thinking.ttft is not None and thinking.time_to_first_answer is not None
    assert thinking.ttft < thinking.time_to_first_answer
    assert len(sample.failures("failing")) == 2
    assert "the script says so" in str(sample.engines[-1].error)
    assert sample.settings["prompt"] == "Say “hello”, 你好."
    assert sample.source_line == "random-qwen3-3M · Test CPU, 2 cores, 8 GiB memory, no GPU · 2026-11-23"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a whole result"),
        ("engine,ttft\nquick,0.1\n", "not a whole result"),
        (SCHEMA_1.read_text(encoding="utf-8")[:2000], "not a whole result"),
        ("[]", "not a result of the bake-off"),
        ("null", "not a result of the bake-off"),
        ('{"schema": 1}', "not a result of the bake-off"),
        ('{"name": "package", "version": "1.0"}', "not a result of the bake-off"),
        ('{"schema": 1, "experiment": "baseline"}', "not a whole result"),
        ('{"schema": "one", "experiment": "baseline"}', "not a whole result"),
        ('{"schema": null, "experiment": "baseline"}', "not a whole result"),
    ],
)
def test_a_file_that_is_no_result_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ResultError, match=words) as caught:
        ExperimentResult.from_json(text)
    assert str(caught.value).startswith("This file is not a")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("path", "broken"),
    [
        (["engines"], None),
        (["engines"], ["quick"]),
        (["engines", 0, "label"], 5),  # a value of another type
        (["requests", 0, "timeline", "sent"], "soon"),
        (["requests", 0, "timeline", "usage", "output_tokens"], "many"),
        (["requests"], 7),
        (["requests", 0, "timeline"], []),
        (["requests", 0, "timeline", "arrivals", "at"], [0.1]),  # columns of different lengths
        (["requests", 0, "timeline", "usage"], None),
        (["started"], None),
        (["labels"], "one word"),
        (["model_shape"], {"weight_bytes": 5}),
        (["bandwidth"], 58.5e9),
        (["price"], {"dollars_per_hour": "much", "source": "as typed"}),
    ],
)
def test_a_result_with_a_broken_part_is_refused_in_words(path: list[str | int], broken: object) -> None:
    value = json.loads(SCHEMA_1.read_text(encoding="utf-8"))
    part = value
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = broken
    with pytest.raises(ResultError, match="This file is not a whole result: "):
        ExperimentResult.from_json(json.dumps(value))


def test_a_result_of_a_newer_version_is_refused_and_says_so(sample: ExperimentResult) -> None:
    newer = replace(sample, schema=SCHEMA + 1).to_json()
    with pytest.raises(ResultError, match=rf"newer version \(schema {SCHEMA + 1}; this app reads {SCHEMA}\)"):
        ExperimentResult.from_json(newer)


def test_saving_makes_the_folder_and_names_the_file_after_the_run(sample: ExperimentResult, tmp_path: Path) -> None:
    path = sample.save(tmp_path / "results" / "new")
    assert path == tmp_path / "results" / "new" / f"{sample.id}.json"
    assert ExperimentResult.from_json(path.read_text(encoding="utf-8")) == sample


def test_a_reader_never_sees_half_a_file_while_it_is_written_again(sample: ExperimentResult, tmp_path: Path) -> None:
    before = sample.save(tmp_path).read_text(encoding="utf-8")
    with (tmp_path / f"{sample.id}.json").open(encoding="utf-8") as reader:
        beginning = reader.read(100)
        path = replace(sample, requests=()).save(tmp_path)
        # The open file is still the old one, whole: the new one took its place in one step.
        assert beginning + reader.read() == before
    assert ExperimentResult.from_json(path.read_text(encoding="utf-8")).requests == ()
    assert [file.name for file in tmp_path.iterdir()] == [f"{sample.id}.json"]


def test_ids_say_the_experiment_and_the_time_and_differ_within_one_second() -> None:
    moment = datetime(2026, 11, 23, 14, 5, 6, tzinfo=UTC)
    one, other = new_id("baseline", moment), new_id("baseline", moment)
    assert one.startswith("baseline-20261123-140506-")
    assert one != other


def test_statistics_leave_out_warm_ups_and_failures_and_the_failures_are_counted() -> None:
    result = result_of(warmups=2, quick=[100.0, None, 104.0])
    assert result.distribution("quick", METRICS["decode_speed"]).values == pytest.approx((100.0, 104.0))
    assert len(result.measured("quick")) == 3
    assert len(result.failures("quick")) == 1
    assert len(result.requests) == 5
