"""The Results tab's handlers, as Gradio calls them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest

from tests.experiments.test_result import result_of
from ui.results import ALL, Results, add_file, delete_run, open_runs, results_tab
from ui.session import Sessions


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    for run in ("first", "second"):
        replace(result_of(quick=[100.0, 101.0]), id=run).save(tmp_path / "results")
    replace(result_of(quick=[100.0]), id="other", experiment="speculation").save(tmp_path / "results")
    return Sessions(tmp_path / "results", recordings=tmp_path / "none")


@pytest.fixture
def tab(sessions: Sessions) -> Results:
    with gr.Blocks():
        return results_tab(sessions)


def test_opening_a_run_shows_it_in_its_experiments_own_view(sessions: Sessions, tab: Results) -> None:
    shown = open_runs(sessions, tab, "first")
    assert {name: shown[box]["visible"] for name, (box, _) in tab.views.items()} == {
        name: name == "baseline" for name in tab.views
    }
    _, view = tab.views["baseline"]
    assert "Quick decodes" in shown[view.headline]
    assert Path(shown[view.json]["value"]).name == "first.json"
    assert "?run=first" in shown[tab.said]


def test_a_second_run_is_laid_over_the_first(sessions: Sessions, tab: Results) -> None:
    shown = open_runs(sessions, tab, "first", "second")
    assert "Two runs" in shown[tab.views["baseline"][1].table]
    assert "same experiment" in open_runs(sessions, tab, "first", "other")[tab.said]
    assert "Two runs" not in open_runs(sessions, tab, "first", "first")[tab.views["baseline"][1].table]


@pytest.mark.parametrize("chosen", [None, "", "../secret", "<script>alert(1)</script>"])
def test_what_is_no_run_is_said_and_nothing_else_changes(sessions: Sessions, tab: Results, chosen: str | None) -> None:
    for shown in (open_runs(sessions, tab, chosen), delete_run(sessions, tab, chosen, ALL)):
        assert list(shown) == [tab.said]
        assert "<script" not in shown[tab.said] and "role='alert'" in shown[tab.said]


def test_deleting_takes_the_run_from_the_list(sessions: Sessions, tab: Results) -> None:
    shown = delete_run(sessions, tab, "first", ALL)
    assert [value for _, value in shown[tab.run]["choices"]] == [
        "other",
        "second",
    ]  # by their names, since both began in the same second
    assert shown[tab.run]["value"] is None
    assert not any(shown[box]["visible"] for box, _ in tab.views.values())


def test_somebody_elses_file_is_added_and_opened(sessions: Sessions, tab: Results, tmp_path: Path) -> None:
    path = replace(result_of(quick=[50.0]), id="theirs").save(tmp_path / "upload")
    shown = add_file(sessions, tab, str(path), ALL)
    assert shown[tab.run]["value"] == "theirs"
    assert "theirs" in [value for _, value in shown[tab.run]["choices"]]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"schema": 2, "experiment": "baseline"}'])
def test_a_file_that_is_no_result_is_refused_in_words(
    sessions: Sessions, tab: Results, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "upload.json"
    path.write_bytes(content)
    shown = add_file(sessions, tab, str(path), ALL)
    assert list(shown) == [tab.said] and "role='alert'" in shown[tab.said]
    assert len(sessions.library.entries()) == 3
