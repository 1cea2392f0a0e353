"""`make bench` as people run it, on its smallest case."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmark", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )


def test_it_writes_a_table_a_figure_and_the_numbers(tmp_path: Path) -> None:
    ended = bench("--clients", "ours,aiohttp", "--cases", "1", "--seconds", "0.5", "--out", str(tmp_path))
    assert ended.returncode in (0, 1), ended.stderr  # 1: this busy machine was not exact enough, and it says where
    scores = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["scores"]
    assert [(one["client"], one["answers"], one["failed"], one["lost"]) for one in scores] == [
        ("ours", 1, 0, 0),
        ("aiohttp", 1, 0, 0),
    ]
    assert "this project" in (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "plotly" in (tmp_path / "benchmark.html").read_text(encoding="utf-8")
    again = bench("--show", str(tmp_path / "benchmark.json"), "--out", str(tmp_path))
    assert (tmp_path / "benchmark.md").read_text(encoding="utf-8").strip() in again.stdout


@pytest.mark.parametrize("wrong", [("--clients", "ours,curl"), ("--cases", "7")])
def test_an_unknown_name_is_refused(wrong: tuple[str, str]) -> None:
    ended = bench(*wrong)
    assert ended.returncode == 2 and f"unknown: {wrong[1].split(',')[-1]}" in ended.stderr
