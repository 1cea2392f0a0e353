"""The tab of one experiment: its controls, one lane per engine, progress, and the finished result with its downloads.

Controls and charts follow from the experiment's own tables of settings and charts; nothing here knows one experiment.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape, unescape
from pathlib import Path
from typing import Any

import gradio as gr

from engines.clock import monotonic_clock
from engines.cloud import GPU_CHOICES
from engines.rented import RentedHost
from engines.spending import Spent, dollars
from engines.url_host import UrlHost
from experiments.background import AnyHost, BackgroundRun
from experiments.base import RACE, Experiment, Host, Plan, PlanError, Setting, Spending, TrialStarted
from experiments.plain import plain_result
from experiments.rented import BUDGET_WORDS, RentedMachine, read_rent, rent_settings
from experiments.replay import ReplayedRun
from experiments.report import (
    SPREAD,
    commands_text,
    csv_bytes,
    drawn_csv,
    figures,
    figures_html,
    headline,
    notes,
    table,
)
from experiments.result import ExperimentResult, ResultError, engine_of
from experiments.sameness import Sameness, same_answers
from experiments.servers import POLITE, read_run, read_servers, url_settings
from ui.diagrams import diagram
from ui.frames import for_another
from ui.lanes import LONGEST_ANSWER, Lane, LaneView, build_lane
from ui.public import Watch, address_of, load_of
from ui.session import Sessions
from ui.sharing import COPY_SCRIPT

FRAME_SECONDS = 0.1  # a browser redraws a growing text smoothly at ten frames a second
COPY_COMMANDS, COPY_LINK = "Copy the commands", "Copy the link to this run"
LONGEST_SLIDER = 2048  # steps; a wider range is typed


@dataclass(frozen=True, slots=True)
class Picture:
    """One chart of the tab with its downloads."""

    box: gr.Column
    plot: gr.Plot
    print: gr.HTML  # the small print, which wraps where a picture would cut it
    csv: gr.DownloadButton


@dataclass(frozen=True, slots=True)
class ResultView:
    """The components that show a finished result."""

    headline: gr.HTML
    pictures: dict[str, Picture]
    table: gr.HTML
    run_id: gr.Textbox
    commands: gr.Textbox
    copy_commands: gr.Button
    copy_link: gr.Button
    html: gr.DownloadButton
    json: gr.DownloadButton
    csv: gr.DownloadButton

    @property
    def drawn(self) -> list[Any]:
        return [part for one in self.pictures.values() for part in (one.box, one.plot, one.print, one.csv)]

    @property
    def outputs(self) -> list[Any]:
        copied = [self.run_id, self.commands, self.copy_commands, self.copy_link]
        return [self.headline, *self.drawn, self.table, *copied, self.html, self.json, self.csv]


@dataclass(frozen=True, slots=True)
class Tab:
    """The components of one experiment's tab, by name; `controls` by their setting's name."""

    run: gr.Button
    stop: gr.Button
    engines: gr.CheckboxGroup
    controls: dict[str, Any]
    recorded: gr.Dropdown
    replay: gr.Button
    progress: gr.HTML
    draw: gr.Button  # pressed by page.js, when the recording's charts come into sight
    lanes: dict[str, Lane]
    result: ResultView

    @property
    def inputs(self) -> list[Any]:
        return [self.engines, *self.controls.values()]

    @property
    def outputs(self) -> list[Any]:
        lanes = [part for lane in self.lanes.values() for part in (lane.chat, lane.tiles)]
        return [self.run, self.stop, self.replay, self.progress, *lanes, *self.result.outputs]


def settings_of(experiment: Experiment, host: AnyHost) -> tuple[Setting, ...]:
    """What a visitor can set: the experiment's own settings that mean something here, and what to rent."""
    if isinstance(host, UrlHost):
        return url_settings(experiment)
    own = tuple(setting for setting in experiment.settings if setting.on_page)
    if not isinstance(host, RentedHost):
        return own
    own = tuple(setting for setting in own if setting is not RACE)  # every engine has its own machine
    return own + rent_settings(experiment.name, host)


def experiment_tab(
    experiment: Experiment, host: AnyHost, sessions: Sessions, servers: Mapping[str, Any] | None = None
) -> Tab:
    """Build the tab and wire it. `host` runs the engines and knows their statuses. `servers`: the fields, one set for
    all tabs, in which the visitor names servers, by their settings' names."""
    name = experiment.name
    gr.HTML(intro_html(experiment.name, experiment.question, experiment.mechanism), padding=False)
    servers = servers or {}
    first, *others = [one for one in settings_of(experiment, host) if one.name not in servers]  # the question first
    with gr.Row(elem_classes="ask"):
        with gr.Column(scale=5, min_width=260):
            controls = {first.name: build_control(first, name)}
        with gr.Column(scale=1, min_width=140, elem_classes="go"):
            run = gr.Button("Run", variant="primary", elem_id=f"{name}-run")
            stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{name}-stop")
    tools = gr.Row(elem_classes="tools")
    with tools, gr.Accordion("Settings", open=False, elem_id=f"{name}-settings") as folded:
        choices = [(engine.label, engine.name) for engine in host.engines]
        engines = gr.CheckboxGroup(choices, value=[engine for _, engine in choices], label="Engines")
        for title, group in grouped(others, experiment):
            gr.HTML(f"<h3 class='group'>{escape(title)}</h3>", padding=False)
            for begin in range(0, len(group), 3):
                with gr.Row():
                    for setting in group[begin : begin + 3]:
                        controls[setting.name] = build_control(setting, name)
        if isinstance(host, RentedHost):
            prices = gr.HTML("", padding=False, elem_id=f"{name}-prices")
            # Asked for when somebody looks; an async function as the component's value breaks the page's own config.
            folded.expand(
                partial(prices_html, host), None, prices, queue=False, show_progress="hidden", api_visibility="private"
            )
    # In the order of the settings.
    controls = {setting.name: controls[setting.name] for setting in (first, *others)} | dict(servers)
    with tools, gr.Row(elem_classes="earlier"):
        recorded = gr.Dropdown(
            [], value=None, label="A run made earlier", scale=4, min_width=220, elem_id=f"{name}-recorded"
        )
        replay = gr.Button("Replay", size="md", scale=0, min_width=96, elem_id=f"{name}-replay")
    waiting = "Loading the recording that came with the app" if sessions.library.has_recording(name) else ""
    progress = gr.HTML(progress_html(waiting, None), padding=False, elem_classes="progress", elem_id=f"{name}-progress")
    draw = gr.Button("Draw the charts", visible="hidden", elem_id=f"{name}-draw")
    with gr.Row(elem_classes="lanes"):
        lanes = {engine.name: build_lane(engine, host.status(engine.name), name) for engine in host.engines}
    view = build_result(experiment, name)
    tab = Tab(run, stop, engines, controls, recorded, replay, progress, draw, lanes, view)
    handler = partial(run_in_tab, experiment, host, sessions, tab)

    async def on_run(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        who = request.session_hash or ""
        async for frame in handler(*values, session=who, visitor=visitor_of(request, sessions)):
            yield frame

    def on_stop(request: gr.Request) -> Any:
        sessions.stop(request.session_hash or "")
        return gr.update(interactive=False)

    gr.on(
        [run.click, controls[first.name].submit],
        on_run,
        tab.inputs,
        tab.outputs,
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="once",
        api_visibility="private",
    )

    def refresh(request: gr.Request) -> Any:
        return gr.update(choices=_choices(sessions, name, request.session_hash or ""))

    async def on_replay(request: gr.Request, chosen: str | None) -> AsyncIterator[dict[Any, Any]]:
        async for frame in replay_in_tab(sessions, tab, chosen, request.session_hash or ""):
            yield frame

    replay.click(
        on_replay,
        recorded,
        tab.outputs,
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="once",
        api_visibility="private",
    )
    recorded.focus(
        refresh,
        None,
        recorded,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    stop.click(on_stop, None, stop, queue=False, show_progress="hidden", api_visibility="private")
    return tab


def grouped(settings: Sequence[Setting], experiment: Experiment) -> list[tuple[str, list[Setting]]]:
    """The settings under their headings; what is not the experiment's own says what to rent."""
    own = {setting.name for setting in (*experiment.settings, POLITE)}
    groups = {
        "What to ask": [one for one in settings if one.name in own and one.group == "ask"],
        "How to measure": [one for one in settings if one.name in own and one.group == "measure"],
        "What to rent": [one for one in settings if one.name not in own],
    }
    return [(title, group) for title, group in groups.items() if group]


def intro_html(name: str, question: str, mechanism: str) -> str:
    """How every tab opens: its question, how the thing works, and a drawing of it."""
    return (
        f"<section class='intro'><div><h2>{escape(question)}</h2><p class='mechanism'>{escape(mechanism)}</p></div>"
        f"{diagram(name)}</section>"
    )


async def prices_html(host: RentedHost) -> str:
    """What each GPU costs, alone and with the cores and the memory that come with it."""
    rates, machine = await host.rates(), host.cloud.machine
    rows = []
    for choice in GPU_CHOICES:
        alone = rates.dollars_per_second(choice.exactly, 1, 0, 0)
        whole = rates.dollars_per_second(choice.exactly, 1, machine.cores, machine.gibibytes)
        told = [dollars(None if price is None else price * 3600) for price in (alone, whole)]
        rows.append(f"<tr><td>{choice.name}</td><td>{told[0]}</td><td>{told[1]}</td></tr>")
    size = f"with {machine.cores:g} cores and {machine.gibibytes:g} GiB"
    return (
        "<details class='prices'><summary>What each GPU costs per hour</summary><table class='results'><thead><tr>"
        f"<th scope='col'>GPU</th><th scope='col'>alone</th><th scope='col'>{size}</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table><p>{escape(rates.source)}. Billed by the second, starts included.</p>"
        "</details>"
    )


def build_control(setting: Setting, tab: str) -> Any:
    """The component that sets one field of the plan."""
    common: dict[str, Any] = {"label": setting.label, "elem_id": f"{tab}-{setting.name.replace('_', '-')}"}
    common |= {"info": setting.info} if setting.info else {}
    match setting.kind:
        case "switch":
            return gr.Checkbox(setting.default, **common)
        case "choice":
            words = next(words for words, value in setting.choices.items() if value == setting.default)
            return gr.Radio(list(setting.choices), value=words, **common)
        case "whole" | "number" if setting.default is None:  # a number's field cannot be empty in a browser
            return gr.Textbox("", max_lines=1, placeholder="left empty", **common)
        case "whole" | "number" if (setting.high - setting.low) / setting.step <= LONGEST_SLIDER:
            return gr.Slider(setting.low, setting.high, setting.default, step=setting.step, **common)
        case "whole" | "number":
            return gr.Number(setting.default, precision=0 if setting.kind == "whole" else None, **common)
        case "line":
            return gr.Textbox(setting.default, max_lines=1, **common)
        case "wholes":
            typed = setting.default if isinstance(setting.default, str) else ", ".join(map(str, setting.default))
            return gr.Textbox(typed, max_lines=1, **common)
    lines = setting.default.count("\n") + 1
    return gr.Textbox(setting.default, lines=max(2, lines), max_lines=8, **common)


def build_result(experiment: Experiment, place: str) -> ResultView:
    """Sentence, charts, table and downloads of a result; `place` makes the elements' ids its own."""
    off: dict[str, Any] = {"size": "sm", "interactive": False, "min_width": 120}
    with gr.Column(elem_id=f"{place}-result"):
        sentence = gr.HTML("", padding=False, elem_id=f"{place}-headline")
        run_id = gr.Textbox("", visible="hidden", elem_id=f"{place}-run-id", label="Run", show_label=False)
        pictures = {}
        for chart in experiment.charts:
            with gr.Column(visible=False) as box:
                plot = gr.Plot(label=chart.title, show_label=False, elem_id=f"{place}-{chart.name}-chart")
                small = gr.HTML("", padding=False)
                with gr.Row():
                    for form in ("png", "svg"):
                        button = gr.Button(
                            f"{chart.title} as {form.upper()}",
                            size="sm",
                            min_width=120,
                            elem_id=f"{place}-{chart.name}-{form}",
                        )
                        called = f"'{place}-{chart.name}-chart', '{form}', name && name + '-{chart.name}'"
                        script = f"(name) => window.bakeoff.exportChart({called})"
                        button.click(None, run_id, None, js=script, api_visibility="private")
                    points = gr.DownloadButton(f"{chart.title} as CSV", **off, elem_id=f"{place}-{chart.name}-csv")
            pictures[chart.name] = Picture(box, plot, small, points)
        results = gr.HTML("", padding=False, elem_id=f"{place}-table")
        commands = gr.Textbox("", visible="hidden", elem_id=f"{place}-commands", label="Commands", show_label=False)
        plain: dict[str, Any] = {"size": "sm", "min_width": 120, "interactive": False}
        with gr.Row():
            copy_commands = gr.Button(COPY_COMMANDS, **plain, elem_id=f"{place}-copy-commands")
            copy_link = gr.Button(COPY_LINK, **plain, elem_id=f"{place}-copy-link")
        for button, source, text, words in (
            (copy_commands, commands, "text", COPY_COMMANDS),
            (copy_link, run_id, "text && `${location.origin}${location.pathname}?run=${text}`", COPY_LINK),
        ):
            script = f"(text) => ({COPY_SCRIPT})({text}, '{words}')"
            button.click(None, source, button, js=script, api_visibility="private")
        with gr.Row():
            html = gr.DownloadButton("Charts as HTML", **off, elem_id=f"{place}-html")
            json = gr.DownloadButton("Everything as JSON", **off, elem_id=f"{place}-json")
            csv = gr.DownloadButton("Requests as CSV", **off, elem_id=f"{place}-csv")
    return ResultView(sentence, pictures, results, run_id, commands, copy_commands, copy_link, html, json, csv)


def read_plan(
    experiment: Experiment, host: AnyHost, engines: list[str], values: tuple[Any, ...], visitor: str = ""
) -> tuple[Plan, Host]:
    """The controls' values, in the order of the settings, as a plan and the host to run it on; raises PlanError."""
    settings = settings_of(experiment, host)
    typed = {setting.name: value for setting, value in zip(settings, values, strict=True)}
    if isinstance(host, UrlHost):
        return read_run(experiment, host, read_servers(engines, typed), typed)
    plan = experiment.read_plan(tuple(engines), typed)
    if isinstance(host, RentedHost):
        return plan, RentedMachine(host, read_rent(experiment.name, host, typed), visitor)
    return plan, host


def visitor_of(request: gr.Request, sessions: Sessions) -> str:
    """Who somebody is as long as they keep their address. Behind a proxy, on a page of one's own, what that was told;
    in public mode an address that nobody can choose, as a hash."""
    forwarded = str((request.headers or {}).get("x-forwarded-for", ""))
    address = request.client.host if request.client else ""
    if sessions.rules is not None:
        return sessions.tally.name_of(address_of(address, forwarded, sessions.rules.behind_proxy))
    return str(forwarded.partition(",")[0].strip() or address)


async def run_in_tab(
    experiment: Experiment,
    host: AnyHost,
    sessions: Sessions,
    tab: Tab,
    engines: list[str],
    *values: Any,
    session: str,
    visitor: str = "",
) -> AsyncIterator[dict[Any, Any]]:
    """Run what the controls say, and yield what the tab has to show, at most one frame per interval."""
    try:
        plan, machine = read_plan(experiment, host, engines, values, visitor)
        experiment.contenders(plan, machine)  # what this model or host cannot do is said before anybody waits
        load = await asyncio.to_thread(load_of, experiment, plan, machine, sessions.rules) if sessions.rules else None
    except PlanError as error:
        yield {tab.progress: problem_html(error.message)}
        return
    if load and (refused := sessions.refusal(visitor, load)):
        yield {tab.progress: problem_html(refused)}
        return
    busy = _busy(tab)
    async with sessions.turn(session, visitor, load) as turn:
        while not await turn.came(FRAME_SECONDS * 5):
            yield {**busy, tab.progress: progress_html(sessions.place(turn).words, None)}
        if turn.given_up:
            yield _idle(tab) | {tab.progress: ""}
            return
        if load and (refused := sessions.refusal_at_turn(visitor, load)):
            yield _idle(tab) | {tab.progress: problem_html(refused)}
            return
        background = BackgroundRun(experiment, plan, machine)
        turn.runs(background)
        watch = None
        if load and sessions.rules:
            watch = Watch(sessions.rules, load, visitor, sessions.tally, background.stop)
        together = plan.race or isinstance(machine, RentedMachine)
        try:
            async for frame in _shown(tab, background, plan.prompt, "All engines at once" if together else "", watch):
                yield frame
        finally:
            if watch:
                watch.close(background.result)
        ended = await asyncio.to_thread(_finished, tab, background, sessions)  # files and figures take a moment
        if watch and watch.reason:
            ended[tab.progress] = problem_html(watch.reason)
        yield ended


async def replay_in_tab(
    sessions: Sessions, tab: Tab, chosen: str | None, session: str
) -> AsyncIterator[dict[Any, Any]]:
    """Play a run made earlier in the lanes, labelled with where and when it was measured."""
    try:
        if not chosen:
            raise ResultError("Choose a run to replay first.")
        result = await asyncio.to_thread(sessions.load, chosen, session)
    except ResultError as error:
        yield {tab.progress: problem_html(str(error))}
        return
    run = ReplayedRun(result)
    with sessions.watching(session, run):
        async for frame in _shown(tab, run, "", f"Recorded, not live: {result.source_line}"):
            yield frame
        ended = _idle(tab) | {tab.progress: progress_html(f"This was a recording: {result.source_line}", None)}
        yield ended | await asyncio.to_thread(shown_before, tab.result, result, sessions)


async def _shown(
    tab: Tab, run: BackgroundRun | ReplayedRun, prompt: str, label: str, watch: Watch | None = None
) -> AsyncIterator[dict[Any, Any]]:
    """What happens in the lanes, frame by frame, until the run is over. `label` stands for the engine's name."""
    views = {name: LaneView(name) for name in tab.lanes}
    words, share = "Waiting until the engines are ready" if isinstance(run, BackgroundRun) else label, 0.0
    done = -1
    cost = ""
    yield {
        **_busy(tab),
        tab.progress: progress_html(words, share),
        **{lane.chat: [] for lane in tab.lanes.values()},
        **{lane.tiles: views[name].tiles_html() for name, lane in tab.lanes.items()},
    }
    alarm = asyncio.get_running_loop().call_later(watch.seconds, watch.time_up) if watch else None
    try:
        async for events in run.new_events(FRAME_SECONDS):
            frame: dict[Any, Any] = {}
            for event in events:
                if watch:
                    watch.take(event)
                for view in views.values():
                    view.take(event)
                if isinstance(event, TrialStarted) and event.done > done:  # of several at once, whoever is first
                    done = event.done
                    words = f"{label or _title(event, views, tab)}: {event.trial.words}"
                    share = min(1.0, done / event.of)  # a rehearsal plays as many as were recorded
                elif isinstance(event, Spending):
                    cost = spending_words(event)
                if isinstance(event, TrialStarted | Spending):
                    frame[tab.progress] = progress_html(words, share, cost)
            frame |= changed_lanes(tab, views, prompt)
            if frame:  # Gradio takes no empty one
                yield frame
    finally:
        run.stop()  # the visitor left: what runs for nobody must not go on
        if alarm:
            alarm.cancel()
    for view in views.values():
        view.close()
    yield changed_lanes(tab, views, prompt)


def _choices(sessions: Sessions, experiment: str, session: str = "") -> list[tuple[str, str]]:
    return [(entry.words, entry.id) for entry in sessions.entries(experiment, session)]


def _busy(tab: Tab) -> dict[Any, Any]:
    off = gr.update(interactive=False)
    return {tab.run: off, tab.replay: off, tab.stop: gr.update(interactive=True)}


def _idle(tab: Tab) -> dict[Any, Any]:
    on = gr.update(interactive=True)
    return {tab.run: on, tab.replay: on, tab.stop: gr.update(interactive=False)}


def _title(event: TrialStarted, views: dict[str, LaneView], tab: Tab) -> str:
    engine = engine_of(event.engine)
    row = views[engine].rows.get(event.engine) if engine in views else None
    return row.title if row else tab.lanes[engine].engine.label if engine in tab.lanes else engine


def changed_lanes(tab: Tab, views: dict[str, LaneView], prompt: str) -> dict[Any, Any]:
    frame: dict[Any, Any] = {}
    for name, view in views.items():
        if view.changed:
            view.changed = False
            frame[tab.lanes[name].chat] = view.messages(prompt)
            if view.tiles_due(monotonic_clock()):
                frame[tab.lanes[name].tiles] = view.tiles_html()
    return frame


def _finished(tab: Tab, background: BackgroundRun, sessions: Sessions) -> dict[Any, Any]:
    frame = _idle(tab)
    result = background.result and plain_result(background.result)  # servers and engines choose some of its words
    if result is None:
        reason = f"{type(background.failure).__name__}: {background.failure}" if background.failure else "no result"
        return frame | {tab.progress: problem_html(f"The run broke off because of a fault in this app. {reason}")}
    if not any(result.measured(engine.name) for engine in result.engines):
        words = "Stopped before anything was measured." if result.stopped_early else "Nothing could be measured."
        reason = next((label for label in result.labels if label.startswith(BUDGET_WORDS)), "")
        if reason:
            words = f"{reason.partition(':')[0]} before anything was measured."
        cost = f"This run: {spent_words(result.spent)}" if result.spent and result.spent.container_seconds else ""
        return frame | {tab.progress: problem_html(words, cost)}
    told = progress_html(f"This run: {spent_words(result.spent)}", None) if result.spent else ""
    try:
        result.save(sessions.results)
    except OSError as failure:
        told += problem_html(
            f"This run could not be kept: {failure.strerror or failure}. It is shown here and can be downloaded below, "
            "as long as this page is open. The runs kept earlier are still there."
        )
    return frame | {tab.progress: told} | show_result(tab.result, result, sessions)


def shown_before(view: ResultView, result: ExperimentResult, sessions: Sessions) -> dict[Any, Any]:
    """The same for a result that many visitors watch: drawn once, as long as it is among the latest."""
    key = (id(view), id(result))
    kept: tuple[ExperimentResult, dict[Any, Any]] = sessions.shown.get(
        key, lambda: (result, show_result(view, result, sessions))
    )
    if not (sessions.files / f"{result.id}.html").exists():  # it had to make room; the same names are written again
        show_result(view, result, sessions)
    return for_another(kept[1])


def show_result(view: ResultView, result: ExperimentResult, sessions: Sessions, later: str = "") -> dict[Any, Any]:
    """A result's sentence, charts, table and files. `later`: the tab that asks for the charts by and by."""
    drawn = figures(result)
    files, unwritten = _download_files(result, drawn, sessions)
    json_file, csv_file, html_file = (files / f"{result.id}.{form}" for form in ("json", "csv", "html"))
    on = partial(gr.update, interactive=True) if not unwritten else _no_file
    shown: dict[Any, Any] = {}
    waiting = f" data-charts='{later}'" if later else ""
    for name, picture in view.pictures.items() if not later else ():
        shown[picture.box] = gr.update(visible=name in drawn)
        if name in drawn:
            figure, lines = without_small_print(drawn[name])
            shown[picture.plot] = figure
            told = "<br>".join(escape(unescape(line)) for line in lines)  # a chart's words are escaped already
            shown[picture.print] = f"<p class='small-print'>{told}</p>"
            shown[picture.csv] = on(value=str(files / f"{result.id}-{name}.csv"))
    return shown | {
        view.headline: f"<p class='headline' role='status'{waiting}>{escape(headline(result))}</p>{unwritten}",
        view.table: table_html(result),
        view.run_id: result.id,
        view.commands: (commands := commands_text(result)),
        view.copy_commands: gr.update(value=COPY_COMMANDS, interactive=bool(commands)),
        view.copy_link: gr.update(value=COPY_LINK, interactive=True),
        view.html: on(value=str(html_file)),
        view.json: on(value=str(json_file)),
        view.csv: on(value=str(csv_file)),
    }


def _download_files(result: ExperimentResult, drawn: dict[str, Any], sessions: Sessions) -> tuple[Path, str]:
    """The folder with the result's files, and words of why there are none: a full disk takes no result off the page."""
    files = sessions.files
    try:
        sessions.make_room()
        result.save(files)
        (files / f"{result.id}.csv").write_bytes(csv_bytes(result))
        (files / f"{result.id}.html").write_bytes(figures_html(result, drawn))
        for name, figure in drawn.items():
            (files / f"{result.id}-{name}.csv").write_bytes(drawn_csv(figure))
    except OSError as failure:
        for path in files.glob(f"{result.id}*"):  # half of them are of no use to anybody
            path.unlink(missing_ok=True)
        return files, problem_html(f"There is no file to download: {failure.strerror or failure}.")
    return files, ""


def _no_file(value: str) -> Any:
    return gr.update(value=None, interactive=False)


def without_small_print(figure: Any) -> tuple[Any, list[str]]:
    """A copy of the figure for the page, and its small print as lines of text. The copy's `meta` has what an export
    needs to put the print back into the picture."""
    import plotly.graph_objects as go

    copy = go.Figure(figure)
    notes = list(copy.layout.annotations)
    below = [one for one in notes if one.xref == one.yref == "paper" and one.y == 0 and (one.yshift or 0) < 0]
    if not below or not copy.layout.meta:
        return copy, []
    axis = -max(one.yshift for one in below)
    bottom, height = copy.layout.margin.b, copy.layout.height
    lines = list(copy.layout.meta["small_print"])
    kept = {"lines": [one.to_plotly_json() for one in below], "bottom": bottom, "height": height}
    copy.layout.annotations = [one for one in notes if one not in below]
    copy.update_layout(meta={"small_print": kept}, height=height - (bottom - axis - 8), margin={"b": axis + 8})
    return copy, lines


def table_html(result: ExperimentResult) -> str:
    told = table(result)
    head = "".join(f"<th scope='col'>{escape(word)}</th>" for word in told.headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in row)}</tr>" for row in told.rows)
    listed = "".join(f"<li>{escape(line)}</li>" for line in [result.source_line, SPREAD, *notes(result)])
    commands = "".join(
        f"<p><b>{escape(engine.title)}</b></p><pre>{escape(engine.command)}</pre>"
        for engine in result.engines
        if engine.command
    )
    return (
        f"<div class='table-scroll'><table class='results'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"</div><ul class='notes'>{listed}</ul>{same_answers_html(same_answers(result))}<details class='commands'>"
        f"<summary>The commands that served these engines</summary>{commands}</details>"
    )


def same_answers_html(compared: list[Sameness]) -> str:
    """Whether the engines wrote the same, and the text from where they do not, highlighted."""
    if not compared:
        return ""
    whole = sum(one.agreement.whole for one in compared)
    lines = "".join(
        f"<li>{escape(one.words)}"
        + ("" if one.agreement.whole else f"<p>… {escape(one.shared[-120:])}<mark>{shown_rest(one)}</mark></p>")
        + "</li>"
        for one in compared
    )
    return (
        f"<details class='same'><summary>Same answer? {whole} of {len(compared)} comparisons agree to the end"
        f"</summary><ul>{lines}</ul></details>"
    )


def shown_rest(one: Sameness) -> str:
    """The text from where it differs, as much of it as somebody reads."""
    return escape(one.rest[:LONGEST_ANSWER])


def spending_words(told: Spending) -> str:
    """What a run has cost so far."""
    return f"So far {spent_words(told.spent)}" + ("" if told.limit is None else f" of {dollars(told.limit)}")


def spent_words(spent: Spent) -> str:
    cost = "at a price that is not known" if spent.dollars is None else dollars(spent.dollars)
    return f"{spent.gpu_seconds:,.0f} GPU-seconds, {cost}"


def progress_html(words: str, share: float | None, cost: str = "") -> str:
    bar = f"<div class='bar'><i style='width:{share:.0%}'></i></div>" if share is not None else ""
    told = f"<div class='cost'>{escape(cost)}</div>" if cost else ""
    return f"<div role='status'>{escape(words)}</div>{bar}{told}"


def problem_html(words: str, cost: str = "") -> str:
    told = f"<div class='cost'>{escape(cost)}</div>" if cost else ""
    return f"<div class='problem-box' role='alert'>{escape(words)}</div>{told}"
