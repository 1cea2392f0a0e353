"""One lane: its light for every state, its live figures through a run, and nothing hostile on the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from engines.base import Engine
from engines.local import Status
from engines.server import PhaseTime
from engines.timeline import Arrival, Timeline
from experiments.base import EngineFailed, EngineReady, RequestEnded, RequestStarted, TokensArrived, Trial, TrialStarted
from experiments.result import EngineRow, RequestRow
from tests.experiments.test_result import answer_at
from ui.lanes import LIGHT_WORDS, TILES, LaneView, head_html

MakeEngine = Callable[..., Engine]
HOSTILE = "<img src=x onerror=alert(1)>'\"</pre></div><script>alert(2)</script>&amp;"


class Parsed(HTMLParser):
    """The elements of a piece of HTML, and the text in them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


# The light


@pytest.mark.parametrize("light", LIGHT_WORDS)
def test_every_light_has_its_class_and_is_said_in_words(scripted: MakeEngine, light: str) -> None:
    head = Parsed(head_html(scripted("quick"), Status(light=light, version="1.2")))  # type: ignore[arg-type]
    (lamp,) = head.with_class("light")
    assert lamp["class"] == f"light {light}"
    assert lamp["aria-label"] == LIGHT_WORDS[light]
    assert LIGHT_WORDS[light] in head.text
    assert "Quick1.2" in head.text


@pytest.mark.parametrize("light", ["installing", "starting"])
def test_what_takes_long_shows_its_phase_and_a_stopwatch(scripted: MakeEngine, light: str) -> None:
    head = Parsed(head_html(scripted("quick"), Status(light=light, phase="loading weights", since=0.0)))  # type: ignore[arg-type]
    assert f"{LIGHT_WORDS[light]}: loading weights" in head.text
    (watch,) = head.with_class("elapsed")
    assert float(watch["data-elapsed"] or 0) > 0


@pytest.mark.parametrize("light", ["ready", "busy"])
def test_an_engine_that_runs_says_how_long_its_start_took_phase_by_phase(scripted: MakeEngine, light: str) -> None:
    phases = (PhaseTime("importing", 3.25), PhaseTime("loading weights", 4.0))
    head = Parsed(head_html(scripted("quick"), Status(light=light, phases=phases)))  # type: ignore[arg-type]
    assert "started in 7 s" in head.text
    titles = [attributes["title"] for _, attributes in head.elements if "title" in attributes]
    assert titles == ["importing: 3.2 s\nloading weights: 4.0 s"]
    assert head.with_class("elapsed") == []


def test_a_failure_shows_its_reason_the_tail_of_the_log_and_the_way_on(scripted: MakeEngine) -> None:
    status = Status(light="failed", error="The model was not found.", log_tail="line 1\nline 2")
    head = Parsed(head_html(scripted("quick"), status))
    for words in ("The model was not found.", "line 1\nline 2", "Press Run to try again."):
        assert words in head.text
    assert "details" not in [
        tag for tag, _ in Parsed(head_html(scripted("quick"), replace(status, log_tail=""))).elements
    ]


def test_hostile_words_of_an_engine_stay_words(scripted: MakeEngine) -> None:
    engine = replace(scripted("quick"), label=HOSTILE)
    phases = (PhaseTime(HOSTILE, 1.0),)
    for light in LIGHT_WORDS:
        plain = Status(light=light, phase="p", error="e", log_tail="l", version="v", phases=(PhaseTime("n", 1.0),))  # type: ignore[arg-type]
        hostile = replace(plain, phase=HOSTILE, error=HOSTILE, log_tail=HOSTILE, version=HOSTILE, phases=phases)
        expected, found = Parsed(head_html(scripted("quick"), plain)), Parsed(head_html(engine, hostile))
        # The same elements with the same attributes: nothing came in through the words.
        assert [(tag, set(attributes)) for tag, attributes in found.elements] == [
            (tag, set(attributes)) for tag, attributes in expected.elements
        ]
        # Name, version and phase; a start also shows what it has behind it, a failure its reason and its log.
        assert found.text.count(HOSTILE) == {"failed": 5, "starting": 4}.get(light, 3)


# A run under way


def tiles(view: LaneView) -> dict[str, str]:
    """What the tiles show, by metric."""
    html = view.tiles_html()
    return {
        metric.name: html.split(f"data-metric='{metric.name}'")[1].split("<div class='value'>")[1].split("<")[0]
        for metric in TILES
    }


def note(view: LaneView) -> str:
    return view.tiles_html().split("<div class='tiles-note'>")[1].split("<")[0]


def take(view: LaneView, *events: object) -> None:
    for event in events:
        view.take(event)


def arrives(at: float, text: str, tokens: int | None = 1, reasoning: bool = False) -> TokensArrived:
    return TokensArrived("quick", Arrival(at, text, reasoning, tokens))


def starts(engine: str, warmup: bool, repeat: int, of: int, users: int = 1) -> TrialStarted:
    kind = "warm-up" if warmup else "repeat"
    return TrialStarted(engine, Trial(f"{kind} {repeat} of {of}", repeat, warmup, ("Go.",) * users), 9, 0)


def test_a_lane_at_rest_shows_dashes() -> None:
    assert set(tiles(LaneView("quick")).values()) == {"–"}
    assert LaneView("quick").messages("Go.") == [{"role": "user", "content": "Go."}]


def test_figures_are_live_from_the_first_token_on() -> None:
    view = LaneView("quick")
    take(view, starts("quick", True, 1, 2), arrives(0.5, " one"))
    assert note(view) == "Warm-up 1 of 2"
    assert tiles(view) == {"ttft": "500.0", "decode_speed": "–", "tpot": "–", "output_tokens": "1", "e2e": "0.50"}
    take(view, arrives(0.54, " two"), arrives(0.58, " three four", tokens=3))
    # 0.08 s / 4 tokens after the first
    assert tiles(view) == {"ttft": "500.0", "decode_speed": "50", "tpot": "20.00", "output_tokens": "5", "e2e": "0.58"}
    assert view.messages("Go.")[1] == {"role": "assistant", "content": " one two three four"}


def test_tokens_that_came_with_the_first_chunk_are_not_counted_as_decoded_after_it() -> None:
    view = LaneView("quick")
    take(view, starts("quick", False, 1, 3), arrives(0.10, " four", tokens=4), arrives(0.14, " more", tokens=4))
    assert (tiles(view)["tpot"], tiles(view)["output_tokens"]) == ("10.00", "8")  # 0.04 s / (8 - 4)


def test_chunks_without_a_count_are_taken_for_one_token_each() -> None:
    view = LaneView("quick")
    take(view, starts("quick", False, 1, 1), arrives(0.1, " a", None), arrives(0.2, " b", None))
    assert (tiles(view)["tpot"], tiles(view)["output_tokens"]) == ("100.00", "2")


def test_each_request_starts_its_text_and_figures_afresh() -> None:
    view = LaneView("quick")
    take(view, starts("quick", True, 1, 1), arrives(0.1, " warm"), arrives(0.2, " up"))
    take(view, starts("quick", False, 1, 3))
    assert note(view) == "Repeat 1 of 3"
    assert view.messages("Go.") == [{"role": "user", "content": "Go."}]
    assert set(tiles(view).values()) == {"–"}
    take(view, arrives(0.3, " again"))
    assert tiles(view)["output_tokens"] == "1"


def test_thinking_is_shown_apart_from_the_answer() -> None:
    view = LaneView("quick")
    take(view, starts("quick", False, 1, 1), arrives(0.1, "hm", reasoning=True), arrives(0.2, "Yes."))
    assert view.messages("Go.")[1]["content"] == "*Thinking:* hm\n\nYes."


def test_the_end_shows_the_mean_over_the_repeats_without_warm_ups_and_failures() -> None:
    view = LaneView("quick")
    rows = [
        RequestRow("quick", 1, True, answer_at(1.0, 9.0)),
        RequestRow("quick", 1, False, answer_at(100.0, 0.1)),
        RequestRow("quick", 2, False, answer_at(None, 0.1)),
        RequestRow("quick", 3, False, answer_at(300.0, 0.3)),
    ]
    for row in rows:
        take(view, starts("quick", row.warmup, row.repeat, 3), arrives(0.1, " word"), RequestEnded(row))
    view.close()
    assert note(view) == "Mean of 2 runs"
    assert (tiles(view)["ttft"], tiles(view)["decode_speed"]) == ("200.0", "200")  # (100 + 300) / 2, both


def test_one_run_is_not_called_runs() -> None:
    view = LaneView("quick")
    take(view, starts("quick", False, 1, 1), RequestEnded(RequestRow("quick", 1, False, answer_at(50.0, 0.1))))
    view.close()
    assert note(view) == "Mean of 1 run"


def test_a_failed_request_shows_its_reason_below_what_had_come() -> None:
    view = LaneView("quick")
    broken = RequestRow("quick", 1, False, Timeline(0.0, error="Quick broke off the answer."))
    take(view, starts("quick", False, 1, 1), arrives(0.1, "Half"), RequestEnded(broken))
    assert [message["content"] for message in view.messages("Go.")] == ["Go.", "Half", "⚠ Quick broke off the answer."]
    view.close()
    assert note(view) == "No complete answer"
    assert set(tiles(view).values()) == {"–"}
    view.take(starts("quick", False, 2, 2))
    assert len(view.messages("Go.")) == 1


def test_an_engine_that_could_not_run_shows_why() -> None:
    view = LaneView("quick")
    take(view, EngineFailed(EngineRow("quick", "Quick", "#000000", error="It could not start.")))
    view.close()
    assert note(view) == "Could not run"
    assert view.messages("Go.")[1]["content"] == "⚠ It could not start."


def test_a_lane_that_was_not_part_of_the_run_says_nothing() -> None:
    view = LaneView("quick")
    view.close()
    assert note(view) == ""


def test_a_lane_moves_only_by_its_own_engines_events() -> None:
    view, before = LaneView("quick"), LaneView("quick")
    take(
        view,
        starts("slow", False, 1, 1),
        TokensArrived("slow", Arrival(0.1, " word")),
        RequestEnded(RequestRow("slow", 1, False, answer_at(100.0, 0.1))),
        EngineFailed(EngineRow("slow", "Slow", "#000000", error="It could not start.")),
        "something that is no event",
    )
    assert view == before
    assert not view.changed
    view.take(starts("quick", False, 1, 1))
    assert view.changed


# Variants and many at once


def test_a_variants_trials_are_shown_in_its_engines_lane_with_its_name() -> None:
    view = LaneView("quick")
    row = EngineRow("quick+ngram-3", "Quick", "#000000", "n-gram look-up, 3 tokens", config={"speculation": {}})
    take(view, EngineReady(row), starts("quick+ngram-3", False, 1, 2))
    take(view, TokensArrived("quick+ngram-3", Arrival(0.1, " word", tokens=1)))
    assert note(view) == "With n-gram look-up, 3 tokens: repeat 1 of 2"
    assert tiles(view)["output_tokens"] == "1"


def test_with_speculation_the_pieces_of_each_step_are_marked() -> None:
    view = LaneView("quick")
    row = EngineRow("quick+ngram-3", "Quick", "#000000", "n-gram", config={"speculation": {"draft_tokens": 3}})
    take(view, EngineReady(row), starts("quick+ngram-3", False, 1, 1))
    for text, tokens in ((" a", 1), (" b<c d", 3)):
        view.take(TokensArrived("quick+ngram-3", Arrival(0.1, text, tokens=tokens)))
    steps = Parsed(view.tiles_html()).with_class("step")
    assert [step["data-tokens"] for step in steps] == ["1", "3"]
    assert " b&lt;c d" in view.tiles_html()
    plain = LaneView("quick")
    take(plain, EngineReady(EngineRow("quick", "Quick", "#000000")), starts("quick", False, 1, 1), arrives(0.1, " a"))
    assert "step" not in plain.tiles_html()


def test_what_an_engine_cannot_do_is_said_below_its_tiles_and_is_no_failure() -> None:
    view = LaneView("quick")
    take(view, EngineFailed(EngineRow("quick+cache", "Quick", "#000000", unavailable="Quick keeps no <cache>.")))
    assert "Quick keeps no &lt;cache&gt;." in view.tiles_html()
    assert view.messages("Go.") == [{"role": "user", "content": "Go."}]


def test_of_many_at_once_the_first_text_is_shown_and_the_others_are_counted() -> None:
    view = LaneView("quick")
    trial = Trial("2 users", 1, False, ("Go.", "Go."), spacing=0.1)
    take(view, TrialStarted("quick", trial, 1, 0), RequestStarted("quick", 0), RequestStarted("quick", 1))
    take(view, TokensArrived("quick", Arrival(0.1, " one", tokens=1), 0))
    take(view, TokensArrived("quick", Arrival(0.2, " other", tokens=1), 1))  # 0.3 s after the trial began
    assert view.messages("Go.")[1]["content"] == " one"
    assert note(view) == "2 users: 2 in flight, 0 answered"
    assert tiles(view)["output_tokens"] == "2"
    assert tiles(view)["decode_speed"] == "5"  # one token in the 0.2 s after the first
    take(view, RequestEnded(RequestRow("quick", 1, False, answer_at(50.0, 0.1))))
    assert note(view) == "2 users: 1 in flight, 1 answered"


def test_a_very_long_prompt_is_shown_without_its_middle() -> None:
    view = LaneView("quick")
    view.take(TrialStarted("quick", Trial("run 1", 1, False, ("poem " * 2000 + "What is a token?",)), 1, 0))
    shown = view.messages("")[0]["content"]
    assert len(shown) < 500
    assert shown.startswith("poem") and shown.endswith("What is a token?") and "2,004 words in all" in shown


def test_tiles_are_sent_four_times_a_second_at_most_and_always_at_an_answers_end() -> None:
    view = LaneView("quick")
    take(view, TrialStarted("quick", Trial("repeat 1", 1, False, ("Go.",)), 1, 0), RequestStarted("quick", 0))
    assert view.tiles_due(10.0)
    assert not view.tiles_due(10.2)
    assert view.tiles_due(10.26)
    view.in_flight = 0
    assert view.tiles_due(10.27)
    view.in_flight = 1
    view.close()
    assert view.tiles_due(10.28)


def test_only_the_words_of_a_light_are_announced_not_its_stopwatch(scripted: MakeEngine) -> None:
    head = head_html(scripted("quick"), Status(light="starting", phase="loading weights", since=0.0))
    announced = head.split("role='status'>")[1].split("</span>")[0]
    assert announced == "starting: loading weights"
