"""The race that plays when the page opens: what is sent for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from experiments import EXPERIMENTS
from experiments.library import Library
from experiments.report import figures
from experiments.result import ExperimentResult
from ui.lanes import TILES
from ui.opening import ROUNDS, opening_race, terms
from ui.tab import grouped, without_small_print

LANES = ("transformers", "vllm", "sglang")
LARGEST = 64_000  # bytes of JSON, before it is compressed


def recording() -> ExperimentResult:
    library = Library(Path("there-are-no-own-runs"))
    recorded = library.recording("baseline")
    assert recorded
    return library.load(recorded.id)


def test_each_round_has_every_engines_whole_answer_at_its_true_speed() -> None:
    result = recording()
    race = opening_race(result, LANES)
    assert race
    assert len(race["rounds"]) == ROUNDS
    for repeat, played in enumerate(race["rounds"], start=1):
        assert set(played) == set(LANES)
        for name, arrivals in played.items():
            (row,) = [row for row in result.requests if (row.engine, row.repeat, row.warmup) == (name, repeat, False)]
            assert "".join(text for _, text, _ in arrivals) == "".join(one.text for one in row.timeline.arrivals)
            assert sum(tokens for *_, tokens in arrivals) == sum(one.tokens or 1 for one in row.timeline.arrivals)
            assert abs(arrivals[-1][0] / 1000 - row.timeline.arrivals[-1].at) < 0.001


def test_it_is_labelled_as_recorded_and_says_that_the_engines_had_taken_turns() -> None:
    result = recording()
    race = opening_race(result, LANES)
    assert race and race["label"].startswith(f"Recorded, not live: {result.source_line}.")
    assert "taken turns" in race["label"]
    raced = opening_race(replace(result, settings={**result.settings, "race": True}), LANES)
    assert raced and "taken turns" not in raced["label"]


def test_it_is_small_enough_to_send_to_everybody() -> None:
    assert len(json.dumps(opening_race(recording(), LANES), separators=(",", ":"))) < LARGEST


def test_failed_answers_and_engines_without_a_lane_are_left_out() -> None:
    result = recording()
    failed = tuple(
        replace(row, timeline=replace(row.timeline, error="cut off")) if row.engine == "vllm" else row
        for row in result.requests
    )
    race = opening_race(replace(result, requests=failed), ("vllm", "sglang"))
    assert race and {name for played in race["rounds"] for name in played} == {"sglang"}
    assert opening_race(result, ("somebody-else",)) is None
    assert opening_race(replace(result, requests=()), LANES) is None


def test_the_browser_knows_how_to_write_every_tile() -> None:
    assert set(terms()) == {metric.name for metric in TILES}
    assert terms()["ttft"]["scale"] == 1000
    assert "time to first token" in terms()["ttft"]["title"]


def test_the_pages_charts_have_their_small_print_as_text_and_an_export_can_put_it_back() -> None:
    drawn = figures(recording())["speed"]
    shown, lines = without_small_print(drawn)
    kept = shown.layout.meta["small_print"]
    assert lines[0].startswith(recording().source_line)
    assert len(shown.layout.annotations) + len(kept["lines"]) == len(drawn.layout.annotations)
    assert (kept["height"], kept["bottom"]) == (drawn.layout.height, drawn.layout.margin.b)
    assert shown.layout.height < drawn.layout.height


def test_every_setting_stands_under_one_heading() -> None:
    for experiment in EXPERIMENTS:
        groups = dict(grouped(experiment.settings, experiment))
        assert set(groups) == {"What to ask", "How to measure"}
        assert sorted(one.name for group in groups.values() for one in group) == sorted(
            one.name for one in experiment.settings
        )
        assert "repeats" in [one.name for one in groups["How to measure"]]
