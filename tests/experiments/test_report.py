"""Table, figure, CSV and text read the same values, and say what must be said beside them."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy
import plotly.graph_objects as go
import pytest

from engines.bandwidth import Bandwidth
from engines.base import SpeculationCounters
from engines.model_shape import ModelShape
from experiments.metrics import CATALOGUE, METRICS, Distribution
from experiments.report import csv_bytes, drawn_csv, figures, figures_html, headline, notes, table, text_table
from experiments.result import ExperimentResult
from experiments.telling import Cell
from tests.experiments import test_prefix_caching as prefix
from tests.experiments import test_speculation as drafting
from tests.experiments.level_rows import RACE
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


# What a figure draws, as CSV


def speculation_result() -> ExperimentResult:
    """A sweep with its counters, below a memory ceiling of 200 tok/s: 5 MB per step at 1 GB/s."""
    speeds = {"quick": [99.0, 101.0], "quick+draft_model-1": [139.0, 142.0], "quick+draft_model-3": [160.0, 163.0]}
    counted = {"quick+draft_model-3": SpeculationCounters(10, 30, 21, (9, 7, 5))}
    swept = drafting.measured(speeds, counted)
    return replace(swept, model_shape=ModelShape(5_000_000, 0), bandwidth=Bandwidth(1e9, "measured"))


DRAWN = {
    "baseline": (lambda: MIXED, ["speed"]),
    "speculation": (speculation_result, ["speed", "acceptance", "sweep"]),
    "prefix caching": (prefix.whole, ["ttft", "cached"]),
    "concurrency": (lambda: RACE, ["throughput", "ttft", "flight", "in_flight"]),
}


def drawn_lines(chart: Any) -> list[dict[str, str]]:
    with io.StringIO(drawn_csv(chart).decode(), newline="") as file:
        return list(csv.DictReader(file))


def number(cell: str) -> float | None:
    return float(cell) if cell else None


@pytest.mark.parametrize(("make", "names"), DRAWN.values(), ids=DRAWN)
def test_everything_that_a_chart_draws_stands_unrounded_in_its_csv(make: Any, names: list[str]) -> None:
    charts = figures(make())
    assert list(charts) == names
    for chart in charts.values():
        lines = drawn_lines(chart)
        points = [(trace, place) for trace in chart.data for place in range(len(trace.x))]
        across = [shape for shape in chart.layout.shapes if shape.y0 == shape.y1]
        assert len(lines) == len(points) + len(across)
        for (trace, place), line in zip(points, lines, strict=False):
            x, y = trace.x[place], trace.y[place]
            assert line["series"] == (trace.name or "").replace("<br>", " · ")
            assert line["x"] == (x.replace("<br>", " · ") if isinstance(x, str) else repr(x))
            assert line["y"] == ("" if y is None else repr(y))
            told = trace.text or trace.hovertext
            assert line["text"] == (told[place].replace("<br>", " · ") if told else "")
            error = trace.error_y
            if error.array is None or error.visible is False or y is None:
                assert (line["low"], line["high"]) == ("", "")
            else:
                below = error.array if error.arrayminus is None else error.arrayminus
                assert (number(line["low"]), number(line["high"])) == (y - below[place], y + error.array[place])
            if trace.type == "bar" and trace.base is not None:
                assert number(line["base"]) == trace.base[place]
            elif chart.layout.barmode != "stack":
                assert line["base"] == ""
        assert [number(line["y"]) for line in lines[len(points) :]] == [shape.y0 for shape in across]


def test_lines_across_a_chart_have_the_words_that_stand_at_them() -> None:
    charts = figures(speculation_result())
    across = [line for line in drawn_lines(charts["speed"]) if line["series"] == "line"]
    words = {"panel": "1", "series": "line", "y": "200.0", "text": "memory ceiling: 200 tok/s"}
    assert across == [dict.fromkeys(across[0], "") | words]
    (without,) = (line for line in drawn_lines(charts["sweep"]) if line["series"] == "line")
    assert (float(without["y"]), without["text"]) == (pytest.approx(100), "Quick without")


def test_a_line_has_the_words_of_its_own_panel_only_and_a_share_of_the_page_is_no_value() -> None:
    from plotly.subplots import make_subplots

    chart = make_subplots(rows=1, cols=2)
    for column, words in ((1, "<b>here</b>"), (2, "there")):
        chart.add_scatter(x=[1], y=[2], row=1, col=column)
        chart.add_hline(1.5, annotation_text=words, row=1, col=column)
    chart.add_hline(1.25, row=1, col=2)
    chart.add_vline(1)
    chart.add_shape(type="line", x0=0, x1=1, y0=1.5, y1=1.5, yref="paper")
    chart.add_shape(type="rect", x0=0, x1=1, y0=1.5, y1=1.5)
    across = [(line["panel"], line["y"], line["text"]) for line in drawn_lines(chart) if line["series"] == "line"]
    assert across == [("1", "1.5", "here"), ("2", "1.5", "there"), ("2", "1.25", "")]


def test_a_lying_bar_keeps_its_begin_and_its_length() -> None:
    lines = drawn_lines(figures(RACE)["flight"])
    waits = [line for line in lines if line["series"] == "vLLM: wait"]
    assert [float(line["base"]) for line in waits] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [float(line["x"]) for line in waits] == pytest.approx([0.1] * 4)
    assert [line["y"] for line in waits] == ["1", "2", "3", "4"]
    assert waits[0]["text"] == "request 1 · first token after 100.0 ms · whole answer after 0.20 s"


def test_a_stacked_bar_begins_where_the_one_below_it_ends() -> None:
    lines = drawn_lines(figures(prefix.whole())["cached"])
    computed = {line["x"]: line for line in lines if line["series"].endswith("computed")}
    assert {place: line["base"] for place, line in computed.items()} == {
        "short 1": "",  # nothing below it
        "short 2": "16.0",
        "prefix 1": "16.0",
        "prefix 2": "2016.0",
    }
    assert computed["prefix 2"]["y"] == "8.0"
    assert {line["base"] for line in lines if line["series"].endswith("from the cache")} == {""}


def test_packed_numbers_are_read_and_what_is_no_number_is_left_empty() -> None:
    chart = go.Figure()
    values, whiskers = numpy.array([0.1, numpy.nan, 1 / 3]), {"array": numpy.array([0.5, 0.5, 0.25])}
    chart.add_scatter(x=numpy.array([1, 2, 300]), y=values, error_y=whiskers, text=numpy.array(["a", "b", "c"]))
    chart.add_scatter(x=[numpy.int64(7), 8], y=[numpy.float32(0.5), None], hovertext="every point")
    expected = [
        "1,,1,0.1,,-0.4,0.6,a",
        "1,,2,,,,,b",
        f"1,,300,{1 / 3!r},,{1 / 3 - 0.25!r},{1 / 3 + 0.25!r},c",
        "1,,7,0.5,,,,every point",
        "1,,8,,,,,every point",
    ]
    assert drawn_csv(chart).decode().splitlines()[1:] == expected
    packed = go.Figure(json.loads(chart.to_json()))
    assert isinstance(packed.data[0].y, dict)  # {"dtype", "bdata"}
    assert drawn_csv(packed) == drawn_csv(chart)


def test_a_whisker_is_there_only_where_it_is_drawn() -> None:
    chart = go.Figure()
    for error in ({"array": [1, 2], "visible": False}, {}, {"array": [1, 2], "arrayminus": [3]}, None):
        chart.add_bar(x=["a", "b"], y=[10, 20], error_y=error)
    both = {"array": [1, 2], "arrayminus": [3, 4], "symmetric": True}  # then what is below it does not count
    chart.add_bar(x=["a", "b"], y=[10, 20], error_y=both)
    ends = [(line["low"], line["high"]) for line in drawn_lines(chart)]
    nothing = [("", "")] * 2
    assert ends == [*nothing, *nothing, ("7", "11"), ("20", "22"), *nothing, ("9", "11"), ("18", "22")]


def test_what_is_not_drawn_has_no_line() -> None:
    assert drawn_csv(go.Figure()) == b"panel,series,x,y,base,low,high,text\n"
    chart = go.Figure()
    chart.add_scatter(x=[], y=[], name="nothing")
    chart.add_scatter(name="nothing either")
    chart.add_scatter(x=[1], y=[1], visible=False)
    chart.add_scatter(x=[1], y=[1], visible="legendonly")
    chart.add_bar(x=["a"], y=[2], base=1, name="a bar")
    (line,) = drawn_lines(chart)
    assert (line["series"], line["x"], line["y"], line["base"]) == ("a bar", "a", "2", "1")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "<b>="])
def test_words_of_a_chart_that_a_spreadsheet_would_run_are_kept_as_text(start: str) -> None:
    hostile = f'{start}HYPERLINK("http://example.invalid","click")'
    chart = go.Figure(go.Scatter(x=[hostile], y=[-1.5], name=hostile, text=hostile))
    (line,) = drawn_lines(chart)
    for column in ("series", "x", "text"):
        assert line[column].startswith(f"'{start[-1]}HYPERLINK")
    assert line["y"] == "-1.5"  # a number is none of that


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
