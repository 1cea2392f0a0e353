"""Metrics of hand-made arrivals: the arithmetic stands in the ids and comments, so that a reader can redo it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from engines.base import Usage
from engines.timeline import Arrival, Timeline
from experiments.metrics import (
    CATALOGUE,
    METRICS,
    Distribution,
    Metric,
    RequestMetrics,
    percentile,
    ratio,
    student_t,
)


def metrics(*arrivals: tuple[float, int | None], reasoning: int = 0, **fields: object) -> RequestMetrics:
    """Of an answer with one chunk per (seconds since sent, tokens), the first `reasoning` of which are thinking."""
    chunks = tuple(Arrival(at, " word", place < reasoning, tokens) for place, (at, tokens) in enumerate(arrivals))
    counts = [tokens for _, tokens in arrivals]
    usage = Usage(7, sum(counts), 0) if chunks and None not in counts else Usage()  # type: ignore[arg-type]
    source = "per chunk" if usage.output_tokens else "estimated"
    settings = {"arrivals": chunks, "usage": usage, "token_source": source, "finish_reason": "length", **fields}
    return RequestMetrics(Timeline(sent=0.0, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        pytest.param([(0.10, 1), (0.12, 1), (0.14, 1), (0.16, 1)], 0.02, id="one token each: 0.06 s / 3 tokens"),
        # (n-1) would divide by 11 and report 7.3 ms.
        pytest.param([(0.10, 4), (0.14, 4), (0.18, 4)], 0.01, id="four-token chunks: 0.08 s / (12 - 4) tokens"),
        pytest.param([(0.10, 3), (0.12, 1), (0.14, 1)], 0.02, id="first chunk bundles three: 0.04 s / (5 - 3) tokens"),
        pytest.param([(0.10, 1), (0.13, 2), (0.16, 1)], 0.02, id="two at once on the way: 0.06 s / 3 tokens"),
        pytest.param([(0.10, None), (0.15, None), (0.20, None)], 0.05, id="no counts: 0.10 s / 2 chunks"),
    ],
)
def test_tpot_is_the_time_after_the_first_chunk_per_token_after_the_first_chunk(
    arrivals: list[tuple[float, int | None]], expected: float
) -> None:
    measured = metrics(*arrivals)
    assert measured.tpot == pytest.approx(expected)
    assert measured.decode_speed == pytest.approx(1 / expected)


def test_ttft_and_e2e_run_from_sending_to_the_first_and_to_the_last_text() -> None:
    measured = metrics((0.25, 1), (0.5, 1), (1.0, 2), closed=1.7)  # what follows the last text does not count
    assert (measured.ttft, measured.e2e) == (0.25, 1.0)


def test_output_speed_holds_the_wait_for_the_first_token() -> None:
    measured = metrics((0.6, 2), (0.7, 2), (0.8, 2))
    assert measured.output_speed == pytest.approx(7.5)  # 6 tokens / 0.8 s
    assert measured.decode_speed == pytest.approx(20)  # 4 tokens / 0.2 s


def test_thinking_counts_as_the_first_token_and_the_answer_is_timed_beside_it() -> None:
    measured = metrics((0.1, 1), (0.2, 1), (0.3, 1), (0.4, 1), reasoning=2)
    assert measured.ttft == 0.1
    assert measured.time_to_first_answer == 0.3
    assert measured.tpot == pytest.approx(0.1)  # 0.3 s / 3 tokens, thinking included


def test_an_answer_that_is_all_thinking_has_no_first_answer_token() -> None:
    assert metrics((0.1, 1), (0.2, 1), reasoning=2).time_to_first_answer is None


def test_a_single_token_has_a_latency_but_no_decode_speed() -> None:
    measured = metrics((0.1, 1))
    assert (measured.ttft, measured.e2e, measured.output_tokens) == (0.1, 0.1, 1)
    assert measured.output_speed == pytest.approx(10)  # 1 token / 0.1 s
    assert (measured.tpot, measured.decode_speed, measured.itl_p99) == (None, None, None)
    assert measured.inter_token_latencies == []


def test_an_answer_in_one_chunk_has_no_decode_speed_however_many_tokens_it_holds() -> None:
    measured = metrics((0.1, 8))
    assert (measured.tpot, measured.decode_speed) == (None, None)


def test_chunks_that_left_the_socket_together_give_no_speed_rather_than_an_infinite_one() -> None:
    measured = metrics((0.1, 1), (0.1, 1), (0.1, 1))
    assert (measured.tpot, measured.decode_speed) == (None, None)


def test_a_failed_request_keeps_its_ttft_and_has_no_latency_or_speed() -> None:
    measured = metrics((0.1, 1), (0.2, 1), error="The engine's answer broke off before its end.")
    assert measured.ttft == 0.1
    assert [measured.e2e, measured.tpot, measured.decode_speed, measured.output_speed] == [None] * 4


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_what_is_unknown_is_none_and_shown_as_a_dash(metric: Metric) -> None:
    nothing = RequestMetrics(Timeline(sent=0.0, error="HTTP 500"))
    assert metric.read(nothing) is None
    assert metric.shown(None) == metric.shown_with_unit(None) == "–"


def test_the_end_of_text_token_is_counted_in_the_answer_but_not_in_the_decode_time() -> None:
    # The server counts 4 tokens; the last one has no text, and so no arrival: 0.02 s / (3 - 1) tokens.
    measured = metrics((0.10, 1), (0.11, 1), (0.12, 1), usage=Usage(7, 4, 0))
    assert measured.output_tokens == 4
    assert measured.tpot == pytest.approx(0.01)


def test_a_closing_count_is_believed_over_the_number_of_chunks() -> None:
    # Nine tokens in five chunks, nothing said per chunk: 0.08 s / (9 - 1) tokens, not / 4 chunks.
    chunks = [(0.10 + 0.02 * place, None) for place in range(5)]
    measured = metrics(*chunks, usage=Usage(7, 9), token_source="final usage")
    assert measured.output_tokens == 9
    assert measured.tpot == pytest.approx(0.01)


def test_without_any_count_a_chunk_is_taken_for_a_token() -> None:
    assert metrics((0.1, None), (0.2, None), (0.3, None)).output_tokens == 3


def test_every_gap_between_tokens_is_kept_so_that_a_stall_shows() -> None:
    # Gaps of 10, 10, 500, 10 ms, which a mean would call four of 132.5.
    measured = metrics((0.10, 1), (0.11, 1), (0.12, 1), (0.62, 1), (0.63, 1))
    assert measured.inter_token_latencies == pytest.approx([0.01, 0.01, 0.5, 0.01])
    assert measured.itl_p99 == pytest.approx(0.4853)  # rank 3 x 0.99 = 2.97: 0.01 + 0.97 x (0.5 - 0.01)
    assert measured.tpot == pytest.approx(0.1325)


def test_a_chunk_of_several_tokens_counts_as_that_many_equal_gaps() -> None:
    measured = metrics((0.10, 1), (0.14, 4), (0.15, 1))
    assert measured.inter_token_latencies == pytest.approx([0.01] * 5)  # 0.04 s / 4, four times; then 0.01 s


def test_the_gap_before_a_chunk_without_a_new_token_goes_to_the_next_token() -> None:
    measured = metrics((0.10, 1), (0.20, 0), (0.30, 1))
    assert measured.inter_token_latencies == pytest.approx([0.2])  # 0.30 - 0.10; the text at 0.20 was no token


def test_prompt_and_cached_tokens_are_what_the_server_reports() -> None:
    measured = metrics((0.1, 1), usage=Usage(2001, 1, 1984))
    assert (measured.prompt_tokens, measured.cached_tokens) == (2001, 1984)


def test_cached_tokens_of_zero_are_a_zero_and_not_unknown() -> None:
    assert METRICS["cached_tokens"].shown(metrics((0.1, 1)).cached_tokens) == "0"


# Distributions


def test_a_distribution_leaves_out_what_is_unknown() -> None:
    spread = Distribution.of([1.0, None, 4.0, 1.0])
    assert spread.values == (1.0, 4.0, 1.0)
    assert (spread.mean, spread.median, spread.smallest, spread.largest) == (2.0, 1.0, 1.0, 4.0)
    assert spread.deviation == pytest.approx(3**0.5)  # (1 + 4 + 1) / (3 - 1) = 3


def test_a_distribution_of_nothing_knows_nothing() -> None:
    nothing = Distribution.of([None])
    statistics = [nothing.mean, nothing.median, nothing.smallest, nothing.largest, nothing.deviation]
    assert [*statistics, nothing.half_width, nothing.percentile(99)] == [None] * 7


def test_one_value_has_a_mean_but_no_spread() -> None:
    one = Distribution.of([5.0])
    assert (one.mean, one.median, one.deviation, one.half_width) == (5.0, 5.0, None, None)


@pytest.mark.parametrize("share", [0, 1, 25, 50, 90, 95, 99, 99.9, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_agree_with_numpy(count: int, share: float) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    assert percentile(values.tolist(), share) == pytest.approx(np.percentile(values, share))


def test_a_percentile_of_nothing_is_unknown() -> None:
    assert percentile([], 50) is None


# From the printed tables, 95 % two-sided.
@pytest.mark.parametrize(("degrees", "table"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_students_t_agrees_with_the_printed_table(degrees: float, table: float) -> None:
    assert student_t(degrees) == pytest.approx(table, abs=5e-4)


@pytest.mark.parametrize(("degrees", "confidence"), [(2.5, 0.95), (7.31, 0.99), (1e6, 0.95)])
def test_students_t_takes_fractions_of_a_degree_and_other_confidences(degrees: float, confidence: float) -> None:
    assert student_t(degrees, confidence) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, degrees))


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_half_width_is_half_of_the_95_percent_interval_of_the_mean(count: int) -> None:
    values = np.random.default_rng(7).normal(200, 5, count)
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert Distribution.of(values.tolist()).half_width == pytest.approx((high - low) / 2)


def test_the_half_width_of_three_values_by_hand() -> None:
    # 228, 230, 232: deviation 2; 4.303 x 2 / sqrt(3) = 4.968
    assert Distribution.of([228, 230, 232]).half_width == pytest.approx(4.968, abs=1e-3)


# Ratios


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([228, 231, 226], [152, 149, 155]),
        ([100, 104, 98, 101, 99], [99, 101]),
        ([1.0, 1.5, 2.2], [0.9, 2.4, 1.1, 1.0]),
    ],
)
def test_the_ratio_and_its_interval_are_welchs_on_the_logarithms(a: list[float], b: list[float]) -> None:
    compared = ratio(Distribution.of(a), Distribution.of(b))
    assert compared is not None
    welch = stats.ttest_ind(np.log(a), np.log(b), equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert compared.value == pytest.approx(stats.gmean(a) / stats.gmean(b))
    assert (compared.low, compared.high) == pytest.approx((np.exp(interval.low), np.exp(interval.high)))
    assert compared.supported == (welch.pvalue < 0.05)


def test_a_ratio_and_its_inverse_say_the_same() -> None:
    fast, slow = Distribution.of([228, 231, 226]), Distribution.of([152, 149, 155])
    forwards, backwards = ratio(fast, slow), ratio(slow, fast)
    assert forwards is not None and backwards is not None
    assert forwards.low is not None and backwards.high is not None
    assert forwards.value * backwards.value == pytest.approx(1)
    assert forwards.low * backwards.high == pytest.approx(1)
    assert forwards.supported and backwards.supported


def test_one_repeat_gives_a_ratio_without_an_interval_that_supports_nothing() -> None:
    compared = ratio(Distribution.of([200.0]), Distribution.of([100.0, 101.0]))
    assert compared is not None
    assert compared.value == pytest.approx(1.99, abs=0.01)
    assert (compared.low, compared.high, compared.supported) == (None, None, False)


def test_equal_values_are_no_difference_though_they_have_no_spread() -> None:
    same = ratio(Distribution.of([100.0, 100.0]), Distribution.of([100.0, 100.0]))
    assert same is not None
    assert (same.value, same.low, same.high, same.supported) == (1.0, 1.0, 1.0, False)


@pytest.mark.parametrize(("a", "b"), [([], [1.0]), ([1.0], []), ([0.0, 1.0], [1.0]), ([1.0], [-1.0])])
def test_there_is_no_ratio_of_nothing_or_of_what_is_not_positive(a: list[float], b: list[float]) -> None:
    assert ratio(Distribution.of(a), Distribution.of(b)) is None


# The catalogue


def test_the_catalogue_names_each_metric_once() -> None:
    assert len(METRICS) == len(CATALOGUE)
    assert len({metric.label for metric in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ttft", 0.01234, "12.3 ms"),
        ("tpot", 0.004386, "4.39 ms"),
        ("decode_speed", 2847.6, "2,848 tok/s"),
        ("e2e", 1.239, "1.24 s"),
        ("output_tokens", 128, "128"),
        ("ttft", 0.0, "0.0 ms"),
    ],
)
def test_a_value_is_shown_in_its_unit_with_its_digits(name: str, value: float, words: str) -> None:
    assert METRICS[name].shown_with_unit(value) == words


def test_what_came_in_one_piece_counts_as_first_and_gives_no_fantasy_speed() -> None:
    # 7 tokens at 300 ms, 1 at 318 ms: 1 token in 18 ms, not 7 in 18.
    held_up = tuple(Arrival(0.3, "x", tokens=1) for _ in range(7)) + (Arrival(0.318, "x", tokens=1),)
    metrics = RequestMetrics(Timeline(0.0, held_up, token_source="per chunk", finish_reason="length"))
    assert metrics.tpot == pytest.approx(0.018)
    assert not metrics.bunched  # 8 chunks in 2 pieces: 4 each


@pytest.mark.parametrize(("pieces", "bunched"), [(1, True), (2, True), (3, False), (16, False)])
def test_an_answer_in_few_large_pieces_is_called_bunched(pieces: int, bunched: bool) -> None:
    arrivals = tuple(Arrival(float(place * pieces // 16), "x", tokens=1) for place in range(16))
    assert RequestMetrics(Timeline(0.0, arrivals)).bunched is bunched  # from 8 chunks per read on
