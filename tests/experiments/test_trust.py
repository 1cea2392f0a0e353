"""What speaks against a result's own numbers, and that it is said wherever they are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engines.base import Usage
from engines.load import GeneratorHealth
from engines.timeline import Arrival, Timeline
from experiments import baseline
from experiments.metrics import METRICS, RequestMetrics
from experiments.report import figures, headline, notes
from experiments.result import ExperimentResult, RequestRow, TrialRow
from experiments.trust import generator_notes, generator_warnings, implausible_notes
from tests.experiments.level_rows import answer, limited, result_of, wave
from tests.experiments.test_result import result_of as baseline_of

GOOD = GeneratorHealth("kernel", 10.0, 0.4, 0.001, 1000, (0.00005, 0.0004, 0.002))


def with_generator(result: ExperimentResult, **health: Any) -> ExperimentResult:
    trial = TrialRow("quick", "", 1, False, 0.0, 1.0, generator=replace(GOOD, **health))
    return replace(result, trials=(trial,))


def small_print(result: ExperimentResult) -> str:
    return " ".join(note.text for note in figures(result)["speed"].layout.annotations)


def test_a_healthy_generator_is_told_in_one_line_and_warned_of_nowhere() -> None:
    result = with_generator(baseline_of(quick=[100.0]))
    assert generator_warnings(result) == []
    # 0.4 s of the processor in 10 s: 4 %
    assert generator_notes(result) == [
        "The load generator: arrivals were stamped by the kernel, as they came in, chunks were read 0.4 ms after they "
        "came (p99), it used at most 4.0% of a core."
    ]
    assert notes(result)[-1] == generator_notes(result)[0]
    assert "⚠" not in small_print(result)


@pytest.mark.parametrize(
    ("health", "words"),
    [
        ({"processor_seconds": 9.0}, "used 90% of a core, so it may have been the limit"),
        (
            {"stamps": "process", "longest_stall": 0.3, "read_delays": ()},
            "once stood still for 300 ms; what came meanwhile",
        ),
        ({"longest_stall": 0.3}, "what came meanwhile was read together, with only the last one's stamp"),
        ({"read_delays": (0.001, 0.05, 0.2)}, "Chunks lay unread for up to 50 ms (p99)"),
    ],
)
def test_a_generator_that_was_the_limit_is_warned_of_in_the_notes_and_in_the_picture(
    health: dict[str, Any], words: str
) -> None:
    result = with_generator(baseline_of(quick=[100.0]), **health)
    (warning,) = generator_warnings(result)
    assert words in warning
    assert f"⚠ {warning}" in notes(result)
    assert words in small_print(result).replace("<br>", " ")


def test_a_stall_shorter_than_most_gaps_is_none() -> None:
    assert generator_warnings(with_generator(baseline_of(quick=[100.0]), longest_stall=0.02)) == []


def test_requests_sent_late_are_warned_of_with_or_without_the_generators_own_word() -> None:
    rows = [answer(level=3, index=index, late=0.05 * index) for index in range(3)]  # 0, 50 and 100 ms late
    (warning,) = generator_warnings(result_of(rows))
    assert "up to 100 ms late (p99 99 ms)" in warning  # between 50 and 100 ms, 98 % of the way: 99
    assert generator_warnings(result_of(wave("vllm", 3))) == []


def test_a_warm_ups_troubles_are_its_own() -> None:
    result = with_generator(baseline_of(quick=[100.0]), processor_seconds=9.9)
    result = replace(result, trials=(replace(result.trials[0], warmup=True),))
    assert generator_warnings(result) == generator_notes(result) == []


def timed(*moments: float) -> RequestRow:
    arrivals = tuple(Arrival(at, " w", tokens=1) for at in moments)
    timeline = Timeline(0.0, arrivals, 9.0, Usage(output_tokens=len(moments)), "per chunk", "stop")
    return RequestRow("quick", 1, False, timeline)


@pytest.mark.parametrize("moments", [(-0.1, 0.1, 0.2), (0.1, 0.3, 0.2)], ids=["before the request", "out of order"])
def test_moments_that_cannot_be_give_no_numbers(moments: tuple[float, ...]) -> None:
    metrics = RequestMetrics(timed(*moments).timeline)
    assert metrics.backwards
    assert {METRICS[name].read(metrics) for name in ("ttft", "e2e", "tpot", "decode_speed", "itl_p99")} == {None}
    assert metrics.output_tokens == 3  # a count needs no clock
    result = replace(baseline_of(quick=[]), requests=(timed(*moments), timed(0.1, 0.2, 0.3)))
    (note,) = implausible_notes(result)
    assert note.startswith("Quick: 1 of 2 answers have moments that cannot be")
    assert result.distribution("quick", METRICS["ttft"]).values == (0.1,)  # the other one still counts


def test_an_answer_in_one_piece_has_no_speed_but_an_end() -> None:
    # The last of 16 tokens 0.1 ms after the 15 others: 1 token / 0.1 ms would be 10,000 tok/s.
    row = timed(*[1.0] * 15, 1.0001)
    metrics = row.metrics
    assert (metrics.tpot, metrics.decode_speed) == (None, None)
    assert (metrics.ttft, metrics.e2e) == (1.0, 1.0001)
    result = replace(baseline_of(quick=[]), requests=(row,))
    assert implausible_notes(result)[0].startswith("Quick: 1 of 1 answers arrived in a few large pieces")
    assert any("few large pieces" in note for note in notes(result))


def test_a_speed_above_the_memory_ceiling_is_drawn_as_an_outline_and_wins_nothing() -> None:
    # 1 MB per token at 90 MB/s: 90 tok/s is what memory allows, 99 with the tolerance of a tenth.
    result = limited(baseline_of(quick=[120.0, 121.0], slow=[50.0, 51.0]), 90e6)
    assert headline(result).startswith("Slow decodes 50 tok/s") or headline(result).startswith("Slow decodes 51")
    assert "Quick seems faster than memory allows, so that figure is not to be trusted." in headline(result)
    bars = {bar.x[0]: bar for bar in figures(result)["speed"].data if bar.type == "bar" and bar.yaxis == "y"}
    assert "cannot be" in bars["Quick"].text[0] and "cannot be" not in bars["Slow"].text[0]
    assert bars["Quick"].marker.line.width == 2
    assert any("seems faster than memory allows" in note for note in notes(result))


def test_just_above_the_ceiling_is_within_the_error_of_the_bandwidth() -> None:
    result = limited(baseline_of(quick=[95.0, 96.0]), 90e6)
    assert implausible_notes(result) == []
    assert "not to be trusted" not in baseline.headline(result)
