"""One run at a time on a shared machine: the line is kept, and nobody who left holds it up."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from ui.public import Load, PublicRules, Tally, Use
from ui.session import Sessions, Turn

NOW = 0.01  # seconds of patience: long enough for a turn that has come, short enough for one that has not


class Run:
    """Stands for a run under way, of which the line only knows how to stop it."""

    stopped = False

    def stop(self) -> None:
        self.stopped = True


def test_the_first_in_line_has_its_turn_at_once_and_the_next_when_it_has_left() -> None:
    async def main() -> None:
        sessions = Sessions()
        first_place, second_place = sessions.turn("first"), sessions.turn("second")
        first, second = await first_place.__aenter__(), await second_place.__aenter__()
        assert await first.came(NOW)
        assert not await second.came(NOW)
        await first_place.__aexit__(None, None, None)
        assert await second.came(NOW)
        await second_place.__aexit__(None, None, None)

    asyncio.run(main())


def test_turns_come_in_the_order_of_arrival() -> None:
    finished: list[str] = []

    async def visit(sessions: Sessions, name: str) -> None:
        async with sessions.turn(name) as turn:
            while not await turn.came(NOW):
                pass
            finished.append(name)
            await asyncio.sleep(0)

    async def main() -> None:
        sessions = Sessions()
        await asyncio.gather(*(visit(sessions, name) for name in "cabd"))

    asyncio.run(main())
    assert finished == list("cabd")


def test_a_run_that_breaks_off_gives_the_machine_to_the_next() -> None:
    async def main() -> None:
        sessions = Sessions()
        try:
            async with sessions.turn("broken"):
                raise RuntimeError("the run broke off")
        except RuntimeError:
            pass
        async with sessions.turn("next") as turn:
            assert await turn.came(NOW)

    asyncio.run(main())


def test_giving_up_in_the_line_ends_the_wait_and_lets_the_next_move_up() -> None:
    async def main() -> None:
        sessions = Sessions()
        async with sessions.turn("running") as running, sessions.turn("patient") as patient:
            async with sessions.turn("hasty") as hasty:
                sessions.stop("hasty")
                assert await hasty.came(NOW)  # the wait is over,
                assert hasty.given_up  # though not because its turn had come
            assert not await patient.came(NOW)
            assert not running.given_up

    asyncio.run(main())


def test_leaving_the_middle_of_the_line_does_not_skip_anybody() -> None:
    async def main() -> None:
        sessions = Sessions()
        async with sessions.turn("first"):
            leaving = sessions.turn("leaving")
            await leaving.__aenter__()
            async with sessions.turn("last") as last:
                await leaving.__aexit__(None, None, None)
                assert not await last.came(NOW)

    asyncio.run(main())


def test_stopping_reaches_only_ones_own_run() -> None:
    async def main() -> None:
        sessions, mine, yours = Sessions(), Run(), Run()
        async with sessions.turn("me") as my_turn, sessions.turn("you") as your_turn:
            my_turn.runs(mine)  # type: ignore[arg-type]
            your_turn.runs(yours)  # type: ignore[arg-type]
            sessions.stop("me")
            sessions.stop("somebody else")
        assert (mine.stopped, yours.stopped) == (True, False)

    asyncio.run(main())


def test_a_run_handed_over_after_its_visitor_gave_up_is_stopped_at_once() -> None:
    async def main() -> None:
        turn, run = Turn(), Run()
        turn.give_up()
        turn.runs(run)  # type: ignore[arg-type]
        assert run.stopped

    asyncio.run(main())


def test_a_visitor_who_has_finished_can_come_again() -> None:
    async def main() -> None:
        sessions = Sessions()
        for _ in range(2):
            async with sessions.turn("me") as turn:
                assert await turn.came(NOW)
                assert not turn.given_up
            sessions.stop("me")  # pressing Stop when nothing runs

    asyncio.run(main())


# Where somebody stands, and how long it takes


def load(tokens: int = 1000) -> Load:
    return Load("baseline", 10, tokens)


def timed_tally(seconds_per_1000_tokens: float) -> Tally:
    tally = Tally()
    tally.add(Use("x", runs=1, experiment="baseline", planned_tokens=1000, seconds=seconds_per_1000_tokens))
    return tally


def test_everybody_in_line_sees_their_place_which_moves_as_others_leave() -> None:
    async def main() -> None:
        sessions = Sessions()
        async with sessions.turn("first") as first, sessions.turn("third") as third:
            second_place = sessions.turn("second")
            second = await second_place.__aenter__()
            assert [sessions.place(turn).number for turn in (first, third, second)] == [0, 1, 2]
            assert sessions.place(third).words == "Another run is under way; yours is next in line."
            assert sessions.place(second).words == "You are number 2 in line. Others run before you."
            await second_place.__aexit__(None, None, None)
            async with sessions.turn("fourth") as fourth:
                assert sessions.place(fourth).number == 2

    asyncio.run(main())


def test_the_wait_is_that_of_the_plans_ahead_less_what_has_passed() -> None:
    async def main() -> None:
        sessions = Sessions(tally=timed_tally(60.0))
        async with (
            sessions.turn("a", "A", load(1000)) as running,
            sessions.turn("b", "B", load(2000)) as next_one,
            sessions.turn("c", "C", load()) as last,
        ):
            assert running.began is not None
            running.began -= 30
            assert 28 < (sessions.place(next_one).seconds or 0) <= 30
            assert 148 < (sessions.place(last).seconds or 0) <= 150
            assert sessions.place(last).words == "You are number 2 in line; about 3 minutes."
            running.began -= 300  # it takes longer than foreseen, and nobody's wait is less than nothing
            assert sessions.place(next_one).seconds == 0.0
            assert sessions.place(next_one).words.endswith("yours is next in line; less than a minute.")

    asyncio.run(main())


def test_a_wait_that_nobody_can_know_is_not_made_up() -> None:
    async def main() -> None:
        sessions = Sessions(tally=timed_tally(60.0))
        unknown = Load("speculation", 10, 1000)  # no run of it was ever finished here
        async with sessions.turn("a", "A", unknown), sessions.turn("b", "B", load()), sessions.turn("c") as last:
            assert sessions.place(last).seconds is None
            assert "minute" not in sessions.place(last).words

    asyncio.run(main())


# Public mode


def test_in_public_mode_a_visitor_has_one_place_and_the_line_an_end() -> None:
    async def main() -> None:
        sessions = Sessions(rules=replace(PublicRules(), line=2))
        assert sessions.refusal("A", load()) == ""
        async with sessions.turn("a", "A", load()):
            assert "a run in line already" in sessions.refusal("A", load())
            assert sessions.refusal("B", load()) == ""
            async with sessions.turn("b", "B", load()):
                assert "The line is full: 2 visitors" in sessions.refusal("C", load())
            assert sessions.refusal("C", load()) == ""
        assert sessions.refusal("A", load()) == ""

    asyncio.run(main())


def test_on_a_page_of_ones_own_nothing_is_refused() -> None:
    async def main() -> None:
        sessions = Sessions()
        sessions.tally.add(Use("A", runs=10_000, requests=10**9, tokens=10**9))
        async with sessions.turn("a", "A", load()):
            assert sessions.refusal("A", load()) == sessions.refusal_at_turn("A", load()) == ""

    asyncio.run(main())


def test_the_owners_run_is_let_before_those_that_wait_and_after_the_one_that_runs() -> None:
    async def main() -> None:
        sessions = Sessions(rules=PublicRules())
        async with sessions.turn("a", "A") as running, sessions.turn("b", "B") as waiting:
            own_place = sessions.turn("own", "own")
            own = await own_place.__aenter__()
            assert sessions.to_front("own")
            assert [sessions.place(turn).number for turn in (running, own, waiting)] == [0, 1, 2]
            assert not await own.came(NOW)
            assert not sessions.to_front("a") and not sessions.to_front("nobody")
            await own_place.__aexit__(None, None, None)
            assert not await waiting.came(NOW)

    asyncio.run(main())
