"""The command line: `python -m experiments baseline --engine vllm --engine sglang --host local --out results/`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from demo_model.bundled import default_model, draft_model, model_label, model_note
from engines import ENGINES
from engines.base import Engine, EngineError
from engines.cloud import GPU_CHOICES
from engines.compatible import PRESETS
from engines.local import LocalHost
from engines.modal_cloud import ModalCloud
from engines.random_weights import SHAPES
from engines.rented import RentedHost
from engines.spending import Limits
from engines.url_host import UrlHost
from experiments import EXPERIMENTS
from experiments.background import AnyHost, measure
from experiments.base import Event, Experiment, Host, Plan, PlanError, RequestEnded, RunEnded, Setting, TrialStarted
from experiments.metrics import METRICS
from experiments.prompt_words import random_model
from experiments.rehearsal import RehearsalCloud
from experiments.rented import Rent, RentedMachine, read_rent
from experiments.report import text_table
from experiments.result import ExperimentResult
from experiments.resume import measured_already, measured_something
from experiments.servers import MOST_SERVERS, POLITE_USERS, NamedServer, look_for_models, read_run, servers_of
from experiments.wire import BUNDLED

SERIES = "series"
RENT_FIELDS = tuple(field.name for field in fields(Rent))

log = logging.getLogger("bakeoff")


def main(
    arguments: list[str] | None = None,
    engines: tuple[Engine, ...] = ENGINES,
    experiments: tuple[Experiment, ...] = EXPERIMENTS,
) -> int:
    options = _parser(engines, experiments).parse_args(arguments)
    series = options.experiment == SERIES
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    names = tuple(dict.fromkeys(options.engine or [engine.name for engine in engines]))  # each once
    chosen = [experiment for experiment in experiments if options.experiment in (experiment.name, "all")]
    plans: list[tuple[Experiment, Plan, Host]] = []
    try:
        asked = read_series(Path(options.file), names, engines, experiments) if series else []
        host = _host(options, tuple(engine for engine in engines if engine.name in names))
        if isinstance(host, UrlHost):
            if series:
                raise PlanError("file", "A series keeps our engines loaded: it goes not with --host url.")
            servers = _servers(options)
            if options.look:
                return _look(servers)
            plans += [(one, *read_run(one, host, servers, vars(options))) for one in chosen]
        else:
            # When an answer ends, the weights' values decide: random ones must not.
            random = isinstance(host, LocalHost) and host.random_weights
            asked += [(one, names, vars(options)) for one in chosen]
            for one, theirs, values in asked:
                values |= {"fixed_length": True} if random else {}
                plans.append((one, one.read_plan(theirs, values), _machine(one, host, options)))
    except (PlanError, EngineError) as error:
        print(error, file=sys.stderr)
        return 2
    out, codes = Path(options.out), [0]
    try:
        for experiment, plan, machine in plans:
            measured = {} if options.again else measured_already([(experiment, plan)], machine, out)
            if path := measured.get(experiment.name):
                log.info("%s: measured already, in %s; --again measures anew", experiment.title, path)
            else:
                codes.append(_measure(experiment, plan, machine, out))
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        host.close()
    return max(codes)


def read_series(
    file: Path, names: tuple[str, ...], engines: tuple[Engine, ...], experiments: tuple[Experiment, ...]
) -> list[tuple[Experiment, tuple[str, ...], dict[str, Any]]]:
    """Experiment, engines and settings of each line; empty ones and what follows a # are passed over.

    Raises PlanError that names the line.
    """
    parser = _LineParser(prog="a line", add_help=False)
    which = parser.add_subparsers(dest="experiment", required=True, metavar="experiment")
    for experiment in experiments:
        one = which.add_parser(experiment.name, add_help=False)
        one.add_argument("--engine", action="append", choices=names)
        for setting in experiment.settings:
            _add_setting(one, setting)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        raise PlanError("file", f"The series {file} cannot be read: {failure}") from failure
    by_name = {experiment.name: experiment for experiment in experiments}
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line, comments=True)
            if words:
                values = vars(parser.parse_args(words))
                theirs = tuple(dict.fromkeys(values.pop("engine") or names))
                found.append((by_name[values.pop("experiment")], theirs, values))
        except ValueError as mistake:
            raise PlanError("file", f"{file}, line {number}: {mistake}") from mistake
    if not found:
        raise PlanError("file", f"The series {file} asks for nothing: a line of it is an experiment and its settings.")
    return found


class _LineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _host(options: argparse.Namespace, engines: tuple[Engine, ...]) -> AnyHost:
    """Where the engines run. Raises EngineError."""
    random = random_model(options.random_weights, options.model, options.host) if options.random_weights else ""
    if options.together and options.host != "local":
        raise EngineError("--together is for engines that share this machine's GPU: leave it out with --host.")
    if options.host == "url":
        return UrlHost()
    if options.host != "local":
        cloud = RehearsalCloud() if options.host == "rehearsal" else ModalCloud()
        model = options.model or (BUNDLED if options.host == "rehearsal" else "")
        return RentedHost(cloud, engines, limits=Limits(), model=model)
    model = random or str(options.model or default_model())
    draft = options.draft_model or draft_model(model)
    return LocalHost(
        engines,
        model,
        model_label(model),
        model_note(model),
        str(draft) if draft else None,
        tensor_parallel=options.gpu_count or 1,
        replicas=options.replicas or 1,
        together=options.together,
    )


def _servers(options: argparse.Namespace) -> tuple[NamedServer, ...]:
    """The servers that were named. A key is read from the environment: on a command line everybody could see it.
    Raises PlanError."""
    keys = {}
    for named in options.key_variable or []:
        name, _, variable = named.rpartition("=")
        if not os.environ.get(variable):
            raise PlanError("key_variable", f"The variable {variable} is not set, or empty.")
        keys[name] = os.environ[variable]
    return servers_of(options.server or [], options.model or "", options.server_model or [], keys, options.preset or [])


def _look(servers: tuple[NamedServer, ...]) -> int:
    """Say which models the servers have; 1 where one cannot be asked."""
    code = 0
    for server in servers:
        looked = asyncio.run(look_for_models(server))
        print(f"{server.title} ({server.url.base_url}): {looked.words}")
        print("".join(f"  {model}\n" for model in looked.models), end="")
        code = code or int(looked.problem)
    return code


def _machine(experiment: Experiment, host: LocalHost | RentedHost, options: argparse.Namespace) -> Host:
    """What this experiment runs on. Raises PlanError for what cannot be rented."""
    if not isinstance(host, RentedHost):
        return host
    typed = {name: value for name, value in vars(options).items() if value is not None and name in RENT_FIELDS}
    return RentedMachine(host, read_rent(experiment.name, host, typed), "the command line")


def _measure(experiment: Experiment, plan: Plan, host: Host, out: Path) -> int:
    """0 when something was measured, 1 when nothing was, 2 for a plan that this host cannot run."""
    ended: list[ExperimentResult] = []

    def emit(event: Event) -> None:
        _tell(event)
        if isinstance(event, RunEnded):
            ended.append(event.result)

    def keep(so_far: ExperimentResult) -> None:
        try:
            so_far.save(out)
        except OSError as failure:  # the measuring goes on: the whole result may still find room
            log.warning("what was measured so far could not be written to %s: %s", out, failure)

    try:
        asyncio.run(measure(experiment, plan, host, emit, keep=keep))
    except PlanError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if ended and measured_something(ended[-1]):
            _show(ended[-1], out)
        raise
    _show(ended[-1], out)  # also one of failures alone: it says why
    return 0 if measured_something(ended[-1]) else 1


def _show(result: ExperimentResult, out: Path) -> None:
    print(text_table(result))
    print(f"\nWritten to {result.save(out)}")


def _interrupt(number: int, frame: object) -> None:
    """A plain `kill` ends the engines in order, as Ctrl-C does."""
    raise KeyboardInterrupt


def _parser(engines: tuple[Engine, ...], experiments: tuple[Experiment, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Measure inference engines.")
    which = parser.add_subparsers(dest="experiment", required=True, metavar="experiment")
    for experiment in experiments:
        one = which.add_parser(experiment.name, help=experiment.question, description=experiment.mechanism)
        _common_options(one, engines)
        for setting in experiment.settings:
            _add_setting(one, setting)
        one.set_defaults(again=True)  # who asks for one experiment wants it measured
    every = which.add_parser("all", help="every experiment, with its default settings unless others are given")
    _common_options(every, engines)
    shared = {setting.name: setting for one in reversed(experiments) for setting in one.settings}
    for name in sorted(shared.keys() - {"prompt"}):  # each experiment has questions of its own
        _add_setting(every, shared[name], default=argparse.SUPPRESS)  # what is not given is as each experiment has it
    one_by_one = which.add_parser(
        SERIES,
        help="the experiments that a file asks for, one a line, with engines that stay loaded from one to the next",
    )
    one_by_one.add_argument(
        "file", help="each line is an experiment and its settings as they stand here, such as: baseline --repeats 5"
    )
    _common_options(one_by_one, engines)
    for several in (every, one_by_one):
        several.add_argument(
            "--again", action="store_true", help="measure also what a result in the --out folder answers already"
        )
    return parser


def _common_options(parser: argparse.ArgumentParser, engines: tuple[Engine, ...]) -> None:
    parser.add_argument(
        "--engine",
        action="append",
        choices=[engine.name for engine in engines],
        help="an engine to measure; may be given several times; all of them when left out",
    )
    parser.add_argument(
        "--host",
        choices=["local", "modal", "rehearsal", "url"],
        default="local",
        help="where the engines run: here, on GPUs rented from Modal, a rehearsal of that with recordings, or servers "
        "that are named by --server",
    )
    parser.add_argument("--model", help="a model's folder or its id on the hub; the bundled one when left out")
    parser.add_argument("--draft-model", help="a draft model's folder or id; the bundled one's own when left out")
    parser.add_argument(
        "--random-weights",
        choices=[shape.name for shape in SHAPES],
        help="local: a model of this shape with random weights, for a machine that no weights can be brought to: its "
        "speed is real, its text is not, and its answers have an exact length",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="local: the engines share the GPU's memory, start at the same time and take turns, as they do on a CPU",
    )
    parser.add_argument("--out", default="results", help="folder for the result's JSON")
    gpus = [choice.exactly for choice in GPU_CHOICES]
    parser.add_argument("--gpu", choices=gpus, help="rented: the GPU of each engine; as the experiment suggests")
    parser.add_argument("--gpus", dest="gpu_count", type=int, help="GPUs that compute each token together; 1")
    parser.add_argument("--replicas", type=int, help="copies of the model, each on GPUs of its own; 1")
    parser.add_argument("--keep", dest="keep_seconds", type=int, help="rented: seconds to keep idle containers; 0")
    parser.add_argument("--budget", type=float, help="rented: the most that an experiment may cost, in $; 1")
    parser.add_argument("--snapshot", action="store_true", help="rented: start engines from a picture of their memory")
    parser.add_argument(
        "--server", action="append", metavar="NAME=URL", help=f"url: a server; up to {MOST_SERVERS} times"
    )
    parser.add_argument(
        "--server-model", action="append", metavar="NAME=MODEL", help="url: a server's model; else the only one"
    )
    kinds = ", ".join(preset.name for preset in PRESETS)
    parser.add_argument("--preset", action="append", metavar="NAME=KIND", help=f"url: what a server is: {kinds}")
    parser.add_argument(
        "--key-variable",
        action="append",
        metavar="NAME=VARIABLE",
        help="url: the variable of the environment that holds a server's key; without a name: the only server's",
    )
    parser.add_argument("--look", action="store_true", help="url: only say which models the servers have")
    parser.add_argument("--most-users", type=int, help=f"url: users at once, at most; {POLITE_USERS}")


def _add_setting(parser: argparse.ArgumentParser, setting: Setting, default: object = None) -> None:
    """A setting as an option: a switch, or a choice between yes and no, is a flag that --no- in front turns off."""
    flag, told = f"--{setting.option}", f"{setting.label}. {setting.info}".replace("%", "%%")
    default, values = setting.default if default is None else default, tuple(setting.choices.values())
    if setting.kind == "switch" or set(values) == {True, False}:
        parser.add_argument(flag, dest=setting.name, action=argparse.BooleanOptionalAction, default=default, help=told)
    elif setting.kind == "choice":
        named = [value for value in values if value is not None]
        parser.add_argument(flag, dest=setting.name, choices=named, default=default, help=told)
    else:
        reading = {"whole": int, "number": float}.get(setting.kind, str)
        parser.add_argument(flag, dest=setting.name, type=reading, default=default, help=told)


def _tell(event: Event) -> None:
    if isinstance(event, TrialStarted):
        log.info("%s: %s (%d of %d)", event.engine, event.trial.words, event.done + 1, event.of)
    elif isinstance(event, RequestEnded):
        row = event.row
        shown = (METRICS["decode_speed"], METRICS["ttft"])
        outcome = ", ".join(metric.shown_with_unit(metric.read(row.metrics)) for metric in shown)
        log.info("%s: %s", row.engine, row.timeline.error or outcome)


if __name__ == "__main__":
    sys.exit(main())
