"""Starts the app: `python app.py`. The engines install and start behind the page, which is up within seconds."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from demo_model.bundled import default_model, draft_model, model_label, model_note
from engines import ENGINES, engine_named
from engines.base import Engine, EngineError
from engines.environments import CACHE_VARIABLE
from engines.load import SILENCE_SECONDS
from engines.local import LocalHost
from engines.spending import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from engines.rented import RentedHost
    from engines.url_host import UrlHost
    from ui.public import PublicRules

HOSTS = ("local", "modal", "rehearsal", "url")
HOST_VARIABLE = "BAKEOFF_HOST"
BUDGET_VARIABLES = ("BAKEOFF_BUDGET_RUN", "BAKEOFF_BUDGET_VISITOR", "BAKEOFF_BUDGET_DAY")

# Seconds for which one thread may keep the others waiting; drawing a chart must not hold up fifty streams.
THREAD_TURN_SECONDS = 0.0005

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

log = logging.getLogger("bakeoff")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    start_logging()
    if options.cache:
        os.environ[CACHE_VARIABLE] = str(Path(options.cache).expanduser().resolve())
    asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked_to_end.set())
    try:
        rules = read_rules(options.public)
        host = make_host(options, rules)
    except (EngineError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    sys.setswitchinterval(THREAD_TURN_SECONDS)
    host.open()  # first, so that engines install while the page's own libraries load
    try:
        # Here, because importing Gradio takes seconds, which the engines put to use.
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        from experiments.library import RECORDINGS
        from ui.page import add_assets, build_app, largest_upload, middleware, warm
        from ui.public import Tally
        from ui.sharing import Previews
        from ui.theme import css, head, theme

        recordings = Path(options.recordings) if options.recordings else RECORDINGS
        tally = Tally(host.cache) if rules else None
        page = build_app(host, recordings, rules, tally)
        previews = Previews(host.cache / "results", recordings)
        server, url, _ = page.queue(default_concurrency_limit=None).launch(
            server_name=options.listen,
            server_port=options.port,
            share=options.share,
            inbrowser=options.open_browser,
            prevent_thread_lock=True,
            max_threads=page.max_threads,
            state_session_capacity=page.state_session_capacity,
            max_file_size=largest_upload(rules),
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css=css(),
            head=head(),
            app_kwargs={"middleware": middleware(previews, rules, tally)},
        )
        add_assets(server, host, host.cache / "results", recordings, previews)
        host.watch_pages()
        warm(page)
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


class _Printable(logging.Formatter):
    """An engine's words reach the terminal as text: what would move its cursor or name its window is written out."""

    def format(self, record: logging.LogRecord) -> str:
        return CONTROLS.sub(lambda found: repr(found.group())[1:-1], super().format(record))


def start_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for talkative in ("httpx", "httpx2"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


def make_host(options: argparse.Namespace, rules: PublicRules | None = None) -> LocalHost | RentedHost | UrlHost:
    """Where the engines run. `rules`: of a page that is open to all. Raises EngineError and ValueError for options that
    cannot be."""
    random = ""
    if options.random_weights:
        from experiments.prompt_words import random_model

        random = random_model(options.random_weights, options.model, options.host)
    if options.host == "local":
        model = random or str(options.model or default_model())
        draft = options.draft_model or draft_model(model)
        return LocalHost(
            _chosen_engines(options),
            model,
            model_label(model),
            model_note(model),
            str(draft) if draft else None,
            tensor_parallel=options.gpus,
            replicas=options.replicas,
            silence_seconds=options.silence,
            together=options.together,
        )
    if options.host == "url":
        from engines.url_host import UrlHost

        return UrlHost(public=rules is not None, allowed=rules.url_hosts if rules else None)
    return rented_host(
        options.host,
        _chosen_engines(options),
        options.model or "",
        Limits(options.budget_run, options.budget_visitor, options.budget_day),
        options.rehearsal_speed,
    )


def rented_host(kind: str, engines: tuple[Engine, ...], model: str, limits: Limits, speed: float = 1.0) -> RentedHost:
    """The modal package is loaded with the first container that is rented."""
    from engines.modal_cloud import ModalCloud
    from engines.rented import RentedHost
    from experiments.rehearsal import RehearsalCloud
    from experiments.wire import BUNDLED

    if kind == "rehearsal":
        return RentedHost(RehearsalCloud(speed=speed), engines, limits=limits, model=model or BUNDLED)
    return RentedHost(ModalCloud(), engines, limits=limits, model=model)


def hosted_on_modal() -> FastAPI:
    """The page as modal_app.py serves it: for the public, within the budgets that it was deployed with."""
    start_logging()
    host = rented_host("modal", ENGINES, "", Limits(*map(_dollars, BUDGET_VARIABLES)))
    from ui.page import mounted

    return mounted(host, rules=read_rules(hosted=True))


def read_rules(asked: bool = False, hosted: bool = False) -> PublicRules | None:
    """What a page that is open to everybody allows; None for a page of one's own. Raises ValueError."""
    from ui.public import public_rules

    return public_rules(asked, hosted=hosted)


def _dollars(variable: str) -> float | None:
    """The budget in a variable of the environment; None where it is not set. Raises ValueError."""
    value = os.environ.get(variable, "").strip()
    if not value:
        return None
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{variable} must be a number of dollars, not {value!r}.") from None


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError  # which argparse tells
    return seconds


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
    parser.add_argument(
        "--host",
        choices=HOSTS,
        default=os.environ.get(HOST_VARIABLE, "local"),
        help="where the engines run: on this machine, on GPUs rented from Modal, a rehearsal of the latter that "
        "replays recordings, needs no account and costs nothing, or servers that you name on the page (url) "
        f"(also the variable {HOST_VARIABLE})",
    )
    parser.add_argument("--model", help="a model's folder or its id on the model hub; the bundled one when left out")
    parser.add_argument("--draft-model", help="the draft model for speculation; the bundled model brings its own")
    parser.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help="a model of this shape (qwen3.5-4b, gemma-4-26b-a4b) with random weights, for a machine that no weights "
        "can be brought to: its speed is real, its text is not",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="engines share this machine's GPU, start at the same time and take turns, as they do on a CPU",
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of this machine that compute each token together")
    parser.add_argument(
        "--silence",
        type=_positive,
        default=SILENCE_SECONDS,
        metavar="SECONDS",
        help="without a byte of an answer after which an engine of this machine has failed (%(default)g; a long prompt "
        "on a slow machine needs it)",
    )
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model, each on GPUs of its own")
    budgets = zip(BUDGET_VARIABLES, ("one run", "one visitor per day", "all visitors per day"), strict=True)
    for variable, whose in budgets:
        parser.add_argument(
            f"--budget-{variable.rpartition('_')[2].lower()}",
            type=float,
            default=os.environ.get(variable) or (1.0 if whose == "one run" else None),
            metavar="DOLLARS",
            help=f"the most that {whose} may spend on rented GPUs (also the variable {variable})",
        )
    parser.add_argument(
        "--public",
        action="store_true",
        help="open to everybody: one line, limits for each visitor, no files, an owner with a token "
        "(also the variable BAKEOFF_PUBLIC; on in a Hugging Face Space and on Modal)",
    )
    parser.add_argument("--rehearsal-speed", type=float, default=1.0, help="of a rehearsal; 1: as it was recorded")
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
