"""Three answers at 300 tokens per second each: bytes per token, how often the page changes, what stands still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import picture
from tests.browser.fast_app import TOKENS_PER_SECOND
from tests.browser.test_baseline_tab import LANES, OpenPage, set_number
from tests.running_app import RunningApp

pytestmark = pytest.mark.browser
TOKENS = 1024  # per answer, the most that the page offers: 3.4 seconds of streaming
WATCH = """() => {
  const seen = window.watched = { frames: [], grown: { slow: [], quick: [], bursty: [] } };
  const frame = now => { seen.frames.push(now); requestAnimationFrame(frame); };
  requestAnimationFrame(frame);
  for (const name of Object.keys(seen.grown)) {
    let length = 0;
    const look = () => {
      const now = document.querySelector(`#baseline-chat-${name}`).textContent.length;
      if (now !== length) { length = now; seen.grown[name].push([performance.now(), now]); }
    };
    new MutationObserver(look).observe(document.querySelector(`#baseline-chat-${name}`),
      { childList: true, subtree: true, characterData: true });
  }
}"""


@pytest.fixture(scope="module")
def fast_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    arguments = ("--scripted", "--recordings", str(tmp_path_factory.mktemp("none")))
    program = ("-m", "tests.browser.fast_app")
    with RunningApp(*arguments, cache=tmp_path_factory.mktemp("cache"), program=program) as app:
        app.url()
        app.wait_for_log(": ready", count=3, seconds=60)
        yield app


def run_and_watch(page: Page) -> tuple[dict[str, Any], int]:
    """What the page's own script saw of the measured run, and the bytes of its stream."""
    set_number(page, "Answer length", str(TOKENS))
    set_number(page, "Repeats", "1")
    set_number(page, "Warm-ups", "0")
    page.get_by_label("Race").check()
    streams: set[str] = set()
    wire = {"bytes": 0}
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")

    def answered(told: dict[str, Any]) -> None:
        if "/queue/data" in told["response"]["url"]:
            streams.add(told["requestId"])

    def received(told: dict[str, Any]) -> None:
        if told["requestId"] in streams:
            wire["bytes"] += told["dataLength"]

    session.on("Network.responseReceived", answered)
    session.on("Network.dataReceived", received)
    page.evaluate(WATCH)
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#baseline-headline .headline")).to_contain_text("tok/s", timeout=90_000)
    return page.evaluate("window.watched"), wire["bytes"]


def test_three_streams_of_300_tokens_a_second_grow_smoothly_and_cheaply(
    fast_app: RunningApp, open_page: OpenPage, record_property: Any
) -> None:
    page = open_page(fast_app.url())
    page.locator("#baseline-settings").get_by_role("button", name="Settings").click()
    seen, wire = run_and_watch(page)
    picture(page, "smooth-streams")

    per_token = wire / (len(LANES) * TOKENS)
    told: dict[str, Any] = {"bytes per token": round(per_token, 1)}
    for name in LANES:
        moments = [at for at, _ in seen["grown"][name]]
        streaming = [at for at in moments if at <= moments[0] + 1000 * TOKENS / TOKENS_PER_SECOND]
        pauses = [after - before for before, after in zip(streaming, streaming[1:], strict=False)]
        updates = len(streaming) / ((streaming[-1] - streaming[0]) / 1000)
        told[name] = {"updates per second": round(updates, 1), "longest pause ms": round(max(pauses))}
        assert 3 <= updates <= 25, (name, updates)  # coalesced: not one per token
        assert max(pauses) < 1000, (name, max(pauses))
    first = min(moments[0][0] for moments in seen["grown"].values())
    frames = [at for at in seen["frames"] if first <= at <= first + 1000 * TOKENS / TOKENS_PER_SECOND]
    gaps = sorted(after - before for before, after in zip(frames, frames[1:], strict=False))
    told["frame gap ms p50/p99/max"] = [round(gaps[int(share * (len(gaps) - 1))]) for share in (0.5, 0.99, 1.0)]
    record_property("measured", told)
    print(told)
    assert per_token < 250, told  # a token is 5 letters; sending the text anew each time would be thousands
