"""What a tab shows before its visitor runs anything: the recording that came with the app, or the run of a link.

A link with ?run=ID opens the tab of that run's experiment as its author saw it at the end: answers, numbers, charts,
and the controls as they were set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from experiments.background import AnyHost
from experiments.base import Experiment, PlanError, Setting
from experiments.kept import once
from experiments.replay import schedule
from experiments.result import ExperimentResult, ResultError
from ui.frames import for_another
from ui.lanes import LaneView
from ui.session import Sessions
from ui.tab import Tab, changed_lanes, progress_html, settings_of, show_result, shown_before


def wire_opening(experiment: Experiment, sessions: Sessions, tab: Tab, events: list[Callable[..., Any]]) -> gr.State:
    """Show the recording when one of `events` first happens; what a visitor has run since is never replaced by it, and
    neither is the run of a link. Returns what remembers that something is shown."""
    seen = gr.State(False)
    opening = once(partial(opening_frame, experiment, sessions, tab))  # the same for every visitor
    pictures = once(partial(opening_pictures, experiment, sessions, tab))
    sessions.shown_first.append((opening, pictures))

    def show(request: gr.Request, before: bool) -> dict[Any, Any]:
        if before or run_of_link(request, sessions, experiment, tab):
            return {seen: True}
        return {seen: True, **for_another(opening())}

    for event in events:
        event(
            show,
            seen,
            [seen, tab.recorded, *tab.outputs],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def draw(shown: str) -> dict[Any, Any]:
        recorded = sessions.library.recording(experiment.name)
        mine = recorded is not None and shown == recorded.id  # and not a run that has been made since
        return for_another(pictures()) if mine else {tab.draw: gr.skip()}

    tab.draw.click(
        draw,
        tab.result.run_id,
        [tab.draw, *tab.result.drawn],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return seen


def opening_frame(experiment: Experiment, sessions: Sessions, tab: Tab) -> dict[Any, Any]:
    """What a visitor finds before running anything: the recording that came with the app, as it stood at its end."""
    recorded = sessions.library.recording(experiment.name)
    if recorded is None:
        return {}
    result = sessions.library.load(recorded.id)
    words = f"Recorded, not live: {result.source_line}. Press Run to measure anew."
    return as_it_ended(tab, result, words) | {
        tab.recorded: gr.update(choices=[(recorded.words, recorded.id)], value=recorded.id),
        **show_result(tab.result, result, sessions, later=experiment.name),
    }


def opening_pictures(experiment: Experiment, sessions: Sessions, tab: Tab) -> dict[Any, Any]:
    """The charts of that recording, which bring the plotting library with them: sent once they come into sight."""
    recorded = sessions.library.recording(experiment.name)
    if recorded is None:
        return {tab.draw: gr.skip()}
    shown = shown_before(tab.result, sessions.library.load(recorded.id), sessions)  # as a replay of it ends, too
    return {part: shown[part] for part in tab.result.drawn if part in shown}


def run_of_link(request: gr.Request, sessions: Sessions, experiment: Experiment, tab: Tab) -> ExperimentResult | None:
    """The run that the visitor's link names, where this tab can show it: it is of this experiment, and one of its
    engines has a lane here. None also where there is no such run; the Results tab says that."""
    run = request.query_params.get("run")
    if not run:
        return None
    try:
        result = sessions.load(run, request.session_hash or "")
    except ResultError:
        return None
    lanes = any(row.engine in tab.lanes for row in result.engines)
    return result if result.experiment == experiment.name and lanes else None


def linked_frame(
    experiment: Experiment, host: AnyHost, sessions: Sessions, tab: Tab, result: ExperimentResult
) -> dict[Any, Any]:
    """The tab as the author of `result` saw it when the run had ended, and with the controls set as then."""
    words = f"From a link, not live: {result.source_line}. Press Run to measure anew, Replay to watch it as it was."
    entry = next(entry for entry in sessions.entries(experiment.name) if entry.id == result.id)
    return as_it_ended(tab, result, words) | {
        tab.recorded: gr.update(choices=[(entry.words, entry.id)], value=entry.id),
        **controls_as_set(experiment, host, tab, result),
        **show_result(tab.result, result, sessions),
    }


def as_it_ended(tab: Tab, result: ExperimentResult, words: str) -> dict[Any, Any]:
    """The lanes at the end of a run, under `words` on where they come from."""
    views = {name: LaneView(name) for name in tab.lanes}
    for _, event in schedule(result):
        for view in views.values():
            view.take(event)
    for view in views.values():
        view.close()
    return changed_lanes(tab, views, "") | {tab.progress: progress_html(words, None)}


def controls_as_set(experiment: Experiment, host: AnyHost, tab: Tab, result: ExperimentResult) -> dict[Any, Any]:
    """The controls with the run's own settings. One that this page does not have, or would not take, stays as it is."""
    measured = [name for name in tab.lanes if any(row.engine == name for row in result.engines)]
    shown: dict[Any, Any] = {tab.engines: gr.update(value=measured)}
    for setting in settings_of(experiment, host):
        if setting.name in result.settings and setting.name in tab.controls:
            try:
                shown[tab.controls[setting.name]] = gr.update(value=as_typed(setting, result.settings[setting.name]))
            except PlanError:
                continue
    return shown


def as_typed(setting: Setting, value: Any) -> Any:
    """What a visitor would have typed or chosen for a plan's `value`. Raises PlanError for none of this setting's."""
    if setting.kind in ("wholes", "numbers") and isinstance(value, list | tuple):
        typed: Any = ", ".join(str(one) for one in value)
    elif setting.kind == "choice":
        typed = next((words for words, meant in setting.choices.items() if meant == value), None)
    elif setting.kind in ("whole", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None and setting.default is None:  # a field that may stay empty
            return ""
        if not number or (setting.high > setting.low and not setting.low <= value <= setting.high):
            raise PlanError(setting.name, f"{setting.label} cannot be {value!r} here.")
        return str(value) if setting.default is None else value
    else:
        typed = value
    kinds = {"switch": bool, "choice": str, "wholes": str, "numbers": str, "text": str, "line": str}
    if not isinstance(typed, kinds[setting.kind]):
        raise PlanError(setting.name, f"{setting.label} cannot be {value!r} here.")
    setting.read(typed)
    return typed
