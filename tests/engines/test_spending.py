"""What a run's containers cost, and what a run may spend, with the arithmetic beside each number."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engines.base import EngineError
from engines.spending import Ledger, Limits, Meter, Spent

NOON = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
NEXT_DAY = datetime(2026, 11, 25, 0, 0, 0, tzinfo=UTC)
NO_LIMITS = Limits(None, None, None)


class Hands:
    """A clock whose hands are moved by the test."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


class Calendar:
    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> datetime:
        return self.at


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def meter(hands: Hands) -> Meter:
    return Meter(0.25, 2, "by hand", hands)


@pytest.fixture
def calendar() -> Calendar:
    return Calendar()


@pytest.fixture
def ledger(tmp_path: Path, calendar: Calendar) -> Ledger:
    return Ledger(tmp_path / "kept" / "spending.jsonl", calendar)


@pytest.fixture
def unwritable(tmp_path: Path, calendar: Calendar) -> Ledger:
    (tmp_path / "file").write_text("")
    return Ledger(tmp_path / "file" / "spending.jsonl", calendar)


def spend(ledger: Ledger, visitor: str, dollars: float) -> None:
    ledger.settle(visitor, ledger.reserve(visitor, NO_LIMITS, None), dollars)


# The meter


def test_nothing_is_counted_before_a_container_is_there(meter: Meter, hands: Hands) -> None:
    hands.at += 60
    assert meter.spent == Spent(0.0, 0.0, 0.0, "by hand")


def test_a_container_costs_from_its_beginning_to_its_end(meter: Meter, hands: Hands) -> None:
    meter.start("one")
    hands.at += 8
    assert meter.spent == Spent(8, 8 * 2, 8 * 0.25, "by hand")  # while it runs, too
    meter.stop("one")
    hands.at += 100
    assert meter.spent == Spent(8, 16, 2, "by hand")


def test_containers_at_the_same_time_are_all_counted(meter: Meter, hands: Hands) -> None:
    meter.start("one")
    hands.at += 4
    meter.start("other")
    hands.at += 6
    meter.stop("one")
    hands.at += 2
    assert meter.spent.container_seconds == (4 + 6) + (6 + 2)
    assert meter.spent.gpu_seconds == 18 * 2


def test_a_beginning_told_twice_counts_from_the_earliest(meter: Meter, hands: Hands) -> None:
    meter.start("one")
    hands.at += 10
    meter.start("one")
    assert meter.spent.container_seconds == 10
    meter.start("one", earlier=4)  # at 10 - 4 = 6, after what is known already
    assert meter.spent.container_seconds == 10
    meter.start("one", earlier=15)
    assert meter.spent.container_seconds == 15


def test_a_container_may_have_been_there_before_it_was_heard_of(meter: Meter, hands: Hands) -> None:
    meter.start("one", earlier=3)
    hands.at += 5
    assert meter.spent.container_seconds == 3 + 5


def test_a_container_may_stay_a_while_after_it_was_let_go(meter: Meter, hands: Hands) -> None:
    meter.start("one")
    hands.at += 5
    meter.stop("one", later=20)
    assert meter.spent.container_seconds == 5 + 20


def test_the_end_of_a_container_that_is_not_known_costs_nothing(meter: Meter, hands: Hands) -> None:
    meter.stop("nobody", later=20)
    meter.start("one")
    hands.at += 5
    meter.stop("one")
    meter.stop("one", later=20)
    assert meter.spent.container_seconds == 5


def test_a_container_that_comes_back_is_counted_again(meter: Meter, hands: Hands) -> None:
    meter.start("one")
    hands.at += 5
    meter.stop("one")
    hands.at += 100
    meter.start("one")
    hands.at += 2
    assert meter.spent.container_seconds == 5 + 2


def test_without_a_price_the_seconds_are_counted_and_the_dollars_unknown(hands: Hands) -> None:
    meter = Meter(None, 1, "nobody says", hands)
    meter.start("one")
    hands.at += 5
    assert meter.spent == Spent(5, 5, None, "nobody says")


def test_a_machine_without_a_gpu_has_no_gpu_seconds(hands: Hands) -> None:
    meter = Meter(0.5, 0, "by hand", hands)
    meter.start("one")
    hands.at += 4
    assert meter.spent == Spent(4, 0, 4 * 0.5, "by hand")


# What may be spent


@pytest.mark.parametrize(
    ("limits", "wanted", "granted"),
    [
        (Limits(8.0, 8.0, 8.0), 0.5, 0.5),
        (Limits(1.0, 8.0, 8.0), 8.0, 1.0),
        (Limits(8.0, 5.0, 8.0), 8.0, 5.0 - 3.0),  # of this visitor's $5, $3 are spent
        (Limits(8.0, 8.0, 6.0), 8.0, 6.0 - (3.0 + 2.0)),  # of everybody's $6, another has spent $2 beside those $3
        (Limits(8.0, 8.0, 8.0), None, 8.0 - 5.0),
        (Limits(1.0, None, None), None, 1.0),
        (NO_LIMITS, 4.0, 4.0),
        (NO_LIMITS, None, None),
    ],
)
def test_a_run_may_spend_the_least_of_what_is_wanted_and_what_is_left(
    ledger: Ledger, limits: Limits, wanted: float | None, granted: float | None
) -> None:
    spend(ledger, "me", 3.0)
    spend(ledger, "somebody else", 2.0)
    assert ledger.reserve("me", limits, wanted) == granted


def test_runs_under_way_count_with_what_they_may_still_spend(ledger: Ledger) -> None:
    limits = Limits(per_run=3.0, per_visitor=4.0, per_day=5.0)
    assert ledger.reserve("me", limits, None) == 3.0
    assert ledger.reserve("me", limits, None) == 4.0 - 3.0
    assert ledger.reserve("somebody else", limits, None) == 5.0 - 3.0 - 1.0
    assert (ledger.today("me"), ledger.today("somebody else"), ledger.today()) == (4.0, 1.0, 5.0)


def test_what_a_run_did_not_spend_is_free_again(ledger: Ledger) -> None:
    limits = Limits(per_run=None, per_day=5.0)
    assert ledger.reserve("me", limits, 4.0) == 4.0
    ledger.settle("me", 4.0, 0.5)
    assert ledger.today() == 0.5
    assert ledger.reserve("me", limits, None) == 5.0 - 0.5


def test_a_run_without_a_limit_is_settled_too(ledger: Ledger) -> None:
    assert ledger.reserve("me", NO_LIMITS, None) is None
    assert ledger.today() == 0.0
    ledger.settle("me", None, 1.25)
    assert ledger.today("me") == 1.25


def test_a_visitors_budget_that_is_spent_is_refused_with_the_amount_and_what_to_do(ledger: Ledger) -> None:
    limits = Limits(per_run=1.0, per_visitor=2.0, per_day=10.0)
    spend(ledger, "me", 2.0)
    with pytest.raises(EngineError) as caught:
        ledger.reserve("me", limits, 0.1)
    assert caught.value.message == (
        "Nothing is left of your budget for today ($2.00). It begins anew at midnight UTC; until then recorded runs "
        "can be replayed."
    )
    assert ledger.reserve("somebody else", limits, None) == 1.0


def test_a_days_budget_that_is_spent_is_refused_to_everybody(ledger: Ledger) -> None:
    limits = Limits(per_run=1.0, per_visitor=20.0, per_day=1234.5)
    spend(ledger, "me", 1234.5)
    for visitor in ("me", "somebody else"):
        with pytest.raises(
            EngineError, match=r"^Nothing is left of this page's budget for today \(\$1,234\.50\)\.|you"
        ):
            ledger.reserve(visitor, limits, None)


def test_a_refused_run_reserves_nothing(ledger: Ledger) -> None:
    with pytest.raises(EngineError):
        ledger.reserve("me", Limits(per_run=1.0, per_visitor=0.0), None)
    assert ledger.today() == 0.0


def test_another_day_begins_anew(ledger: Ledger, calendar: Calendar) -> None:
    limits = Limits(per_run=None, per_visitor=2.0, per_day=2.0)
    spend(ledger, "me", 2.0)
    with pytest.raises(EngineError):
        ledger.reserve("me", limits, None)
    calendar.at = NEXT_DAY
    assert ledger.today() == 0.0
    assert ledger.reserve("me", limits, None) == 2.0


def test_of_two_runs_at_once_only_one_gets_the_whole_days_budget(tmp_path: Path) -> None:
    def slow_calendar() -> datetime:
        time.sleep(0.05)  # whoever did not wait for the other would see the same sum
        return NOON

    ledger = Ledger(tmp_path / "spending.jsonl", slow_calendar)
    both = threading.Barrier(2)
    granted: list[float | None] = []
    refused: list[EngineError] = []

    def reserve(visitor: str) -> None:
        both.wait()
        try:
            granted.append(ledger.reserve(visitor, Limits(per_run=None, per_day=10.0), None))
        except EngineError as error:
            refused.append(error)

    threads = [threading.Thread(target=reserve, args=(visitor,)) for visitor in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert granted == [10.0]
    assert len(refused) == 1


# The file


def test_a_run_is_one_line_with_a_hash_and_never_a_name(ledger: Ledger) -> None:
    spend(ledger, "Ada Lovelace", 0.125)
    spend(ledger, "Ada Lovelace", 0.5)
    spend(ledger, "somebody else", 1.0)
    text = ledger.path.read_text(encoding="utf-8")
    first, second, third = (json.loads(line) for line in text.splitlines())
    assert (first["at"], first["dollars"]) == ("2026-11-24T12:00:00+00:00", 0.125)
    assert set(first) == {"at", "visitor", "dollars"}
    assert first["visitor"] == second["visitor"] != third["visitor"]
    assert "ada" not in text.lower() and "lovelace" not in text.lower()


def test_the_next_app_knows_what_was_spent(ledger: Ledger, calendar: Calendar) -> None:
    spend(ledger, "me", 1.5)
    again = Ledger(ledger.path, calendar)
    assert (again.today("me"), again.today("somebody else"), again.today()) == (1.5, 0.0, 1.5)


@pytest.mark.parametrize(
    "broken",
    [
        '{"at": "2026-11-24T12:',
        '{"at": "2026-11-24T12:00:00+00:00", "visitor": "0123"}',
        '{"at": "2026-11-24T12:00:00+00:00", "visitor": "0123", "dollars": "much"}',
        '{"at": "2026-11-24T12:00:00+00:00", "visitor": "0123", "dollars": null}',
        "[]",
        "null",
        "7",
        "",
    ],
)
def test_a_broken_last_line_is_passed_over(ledger: Ledger, broken: str) -> None:
    spend(ledger, "me", 1.5)
    with ledger.path.open("a", encoding="utf-8") as file:
        file.write(broken)
    assert ledger.today() == 1.5


def test_what_cannot_be_written_limits_runs_all_the_same(unwritable: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(per_run=None, per_visitor=2.0, per_day=3.0)
    granted = unwritable.reserve("me", limits, None)
    unwritable.settle("me", granted, 1.5)
    assert (unwritable.today("me"), unwritable.today()) == (1.5, 1.5)
    assert unwritable.reserve("me", limits, None) == 2.0 - 1.5
    assert unwritable.reserve("somebody else", limits, None) == 3.0 - 1.5 - 0.5
    assert caplog.messages == [f"what was spent cannot be written to {unwritable.path}: File exists"]


def test_what_is_spent_after_a_line_was_cut_off_counts(ledger: Ledger) -> None:
    spend(ledger, "me", 1.5)
    with ledger.path.open("a", encoding="utf-8") as file:
        file.write('{"at": "2026-11-24T12:')
    spend(ledger, "me", 0.25)
    assert ledger.today() == 1.5 + 0.25


def test_a_line_that_is_no_text_is_passed_over(ledger: Ledger) -> None:
    spend(ledger, "me", 1.5)
    with ledger.path.open("ab") as file:
        file.write(b"\xff\xfe\x80")
    assert ledger.today() == 1.5


def test_what_could_not_be_written_does_not_count_on_the_next_day(unwritable: Ledger, calendar: Calendar) -> None:
    spend(unwritable, "me", 1.5)
    calendar.at = NEXT_DAY
    assert unwritable.today() == 0.0
