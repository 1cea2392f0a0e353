"""A real browser, Debian's Chromium or any installed Chrome, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.running_app import RunningApp

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PICTURES = os.environ.get("BAKEOFF_PICTURES")  # a folder: tests leave their screenshots there


@pytest.fixture(scope="module")  # no longer: its event loop runs in this thread, and other tests need one of their own
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.fail("The browser tests need Chromium: `apt-get install chromium`.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address; the test fails on an error in the console or a request to another host."""
    problems: list[str] = []
    contexts = []

    def open_page(url: str, **settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **settings})
        contexts.append(context)
        page = context.new_page()
        own = (url, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else problems.append(request.url))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        page.get_by_role("button", name="Run", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def scripted_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    empty = tmp_path_factory.mktemp("recordings")  # a recording on the page would pass for a run's result
    with RunningApp("--scripted", "--recordings", str(empty), cache=tmp_path_factory.mktemp("cache")) as app:
        app.url()
        app.wait_for_log(": ready", count=3)
        yield app


def picture(page: Page, name: str) -> None:
    """A screenshot for people to look at, where BAKEOFF_PICTURES asks for it."""
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)
