from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from experiments.library import RECORDINGS
from experiments.report import headline
from ui import sharing
from ui.sharing import ABOUT, Previews, SocialTags

PAGE = (
    '<html><head><title>x</title><meta property="og:title" content="Gradio" />'
    '<meta name="twitter:card" content="y" /></head><body>é</body></html>'
)


@pytest.fixture
def previews(tmp_path: Path) -> Previews:
    return Previews(tmp_path)


@pytest.fixture
def client(previews: Previews) -> TestClient:
    routes = [
        Route("/", lambda request: HTMLResponse(PAGE)),
        Route("/other", lambda request: HTMLResponse(PAGE)),
        Route("/text", lambda request: PlainTextResponse("</head>")),
        previews.route(),
    ]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(SocialTags, previews=previews)]))


def tags(page: str) -> dict[str, str]:
    found = re.findall(r'<meta property="([^"]+)" content="([^"]*)"', page)
    assert len({name for name, _ in found}) == len(found), "a tag came twice"
    return {name: unescape(value) for name, value in found}


def test_the_page_says_what_it_is_in_place_of_gradio_s_words(client: TestClient) -> None:
    answer = client.get("/")

    found = tags(answer.text)
    assert found["og:title"] == "LLM Inference Bake-Off" and found["og:description"] == ABOUT
    assert found["og:image"] == "http://testserver/preview.png"
    assert "Gradio" not in answer.text and answer.text.endswith("<body>é</body></html>")
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_a_link_to_a_run_carries_its_sentence_and_its_picture(client: TestClient, previews: Previews) -> None:
    run = previews.library.entries("baseline")[0].id

    found = tags(client.get(f"/?run={run}").text)

    assert found["og:description"] == headline(previews.library.load(run))
    assert found["og:image"] == f"http://testserver/preview.png?run={run}"
    assert client.get(found["og:image"]).content[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("run", ["../../etc/passwd", "<script>", "nothing-like-it", "%00"])
def test_a_link_to_no_run_is_a_link_to_the_page(client: TestClient, run: str) -> None:
    page = client.get("/", params={"run": run}).text

    assert tags(page)["og:image"] == "http://testserver/preview.png" and "<script>" not in page
    assert client.get("/preview.png", params={"run": run}).status_code == 404


def test_behind_a_proxy_the_address_is_the_one_that_visitors_see(client: TestClient) -> None:
    seen = {"x-forwarded-proto": "https", "x-forwarded-host": 'demo.example"><script>'}

    page = client.get("/", headers=seen).text

    assert tags(page)["og:url"] == 'https://demo.example"><script>/' and "<script>" not in page


def test_other_answers_stay_as_they_are(client: TestClient) -> None:
    assert client.get("/other").text == PAGE
    assert client.get("/text").text == "</head>"


def test_a_picture_is_drawn_once(previews: Previews, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = sharing.preview_png
    monkeypatch.setattr(sharing, "preview_png", lambda result: drawn.append(result.id) or draw(result))
    run = previews.library.entries("baseline")[0].id

    assert previews.of(run) == previews.of(run)
    assert drawn == [run]


def test_only_so_many_pictures_are_kept(previews: Previews, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "KEPT", 2)
    for entry in previews.library.entries()[:3]:
        previews.of(entry.id)

    assert len(previews._made) == 2


def test_without_any_recording_the_page_has_no_picture(tmp_path: Path) -> None:
    previews = Previews(tmp_path, tmp_path / "none")
    page = Starlette(routes=[previews.route()])

    assert TestClient(page).get("/preview.png").status_code == 404
    assert RECORDINGS.is_dir()
