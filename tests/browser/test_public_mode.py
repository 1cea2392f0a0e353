"""Public mode in a real browser: several visitors in one line, limits, an owner, and nothing beside the page."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from experiments.library import RECORDINGS
from tests.browser.conftest import picture
from tests.browser.test_baseline_tab import set_number
from tests.running_app import RunningApp

pytestmark = pytest.mark.browser
OpenPage = Callable[..., Page]
TOKEN = "a token that nobody guesses"
STRAIGHT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def public_app(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Behind a proxy, as on a host of strangers: the tests' own header says who somebody is."""
    variables = {
        "BAKEOFF_ADMIN_TOKEN": TOKEN,
        "BAKEOFF_PUBLIC_BEHIND_PROXY": "1",
        "BAKEOFF_PUBLIC_RUNS_PER_HOUR": "2",
        "BAKEOFF_PUBLIC_LINE": "3",
    }
    empty = tmp_path_factory.mktemp("recordings")
    with RunningApp("--scripted", "--public", "--recordings", str(empty), cache=cache, variables=variables) as app:
        app.url()
        app.wait_for_log(": ready", count=3, seconds=60)
        yield app


def visitor(open_page: OpenPage, app: RunningApp, address: str, repeats: int = 1) -> Page:
    page = open_page(app.url(), extra_http_headers={"X-Forwarded-For": f"8.8.8.8, {address}"})
    page.locator("#baseline-settings").get_by_role("button", name="Settings").click()
    set_number(page, "Repeats", str(repeats))
    set_number(page, "Warm-ups", "0")
    set_number(page, "Answer length", "128")
    return page


def run(page: Page) -> None:
    page.locator("#baseline-run").click()


def stop(page: Page) -> None:
    page.locator("#baseline-stop").click()
    expect(page.locator("#baseline-run")).to_be_enabled(timeout=20_000)


def test_visitors_wait_in_one_line_whose_places_move_and_the_owner_may_go_first(
    public_app: RunningApp, open_page: OpenPage
) -> None:
    first = visitor(open_page, public_app, "203.0.114.1", repeats=20)
    second = visitor(open_page, public_app, "203.0.114.2")
    third = visitor(open_page, public_app, "203.0.114.3")
    told = [page.locator("#baseline-progress") for page in (first, second, third)]
    expect(first.locator("#public-notice")).to_contain_text("open to everybody")

    run(first)
    expect(told[0]).to_contain_text("repeat")
    run(second)
    expect(told[1]).to_contain_text("yours is next in line")
    run(third)
    expect(told[2]).to_contain_text("You are number 2 in line")
    expect(told[2]).not_to_contain_text("minute")  # nothing was timed here yet
    picture(third, "public-line")

    same_again = visitor(open_page, public_app, "203.0.114.3")
    run(same_again)
    expect(same_again.locator("#baseline-progress")).to_contain_text("You have a run in line already")
    fourth = visitor(open_page, public_app, "203.0.114.4")
    run(fourth)
    expect(fourth.locator("#baseline-progress")).to_contain_text("The line is full")

    own(third, "skip", "wrong token")
    expect(third.locator("#owner-said")).to_contain_text("not the owner's token")
    own(third, "skip")
    expect(third.locator("#owner-said")).to_contain_text("Your run is the next one")
    expect(told[2]).to_contain_text("yours is next in line")
    expect(told[1]).to_contain_text("You are number 2 in line")

    second.context.close()  # who leaves gives the place up
    stop(first)
    expect(third.locator("#baseline-headline .headline")).to_contain_text("tok/s", timeout=30_000)


def own(page: Page, button: str, token: str = TOKEN) -> None:
    if not page.locator("#owner-token input").is_visible():
        page.locator("#owner").get_by_role("button", name="For this page's owner").click()
    page.locator("#owner-token input").fill(token)
    page.locator(f"#owner-{button}").click()


def test_runs_per_hour_end_and_the_owner_closes_counts_and_deletes(
    public_app: RunningApp, open_page: OpenPage, cache: Path
) -> None:
    page = visitor(open_page, public_app, "203.0.114.9")
    for _ in range(2):
        run(page)
        expect(page.locator("#baseline-stop")).to_be_enabled()
        stop(page)
    run(page)
    expect(page.locator("#baseline-progress [role=alert]")).to_contain_text("You have used 2 of 2 runs per hour")
    expect(page.locator("#baseline-progress")).to_contain_text("from now")

    own(page, "close")
    expect(page.locator("#owner-said")).to_contain_text("closed for today")
    other = visitor(open_page, public_app, "203.0.114.10")
    run(other)
    expect(other.locator("#baseline-progress [role=alert]")).to_contain_text("Runs are closed for today")
    own(page, "open")
    expect(page.locator("#owner-said")).to_contain_text("open again")
    own(page, "today")
    expect(page.locator("#owner-said")).to_contain_text("runs")
    expect(page.locator("#owner-said")).to_contain_text("visitors")

    file = cache / "results" / "baseline-20261124-000000-ffffff.json"
    file.write_text(next(RECORDINGS.glob("baseline-*.json")).read_text())
    page.locator("#owner-run input, #owner-run textarea").fill(file.stem)
    own(page, "delete", "not the token, certainly")
    expect(page.locator("#owner-said")).to_contain_text("not the owner's token")
    assert file.is_file()
    own(page, "delete")
    expect(page.locator("#owner-said")).to_contain_text("Deleted")
    assert not file.is_file()
    page.get_by_role("tab", name="Results").click()
    expect(page.locator("#results-upload")).to_be_visible()
    assert page.locator("#results-delete").count() == 0 or not page.locator("#results-delete").is_visible()
    assert TOKEN not in public_app.log


def test_a_stranger_with_the_link_alone_has_a_finished_comparison_and_a_plot_in_two_minutes(
    public_app: RunningApp, open_page: OpenPage, tmp_path: Path
) -> None:
    """No setting is touched: the one coloured button, then the chart's own download."""
    began = time.monotonic()
    page = open_page(public_app.url(), extra_http_headers={"X-Forwarded-For": "8.8.8.8, 9.9.9.9"})
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#baseline-headline .headline")).to_contain_text("tok/s", timeout=110_000)
    expect(page.locator("#baseline-speed-chart .js-plotly-plot")).to_be_visible()
    with page.expect_download() as waiting:
        page.locator("#baseline-speed-png").click()
    waiting.value.save_as(tmp_path / "plot.png")
    took = time.monotonic() - began
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert took < 120, took


def test_an_upload_is_its_visitors_own(
    public_app: RunningApp, open_page: OpenPage, tmp_path: Path, cache: Path
) -> None:
    value = json.loads(next(RECORDINGS.glob("baseline-*.json")).read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**value, "model": "only-mine"}))
    mine, yours = (visitor(open_page, public_app, f"203.0.114.2{n}") for n in (1, 2))
    mine.get_by_role("tab", name="Results").click()
    with mine.expect_file_chooser() as choosing:
        mine.get_by_role("button", name="Add a file").click()
    choosing.value.set_files(tmp_path / "mine.json")
    expect(mine.locator("#results-said")).to_contain_text("Only you see this file", timeout=20_000)
    for page, count in ((mine, 1), (yours, 0)):
        page.get_by_role("tab", name="Results").click()
        page.locator("#results-run input").click()
        expect(page.get_by_role("option", name=re.compile("only-mine"))).to_have_count(count)
    assert not any("only-mine" in file.read_text() for file in cache.glob("results/*.json"))


def ask(app: RunningApp, path: str, body: Any = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(app.url() + path, data, {"Content-Type": "application/json"})
    try:
        with STRAIGHT.open(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def test_nothing_is_offered_beside_the_page(public_app: RunningApp, cache: Path) -> None:
    status, info = ask(public_app, "gradio_api/info")
    assert status == 200 and json.loads(info) == {"named_endpoints": {}, "unnamed_endpoints": {}}
    _, page = ask(public_app, "config")
    config = json.loads(page)
    for name in {one["api_name"] for one in config["dependencies"] if one["api_name"]}:
        status, _ = ask(public_app, f"gradio_api/call/{name}", {"data": []})
        assert status >= 400, name
    (cache / "results").mkdir(exist_ok=True)
    (cache / "results" / "secret.json").write_text("{}")
    paths = ["/etc/passwd", "app.py", "ui/../app.py", "%2e%2e/%2e%2e/etc/passwd", str(cache / "visitor-key")]
    paths += [
        str(cache / "visits.jsonl"),
        str(cache / "results" / "secret.json"),
        "/proc/self/environ",
        "file:///etc/passwd",
    ]
    for path in paths:
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
            status, body = ask(public_app, route + path)
            assert status >= 400, (route, path)
            assert TOKEN not in body
    (cache / "results" / "secret.json").unlink()


def test_a_files_path_that_a_client_makes_up_is_not_read(public_app: RunningApp) -> None:
    """The page's own events can be sent by anybody: an upload that names a file of this machine, or one elsewhere."""
    config = json.loads(ask(public_app, "config")[1])
    button = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "results-upload")
    (event,) = [one for one in config["dependencies"] if [button, "upload"] in [list(t) for t in one["targets"]]]
    for path in ("/etc/passwd", str(Path(__file__)), "http://127.0.0.1:1/x.json"):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}, "url": path}, "All experiments"]
        body = {"data": data, "fn_index": event["id"], "session_hash": "made-up"}
        status, answer = ask(public_app, "gradio_api/queue/join", body)
        if status == 200:
            _, answer = ask(public_app, "gradio_api/queue/data?session_hash=made-up")
            finished = [line for line in answer.splitlines() if "process_completed" in line]
            assert finished and '"success":false' in finished[-1].replace(" ", ""), answer[:500]
        assert "root:" not in answer and "pytestmark" not in answer
