"""The sentence over a result: who won, by how much, and whether the repeats support it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines.base import Usage
from experiments.base import Plan
from experiments.baseline import headline, notes, trials
from tests.experiments.test_result import OUTCOMES, result_of


@pytest.mark.parametrize(
    ("engines", "sentence"),
    [
        pytest.param(
            # Intervals by scipy.stats.ttest_ind on the logarithms, equal_var=False.
            {"slow": [99.0, 100.0, 101.0], "quick": [198.0, 200.0, 202.0]},
            "Quick decodes 200 tok/s: 2.00× Slow (100), and the spread over 3 repeats supports it "
            "(95 % interval 1.96–2.05).",
            id="a winner whose interval leaves out 1",
        ),
        pytest.param(
            {"one": [90.0, 110.0, 100.0], "two": [95.0, 99.0, 112.0]},
            "Two decodes 102 tok/s: no measurable difference from One (100; 1.02×, 95 % interval 0.82–1.26).",
            id="no measurable difference",
        ),
        pytest.param(
            {"quick": [198.0, 200.0, 202.0], "same": [197.0, 201.0, 200.0], "slow": [99.0, 100.0, 101.0]},
            "Quick decodes 200 tok/s: no measurable difference from Same (199; 1.00×, 95 % interval 0.98–1.03); "
            "2.00× Slow (100), and the spread over 3 repeats supports it (95 % interval 1.96–2.05).",
            id="level with one and ahead of another",
        ),
        pytest.param(
            {"quick": [198.0, 202.0]},
            "Quick decodes 200 tok/s. There is nothing to compare it with.",
            id="one engine only",
        ),
        pytest.param(
            {"slow": [100.0], "quick": [150.0]},
            "Quick decodes 150 tok/s: 1.50× Slow (100), from too few repeats to say whether that would hold.",
            id="one repeat",
        ),
        pytest.param(
            {"quick": [150.0, 152.0], "slow": [100.0, None]},
            "Quick decodes 151 tok/s: 1.51× Slow (100), from too few repeats to say whether that would hold.",
            id="one repeat left after a failure",
        ),
        pytest.param({"one": [None, None]}, "No engine gave an answer that could be measured.", id="nobody, of one"),
        pytest.param(
            {"one": [None], "two": "could not start"},
            "No engine gave an answer that could be measured. One and Two gave no speed that could be measured.",
            id="nobody, of two",
        ),
        pytest.param(
            {"one": "could not start", "quick": [200.0], "two": [None], "three": []},
            "Quick decodes 200 tok/s. There is nothing to compare it with. "
            "One, Two and Three gave no speed that could be measured.",
            id="all but one silent",
        ),
        pytest.param(
            {"slow": [100.0], "broken": "could not start", "quick": [150.0]},
            "Quick decodes 150 tok/s: 1.50× Slow (100), from too few repeats to say whether that would hold. "
            "Broken gave no speed that could be measured.",
            id="one of three silent",
        ),
        pytest.param({}, "No engine gave an answer that could be measured.", id="stopped before an engine was ready"),
    ],
)
def test_the_headline_says_who_won_by_how_much_and_whether_that_would_hold(
    engines: dict[str, OUTCOMES], sentence: str
) -> None:
    assert headline(result_of(**engines)) == sentence


def test_warm_ups_do_not_decide_who_won() -> None:
    # Each warm-up runs at 1 tok/s; with them Quick would be at 100.
    assert headline(result_of(warmups=1, quick=[200.0])).startswith("Quick decodes 200 tok/s")


def test_warm_ups_come_before_the_repeats_which_are_counted_from_one() -> None:
    planned = trials(Plan("Go.", ("quick",), repeats=3, warmups=2), ())
    assert [(trial.warmup, trial.repeat) for trial in planned] == [
        (True, 1),
        (True, 2),
        (False, 1),
        (False, 2),
        (False, 3),
    ]
    assert [trial.words for trial in planned][1:3] == ["warm-up 2 of 2", "repeat 1 of 3"]
    assert all(trial.prompts == ("Go.",) for trial in planned)


def test_answers_of_different_lengths_are_said() -> None:
    longer = result_of(quick=[100.0], slow=[100.0])
    rows = tuple(
        replace(row, timeline=replace(row.timeline, usage=Usage(output_tokens=128 if row.engine == "quick" else 96)))
        for row in longer.requests
    )
    (note,) = notes(replace(longer, requests=rows))
    assert "(Quick 128 and Slow 96 tokens)" in note
    assert notes(longer) == []
