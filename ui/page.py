"""The whole page: header, one tab per experiment, the lights that follow the engines."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from engines.local import Status
from engines.url_host import UrlHost
from experiments import EXPERIMENTS
from experiments.background import AnyHost
from experiments.library import LARGEST_UPLOAD, RECORDINGS, Library
from ui.diagrams import engine_colours
from ui.frames import KeptDocument, Page, settle
from ui.lanes import head_html
from ui.opening import opening_race
from ui.owner import owners_panel
from ui.policy import ContentPolicy, UploadLimit
from ui.public import PublicRules, Tally
from ui.results import RESULTS, open_runs, refresh_lists, results_tab
from ui.servers import servers_panel
from ui.session import Sessions
from ui.sharing import Previews, SocialTags
from ui.shown_first import linked_frame, run_of_link, wire_opening
from ui.tab import experiment_tab
from ui.theme import css, head, theme

TITLE = "LLM Inference Bake-Off"
WARM = "What every visitor finds first is ready."

log = logging.getLogger("bakeoff")


def build_app(
    host: AnyHost, recordings: Path = RECORDINGS, rules: PublicRules | None = None, tally: Tally | None = None
) -> Page:
    """The page over `host`, which runs the engines. Launching it is the caller's business. `rules`: of a page that is
    open to everybody; `tally`: what its visitors used, which it shares with `middleware`."""
    sessions = Sessions(host.cache / "results", recordings, rules, tally)
    gr.set_static_paths([sessions.files])  # else Gradio copies each file for each visitor, for good
    # What visitors upload and download lies in files that nobody needs the next day.
    page = Page(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86_400) if rules else None)
    page.warm = sessions.warm
    with page:
        gr.HTML(masthead_html(host) + notice_html(rules), padding=False)
        servers = servers_panel(host) if isinstance(host, UrlHost) else None  # above the tabs: the same for all
        tabs, entrances = [], []
        with gr.Tabs() as all_tabs:
            for experiment in EXPERIMENTS:
                with gr.Tab(experiment.title, id=experiment.name) as entrance:
                    tabs.append(experiment_tab(experiment, host, sessions, servers))
                entrances.append(entrance)
            with gr.Tab("Results", id=RESULTS) as last:
                results = results_tab(sessions)
        seen = []
        for place, (experiment, tab, entrance) in enumerate(zip(EXPERIMENTS, tabs, entrances, strict=True)):
            # The first tab is there with the page; the others are when somebody opens them.
            events = [entrance.select] if place else [page.load, entrance.select]
            seen.append(wire_opening(experiment, sessions, tab, events))
        refresh_lists(sessions, results, last)
        if rules and rules.admin_token:
            owners_panel(host, sessions)

        def opened(request: gr.Request) -> None:
            host.page_opened(request.session_hash or "")

        def closed(request: gr.Request) -> None:
            sessions.leave(request.session_hash or "")
            host.page_closed(request.session_hash or "")

        def linked(request: gr.Request) -> Any:
            """A link with ?run=ID opens that run: in its experiment's tab, or among the results where that has no lane
            for its engines; those also say that there is no such run."""
            run = request.query_params.get("run")
            if not run:
                return {all_tabs: gr.skip()}
            for experiment, tab, remembered in zip(EXPERIMENTS, tabs, seen, strict=True):
                if result := run_of_link(request, sessions, experiment, tab):
                    frame = linked_frame(experiment, host, sessions, tab, result)
                    return {all_tabs: gr.update(selected=experiment.name), remembered: True} | frame
            opened = open_runs(sessions, results, run, session=request.session_hash or "")
            return {all_tabs: gr.update(selected=RESULTS)} | opened

        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        page.load(opened, None, None, **quiet)
        shared = [part for tab in tabs for part in (tab.recorded, *tab.inputs, *tab.outputs)]
        page.load(linked, None, list(dict.fromkeys([all_tabs, *results.outputs, *seen, *shared])), **quiet)
        page.unload(closed)
    return page


def mounted(host: AnyHost, recordings: Path = RECORDINGS, rules: PublicRules | None = None) -> FastAPI:
    """The page as an application that somebody else's server runs."""
    host.open()
    folder = host.cache / "results"
    tally = Tally(host.cache) if rules else None
    page = build_app(host, recordings, rules, tally)
    page.queue(default_concurrency_limit=None)
    previews = Previews(folder, recordings)
    served: FastAPI = gr.mount_gradio_app(
        FastAPI(),
        page,
        path="/",
        max_file_size=largest_upload(rules),
        ssr_mode=False,
        footer_links=[],
        theme=theme(),
        css=css(),
        head=head(),
        app_kwargs={"middleware": middleware(previews, rules, tally)},
    )
    add_assets(served, host, folder, recordings, previews)
    warm(page)
    return served


def largest_upload(rules: PublicRules | None) -> int:
    """In bytes."""
    return rules.upload_megabytes * 1_000_000 if rules else LARGEST_UPLOAD


def notice_html(rules: PublicRules | None) -> str:
    """What somebody should know before they type anything into a page that is open to everybody."""
    if rules is None:
        return ""
    return (
        "<div class='notice' id='public-notice'>This page is open to everybody. Runs wait in one line; their prompts "
        "and answers are kept, and everybody can open them. A visitor has "
        f"{rules.runs_per_hour} runs per hour; to hold to that, addresses are kept as a hash.</div>"
    )


def middleware(previews: Previews, rules: PublicRules | None = None, tally: Tally | None = None) -> list[Middleware]:
    """What the page's answers go through, outermost first. Gradio compresses its files, but neither the page itself nor
    what its events answer, most of which is text that repeats; streams stay as they are."""
    return [
        Middleware(ContentPolicy),
        *([Middleware(UploadLimit, rules=rules, tally=tally)] if rules and tally else []),
        Middleware(GZipMiddleware, minimum_size=1000, compresslevel=6),
        Middleware(SocialTags, previews=previews),
        Middleware(KeptDocument),
    ]


def warm(page: Page) -> None:
    """Behind the page that is up: make what its first visitors will all ask for at once. Returns at once."""

    def work() -> None:
        page.warm()
        settle()
        log.info(WARM)

    threading.Thread(target=work, name="warm up", daemon=True).start()


class Lights:
    """The heads of all lanes, for pages that ask every second: with what they have seen, most are told that it still
    holds. As events of Gradio's, fifty visitors' questions took a quarter of a core."""

    def __init__(self, host: AnyHost) -> None:
        self.host = host
        self._seen: dict[str, Status] = {}
        self._start, self._changes = secrets.token_hex(3), 0

    @property
    def version(self) -> str:
        """Changes with any engine's state, and with the app that tells it."""
        if (statuses := self.host.statuses()) != self._seen:
            self._seen, self._changes = statuses, self._changes + 1
        return f"{self._start}-{self._changes}"

    async def answer(self, request: Request) -> Response:
        version = self.version
        if request.query_params.get("since") == version:
            return Response(status_code=204)
        heads = {engine.name: head_html(engine, self._seen[engine.name]) for engine in self.host.engines}
        return JSONResponse({"version": version, "heads": heads}, headers={"Cache-Control": "no-store"})


def add_assets(
    app: FastAPI, host: AnyHost, results: Path, recordings: Path = RECORDINGS, previews: Previews | None = None
) -> None:
    """Serve the plotting library from our own server, for exporting charts in the browser, all runs as a zip, the
    pictures of runs for links to them, and the lights."""
    library = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"

    async def send(request: Any) -> FileResponse:
        return FileResponse(library, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})

    async def archive(request: Any) -> Response:
        packed = await asyncio.to_thread(Library(results, recordings).archive)
        named = {"Content-Disposition": 'attachment; filename="bake-off-results.zip"'}
        return Response(packed, media_type="application/zip", headers=named)

    opening = cache(partial(_opening, results, recordings))  # the same for every visitor

    async def race(request: Any) -> Response:
        packed = await asyncio.to_thread(opening)
        return Response(packed, media_type="application/json", headers={"Cache-Control": "max-age=3600"})

    ours = [Route("/assets/plotly.min.js", send), Route("/results.zip", archive), Route("/opening.json", race)]
    ours.append(Route("/lights.json", Lights(host).answer))
    ours += [previews.route()] if previews else []
    app.router.routes[:0] = ours  # before Gradio's own catch-all


def _opening(results: Path, recordings: Path) -> bytes:
    """The recorded race of the first tab as JSON; null where there is none."""
    library, first = Library(results, recordings), EXPERIMENTS[0]
    recorded = library.recording(first.name)
    result = library.load(recorded.id) if recorded else None
    lanes = {row.name for row in result.engines} if result else ()
    race = opening_race(result, lanes) if result else None
    return json.dumps(race, separators=(",", ":")).encode()


def masthead_html(host: AnyHost) -> str:
    facts = (("Engines run on", host.label), ("Model", host.model_label), ("Hardware", host.hardware_words))
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    lights = "".join(f"<i style='background:{escape(engine.colour)}'></i>" for engine in host.engines)
    notice = f"<div class='notice'>{escape(host.model_note)}</div>" if host.model_note else ""
    return (
        f"<style>:root{{{engine_colours(host.engines)}}}</style>"
        f"<header class='masthead'><div class='said'><h1>{lights} {TITLE}</h1><p>Ask one question; watch "
        f"{len(host.engines)} inference engines answer it side by side, and see which is faster, by how much, and "
        f"whether the difference is real.</p></div><dl class='facts'>{told}</dl>{notice}</header>"
    )
