"""The Results tab: every run made here and every recording, opened again in its experiment's own charts."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from experiments import EXPERIMENTS
from experiments.library import overlaid
from experiments.result import ExperimentResult, ResultError
from ui.session import Sessions
from ui.tab import ResultView, build_result, intro_html, problem_html, show_result

RESULTS = "results"
ALL = "All experiments"


@dataclass(frozen=True, slots=True)
class Results:
    """The components of the tab; one hidden view per experiment, of which the opened run's is shown."""

    kind: gr.Dropdown
    run: gr.Dropdown
    other: gr.Dropdown
    said: gr.HTML
    views: dict[str, tuple[gr.Column, ResultView]]

    @property
    def outputs(self) -> list[Any]:
        shown = [part for box, view in self.views.values() for part in (box, *view.outputs)]
        return [self.run, self.other, self.said, *shown]


def results_tab(sessions: Sessions) -> Results:
    """Build the tab and wire it."""
    words = (
        "Every run made on this machine is kept; the recordings came with the app. Open one, lay a second over it, "
        "take the files along, or add somebody else's."
    )
    public = sessions.rules is not None
    if public:
        words = (
            "Every run made on this page is kept with its prompt and its answers, and everybody can open it; the "
            "recordings came with the app. Open one, lay a second over it, or add a file: only you see that, until you "
            "close the page."
        )
    gr.HTML(intro_html(RESULTS, "What has been measured so far?", words), padding=False)
    with gr.Row():
        titles = [ALL, *(experiment.title for experiment in EXPERIMENTS)]
        kind = gr.Dropdown(titles, value=ALL, label="Show", scale=1, min_width=180, elem_id="results-kind")
        run = gr.Dropdown([], value=None, label="Run", scale=3, elem_id="results-run")
        other = gr.Dropdown(
            [], value=None, label="Lay a second run over it (optional)", scale=3, elem_id="results-other"
        )
    with gr.Row():
        opened = gr.Button("Open", variant="primary", min_width=120, elem_id="results-open")
        # In public mode only the owner deletes, below the page.
        deleted = gr.Button("Delete", variant="stop", min_width=120, visible=not public, elem_id="results-delete")
        uploaded = gr.UploadButton("Add a file", file_types=[".json"], min_width=120, elem_id="results-upload")
        gr.HTML("<a class='zip' href='results.zip' download>All runs as a zip</a>", padding=False)
    said = gr.HTML("", padding=False, elem_id="results-said")
    views = {}
    for experiment in EXPERIMENTS:
        with gr.Column(visible=False) as box:
            views[experiment.name] = (box, build_result(experiment, f"results-{experiment.name}"))
    tab = Results(kind, run, other, said, views)

    def refresh(request: gr.Request, kind: str) -> Any:
        return [gr.update(choices=_choices(sessions, kind, request.session_hash or ""))] * 2

    def on_open(request: gr.Request, chosen: str | None, second: str | None) -> dict[Any, Any]:
        return open_runs(sessions, tab, chosen, second, request.session_hash or "")

    def on_delete(chosen: str | None, kind: str) -> dict[Any, Any]:
        return delete_run(sessions, tab, chosen, kind)

    def on_upload(request: gr.Request, path: str, kind: str) -> dict[Any, Any]:
        return add_file(sessions, tab, path, kind, request.session_hash or "")

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for event in (kind.change, run.focus, other.focus):
        event(refresh, kind, [run, other], queue=False, **quiet)
    opened.click(on_open, [run, other], tab.outputs, **quiet)
    deleted.click(on_delete, [run, kind], tab.outputs, **quiet)
    uploaded.upload(on_upload, [uploaded, kind], tab.outputs, **quiet)
    return tab


def refresh_lists(sessions: Sessions, tab: Results, entrance: gr.Tab) -> None:
    """Whoever opens the tab finds every run in its lists; reading them all would hold up the page's start."""

    def refresh(request: gr.Request, kind: str) -> Any:
        return [gr.update(choices=_choices(sessions, kind, request.session_hash or ""))] * 2

    entrance.select(
        refresh, tab.kind, [tab.run, tab.other], queue=False, show_progress="hidden", api_visibility="private"
    )


def open_runs(
    sessions: Sessions, tab: Results, chosen: str | None, second: str | None = None, session: str = ""
) -> dict[Any, Any]:
    """Show a run, or two of one experiment laid over each other."""
    try:
        if not chosen:
            raise ResultError("Choose a run first.")
        result = sessions.load(chosen, session)
        if second and second != chosen:
            result = overlaid(result, sessions.load(second, session))
    except ResultError as error:
        return {tab.said: problem_html(str(error))}
    return _opened(sessions, tab, result)


def delete_run(sessions: Sessions, tab: Results, chosen: str | None, kind: str) -> dict[Any, Any]:
    try:
        if not chosen:
            raise ResultError("Choose a run first.")
        sessions.delete(chosen)
    except ResultError as error:
        return {tab.said: problem_html(str(error))}
    left = gr.update(choices=_choices(sessions, kind), value=None)
    gone = {box: gr.update(visible=False) for box, _ in tab.views.values()}
    return gone | {tab.run: left, tab.other: left, tab.said: f"<p>Deleted {escape(chosen)}.</p>"}


def add_file(sessions: Sessions, tab: Results, path: str, kind: str, session: str = "") -> dict[Any, Any]:
    try:
        result = sessions.add(Path(path).read_text(encoding="utf-8"), session)
    except (ResultError, OSError, UnicodeDecodeError) as error:
        return {tab.said: problem_html(str(error))}
    choices = gr.update(choices=_choices(sessions, kind, session), value=result.id)
    return _opened(sessions, tab, result) | {tab.run: choices}


def _opened(sessions: Sessions, tab: Results, result: ExperimentResult) -> dict[Any, Any]:
    shown: dict[Any, Any] = {box: gr.update(visible=name == result.experiment) for name, (box, _) in tab.views.items()}
    link = f"?run={result.id}"
    _, view = tab.views[result.experiment]
    said = f"<p>A link to this run: <a href='{escape(link)}'>{escape(link)}</a></p>"
    if sessions.is_private(result.id):
        said = "<p>Only you see this file, until you close the page.</p>"
    return shown | {tab.said: said} | show_result(view, result, sessions)


def _choices(sessions: Sessions, title: str, session: str = "") -> list[tuple[str, str]]:
    name = next((experiment.name for experiment in EXPERIMENTS if experiment.title == title), "")
    return [(entry.words, entry.id) for entry in sessions.entries(name, session)]
