"""The folder of results: what is listed, opened, added, deleted, packed, and laid over each other."""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.library import RECORDINGS, Library, overlaid, read
from experiments.report import figures, table
from experiments.result import ExperimentResult, ResultError
from tests.experiments.test_result import SCHEMA_1, result_of


def named(run: str, started: str = "2026-11-23T12:00:00+00:00", **changes: object) -> ExperimentResult:
    return replace(result_of(quick=[100.0, 102.0]), id=run, started=started, **changes)  # type: ignore[arg-type]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    named("old", "2026-11-01T12:00:00+00:00").save(tmp_path / "own")
    named("new", "2026-11-20T12:00:00+00:00").save(tmp_path / "own")
    named("spec", experiment="speculation").save(tmp_path / "own")
    named("shipped", "2026-11-22T12:00:00+00:00").save(tmp_path / "recordings")
    return Library(tmp_path / "own", tmp_path / "recordings")


def ids(library: Library, experiment: str = "") -> list[str]:
    return [entry.id for entry in library.entries(experiment)]


def test_own_runs_come_first_newest_on_top_then_what_came_with_the_app(library: Library) -> None:
    assert ids(library) == ["spec", "new", "old", "shipped"]
    assert ids(library, "baseline") == ["new", "old", "shipped"]
    assert [entry.recorded for entry in library.entries("baseline")] == [False, False, True]
    assert library.entries("baseline")[2].words.endswith("2026-11-22 12:00, came with the app")


def test_a_broken_file_is_left_out_of_the_list_until_it_is_whole(library: Library) -> None:
    path = library.folder / "broken.json"
    path.write_text('{"schema": 2')
    (library.folder / "foreign.json").write_text(replace(named("foreign"), experiment="bake").to_json())
    assert ids(library) == ["spec", "new", "old", "shipped"]
    path.write_text(named("broken").to_json())
    assert "broken" in ids(library)


def test_results_of_schema_1_are_listed_and_drawn(library: Library) -> None:
    (library.folder / "first-schema.json").write_text(SCHEMA_1.read_text(encoding="utf-8"), encoding="utf-8")
    result = library.load("first-schema")
    assert result.schema == 1
    assert set(figures(result)) == {"speed", "start"} and len(table(result).rows) == 5


@pytest.mark.parametrize("run", ["nothing", "../own/old", "/etc/passwd", "", "old.json", "a" * 100])
def test_what_is_no_run_is_refused(library: Library, run: str) -> None:
    with pytest.raises(ResultError, match="There is no run called"):
        library.load(run)
    with pytest.raises(ResultError, match="There is no run called"):
        library.delete(run)


def test_own_runs_can_be_deleted_and_recordings_stay(library: Library) -> None:
    library.delete("old")
    assert ids(library) == ["spec", "new", "shipped"]
    with pytest.raises(ResultError, match="came with the app and stays"):
        library.delete("shipped")


def test_a_file_that_is_added_keeps_its_name_unless_it_is_taken_or_no_name(library: Library) -> None:
    assert library.add(named("mine").to_json()).id == "mine"
    again = library.add(named("mine").to_json())
    hostile = library.add(named("../../evil").to_json())
    for added in (again, hostile):
        assert added.id.startswith("baseline-")
        assert (library.folder / f"{added.id}.json").is_file()
    assert not (library.folder.parent.parent / "evil.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2, "experiment": "baseline"}', json.dumps({"schema": 9})])
def test_a_file_that_is_no_result_is_refused_and_nothing_is_kept(library: Library, text: str) -> None:
    before = ids(library)
    with pytest.raises(ResultError):
        library.add(text)
    with pytest.raises(ResultError, match="knows no experiment called 'bake'"):
        library.add(replace(named("x"), experiment="bake").to_json())
    assert ids(library) == before


def test_the_archive_holds_every_run_as_it_is_on_disk(library: Library) -> None:
    with zipfile.ZipFile(io.BytesIO(library.archive())) as bundle:
        assert sorted(bundle.namelist()) == ["new.json", "old.json", "shipped.json", "spec.json"]
        assert bundle.read("new.json") == (library.folder / "new.json").read_bytes()


def test_two_runs_laid_over_each_other_keep_their_own_numbers() -> None:
    first = named("a", settings={"prompt": "Go.", "repeats": 3})
    second = replace(
        result_of(quick=[200.0, 202.0]), id="b", started="2026-11-24T08:30:00+00:00", settings={"prompt": "Go."}
    )
    both = overlaid(first, second)
    assert [row.title for row in both.engines] == ["Quick", "Quick, 2026-11-24 08:30"]
    speeds = {row[0]: row[2] for row in table(both).rows}
    assert speeds["Quick"].startswith("101 ±13") and speeds["Quick, 2026-11-24 08:30"].startswith("201 ±13")
    assert any("differ in settings" in label for label in both.labels)
    assert len({trace.x[0] for trace in figures(both)["speed"].data}) == 2


def test_runs_of_different_experiments_are_not_laid_over_each_other() -> None:
    with pytest.raises(ResultError, match="same experiment"):
        overlaid(named("a"), named("b", experiment="speculation"))


def test_further_recordings_lie_in_subfolders_are_listed_and_opened_and_never_shown_first(library: Library) -> None:
    named("baseline-first", "2026-11-21T12:00:00+00:00").save(library.recordings)
    named("baseline-later", "2026-12-01T12:00:00+00:00").save(library.recordings / "other-machine")
    shown = library.recording("baseline")
    assert shown and shown.id == "baseline-first"
    assert ids(library, "baseline") == ["new", "old", "baseline-later", "shipped", "baseline-first"]
    assert [entry.recorded for entry in library.entries("baseline")] == [False, False, True, True, True]
    assert library.load("baseline-later").id == "baseline-later"
    with pytest.raises(ResultError, match="came with the app"):
        library.delete("baseline-later")
    with zipfile.ZipFile(io.BytesIO(library.archive())) as bundle:
        assert "baseline-later.json" in bundle.namelist()


SHIPPED = sorted(RECORDINGS.glob("**/*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_ships_can_be_read_says_where_it_was_measured_and_names_no_place_on_that_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    result = read(path)
    assert result.hardware["words"] and result.started and not result.stopped_early
    assert not re.search(r"/(home|root|tmp|work)/", text)
    random = [row for row in result.engines if row.config.get("random_weights")]
    assert bool(random) == (path.parent.name == "h100")
    if random:
        assert "H100" in result.source_line
        assert "random weights: speed is real, text is not" in result.model_note
        assert any(label.startswith("random weights") for label in result.labels)
