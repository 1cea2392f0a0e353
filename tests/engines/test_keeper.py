"""No process of an engine outlives its keeper: real process trees, ended in every way they can be ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from engines.process import KEEPER
from tests.conftest import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets the keeper adopt grandchildren")
PYTHON = [sys.executable, "-S", "-c"]
SLEEP = "import time; time.sleep(600)"

# A program that ignores SIGTERM, a worker of it in a session of its own, and a worker's worker that has lost its
# parent; all inherit the ignored signal. Prints the three process ids.
STUBBORN_TREE = """
import os, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
orphan = subprocess.run(["sh", "-c", "setsid sleep 600 >/dev/null & echo $!"], stdout=subprocess.PIPE).stdout
print(os.getpid(), worker.pid, int(orphan), flush=True)
time.sleep(600)
"""
# The keeper itself, with other patience, so that a test need not wait for 8 s.
CHANGED = "import sys; sys.path.insert(0, sys.argv.pop(1)); import keeper; {change}; "
CHANGED += "sys.exit(keeper.main(sys.argv[1:]))"

Keep = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Start a keeper over a program, holding the other end of its standard input."""
    keepers: list[subprocess.Popen[str]] = []
    pids: list[psutil.Process] = []

    def start(*command: str, change: str = "") -> subprocess.Popen[str]:
        words = [sys.executable, "-S", "-E", str(KEEPER)]
        if change:
            words = [*PYTHON, CHANGED.format(change=change), str(KEEPER.parent)]
        process = subprocess.Popen([*words, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        keepers.append(process)
        return process

    yield start
    for process in keepers:
        with process:  # closes the pipes, and waits
            if process.poll() is None:
                pids += psutil.Process(process.pid).children(recursive=True)
            process.kill()
    for left in pids:
        if left.is_running():
            left.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_when_its_input_closes_the_whole_tree_is_ended_even_what_ignores_sigterm(keep: Keep) -> None:
    keeper = keep(*PYTHON, STUBBORN_TREE, change="keeper.POLITE_SECONDS = 0.3")
    tree = [int(word) for word in first_line(keeper).split()]
    assert len(tree) == 3 and not any(gone(pid) for pid in tree)
    wait_until(lambda: len({os.getsid(pid) for pid in tree}) == 3)  # so that no process group would reach them all

    assert keeper.stdin is not None
    keeper.stdin.close()
    code = keeper.wait(10)

    assert [pid for pid in tree if not gone(pid)] == []
    assert code == 128 + signal.SIGKILL


def test_a_program_that_listens_to_sigterm_may_end_politely(keep: Keep) -> None:
    polite = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('bye'), sys.exit(5)));"
    keeper = keep(*PYTHON, f"{polite} print('up', flush=True); time.sleep(600)")
    assert first_line(keeper) == "up"
    assert keeper.stdin is not None
    keeper.stdin.close()
    assert first_line(keeper) == "bye"
    assert keeper.wait(5) == 5


def test_a_signal_to_the_keeper_ends_the_tree(keep: Keep) -> None:
    keepers = {
        number: keep(*PYTHON, f"import os; print(os.getpid(), flush=True); {SLEEP}")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    children = [int(first_line(keeper)) for keeper in keepers.values()]
    for number, keeper in keepers.items():
        keeper.send_signal(number)
    assert [keeper.wait(5) for keeper in keepers.values()] == [128 + signal.SIGTERM] * 3  # as a shell reports it
    assert all(gone(child) for child in children)


def test_a_keeper_killed_for_certain_takes_its_direct_child_along(keep: Keep) -> None:
    keeper = keep(*PYTHON, f"import os; print(os.getpid(), flush=True); {SLEEP}")
    child = int(first_line(keeper))
    keeper.kill()
    wait_until(lambda: gone(child), seconds=5)


def test_workers_that_outlive_the_program_are_ended_with_it(keep: Keep) -> None:
    program = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
    keeper = keep(*PYTHON, program)
    worker = int(first_line(keeper))
    assert keeper.wait(5) == 0
    assert gone(worker)


def test_the_end_of_the_program_is_noticed_at_once(keep: Keep) -> None:
    keeper = keep(*PYTHON, "import time; time.sleep(0.2)", change="keeper.LOOK_SECONDS = 600")
    assert keeper.wait(5) == 0


def test_bytes_on_its_input_do_not_end_it(keep: Keep) -> None:
    keeper = keep(*PYTHON, f"print('up', flush=True); {SLEEP}")
    assert first_line(keeper) == "up"
    assert keeper.stdin is not None
    keeper.stdin.write("hello\n")
    keeper.stdin.flush()
    time.sleep(0.3)
    assert keeper.poll() is None


def test_a_programs_input_is_empty_and_not_the_keepers(keep: Keep) -> None:
    keeper = keep(*PYTHON, "import sys; print(repr(sys.stdin.read()))")
    assert keeper.wait(5) == 0
    assert first_line(keeper) == "''"


def test_the_exit_code_passes_through(keep: Keep) -> None:
    programs = ("pass", "raise SystemExit(7)", "import os; os.kill(os.getpid(), 9)")
    keepers = [keep(*PYTHON, program) for program in programs]
    assert [keeper.wait(5) for keeper in keepers] == [0, 7, 137]  # 128 + 9 = 137, as a shell reports a signal


def test_a_program_that_does_not_exist_is_named(keep: Keep) -> None:
    keeper = keep("/no/such/program", "--flag")
    assert first_line(keeper).startswith("cannot start /no/such/program: ")
    assert keeper.wait(5) == 127
