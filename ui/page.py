"""The whole page: header, one tab per experiment, the lights that follow the engines."""

from __future__ import annotations

import asyncio
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from engines.base import Engine
from engines.local import Status
from experiments import EXPERIMENTS
from experiments.background import AnyHost
from experiments.library import RECORDINGS, Library
from ui.lanes import head_html
from ui.results import open_runs, results_tab
from ui.session import Sessions
from ui.tab import experiment_tab, wire_opening
from ui.theme import css, head, theme

TITLE = "LLM Inference Bake-Off"
LOOK_SECONDS = 1.0
RESULTS = "results"


def build_app(host: AnyHost, recordings: Path = RECORDINGS) -> gr.Blocks:
    """The page over `host`, which runs the engines. Launching it is the caller's business."""
    sessions = Sessions(host.cache / "results", recordings)
    page = gr.Blocks(title=TITLE, analytics_enabled=False)
    with page:
        gr.HTML(masthead_html(host), padding=False)
        tabs, entrances = [], []
        with gr.Tabs() as all_tabs:
            for experiment in EXPERIMENTS:
                with gr.Tab(experiment.title, id=experiment.name) as entrance:
                    tabs.append(experiment_tab(experiment, host, sessions))
                entrances.append(entrance)
            with gr.Tab("Results", id=RESULTS):
                results = results_tab(sessions)
        for place, (experiment, tab, entrance) in enumerate(zip(EXPERIMENTS, tabs, entrances, strict=True)):
            # The first tab is there with the page; the others are when somebody opens them.
            wire_opening(experiment, sessions, tab, [entrance.select] if place else [page.load, entrance.select])
        heads = [lane.head for tab in tabs for lane in tab.lanes.values()]
        names = [name for tab in tabs for name in tab.lanes]
        shown = gr.State({})  # name -> what this visitor's lights show, so that nothing is sent twice

        def lights(before: dict[str, Status]) -> list[Any]:
            statuses = host.statuses()
            updates = [
                gr.skip() if before.get(name) == statuses[name] else head_html(_engine(host, name), statuses[name])
                for name in names
            ]
            return [*updates, statuses]

        gr.Timer(LOOK_SECONDS).tick(
            lights, shown, [*heads, shown], show_progress="hidden", queue=False, api_visibility="private"
        )

        def opened(request: gr.Request) -> None:
            host.page_opened(request.session_hash or "")

        def closed(request: gr.Request) -> None:
            sessions.stop(request.session_hash or "")
            host.page_closed(request.session_hash or "")

        def linked(request: gr.Request) -> Any:
            """A link with ?run=ID opens that run."""
            run = request.query_params.get("run")
            if not run:
                return {all_tabs: gr.skip()}
            return {all_tabs: gr.update(selected=RESULTS)} | open_runs(sessions, results, run)

        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        page.load(opened, None, None, **quiet)
        page.load(linked, None, [all_tabs, *results.outputs], **quiet)
        page.unload(closed)
    return page


def mounted(host: AnyHost, recordings: Path = RECORDINGS) -> FastAPI:
    """The page as an application that somebody else's server runs."""
    host.open()
    folder = host.cache / "results"
    page = build_app(host, recordings).queue(default_concurrency_limit=None)
    served: FastAPI = gr.mount_gradio_app(
        FastAPI(),
        page,
        path="/",
        allowed_paths=[str(folder)],
        ssr_mode=False,
        footer_links=[],
        theme=theme(),
        css=css(),
        head=head(),
    )
    add_assets(served, folder, recordings)
    return served


def add_assets(app: FastAPI, results: Path, recordings: Path = RECORDINGS) -> None:
    """Serve the plotting library from our own server, for exporting charts in the browser, and all runs as a zip."""
    library = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"

    async def send(request: Any) -> FileResponse:
        return FileResponse(library, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})

    async def archive(request: Any) -> Response:
        packed = await asyncio.to_thread(Library(results, recordings).archive)
        named = {"Content-Disposition": 'attachment; filename="bake-off-results.zip"'}
        return Response(packed, media_type="application/zip", headers=named)

    ours = [Route("/assets/plotly.min.js", send), Route("/results.zip", archive)]
    app.router.routes[:0] = ours  # before Gradio's own catch-all


def masthead_html(host: AnyHost) -> str:
    facts = (("Engines run on", host.label), ("Model", host.model_label), ("Hardware", host.hardware_words))
    chips = "".join(f"<span><b>{escape(name)}</b>{escape(value)}</span>" for name, value in facts)
    notice = f"<div class='notice'>{escape(host.model_note)}</div>" if host.model_note else ""
    return (
        f"<header class='masthead'><h1>{TITLE}</h1><p>Ask one question; watch {len(host.engines)} inference engines "
        f"answer it side by side, and see which is faster, by how much, and whether the difference is real.</p>"
        f"<div class='facts'>{chips}</div>{notice}</header>"
    )


def _engine(host: AnyHost, name: str) -> Engine:
    return next(engine for engine in host.engines if engine.name == name)
