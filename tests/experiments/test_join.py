"""Runs of the same plan in one result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.join import joined, main
from experiments.report import table
from experiments.result import EngineRow, ExperimentResult, ResultError
from tests.experiments.test_result import result_of


def run_of(name: str, *speeds: float) -> ExperimentResult:
    result = result_of(**{name: speeds})  # type: ignore[arg-type]
    settings = {**result.settings, "engines": [name]}
    return replace(result, id=f"baseline-{name}", settings=settings, labels=("As measured.",))


def test_two_runs_become_one_that_has_both_and_says_that_it_was_joined() -> None:
    quick, slow = run_of("quick", 100.0, 110.0), run_of("slow", 20.0, 30.0)
    whole = joined([quick, slow])
    assert [row.name for row in whole.engines] == ["quick", "slow"]
    assert whole.requests == (*quick.requests, *slow.requests)
    assert whole.settings["engines"] == ["quick", "slow"]
    assert whole.id not in (quick.id, slow.id)
    assert whole.labels == (
        "As measured.",
        "Joined of 2 runs in which the engines were measured apart: baseline-quick (Quick), baseline-slow (Slow).",
    )
    assert [row[0] for row in table(whole).rows] == ["Quick", "Slow"]
    assert ExperimentResult.from_json(whole.to_json()).to_json() == whole.to_json()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "another"}, "differ in the model"),
        ({"hardware": {"words": "another machine"}}, "differ in the hardware"),
        ({"settings": {"engines": ["slow"], "prompt": "Stop."}}, "differ in the settings"),
        ({"experiment": "speculation"}, "differ in the experiment"),
        ({"engines": (EngineRow("quick", "Quick", "#000000"),)}, "More than one of the runs has quick"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ResultError, match=words):
        joined([run_of("quick", 100.0), replace(run_of("slow", 20.0), **change)])  # type: ignore[arg-type]
    with pytest.raises(ResultError, match="nothing to join"):
        joined([run_of("quick", 100.0)])


def test_the_command_line_writes_the_whole_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(run_of(name, 100.0).save(tmp_path / "parts")) for name in ("quick", "slow")]
    assert main([*files, "--out", str(tmp_path / "whole")]) == 0
    (path,) = (tmp_path / "whole").iterdir()
    assert len(ExperimentResult.from_json(path.read_text(encoding="utf-8")).engines) == 2
    assert main([files[0], str(tmp_path / "nowhere.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
