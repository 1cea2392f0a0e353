"""`make bench`: every client against the truth server in one run; writes a table, a figure and all numbers."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmark.cases import cases
from benchmark.compare import Score
from benchmark.measure import measure
from benchmark.report import OURS, figure, table, verdicts
from benchmark.running import RunningTruth
from benchmark.tools import CLIENTS, ReportError, python_of
from engines.base import EngineError
from engines.hardware import this_machine
from experiments.run import rotated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = [client.name for client in CLIENTS]
    parser.add_argument("--clients", default=",".join(known), help="with commas; all when left out")
    parser.add_argument("--cases", default="", help="with commas; all when left out")
    parser.add_argument("--seconds", type=float, default=5.0, help="of streaming per case")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; another client goes first in each")
    parser.add_argument("--out", type=Path, default=Path("results") / "benchmark", help="folder of what is written")
    parser.add_argument("--show", type=Path, help="show the numbers of this file again, and measure nothing")
    options = parser.parse_args()
    if options.show:
        value = json.loads(options.show.read_text(encoding="utf-8"))
        return tell([Score(**one) for one in value["scores"]], value["hardware"], value["date"], options.out)
    all_cases = cases(options.seconds)
    wanted = options.cases.split(",") if options.cases else [case.name for case in all_cases]
    chosen = [client for client in CLIENTS if client.name in options.clients.split(",")]
    if unknown := ({*options.clients.split(",")} - {*known}) | ({*wanted} - {case.name for case in all_cases}):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    pythons: dict[str, str] = {}
    for one in chosen:
        try:
            pythons[one.name] = python_of(one)
        except EngineError as error:
            print(f"{one.words} is left out: {error}", file=sys.stderr)
    scores: list[Score] = []
    failed = False
    with RunningTruth() as truth:
        for repeat in range(options.repeats):
            for case in all_cases:
                if case.name not in wanted:
                    continue
                for name in rotated(tuple(pythons), repeat):
                    client = next(one for one in chosen if one.name == name)
                    print(f"{case.words}: {client.words}", file=sys.stderr, flush=True)
                    try:
                        scores.append(measure(client, pythons[name], case, truth))
                    except ReportError as error:
                        print(error, file=sys.stderr)
                        failed = True
    return tell(scores, this_machine().words, f"{datetime.now(UTC):%Y-%m-%d}", options.out) or int(failed)


def tell(scores: list[Score], hardware: str, date: str, out: Path) -> int:
    """Prints the table, writes everything; 1 where ours is not as exact as it has to be."""
    out.mkdir(parents=True, exist_ok=True)
    value = {"hardware": hardware, "date": date, "scores": [asdict(score) for score in scores]}
    (out / "benchmark.json").write_text(json.dumps(value, indent=1), encoding="utf-8")
    (out / "benchmark.md").write_text(table(scores) + "\n", encoding="utf-8")
    print(f"{hardware}, {date}\n\n{table(scores)}\n")
    if chart := figure(scores, f"{hardware} · {date}"):
        chart.write_html(out / "benchmark.html", include_plotlyjs=True)
        print(f"figure, table and numbers: {out}")
    missed = verdicts(scores)
    if missed:
        print("\n".join(missed))
    elif any(score.client == OURS for score in scores):
        print("Ours is within 1 ms or 1 % of the truth in every case that was measured.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
