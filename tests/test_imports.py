"""Which part may know which: `engines <- experiments <- ui <- app`; and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
MAY_IMPORT = {
    "engines": set(),
    "demo_model": {"engines"},
    "experiments": {"engines", "demo_model"},
    "benchmark": {"engines", "experiments", "demo_model"},
    "packing": {"engines"},
    "ui": {"engines", "experiments"},
    "app": {"engines", "experiments", "ui", "demo_model"},
    "modal_app": {"engines", "experiments", "app"},
}
HEAVY = {"torch", "vllm", "sglang", "transformers", "modal"}


def source_files() -> list[Path]:
    folders = [path for part in MAY_IMPORT for path in sorted((PROJECT / part).rglob("*.py"))]
    return [*folders, PROJECT / "app.py", PROJECT / "modal_app.py"]


@cache
def imported(path: Path) -> set[str]:
    """Every module that the file names, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which this test cannot follow"
            names.add(node.module or "")
    return names


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


# Parsed while the tests are collected: Python 3.11 fails ("SystemError: AST constructor recursion depth mismatch")
# when another thread parses at the same time, and tests before these leave threads of the page's server behind.
for source in source_files():
    imported(source)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_each_file_imports_only_what_lies_before_it(path: Path) -> None:
    part = path.relative_to(PROJECT).parts[0].removesuffix(".py")
    ours = packages(path) & set(MAY_IMPORT)
    assert ours - {part} <= MAY_IMPORT[part]


def test_every_part_is_looked_at() -> None:
    parts = {path.relative_to(PROJECT).parts[0].removesuffix(".py") for path in source_files()}
    assert parts == set(MAY_IMPORT)


def test_only_the_page_knows_gradio() -> None:
    knowing = {path.relative_to(PROJECT).parts[0] for path in source_files() if "gradio" in packages(path)}
    assert knowing == {"ui"}


def test_unpacking_needs_the_standard_library_only() -> None:
    assert packages(PROJECT / "packing/unpack.py") <= sys.stdlib_module_names
    assert packages(PROJECT / "packing/__main__.py") <= {*sys.stdlib_module_names, "packing"}


@pytest.mark.parametrize("name", ["engines/base.py", "engines/timeline.py", "engines/keeper.py"])
def test_the_lowest_files_need_the_standard_library_only(name: str) -> None:
    assert packages(PROJECT / name) <= {*sys.stdlib_module_names, "engines"}


def test_one_file_reads_the_clock_that_measures() -> None:
    measuring = [path for path in source_files() if "demo_model" not in path.parts]
    reading = [path.name for path in measuring if "perf_counter" in path.read_text(encoding="utf-8")]
    assert reading == ["clock.py"]


def test_nothing_loads_an_engine_or_a_tensor_library_into_the_app() -> None:
    # In a process of its own: pytest's may have loaded anything. The app puts off Gradio, which takes seconds.
    program = (
        "import sys, app; early = set(sys.modules); import experiments.run, ui.page; "
        "print('gradio' in early, 'gradio' in sys.modules, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=60
    )
    gradio_early, gradio_late, *loaded = ended.stdout.split()
    assert (gradio_early, gradio_late) == ("False", "True")
    assert HEAVY.isdisjoint(loaded)


def test_the_readmes_map_names_files_that_exist() -> None:
    readme = PROJECT / "README.md"
    named = set(re.findall(r"[\w./-]*\w\.py\b", readme.read_text(encoding="utf-8"))) if readme.exists() else set()
    if not named:
        pytest.skip("README.md has no map of the files yet")
    # A map may indent a file under its folder's name, so the end of the path is enough.
    paths = [f"/{path.relative_to(PROJECT)}" for path in PROJECT.rglob("*.py") if ".venv" not in path.parts]
    missing = {name for name in named if not any(path.endswith(f"/{name.removeprefix('./')}") for path in paths)}
    assert missing == set()
