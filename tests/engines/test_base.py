"""The arithmetic of what speculation did."""

from __future__ import annotations

import pytest

from engines.base import SpeculationCounters

BEFORE = SpeculationCounters(steps=10, drafted=30, accepted=12, accepted_at=(7, 4, 1))
AFTER = SpeculationCounters(steps=14, drafted=42, accepted=20, accepted_at=(11, 6, 3))


def test_what_happened_between_two_readings_is_their_difference() -> None:
    done = AFTER.since(BEFORE)
    assert done == SpeculationCounters(steps=4, drafted=12, accepted=8, accepted_at=(4, 2, 2))
    assert done.acceptance_rate == pytest.approx(8 / 12)
    assert done.acceptance_length == 1 + 8 / 4  # the accepted ones and the one that each step adds itself
    assert done.acceptance_per_position == (4 / 4, 2 / 4, 2 / 4)


def test_a_position_that_was_not_counted_before_counts_from_zero() -> None:
    assert AFTER.since(SpeculationCounters(10, 30, 12)).accepted_at == (11, 6, 3)


def test_sums_keep_every_position() -> None:
    assert SpeculationCounters(1, 3, 1, (1,)).plus(SpeculationCounters(2, 6, 3, (2, 1))) == SpeculationCounters(
        3, 9, 4, (3, 1)
    )


def test_without_a_step_nothing_is_known() -> None:
    nothing = SpeculationCounters()
    assert (nothing.acceptance_rate, nothing.acceptance_length, nothing.acceptance_per_position) == (None, None, ())
