"""The tab of one experiment: its controls, three lanes, progress, and the finished result with its downloads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from engines.local import LocalHost
from experiments.base import DEFAULT_PROMPT, Experiment, Host, Plan, PlanError, RequestEnded, RequestStarted
from experiments.report import csv_bytes, figure, figure_html, headline, notes, table
from experiments.result import ExperimentResult
from experiments.run import BackgroundRun
from ui.lanes import Lane, LaneView, build_lane
from ui.session import Sessions

FRAME_SECONDS = 0.1  # a browser redraws a growing text smoothly at ten frames a second
LENGTHS = ("Exactly this many tokens, on every engine", "Until the model ends its answer by itself")


@dataclass(frozen=True, slots=True)
class Tab:
    """The components of one experiment's tab, by name."""

    prompt: gr.Textbox
    run: gr.Button
    stop: gr.Button
    engines: gr.CheckboxGroup
    repeats: gr.Slider
    warmups: gr.Slider
    tokens: gr.Slider
    length: gr.Radio
    race: gr.Checkbox
    progress: gr.HTML
    lanes: dict[str, Lane]
    headline: gr.HTML
    chart: gr.Plot
    table: gr.HTML
    run_id: gr.Textbox
    png: gr.Button
    svg: gr.Button
    html: gr.DownloadButton
    json: gr.DownloadButton
    csv: gr.DownloadButton

    @property
    def inputs(self) -> list[Any]:
        """In the order of `read_plan`'s arguments."""
        return [
            self.prompt, self.engines, self.repeats, self.warmups, self.tokens, self.length, self.race
        ]  # fmt: skip

    @property
    def outputs(self) -> list[Any]:
        lanes = [part for lane in self.lanes.values() for part in (lane.chat, lane.tiles)]
        files = [self.png, self.svg, self.html, self.json, self.csv]
        buttons = [self.run, self.stop]
        return [*buttons, self.progress, *lanes, self.headline, self.chart, self.table, self.run_id, *files]


def experiment_tab(experiment: Experiment, host: LocalHost, sessions: Sessions) -> Tab:
    """Build the tab and wire it. `host` runs the engines and knows their statuses."""
    gr.HTML(
        f"<p class='mechanism'><b>{escape(experiment.question)}</b> {escape(experiment.mechanism)}</p>", padding=False
    )
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            DEFAULT_PROMPT, label="Your question", lines=2, max_lines=6, scale=5, elem_id=f"{experiment.name}-prompt"
        )
        with gr.Column(scale=1, min_width=160):
            run = gr.Button("Run", variant="primary", elem_id=f"{experiment.name}-run")
            stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{experiment.name}-stop")
    with gr.Accordion("Settings", open=False, elem_id=f"{experiment.name}-settings"):
        choices = [(engine.label, engine.name) for engine in host.engines]
        engines = gr.CheckboxGroup(choices, value=[name for _, name in choices], label="Engines")
        with gr.Row():
            repeats = gr.Slider(
                1, 20, 3, step=1, label="Repeats", info="Measured runs per engine; more narrow the spread."
            )
            warmups = gr.Slider(0, 5, 2, step=1, label="Warm-ups", info="Runs before them that do not count.")
            tokens = gr.Slider(8, 1024, 128, step=8, label="Answer length", info="In tokens.")
        with gr.Row():
            length = gr.Radio(LENGTHS, value=LENGTHS[0], label="When does an answer end?")
            race = gr.Checkbox(
                False,
                label="Race: all engines at once",
                info="Fun to watch, but they share this machine and slow each other. By default they take turns.",
            )
    progress = gr.HTML("", padding=False, elem_classes="progress", elem_id=f"{experiment.name}-progress")
    with gr.Row():
        lanes = {engine.name: build_lane(engine, host.status(engine.name)) for engine in host.engines}
    with gr.Column(elem_id=f"{experiment.name}-result"):
        sentence = gr.HTML("", padding=False, elem_id=f"{experiment.name}-headline")
        chart = gr.Plot(show_label=False, visible=False, elem_id=f"{experiment.name}-chart")
        results = gr.HTML("", padding=False, elem_id=f"{experiment.name}-table")
        run_id = gr.Textbox("", visible="hidden", elem_id=f"{experiment.name}-run-id", label="Run", show_label=False)
        with gr.Row():
            off: dict[str, Any] = {"size": "sm", "interactive": False, "min_width": 120}
            png = gr.Button("Chart as PNG", **off, elem_id=f"{experiment.name}-png")
            svg = gr.Button("Chart as SVG", **off, elem_id=f"{experiment.name}-svg")
            html = gr.DownloadButton("Chart as HTML", **off, elem_id=f"{experiment.name}-html")
            json = gr.DownloadButton("Everything as JSON", **off, elem_id=f"{experiment.name}-json")
            csv = gr.DownloadButton("Requests as CSV", **off, elem_id=f"{experiment.name}-csv")
    tab = Tab(
        prompt, run, stop, engines, repeats, warmups, tokens, length, race, progress, lanes,
        sentence, chart, results, run_id, png, svg, html, json, csv,
    )  # fmt: skip
    handler = partial(run_in_tab, experiment, host, sessions, tab)

    async def on_run(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        async for frame in handler(*values, session=request.session_hash or ""):
            yield frame

    def on_stop(request: gr.Request) -> Any:
        sessions.stop(request.session_hash or "")
        return gr.update(interactive=False)

    gr.on(
        [run.click, prompt.submit],
        on_run,
        tab.inputs,
        tab.outputs,
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="once",
        api_visibility="private",
    )
    stop.click(on_stop, None, stop, queue=False, show_progress="hidden", api_visibility="private")
    for button, form in ((png, "png"), (svg, "svg")):
        script = f"(name) => window.bakeoff.exportChart('{experiment.name}-chart', '{form}', name)"
        button.click(None, run_id, None, js=script, api_visibility="private")
    return tab


def read_plan(
    prompt: str, engines: list[str], repeats: int, warmups: int, tokens: int, length: str, race: bool
) -> Plan:
    """The controls' values as a plan; raises PlanError."""
    return Plan(
        prompt=prompt or "",
        engines=tuple(engines),
        repeats=repeats,
        warmups=warmups,
        max_tokens=tokens,
        fixed_length=length == LENGTHS[0],
        race=race,
    )


async def run_in_tab(
    experiment: Experiment, host: Host, sessions: Sessions, tab: Tab, *values: Any, session: str
) -> AsyncIterator[dict[Any, Any]]:
    """Run what the controls say, and yield what the tab has to show, at most one frame per interval."""
    try:
        plan = read_plan(*values)
    except PlanError as error:
        yield {tab.progress: problem_html(error.message)}
        return
    busy = {tab.run: gr.update(interactive=False), tab.stop: gr.update(interactive=True)}
    async with sessions.turn(session) as turn:
        while not await turn.came(FRAME_SECONDS * 5):
            yield {
                **busy,
                tab.progress: progress_html("Another run is using this machine; yours is next in line.", None),
            }
        if turn.given_up:
            yield {tab.run: gr.update(interactive=True), tab.stop: gr.update(interactive=False), tab.progress: ""}
            return
        views = {name: LaneView(name) for name in tab.lanes}
        yield {
            **busy,
            tab.progress: progress_html("Waiting until the engines are ready", 0.0),
            **{lane.chat: [] for lane in tab.lanes.values()},
            **{lane.tiles: views[name].tiles_html() for name, lane in tab.lanes.items()},
        }
        background = BackgroundRun(experiment, plan, host)
        turn.runs(background)
        total = len(plan.engines) * (plan.warmups + plan.repeats)
        done = 0
        try:
            async for events in background.new_events(FRAME_SECONDS):
                frame: dict[Any, Any] = {}
                for event in events:
                    for view in views.values():
                        view.take(event)
                    done += isinstance(event, RequestEnded)
                    if isinstance(event, RequestStarted):
                        kind = "warm-up" if event.warmup else "repeat"
                        label = tab.lanes[event.engine].engine.label
                        words = f"{label}: {kind} {event.repeat} of {event.of}"
                        words = f"All engines at once: {kind} {event.repeat} of {event.of}" if plan.race else words
                        frame[tab.progress] = progress_html(words, done / total)
                frame |= _changed_lanes(tab, views, plan.prompt)
                if frame:  # Gradio takes no empty one
                    yield frame
        finally:
            background.stop()  # the visitor left: what runs for nobody must not go on
        for view in views.values():
            view.close()
        finished = await asyncio.to_thread(_finished, tab, background, sessions)  # files and figure take a moment
        yield finished | _changed_lanes(tab, views, plan.prompt)


def _changed_lanes(tab: Tab, views: dict[str, LaneView], prompt: str) -> dict[Any, Any]:
    frame: dict[Any, Any] = {}
    for name, view in views.items():
        if view.changed:
            view.changed = False
            frame[tab.lanes[name].chat] = view.messages(prompt)
            frame[tab.lanes[name].tiles] = view.tiles_html()
    return frame


def _finished(tab: Tab, background: BackgroundRun, sessions: Sessions) -> dict[Any, Any]:
    frame: dict[Any, Any] = {tab.run: gr.update(interactive=True), tab.stop: gr.update(interactive=False)}
    result = background.result
    if result is None:
        reason = f"{type(background.failure).__name__}: {background.failure}" if background.failure else "no result"
        return frame | {tab.progress: problem_html(f"The run broke off because of a fault in this app. {reason}")}
    if not any(result.measured(engine.name) for engine in result.engines):
        words = "Stopped before anything was measured." if result.stopped_early else "Nothing could be measured."
        return frame | {tab.progress: problem_html(words)}
    return frame | {tab.progress: ""} | show_result(tab, result, sessions)


def show_result(tab: Tab, result: ExperimentResult, sessions: Sessions) -> dict[Any, Any]:
    """The finished result: sentence, chart, table, files."""
    json_file = result.save(sessions.results)
    csv_file, html_file = sessions.files / f"{result.id}.csv", sessions.files / f"{result.id}.html"
    csv_file.write_bytes(csv_bytes(result))
    html_file.write_bytes(figure_html(result))
    on = partial(gr.update, interactive=True)
    return {
        tab.headline: f"<p class='headline' role='status'>{escape(headline(result))}</p>",
        tab.chart: gr.update(value=figure(result), visible=True),
        tab.table: table_html(result),
        tab.run_id: result.id,
        tab.png: on(),
        tab.svg: on(),
        tab.html: on(value=str(html_file)),
        tab.json: on(value=str(json_file)),
        tab.csv: on(value=str(csv_file)),
    }


def table_html(result: ExperimentResult) -> str:
    headings, rows = table(result)
    head = "".join(f"<th scope='col'>{escape(word)}</th>" for word in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in row)}</tr>" for row in rows)
    said = [
        result.source_line,
        "Values are means over repeats; ± is half of the 95 % confidence interval (Student's t).",
        *notes(result),
    ]
    listed = "".join(f"<li>{escape(line)}</li>" for line in said)
    commands = "".join(
        f"<p><b>{escape(engine.label)}</b></p><pre>{escape(engine.command)}</pre>"
        for engine in result.engines
        if engine.command
    )
    return (
        f"<div class='table-scroll'><table class='results'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"</div><ul class='notes'>{listed}</ul><details class='commands'><summary>The commands that served these "
        f"engines</summary>{commands}</details>"
    )


def progress_html(words: str, share: float | None) -> str:
    bar = f"<div class='bar'><i style='width:{share:.0%}'></i></div>" if share is not None else ""
    return f"<div role='status'>{escape(words)}</div>{bar}"


def problem_html(words: str) -> str:
    return f"<div class='problem-box' role='alert'>{escape(words)}</div>"
