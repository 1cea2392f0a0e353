"""From parts to environments that the app finds whole, and what goes wrong on the way."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import packing.__main__
from engines.base import Engine, EngineError
from engines.environments import MARKER, Environment
from packing import pack
from packing.unpack import UnpackError, unpack
from tests.packing.conftest import PYTHON, MakeWheel


@pytest.fixture
def engine(tmp_path: Path, scripted: Callable[..., Engine]) -> Engine:
    file = tmp_path / "app-pins.txt"
    file.write_text("torch==2.13.0\nfast-engine==9\n")  # what the app itself would install
    return replace(scripted("fast"), package="fast-engine", requirements={"cuda": str(file)})


@pytest.fixture
def parts(
    wheel: MakeWheel, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """Two engines that share a package, packed through the command line into parts of 2 kB."""
    main = "import shared, torch\n\ndef main():\n    print(__name__, shared.VERSION, torch.VERSION)\n"
    wheel("fast-engine", "0.3", {"fast_engine.py": main}, scripts="fast = fast_engine:main")
    chance = random.Random(7)  # what cannot be compressed fills parts
    noise = {f"noise{number}.bin": chance.randbytes(700) for number in range(12)}
    files = {"shared.py": "VERSION = '1.0'\n", "shared-1.0.data/scripts/shared-tool": "#!python\nprint('tool')\n"}
    wheel("shared", "1.0", {**files, **noise})
    wheel("slow-engine", "0.1", {"slow_engine/__init__.py": main}, scripts="slow = slow_engine:main")
    sets = tmp_path / "sets"
    sets.mkdir()
    (sets / "fast-cuda-torch2.11.txt").write_text("torch==2.11.0\nfast-engine==0.3\nshared==1.0\n")
    (sets / "slow-cuda-torch2.11.txt").write_text("torch==2.11.0\nmachine-only==7\nslow-engine==0.1\nshared==1.0\n")
    (tmp_path / "freeze.txt").write_text("torch==2.11.0+cu130\nshared==0.9\nmachine-only==7\n")
    monkeypatch.setattr(pack, "REQUIREMENTS", sets)
    monkeypatch.setattr(pack, "BLOCK", 1000)
    command = ["pack", "--engine", "fast", "--engine", "slow", "--python", PYTHON, "--part-megabytes", "0.002"]
    command += ["--base", str(tmp_path / "freeze.txt"), "--out", str(tmp_path / "parts")]
    command += ["--wheels", str(tmp_path / "wheels")]
    assert packing.__main__.main(command) == 0, capsys.readouterr().err
    assert f"parts in {tmp_path / 'parts'}" in capsys.readouterr().out
    return tmp_path / "parts"


def output(program: str | Path, *arguments: str) -> str:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout.strip()


def test_the_app_finds_a_packed_environment_whole(parts: Path, machine: Path, tmp_path: Path, engine: Engine) -> None:
    cache = tmp_path / "cache"
    places = unpack(parts, cache, str(machine))
    assert [place.name for place in places] == ["fast-cuda-packed", "slow-cuda-packed"]
    environment = Environment(engine, "cuda", cache)
    assert environment.folder == places[0]
    assert environment.problem() is None
    environment.ensure()  # has nothing to do
    assert environment.engine_version() == "0.3"
    assert environment.installed() == {"fast-engine": "0.3", "shared": "1.0", "torch": "2.11.0+cu130"}
    # The packed package comes before the machine's, the machine's torch is seen.
    assert output(environment.program("fast")) == "fast_engine 1.0 2.11.0+cu130"
    assert output(environment.program("python"), "-c", "import sys; print(sys.prefix)") == str(places[0])


def test_each_environments_programs_run_its_own_python(parts: Path, machine: Path, tmp_path: Path) -> None:
    _, slow = unpack(parts, tmp_path / "cache", str(machine))
    assert output(slow / "bin" / "slow") == "slow_engine 1.0 2.11.0+cu130"
    assert output(slow / "bin" / "machine-tool") == "machine tool"  # a pinned package of the machine's
    assert output(slow / "bin" / "shared-tool") == "tool"
    scripts = [file for file in (slow / "bin").iterdir() if not file.is_symlink()]
    assert {file.read_text().splitlines()[0] for file in scripts} == {f"#!{slow}/bin/python"}


def test_a_shared_package_travels_once_and_lies_on_the_disk_once(parts: Path, machine: Path, tmp_path: Path) -> None:
    places = unpack(parts, tmp_path / "cache", str(machine))
    files = [place / "lib" / f"python{PYTHON}" / "site-packages" / "shared.py" for place in places]
    assert files[0].samefile(files[1])


def test_unpacking_again_replaces_what_was_there(parts: Path, machine: Path, tmp_path: Path, engine: Engine) -> None:
    unpack(parts, tmp_path / "cache", str(machine))
    (tmp_path / "cache/environments/fast-cuda-packed/left over").write_text("")
    place = unpack(parts, tmp_path / "cache", str(machine))[0]
    assert not (place / "left over").exists()
    assert Environment(engine, "cuda", tmp_path / "cache").problem() is None


def test_the_unpacking_file_runs_alone(parts: Path, machine: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(packing.unpack.__file__, alone / "unpack.py")
    command = [
        str(machine),
        "-I",
        str(alone / "unpack.py"),
        str(parts),
        "--cache",
        str(tmp_path / "cache"),
        "--compile",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=alone)
    assert (done.returncode, done.stderr) == (0, "")
    fast = tmp_path / "cache" / "environments" / "fast-cuda-packed"
    assert str(fast) in done.stdout.splitlines()
    assert list(fast.rglob("shared.*.pyc"))
    assert output(fast / "bin" / "fast") == "fast_engine 1.0 2.11.0+cu130"


# What goes wrong


def test_missing_parts_are_named_before_anything_is_made(
    parts: Path, machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(list(parts.glob("part-*")))
    assert count > 3
    (parts / "part-01").unlink()
    (parts / "part-02").unlink()
    command = ["unpack", str(parts), "--cache", str(tmp_path / "cache"), "--base-python", str(machine)]
    assert packing.__main__.main(command) == 1
    assert capsys.readouterr().err == f"{parts} lacks part-01, part-02 (of {count} parts): copy it here.\n"
    assert not (tmp_path / "cache").exists()


def test_a_damaged_part_is_named(parts: Path, machine: Path, tmp_path: Path) -> None:
    damaged = bytearray((parts / "part-01").read_bytes())
    damaged[100] ^= 1
    (parts / "part-01").write_bytes(damaged)
    with pytest.raises(UnpackError, match=r"^Damaged on the way: part-01\. Copy it again\.$"):
        unpack(parts, tmp_path / "cache", str(machine))


def test_a_missing_manifest_is_said(tmp_path: Path, machine: Path) -> None:
    with pytest.raises(UnpackError, match=r"manifest\.json is not there: copy it here"):
        unpack(tmp_path, tmp_path / "cache", str(machine))


@pytest.fixture
def changed(parts: Path) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    def change(edit: Callable[[dict[str, Any]], None]) -> None:
        manifest = json.loads((parts / "manifest.json").read_text())
        edit(manifest)
        (parts / "manifest.json").write_text(json.dumps(manifest))

    return change


def test_another_python_is_refused(parts: Path, machine: Path, tmp_path: Path, changed: Callable[..., None]) -> None:
    changed(lambda manifest: manifest.update(python="3.7"))
    with pytest.raises(UnpackError, match=rf"^The pack is for Python 3\.7, the machine's is {PYTHON}\.$"):
        unpack(parts, tmp_path / "cache", str(machine))


def test_other_packages_than_packed_for_are_named(
    parts: Path, machine: Path, tmp_path: Path, changed: Callable[..., None]
) -> None:
    packages = machine.parent.parent / "lib" / f"python{PYTHON}" / "site-packages"
    (packages / "machine_only-7.dist-info").rename(packages / "machine_only-8.dist-info")
    (packages / "machine_only-8.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: machine-only\nVersion: 8\n"
    )
    with pytest.raises(UnpackError, match=r"slow needs machine-only 7, 8 is there\. Pack again .*--any-base-version"):
        unpack(parts, tmp_path / "cache", str(machine))
    slow = unpack(parts, tmp_path / "cache", str(machine), any_base_version=True)[1]
    assert json.loads((slow / MARKER).read_text())["installed"]["machine-only"] == "8"  # what is really there
    shutil.rmtree(packages / "torch-2.11.0+cu130.dist-info")
    with pytest.raises(UnpackError, match="fast needs torch, which is not there"):
        unpack(parts, tmp_path / "cache", str(machine), any_base_version=True)


def test_too_little_space_is_said_before_anything_is_written(
    parts: Path, machine: Path, tmp_path: Path, changed: Callable[..., None]
) -> None:
    changed(lambda manifest: manifest.update(unpacked_bytes=10**18))
    with pytest.raises(UnpackError, match=r"^The environments need 1000000000\.0 GB, .* GB are free in "):
        unpack(parts, tmp_path / "cache", str(machine))


def test_a_packed_environment_that_is_not_whole_is_not_installed_over(
    parts: Path, machine: Path, tmp_path: Path, engine: Engine
) -> None:
    place = unpack(parts, tmp_path / "cache", str(machine))[0]
    environment = Environment(engine, "cuda", tmp_path / "cache")
    environment.discard()  # an engine that named a missing package: there is no other to be had
    assert environment.problem() is None
    packages = place / "lib" / f"python{PYTHON}" / "site-packages"
    shutil.rmtree(packages / "shared-1.0.dist-info")
    assert environment.problem() == "lacks shared 1.0"
    with pytest.raises(EngineError, match=r"^The packed environment of Fast in .* lacks shared 1\.0\. Unpack it again"):
        environment.ensure()
    (place / MARKER).unlink()
    assert Environment(engine, "cuda", tmp_path / "cache").problem() == "was not finished"


def test_a_torch_that_the_machine_has_lost_is_noticed(
    parts: Path, machine: Path, tmp_path: Path, engine: Engine
) -> None:
    unpack(parts, tmp_path / "cache", str(machine))
    shutil.rmtree(machine.parent.parent / "lib" / f"python{PYTHON}" / "site-packages" / "torch-2.11.0+cu130.dist-info")
    assert Environment(engine, "cuda", tmp_path / "cache").problem() == "lacks torch 2.11.0+cu130"


def test_unpacking_loads_nothing_that_has_to_be_installed(tmp_path: Path) -> None:
    code = "import sys, packing.__main__; print([name for name in sys.modules if name in ('filelock', 'engines')])"
    assert output(sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, '.'); {code}") == "[]"
