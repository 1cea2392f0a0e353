"""The other experiments, the results and replays, in a real browser over scripted engines."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import picture
from tests.browser.test_baseline_tab import set_number
from tests.running_app import RunningApp

pytestmark = pytest.mark.browser
OpenPage = Callable[..., Page]


def open_tab(page: Page, title: str, name: str) -> None:
    page.get_by_role("tab", name=title).click()
    if name:
        page.locator(f"#{name}-settings").get_by_role("button", name="Settings").click()


def set_text(page: Page, place: str, value: str) -> None:
    """Type into a field. While a fresh page still settles, Gradio may put the first value back: type again."""
    field = page.locator(f"#{place} input, #{place} textarea")
    for _ in range(5):
        field.fill(value)
        page.wait_for_timeout(500)
        if field.input_value() == value:
            return
    expect(field).to_have_value(value)


def run(page: Page, name: str) -> None:
    page.locator(f"#{name}-run").click()
    expect(page.locator(f"#{name}-headline .headline")).not_to_be_empty(timeout=120_000)
    expect(page.locator(f"#{name}-run")).to_be_enabled()


def expect_charts(page: Page, place: str, *names: str) -> None:
    """Exactly these charts are drawn."""
    for name in names:
        expect(page.locator(f"#{place}-{name}-chart .js-plotly-plot")).to_be_visible()
    expect(page.locator(f"[id^='{place}-'][id$='-chart'] .js-plotly-plot:visible")).to_have_count(len(names))


def test_speculation_runs_each_engine_without_and_with_and_marks_the_steps(
    scripted_app: RunningApp, open_page: OpenPage
) -> None:
    page = open_page(scripted_app.url())
    open_tab(page, "Speculative decoding", "speculation")
    set_number(page, "Repeats", "1")
    set_number(page, "Answer length", "24")
    page.get_by_label("A look-up in the text so far (n-gram)").check()
    set_text(page, "speculation-draft-tokens", "1, 2")

    run(page, "speculation")

    for lane in ("slow", "quick", "bursty"):
        steps = page.locator(f"#speculation-tiles-{lane} .step")
        assert {step.get_attribute("data-tokens") for step in steps.all()} >= {"1", "3"}
    table = page.locator("#speculation-table")
    expect(table).to_contain_text("Quick script, n-gram look-up, 2 tokens")
    expect(table).to_contain_text("×")
    expect_charts(page, "speculation", "speed", "acceptance", "sweep", "start")
    expect(table.locator(".same summary")).to_contain_text("agree to the end")
    picture(page, "speculation")


def test_a_setting_that_cannot_be_used_is_said_and_nothing_runs(scripted_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(scripted_app.url())
    open_tab(page, "Speculative decoding", "speculation")
    set_text(page, "speculation-draft-tokens", "one to five")
    page.locator("#speculation-run").click()
    expect(page.locator("#speculation-progress .problem-box")).to_contain_text("whole numbers with commas")
    expect(page.locator("#speculation-run")).to_be_enabled()


def test_prefix_caching_shows_the_first_token_run_by_run(scripted_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(scripted_app.url())
    open_tab(page, "Prefix caching", "prefix-caching")
    set_number(page, "Repeats", "1")

    run(page, "prefix-caching")

    expect_charts(page, "prefix-caching", "ttft", "cached", "start")
    expect(page.locator("#prefix-caching-table")).to_contain_text("2,0")  # tokens of the prompts with the prefix
    expect(page.locator("#prefix-caching-chat-quick")).to_contain_text("words in all")
    picture(page, "prefix-caching")


def test_concurrency_draws_every_request(scripted_app: RunningApp, open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(scripted_app.url())
    open_tab(page, "Concurrency", "concurrency")
    set_text(page, "concurrency-levels", "1, 4")
    set_number(page, "Answer length", "16")

    run(page, "concurrency")

    expect_charts(page, "concurrency", "throughput", "ttft", "flight", "in_flight", "start")
    expect(page.locator("#concurrency-headline")).to_contain_text("At 4 users")
    with page.expect_download() as waiting:
        page.locator("#concurrency-flight-png").click()
    waiting.value.save_as(tmp_path / "flight.png")
    assert (tmp_path / "flight.png").read_bytes()[:4] == b"\x89PNG"
    picture(page, "concurrency")


def test_a_run_is_replayed_and_labelled_as_a_recording(scripted_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(scripted_app.url())
    page.locator("#baseline-settings").get_by_role("button", name="Settings").click()
    set_number(page, "Repeats", "1")
    set_number(page, "Answer length", "64")
    page.locator("#baseline-run").click()
    expect(page.locator("#baseline-headline .headline")).not_to_be_empty(timeout=60_000)

    page.reload()
    page.locator("#baseline-recorded input").click()
    page.get_by_role("option").first.click()
    page.locator("#baseline-replay").click()

    expect(page.locator("#baseline-progress")).to_contain_text("Recorded, not live")
    page.wait_for_function("document.querySelector('#baseline-chat-quick .message.bot')?.innerText.length > 10")
    expect(page.locator("#baseline-progress")).to_contain_text("This was a recording", timeout=60_000)
    expect(page.locator("#baseline-headline .headline")).to_contain_text("tok/s")


def test_results_are_opened_shared_by_a_link_added_deleted_and_packed(
    scripted_app: RunningApp, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(scripted_app.url())
    page.locator("#baseline-settings").get_by_role("button", name="Settings").click()
    set_number(page, "Repeats", "1")
    page.locator("#baseline-run").click()
    expect(page.locator("#baseline-headline .headline")).not_to_be_empty(timeout=60_000)
    with page.expect_download() as waiting:
        page.locator("#baseline-json").click()
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)

    page.get_by_role("tab", name="Results", exact=True).click()
    page.locator("#results-run input").click()
    page.get_by_role("option").first.click()
    page.locator("#results-open").click()
    expect(page.locator("#results-said")).to_contain_text(f"?run={file.stem}")
    expect(page.locator("#results-baseline-headline .headline")).to_contain_text("tok/s", timeout=20_000)
    expect_charts(page, "results-baseline", "speed", "start")
    picture(page, "results")

    theirs = json.loads(file.read_text())
    theirs["id"] = "from-somebody-else"
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    with page.expect_file_chooser() as choosing:
        page.get_by_role("button", name="Add a file").click()
    choosing.value.set_files(tmp_path / "theirs.json")
    expect(page.locator("#results-said")).to_contain_text("?run=from-somebody-else")

    with page.expect_download() as packed:
        page.get_by_role("link", name="All runs as a zip").click()
    packed.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as bundle:
        assert {"from-somebody-else.json", file.name} <= set(bundle.namelist())

    page.locator("#results-delete").click()
    expect(page.locator("#results-said")).to_contain_text("Deleted from-somebody-else")
    page.goto(f"{scripted_app.url()}?run=from-somebody-else")
    expect(page.locator("#results-said")).to_contain_text(re.compile("There is no run called"))


def test_a_link_shows_what_the_author_of_the_run_saw(scripted_app: RunningApp, open_page: OpenPage) -> None:
    author = open_page(scripted_app.url())
    open_tab(author, "Speculative decoding", "speculation")
    set_text(author, "speculation-prompt", "One question.\nAnother one.")
    author.get_by_label("A look-up in the text so far (n-gram)").check()
    set_text(author, "speculation-draft-tokens", "2")
    author.get_by_role("checkbox", name="Bursty").uncheck()
    set_number(author, "Repeats", "1")
    set_number(author, "Answer length", "24")
    author.locator("#speculation-run").click()
    expect(author.locator("#speculation-headline .headline")).not_to_be_empty(timeout=60_000)
    run = author.locator("#speculation-run-id textarea").input_value()

    page = open_page(scripted_app.url())
    page.goto(f"{scripted_app.url()}?run={run}")

    expect(page.locator("#speculation-progress")).to_contain_text("From a link, not live", timeout=20_000)
    for place in ("headline", "table"):
        theirs = author.locator(f"#speculation-{place}").inner_text()
        assert theirs
        expect(page.locator(f"#speculation-{place}")).to_have_text(theirs, use_inner_text=True)
    picture(page, "from-a-link")
    for lane in ("quick", "slow"):
        theirs, ours = (one.locator(f"#speculation-chat-{lane} .message").all_inner_texts() for one in (author, page))
        assert ours == theirs != []
    assert page.locator("#speculation-chat-bursty .message").count() == 0  # it was not asked
    expect_charts(page, "speculation", "speed", "acceptance", "start")
    assert page.locator("#speculation-prompt textarea").input_value() == "One question.\nAnother one."
    page.locator("#speculation-settings").get_by_role("button", name="Settings").click()
    assert page.locator("#speculation-draft-tokens input").input_value() == "2"
    assert not page.get_by_role("checkbox", name="Bursty").is_checked()
    assert run in page.locator("#speculation-run-id textarea").input_value()

    page.get_by_role("tab", name="Baseline").click()  # the other tabs are as ever
    expect(page.locator("#baseline-run")).to_be_enabled()
    page.get_by_role("tab", name="Speculative decoding").click()
    expect(page.locator("#speculation-headline .headline")).to_be_visible()
