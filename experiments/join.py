"""Puts runs of the same plan into one result: `python -m experiments.join one.json other.json --out results/`.

Engines that each need a GPU of their own may be measured in runs of their own, side by side or on different days. What
was measured is left as it is; the result says that it was joined, and of what.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.library import read
from experiments.result import ExperimentResult, ResultError, new_id


def joined(results: Sequence[ExperimentResult]) -> ExperimentResult:
    """One result with the contenders of all, in their order. Raises ResultError for runs that do not belong together.

    Each contender's times stay on its own run's clock, as nothing is compared across contenders by the clock.
    """
    if len(results) < 2:
        raise ResultError("There is nothing to join: name two runs or more.")
    first = results[0]
    for other in results[1:]:
        if difference := _difference(first, other):
            raise ResultError(f"{first.id} and {other.id} do not belong together: they differ in {difference}.")
    names = [row.name for result in results for row in result.engines]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ResultError(f"More than one of the runs has {', '.join(twice)}: whose numbers count cannot be told.")
    engines = tuple(dict.fromkeys(name for result in results for name in result.settings["engines"]))
    label = f"Joined of {len(results)} runs in which the engines were measured apart: " + ", ".join(
        f"{result.id} ({', '.join(row.title for row in result.engines)})" for result in results
    )
    return replace(
        first,
        id=new_id(first.experiment),
        started=min(result.started for result in results),
        settings={**first.settings, "engines": list(engines)},
        engines=tuple(row for result in results for row in result.engines),
        requests=tuple(row for result in results for row in result.requests),
        trials=tuple(row for result in results for row in result.trials),
        labels=(*dict.fromkeys(label for result in results for label in result.labels), f"{label}."),
        stopped_early=any(result.stopped_early for result in results),
    )


def _difference(one: ExperimentResult, other: ExperimentResult) -> str:
    """In words, the first thing that keeps two runs from being compared; empty where there is none."""
    apart = {"engines"}
    settings = [{key: value for key, value in result.settings.items() if key not in apart} for result in (one, other)]
    same = {
        "the experiment": one.experiment == other.experiment,
        "the host": one.host == other.host,
        "the hardware": one.hardware == other.hardware,
        "the model": (one.model, one.model_shape) == (other.model, other.model_shape),
        "the settings": settings[0] == settings[1],
    }
    return next((words for words, equal in same.items() if not equal), "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.join", description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="+", type=Path, help="a run's JSON")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the joined run's JSON")
    options = parser.parse_args(arguments)
    try:
        whole = joined([read(path) for path in options.file])
        print(f"Written to {whole.save(options.out)}")
    except (ResultError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
