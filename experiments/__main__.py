"""The command line: `python -m experiments baseline --engine vllm --engine sglang --host local --out results/`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from demo_model.bundled import default_model, model_label, model_note
from engines import ENGINES
from engines.base import Engine, EngineError
from engines.local import LocalHost
from experiments import EXPERIMENTS_BY_NAME
from experiments.base import DEFAULT_PROMPT, Event, Plan, PlanError, RequestEnded, RunEnded
from experiments.metrics import METRICS
from experiments.report import text_table
from experiments.result import ExperimentResult
from experiments.run import run


def main(arguments: list[str] | None = None, engines: tuple[Engine, ...] = ENGINES) -> int:
    options = _parser(engines).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _interrupt)
    names = tuple(dict.fromkeys(options.engine or [engine.name for engine in engines]))  # each once
    try:
        plan = Plan(
            prompt=options.prompt,
            engines=names,
            repeats=options.repeats,
            warmups=options.warmups,
            max_tokens=options.tokens,
            fixed_length=not options.natural_stop,
            race=options.race,
        )
        model = str(options.model or default_model())
    except (PlanError, EngineError) as error:
        print(error, file=sys.stderr)
        return 2
    host = LocalHost(
        [engine for engine in engines if engine.name in names], model, model_label(model), model_note(model)
    )
    ended: list[ExperimentResult] = []

    def emit(event: Event) -> None:
        _tell(event)
        if isinstance(event, RunEnded):
            ended.append(event.result)

    interrupted = False
    try:
        asyncio.run(run(EXPERIMENTS_BY_NAME[options.experiment], plan, host, emit))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        host.close()
    measured = bool(ended) and _measured_something(ended[-1])
    if interrupted:
        print("Stopped.", file=sys.stderr)
    if ended and (measured or not interrupted):  # also one of failures alone: it says why
        print(text_table(ended[-1]))
        print(f"\nWritten to {ended[-1].save(Path(options.out))}")
    return 130 if interrupted else 0 if measured else 1


def _interrupt(number: int, frame: object) -> None:
    """A plain `kill` ends the engines in order, as Ctrl-C does."""
    raise KeyboardInterrupt


def _parser(engines: tuple[Engine, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Measure inference engines.")
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS_BY_NAME))
    parser.add_argument(
        "--engine",
        action="append",
        choices=[engine.name for engine in engines],
        help="an engine to measure; may be given several times; all of them when left out",
    )
    parser.add_argument("--host", choices=["local"], default="local", help="where the engines run")
    parser.add_argument("--model", help="a model's folder or its id on the hub; the bundled one when left out")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="length of the answer")
    parser.add_argument("--natural-stop", action="store_true", help="let the model end its answer by itself")
    parser.add_argument("--race", action="store_true", help="all engines at once instead of in turn")
    parser.add_argument("--out", default="results", help="folder for the result's JSON")
    return parser


def _tell(event: Event) -> None:
    if isinstance(event, RequestEnded):
        row = event.row
        kind = "warm-up" if row.warmup else "repeat"
        speed, first = METRICS["decode_speed"], METRICS["ttft"]
        outcome = row.timeline.error or ", ".join(
            metric.shown_with_unit(metric.read(row.metrics)) for metric in (speed, first)
        )
        logging.getLogger("bakeoff").info("%s: %s %d: %s", row.engine, kind, row.repeat, outcome)


def _measured_something(result: ExperimentResult) -> bool:
    return any(not row.timeline.error for engine in result.engines for row in result.measured(engine.name))


if __name__ == "__main__":
    sys.exit(main())
