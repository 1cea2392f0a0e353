"""The page over servers that a visitor names: models, a run, and a key that nobody else ever sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from experiments.result import ExperimentResult
from tests.browser.conftest import picture
from tests.browser.test_baseline_tab import download
from tests.running_app import RunningApp
from tests.scripted_server import scripted_server

pytestmark = pytest.mark.browser
KEY, WRONG = "sk-a/very+secret=key", "sk-another-secret-key"
OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """One that is open to everybody, and one that wants a key and repeats it in its answers."""
    repeating = {"key": KEY, "fault": "key in the answer", "fault_after_tokens": 6}
    with (
        scripted_server(models=["small", "large"], usage="final") as first,
        scripted_server(**repeating) as second,
    ):
        yield first, second


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def url_app(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[RunningApp]:
    empty = tmp_path_factory.mktemp("recordings")
    with RunningApp("--host", "url", "--recordings", str(empty), cache=cache) as app:
        app.url()
        yield app


def name_server(page: Page, place: int, url: str, key: str = "") -> None:
    page.locator(f"#servers-url-{place} input, #servers-url-{place} textarea").fill(url)
    page.locator(f"#servers-key-{place} input").fill(key)


def look_for_models(page: Page, place: int, words: str) -> None:
    page.locator(f"#servers-look-{place}").click()
    expect(page.locator(f"#servers-said-{place}")).to_contain_text(words, timeout=10_000)


def test_a_visitor_names_two_servers_runs_and_the_key_is_nowhere(
    url_app: RunningApp, cache: Path, servers: tuple[str, str], open_page: OpenPage, tmp_path: Path
) -> None:
    first, second = servers
    page, other = open_page(url_app.url()), open_page(url_app.url())
    expect(page.locator(".masthead")).to_contain_text("not known: somebody else's servers")
    name_server(page, 1, f"{first}/v1")
    look_for_models(page, 1, "2 models.")
    page.locator("#servers-model-1 input").click()
    page.get_by_role("option", name="large").click()
    name_server(page, 2, second, WRONG)
    look_for_models(page, 2, "does not take this key (HTTP 401)")
    assert WRONG not in page.content()
    name_server(page, 2, second, KEY)
    look_for_models(page, 2, "1 model.")
    expect(page.locator("#servers-model-2 input")).to_have_value("scripted")
    picture(page, "url-servers")

    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#baseline-headline .headline")).to_contain_text("decodes", timeout=40_000)
    expect(page.locator("#baseline-table")).to_contain_text("Somebody else's servers, measured from here as they are")
    expect(page.locator("#baseline-chat-server-2")).to_contain_text("[key]")
    picture(page, "url-result")
    path = download(page, "json", tmp_path)
    result = ExperimentResult.from_json(path.read_text(encoding="utf-8"))
    assert (result.host, result.model) == ("url", "large / scripted")
    assert [len(result.measured(name)) for name in ("server-1", "server-2")] == [3, 3]
    assert not result.failures("server-1") and not result.failures("server-2")
    assert [row.config["url"] for row in result.engines] == [first, second]

    page.reload()
    expect(page.locator("#servers-key-2 input")).to_have_value("")
    expect(page.locator("#servers-key-2 input")).to_have_attribute("type", "password")
    files = [file.read_text(encoding="utf-8", errors="replace") for file in cache.rglob("*.json*")]
    assert any(result.id in text for text in files)
    for told in (path.read_text(encoding="utf-8"), page.content(), other.content(), url_app.log, *files):
        assert KEY not in told and WRONG not in told
    assert first not in other.content() and second not in other.content()


def test_what_cannot_be_is_said_where_it_was_typed(url_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(url_app.url())
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#baseline-progress")).to_contain_text("Type the address of at least one server")
    name_server(page, 1, "http://me:secret@gpu-box")
    look_for_models(page, 1, "must not hold a user and a password")
    name_server(page, 1, "http://127.0.0.1:1")
    look_for_models(page, 1, "nothing answers at port 1")
    expect(page.locator("#servers-url-1 input, #servers-url-1 textarea")).to_have_value("http://127.0.0.1:1")
