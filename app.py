"""Starts the app: `python app.py`. The engines install and start behind the page, which is up within seconds."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from demo_model.bundled import default_model, draft_model, model_label, model_note
from engines import ENGINES, engine_named
from engines.base import Engine, EngineError
from engines.environments import CACHE_VARIABLE
from engines.local import LocalHost

log = logging.getLogger("bakeoff")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for talkative in ("httpx", "httpx2"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    if options.cache:
        os.environ[CACHE_VARIABLE] = str(Path(options.cache).expanduser().resolve())
    asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked_to_end.set())
    try:
        chosen = _chosen_engines(options)
        model = str(options.model or default_model())
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    draft = options.draft_model or draft_model(model)
    host = LocalHost(chosen, model, model_label(model), model_note(model), str(draft) if draft else None)
    host.open()  # first, so that engines install while the page's own libraries load
    try:
        # Here, because importing Gradio takes seconds, which the engines put to use.
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        from experiments.library import RECORDINGS
        from ui.page import add_assets, build_app
        from ui.theme import css, head, theme

        recordings = Path(options.recordings) if options.recordings else RECORDINGS
        page = build_app(host, recordings)
        server, url, _ = page.queue(default_concurrency_limit=None).launch(
            server_name=options.listen,
            server_port=options.port,
            share=options.share,
            inbrowser=options.open_browser,
            prevent_thread_lock=True,
            allowed_paths=[str(host.cache / "results")],
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css=css(),
            head=head(),
        )
        add_assets(server, host.cache / "results", recordings)
        host.watch_pages()
        print(f"\nThe page is up: {url}   (Ctrl-C ends it and its engines)\n", flush=True)
        asked_to_end.wait()
        page.close(verbose=False)
    except OSError as error:  # the page's own port is taken
        print(error, file=sys.stderr)
        return 1
    finally:
        log.info("ending: stopping the engines")
        host.close()
    return 0


def _chosen_engines(options: argparse.Namespace) -> tuple[Engine, ...]:
    if options.scripted:
        from engines.scripted import SCRIPTED_ENGINES

        return SCRIPTED_ENGINES
    return tuple(engine_named(name) for name in dict.fromkeys(options.engine)) if options.engine else ENGINES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Race LLM inference engines side by side.")
    parser.add_argument(
        "--engine", action="append", help="an engine to offer; may be given several times; default: all"
    )
    parser.add_argument("--scripted", action="store_true", help="race three scripted stand-ins, to work on the page")
    parser.add_argument("--model", help="a model's folder or its id on the model hub; the bundled one when left out")
    parser.add_argument("--draft-model", help="the draft model for speculation; the bundled model brings its own")
    parser.add_argument(
        "--cache", help=f"folder for environments, models and logs (also the variable {CACHE_VARIABLE})"
    )
    parser.add_argument("--recordings", help="folder of recorded runs to show; those that came with the app by default")
    parser.add_argument(
        "--listen", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address of the page"
    )
    parser.add_argument("--port", type=int, help="port of the page; 7860 or the next free one when left out")
    parser.add_argument("--share", action="store_true", help="make a public link through Gradio's own relay")
    parser.add_argument("--open-browser", action="store_true", help="open the page in this machine's browser")
    return parser


if __name__ == "__main__":
    sys.exit(main())
