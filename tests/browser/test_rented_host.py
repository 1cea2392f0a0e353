"""The page over rented machines: a rehearsal of Modal, which replays recordings and fails in Modal's own words."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

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
NOTHING_MEASURED = "Stopped before anything was measured"
COST = r"[\d,]+ GPU-seconds, \$(\d+\.\d+)"
OpenPage = Callable[..., Page]

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
    """Slow enough that the lights, which are asked once a second, show every stage."""
    with rehearsing("2.5", tmp_path_factory.mktemp("slow")) as app:
        yield app


@pytest.fixture(scope="module")
def quick_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    with rehearsing("30", tmp_path_factory.mktemp("quick")) as app:
        yield app


def rehearsing(speed: str, cache: Path, *arguments: str) -> RunningApp:
    return RunningApp("--host", "rehearsal", "--rehearsal-speed", speed, *arguments, cache=cache)


@pytest.fixture(scope="module")
def failing_page(quick_app: RunningApp, browser: Browser) -> Iterator[tuple[Page, list[str]]]:
    """One page for all failures, each of which must leave it usable for the next; and the errors in its console."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(quick_app.url())
    settle(page)
    open_settings(page)
    choose_engines(page, "vllm")
    yield page, errors
    context.close()


def settle(page: Page) -> None:
    """Wait until the recording that every visitor finds is shown."""
    expect(page.locator("#baseline-progress")).to_contain_text("Press Run to measure anew", timeout=20_000)
    expect(page.locator("#baseline-headline .headline")).not_to_be_empty()


def open_settings(page: Page, name: str = "baseline") -> None:
    page.locator(f"#{name}-settings").get_by_role("button", name="Settings").click()


def choose_engines(page: Page, *chosen: str, name: str = "baseline") -> None:
    for lane in LANES:
        page.locator(f"#{name}-settings").get_by_label(LABELS[lane], exact=True).set_checked(lane in chosen)


def press(page: Page, what: str, name: str = "baseline") -> None:
    page.locator(f"#{name}-{what}").click()


def state(page: Page, lane: str, name: str = "baseline"):  # noqa: ANN201
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


def test_the_page_says_where_the_engines_run_and_what_can_be_rented(
    quick_app: RunningApp, open_page: OpenPage
) -> None:
    page = open_page(quick_app.url())
    settle(page)
    open_settings(page)

    expect(page.locator(".masthead")).to_contain_text("Modal (rehearsal), rented by the second")
    expect(page.locator(".masthead")).to_contain_text("GPU chosen per run, one for each engine")
    settings = page.locator("#baseline-settings")
    for setting in ("model", "gpu", "gpu-count", "replicas", "keep-seconds", "budget", "snapshot"):
        expect(settings.locator(f"#baseline-{setting}")).to_be_visible()
    expect(settings.get_by_role("radio", name="L4", exact=True)).to_be_checked()
    assert settings.locator("#baseline-gpu input[type=radio]").count() == 10
    expect(settings).not_to_contain_text("Race")  # every engine has a machine of its own
    for lane in LANES:
        expect(state(page, lane)).to_have_text(f"not running: {IDLE}")
    assert "waiting for a GPU" not in quick_app.log


def test_other_experiments_suggest_other_machines(quick_app: RunningApp, open_page: OpenPage) -> None:
    page = open_page(quick_app.url())
    settle(page)
    open_tab(page, "Concurrency", "concurrency")

    expect(page.locator("#concurrency-gpu").get_by_role("radio", name="H100", exact=True)).to_be_checked()


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
        expect_in_order(seen[lane], IDLE, QUEUED, BOOTING, ENGINE_PHASES[0], "answering", LEFT)
        finished = seen[f"{lane} steps"]
        expect_in_order(finished, QUEUED, BOOTING, ENGINE_PHASES[0], ENGINE_PHASES[1])
        assert any(re.fullmatch(rf"{QUEUED} \d+ s · {BOOTING} \d+ s · loading our code .*", one) for one in finished)
        expect(page.locator(f"#baseline-tiles-{lane} .tiles-note")).to_have_text("Mean of 10 runs")
    running = [re.fullmatch(rf"So far {COST} of \$1\.00", words) for words in seen["cost"]]
    costs = [float(told[1]) for told in running if told]
    assert len(costs) > 5 and all(before < after for before, after in pairwise(costs)), seen["cost"]
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
    ("name", "title", "charts"),
    [
        ("prefix-caching", "Prefix caching", ("ttft", "cached")),
        ("speculation", "Speculative decoding", ("speed", "acceptance", "sweep")),
        ("concurrency", "Concurrency", ("throughput", "ttft", "flight", "in_flight")),
    ],
)
def test_the_other_experiments_run_whole(
    quick_app: RunningApp, open_page: OpenPage, name: str, title: str, charts: tuple[str, ...]
) -> None:
    page = open_page(quick_app.url())
    settle(page)
    open_tab(page, title, name)
    expect(page.locator(f"#{name}-progress")).to_contain_text("Press Run to measure anew", timeout=20_000)
    choose_engines(page, "vllm", name=name)

    press(page, "run", name)

    expect(page.locator(f"#{name}-progress")).to_contain_text("This run: ", timeout=60_000)
    expect(page.locator(f"#{name}-table .notes")).to_contain_text("Rehearsal")
    expect_charts(page, name, *charts, "start")
    picture(page, f"rented-{name}")


def test_stop_in_mid_run_lets_the_containers_go_and_keeps_what_was_measured(
    slow_app: RunningApp, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(slow_app.url())
    settle(page)
    page.evaluate(WATCHING)
    press(page, "run")
    expect(page.locator("#baseline-progress")).to_contain_text("repeat 4", timeout=40_000)

    press(page, "stop")

    expect_over(page, seconds=10)
    expect(page.locator("#baseline-table .notes")).to_contain_text("Stopped early")
    for lane in LANES:
        expect(state(page, lane)).to_have_text(f"not running: {LEFT}", timeout=10_000)
    seen = page.evaluate("window.seen")
    for lane in LANES:
        expect_in_order(seen[lane], "answering", LET_GO, LEFT)
    result = result_of(page, tmp_path)
    assert result.stopped_early
    assert 0 < len(result.requests) < 36
    assert result.spent and result.spent.dollars
    picture(page, "rented-stopped")


def test_stop_before_anything_is_measured_says_so_and_run_works_again(
    slow_app: RunningApp, quick_app: RunningApp, open_page: OpenPage
) -> None:
    page = open_page(slow_app.url())
    settle(page)
    open_settings(page)
    choose_engines(page, "vllm")
    page.evaluate(WATCHING)
    press(page, "run")
    expect(state(page, "vllm")).to_contain_text(BOOTING, timeout=10_000)

    press(page, "stop")

    expect(page.locator("#baseline-progress")).to_contain_text(NOTHING_MEASURED)
    expect(page.locator("#baseline-progress")).to_contain_text(re.compile(COST))  # it was paid for all the same
    expect_over(page)
    expect(state(page, "vllm")).to_have_text(f"not running: {LEFT}", timeout=10_000)
    expect_in_order(page.evaluate("window.seen.vllm"), BOOTING, LET_GO, LEFT)
    press(page, "run")
    expect(state(page, "vllm")).to_contain_text("answering", timeout=30_000)
    expect(page.locator("#baseline-progress")).to_contain_text("This run: ", timeout=30_000)


def test_a_run_stops_at_its_budget_and_shows_what_was_measured(
    slow_app: RunningApp, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(slow_app.url())
    settle(page)
    open_settings(page)
    choose_engines(page, "sglang")  # the slowest: 6.6 s until it answers, and 12.5 s of answers
    set_text(page, "baseline-dollars-per-hour", "3600")  # a dollar per second
    set_text(page, "baseline-budget", "12")
    press(page, "run")
    expect(page.locator("#baseline-progress")).to_contain_text("of $1.00", timeout=20_000)  # the page's own is less
    expect(page.locator("#baseline-progress")).to_contain_text(NOTHING_MEASURED, timeout=20_000)
    expect(page.locator("#baseline-progress")).to_contain_text("Stopped at its budget of $1.00")
    expect_over(page)

    set_text(page, "baseline-dollars-per-hour", "270")  # 0.9 dollars in 12 s
    set_text(page, "baseline-budget", "0.9")
    press(page, "run")

    expect(page.locator("#baseline-progress")).to_contain_text("of $0.90", timeout=20_000)
    expect(page.locator("#baseline-progress")).to_contain_text("This run: ", timeout=40_000)
    notes = page.locator("#baseline-table .notes")
    expect(notes).to_contain_text("Stopped at its budget of $0.90: what was measured until then is shown.")
    expect(notes).to_contain_text("Cost: $270.00 per hour (price as typed")
    expect_over(page)
    expect(state(page, "sglang")).to_have_text(f"not running: {LEFT}", timeout=10_000)
    result = result_of(page, tmp_path)
    assert 0 < len(result.requests) < 12
    assert result.spent and result.spent.dollars and 0.9 <= result.spent.dollars < 1.5
    picture(page, "rented-budget")


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
    set_text(page, "baseline-model", f"rehearse/{failure}")
    press(page, "run")
    expect(state(page, "vllm")).to_have_text("failed", timeout=20_000)


@pytest.mark.parametrize("failure", FAILURES_AT_THE_START)
def test_what_fails_at_the_start_is_told_with_its_next_step(
    failing_page: tuple[Page, list[str]], failure: str
) -> None:
    page, errors = failing_page

    fails(page, failure)

    words = FAILURES_AT_THE_START[failure]
    expect(page.locator("#baseline-head-vllm .problem")).to_contain_text(words)
    expect(page.locator("#baseline-chat-vllm .message.bot").last).to_contain_text(words.replace("`", ""))
    expect(page.locator("#baseline-head-vllm")).to_contain_text("Press Run to try again")
    expect(page.locator("#baseline-progress .problem-box")).to_contain_text("Nothing could be measured")
    expect_over(page)
    picture(page, f"rented-{failure}")
    if failure == "out-of-gpu-memory":
        page.locator("#baseline-head-vllm summary").click()
        expect(page.locator("#baseline-head-vllm pre")).to_contain_text("CUDA out of memory")
    assert errors == []


@pytest.mark.parametrize("failure", FAILURES_IN_MID_RUN)
def test_what_fails_in_mid_run_is_told_beside_what_was_measured(
    failing_page: tuple[Page, list[str]], tmp_path: Path, failure: str
) -> None:
    page, errors = failing_page

    fails(page, failure)

    words = FAILURES_IN_MID_RUN[failure]
    expect(page.locator("#baseline-head-vllm .problem")).to_contain_text(words)
    expect(page.locator("#baseline-progress")).to_contain_text("This run: ", timeout=20_000)
    expect(page.locator("#baseline-table .notes")).to_contain_text(words)
    expect_over(page)
    assert 0 < len(result_of(page, tmp_path).requests) < 12
    picture(page, f"rented-{failure}")
    assert errors == []


def test_after_a_preemption_everything_is_measured_anew_and_the_result_says_so(
    failing_page: tuple[Page, list[str]], tmp_path: Path
) -> None:
    page, errors = failing_page
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
    assert errors == []


def test_without_a_free_gpu_it_waits_until_somebody_presses_stop(failing_page: tuple[Page, list[str]]) -> None:
    page, errors = failing_page
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
    assert errors == []


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
    quick_app: RunningApp, open_page: OpenPage, field: str, typed: str, words: str
) -> None:
    page = open_page(quick_app.url())
    settle(page)
    open_settings(page)
    set_text(page, "baseline-prompt", "A question of my own")
    set_text(page, f"baseline-{field}", typed)

    press(page, "run")

    expect(page.locator("#baseline-progress").get_by_role("alert")).to_contain_text(words)
    expect_over(page)
    expect(page.locator("#baseline-prompt textarea")).to_have_value("A question of my own")
    expect(page.locator(f"#baseline-{field}").locator("input, textarea")).to_have_value(typed)
    expect(page.locator("#baseline-headline .headline")).not_to_be_empty()


def test_a_visitor_who_has_spent_everything_is_told_until_when(
    browser: Browser, open_page: OpenPage, tmp_path: Path
) -> None:
    with rehearsing("10", tmp_path, "--budget-visitor", "0.000001") as app:
        page = open_page(app.url())
        settle(page)
        press(page, "run")
        expect(page.locator("#baseline-progress")).to_contain_text("of $0.0000010", timeout=20_000)
        expect(page.locator("#baseline-progress")).to_contain_text(NOTHING_MEASURED, timeout=20_000)
        expect(page.locator("#baseline-progress")).to_contain_text("Stopped at its budget of $0.0000010")
        expect_over(page)

        press(page, "run")

        for lane in LANES:
            problem = page.locator(f"#baseline-head-{lane} .problem")
            expect(problem).to_contain_text("Nothing is left of your budget for today", timeout=10_000)
            expect(problem).to_contain_text("begins anew at midnight UTC")
        expect(page.locator("#baseline-progress")).to_contain_text("Nothing could be measured")
        expect_over(page)
        picture(page, "rented-visitor-budget")
        ledger = (tmp_path / "spending-rehearsal.jsonl").read_text().splitlines()
        assert len(ledger) == 1 and json.loads(ledger[0])["dollars"] > 0.000001
        page.context.close()  # before the app, so that the page does not miss it


def test_ending_the_app_in_mid_run_leaves_nothing(browser: Browser, tmp_path: Path) -> None:
    with rehearsing("4", tmp_path) as app:
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
        app._reader.join(5)  # noqa: SLF001
        assert "did not end" not in app.log and "Traceback" not in app.log
        assert len((tmp_path / "spending-rehearsal.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_rented_run_fits_its_window_in_light_and_dark(
    quick_app: RunningApp, open_page: OpenPage, width: int, colours: str
) -> None:
    page = open_page(quick_app.url(), viewport={"width": width, "height": 900}, color_scheme=colours)
    settle(page)
    open_settings(page)
    press(page, "run")
    expect(page.locator("#baseline-progress")).to_contain_text("This run: ", timeout=30_000)

    picture(page, f"rented-{colours}-{width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for lane in LANES:
        box = page.locator(f"#baseline-lane-{lane}").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
