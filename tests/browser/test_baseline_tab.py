"""The page as its visitors use it, with scripted engines behind it."""

from __future__ import annotations

import csv
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from playwright.sync_api import Page, expect

from experiments.result import ExperimentResult
from tests.browser.conftest import picture
from tests.running_app import RunningApp

pytestmark = pytest.mark.browser
LANES = ("slow", "quick", "bursty")
OpenPage = Callable[..., Page]


def run(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()


def set_number(page: Page, label: str, value: str) -> None:
    """Type into a slider's field. While a fresh page still settles, Gradio may put the first value back: type again."""
    field, slider = (page.get_by_label(f"{kind} for {label}") for kind in ("number input", "range slider"))
    for _ in range(5):
        field.fill(value)
        field.press("Tab")
        page.wait_for_timeout(500)
        if slider.input_value() == value:
            return
    expect(slider).to_have_value(value)


def answer(page: Page, lane: str) -> str:
    """The engine's last message in its chatbot."""
    bubbles = page.locator(f"#baseline-chat-{lane} .message.bot")
    return bubbles.last.inner_text() if bubbles.count() else ""


def test_the_page_says_where_the_engines_run_and_what_the_model_knows(
    scripted_app: RunningApp, open_page: OpenPage
) -> None:
    page = open_page(scripted_app.url())

    head = page.locator(".masthead")
    expect(head).to_contain_text("this machine")
    expect(head).to_contain_text("inference-explainer-15M")
    expect(head).to_contain_text("cores")
    expect(head).to_contain_text("knows nothing else")


def test_nothing_can_be_downloaded_before_there_is_a_result(scripted_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(scripted_app.url())

    for form in ("html", "json", "csv"):
        expect(page.locator(f"#baseline-{form}")).to_be_disabled()
    for form in ("png", "svg"):
        expect(page.locator(f"#baseline-speed-{form}")).to_be_hidden()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled()


def test_a_run_streams_three_answers_and_every_download_parses(
    scripted_app: RunningApp, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(scripted_app.url())

    run(page)

    for lane in LANES:  # text is there while the lane's whole answer is not yet
        page.wait_for_function(f"document.querySelector('#baseline-chat-{lane} .message.bot')?.innerText.length > 10")
        assert len(answer(page, lane).split()) < 256
        expect(page.locator(f"#baseline-tiles-{lane} .tiles-note")).to_contain_text("of")
    expect(page.locator(".headline")).to_contain_text("tok/s", timeout=60_000)
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()
    for lane in LANES:
        assert len(answer(page, lane).split()) == 256
        for tile in page.locator(f"#baseline-tiles-{lane} .tile .value").all_inner_texts():
            assert re.fullmatch(r"[\d.,]+", tile.strip()), tile
    expect(page.locator("#baseline-speed-chart .js-plotly-plot")).to_be_visible()
    picture(page, "scripted-run")
    check_downloads(page, tmp_path, engines=3, requests=15)


def check_downloads(page: Page, folder: Path, engines: int, requests: int) -> None:
    files = {form: download(page, f"speed-{form}", folder) for form in ("png", "svg")}
    drawn = download(page, "speed-csv", folder)
    files |= {form: download(page, form, folder) for form in ("html", "json", "csv")}
    result = ExperimentResult.from_json(files["json"].read_text())
    assert {path.stem for path in files.values()} == {result.id, f"{result.id}-speed"}
    assert len(result.engines) == engines
    assert len(result.requests) == requests
    assert all(engine.command and engine.version for engine in result.engines)
    assert json.loads(files["json"].read_text())["hardware"]["cores"]
    rows = list(csv.DictReader(files["csv"].open()))
    assert [row["output_tokens"] for row in rows] == [str(row.metrics.output_tokens) for row in result.requests]
    assert all(row.metrics.output_tokens and row.timeline.finish_reason for row in result.requests)
    points = list(csv.DictReader(drawn.open()))
    assert drawn.stem == f"{result.id}-speed"
    assert {engine.label for engine in result.engines} <= {point["series"] for point in points}
    image = files["png"].read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24])[0] == 2400  # 1,200 points, twice as many pixels
    drawing = ElementTree.parse(files["svg"]).getroot()
    words = " ".join(text for text in drawing.itertext() if text.strip())
    assert all(engine.label in words for engine in result.engines)
    assert result.started[:10] in words, "the picture itself says when it was measured"
    page_alone = files["html"].read_text()
    assert "Plotly.newPlot" in page_alone
    assert not re.search(r"<script[^>]+src=", page_alone), "the page must not need a network"


def download(page: Page, form: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"#baseline-{form}").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    assert path.suffix == f".{form.rpartition('-')[2]}"
    return path


def test_stop_ends_the_run_and_keeps_what_was_measured(scripted_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(scripted_app.url())
    page.locator("#baseline-settings").get_by_role("button", name="Settings").click()
    set_number(page, "Repeats", "20")
    run(page)
    expect(page.locator("#baseline-tiles-quick .tiles-note")).to_contain_text("Repeat 3 of 20", timeout=60_000)

    page.get_by_role("button", name="Stop", exact=True).click()

    expect(page.locator(".notes")).to_contain_text("Stopped early")
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()


def test_an_empty_question_is_told_where_it_was_asked_and_nothing_is_lost(
    scripted_app: RunningApp, open_page: OpenPage
) -> None:
    page = open_page(scripted_app.url())
    page.get_by_label("Your question").fill("   ")

    run(page)

    expect(page.get_by_role("alert")).to_contain_text("Type a prompt first")
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()


def test_a_second_visitor_waits_for_the_first_and_is_told_so(scripted_app: RunningApp, open_page: OpenPage) -> None:
    first, second = open_page(scripted_app.url()), open_page(scripted_app.url())
    run(first)
    expect(first.locator("#baseline-progress")).to_contain_text("warm-up")

    run(second)

    expect(second.locator("#baseline-progress")).to_contain_text("yours is next in line")
    expect(first.locator(".headline")).to_contain_text("tok/s", timeout=60_000)
    expect(second.locator(".headline")).to_contain_text("tok/s", timeout=60_000)


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_window_in_light_and_dark(
    scripted_app: RunningApp, open_page: OpenPage, width: int, colours: str
) -> None:
    page = open_page(scripted_app.url(), viewport={"width": width, "height": 900}, color_scheme=colours)
    page.wait_for_timeout(500)

    picture(page, f"empty-{colours}-{width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for lane in LANES:
        box = page.locator(f"#baseline-lane-{lane}").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
    text, ground = (
        page.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in ((".lane-head .title", "color"), ("body", "backgroundColor"))
    )
    assert (brightness(text) > brightness(ground)) == (colours == "dark")


def brightness(colour: str) -> float:
    """0 for black to 255 for white, of "rgb(r, g, b)"."""
    return sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3]) / 3


def test_closing_the_page_in_mid_run_stops_the_run(scripted_app: RunningApp, open_page: OpenPage) -> None:
    first = open_page(scripted_app.url())
    run(first)
    expect(first.locator("#baseline-progress")).to_contain_text("warm-up")

    first.context.close()

    second = open_page(scripted_app.url())
    run(second)  # had the first run gone on, this one would wait for it for about 40 s
    expect(second.locator("#baseline-progress")).to_contain_text("warm-up", timeout=8_000)
