"""What is sent to many visitors and made once."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from ui.frames import DOCUMENTS_KEPT, KeptDocument, settle
from ui.policy import ContentPolicy


class Counting:
    """A page that says how often it was made, and under which address."""

    def __init__(self) -> None:
        self.made = 0
        self.status = 200

    def answer(self, request: Request) -> Response:
        self.made += 1
        return HTMLResponse(f"{self.made} for {request.url.hostname}", self.status)


@pytest.fixture
def page() -> Counting:
    return Counting()


@pytest.fixture
def client(page: Counting) -> TestClient:
    routes = [
        Route("/", page.answer, methods=["GET", "POST"]),
        Route("/other", lambda request: PlainTextResponse("other")),
    ]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(ContentPolicy), Middleware(KeptDocument)]))


def test_the_document_is_made_once_for_all_who_see_it_under_one_address(client: TestClient, page: Counting) -> None:
    answers = [client.get("/", params={"run": run}) for run in ("", "a", "b")]
    assert [answer.text for answer in answers] == ["1 for testserver"] * 3
    assert page.made == 1
    for answer in answers:  # what stands around it writes its headers once each
        assert len(answer.headers.get_list("content-security-policy")) == 1
    assert client.get("/", headers={"host": "elsewhere"}).text == "2 for elsewhere"
    assert client.get("/").text == "1 for testserver"
    assert client.get("/other").text == "other"


def test_what_gradio_reads_in_the_address_and_what_is_no_question_is_passed_on(
    client: TestClient, page: Counting
) -> None:
    client.get("/")
    assert client.get("/", params={"deep_link": "x"}).text == "2 for testserver"
    assert client.get("/", params={"page": "x"}).text == "3 for testserver"
    assert client.post("/").text == "4 for testserver"


def test_a_failure_is_not_kept_and_neither_is_every_address_that_somebody_makes_up(
    client: TestClient, page: Counting
) -> None:
    page.status = 500
    assert client.get("/").status_code == 500
    page.status = 200
    assert client.get("/").text == "2 for testserver"
    for number in range(DOCUMENTS_KEPT):
        client.get("/", headers={"host": f"made-up-{number}"})
    assert client.get("/").text == f"{DOCUMENTS_KEPT + 3} for testserver"  # it had to make room


@pytest.fixture
def thresholds() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)
    gc.unfreeze()


def test_what_is_there_is_not_looked_through_again(thresholds: tuple[int, int, int]) -> None:
    frozen = gc.get_freeze_count()
    settle()
    assert gc.get_freeze_count() > frozen
    assert gc.get_threshold()[0] > thresholds[0]
