"""Where a visitor names servers of their own: a place for each, with its address, its key and its models.

What is typed here stays on this visitor's page. A key goes to the server that it was typed for, and never back to the
browser: no handler gives a key's field a value.
"""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import gradio as gr

from engines.base import EngineError
from engines.compatible import ANY, PRESETS, Preset, preset_named
from engines.url_host import UrlHost
from experiments.base import PlanError
from experiments.servers import MOST_SERVERS, look_for_models, read_server, server_settings

INTRODUCTION = (
    "Name up to three OpenAI-compatible servers that you have started or may use. They are measured as they are, from "
    "here: the network counts, and their hardware is not known. A key is sent to its server only; it is in no result, "
    "no log and on nobody else's page, and is gone when this page is closed."
)


def servers_panel(host: UrlHost) -> dict[str, Any]:
    """Build the places and wire them. Gives the components by the names of `SERVER_SETTINGS`, in their order."""
    controls: dict[str, Any] = {}
    with gr.Column(elem_id="servers"):
        gr.HTML(f"<h2>Your servers</h2><p class='mechanism'>{escape(INTRODUCTION)}</p>", padding=False)
        with gr.Row():
            for place in range(1, MOST_SERVERS + 1):
                with gr.Column(min_width=240):
                    controls |= _place(host, place)
        gr.HTML(presets_html(), padding=False, elem_id="servers-presets")
    return controls


def _place(host: UrlHost, place: int) -> dict[str, Any]:
    kind, address, secret, named = server_settings(place)
    preset = gr.Dropdown(
        [(one.label, one.name) for one in PRESETS],
        value=ANY.name,
        label=kind.label,
        info=kind.info,
        elem_id=f"servers-preset-{place}",
    )
    url = gr.Textbox(
        "",
        label=address.label,
        info=address.info,
        placeholder="http://127.0.0.1:8000",
        max_lines=1,
        elem_id=f"servers-url-{place}",
    )
    key = gr.Textbox(
        "",
        label=secret.label,
        info=secret.info,
        type="password",
        max_lines=1,
        html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
        elem_id=f"servers-key-{place}",
    )
    look = gr.Button("Look for models", size="sm", elem_id=f"servers-look-{place}")
    said = gr.HTML("", padding=False, elem_id=f"servers-said-{place}")
    model = gr.Dropdown(
        [],
        value=None,
        label=named.label,
        info=named.info,
        allow_custom_value=True,
        elem_id=f"servers-model-{place}",
    )
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    preset.input(partial(usual_address, place), [preset, url], url, queue=False, **quiet)
    asking: dict[str, Any] = {"trigger_mode": "once", "concurrency_limit": None}
    gr.on([look.click, url.submit], partial(on_look, host, place), [preset, url, key], [model, said], **asking, **quiet)
    return {kind.name: preset, address.name: url, secret.name: key, named.name: model}


def usual_address(place: int, preset: str, url: str) -> Any:
    """The address at which such a server answers unless told otherwise; what somebody has typed stays."""
    typed = (url or "").strip()
    if typed and typed not in {one.url for one in PRESETS}:
        return gr.skip()
    return preset_named(preset).url


async def on_look(host: UrlHost, place: int, preset: str, url: str, key: str) -> tuple[Any, str]:
    """The models' dropdown and what to say below the button."""
    try:
        server = read_server(place, preset, url, key)
        host.check(server.url)
    except (PlanError, EngineError) as error:
        return gr.skip(), said_html(error.message, problem=True)
    looked = await look_for_models(server, host.public)
    if looked.problem:
        return gr.skip(), said_html(looked.words, problem=True)
    only = looked.models[0] if len(looked.models) == 1 else None
    return gr.update(choices=list(looked.models), value=only), said_html(looked.words)


def said_html(words: str, problem: bool = False) -> str:
    """Everything a server says is hostile text."""
    look = " class='problem-box' role='alert'" if problem else " role='status'"
    return f"<div{look}>{escape(words)}</div>"


def presets_html() -> str:
    """How each kind of server is started, and what it tells of itself."""
    rows = "".join(_preset_row(one) for one in PRESETS)
    headings = "".join(f"<th scope='col'>{word}</th>" for word in ("Kind", "Started with", "Answers at", "Reports"))
    return (
        "<details class='presets'><summary>Kinds of servers: how to start them, and what they report</summary>"
        f"<div class='table-scroll'><table class='results'><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody>"
        "</table></div></details>"
    )


def _preset_row(preset: Preset) -> str:
    name = escape(preset.label)
    if preset.docs:
        name = f"<a href='{escape(preset.docs)}' target='_blank' rel='noopener noreferrer'>{name}</a>"
    start = f"<code>{escape(preset.start)}</code>" if preset.start else "–"
    exact = "; an exact length can be asked for" if preset.exact else ""
    url = escape(preset.url) or "–"
    return f"<tr><td>{name}</td><td>{start}</td><td>{url}</td><td>{escape(preset.reports)}{exact}</td></tr>"
