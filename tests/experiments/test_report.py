"""Table, figure, CSV and text read the same values, and say what must be said beside them."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from experiments.metrics import CATALOGUE, METRICS, Distribution
from experiments.report import csv_bytes, figures, figures_html, headline, notes, table, text_table
from experiments.result import ExperimentResult
from experiments.telling import Cell
from tests.experiments.test_result import SCHEMA_1, result_of

MIXED = result_of(warmups=1, quick=[198.0, 200.0, 202.0], slow=[99.0, None, 101.0], broken="It could not start.")


@pytest.fixture
def sample() -> ExperimentResult:
    return ExperimentResult.from_json(SCHEMA_1.read_text(encoding="utf-8"))


def columns_of(result: ExperimentResult, label: str) -> dict[str, str]:
    told = table(result)
    (row,) = [row for row in told.rows if row[0] == label]
    return dict(zip(told.headings, row, strict=True))


def figure(result: ExperimentResult) -> Any:
    return figures(result)["speed"]


def lines_of(result: ExperimentResult) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_bytes(result).decode())))


# Table


@pytest.mark.parametrize(
    ("metric", "values", "words"),
    [
        ("decode_speed", [228.0, 230.0, 232.0], "230 ±5 tok/s"),  # 4.303 x 2 / sqrt(3) = 4.97
        ("ttft", [0.0100, 0.0104], "10.2 ±2.5 ms"),  # 12.706 x 0.000283 / sqrt(2) = 0.00254
        ("ttft", [0.0104], "10.4 ms"),  # one repeat: no spread
        ("output_tokens", [128, 128, 128], "128"),  # equal values: no spread worth a sign
        ("decode_speed", [], "–"),
    ],
)
def test_a_cell_is_the_mean_and_half_of_the_95_percent_interval(metric: str, values: list[float], words: str) -> None:
    assert Cell(METRICS[metric], Distribution.of(values)).words == words


def test_the_table_has_one_row_per_engine_with_its_runs_and_failures() -> None:
    quick, slow = columns_of(MIXED, "Quick"), columns_of(MIXED, "Slow")
    assert (quick["Speed"], quick["First token"], quick["Runs"], quick["Failed"]) == (
        "200 ±5 tok/s",
        "100.0 ms",
        "3",
        "0",
    )
    assert (slow["Speed"], slow["Runs"], slow["Failed"]) == ("100 ±13 tok/s", "3", "1")  # 12.706 x 1.414 / 1.414


def test_an_engine_that_could_not_run_is_a_row_of_dashes() -> None:
    broken = columns_of(MIXED, "Broken")
    assert broken.pop("Engine") == "Broken"
    assert (broken.pop("Runs"), broken.pop("Failed")) == ("could not run", "0")
    assert set(broken.values()) == {"–"}


# What is said


def test_the_notes_name_every_failure_label_and_caveat() -> None:
    result = replace(MIXED, labels=("Random weights.",), stopped_early=True)
    caveat = replace(result.engines[0], caveat="A caveat.")
    assert notes(replace(result, engines=(caveat, *result.engines[1:]))) == [
        "Stopped early: some repeats are missing.",
        "Random weights.",
        "Broken: It could not start.",
        "Slow: 1 of 3 requests failed: The engine refused the request with HTTP 500.",
        "A caveat.",
    ]


def test_a_result_without_trouble_needs_no_notes() -> None:
    assert notes(result_of(quick=[100.0])) == []


def test_the_text_holds_the_table_the_headline_the_source_and_the_notes(sample: ExperimentResult) -> None:
    text = text_table(sample)
    headings, rows = table(sample).headings, table(sample).rows
    shown = text.splitlines()
    assert [re.split(r"\s{2,}", line.rstrip()) for line in [shown[0], *shown[2 : 2 + len(rows)]]] == [headings, *rows]
    for line in [headline(sample), sample.source_line, *notes(sample)]:
        assert line in shown


# CSV


def test_the_csv_has_one_line_per_request_warm_ups_and_failures_included(sample: ExperimentResult) -> None:
    for result in (MIXED, sample):
        lines = lines_of(result)
        assert len(lines) == len(result.requests)
        for line, row in zip(lines, result.requests, strict=True):
            assert (line["run"], line["engine"], line["repeat"]) == (result.id, row.engine, str(row.repeat))
            assert line["warmup"] == str(int(row.warmup))
            assert line["error"] == (row.timeline.error or "")


def test_the_csv_holds_every_metric_unrounded_in_seconds_and_nothing_for_unknown(sample: ExperimentResult) -> None:
    for line, row in zip(lines_of(sample), sample.requests, strict=True):
        for metric in CATALOGUE:
            field = f"{metric.name}_seconds" if metric.unit in ("s", "ms") else metric.name
            value = metric.read(row.metrics)
            assert line[field] == ("" if value is None else repr(value))


def test_a_csv_of_nothing_measured_is_its_headings() -> None:
    assert lines_of(result_of(quick=[])) == []
    assert csv_bytes(result_of(quick=[])).startswith(b"run,experiment,started,model,")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_text_that_a_spreadsheet_would_run_is_kept_as_text(start: str) -> None:
    hostile = f'{start}HYPERLINK("http://example.invalid","click")'
    result = result_of(quick=[100.0])
    request = result.requests[0]
    timeline = replace(request.timeline, error=hostile, finish_reason=hostile)
    result = replace(result, model=hostile, requests=(replace(request, timeline=timeline),))
    with io.StringIO(csv_bytes(result).decode(), newline="") as file:
        (line,) = csv.DictReader(file)
    for field in ("model", "error", "finish_reason"):
        assert line[field] == "'" + hostile


def test_errors_of_several_lines_with_quotes_and_commas_stay_in_their_cell() -> None:
    result = result_of(quick=[100.0, 101.0])
    error = 'HTTP 500: {"error": "a, b"},\nsecond line; “ü”'
    broken = replace(result.requests[0], timeline=replace(result.requests[0].timeline, error=error))
    lines = lines_of(replace(result, requests=(broken, *result.requests[1:])))
    assert [line["error"] for line in lines] == [error, ""]


# Figure


def test_the_figure_has_a_bar_at_the_mean_and_every_repeat_as_a_dot() -> None:
    chart = figure(MIXED)
    bars = {(bar.xaxis, bar.x[0]): bar for bar in chart.data if bar.type == "bar"}
    dots = {(dot.xaxis, dot.x[0]): list(dot.y) for dot in chart.data if dot.type == "scatter"}
    # The first chart is the speed in tok/s, the second the time to the first token in ms.
    assert bars["x", "Quick"].y[0] == pytest.approx(200)
    assert dots["x", "Quick"] == pytest.approx([198, 200, 202])
    assert dots["x", "Slow"] == pytest.approx([99, 101])
    assert dots["x2", "Quick"] == pytest.approx([100, 100, 100])
    # The whiskers reach from the smallest to the largest repeat.
    spread = bars["x", "Quick"].error_y
    assert (spread.visible, spread.array[0], spread.arrayminus[0]) == (True, pytest.approx(2), pytest.approx(2))


def test_the_figures_bars_say_what_the_table_says(sample: ExperimentResult) -> None:
    for bar in (bar for bar in figure(sample).data if bar.type == "bar" and bar.xaxis == "x"):
        cell = columns_of(sample, bar.x[0])["Speed"]
        assert bar.text[0] == re.sub(r" ±\S+", "", cell)


def test_an_engine_without_an_answer_keeps_its_place_in_the_figure() -> None:
    chart = figure(MIXED)
    assert list(chart.layout.xaxis.categoryarray) == ["Quick", "Slow", "Broken"]
    empty = [trace for trace in chart.data if trace.x[0] == "Broken"]
    assert [(trace.mode, trace.text[0]) for trace in empty] == [("text", "no answer")] * 2  # and no bar


def test_a_single_repeat_has_no_whiskers() -> None:
    assert not any(bar.error_y.visible for bar in figure(result_of(quick=[100.0])).data if bar.type == "bar")


def test_the_figure_carries_its_source_and_every_label() -> None:
    labels = ("Random weights: the speed is real, the words mean nothing.", "A long label. " * 30)
    chart = figure(replace(MIXED, labels=labels))
    written = " ".join(note.text for note in chart.layout.annotations)
    assert MIXED.source_line in written
    assert labels[0] in written
    assert written.count("A long label.") == 30
    assert "mean of 3 runs" in written


def test_axes_start_at_zero_so_that_bars_compare_by_their_length() -> None:
    chart = figure(MIXED)
    assert (chart.layout.yaxis.rangemode, chart.layout.yaxis2.rangemode) == ("tozero", "tozero")


def test_a_result_in_which_nothing_was_measured_still_has_a_figure() -> None:
    assert len(figure(result_of(one=[None], two="It could not start.")).data) == 4
    assert len(figure(result_of()).data) == 0


class Loaded(HTMLParser):
    """The addresses that a page would load, and the scripts that stand in it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset") and value]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.scripts and self.cdata_elem == "script":
            self.scripts[-1] += data


def test_the_figures_page_holds_the_plotting_library_and_loads_nothing() -> None:
    page = Loaded()
    page.feed(figures_html(MIXED).decode())
    assert page.addresses == []
    assert max(len(script) for script in page.scripts) > 1_000_000  # the library
    assert any("Plotly.newPlot" in script for script in page.scripts)


def test_hostile_names_cannot_leave_the_figures_page() -> None:
    hostile = "</script><script>document.title='caught'</script>"
    result = replace(MIXED, model=hostile, labels=(hostile,))
    for tag in (b"<script", b"</script"):
        assert figures_html(result).count(tag) == figures_html(MIXED).count(tag)
