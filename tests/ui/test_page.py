"""The page as Gradio will serve it, over scripted engines that are never started here."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from engines.base import Engine
from engines.hardware import Hardware
from engines.local import LocalHost
from engines.scripted import Script, scripted_engine
from experiments import EXPERIMENTS
from tests.conftest import MACHINE
from ui.page import Lights, build_app, masthead_html
from ui.theme import css, head, theme

MakeEngine = Callable[..., Engine]
MakeHost = Callable[..., LocalHost]


@pytest.fixture(scope="module")
def host(model: str) -> LocalHost:
    engines = [scripted_engine(name, name.title(), "#0072B2", Script()) for name in ("one", "two", "three")]
    return LocalHost(engines, model, hardware=MACHINE)


@pytest.fixture(scope="module")
def page(host: LocalHost) -> gr.Blocks:
    return build_app(host)


@pytest.fixture(scope="module")
def components(page: gr.Blocks) -> dict[str, dict[str, Any]]:
    """The properties of every component that has an id of ours."""
    found = [part["props"] for part in page.get_config_file()["components"]]
    return {properties["elem_id"]: properties for properties in found if properties.get("elem_id")}


def test_the_page_has_a_lane_for_each_engine_and_the_experiments_controls(components: dict[str, Any]) -> None:
    for name in ("one", "two", "three"):
        for experiment in EXPERIMENTS:
            parts = {f"{experiment.name}-{part}-{name}" for part in ("lane", "head", "chat", "tiles")}
            assert parts <= set(components)
    assert {"baseline-prompt", "baseline-run", "baseline-stop", "baseline-settings"} <= set(components)
    assert components["baseline-stop"]["interactive"] is False
    for form in ("html", "json", "csv"):
        assert components[f"baseline-{form}"]["interactive"] is False  # nothing to download yet


def test_building_the_page_starts_no_engine_and_shows_them_as_not_running(
    host: LocalHost, components: dict[str, Any]
) -> None:
    assert "not running" in components["baseline-head-one"]["value"]
    assert {status.light for status in host.statuses().values()} == {"down"}


def test_nothing_on_the_page_is_offered_as_an_api(page: gr.Blocks) -> None:
    assert page.get_api_info()["named_endpoints"] == {}  # type: ignore[index]


def test_the_page_sends_nothing_about_its_visitors(page: gr.Blocks) -> None:
    assert page.analytics_enabled is False


def test_the_look_is_fetched_from_no_other_host() -> None:
    for text in (css(), head(), "".join(theme()._stylesheets)):
        assert "http://" not in text
        assert "https://" not in text


def test_the_masthead_says_where_on_what_and_with_which_model(scripted: MakeEngine, make_host: MakeHost) -> None:
    html = masthead_html(make_host(scripted("one"), scripted("two"), model_label="random-qwen3-3M"))
    for words in ("LLM Inference Bake-Off", "2 inference engines", "this machine", "random-qwen3-3M"):
        assert words in html
    assert "Test CPU, 2 cores, 8 GiB memory, no GPU" in html
    assert "notice" not in html


def test_the_masthead_carries_the_models_note(scripted: MakeEngine, make_host: MakeHost) -> None:
    note = "Random weights: the speed is real, the words mean nothing."
    assert note in masthead_html(make_host(scripted("one"), model_note=note))


def test_hostile_names_stay_words_in_the_masthead(scripted: MakeEngine, make_host: MakeHost) -> None:
    hostile = "<script>alert('1')</script>"
    hardware = Hardware(cpu=hostile, cores=2, memory_gib=8.0)
    html = masthead_html(make_host(scripted("one"), model_label=hostile, model_note=hostile, hardware=hardware))
    assert "<script" not in html
    assert html.count(escape(hostile)) == 3


def test_the_lights_are_told_once_and_again_when_they_have_changed(
    make_host: MakeHost, scripted: Callable[..., Engine]
) -> None:
    host = make_host(scripted("one"), scripted("two"))
    client = TestClient(Starlette(routes=[Route("/lights.json", Lights(host).answer)]))
    first = client.get("/lights.json").json()
    assert set(first["heads"]) == {"one", "two"}
    assert "not running" in first["heads"]["one"]
    again = client.get("/lights.json", params={"since": first["version"]})
    assert (again.status_code, again.content) == (204, b"")
    host.ready("one")
    changed = client.get("/lights.json", params={"since": first["version"]}).json()
    assert changed["version"] != first["version"]
    assert "light ready" in changed["heads"]["one"] and "not running" in changed["heads"]["two"]
    other = TestClient(Starlette(routes=[Route("/lights.json", Lights(host).answer)]))  # the app after a restart
    assert other.get("/lights.json", params={"since": changed["version"]}).status_code == 200
