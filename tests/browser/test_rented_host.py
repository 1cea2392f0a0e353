"""The page over rented machines: a rehearsal of Modal, which replays recordings and fails in Modal's own words."""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from experiments.result import ExperimentResult
from tests.browser.conftest import picture
from tests.browser.test_baseline_tab import download
from tests.browser.test_experiment_tabs import expect_charts, open_tab, set_text
from tests.conftest import wait_until
from tests.running_app import RunningApp, alive

pytestmark = pytest.mark.browser
LANES = ("transformers", "vllm", "sglang")
LABELS = {"transformers": "HF Transformers", "vllm": "vLLM", "sglang": "SGLang"}
ENGINE_PHASES = ("importing", "loading weights", "compiling", "capturing graphs", "warming up")
IDLE, QUEUED, BOOTING = "rented when you press Run", "waiting for a GPU", "starting the container"
LET_GO, LEFT = "its container is let go", "nothing left running"
RECORDED = "Press Run to measure anew"
NOTHING_MEASURED = "before anything was measured"
COST = r"[\d,]+ GPU-seconds, \$(\d+\.\d+)"
OpenPage = Callable[..., Page]
Visit = tuple[Page, list[str]]  # and what its console had to say

# From now on the page notes in `window.seen` what its lights, its cost and its bar say, each change in its order.
WATCHING = """() => {
    const seen = window.seen = {}
    const note = (place, words) => {
        const noted = seen[place] ??= []
        if (words && noted.at(-1) !== words) noted.push(words)
    }
    const text = (place) => document.querySelector(place)?.textContent ?? ""
    const look = () => {
        for (const lane of ["transformers", "vllm", "sglang"]) {
            note(lane, text(`#baseline-head-${lane} .words`))
            note(`${lane} steps`, text(`#baseline-head-${lane} .steps-done`))
        }
        note("cost", text("#baseline-progress .cost"))
        note("bar", document.querySelector("#baseline-progress .bar i")?.style.width)
    }
    look()
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true})
}"""


@pytest.fixture(scope="module")
def slow_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Slow enough that the lights, which are asked once a second, show what is going on."""
    with rehearsing("3", tmp_path_factory.mktemp("slow")) as app:
        yield app


@pytest.fixture(scope="module")
def quick_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    with rehearsing("30", tmp_path_factory.mktemp("quick")) as app:
        yield app


@pytest.fixture(scope="module")
def long_visit(quick_app: RunningApp, browser: Browser) -> Iterator[Visit]:
    """One page for everything that goes wrong, of which each must leave it usable for the next."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(quick_app.url())
    settle(page)
    open_settings(page)
    yield page, errors
    context.close()


@pytest.fixture
def same_page(long_visit: Visit) -> Iterator[Page]:
    """The page of the long visit, with its settings open; the test fails on an error in the console."""
    page, errors = long_visit
    errors.clear()
    yield page
    assert errors == []


def rehearsing(speed: str, cache: Path, *arguments: str) -> RunningApp:
    return RunningApp("--host", "rehearsal", "--rehearsal-speed", speed, *arguments, cache=cache)


def settle(page: Page) -> None:
    """Wait until the recording that every visitor finds is shown."""
    expect(page.locator("#baseline-progress")).to_contain_text(RECORDED, timeout=20_000)
    expect(page.locator("#baseline-headline .headline")).not_to_be_empty()


def open_settings(page: Page, name: str = "baseline") -> None:
    page.locator(f"#{name}-settings").get_by_role("button", name="Settings").click()


def choose_engines(page: Page, *chosen: str, name: str = "baseline") -> None:
    for lane in LANES:
        page.locator(f"#{name}-settings").get_by_label(LABELS[lane], exact=True).set_checked(lane in chosen)


def press(page: Page, what: str, name: str = "baseline") -> None:
    page.locator(f"#{name}-{what}").click()


def state(page: Page, lane: str, name: str = "baseline") -> Locator:
    return page.locator(f"#{name}-head-{lane} .words")


def expect_over(page: Page, name: str = "baseline", seconds: float = 60) -> None:
    expect(page.locator(f"#{name}-run")).to_be_enabled(timeout=seconds * 1000)
    expect(page.locator(f"#{name}-stop")).to_be_disabled()


def expect_in_order(noted: list[str], *words: str) -> None:
    """Each of `words` is in one that was noted, and none before the one before it."""
    rest = iter(noted)
    for wanted in words:
        assert any(wanted in one for one in rest), f"{wanted!r} does not follow in {noted}"


def result_of(page: Page, folder: Path) -> ExperimentResult:
    return ExperimentResult.from_json(download(page, "json", folder).read_text())


def test_the_page_says_where_the_engines_run_and_what_can_be_rented(quick_app: RunningApp, same_page: Page) -> None:
    head, settings = same_page.locator(".masthead"), same_page.locator("#baseline-settings")

    expect(head).to_contain_text("Modal (rehearsal), rented by the second")
    expect(head).to_contain_text("GPU chosen per run, one for each engine")
    for setting in ("model", "gpu", "gpu-count", "replicas", "keep-seconds", "budget", "snapshot"):
        expect(settings.locator(f"#baseline-{setting}")).to_be_visible()
    expect(settings.get_by_role("radio", name="L4", exact=True)).to_be_checked()
    expect(settings.locator("#baseline-gpu").get_by_role("radio")).to_have_count(10)
    expect(settings).not_to_contain_text("Race")  # every engine has a machine of its own
    for lane in LANES:
        expect(state(same_page, lane)).to_have_text(f"not running: {IDLE}")
    assert QUEUED not in quick_app.log


def test_a_whole_comparison_shows_every_stage_and_what_it_costs(
    slow_app: RunningApp, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(slow_app.url())
    settle(page)
    page.evaluate(WATCHING)

    press(page, "run")

    expect(state(page, "vllm")).to_contain_text(f"starting: {ENGINE_PHASES[0]}", timeout=20_000)
    picture(page, "rented-starting")
    expect(page.locator("#baseline-progress")).to_contain_text("All engines at once: ", timeout=30_000)
    picture(page, "rented-answering")
    expect_over(page)
    for lane in LANES:
        expect(state(page, lane)).to_have_text(f"not running: {LEFT}", timeout=10_000)
    seen = page.evaluate("window.seen")
    for lane in LANES:
        expect_in_order(seen[lane], IDLE, BOOTING, "answering", LEFT)
        assert any(phase in words for words in seen[lane] for phase in ENGINE_PHASES), seen[lane]
        told = [line for line in slow_app.log.splitlines() if f" {lane} on Modal (rehearsal): " in line]
        expect_in_order(told, *(f"starting: {stage}" for stage in (QUEUED, BOOTING, *ENGINE_PHASES)), "ready", LEFT)
        finished = seen[f"{lane} steps"]
        expect_in_order(finished, QUEUED, BOOTING)
        assert any(re.fullmatch(rf"{QUEUED} \d+ s · {BOOTING} \d+ s · loading our code .*", one) for one in finished)
        expect(page.locator(f"#baseline-tiles-{lane} .tiles-note")).to_have_text("Mean of 10 runs")
    running = [re.fullmatch(rf"So far {COST} of \$1\.00", words) for words in seen["cost"]]
    costs = [float(told[1]) for told in running if told]
    assert len(costs) > 5 and costs == sorted(costs) and costs[0] < costs[-1], seen["cost"]
    widths = [float(width.rstrip("%")) for width in seen["bar"]]
    assert max(widths) > 50, "the bar moves"
    assert max(widths) <= 100, "and not beyond its end"

    said = re.search(rf"This run: {COST}", page.locator("#baseline-progress").inner_text())
    assert said
    expect(page.locator("#baseline-headline")).to_contain_text("vLLM decodes")
    expect_charts(page, "baseline", "speed", "start")
    for phase in ("waiting for a GPU", "starting the container", "loading our code", "compiling"):
        expect(page.locator("#baseline-start-chart .legendtext", has_text=phase)).to_be_visible()
    table = page.locator("#baseline-table")
    for lane in LANES:
        expect(table.locator(".results")).to_contain_text(LABELS[lane])
    notes = table.locator(".notes")
    expect(notes).to_contain_text("Rehearsal: a recording of")
    expect(notes).to_contain_text(re.compile(rf"Rented: {COST.replace(', ', ', about ')}"))
    expect(notes).to_contain_text("The network between this page and the containers: 90 ms")
    picture(page, "rented-run")

    file = download(page, "json", tmp_path)
    told, result = json.loads(file.read_text()), ExperimentResult.from_json(file.read_text())
    assert told["host"] == "rehearsal"
    assert told["spent"]["gpu_seconds"] > 0 and told["spent"]["dollars"] > 0
    assert float(said[1]) == pytest.approx(told["spent"]["dollars"], abs=0.01)
    assert told["settings"]["rent"]["gpu"] == "L4"
    assert not result.stopped_early
    assert len(result.requests) == len(result.trials) == 36
    for row in result.engines:
        assert list(row.start_phases) == [QUEUED, BOOTING, "loading our code", *ENGINE_PHASES]
        assert all(seconds > 0 for seconds in row.start_phases.values())
        assert row.network_seconds == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("name", "title", "gpu", "charts"),
    [
        ("speculation", "Speculative decoding", "L4", ("speed", "acceptance")),
        ("concurrency", "Concurrency", "H100", ("throughput", "ttft", "flight", "in_flight")),
    ],
)
def test_the_other_experiments_suggest_a_gpu_and_run_whole(
    quick_app: RunningApp, open_page: OpenPage, name: str, title: str, gpu: str, charts: tuple[str, ...]
) -> None:
    page = open_page(quick_app.url())
    settle(page)
    open_tab(page, title, name)
    expect(page.locator(f"#{name}-progress")).to_contain_text(RECORDED, timeout=20_000)
    expect(page.locator(f"#{name}-gpu").get_by_role("radio", name=gpu, exact=True)).to_be_checked()
    choose_engines(page, "vllm", name=name)

    press(page, "run", name)

    expect(page.locator(f"#{name}-progress")).to_contain_text("This run: ", timeout=60_000)
    expect(page.locator(f"#{name}-table .notes")).to_contain_text("Rehearsal")
    expect_charts(page, name, *charts, "start")
    picture(page, f"rented-{name}")


def test_stop_lets_the_containers_go_keeps_what_was_measured_and_run_works_again(
    slow_app: RunningApp, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(slow_app.url())
    settle(page)
    page.evaluate(WATCHING)
    press(page, "run")
    expect(state(page, "vllm")).to_contain_text(BOOTING, timeout=10_000)

    press(page, "stop")

    expect(page.locator("#baseline-progress")).to_contain_text(NOTHING_MEASURED)
    expect(page.locator("#baseline-progress")).to_contain_text(re.compile(COST))  # it was paid for all the same
    expect_over(page)
    expect(state(page, "vllm")).to_contain_text(LET_GO)
    press(page, "run")
    expect(page.locator("#baseline-progress")).to_contain_text("repeat 3", timeout=40_000)
    press(page, "stop")
    expect_over(page, seconds=10)
    expect(page.locator("#baseline-table .notes")).to_contain_text("Stopped early")
    for lane in LANES:
        expect(state(page, lane)).to_have_text(f"not running: {LEFT}", timeout=10_000)
    seen = page.evaluate("window.seen.sglang")  # the slowest: the others may have been done
    expect_in_order(seen, BOOTING, LET_GO, BOOTING, LET_GO, LEFT)
    result = result_of(page, tmp_path)
    assert result.stopped_early
    assert 0 < len(result.requests) < 36
    assert result.spent and result.spent.dollars
    picture(page, "rented-stopped")


def test_a_run_stops_at_its_budget_and_shows_what_was_measured(
    slow_app: RunningApp, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(slow_app.url())
    settle(page)
    open_settings(page)
    choose_engines(page, "sglang")  # the slowest: in its container for 7 s until it answers, and then for 10 s
    set_text(page, "baseline-dollars-per-hour", "218")  # 0.8 dollars in 13.2 s
    set_text(page, "baseline-budget", "0.8")

    press(page, "run")

    expect(page.locator("#baseline-progress")).to_contain_text("of $0.80", timeout=20_000)
    notes = page.locator("#baseline-table .notes")
    stopped = "Stopped at its budget of $0.80: what was measured until then is shown."
    expect(notes).to_contain_text(stopped, timeout=40_000)
    expect(page.locator("#baseline-progress")).to_contain_text("This run: ")
    expect(notes).to_contain_text("Cost: $218.00 per hour (price as typed")
    expect_over(page)
    expect(state(page, "sglang")).to_have_text(f"not running: {LEFT}", timeout=10_000)
    result = result_of(page, tmp_path)
    assert 0 < len(result.requests) < 12
    assert result.spent and result.spent.dollars and 0.8 <= result.spent.dollars < 1.4
    picture(page, "rented-budget")


def test_a_tiny_budget_ends_a_run_before_anything_is_measured_and_that_is_said(same_page: Page) -> None:
    set_text(same_page, "baseline-dollars-per-hour", "3600")  # a dollar per second
    set_text(same_page, "baseline-budget", "0.01")

    press(same_page, "run")

    progress = same_page.locator("#baseline-progress")
    expect(progress).to_contain_text(f"Stopped at its budget of $0.010 {NOTHING_MEASURED}", timeout=20_000)
    expect(progress).to_contain_text(re.compile(COST))
    expect_over(same_page)
    set_text(same_page, "baseline-dollars-per-hour", "")
    set_text(same_page, "baseline-budget", "")


FAILURES_AT_THE_START = {
    "no-token": "Make one with `modal setup` (or `modal token new`), or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET",
    "wrong-token": "Make a new one with `modal token new`, or correct MODAL_TOKEN_ID and MODAL_TOKEN_SECRET",
    "not-deployed": "Put it there with `modal deploy modal_app.py`, and press Run again.",
    "quota": "Stop what runs (`modal app list`), or choose fewer engines.",
    "image-build": "The log below, or `modal app logs`, says why; mend engines/requirements, and deploy again.",
    "spending-limit": "Raise it under modal.com/settings/usage, or wait for the next month.",
    "out-of-gpu-memory": "Lower the memory share or the context.",
}
FAILURES_IN_MID_RUN = {
    "out-of-memory": "Choose a smaller model, or give the classes in modal_app.py more memory and deploy again.",
    "time-out": "Choose fewer repeats or fewer users, and run it again.",
    "network": "Check the network, and run it again.",
}


def fails(page: Page, failure: str) -> None:
    choose_engines(page, "vllm")
    set_text(page, "baseline-model", f"rehearse/{failure}")
    press(page, "run")
    expect(state(page, "vllm")).to_have_text("failed", timeout=20_000)


@pytest.mark.parametrize("failure", FAILURES_AT_THE_START)
def test_what_fails_at_the_start_is_told_with_its_next_step(same_page: Page, failure: str) -> None:
    page = same_page

    fails(page, failure)

    words = FAILURES_AT_THE_START[failure]
    expect(page.locator("#baseline-head-vllm .problem")).to_contain_text(words)
    expect(page.locator("#baseline-chat-vllm .message.bot").last).to_contain_text(words)
    expect(page.locator("#baseline-head-vllm")).to_contain_text("Press Run to try again")
    expect(page.locator("#baseline-progress .problem-box")).to_contain_text("Nothing could be measured")
    expect_over(page)
    picture(page, f"rented-{failure}")
    if failure == "out-of-gpu-memory":
        page.locator("#baseline-head-vllm summary").click()
        expect(page.locator("#baseline-head-vllm pre")).to_contain_text("CUDA out of memory")


@pytest.mark.parametrize("failure", FAILURES_IN_MID_RUN)
def test_what_fails_in_mid_run_is_told_beside_what_was_measured(same_page: Page, tmp_path: Path, failure: str) -> None:
    page = same_page

    fails(page, failure)

    words = FAILURES_IN_MID_RUN[failure]
    expect(page.locator("#baseline-head-vllm .problem")).to_contain_text(words)
    expect(page.locator("#baseline-progress")).to_contain_text("This run: ", timeout=20_000)
    expect(page.locator("#baseline-table .notes")).to_contain_text(words)
    expect_over(page)
    assert 0 < len(result_of(page, tmp_path).requests) < 12
    picture(page, f"rented-{failure}")


def test_after_a_preemption_everything_is_measured_anew_and_the_result_says_so(same_page: Page, tmp_path: Path) -> None:
    page = same_page
    choose_engines(page, "vllm")
    set_text(page, "baseline-model", "rehearse/preemption")

    press(page, "run")

    notes = page.locator("#baseline-table .notes")
    expect(notes).to_contain_text("away in mid-run; it was measured anew on another one", timeout=20_000)
    expect_over(page)
    result = result_of(page, tmp_path)
    assert len(result.requests) == 12
    assert len({(row.repeat, row.warmup) for row in result.requests}) == 12
    assert not result.stopped_early and not result.engines[0].error
    expect(page.locator("#baseline-tiles-vllm .tiles-note")).to_have_text("Mean of 10 runs")
    expect(state(page, "vllm")).to_have_text(f"not running: {LEFT}", timeout=10_000)
    picture(page, "rented-preemption")


def test_without_a_free_gpu_it_waits_until_somebody_presses_stop(same_page: Page) -> None:
    page = same_page
    choose_engines(page, "vllm")
    set_text(page, "baseline-model", "rehearse/no-gpu")
    press(page, "run")
    expect(state(page, "vllm")).to_have_text(f"starting: {QUEUED}", timeout=20_000)
    page.wait_for_timeout(2_500)  # far longer than everything else takes at this speed
    expect(state(page, "vllm")).to_have_text(f"starting: {QUEUED}")
    picture(page, "rented-no-gpu")

    press(page, "stop")

    expect(page.locator("#baseline-progress")).to_contain_text(NOTHING_MEASURED)
    expect_over(page)
    expect(state(page, "vllm")).to_have_text(f"not running: {LEFT}", timeout=10_000)


@pytest.mark.parametrize(
    ("field", "typed", "words"),
    [
        ("model", "/etc", "cannot read folders of this one: name a model on the model hub"),
        ("model", "", "Name a model: its id on the model hub"),
        ("budget", "much", "must be a number, not 'much'"),
        ("budget", "0", "must be a number from 0.01 to 1000"),
    ],
)
def test_what_cannot_be_rented_is_said_and_nothing_typed_is_lost(
    same_page: Page, field: str, typed: str, words: str
) -> None:
    typed_in = same_page.locator(f"#baseline-{field}").locator("input, textarea")
    before = typed_in.input_value()
    set_text(same_page, "baseline-prompt", "A question of my own")
    set_text(same_page, f"baseline-{field}", typed)

    press(same_page, "run")

    expect(same_page.locator("#baseline-progress").get_by_role("alert")).to_contain_text(words)
    expect_over(same_page)
    expect(same_page.locator("#baseline-prompt textarea")).to_have_value("A question of my own")
    expect(typed_in).to_have_value(typed)
    set_text(same_page, f"baseline-{field}", before)


def test_a_visitor_who_has_spent_everything_is_told_until_when(
    browser: Browser, open_page: OpenPage, tmp_path: Path
) -> None:
    with rehearsing("10", tmp_path, "--budget-visitor", "0.000001") as app:
        page = open_page(app.url())
        settle(page)
        press(page, "run")
        expect(page.locator("#baseline-progress")).to_contain_text("of $0.0000010", timeout=20_000)
        expect(page.locator("#baseline-progress")).to_contain_text(
            f"Stopped at its budget of $0.0000010 {NOTHING_MEASURED}", timeout=20_000
        )
        expect_over(page)

        press(page, "run")

        for lane in LANES:
            problem = page.locator(f"#baseline-chat-{lane} .message.bot").last
            expect(problem).to_contain_text("Nothing is left of your budget for today", timeout=10_000)
            expect(problem).to_contain_text("begins anew at midnight UTC")
        expect(page.locator("#baseline-progress")).to_contain_text("Nothing could be measured")
        expect_over(page)
        picture(page, "rented-visitor-budget")
        ledger = (tmp_path / "spending-rehearsal.jsonl").read_text().splitlines()
        assert len(ledger) == 1 and json.loads(ledger[0])["dollars"] > 0.000001
        page.context.close()  # before the app, so that the page does not miss it


def test_ending_the_app_in_mid_run_leaves_nothing(browser: Browser, tmp_path: Path) -> None:
    with rehearsing("8", tmp_path) as app:
        page = browser.new_page()
        page.goto(app.url())
        settle(page)
        press(page, "run")
        expect(page.locator("#baseline-progress")).to_contain_text("repeat", timeout=30_000)
        processes = app.tree()

        app.process.send_signal(signal.SIGTERM)

        assert app.process.wait(25) == 0
        wait_until(lambda: not alive(processes), 2)
        page.close()
        app._reader.join(5)
        assert "did not end" not in app.log and "Traceback" not in app.log
        assert len((tmp_path / "spending-rehearsal.jsonl").read_text().splitlines()) == 1


def test_a_rented_run_fits_its_window_in_light_and_dark(same_page: Page) -> None:
    page = same_page
    choose_engines(page, *LANES)
    set_text(page, "baseline-model", "rehearse/no-gpu")
    press(page, "run")
    expect(state(page, "vllm")).to_have_text(f"starting: {QUEUED}", timeout=20_000)

    for colours, width in itertools.product(("light", "dark"), (400, 1400)):
        page.emulate_media(color_scheme=colours)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(700)  # charts follow a moment later
        picture(page, f"rented-{colours}-{width}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for lane in LANES:
            box = page.locator(f"#baseline-lane-{lane}").bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
    press(page, "stop")
    expect_over(page)
