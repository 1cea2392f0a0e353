"""What packed packages ask for, against what they get."""

from __future__ import annotations

from pathlib import Path

from packing.needs import unmet
from tests.packing.conftest import MakeWheel


def test_what_is_asked_for_and_not_there_is_said(wheel: MakeWheel, shelf: Path) -> None:
    wheel(
        "fast",
        "1",
        {},
        requires=(
            "torch==2.11.0",
            "numba==0.65",
            "old<2",
            "scipy>=9",
            "nowhere>=1",
            "z3-solver",
            "Helper[more]>=1",
            "for-windows; sys_platform == 'win32'",
            "for-tests; extra == 'test'",
        ),
    )
    wheel("helper", "1", {}, requires=("always", "only-more; extra == 'more'", "only-other; extra == 'other'"))
    packed = {"fast": "1", "helper": "1", "old": "3"}
    wheel("old", "3", {})
    wheels = {name: shelf / f"{name}-{version}-py3-none-any.whl" for name, version in packed.items()}
    base = {"torch": "2.11.0", "numba": "0.68", "scipy": None}
    assert unmet(wheels, packed, base, {"z3-solver": "used by nothing"}, "3.12") == [
        "fast asks for nowhere>=1: nobody has it",
        "fast asks for numba==0.65: gets 0.68",
        "fast asks for old<2: gets 3",
        "fast asks for z3-solver: left out, used by nothing",
        "helper asks for always: nobody has it",
        "helper asks for only-more: nobody has it",
    ]
