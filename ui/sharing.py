"""What a link to the page carries: the words and the picture that other sites show beside it."""

from __future__ import annotations

import re
from collections import OrderedDict
from html import escape
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.routing import Route

from experiments.library import RECORDINGS, Library
from experiments.preview import preview_png
from experiments.report import headline
from experiments.result import ExperimentResult, ResultError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TITLE = "LLM Inference Bake-Off"
ABOUT = "Which LLM inference engine is faster for this model on this hardware, by how much, and is the difference real?"
GRADIO_S_OWN = re.compile(rb"""<meta\s+(property|name)=["'](og|twitter|description)[:"'][^>]*>""")
KEPT = 32  # pictures; one takes 80 kB
SHOWN_FIRST = "baseline"  # whose newest recording stands for the page itself

# Runs in the visitor's browser: `text` into the clipboard, also where the page came without TLS. Gives the button's
# new words, or the old ones where nothing could be copied.
COPY_SCRIPT = """
async (text, words) => {
  if (!text) return words;
  try { await navigator.clipboard.writeText(text); return 'Copied'; } catch (refused) {
    const area = document.createElement('textarea');
    area.value = text; area.style.position = 'fixed'; document.body.append(area); area.select();
    const done = document.execCommand('copy'); area.remove();
    return done ? 'Copied' : words;
  }
}
"""


class Previews:
    """The words and the picture of runs, made once each."""

    def __init__(self, results: Path, recordings: Path = RECORDINGS) -> None:
        self.library = Library(results, recordings)
        self._made: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._guard = Lock()  # one at a time: a crowd that follows one link needs one picture

    def of(self, run: str) -> tuple[str, bytes]:
        """Sentence and PNG of a run, of the page's own for no run; raises ResultError where there is none."""
        with self._guard:
            if run in self._made:
                self._made.move_to_end(run)
                return self._made[run]
            result = self._result(run)
            made = (headline(result), preview_png(result))
            if run:  # what stands for the page changes with the recordings
                self._made[run] = made
                while len(self._made) > KEPT:
                    self._made.popitem(last=False)
            return made

    def _result(self, run: str) -> ExperimentResult:
        if run:
            return self.library.load(run)
        recorded = [entry for entry in self.library.entries(SHOWN_FIRST) if entry.recorded]
        if not recorded:
            raise ResultError("There is no recording to show.")
        return self.library.load(recorded[0].id)

    def route(self) -> Route:
        """`/preview.png` is the page's own picture, with `?run=ID` that of a run."""

        def send(request: Request) -> Response:  # no coroutine, so that drawing holds up nobody's stream
            try:
                _, picture = self.of(request.query_params.get("run", ""))
            except ResultError as error:
                return Response(str(error), 404)
            return Response(picture, media_type="image/png", headers={"Cache-Control": "max-age=3600"})

        return Route("/preview.png", send)


class SocialTags:
    """Puts a run's words and picture into the head of the page, for whoever reads the link without a browser."""

    def __init__(self, app: ASGIApp, previews: Previews) -> None:
        self.app, self.previews = app, previews

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        started: Message | None = None
        body = b""

        async def changed(message: Message) -> None:
            nonlocal started, body
            if message["type"] == "http.response.start":
                started = message
                return
            assert started is not None and message["type"] == "http.response.body"
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            headers = MutableHeaders(raw=started["headers"])
            if headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers:
                body = GRADIO_S_OWN.sub(b"", body)
                body = body.replace(b"</head>", self._tags(scope).encode() + b"</head>", 1)
                headers["content-length"] = str(len(body))
            await send(started)
            await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, changed)

    def _tags(self, scope: Scope) -> str:
        run = next(iter(parse_qs(scope.get("query_string", b"").decode("latin-1")).get("run", [])), "")
        about = ABOUT
        if run:
            try:
                about = headline(self.previews.library.load(run))
            except ResultError:
                run = ""  # the page itself says that there is no such run
        base, query = _address(scope), f"?run={run}" if run else ""
        tags = {
            "og:type": "website",
            "og:title": TITLE,
            "og:description": about,
            "og:url": f"{base}/{query}",
            "og:image": f"{base}/preview.png{query}",
            "og:image:width": "1200",
            "og:image:height": "630",
            "twitter:card": "summary_large_image",
        }
        listed = "".join(
            f'<meta property="{name}" content="{escape(value, quote=True)}">' for name, value in tags.items()
        )
        return f'<meta name="description" content="{escape(about, quote=True)}">{listed}'


def _address(scope: dict[str, Any] | Scope) -> str:
    """Under which the visitor sees the page, also behind a proxy."""
    headers = Headers(scope=scope)
    scheme = headers.get("x-forwarded-proto", scope.get("scheme", "http")).partition(",")[0].strip()
    host = headers.get("x-forwarded-host", headers.get("host", "")).partition(",")[0].strip()
    return f"{'https' if scheme == 'https' else 'http'}://{host}{scope.get('root_path', '')}"
