"""One lane per engine: its light, its answer, its numbers. Pure functions make the HTML; nothing here runs an engine.

Everything that comes from an engine or a visitor is escaped: logs, errors and names are hostile text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from engines.base import Engine
from engines.local import Status
from engines.timeline import Arrival
from experiments.base import (
    EngineFailed,
    EngineReady,
    RequestEnded,
    RequestStarted,
    TokensArrived,
    Trial,
    TrialStarted,
)
from experiments.metrics import METRICS, Distribution, Metric, RequestMetrics
from experiments.plain import ANSI, plain_line, plain_name, plain_text
from experiments.result import EngineRow, RequestRow, engine_of

TILES = tuple(METRICS[name] for name in ("ttft", "decode_speed", "tpot", "output_tokens", "e2e"))
LONGEST_ANSWER = 20_000  # characters on the page; the result has all of them
LONGEST_PIECE, MOST_PIECES = 200, 2_000  # characters of what came in one step; such steps
TAG, PICTURE = re.compile(r"<(?=[A-Za-z/!?])"), re.compile(r"!\[")
MARKDOWN = re.compile(r"[\\`*_\[\]<>!|~$#]")
TILE_SECONDS = 0.25  # at most four times a second
LIGHT_WORDS = {
    "down": "not running",
    "installing": "installing",
    "starting": "starting",
    "ready": "ready",
    "busy": "answering",
    "failed": "failed",
}


@dataclass(frozen=True, slots=True)
class Lane:
    """The components of one lane, by name."""

    engine: Engine
    head: gr.HTML
    chat: gr.Chatbot
    tiles: gr.HTML


def build_lane(engine: Engine, status: Status, tab: str) -> Lane:
    """`tab` makes the elements' ids its own."""
    with gr.Column(elem_classes="lane", elem_id=f"{tab}-lane-{engine.name}"):
        return Lane(
            engine=engine,
            head=gr.HTML(head_html(engine, status), padding=False, elem_id=f"{tab}-head-{engine.name}"),
            chat=gr.Chatbot(
                label=f"{engine.label}'s answer",
                show_label=False,
                height=280,
                layout="bubble",
                buttons=["copy"],
                allow_tags=False,
                sanitize_html=True,
                feedback_options=None,
                placeholder=f"{engine.label}'s answer will stream here.",
                elem_id=f"{tab}-chat-{engine.name}",
                elem_classes="answer",
            ),
            tiles=gr.HTML(LaneView(engine.name).tiles_html(), padding=False, elem_id=f"{tab}-tiles-{engine.name}"),
        )


def head_html(engine: Engine, status: Status) -> str:
    """Name, light and what it is doing now; a failure shows its reason and the tail of the engine's log."""
    words = LIGHT_WORDS[status.light]
    if status.phase:
        words += f": {plain_line(status.phase)}"
    moving = status.light in ("installing", "starting")
    # Only the words are announced: the stopwatch beside them moves every second.
    state = f"<span class='words' role='status'>{escape(words)}</span>"
    if moving:
        state += f" · <span class='elapsed' data-elapsed='{status.elapsed():.1f}'>{status.elapsed():.0f} s</span>"
        if status.light == "starting" and status.phases:
            steps = " · ".join(f"{phase.name} {phase.seconds:.0f} s" for phase in status.phases)
            state += f"<div class='steps-done'>{escape(steps)}</div>"
    elif status.start_seconds is not None and status.light in ("ready", "busy"):
        steps = "\n".join(f"{phase.name}: {phase.seconds:.1f} s" for phase in status.phases)
        state += f" · <span title='{escape(steps, quote=True)}'>started in {status.start_seconds:.0f} s</span>"
    parts = [
        f"<div class='lane-head' style='--engine:{engine.colour}'>",
        f"<div class='title'><span class='light {status.light}' role='img' "
        f"aria-label='{escape(LIGHT_WORDS[status.light])}'></span>{escape(engine.label)}",
        f"<span class='version'>{escape(plain_name(status.version))}</span>" if status.version else "",
        f"</div><div class='state'>{state}</div>",
    ]
    if status.light == "failed":
        parts.append(f"<div class='state problem' tabindex='0'>{escape(plain_line(status.error))}</div>")
        if status.log_tail:
            tail = escape(plain_text(status.log_tail))
            parts.append(f"<details><summary>End of its log</summary><pre>{tail}</pre></details>")
        parts.append("<div class='state'>Press Run to try again.</div>")
    return "".join([*parts, "</div>"])


@dataclass(slots=True)
class LaneView:
    """What one lane shows of a run under way; `take` moves it on by one event. The display's own copy of the text.

    A lane belongs to an engine and shows its contenders one after the other. Of many requests at once it shows the
    first one's text, and counts the others.
    """

    engine: str
    trial: Trial | None = None
    contender: str = ""
    rows: dict[str, EngineRow] = field(default_factory=dict)  # contender's key -> what serves it, or why not
    note: str = ""
    arrivals: list[Arrival] = field(default_factory=list)  # of the request that is shown
    first_at: float | None = None
    last_at: float | None = None  # s since the trial began
    first_tokens: int = 0
    tokens: int = 0
    in_flight: int = 0
    answered: int = 0
    finished: list[RequestRow] = field(default_factory=list)
    error: str = ""
    unavailable: str = ""
    changed: bool = False
    tiles_shown_at: float = float("-inf")  # on the one clock
    closed: bool = False

    def take(self, event: object) -> None:
        match event:
            case TrialStarted(engine=key, trial=trial) if engine_of(key) == self.engine:
                if key != self.contender:
                    self.finished = []  # the tiles' means are the variant's own
                self.trial, self.contender = trial, key
                self.arrivals = []
                self.first_at = self.last_at = None
                self.first_tokens = self.tokens = self.in_flight = self.answered = 0
                self.error = ""
            case RequestStarted(engine=self.contender):
                self.in_flight += 1
            case TokensArrived(engine=self.contender, arrival=arrival, index=index):
                self._count(arrival, index)
            case RequestEnded(row=row) if row.engine == self.contender:
                self.in_flight -= 1
                self.answered += 1
                self.error = row.timeline.error or self.error
                if not row.warmup:
                    self.finished.append(row)
            case EngineReady(row=row) if row.engine == self.engine:
                self.rows[row.name] = row
                if row.name == self.contender:  # it begins anew: what was measured before does not count
                    self.finished = []
                return
            case EngineFailed(row=row) if row.engine == self.engine:
                if row.unavailable:
                    self.unavailable = row.unavailable
                else:
                    self.error, self.note, self.trial = row.error or "", "Could not run", None
            case _:
                return
        if self.trial:
            self.note = self._doing(self.trial)
        self.changed = True

    def _count(self, arrival: Arrival, index: int) -> None:
        assert self.trial is not None
        count = 1 if arrival.tokens is None else arrival.tokens
        at = arrival.at + index * self.trial.spacing
        if index == 0:
            if self.trial.sustained_seconds is not None and self.arrivals and arrival.at < self.arrivals[-1].at:
                self.arrivals = []  # this user's next request
            self.arrivals.append(arrival)
        if self.first_at is None:
            self.first_at, self.first_tokens = at, count
        self.last_at = max(at, self.last_at or 0.0)
        self.tokens += count

    def _doing(self, trial: Trial) -> str:
        row = self.rows.get(self.contender)
        words = f"{trial.words[:1].upper()}{trial.words[1:]}"
        if row and row.variant:
            words = f"With {row.variant}: {trial.words}"
        if self.many:
            words += f": {self.in_flight} in flight, {self.answered} answered"
        return words

    @property
    def many(self) -> bool:
        return self.trial is not None and (len(self.trial.prompts) > 1 or self.trial.sustained_seconds is not None)

    def close(self) -> None:
        """The run is over: show the repeats' average, of the variant that was measured last."""
        succeeded = len([row for row in self.finished if not row.timeline.error])
        variant = row.variant if (row := self.rows.get(self.contender)) else ""
        if succeeded and not self.many:
            self.note = f"Mean of {succeeded} run{'s' if succeeded > 1 else ''}"
            self.note += f" with {variant}" if variant else ""
            self.first_at = None
        elif succeeded:
            self.note = f"Last: {self._doing(self.trial) if self.trial else ''}"
        elif self.trial:
            self.note = "No complete answer"
            self.first_at = None
        self.changed = self.closed = True

    def tiles_due(self, now: float) -> bool:
        """Figures that change faster than they can be read are not sent; what stands at an answer's end always is."""
        if self.in_flight and not self.closed and now - self.tiles_shown_at < TILE_SECONDS:
            return False
        self.tiles_shown_at = now
        return True

    def messages(self, prompt: str) -> list[dict[str, Any]]:
        """The chatbot's messages: the prompt, and the answer so far or the reason why there is none."""
        prompt = self.trial.prompts[0] if self.trial else prompt
        answer = "".join(arrival.text for arrival in self.arrivals if not arrival.reasoning)
        thoughts = "".join(arrival.text for arrival in self.arrivals if arrival.reasoning)
        if thoughts:
            answer = f"*Thinking:* {thoughts}\n\n{answer}"
        shown = [{"role": "user", "content": shortened(prompt)}] if prompt else []
        if answer:
            shown.append({"role": "assistant", "content": readable(answer)})
        if self.error:
            shown.append({"role": "assistant", "content": f"⚠ {no_markdown(plain_line(self.error))}"})
        return shown

    def tiles_html(self) -> str:
        """Live figures of the trial under way; once the run is over, the means over the repeats."""
        if self.first_at is not None:
            values = self._live()
        else:
            done = [RequestMetrics(row.timeline) for row in self.finished if not row.timeline.error]
            values = {metric.name: Distribution.of(metric.read(one) for one in done).mean for metric in TILES}
        tiles = "".join(_tile(metric, values.get(metric.name)) for metric in TILES)
        reason = f"<div class='tiles-reason'>{escape(self.unavailable)}</div>" if self.unavailable else ""
        note = f"<div class='tiles-note'>{escape(self.note)}</div>"
        return f"{note}<div class='tiles'>{tiles}</div>{self.steps_html()}{reason}"

    def steps_html(self) -> str:
        """With speculation: the answer's pieces as they came, so that one sees which tokens came in one step."""
        row = self.rows.get(self.contender)
        if row is None or not row.config.get("speculation") or not self.arrivals:
            return ""
        pieces = "".join(
            f"<span class='step' data-tokens='{arrival.tokens or 1}' title='{arrival.tokens or 1} in one step'>"
            f"{escape(arrival.text[:LONGEST_PIECE])}</span>"
            for arrival in self.arrivals[:MOST_PIECES]
        )
        return f"<details class='steps' open><summary>What came in one step</summary><p>{pieces}</p></details>"

    def _live(self) -> dict[str, float | None]:
        assert self.first_at is not None and self.last_at is not None
        decoded = self.tokens - self.first_tokens
        passed = self.last_at - self.first_at
        tpot = passed / decoded if decoded > 0 and passed > 0 else None
        return {
            "ttft": self.first_at,
            "tpot": None if self.many else tpot,
            "decode_speed": 1 / tpot if tpot else None,
            "output_tokens": self.tokens,
            "e2e": self.last_at,
        }


def readable(answer: str) -> str:
    """An answer as the lane shows it: as long as a browser draws ten times a second, without a terminal's colours."""
    shown = without_html(ANSI.sub("", answer[:LONGEST_ANSWER]))
    left = len(answer) - LONGEST_ANSWER
    return shown if left <= 0 else f"{shown}\n\n… {left:,} more characters, all of which are in the JSON."


def without_html(markdown: str) -> str:
    """Markdown that makes no element of HTML and loads no picture, whoever draws it.

    Gradio's chatbot takes scripts out, but lets pictures of other hosts, forms and styles that cover the page stand. An
    invisible word joiner behind the "<" keeps a tag from being one, also where one reader of Markdown sees code and
    another does not; behind the "!" it leaves a link in a picture's place.
    """
    return PICTURE.sub("!\u2060[", TAG.sub("<\u2060", markdown))


def no_markdown(words: str) -> str:
    """So that they stay words where Markdown is drawn."""
    return MARKDOWN.sub(r"\\\g<0>", words)


def shortened(prompt: str, longest: int = 400) -> str:
    """A prompt as the lane shows it: the middle of a very long one left out."""
    if len(prompt) <= longest:
        return without_html(prompt)
    half = longest // 2
    return without_html(f"{prompt[:half]} … ({len(prompt.split()):,} words in all) … {prompt[-half:]}")


def _tile(metric: Metric, value: float | None) -> str:
    # Short, because it is sent several times a second; page.js knows each metric's tooltip.
    return (
        f"<div class='tile' data-metric='{metric.name}'><div class='name'>{escape(metric.label)}</div>"
        f"<div class='value'>{metric.shown(value)}</div><div class='unit'>{escape(metric.unit)}</div></div>"
    )
