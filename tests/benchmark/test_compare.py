"""A client's report beside the truth, on numbers that can be worked out on paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark.cases import cases
from benchmark.compare import Reported, Score, score
from benchmark.report import figure, table, verdicts
from benchmark.running import TrueAnswer
from benchmark.tools import CLIENTS, Order, ReportError, _read_library, _read_sglang, _read_vllm

# Asked at 10 s, chunks at 10.3, 10.31, 10.32 and 10.33 s.
TRUTH = TrueAnswer("q w0000", 10.0, (10.30, 10.31, 10.32, 10.33), (1, 1, 1, 1), (0.0, 0.0, 0.0, 0.001), True)
CASE = replace(cases(0.04)[0], name="1")


def test_a_report_of_the_truth_has_no_error() -> None:
    report = Reported("q w0000", 0.3, 0.01, (0.01, 0.01, 0.01), TRUTH.moments)
    scored = score("ours", "1", [TRUTH], [report], 0.1)
    assert (scored.answers, scored.failed, scored.lost, scored.processor) == (1, 0, 0, 0.1)
    assert scored.late_p50 == scored.late_p99 == 0
    for error in (scored.ttft_error, scored.tpot_error, scored.itl_error, scored.longest_gap_error):
        assert error == pytest.approx(0, abs=1e-9)
    assert scored.server_late_p99 == pytest.approx(0.00097)  # between 0 and 1 ms, 97 % of the way


def test_how_late_and_how_wrong_a_report_is() -> None:
    # Stamps 2, 4, 6 and 8 ms late: p50 5 ms; gaps 12 ms instead of 10.
    late = tuple(
        moment + lateness for moment, lateness in zip(TRUTH.moments, (0.002, 0.004, 0.006, 0.008), strict=True)
    )
    scored = score("x", "1", [TRUTH], [Reported("q w0000", 0.29, 0.012, (0.012,) * 3, late)], None)
    assert scored.late_p50 == pytest.approx(0.005)
    assert scored.ttft_error == pytest.approx(0.01)  # too short is as wrong as too long
    assert scored.tpot_error == scored.itl_error == scored.longest_gap_error == pytest.approx(0.002)


def test_what_was_not_reported_is_lost_or_failed_and_not_left_out() -> None:
    other = replace(TRUTH, prompt="q w0001")
    scored = score("x", "1", [TRUTH, other], [Reported("q w0000", 0.3, 0.01, (0.01,), TRUTH.moments[:3])], None)
    assert (scored.answers, scored.failed, scored.lost) == (1, 1, 1)
    assert scored.late_p50 is None


def test_two_moments_are_the_first_and_the_last() -> None:
    scored = score("x", "1", [TRUTH], [Reported("q w0000", None, None, None, (10.301, 10.333))], None)
    assert scored.late_p50 == pytest.approx(0.002)  # 1 and 3 ms
    assert (scored.ttft_error, scored.itl_error) == (None, None)


def test_a_library_that_is_not_ours_gets_its_metrics_by_the_token(tmp_path: Path) -> None:
    order = Order(replace(CASE, tokens_per_chunk=4), "http://x", "truth", tmp_path)
    seen = {"prompt": "q", "sent": 9.9, "moments": [10.3, 10.34], "tokens": 8}
    (report,) = _read_library(order, json.dumps([seen, {**seen, "moments": []}]), {})
    assert report.ttft == pytest.approx(0.4)
    assert report.tpot == pytest.approx(0.01)  # 40 ms for the 4 tokens of the second chunk
    assert report.gaps == pytest.approx((0.01,) * 4)


def test_vllms_report_is_read_with_its_own_formulas(tmp_path: Path) -> None:
    case = replace(cases(0.02)[0], streams=1)  # two chunks
    order = Order(case, "http://x", "truth", tmp_path)
    value = {
        "generated_texts": [" w0000 w0001", ""],
        "start_times": [10.0, 0.0],
        "ttfts": [0.3, 0.0],
        "itls": [[0.0, 0.01, 0.002], []],  # the role, both tokens, the closing delta
        "output_lens": [3, 0],
    }
    (tmp_path / "result.json").write_text(json.dumps(value), encoding="utf-8")
    (report,) = _read_vllm(order, "", {})
    assert report.prompt == case.prompts[0]
    assert report.tpot == pytest.approx(0.006)  # (0 + 10 + 2 ms) / (3 - 1)
    assert report.moments == pytest.approx((10.3, 10.31))


def test_sglangs_moments_count_from_the_requests_arrival(tmp_path: Path) -> None:
    order = Order(CASE, "http://x", "truth", tmp_path)
    value = {"generated_texts": [" w0000 w0001"], "ttfts": [0.3], "itls": [[0.02]], "output_lens": [2]}
    (tmp_path / "result.jsonl").write_text("{}\n" + json.dumps(value), encoding="utf-8")
    (report,) = _read_sglang(order, "", {CASE.prompts[0]: replace(TRUTH, prompt=CASE.prompts[0])})
    assert report.moments == pytest.approx((10.3, 10.32))


def test_an_answer_to_no_question_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="belongs to no question"):
        Order(CASE, "http://x", "truth", tmp_path).question(" something else")


def scored(client: str = "ours", case: str = "128", **values: float | int | None) -> Score:
    good = {"late_p50": 1e-6, "late_p99": 1e-5, "ttft_error": 1e-5, "tpot_error": 1e-6, "itl_error": 0.0}
    good |= {"longest_gap_error": 2e-5, "processor": 0.2, "server_late_p99": 1e-3}
    return Score(client, case, **{"answers": 1, "failed": 0, "lost": 0, **good, **values})  # type: ignore[arg-type]


def test_the_table_has_a_row_per_client_and_the_range_over_rounds() -> None:
    told = table([scored(processor=0.2), scored(processor=0.3), scored(processor=0.25), scored("openai", lost=3)])
    assert "**128 streams x 100 tok/s**" in told
    assert "| **this project** | 0.001 | 0.010 | 0.25 (0.20–0.30) |" in told
    assert "openai package" in told and "| 3 chunks |" in told


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ttft_error": 0.0031}, "TTFT of ours is off by 3.10 ms"),  # 1 % of 300 ms is 3 ms
        ({"tpot_error": 0.0011}, "TPOT of ours is off by 1.10 ms"),
        ({"itl_error": None}, "ITL p50 of ours is off by ?"),
        ({"longest_gap_error": 0.002}, "longest gap of ours is off by 2.00 ms"),
        ({"lost": 1}, "ours lost 1 chunks"),
        ({"failed": 2}, "and 2 answers"),
    ],
)
def test_what_is_not_exact_enough_is_told(values: dict[str, float | None], words: str) -> None:
    assert any(words in line for line in verdicts([scored(**values)]))
    assert verdicts([scored(), scored("openai", **values)]) == []  # only ours has to be


def test_a_stall_allows_its_hundredth() -> None:
    assert verdicts([scored(case="stall", longest_gap_error=0.005)]) == []  # 1 % of 510 ms
    assert verdicts([scored(case="stall", longest_gap_error=0.006)])


def test_the_figure_has_a_line_per_client() -> None:
    chart = figure([scored(), scored(case="256"), scored("openai"), scored("openai", case="stall")], "a machine")
    assert chart is not None
    names = {trace.name: list(trace.x) for trace in chart.data if trace.xaxis == "x"}
    assert names == {"this project": [128, 256], "openai package": [128]}
    assert figure([scored(case="stall")], "") is None


def test_every_client_has_a_name_of_its_own() -> None:
    assert len({client.name for client in CLIENTS}) == len(CLIENTS) == 7
