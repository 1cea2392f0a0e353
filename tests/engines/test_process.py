"""A kept process: what it prints, what it inherits, and that it ends when we do."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engines.process import KeptProcess
from tests.conftest import wait_until

PYTHON = [sys.executable, "-c"]
SLEEP = "import time; time.sleep(600)"
PROJECT = Path(__file__).parents[2]


def ended(process: psutil.Process) -> bool:
    """Gone, or about to be collected by whoever has inherited it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def printed(program: str, **settings: dict[str, str]) -> list[str]:
    process = KeptProcess([*PYTHON, program], **settings)
    lines = [line.rstrip("\n") for line in process]
    process.stop()
    return lines


def test_lines_of_both_outputs_come_in_their_order() -> None:
    program = "import sys; print('one'); print('two', file=sys.stderr); print('three')"
    assert printed(program) == ["one", "two", "three"]


def test_bytes_that_are_no_text_do_not_end_the_reading() -> None:
    assert printed(r"import sys; sys.stdout.buffer.write(b'caf\xe9\n'); sys.stdout.buffer.write(b'next\n')") == [
        "caf�",
        "next",
    ]


def test_the_apps_own_path_does_not_leak_but_given_variables_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/the/app")
    monkeypatch.setenv("INHERITED", "yes")
    show = "import os; print([os.environ.get(name) for name in ('PYTHONPATH', 'INHERITED', 'GIVEN')])"
    assert printed(show, variables={"GIVEN": "1"}) == ["[None, 'yes', '1']"]
    assert printed(show, variables={"PYTHONPATH": "/engine"}) == ["['/engine', 'yes', None]"]


def test_it_runs_until_it_is_stopped_and_then_its_tree_is_gone() -> None:
    process = KeptProcess([*PYTHON, f"print('up', flush=True); {SLEEP}"])
    assert next(iter(process)) == "up\n"
    tree = psutil.Process(process.pid).children(recursive=True)
    assert len(tree) == 1
    assert process.running()

    process.stop()

    assert not process.running()
    assert psutil.wait_procs(tree, timeout=1)[1] == []
    assert process.wait() == 128 + signal.SIGTERM
    process.stop()  # once more does no harm


def test_the_exit_code_passes_through() -> None:
    process = KeptProcess([*PYTHON, "raise SystemExit(7)"])
    assert process.wait() == 7
    assert not process.running()


def test_output_that_nobody_reads_does_not_keep_it_from_being_stopped() -> None:
    process = KeptProcess([*PYTHON, "print('x' * 1_000_000)"])  # more than a pipe holds: it blocks
    wait_until(lambda: psutil.Process(process.pid).children() != [])
    process.stop()
    assert not process.running()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the worker's own session would not be found")
def test_when_the_app_is_killed_for_certain_nothing_is_left() -> None:
    worker = (
        "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True); print('up', flush=True);"
    )
    app = f"import sys; from engines.process import KeptProcess; p = KeptProcess({[*PYTHON, worker + SLEEP]!r});"
    app += "print(next(iter(p)), flush=True); import time; time.sleep(600)"
    with subprocess.Popen([*PYTHON, app], stdout=subprocess.PIPE, text=True, cwd=PROJECT) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "up\n"
        tree = psutil.Process(killed.pid).children(recursive=True)
        assert len(tree) == 3  # the keeper, the program, its worker
        killed.kill()
    wait_until(lambda: all(ended(process) for process in tree), seconds=5)
