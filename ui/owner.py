"""The panel of the page's owner in public mode. The token stands in a field and goes with every press; nothing on the
server or in an address remembers that somebody is the owner."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from engines.rented import RentedHost
from engines.spending import dollars
from experiments.background import AnyHost
from experiments.result import ResultError
from ui.public import DAY, QUOTAS, Tally, Use
from ui.session import CLOSED_WORDS, Sessions
from ui.tab import problem_html, visitor_of

NOT_THE_OWNER = "This is not the owner's token."
TOO_MANY = "Too many wrong tokens came from your address. Try again in an hour."


class NotTheOwner(Exception):
    """In words for whoever pressed the button."""


def owners_panel(host: AnyHost, sessions: Sessions) -> None:
    """Build the panel and wire it. Only built where the page has an owner's token."""
    with gr.Accordion("For this page's owner", open=False, elem_id="owner"):
        token = gr.Textbox("", type="password", label="Token", max_lines=1, elem_id="owner-token")
        with gr.Row():
            today = gr.Button("What was used today", elem_id="owner-today", min_width=140)
            skip = gr.Button("Let my run be next", elem_id="owner-skip", min_width=140)
            close = gr.Button("Close runs for today", variant="stop", elem_id="owner-close", min_width=140)
            reopen = gr.Button("Open them again", elem_id="owner-open", min_width=140)
        with gr.Row():
            run = gr.Textbox(
                "", max_lines=1, label="Run to delete: its ID, as in its link", elem_id="owner-run", scale=3
            )
            delete = gr.Button("Delete", variant="stop", elem_id="owner-delete", scale=1, min_width=120)
        said = gr.HTML("", padding=False, elem_id="owner-said")

    def on_today(request: gr.Request, typed: str) -> str:
        return answered(sessions, request, typed, lambda: spending_html(host, sessions))

    def on_skip(request: gr.Request, typed: str) -> str:
        return answered(sessions, request, typed, lambda: skipped_html(sessions, request.session_hash or ""))

    def on_close(request: gr.Request, typed: str) -> str:
        return answered(sessions, request, typed, lambda: closed_html(sessions, True))

    def on_open(request: gr.Request, typed: str) -> str:
        return answered(sessions, request, typed, lambda: closed_html(sessions, False))

    def on_delete(request: gr.Request, typed: str, chosen: str) -> str:
        return answered(sessions, request, typed, lambda: deleted_html(sessions, chosen))

    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    today.click(on_today, token, said, **quiet)
    skip.click(on_skip, token, said, **quiet)
    close.click(on_close, token, said, **quiet)
    reopen.click(on_open, token, said, **quiet)
    delete.click(on_delete, [token, run], said, **quiet)


def answered(sessions: Sessions, request: gr.Request, typed: str, work: Any) -> str:
    """What the panel says: `work`'s words for the owner, and for nobody else."""
    try:
        check_owner(sessions, visitor_of(request, sessions), typed)
    except NotTheOwner as refused:
        return problem_html(str(refused))
    return str(work())


def check_owner(sessions: Sessions, visitor: str, typed: str) -> None:
    """Raises NotTheOwner, after a few wrong tokens without looking at them any more."""
    tally: Tally = sessions.tally
    if not tally.guesses_left(visitor):
        raise NotTheOwner(TOO_MANY)
    if sessions.rules is None or not sessions.rules.admits(typed):
        tally.add(Use(visitor, guesses=1))
        raise NotTheOwner(NOT_THE_OWNER)


def spending_html(host: AnyHost, sessions: Sessions) -> str:
    """The last 24 hours in numbers, and the money of this day."""
    uses = sessions.tally.within(DAY)
    visitors = len({use.visitor for use in uses if use.runs})
    told = ", ".join(f"{sum(getattr(use, one.field) for use in uses):,.0f} {one.words}" for one in QUOTAS)
    lines = [f"In the last 24 hours, by {visitors:,} visitors: {told}."]
    if isinstance(host, RentedHost):
        limit = host.limits.per_day
        of = "" if limit is None else f" of {dollars(limit)}"
        lines.append(
            f"Since midnight UTC: {dollars(host.ledger.today())}{of}, runs under way with what they may spend."
        )
    lines += [CLOSED_WORDS] if sessions.closed else []
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def skipped_html(sessions: Sessions, session: str) -> str:
    if sessions.to_front(session):
        return "<p>Your run is the next one.</p>"
    return problem_html("No run of this page waits in line: press Run first, on this same page.")


def closed_html(sessions: Sessions, closed: bool) -> str:
    sessions.close_for_today(closed)
    return f"<p>{CLOSED_WORDS if closed else 'Runs are open again.'}</p>"


def deleted_html(sessions: Sessions, run: str) -> str:
    try:
        sessions.library.delete((run or "").strip())
    except ResultError as error:
        return problem_html(str(error))
    return f"<p>Deleted {escape(run.strip())}.</p>"
