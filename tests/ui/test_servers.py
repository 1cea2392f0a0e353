"""The fields in which a visitor names servers, without a browser."""

from __future__ import annotations

import asyncio
from pathlib import Path

import gradio as gr

from engines.compatible import PRESETS
from engines.url_host import UrlHost
from experiments.servers import SERVER_SETTINGS
from tests.scripted_server import scripted_server
from ui.servers import on_look, presets_html, said_html, servers_panel, usual_address

KEY = "sk-a/very+secret=key"


def test_the_fields_stand_in_the_order_in_which_they_are_read(tmp_path: Path) -> None:
    with gr.Blocks():
        controls = servers_panel(UrlHost(tmp_path))
    assert list(controls) == [setting.name for setting in SERVER_SETTINGS]


def test_no_handler_gives_a_key_back_to_the_browser(tmp_path: Path) -> None:
    with gr.Blocks() as page:
        controls = servers_panel(UrlHost(tmp_path))
    keys = {controls[f"key_{place}"]._id for place in (1, 2, 3)}
    assert all(controls[f"key_{place}"].type == "password" for place in (1, 2, 3))
    given = {output._id for block_fn in page.fns.values() for output in block_fn.outputs}
    assert given and not keys & given


def test_a_kinds_usual_address_replaces_none_that_was_typed() -> None:
    assert usual_address(1, "ollama", "") == "http://127.0.0.1:11434"
    assert usual_address(1, "ollama", "http://127.0.0.1:8000") == "http://127.0.0.1:11434"
    assert usual_address(1, "ollama", "http://gpu-box:8000") == gr.skip()


def test_looking_fills_the_models_and_takes_the_only_one(tmp_path: Path) -> None:
    host = UrlHost(tmp_path)
    with scripted_server(key=KEY) as one, scripted_server(models=["a", "b"]) as two:
        model, said = asyncio.run(on_look(host, 1, "any", one, KEY))
        assert model == gr.update(choices=["scripted"], value="scripted") and "1 model." in said
        model, said = asyncio.run(on_look(host, 1, "any", two, ""))
        assert model == gr.update(choices=["a", "b"], value=None) and "2 models." in said
        model, said = asyncio.run(on_look(host, 1, "any", one, "sk-<another>"))
    assert model == gr.skip() and "role='alert'" in said and "another" not in said


def test_a_server_that_the_page_does_not_ask_is_not_looked_at_either(tmp_path: Path) -> None:
    with scripted_server() as url:
        _, refused = asyncio.run(on_look(UrlHost(tmp_path, allowed=("elsewhere",)), 1, "any", url, ""))
        _, private = asyncio.run(on_look(UrlHost(tmp_path, public=True), 1, "any", url, ""))
        _, answered = asyncio.run(on_look(UrlHost(tmp_path, allowed=("127.0.0.1",)), 1, "any", url, ""))
    assert "asks only elsewhere" in refused and "does not call 127.0.0.1" in private and "1 model." in answered


def test_what_a_server_says_is_escaped() -> None:
    assert "<script>" not in said_html("<script>alert(1)</script>")


def test_every_kind_stands_in_the_table_with_how_it_is_started() -> None:
    table = presets_html()
    for preset in PRESETS:
        assert preset.label in table and preset.start in table and preset.url in table
