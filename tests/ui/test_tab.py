"""The tab's handler, called as Gradio calls it: an async generator of frames, over scripted engines."""

from __future__ import annotations

import asyncio
import csv
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from engines.base import Engine, EngineConfig, EngineError
from engines.cloud import GPU_CHOICES
from engines.local import LocalHost
from engines.rented import RentedHost
from engines.scripted import Script, scripted_engine
from experiments.base import LENGTH_KIND
from experiments.baseline import EXPERIMENT
from experiments.rehearsal import RehearsalCloud
from experiments.report import headline
from experiments.result import ExperimentResult
from tests.conftest import MACHINE, wait_until
from tests.experiments.test_result import result_of
from ui.session import Sessions
from ui.tab import (
    Tab,
    experiment_tab,
    prices_html,
    problem_html,
    read_plan,
    run_in_tab,
    table_html,
)

Frame = dict[Any, Any]
MakeEngine = Callable[..., Engine]
MakeHost = Callable[..., LocalHost]
ME = "my session"
NATURAL, EXACT = LENGTH_KIND.choices


def unable(config: EngineConfig) -> list[str]:
    raise EngineError("Broken cannot serve this model.")


@pytest.fixture(scope="module")
def host(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHost]:
    script = Script(start=0.05, first_token=0.02, gap=0.02)
    engines = [
        scripted_engine("one", "One", "#0072B2", script),
        scripted_engine("two", "Two", "#D55E00", script),
        replace(scripted_engine("broken", "Broken", "#6B7280", script), serve_command=unable),
        scripted_engine("refusing", "Refusing", "#6B7280", replace(script, fault="http 500")),
    ]
    host = LocalHost(engines, model, cache=tmp_path_factory.mktemp("cache"), hardware=MACHINE)
    yield host
    host.close()


@pytest.fixture(scope="module")
def tab(host: LocalHost) -> Tab:
    return tab_over(host)


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def tab_over(host: LocalHost) -> Tab:
    with gr.Blocks():
        return experiment_tab(EXPERIMENT, host, Sessions())


def settings(*engines: str, prompt: str = "Go.", repeats: int = 1, warmups: int = 0, tokens: int = 6) -> list[Any]:
    """The controls' values; a race, because taking turns waits for each engine to settle."""
    return [list(engines), prompt, repeats, warmups, tokens, EXACT, None, True]


async def frames_of(host: LocalHost, tab: Tab, values: list[Any], sessions: Sessions) -> AsyncIterator[Frame]:
    async with aclosing(run_in_tab(EXPERIMENT, host, sessions, tab, *values, session=ME)) as frames:  # type: ignore[type-var]
        async for frame in frames:
            yield frame


kept: list[Sessions] = []  # a run's files live as long as the sessions they were made for


def all_frames(host: LocalHost, tab: Tab, *engines: str, **changed: Any) -> list[Frame]:
    kept.append(Sessions())

    async def collect() -> list[Frame]:
        return [frame async for frame in frames_of(host, tab, settings(*engines, **changed), kept[-1])]

    return asyncio.run(collect())


def answers(frames: list[Frame], tab: Tab, name: str) -> list[str]:
    """What the engine's lane showed as its answer, frame by frame."""
    chat = tab.lanes[name].chat
    return [frame[chat][-1]["content"] for frame in frames if len(frame.get(chat, [])) > 1]


def saved(frame: Frame, tab: Tab) -> ExperimentResult:
    return ExperimentResult.from_json(Path(frame[tab.result.json]["value"]).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (settings("one", prompt=" "), "Type a prompt first: there is nothing to answer."),
        (settings(), "Choose at least one engine."),
        (settings("one", repeats=0), "Repeats must be a whole number from 1 to 20, not 0."),
        ([["one"], None, *settings("one")[2:]], "Type a prompt first: there is nothing to answer."),
    ],
)
def test_settings_that_cannot_be_used_give_the_reason_and_touch_nothing_else(
    host: LocalHost, tab: Tab, values: list[Any], message: str
) -> None:
    async def collect() -> list[Frame]:
        return [frame async for frame in frames_of(host, tab, values, Sessions())]

    assert asyncio.run(collect()) == [{tab.progress: problem_html(message)}]


def test_the_controls_become_a_plan(host: LocalHost) -> None:
    plan, machine = read_plan(EXPERIMENT, host, ["one", "two"], ("Go.", 4, 1, 64, NATURAL, "2.5", True))
    assert machine is host
    assert (plan.prompt, plan.engines, plan.repeats, plan.warmups) == ("Go.", ("one", "two"), 4, 1)
    assert (plan.max_tokens, plan.fixed_length, plan.dollars_per_hour, plan.race) == (64, False, 2.5, True)
    plan, _ = read_plan(EXPERIMENT, host, ["one"], ("Go.", 1, 0, 8, EXACT, "", False))
    assert (plan.fixed_length, plan.dollars_per_hour) == (True, None)


def test_a_run_shows_growing_answers_and_ends_with_its_result(host: LocalHost, tab: Tab) -> None:
    frames = all_frames(host, tab, "one", "two", warmups=1, tokens=16)
    first, last = frames[0], frames[-1]
    assert (first[tab.run]["interactive"], first[tab.stop]["interactive"]) == (False, True)
    assert "Waiting until the engines are ready" in first[tab.progress]
    assert all(first[lane.chat] == [] for lane in tab.lanes.values())

    # Text was there before the whole answer was.
    whole = answers(frames, tab, "one")[-1]
    partial = [text for text in answers(frames, tab, "one") if 0 < len(text) < len(whole)]
    assert len(partial) >= 2
    assert all(whole.startswith(text) for text in partial)
    assert whole.startswith(" An engine that follows its script")
    said = " ".join(frame.get(tab.progress, "") for frame in frames)
    assert "All engines at once: warm-up 1 of 1" in said
    assert "All engines at once: repeat 1 of 1" in said

    assert (last[tab.run]["interactive"], last[tab.stop]["interactive"]) == (True, False)
    assert last[tab.progress] == ""
    assert "Mean of 1 run" in frames[-2][tab.lanes["one"].tiles]
    result = saved(last, tab)
    assert last[tab.result.headline] == f"<p class='headline' role='status'>{escape(headline(result))}</p>"
    assert last[tab.result.table] == table_html(result)
    assert last[tab.result.run_id] == result.id
    picture = tab.result.pictures["speed"]
    assert (last[picture.box]["visible"], type(last[picture.plot]).__name__) == (True, "Figure")
    assert [row.engine for row in result.measured("one") + result.measured("two")] == ["one", "two"]


def test_the_files_of_a_run_exist_and_parse_and_are_named_after_it(host: LocalHost, tab: Tab) -> None:
    last = all_frames(host, tab, "one")[-1]
    result = saved(last, tab)
    for button, ending in ((tab.result.json, "json"), (tab.result.csv, "csv"), (tab.result.html, "html")):
        assert last[button]["interactive"]
        assert Path(last[button]["value"]).name == f"{result.id}.{ending}"
    with Path(last[tab.result.csv]["value"]).open(newline="", encoding="utf-8") as file:
        assert [line["engine"] for line in csv.DictReader(file)] == ["one"]
    assert "Plotly.newPlot" in Path(last[tab.result.html]["value"]).read_text(encoding="utf-8")


def test_an_engine_that_cannot_start_says_so_in_its_lane_and_the_others_run(host: LocalHost, tab: Tab) -> None:
    frames = all_frames(host, tab, "broken", "one")
    assert set(answers(frames, tab, "broken")) == {"⚠ Broken cannot serve this model."}
    assert saved(frames[-1], tab).engines[0].error == "Broken cannot serve this model."
    assert "Broken gave no" in frames[-1][tab.result.headline]


def test_a_run_of_failed_requests_ends_with_a_result_that_counts_them(host: LocalHost, tab: Tab) -> None:
    last = all_frames(host, tab, "refusing")[-1]
    assert "No engine gave an answer" in last[tab.result.headline]
    assert len(saved(last, tab).failures("refusing")) == 1


def test_a_run_without_any_engine_says_so_and_leaves_the_last_result_standing(
    scripted: MakeEngine, make_host: MakeHost
) -> None:
    host = make_host(scripted("one"), model="/nowhere")
    tab = tab_over(host)
    last = all_frames(host, tab, "one")[-1]
    assert last[tab.progress] == problem_html("Nothing could be measured.")
    assert last[tab.run]["interactive"]
    assert set(tab.result.outputs).isdisjoint(last)


def test_stopping_keeps_the_repeats_that_were_measured(host: LocalHost, tab: Tab) -> None:
    async def visit() -> Frame:
        kept.append(Sessions())
        sessions, last = kept[-1], {}
        async for last in frames_of(host, tab, settings("one", repeats=20), sessions):
            if "repeat 2" in last.get(tab.progress, ""):
                sessions.stop(ME)
        return last

    last = asyncio.run(visit())
    result = saved(last, tab)
    assert result.stopped_early
    assert 1 <= len(result.measured("one")) < 20
    assert "Stopped early: some repeats are missing." in last[tab.result.table]
    assert last[tab.run]["interactive"]


def test_stopping_before_anything_was_measured_says_so(host: LocalHost, tab: Tab) -> None:
    async def visit() -> Frame:
        sessions, seen = Sessions(), []
        async for frame in frames_of(host, tab, settings("one"), sessions):
            seen.append(frame)
            sessions.stop(ME)  # at the very first frame, before the run has begun
        return seen[-1]

    last = asyncio.run(visit())
    assert last[tab.progress] == problem_html("Stopped before anything was measured.")
    assert (last[tab.run]["interactive"], last[tab.stop]["interactive"]) == (True, False)


def test_a_second_visitor_waits_in_line_and_may_give_up(host: LocalHost, tab: Tab) -> None:
    async def visit() -> list[Frame]:
        sessions, seen = Sessions(), []
        async with sessions.turn("somebody else"):
            async for frame in frames_of(host, tab, settings("one"), sessions):
                seen.append(frame)
                sessions.stop(ME)
        return seen

    waiting, last = asyncio.run(visit())
    assert "Another run is under way" in waiting[tab.progress]
    assert waiting[tab.stop]["interactive"]
    on, off = gr.update(interactive=True), gr.update(interactive=False)
    assert last == {tab.run: on, tab.replay: on, tab.stop: off, tab.progress: ""}


def test_a_visitor_who_leaves_takes_the_run_along(host: LocalHost, tab: Tab) -> None:
    async def visit() -> None:
        sessions = Sessions()
        async with aclosing(frames_of(host, tab, settings("one", tokens=2000), sessions)) as frames:  # type: ignore[type-var]
            async for frame in frames:
                if frame.get(tab.lanes["one"].chat):
                    break
        assert host.status("one").light == "busy"
        await asyncio.to_thread(wait_until, lambda: host.status("one").light == "ready", 5)
        async with sessions.turn("next") as turn:
            assert await turn.came(0.1)

    asyncio.run(visit())


def test_a_fault_of_ours_is_shown_and_not_swallowed(scripted: MakeEngine, make_host: MakeHost) -> None:
    def broken_command(config: EngineConfig) -> list[str]:
        raise ZeroDivisionError("a <fault> of ours")

    host = make_host(replace(scripted("one"), serve_command=broken_command))
    tab = tab_over(host)
    last = all_frames(host, tab, "one")[-1]
    assert "because of a fault in this app. ZeroDivisionError: a &lt;fault&gt; of ours" in last[tab.progress]
    assert last[tab.run]["interactive"]


def test_hostile_words_in_a_result_stay_words_in_the_table() -> None:
    hostile = "<script>alert(1)</script>"
    result = result_of(quick=[100.0], broken=hostile)
    quick = replace(result.engines[0], label=hostile, version=hostile, command=hostile, caveat=hostile)
    html = table_html(
        replace(
            result, engines=(quick, result.engines[1]), labels=(hostile,), model=hostile, hardware={"words": hostile}
        )
    )
    assert "<script" not in html
    assert html.count(escape(hostile)) == 9  # every word of it that the table shows


def test_the_commands_that_served_the_engines_are_shown() -> None:
    result = result_of(quick=[100.0])
    served = replace(result.engines[0], command="vllm serve model --port 8000")
    assert "<pre>vllm serve model --port 8000</pre>" in table_html(replace(result, engines=(served,)))


def test_the_price_table_names_every_gpu_with_its_source() -> None:
    shown = asyncio.run(prices_html(RentedHost(RehearsalCloud(), [])))

    assert all(f"<td>{choice.name}</td>" in shown for choice in GPU_CHOICES)
    # An L4 alone, and with 4 cores and 32 GiB: 0.80 + 4 * 0.0000131 * 3600 + 32 * 0.00000222 * 3600 = 1.2444
    assert "<td>L4</td><td>$0.80</td><td>$1.24</td>" in shown
    assert "list prices of" in shown and "–" not in shown
