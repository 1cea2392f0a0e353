"""One lane per engine: its light, its answer, its numbers. Pure functions make the HTML; nothing here runs an engine.

Everything that comes from an engine or a visitor is escaped: logs, errors and names are hostile text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from engines.base import Engine
from engines.local import Status
from experiments.base import EngineFailed, RequestEnded, RequestStarted, TokensArrived
from experiments.metrics import METRICS, Distribution, Metric, RequestMetrics
from experiments.result import RequestRow

TILES = tuple(METRICS[name] for name in ("ttft", "decode_speed", "tpot", "output_tokens", "e2e"))
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


def build_lane(engine: Engine, status: Status) -> Lane:
    with gr.Column(elem_classes="lane", elem_id=f"lane-{engine.name}"):
        return Lane(
            engine=engine,
            head=gr.HTML(head_html(engine, status), padding=False, elem_id=f"head-{engine.name}"),
            chat=gr.Chatbot(
                label=f"{engine.label}'s answer",
                show_label=False,
                height=300,
                layout="bubble",
                buttons=["copy"],
                allow_tags=False,
                sanitize_html=True,
                feedback_options=None,
                placeholder=f"{engine.label}'s answer will stream here.",
                elem_id=f"chat-{engine.name}",
            ),
            tiles=gr.HTML(LaneView(engine.name).tiles_html(), padding=False, elem_id=f"tiles-{engine.name}"),
        )


def head_html(engine: Engine, status: Status) -> str:
    """Name, light and what it is doing now; a failure shows its reason and the tail of the engine's log."""
    words = LIGHT_WORDS[status.light]
    if status.phase:
        words += f": {status.phase}"
    moving = status.light in ("installing", "starting")
    state = f"<span class='words'>{escape(words)}</span>"
    if moving:
        state += f" · <span class='elapsed' data-elapsed='{status.elapsed():.1f}'>{status.elapsed():.0f} s</span>"
    elif status.start_seconds is not None and status.light in ("ready", "busy"):
        steps = "\n".join(f"{phase.name}: {phase.seconds:.1f} s" for phase in status.phases)
        state += f" · <span title='{escape(steps, quote=True)}'>started in {status.start_seconds:.0f} s</span>"
    parts = [
        f"<div class='lane-head' style='--engine:{engine.colour}'>",
        f"<div class='title'><span class='light {status.light}' role='img' "
        f"aria-label='{escape(LIGHT_WORDS[status.light])}'></span>{escape(engine.label)}",
        f"<span class='version'>{escape(status.version)}</span>" if status.version else "",
        f"</div><div class='state' role='status'>{state}</div>",
    ]
    if status.light == "failed":
        parts.append(f"<div class='state problem'>{escape(status.error)}</div>")
        if status.log_tail:
            parts.append(f"<details><summary>End of its log</summary><pre>{escape(status.log_tail)}</pre></details>")
        parts.append("<div class='state'>Press Run to try again.</div>")
    return "".join([*parts, "</div>"])


@dataclass(slots=True)
class LaneView:
    """What one lane shows of a run under way; `take` moves it on by one event. The display's own copy of the text."""

    engine: str
    note: str = ""
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    first_at: float | None = None
    last_at: float | None = None
    first_tokens: int = 0
    tokens: int = 0
    finished: list[RequestRow] = field(default_factory=list)
    error: str = ""
    changed: bool = False

    def take(self, event: object) -> None:
        match event:
            case RequestStarted(engine=self.engine, warmup=warmup, repeat=repeat, of=of):
                self.note = f"{'Warm-up' if warmup else 'Repeat'} {repeat} of {of}"
                self.texts, self.thoughts = [], []
                self.first_at = self.last_at = None
                self.first_tokens = self.tokens = 0
                self.error = ""
            case TokensArrived(engine=self.engine, arrival=arrival):
                (self.thoughts if arrival.reasoning else self.texts).append(arrival.text)
                count = 1 if arrival.tokens is None else arrival.tokens
                if self.first_at is None:
                    self.first_at, self.first_tokens = arrival.at, count
                self.last_at = arrival.at
                self.tokens += count
            case RequestEnded(row=row) if row.engine == self.engine:
                self.error = row.timeline.error or ""
                if not row.warmup:
                    self.finished.append(row)
            case EngineFailed(row=row) if row.name == self.engine:
                self.error = row.error or ""
                self.note = "Could not run"
            case _:
                return
        self.changed = True

    def close(self) -> None:
        """The run is over: show the repeats' average."""
        succeeded = len([row for row in self.finished if not row.timeline.error])
        if succeeded:
            self.note = f"Mean of {succeeded} repeat{'s' if succeeded > 1 else ''}"
        elif self.note and self.note != "Could not run":
            self.note = "No complete answer"
        self.changed = True
        self.first_at = None

    def messages(self, prompt: str) -> list[dict[str, Any]]:
        """The chatbot's messages: the prompt, and the answer so far or the reason why there is none."""
        answer = "".join(self.texts)
        if self.thoughts:
            answer = f"*Thinking:* {''.join(self.thoughts)}\n\n{answer}"
        shown = [{"role": "user", "content": prompt}]
        if answer:
            shown.append({"role": "assistant", "content": answer})
        if self.error:
            shown.append({"role": "assistant", "content": f"⚠ {self.error}"})
        return shown

    def tiles_html(self) -> str:
        """Live figures of the request under way; once it is over, the means over the repeats."""
        if self.first_at is not None:
            values = self._live()
        else:
            done = [RequestMetrics(row.timeline) for row in self.finished if not row.timeline.error]
            values = {metric.name: Distribution.of(metric.read(one) for one in done).mean for metric in TILES}
        tiles = "".join(_tile(metric, values.get(metric.name)) for metric in TILES)
        return f"<div class='tiles-note'>{escape(self.note)}</div><div class='tiles'>{tiles}</div>"

    def _live(self) -> dict[str, float | None]:
        assert self.first_at is not None and self.last_at is not None
        decoded = self.tokens - self.first_tokens
        passed = self.last_at - self.first_at
        tpot = passed / decoded if decoded > 0 and passed > 0 else None
        return {
            "ttft": self.first_at,
            "tpot": tpot,
            "decode_speed": 1 / tpot if tpot else None,
            "output_tokens": self.tokens,
            "e2e": self.last_at,
        }


def _tile(metric: Metric, value: float | None) -> str:
    explanation = escape(f"{metric.term}. {metric.explanation}", quote=True)
    return (
        f"<div class='tile' title='{explanation}' data-metric='{metric.name}'><div class='name'>{escape(metric.label)}"
        f"</div><div class='value'>{metric.shown(value)}</div><div class='unit'>{escape(metric.unit)}</div></div>"
    )
