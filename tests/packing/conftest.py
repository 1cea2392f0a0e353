"""A machine that has torch, made of a Python here and a folder of packages; and a shelf of tiny wheels."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MakeWheel = Callable[..., None]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from, and the only one."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(shelf: Path) -> MakeWheel:
    """`wheel("fast-engine", "0.3", {"fast_engine.py": "..."}, scripts="fast = fast_engine:main")`."""

    def make(
        name: str, version: str, files: dict[str, str | bytes], scripts: str = "", requires: tuple[str, ...] = ()
    ) -> None:
        stem = f"{name.replace('-', '_')}-{version}"
        info = f"{stem}.dist-info"
        asked = "".join(f"Requires-Dist: {line}\n" for line in requires)
        content = {
            **files,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{asked}",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        if scripts:
            content[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}\n"
        content[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
        with zipfile.ZipFile(shelf / f"{stem}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            for path, text in content.items():
                archive.writestr(path, text)

    return make


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The Python of a machine with torch 2.11.0+cu130 and an older shared package in its own folder."""
    home = tmp_path / "machine"
    packages = home / "lib" / f"python{PYTHON}" / "site-packages"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    base = Path(sys._base_executable).parent  # type: ignore[attr-defined]
    (home / "pyvenv.cfg").write_text(f"home = {base}\ninclude-system-site-packages = false\n")
    for name, version in {"torch": "2.11.0+cu130", "shared": "0.9", "machine-only": "7"}.items():
        info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (packages / f"{name.replace('-', '_')}.py").write_text(f"VERSION = {version!r}\n")
    info = packages / "machine_only-7.dist-info"
    (info / "entry_points.txt").write_text("[console_scripts]\nmachine-tool = machine_only:main\n")
    (packages / "machine_only.py").write_text("VERSION = '7'\n\ndef main():\n    print('machine tool')\n")
    return home / "bin" / "python"
