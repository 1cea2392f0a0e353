"""How the page looks and what it weighs: accessible, within its window, usable by keyboard, light on the wire."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from experiments import EXPERIMENTS
from experiments.library import RECORDINGS
from tests.browser.conftest import picture
from tests.running_app import RunningApp

pytestmark = pytest.mark.browser
OpenPage = Callable[..., Page]
TABS = [*((experiment.title, experiment.name) for experiment in EXPERIMENTS), ("Results", "")]
STAND_INS = {"transformers": "slow", "vllm": "quick", "sglang": "bursty"}
SERIOUS = ("serious", "critical")
MOST_BYTES, MOST_REQUESTS = 700_000, 115  # of the first visit: about 440 kB in 98 requests, and some slack
MOST_BYTES_AGAIN = 150_000  # of the second, whose files the browser has: about 70 kB


@pytest.fixture(scope="module")
def recorded_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Scripted engines under the recordings that came with the app, as if these had been theirs."""
    folder = tmp_path_factory.mktemp("recordings")
    for path in RECORDINGS.glob("*.json"):
        if path.name.startswith("concurrency"):  # the largest by far, and its lanes are no different
            continue
        text = path.read_text(encoding="utf-8")
        for theirs, ours in STAND_INS.items():
            text = text.replace(f'"{theirs}"', f'"{ours}"').replace(f'"{theirs}+', f'"{ours}+')
        (folder / path.name).write_text(json.dumps(json.loads(text)), encoding="utf-8")
    with RunningApp("--scripted", "--recordings", str(folder), cache=tmp_path_factory.mktemp("cache")) as app:
        app.url()
        app.wait_for_log(": ready", count=3)
        yield app


def violations(page: Page) -> list[str]:
    """What axe finds that is serious, with the place and the reason; it must have found something to look at."""
    found = Axe().run(page).response
    assert len(found["passes"]) > 20
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]


def open_tab(page: Page, title: str, name: str) -> None:
    """The tab with its settings unfolded; on a narrow page Gradio keeps the last tabs in a menu."""
    tab = page.get_by_role("tab", name=title, exact=True)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(title, exact=True).click()
    else:
        tab.click()
    if name:
        page.locator(f"#{name}-settings").get_by_role("button", name="Settings").click()
        expect(page.locator(f"#{name}-max-tokens")).to_be_visible()


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize(("title", "name"), TABS)
def test_axe_finds_nothing_serious(
    recorded_app: RunningApp, open_page: OpenPage, title: str, name: str, colours: str
) -> None:
    page = open_page(recorded_app.url(), color_scheme=colours)
    open_tab(page, title, name)
    if name and name != "concurrency":
        expect(page.locator(f"#{name}-headline .headline")).to_be_visible(timeout=20_000)
        page.locator(f"#{name}-headline").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    assert violations(page) == []


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious_while_a_run_streams_and_when_it_has_ended(
    scripted_app: RunningApp, open_page: OpenPage, colours: str
) -> None:
    page = open_page(scripted_app.url(), color_scheme=colours)
    page.locator("#baseline-run").click()
    expect(page.locator("#baseline-tiles-quick .tiles-note")).to_contain_text("of", timeout=40_000)
    assert violations(page) == []
    expect(page.locator(".headline")).to_contain_text("tok/s", timeout=60_000)
    expect(page.locator("#baseline-speed-chart .js-plotly-plot")).to_be_visible()
    assert violations(page) == []


@pytest.mark.parametrize("width", [400, 768, 1400, 2560])
def test_no_tab_is_wider_than_its_window(recorded_app: RunningApp, open_page: OpenPage, width: int) -> None:
    page = open_page(recorded_app.url(), viewport={"width": width, "height": 900})
    for title, name in TABS:
        open_tab(page, title, name)
        page.wait_for_timeout(700)
        picture(page, f"look-{width}-{name or 'results'}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, title
        for lane in page.locator(".lane:visible").all():
            box = lane.bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= width


def test_number_and_unit_of_a_tile_stand_on_one_line(recorded_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(recorded_app.url())
    expect(page.locator("#baseline-headline .headline")).to_be_visible(timeout=20_000)
    page.evaluate("bakeoff.race.stop()")
    for tile in page.locator("#baseline-tiles-quick .tile").all():
        value, unit = tile.locator(".value").bounding_box(), tile.locator(".unit").bounding_box()
        assert value and unit and abs((value["y"] + value["height"]) - (unit["y"] + unit["height"])) < 8


# The recorded race


def race_answer(page: Page, lane: str) -> str:
    return page.locator(f"#baseline-chat-{lane} .opening-answer .said").text_content() or ""


def test_the_recorded_race_plays_by_itself_and_is_labelled(recorded_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(recorded_app.url())
    page.wait_for_function("document.querySelectorAll('.opening-answer .said').length === 3")
    first = len(race_answer(page, "slow"))
    expect(page.locator(".opening-bar")).to_contain_text("Recorded, not live")
    page.wait_for_function(f"document.querySelector('#baseline-chat-slow .said').textContent.length > {first + 20}")
    picture(page, "opening-race")
    expect(page.locator("#baseline-run")).to_be_enabled()  # it takes no place in the line

    expect(page.locator(".opening-bar")).to_have_count(0, timeout=20_000)  # about ten seconds
    expect(page.locator("#baseline-progress")).to_contain_text("Recorded, not live")
    expect(page.locator("#baseline-tiles-quick .tiles-note")).to_have_text("Mean of 10 runs")


@pytest.mark.parametrize("ending", ["Run", "Replay", "Stop the recording", "another tab"])
def test_the_recorded_race_ends_at_once(recorded_app: RunningApp, open_page: OpenPage, ending: str) -> None:
    page = open_page(recorded_app.url())
    page.locator(".opening-bar").wait_for()
    if ending == "another tab":
        page.get_by_role("tab", name="Prefix caching").click()
    else:
        page.get_by_role("button", name=ending, exact=True).click()
    assert page.locator(".opening-answer").count() == page.locator(".opening-bar").count() == 0
    if ending == "Run":
        expect(page.locator("#baseline-tiles-quick .tiles-note")).to_contain_text("of", timeout=40_000)
        page.get_by_role("button", name="Stop", exact=True).click()
        expect(page.locator("#baseline-run")).to_be_enabled(timeout=20_000)


def test_who_wants_no_motion_sees_the_end_of_the_recording(recorded_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(recorded_app.url(), reduced_motion="reduce")
    expect(page.locator("#baseline-tiles-quick .tiles-note")).to_have_text("Mean of 10 runs", timeout=20_000)
    expect(page.locator("#baseline-progress")).to_contain_text("Recorded, not live")
    assert page.locator(".opening-bar").count() == 0
    assert page.evaluate("bakeoff.race.playing") is False
    assert page.evaluate("getComputedStyle(document.querySelector('.light')).animationName") == "none"


def test_a_link_to_a_run_plays_nothing(recorded_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(recorded_app.url())
    page.goto(f"{recorded_app.url()}?run={next(RECORDINGS.glob('baseline-*')).stem}")
    expect(page.locator("#baseline-progress")).to_contain_text("From a link, not live", timeout=20_000)
    assert page.locator(".opening-bar").count() == 0


def test_every_visitor_finds_the_recording_to_be_replayed_and_its_files(
    recorded_app: RunningApp, open_page: OpenPage
) -> None:
    for _ in range(2):  # the second one is sent what was made for the first
        page = open_page(recorded_app.url())
        expect(page.locator("#baseline-progress")).to_contain_text("Recorded, not live", timeout=20_000)
        expect(page.locator("#baseline-recorded input")).to_have_value(re.compile("came with the app"))
        with page.expect_download() as waiting:
            page.locator("#baseline-json").click()
        assert waiting.value.suggested_filename.startswith("baseline-")
        page.locator("#baseline-headline").scroll_into_view_if_needed()
        expect(page.locator("#baseline-speed-chart .js-plotly-plot")).to_be_visible(timeout=20_000)


# The keyboard, and what is read aloud


def test_the_tab_key_reaches_the_tabs_the_question_run_and_stop_visibly(
    scripted_app: RunningApp, open_page: OpenPage
) -> None:
    page = open_page(scripted_app.url())
    page.wait_for_timeout(500)
    reached: dict[str, int] = {}
    for place in range(40):
        page.keyboard.press("Tab")
        told = page.evaluate(
            """() => { const at = document.activeElement, seen = getComputedStyle(at);
            const owner = at.closest('[id^="baseline-"]');
            return { name: at.getAttribute('role') === 'tab' ? 'tab' : owner ? owner.id : at.tagName,
              visible: seen.outlineStyle !== 'none' || seen.boxShadow !== 'none' }; }"""
        )
        if told["name"] == "BODY":  # past the last one
            break
        assert told["visible"], told
        reached.setdefault(told["name"], place)
    assert reached["tab"] < reached["baseline-prompt"] < reached["baseline-run"]
    page.locator("#baseline-run").focus()
    page.keyboard.press("Enter")
    stop = page.locator("#baseline-stop")
    expect(stop).to_be_enabled()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#baseline-stop') !== null")
    page.keyboard.press("Enter")
    expect(page.locator("#baseline-run")).to_be_enabled(timeout=20_000)


def test_streamed_text_is_not_read_aloud_piece_by_piece(scripted_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(scripted_app.url())
    page.locator("#baseline-run").click()
    page.wait_for_function("document.querySelector('#baseline-chat-quick .message.bot')?.innerText.length > 40")
    page.wait_for_timeout(500)
    spoken = page.evaluate(
        """() => [...document.querySelectorAll('#baseline-chat-quick .message.bot')].map(
          text => text.closest('[aria-live]')?.getAttribute('aria-live'))"""
    )
    assert spoken and set(spoken) == {"off"}
    expect(page.locator("#baseline-progress [role=status]")).not_to_be_empty()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#baseline-run")).to_be_enabled(timeout=20_000)


# What comes over the wire


def test_the_first_visit_is_light_and_the_second_lighter(recorded_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(recorded_app.url(), viewport={"width": 1400, "height": 900})
    page.wait_for_timeout(2000)
    page.close()
    context = page.context.browser.new_context(viewport={"width": 1400, "height": 900})  # type: ignore[union-attr]
    try:
        first, second = weigh(context, recorded_app.url()), weigh(context, recorded_app.url())
    finally:
        context.close()
    assert first["bytes"] < MOST_BYTES, first
    assert first["requests"] < MOST_REQUESTS, first
    assert not first["plotting"], "the plotting library comes with the first chart that is looked at"
    assert second["bytes"] < MOST_BYTES_AGAIN, second


def weigh(context: Any, url: str) -> dict[str, Any]:
    """Bytes over the wire, requests, and whether the plotting library came, in the first seconds."""
    page = context.new_page()
    devtools = context.new_cdp_session(page)
    devtools.send("Network.enable")
    sent: list[float] = []
    addresses: list[str] = []
    devtools.on("Network.loadingFinished", lambda event: sent.append(event["encodedDataLength"]))
    devtools.on("Network.responseReceived", lambda event: addresses.append(event["response"]["url"]))
    page.goto(url)
    expect(page.locator("#baseline-headline .headline")).to_be_visible(timeout=20_000)
    page.wait_for_timeout(1500)
    page.close()
    return {
        "bytes": sum(sent),
        "requests": len(addresses),
        "plotting": [address for address in addresses if "Plotly" in address],
    }


def test_charts_come_when_they_are_scrolled_to(recorded_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(recorded_app.url(), viewport={"width": 1400, "height": 700})
    expect(page.locator("#baseline-headline .headline")).to_have_count(1, timeout=20_000)
    assert page.locator("#baseline-speed-chart .js-plotly-plot").count() == 0
    page.locator("#baseline-table").scroll_into_view_if_needed()
    expect(page.locator("#baseline-speed-chart .js-plotly-plot")).to_be_visible(timeout=20_000)


def test_the_recorded_race_is_one_small_file_that_is_kept(recorded_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(recorded_app.url())
    answer = page.request.get(f"{recorded_app.url()}opening.json")
    assert "max-age" in answer.headers["cache-control"]
    assert answer.headers["content-encoding"] in ("gzip", "br")
    assert set(answer.json()["rounds"][0]) == set(STAND_INS.values())


def test_an_empty_page_says_what_will_be_there(scripted_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(scripted_app.url())
    expect(page.locator("#baseline-chat-quick")).to_contain_text("answer will stream here")
    assert page.locator(".opening-bar").count() == 0
    assert page.request.get(f"{scripted_app.url()}opening.json").json() is None
