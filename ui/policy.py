"""What a browser may do with the page, and how much may be sent to it: rules for every answer of the server."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from ui.public import SPACE_VARIABLE, PublicRules, Tally, Use, address_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# An answer, a log or a file of somebody's may hold a picture or a form that would tell another host who reads it.
# Gradio needs scripts inside the page and functions made from text; neither comes from anybody but us.
POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "media-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self' data: blob:",
    "worker-src": "'self' blob:",
    "frame-src": "'none'",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}
SPACE_SCRIPTS = "https://cdnjs.cloudflare.com"  # Hugging Face's frame around a Space is fitted by a script from there


# The page itself names its events by their numbers, as "predict".
BY_NAME = re.compile(r"/(call|run|api)/(?!predict/?$)[^/]")


class ContentPolicy:
    """Nothing is loaded from another host, and a link tells nobody where it stood."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        policy = dict(POLICY)
        if os.environ.get(SPACE_VARIABLE):
            policy["script-src"] += f" {SPACE_SCRIPTS}"
        self.headers = {
            "Content-Security-Policy": "; ".join(f"{what} {whence}" for what, whence in policy.items()),
            "Referrer-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in self.headers.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, told if scope["type"] == "http" else send)


class UploadLimit:
    """Refuses files before they are read: those of a visitor who has sent many, and those that are too large. Refuses
    calls of the page's events by their names, which Gradio answers although they are private."""

    def __init__(self, app: ASGIApp, rules: PublicRules, tally: Tally) -> None:
        self.app, self.rules, self.tally = app, rules, tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and BY_NAME.search(scope["path"]):
            await PlainTextResponse("This page has no interface for programs.", 404)(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client = scope["client"][0] if scope.get("client") else ""
        address = address_of(client, headers.get("x-forwarded-for", ""), self.rules.behind_proxy)
        wanted = Use(self.tally.name_of(address), uploads=1)
        refused = self.tally.refusal(self.rules, wanted)
        if refused:
            await PlainTextResponse(refused, 429)(scope, receive, send)
            return
        most = self.rules.upload_megabytes * 1_000_000 + 10_000  # with what a form adds around it
        said = headers.get("content-length", "")
        if not said.isdigit() or int(said) > most:
            words = f"A file may have {self.rules.upload_megabytes} MB here, and must say how large it is."
            await PlainTextResponse(words, 413)(scope, receive, send)
            return
        self.tally.add(wanted)
        await self.app(scope, receive, send)
