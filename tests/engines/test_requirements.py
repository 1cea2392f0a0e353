"""Every engine's pinned set of packages is complete enough to be installed without resolving anything."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from packaging.version import Version

from engines import ENGINES
from engines.base import Device, Engine
from engines.environments import REQUIREMENTS_FOLDER, normalised, pinned

FILES = sorted(REQUIREMENTS_FOLDER.iterdir())
ROWS = [(engine, device) for engine in ENGINES for device in engine.requirements]
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def pins(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@each_file
def test_every_line_is_a_name_and_a_version(file: Path) -> None:
    # No URL, no option, no marker, no wildcard, and no local version such as 2.13.0+cpu, which PyPI does not have.
    form = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[a-z0-9,_-]+\])?==[0-9][A-Za-z0-9.!]*")
    assert [line for line in pins(file) if not form.fullmatch(line)] == []


@each_file
def test_every_version_is_written_as_installers_write_it(file: Path) -> None:
    # The folder of an installed 2026.09.0 says 2026.9.0: the environment would seem to lack it for ever.
    versions = [line.partition("==")[2] for line in pins(file)]
    assert [version for version in versions if str(Version(version)) != version] == []


@each_file
def test_no_package_is_pinned_twice(file: Path) -> None:
    names = Counter(normalised(line.partition("==")[0]) for line in pins(file))
    assert [name for name, count in names.items() if count > 1] == []


@each_file
def test_the_app_reads_the_same_pins(file: Path) -> None:
    expected = {normalised(line.partition("==")[0]): line.partition("==")[2] for line in pins(file)}
    assert pinned(file) == expected
    assert len(expected) > 20


@pytest.mark.parametrize(("engine", "device"), ROWS, ids=[f"{engine.name}-{device}" for engine, device in ROWS])
def test_a_row_of_the_table_pins_its_engine_and_torch(engine: Engine, device: Device) -> None:
    pins = pinned(REQUIREMENTS_FOLDER / engine.requirements[device])
    assert normalised(engine.package_for(device)) in pins
    assert "torch" in pins


def test_every_engine_has_a_set_for_a_cpu_and_for_a_gpu_and_no_file_is_left_over() -> None:
    assert {(engine.name, device) for engine, device in ROWS} == {
        (engine.name, device) for engine in ENGINES for device in ("cpu", "cuda")
    }
    assert {file.name for file in FILES} == {engine.requirements[device] for engine, device in ROWS}


def test_comments_markers_and_spelling_do_not_change_a_pin(tmp_path: Path) -> None:
    file = tmp_path / "pins.txt"
    file.write_text("# a set\n\nTyping_Extensions==4.16.0  # why\nuvicorn[standard]==0.3; python_version > '3'\n")
    assert pinned(file) == {"typing-extensions": "4.16.0", "uvicorn": "0.3"}
