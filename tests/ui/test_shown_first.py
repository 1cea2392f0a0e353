"""What a tab shows first: the recording, or the run of a link with its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from engines.local import LocalHost
from engines.scripted import Script, scripted_engine
from experiments import EXPERIMENTS, EXPERIMENTS_BY_NAME
from experiments.base import LENGTH_KIND, PlanError, Setting
from experiments.baseline import EXPERIMENT
from experiments.report import headline
from tests.conftest import MACHINE
from tests.experiments.test_result import result_of
from ui.session import Sessions
from ui.shown_first import as_typed, linked_frame, opening_frame, run_of_link
from ui.tab import Tab, experiment_tab

NATURAL, EXACT = LENGTH_KIND.choices


@pytest.fixture(scope="module")
def host(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHost]:
    script = Script(start=0.05, first_token=0.02, gap=0.02)
    engines = [scripted_engine(name, name.title(), "#0072B2", script) for name in ("one", "two", "three")]
    host = LocalHost(engines, model, cache=tmp_path_factory.mktemp("cache"), hardware=MACHINE)
    yield host
    host.close()


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "results", tmp_path / "recordings")


def tab_over(host: LocalHost) -> Tab:
    with gr.Blocks():
        return experiment_tab(EXPERIMENT, host, Sessions())


def link(**query: str) -> Any:
    """A request of a page that was opened with this query."""
    return gr.Request(request=None, session_hash="me", query_params=query)


def test_a_visitor_finds_the_recording_at_its_end_and_labelled_as_one(host: LocalHost, sessions: Sessions) -> None:
    recorded = result_of(one=[100.0, 200.0], two=[50.0])
    recorded.save(sessions.library.recordings)
    tab = tab_over(host)

    frame = opening_frame(EXPERIMENT, sessions, tab)

    assert "Recorded, not live: test-model · Test CPU, 2 cores · 2026-11-23." in frame[tab.progress]
    assert headline(recorded) in frame[tab.result.headline].replace("&#x27;", "'")
    assert "Mean of 2 runs" in frame[tab.lanes["one"].tiles]
    assert frame[tab.lanes["two"].chat][-1]["role"] == "assistant"
    assert frame[tab.recorded]["value"] == recorded.id
    assert not {tab.run, tab.stop, tab.replay} & set(frame)  # nobody's run is touched


def test_an_own_run_is_no_recording(host: LocalHost, sessions: Sessions) -> None:
    result_of(one=[100.0]).save(sessions.results)
    assert opening_frame(EXPERIMENT, sessions, tab_over(host)) == {}


def test_a_link_shows_the_run_with_its_engines_and_its_settings(host: LocalHost, sessions: Sessions) -> None:
    made = result_of(one=[100.0, 200.0], two=[50.0])
    settings = made.settings | {"prompt": "What did they ask?", "repeats": 2, "fixed_length": True, "race": False}
    made = replace(made, settings=settings)
    made.save(sessions.results)
    tab = tab_over(host)

    result = run_of_link(link(run=made.id), sessions, EXPERIMENT, tab)
    assert result is not None
    frame = linked_frame(EXPERIMENT, host, sessions, tab, result)

    assert "From a link, not live: test-model" in frame[tab.progress]
    assert "Mean of 2 runs" in frame[tab.lanes["one"].tiles]
    assert headline(made) in frame[tab.result.headline].replace("&#x27;", "'")
    assert frame[tab.engines]["value"] == ["one", "two"]  # the third was not asked
    values = {name: frame[control]["value"] for name, control in tab.controls.items() if control in frame}
    assert values["prompt"] == "What did they ask?"
    assert values["repeats"] == 2
    assert values["fixed_length"] == EXACT
    assert values["race"] is False


def test_no_run_no_lane_or_another_experiment_leaves_the_tab_alone(host: LocalHost, sessions: Sessions) -> None:
    elsewhere = result_of(somewhere=[100.0])
    elsewhere.save(sessions.results)
    tab = tab_over(host)

    assert run_of_link(link(), sessions, EXPERIMENT, tab) is None
    assert run_of_link(link(run="../../etc/passwd"), sessions, EXPERIMENT, tab) is None
    assert run_of_link(link(run=elsewhere.id), sessions, EXPERIMENT, tab) is None  # no engine of it has a lane
    assert run_of_link(link(run=elsewhere.id), sessions, EXPERIMENTS_BY_NAME["speculation"], tab) is None


def every_setting() -> list[Setting]:
    return [setting for experiment in EXPERIMENTS for setting in experiment.settings]


@pytest.mark.parametrize("setting", every_setting(), ids=lambda one: one.name)
def test_what_a_plan_holds_is_typed_as_it_was(setting: Setting) -> None:
    value = setting.read(setting.default)
    assert setting.read(as_typed(setting, value)) == value


@pytest.mark.parametrize("setting", every_setting(), ids=lambda one: one.name)
@pytest.mark.parametrize("value", [{"a": 1}, ["<b>"], float("1e99")])
def test_what_no_plan_holds_is_refused(setting: Setting, value: Any) -> None:
    with pytest.raises(PlanError):
        as_typed(setting, value)
