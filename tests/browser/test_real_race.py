"""The main job, whole: `python app.py`, three real engines on this CPU, a real browser, and an end by SIGKILL."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engines import ENGINES
from engines.hardware import this_machine
from experiments import EXPERIMENTS
from tests.browser.conftest import picture
from tests.browser.test_baseline_tab import answer, check_downloads, run
from tests.conftest import wait_until
from tests.running_app import RunningApp, alive

pytestmark = [pytest.mark.browser, pytest.mark.engines]
NAMES = tuple(engine.name for engine in ENGINES)
READY_SECONDS = 480  # the first start installs the engines


@pytest.fixture(scope="module")
def app() -> Iterator[RunningApp]:
    if this_machine().device != "cpu":
        pytest.skip("this test races the engines on a CPU; this machine has a GPU")
    with RunningApp() as app:
        yield app


def test_the_page_is_up_while_the_engines_still_start(app: RunningApp, open_page: Callable[..., Page]) -> None:
    page = open_page(app.url(seconds=60))

    lights = page.locator(".lane-head .light").evaluate_all("lights => lights.map(light => light.className)")

    assert any("installing" in light or "starting" in light for light in lights)
    elapsed = page.locator(".elapsed").last
    before = elapsed.inner_text()
    expect(elapsed).not_to_have_text(before)  # the stopwatch runs
    picture(page, "real-starting")


def test_a_recording_is_shown_before_any_engine_is_ready(app: RunningApp, open_page: Callable[..., Page]) -> None:
    page = open_page(app.url())

    for experiment in EXPERIMENTS:
        name = experiment.name
        page.get_by_role("tab", name=experiment.title).click()
        # Three engines start meanwhile on the same two cores.
        told = expect(page.locator(f"#{name}-progress"))
        told.to_contain_text("Recorded, not live: inference-explainer", timeout=60_000)
        page.locator(f"#{name}-headline").scroll_into_view_if_needed()  # which asks for the charts
        chart = page.locator(f"#{name}-{experiment.charts[0].name}-chart .main-svg").first
        expect(chart).to_be_visible(timeout=30_000)
        assert page.locator(f"#{name}-table tbody tr").count() >= len(NAMES)
        for engine in NAMES:
            assert len(page.locator(f"#{name}-chat-{engine} .message.bot").last.inner_text()) > 50
        page.wait_for_timeout(500)
        picture(page, f"recorded-{name}")


def test_three_real_engines_answer_side_by_side(
    app: RunningApp, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(app.url())
    for name in NAMES:
        page.locator(f"#baseline-head-{name} .light.ready").wait_for(timeout=READY_SECONDS * 1000)

    expect(page.locator("#baseline-progress")).to_contain_text("Recorded")  # so that what comes later is the run's own
    run(page)
    expect(page.locator("#baseline-progress")).to_contain_text("warm-up", timeout=30_000)

    for name in NAMES:  # its first words are shown while the answer is still being written
        page.wait_for_function(
            f"(() => {{ const text = document.querySelector('#baseline-chat-{name} .message.bot')?.innerText || '';"
            f"const tile = '#baseline-tiles-{name} [data-metric=output_tokens] .value';"
            "const tokens = document.querySelector(tile).innerText;"
            "return text.length > 0 && Number(tokens) > 0 && !/[.]$/.test(text.trim()); })()",
            polling=20,
            timeout=60_000,
        )
    expect(page.locator("#baseline-progress")).to_be_empty(timeout=120_000)
    expect(page.locator("#baseline-headline .headline")).to_contain_text("tok/s")
    for name in NAMES:
        assert len(answer(page, name)) > 100
        for tile in page.locator(f"#baseline-tiles-{name} .tile .value").all_inner_texts():
            assert tile.strip() not in ("", "–")
    time.sleep(1)
    picture(page, "real-race")
    check_downloads(page, tmp_path, engines=3, requests=15)


def test_killing_the_app_leaves_no_engine_behind(app: RunningApp) -> None:
    app.url()
    ours = app.tree()
    assert len(ours) >= 6  # three keepers and their servers at the least

    app.process.kill()  # SIGKILL: the app itself can do nothing any more

    wait_until(lambda: alive(ours) == [], 30)
