"""The pictures of the concurrency experiment, looked into trace by trace."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from experiments import level_charts
from experiments.concurrency import EXPERIMENT
from experiments.level_charts import SPACING_WORDS
from experiments.limits import CEILING_WORDS
from experiments.result import ExperimentResult
from tests.experiments.level_rows import RACE, VLLM, limited, result_of


def draw(name: str, result: ExperimentResult) -> Any:
    return next(chart for chart in EXPERIMENT.charts if chart.name == name).draw(result)


def traces(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


def written(figure: Any) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_the_throughput_chart_tells_measured_from_extrapolated() -> None:
    figure = draw("throughput", RACE)
    lines = traces(figure)
    queue = "HF Transformers, extrapolated"
    assert list(lines) == ["vLLM", "HF Transformers", queue, "HF Transformers, continuous batching", SPACING_WORDS]
    assert [line.line.dash for line in lines.values()] == ["solid", "solid", "dash", "dashdot", "dot"]
    assert lines["vLLM"].line.color == VLLM.colour
    assert lines["vLLM"].marker.symbol != lines["HF Transformers, continuous batching"].marker.symbol
    # The dashed line goes on from the last measured point, which keeps its own marker
    assert (lines[queue].x, lines[queue].marker.symbol) == ((1, 4), "circle-open")
    assert lines[queue].marker.size == (0, 9)
    assert ["extrapolated" in words for words in lines[queue].hovertext] == [False, True]
    assert lines[SPACING_WORDS].y == pytest.approx((55, 88))  # as in the test of the ceiling
    assert (figure.layout.xaxis.type, figure.layout.xaxis.ticktext) == ("log", ("1", "4"))
    assert not figure.layout.showlegend
    assert {"vLLM", "HF Transformers<br>(extrapolated)", SPACING_WORDS} <= set(written(figure))
    small_print = " ".join(written(figure))
    assert RACE.source_line in small_print
    assert "dashed and hollow: extrapolated" in small_print


def labels(figure: Any) -> dict[str, Any]:
    return {annotation.text: annotation for annotation in figure.layout.annotations}


def test_the_memory_ceiling_is_a_dotted_line_beside_that_of_the_arrivals() -> None:
    # 60 MB/s / 1 MB for one user, four times that for four; the lines end at 88 tok/s, the picture 15 % above
    figure = draw("throughput", limited(RACE, 60e6))
    line = traces(figure)[CEILING_WORDS]
    assert (line.x, line.y, line.line.dash) == ((1, 4), pytest.approx((60, 240)), "dot")
    assert figure.layout.yaxis.range == pytest.approx((0, 1.15 * 88))
    # Its words stand where it still is inside the picture, at one user, and those of the arrivals at its end
    found = labels(figure)
    assert (found[CEILING_WORDS].x, found[CEILING_WORDS].y, found[CEILING_WORDS].xanchor) == (0, 60, "left")
    assert (found[SPACING_WORDS].x, found[SPACING_WORDS].xanchor) == (pytest.approx(math.log10(4)), "right")


def test_a_memory_ceiling_far_above_is_left_out_of_the_picture() -> None:
    figure = draw("throughput", limited(RACE, 100e6))  # 100 tok/s for one user, where the picture ends at 101
    assert CEILING_WORDS not in traces(figure)
    assert CEILING_WORDS not in written(figure)
    assert SPACING_WORDS in traces(figure)


def test_labels_at_the_ends_of_lines_do_not_overlap() -> None:
    figure = draw("throughput", replace(RACE, engines=(VLLM, replace(VLLM, label="Twin"))))
    low, high = (one for one in figure.layout.annotations if one.text in ("vLLM", "Twin"))
    assert high.yshift - low.yshift == level_charts.LABEL_PIXELS


def test_the_wait_is_drawn_on_a_logarithmic_axis_beside_its_limit() -> None:
    figure = draw("ttft", RACE)
    lines = traces(figure)
    assert figure.layout.yaxis.type == "log"
    assert lines["limit"].y == (200, 200)
    assert "limit: 200 ms" in written(figure)
    assert lines["vLLM"].y == pytest.approx((100, 100))
    # p95 of the queue's 200, 500, 800, 1,100 ms is 1,055, 405 above the median
    assert lines["HF Transformers, extrapolated"].error_y.array[1] == pytest.approx(405)
    assert figure.layout.yaxis.range == (2, 4)  # 100 to 10,000 ms


def test_every_request_of_the_largest_measured_level_has_its_bars() -> None:
    figure = draw("flight", RACE)
    bars = traces(figure)
    assert bars["vLLM: wait"].base == pytest.approx((0, 0.1, 0.2, 0.3))
    assert bars["vLLM: wait"].x == pytest.approx([0.1] * 4)
    assert bars["vLLM: answer"].base == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert bars["vLLM: answer"].x == pytest.approx([0.1] * 4)
    assert (bars["vLLM: answer"].marker.color, bars["vLLM: answer"].y) == (VLLM.colour, (1, 2, 3, 4))
    assert bars["vLLM: wait"].marker.opacity < 0.5
    assert {bar.width for bar in bars.values() if bar.type == "bar"} == {0.85}  # a lone failure covers no other
    failed = "HF Transformers, continuous batching: failed"
    assert (bars[failed].y, bars[failed].marker.color) == ((4,), level_charts.FAILED_COLOUR)
    assert (bars[f"{failed} here"].marker.symbol, bars[f"{failed} here"].y) == ("x", (4,))
    assert {"vLLM<br>4 users", "HF Transformers<br>1 user"} <= set(written(figure))
    assert figure.layout.xaxis2.matches == "x"  # one time for all
    assert figure.layout.xaxis.range == figure.layout.xaxis3.range
    assert RACE.source_line in " ".join(written(figure))


def test_requests_in_flight_are_steps() -> None:
    figure = draw("in_flight", RACE)
    # Sent 0.1 s apart and answered in 0.2 s, two overlap; the failed one is given up 0.5 s after its last token
    line = traces(figure)["vLLM: 4 users, at most 2 in flight"]
    assert (line.line.shape, line.y[-1]) == ("hv", 0)
    assert line.x[-1] == pytest.approx(0.5)
    assert "HF Transformers: 1 user, at most 1 in flight" in traces(figure)
    assert RACE.source_line in " ".join(written(figure))


def test_a_result_without_requests_has_no_pictures() -> None:
    result = limited(result_of([]), 100e6)
    assert [chart.draw(result) for chart in EXPERIMENT.charts] == [None] * len(EXPERIMENT.charts)
