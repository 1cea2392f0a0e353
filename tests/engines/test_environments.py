"""An engine's environment: when it counts as whole, how it is made, and that a failure leaves nothing half made.

The packages are tiny wheels made here, and pip is kept away from every index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from engines import ENGINES, environments
from engines.base import Device, Engine, EngineError
from engines.environments import CACHE_VARIABLE, MARKER, Environment, cache_folder, environment_name
from engines.server import free_port
from tests.conftest import mounted_disk

MakeEngine = Callable[..., Engine]


def make_wheel(folder: Path, name: str, version: str, modules: dict[str, str]) -> None:
    """A wheel is a zip file: the modules, and three small files about them."""
    info = f"{name}-{version}.dist-info"
    files = {
        **modules,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture(autouse=True)
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from, and the only one."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_wheel(folder, "torch", "2.1", {"torch.py": "WORDS = 'this is torch'\n"})
    make_wheel(folder, "Small_Engine", "0.3", {"small_engine.py": "import torch\nWORDS = torch.WORDS\n"})
    monkeypatch.setattr(environments, "LOOK_SECONDS", 0.05)  # these installations take a second, not minutes
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def pinning(tmp_path: Path, scripted: Callable[..., Engine]) -> MakeEngine:
    """An engine row with these pins: `pinning("torch==2.1")`."""

    def make(*pins: str, install_gib: float = 0.0) -> Engine:
        file = tmp_path / "pins.txt"
        file.write_text("\n".join(pins))
        return replace(
            scripted("small"), package="small-engine", requirements={"cpu": str(file)}, install_gib=install_gib
        )

    return make


def lay_out(environment: Environment, *distributions: str, marker: bool = True, python: bool = True) -> None:
    """Make the folder of an environment by hand, with `name-version` distributions in it."""
    packages = environment.folder / "lib" / "python3.11" / "site-packages"
    for distribution in distributions:
        (packages / f"{distribution}.dist-info").mkdir(parents=True)
        (packages / f"{distribution}.dist-info" / "METADATA").write_text("")
    environment.bin.mkdir(parents=True, exist_ok=True)
    if python:
        (environment.bin / "python").symlink_to(sys.executable)
    if marker:
        (environment.folder / MARKER).write_text("{}")


# What counts as whole: folders made by hand


def test_an_environment_with_every_pin_is_whole(pinning: MakeEngine, tmp_path: Path) -> None:
    environment = Environment(pinning("torch==2.1", "Small-Engine==0.3", "fast.api==1"), "cpu", tmp_path)
    lay_out(environment, "torch-2.1+cpu", "small_engine-0.3", "Fast_API-1", "not_pinned-7")
    assert environment.problem() is None
    assert environment.engine_version() == "0.3"
    assert environment.program("serve") == str(environment.folder / "bin" / "serve")
    assert environment.program("python") == str(environment.folder / "bin" / "python")
    environment.ensure()  # has nothing to do: there is no such wheel anywhere
    environment.discard()
    assert environment.problem() == "was not finished"
    environment.discard()  # once more does no harm


@pytest.mark.parametrize(
    ("distributions", "settings", "problem"),
    [
        (["torch-2.1", "small_engine-0.3"], {"marker": False}, "was not finished"),
        (["torch-2.1"], {}, "lacks small-engine 0.3"),
        (["torch-2.1", "small_engine-0.2"], {}, "lacks small-engine 0.3"),
        (["torch-2.1.1", "small_engine-0.3"], {}, "lacks torch 2.1"),
        (["torch-2.1", "small_engine-0.3"], {"python": False}, "lacks its Python"),
    ],
)
def test_what_is_missing_is_named(
    pinning: MakeEngine, tmp_path: Path, distributions: list[str], settings: dict[str, bool], problem: str
) -> None:
    environment = Environment(pinning("torch==2.1", "small-engine==0.3"), "cpu", tmp_path)
    assert environment.problem() == "is not there yet"
    lay_out(environment, *distributions, **settings)
    assert environment.problem() == problem


def test_a_distribution_without_its_metadata_was_cut_off_in_mid_install(pinning: MakeEngine, tmp_path: Path) -> None:
    environment = Environment(pinning("torch==2.1"), "cpu", tmp_path)
    lay_out(environment, "torch-2.1")
    next(environment.folder.glob("lib/*/*/torch-2.1.dist-info/METADATA")).unlink()
    assert environment.problem() == "lacks torch 2.1"


def test_other_pins_are_another_folder(pinning: MakeEngine, tmp_path: Path) -> None:
    folder = Environment(pinning("torch==2.1"), "cpu", tmp_path).folder
    digest = hashlib.sha256(b"torch==2.1").hexdigest()[:10]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    assert folder == tmp_path / "environments" / f"small-cpu-{python}-{digest}"
    assert Environment(pinning("torch==2.2"), "cpu", tmp_path).folder != folder
    assert Environment(pinning("torch==2.1"), "cpu", tmp_path).folder == folder


def test_the_name_of_another_pythons_folder_can_be_told_from_here(pinning: MakeEngine, tmp_path: Path) -> None:
    engine = pinning("torch==2.1")
    digest = hashlib.sha256(b"torch==2.1").hexdigest()[:10]
    assert environment_name(engine, "cpu", "3.9") == f"small-cpu-py39-{digest}"
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert environment_name(engine, "cpu", ours) == Environment(engine, "cpu", tmp_path).folder.name
    assert environment_name(pinning("torch==2.2"), "cpu", "3.9") != f"small-cpu-py39-{digest}"


def test_every_engine_has_a_folder_of_its_own_for_each_device() -> None:
    devices: tuple[Device, ...] = ("cpu", "cuda")
    names = {environment_name(engine, device, "3.11") for engine in ENGINES for device in devices}
    assert len(names) == len(ENGINES) * len(devices)


def test_an_engine_without_pins_runs_in_the_apps_own_environment(scripted: Callable[..., Engine]) -> None:
    environment = Environment(scripted(), "cpu")
    assert environment.problem() is None
    assert environment.program("python") == sys.executable
    assert environment.engine_version() is not None  # of aiohttp, in place of an engine


def test_a_device_without_pins_is_refused(pinning: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^Small has no pinned set of packages for cuda\.$"):
        Environment(pinning("torch==2.1"), "cuda", tmp_path)


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder().name == "llm-inference-bakeoff"


# Making it


def test_two_at_once_make_a_half_made_environment_again_once(pinning: MakeEngine, tmp_path: Path) -> None:
    engine = pinning("torch==2.1", "small-engine==0.3", install_gib=0.001)
    stories: tuple[list[str], list[str]] = ([], [])
    both = [Environment(engine, "cpu", tmp_path / "cache") for _ in stories]
    lay_out(both[0], "torch-2.1", marker=False)
    (both[0].folder / "left over").write_text("of an app that was killed")

    makers = [
        threading.Thread(target=environment.ensure, args=(story.append,))
        for environment, story in zip(both, stories, strict=True)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()

    waited, made = sorted(stories, key=lambda story: "creating its environment" in story)
    assert made[:3] == [
        "making the environment again: it was not finished",
        "creating its environment",
        "installing torch 2.1",
    ]
    assert set(waited) == {"another app is installing it; waiting"}
    environment = both[0]
    assert environment.problem() is None
    assert not (environment.folder / "left over").exists()
    assert environment.installed() == {"torch": "2.1", "small-engine": "0.3"}
    assert json.loads((environment.folder / MARKER).read_text()) == {
        "engine": "small",
        "device": "cpu",
        "installed": {"torch": "2.1", "small-engine": "0.3"},
    }
    program = [environment.program("python"), "-c", "import small_engine; print(small_engine.WORDS)"]
    assert subprocess.run(program, capture_output=True, text=True).stdout == "this is torch\n"


def test_a_package_that_cannot_be_had_leaves_nothing_and_gives_pips_reason(pinning: MakeEngine, tmp_path: Path) -> None:
    environment = Environment(pinning("torch==9"), "cpu", tmp_path / "cache")
    with pytest.raises(EngineError) as caught:
        environment.ensure()
    # Which of its two sentences pip chooses depends on what else the machine's package index offers.
    assert re.fullmatch(r"Installing Small failed: .+ torch==9\b.*", caught.value.message)
    assert "torch==9" in caught.value.log_tail
    assert not environment.folder.exists()


def test_an_index_that_cannot_be_reached_is_the_reason_and_not_a_conflict(
    pinning: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    environment = Environment(pinning("torch==2.1"), "cpu", tmp_path / "cache")
    with pytest.raises(EngineError) as caught:
        environment.ensure()
    assert caught.value.message == (
        "Installing Small failed: the package index cannot be reached. Check the network connection, and try again."
    )
    assert "connection broken by" in caught.value.log_tail


@pytest.mark.parametrize("interruption", ["cancelled", "Ctrl-C"])
def test_an_interrupted_installation_leaves_nothing(
    pinning: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: str
) -> None:
    environment = Environment(pinning("torch==2.1"), "cpu", tmp_path / "cache")
    cancelled = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as index:  # an index that accepts, and never answers
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/")

        def watch(message: str) -> None:
            if message == "installing torch 2.1" and interruption == "cancelled":
                threading.Thread(target=lambda: (index.accept(), cancelled.set())).start()  # pip waits by now
            elif message == "installing torch 2.1":
                raise KeyboardInterrupt

        expected = {"cancelled": EngineError, "Ctrl-C": KeyboardInterrupt}[interruption]
        with pytest.raises(expected) as caught:
            environment.ensure(watch, cancelled)
    if interruption == "cancelled":
        assert caught.match(r"^The installation was cancelled\.$")
    assert not environment.folder.exists()
    assert psutil.Process().children(recursive=True) == []


def test_who_waits_for_another_app_can_be_cancelled(pinning: MakeEngine, tmp_path: Path) -> None:
    environment = Environment(pinning("torch==2.1"), "cpu", tmp_path)
    environment.folder.parent.mkdir(parents=True)
    cancelled = threading.Event()
    with FileLock(f"{environment.folder}.lock"), pytest.raises(EngineError, match="was cancelled"):  # another's
        environment.ensure(lambda message: cancelled.set() if "another app" in message else None, cancelled)
    assert not environment.folder.exists()


# Disks


def test_too_little_space_is_said_before_anything_is_made(pinning: MakeEngine, tmp_path: Path) -> None:
    environment = Environment(pinning("torch==2.1", install_gib=1e6), "cpu", tmp_path)
    with pytest.raises(EngineError) as caught:
        environment.ensure()
    message = caught.value.message
    assert message.startswith("Not enough disk space to install Small: it needs 1000000.0 GiB, ")
    assert f"GiB are free in {tmp_path}" in message
    assert f"set {CACHE_VARIABLE} to a folder on a larger disk." in message
    assert not environment.folder.exists()


def test_a_cache_that_cannot_be_written_is_said(pinning: MakeEngine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = Environment(pinning("torch==2.1"), "cpu", tmp_path / "file")
    with pytest.raises(EngineError, match=r"^Cannot write to .*/file/environments: Not a directory\.$"):
        environment.ensure()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    with mounted_disk(tmp_path / "disk", "2m") as folder:
        yield folder


DISK_IS_FULL = f"the disk is full. Free some space, or set {CACHE_VARIABLE} to a folder on a larger disk."


def test_a_disk_that_fills_up_while_pip_unpacks_leaves_nothing(
    pinning: MakeEngine, wheels: Path, small_disk: Path
) -> None:
    make_wheel(wheels, "torch", "2.2", {"torch.py": "#" * (4 << 20)})  # 4 MiB of the 2 there are
    environment = Environment(pinning("torch==2.2"), "cpu", small_disk)
    with pytest.raises(EngineError) as caught:
        environment.ensure()
    assert caught.value.message == f"Installing Small failed: {DISK_IS_FULL}"
    assert not environment.folder.exists()


def test_a_disk_that_is_full_for_the_marker_leaves_nothing(pinning: MakeEngine, small_disk: Path) -> None:
    environment = Environment(pinning("torch==2.1"), "cpu", small_disk)

    def fill(message: str) -> None:
        if message.startswith("downloading package 1 of 1"):  # pip has written all it had to
            with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass

    with pytest.raises(EngineError) as caught:
        environment.ensure(fill)
    assert caught.value.message == f"Installing Small failed: {DISK_IS_FULL}"
    assert not environment.folder.exists()
