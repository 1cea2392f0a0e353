"""The chart of the engines' starts: every phase begins where the one before it ended."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import pytest

from experiments import EXPERIMENTS
from experiments.drawing import PHASE_COLOURS, START_CHART, start_chart
from experiments.report import drawn_csv, figures
from experiments.result import EngineRow, ExperimentResult
from tests.experiments.test_result import result_of

PHASES = {
    "quick": {"importing": 4.0, "loading weights": 2.5, "warming up": 0.5},
    "slow": {"waiting for a GPU": 3.0, "loading weights": 8.0, "importing": 1.0},  # in another order
    "plain": {},
}


def started(**phases: dict[str, float]) -> ExperimentResult:
    rows = tuple(EngineRow(name, name.title(), "#0072B2", start_phases=of) for name, of in phases.items())
    return replace(result_of(), engines=rows)


def bars(chart: Any) -> dict[tuple[str, str], tuple[float, float]]:
    """(row, phase) -> (where it begins, how long it is)."""
    return {
        (row, trace.name): (begin, length)
        for trace in chart.data
        for row, begin, length in zip(trace.y, trace.base, trace.x, strict=True)
    }


def test_each_phase_begins_where_its_own_rows_phase_before_ended() -> None:
    assert bars(start_chart(started(**PHASES))) == {
        ("Quick", "importing"): (0, 4),
        ("Quick", "loading weights"): (4, 2.5),
        ("Quick", "warming up"): (4 + 2.5, 0.5),
        ("Slow", "waiting for a GPU"): (0, 3),
        ("Slow", "loading weights"): (3, 8),
        ("Slow", "importing"): (3 + 8, 1),
    }


def test_bars_lie_over_each_other_so_that_plotly_stacks_none_of_them_again() -> None:
    chart: Any = start_chart(started(**PHASES))
    assert chart.layout.barmode == "overlay"
    assert {trace.orientation for trace in chart.data} == {"h"}


def test_a_phase_has_one_colour_and_one_place_in_the_legend() -> None:
    chart: Any = start_chart(started(**PHASES))
    assert [trace.name for trace in chart.data] == ["importing", "loading weights", "warming up", "waiting for a GPU"]
    assert [trace.marker.color for trace in chart.data] == list(PHASE_COLOURS[:4])


def test_rows_keep_their_order_and_those_that_needed_no_start_are_left_out() -> None:
    chart: Any = start_chart(started(**PHASES))
    assert list(chart.layout.yaxis.categoryarray) == ["Quick", "Slow"]
    assert chart.layout.yaxis.autorange == "reversed"  # the first one on top


def test_seconds_are_written_where_there_is_room_for_them() -> None:
    chart: Any = start_chart(started(quick={"importing": 4.4, "warming up": 0.5}))
    assert [trace.text for trace in chart.data] == [("4 s",), ("",)]


def test_a_variant_is_a_row_of_its_own() -> None:
    result = started(quick={"importing": 1.0})
    variant = replace(result.engines[0], name="quick+cache", variant="prefix cache", start_phases={"importing": 2.0})
    chart = start_chart(replace(result, engines=(*result.engines, variant)))
    assert bars(chart) == {("Quick", "importing"): (0, 1), ("Quick<br>prefix cache", "importing"): (0, 2)}


@pytest.mark.parametrize("result", [started(), started(plain={}, other={}), result_of(broken="It could not start.")])
def test_where_nothing_was_started_there_is_no_chart(result: ExperimentResult) -> None:
    assert start_chart(result) is None
    assert "start" not in figures(result)


def test_every_experiment_ends_with_the_starts() -> None:
    assert [experiment.charts[-1] for experiment in EXPERIMENTS] == [START_CHART] * len(EXPERIMENTS)
    assert "start" in figures(started(**PHASES))


def test_the_csv_has_a_line_per_phase_with_its_begin_and_its_length() -> None:
    with io.StringIO(drawn_csv(start_chart(started(**PHASES))).decode(), newline="") as file:
        lines = [(line["series"], line["y"], line["base"], line["x"]) for line in csv.DictReader(file)]
    assert lines == [
        ("importing", "Quick", "0", "4.0"),
        ("importing", "Slow", "11.0", "1.0"),
        ("loading weights", "Quick", "4.0", "2.5"),
        ("loading weights", "Slow", "3.0", "8.0"),
        ("warming up", "Quick", "6.5", "0.5"),
        ("waiting for a GPU", "Slow", "0", "3.0"),
    ]
