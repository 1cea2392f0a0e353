"""Keeps one engine server from outliving the app: `python keeper.py PROGRAM ARGUMENTS...`.

The app starts this small process and holds the other end of its standard input. When that pipe closes (the app
ended, crashed, or was killed with SIGKILL) the whole process tree of the engine is ended, first politely, then
for certain. On Linux the keeper also adopts grandchildren whose parent died, so that an engine's worker that
moved to a session of its own is found too.

Standard library only: it must start at once and depend on nothing that an environment may lack.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLITE_SECONDS = 8.0
LOOK_SECONDS = 0.2


def main(command: list[str]) -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    asked_to_stop = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    # Every signal writes a byte here, so that the wait below ends at once; above all when the engine ends.
    signalled, signals = os.pipe()
    os.set_blocking(signals, False)
    signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        engine = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
        )
    except OSError as failure:
        print(f"cannot start {command[0]}: {failure}", flush=True)
        return 127
    while engine.poll() is None and not asked_to_stop:
        with contextlib.suppress(InterruptedError):
            readable, _, _ = select.select([sys.stdin, signalled], [], [], LOOK_SECONDS)
            if signalled in readable:
                os.read(signalled, 4096)
            asked_to_stop = asked_to_stop or (sys.stdin in readable and not os.read(sys.stdin.fileno(), 4096))
        _reap_adopted(engine.pid)
    _end_tree(engine)
    code = engine.returncode if engine.returncode is not None else 0
    return code if code >= 0 else 128 - code  # ended by a signal: as a shell reports it


def _die_with_parent() -> None:
    """If the keeper itself is killed, the engine's main process goes with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end_tree(engine: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, POLITE_SECONDS), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        signalled: set[int] = set()
        while True:
            engine.poll()
            _reap_adopted(engine.pid)
            left = _descendants(os.getpid())
            if not left and engine.poll() is not None:
                return
            for process in left - signalled:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)
            signalled |= left
            if not left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(engine.pid, number)  # where /proc is absent, the group is all we know
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def _descendants(parent: int) -> set[int]:
    """All live processes below `parent`; zombies are left out. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # The command name in the second field may hold spaces and brackets: read from its last bracket on.
            state, parent_id = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended while we looked
        if state != "Z":
            children.setdefault(int(parent_id), []).append(int(entry.name))
    found: set[int] = set()
    waiting = [parent]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def _reap_adopted(engine_pid: int) -> None:
    """Collect ended grandchildren that became ours; the engine itself is left to its Popen."""
    while sys.platform == "linux":
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == engine_pid:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, os.WNOHANG)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
