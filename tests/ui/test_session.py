"""One run at a time on a shared machine: the line is kept, and nobody who left holds it up."""

from __future__ import annotations

import asyncio

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
