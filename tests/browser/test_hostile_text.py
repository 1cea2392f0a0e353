"""Hostile text in a real browser: whatever an engine writes or a file holds, it stays words in their place."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from demo_model.bundled import default_model
from experiments.library import RECORDINGS
from experiments.report import figures_html
from experiments.result import ExperimentResult
from tests.browser.conftest import picture
from tests.browser.hostile_app import NAME, markup
from tests.browser.test_baseline_tab import set_number
from tests.running_app import RunningApp

pytestmark = pytest.mark.browser
OpenHostile = Callable[[str], Page]


class Canary:
    """A server on another port, which is another host to a browser. `asked`: what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()

            do_POST = do_GET

            def log_message(self, *words: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    canary = Canary()
    yield canary
    canary.server.shutdown()
    canary.server.server_close()


@pytest.fixture(scope="module")
def hostile_app(canary: Canary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    model = tmp_path_factory.mktemp("model")
    shutil.copytree(default_model(), model, dirs_exist_ok=True)
    (model / "bakeoff.json").write_text(json.dumps({"name": NAME, "note": f"{NAME} {markup(canary.url)}"}))
    arguments = (canary.url, "--scripted", "--model", str(model), "--recordings", str(tmp_path_factory.mktemp("none")))
    program = ("-m", "tests.browser.hostile_app")
    with RunningApp(*arguments, cache=tmp_path_factory.mktemp("cache"), program=program) as app:
        app.url()
        app.wait_for_log(": ready", count=3, seconds=60)
        yield app


@contextmanager
def watched(browser: Browser, canary: Canary) -> Iterator[tuple[Page, list[str]]]:
    """A page of which everything that text must not do is written down."""
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 1400, "height": 1200})
    page = context.new_page()
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("popup", lambda popup: problems.append(f"popup: {popup.url}"))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    before = len(canary.asked)
    yield page, problems
    assert page.evaluate("window.pwned") is None
    assert canary.asked[before:] == []
    assert problems == []
    context.close()


def elements(page: Page, where: str, what: str) -> int:
    return int(page.locator(f"{where} :is({what})").count())


def test_what_engines_write_is_shown_as_words_and_does_nothing(
    hostile_app: RunningApp, browser: Browser, canary: Canary
) -> None:
    with watched(browser, canary) as (page, _):
        page.goto(hostile_app.url())
        page.locator("#baseline-settings").get_by_role("button", name="Settings").click()
        set_number(page, "Repeats", "1")
        set_number(page, "Warm-ups", "0")
        set_number(page, "Answer length", "88")
        page.get_by_label("Race").check()
        page.get_by_label("Your question").fill(f"{NAME} ![q]({canary.url}/question.png) <img src=x onerror=pwned=1>")

        page.locator("button#baseline-run").click()
        expect(page.locator("#baseline-headline .headline")).to_contain_text("tok/s", timeout=40_000)

        for lane in ("slow", "bursty"):
            chat = f"#baseline-chat-{lane}"
            expect(page.locator(f"{chat} .message.bot")).to_contain_text("After.")
            for made in (
                "img",
                "script",
                "iframe",
                "form",
                "input",
                "video",
                "object",
                "style:not(svg style)",
                "[style*=fixed]",
            ):
                assert elements(page, f"{chat} .message", made) == 0, made
            links = page.locator(f"{chat} .message a").evaluate_all(
                "all => all.map(a => [a.getAttribute('href'), a.rel])"
            )
            assert ["https://example.com/safe", "noopener noreferrer"] in links
            assert all(href is None or href.startswith(("http://", "https://")) for href, _ in links)
        for lane in ("slow", "quick", "bursty"):
            chat, box = page.locator(f"#baseline-chat-{lane}"), page.locator(f"#baseline-lane-{lane}").bounding_box()
            inside = chat.bounding_box()
            assert box and inside and inside["width"] <= box["width"] + 1
        assert elements(page, "", "#baseline-run") == 1  # an answer's id does not stand for ours
        assert page.evaluate("document.documentElement.scrollWidth") <= 1400
        assert elements(page, ".masthead", "img, script, iframe, form") == 0
        expect(page.locator(".masthead")).to_contain_text("<img src=x onerror=")
        assert elements(page, "#baseline-table", "img") == 0
        # A name that turns what follows around does so to itself alone: our own words stand as they were written.
        assert "\u202e" not in page.locator("#baseline-headline").inner_text()
        picture(page, "hostile-answers")

        page.locator("button#baseline-run").click()  # the page is still of use
        expect(page.locator("#baseline-stop")).to_be_enabled()
        page.locator("#baseline-stop").click()
        expect(page.locator("button#baseline-run")).to_be_enabled(timeout=20_000)
    assert "\x1b" not in hostile_app.log and "\u202e" not in hostile_app.log


def hostile_result(canary: Canary) -> str:
    """A recording whose every string is hostile, as its file; what is refused by itself is left whole."""
    path = next(RECORDINGS.glob("baseline-*.json"))
    value = json.loads(path.read_text())
    words = (
        f"<img src=x onerror=window.pwned=1><script>window.pwned=2</script></script></style></title>"
        f"<a href='javascript:window.pwned=3'>j</a><a href='{canary.url}/a'>h</a>\u202eturned \x1b[31m%{{x}}"
        f"<span style='position:fixed'>s</span>&lt;b&gt;"
    )
    kept = {"schema", "experiment", "started", "colour", "source", "finish_reason", "stop", "kind"}

    def poisoned(part: Any, key: str = "") -> Any:
        if isinstance(part, dict):
            return {name: poisoned(one, name) for name, one in part.items()}
        if isinstance(part, list):
            return [poisoned(one, key) for one in part]
        return words + part[:40] if isinstance(part, str) and key not in kept else part

    for engine in value["engines"]:  # names tie rows together: hostile, but the same everywhere
        engine["start_phases"] = {words + phase: seconds for phase, seconds in engine["start_phases"].items()}
    requests = value["requests"]
    poison = {name: poisoned(one, name) for name, one in value.items() if name not in ("requests", "trials")}
    for row in requests:
        row["engine"] = words + row["engine"]
        row["timeline"]["arrivals"]["text"] = [words, *row["timeline"]["arrivals"]["text"][1:]]
    for row in value["trials"]:
        row["engine"] = words + row["engine"]
    poison["settings"]["temperature"] = 0
    poison["labels"] = [words, "x" * 1_000_000, "line\n" * 10_000]
    return json.dumps({**value, **poison, "requests": requests, "id": "../../" + words})


def test_a_file_of_hostile_strings_is_shown_as_words_and_does_nothing(
    hostile_app: RunningApp, browser: Browser, canary: Canary, tmp_path: Path
) -> None:
    (tmp_path / "<img src=x onerror=pwned=1>.json").write_text(hostile_result(canary))
    with watched(browser, canary) as (page, _):
        page.goto(f"{hostile_app.url()}?run=<img src=x onerror=window.pwned=1>")
        expect(page.locator("#results-said")).to_contain_text("There is no run called", timeout=30_000)
        with page.expect_file_chooser() as choosing:
            page.get_by_role("button", name="Add a file").click()
        choosing.value.set_files(next(tmp_path.iterdir()))

        expect(page.locator("#results-said")).to_contain_text("?run=baseline-", timeout=20_000)
        chart = page.locator("#results-baseline-speed-chart .js-plotly-plot")
        expect(chart).to_be_visible(timeout=20_000)
        for place in ("#results-baseline-headline", "#results-baseline-table", "#results-said", "#results-run"):
            assert elements(page, place, "img, script, iframe, form, style") == 0, place
        assert page.locator("#results-baseline-result a[href]:not([download], .modebar-btn)").count() == 0
        assert page.locator(".js-plotly-plot svg a").count() == 0
        assert page.locator(".js-plotly-plot image").count() == 0
        assert "<img src=x" in chart.inner_text()  # its words are there, as words
        assert page.evaluate("document.documentElement.scrollWidth") <= 1400
        page.locator("#results-baseline-table summary").first.click()
        picture(page, "hostile-file")
        with page.expect_download() as csv_file:
            page.locator("#results-baseline-csv").click()
        name = csv_file.value.suggested_filename
        assert name.startswith("baseline-") and not set(name) & set("<>/\\ ")
        with page.expect_download() as html_file:
            page.locator("#results-baseline-html").click()
        html_file.value.save_as(tmp_path / "export.html")

    with watched(browser, canary) as (page, problems):
        page.goto((tmp_path / "export.html").as_uri())
        expect(page.locator(".js-plotly-plot").first).to_be_visible()
        assert page.locator("body img, svg a, h1 a, p a, body iframe").count() == 0


def test_a_colour_that_is_none_is_refused_in_words(
    hostile_app: RunningApp, browser: Browser, canary: Canary, tmp_path: Path
) -> None:
    value = json.loads(next(RECORDINGS.glob("baseline-*.json")).read_text())
    value["engines"][0]["colour"] = f"red;background:url({canary.url}/colour.png)</style><img src=x onerror=pwned=1>"
    (tmp_path / "colour.json").write_text(json.dumps(value))
    with watched(browser, canary) as (page, _):
        page.goto(hostile_app.url())
        page.get_by_role("tab", name="Results").click()
        with page.expect_file_chooser() as choosing:
            page.get_by_role("button", name="Add a file").click()
        choosing.value.set_files(tmp_path / "colour.json")
        expect(page.locator("#results-said [role=alert]")).to_contain_text("colour")
        assert elements(page, "#results-said", "img") == 0


def test_an_exported_page_of_hostile_words_needs_no_help_of_a_server(
    browser: Browser, canary: Canary, tmp_path: Path
) -> None:
    """The export is opened from a disk, where no header of ours protects it; here without any cleaning before."""
    result = ExperimentResult.from_json(next(RECORDINGS.glob("baseline-*.json")).read_text())
    words = f"</script><img src={canary.url}/x onerror=window.pwned=1><a href='javascript:pwned=1'>x</a>"
    rows = tuple(replace(row, label=words, variant=words) for row in result.engines)
    (tmp_path / "export.html").write_bytes(figures_html(replace(result, model=words, engines=rows, labels=(words,))))
    with watched(browser, canary) as (page, _):
        page.goto((tmp_path / "export.html").as_uri())
        expect(page.locator(".js-plotly-plot").first).to_be_visible()
        assert page.locator("body img, svg a, h1 a, p a, body iframe").count() == 0
