"""Baseline. Question: how fast does each engine answer one person, with nothing switched on?

Mechanism: one request at a time, prefix caching and speculation off. With batch size one every token must read all
of the model's active weights once, so a perfect engine is bound by memory bandwidth, and what an engine adds per
token (Python, kernel launches, scheduling) is the difference that shows.

A surprise would be: an engine above the bandwidth's ceiling (then the count or the clock is wrong), or the naive
baseline ahead of both serving engines.
"""

from __future__ import annotations

from engines.spending import dollars
from experiments.base import (
    ANSWER_LENGTH,
    LENGTH_KIND,
    PRICE,
    PROMPT,
    RACE,
    REPEATS,
    WARMUPS,
    Chart,
    Contender,
    Experiment,
    Plan,
    Table,
    Trial,
    plain_contenders,
)
from experiments.drawing import START_CHART, bar_charts
from experiments.limits import COST_HEADING, dollars_per_million, limit_notes, of_ceiling
from experiments.metrics import METRICS, Distribution, ratio
from experiments.result import EngineRow, ExperimentResult
from experiments.telling import contender_table, listed, share
from experiments.trust import beyond_ceiling

TABLE_METRICS = ("decode_speed", "ttft", "tpot", "itl_p99", "e2e", "output_tokens")
SPEED, CACHED = METRICS["decode_speed"], METRICS["cached_tokens"]


def headline(result: ExperimentResult) -> str:
    """Who won, by how much, and whether the spread over repeats supports it."""
    doubtful = [row.label for row in result.engines if beyond_ceiling(result, row)]
    speeds = [(row, result.distribution(row.name, SPEED)) for row in result.engines if row.label not in doubtful]
    # By the mean that the ratios compare, so that one outlier cannot put an engine ahead of one it loses to.
    ranked = sorted(
        ((row, speed) for row, speed in speeds if speed.mean is not None),
        key=lambda pair: -(pair[1].geometric_mean or 0),
    )
    silent = [row.label for row, speed in speeds if speed.mean is None]
    missing = f" {listed(silent)} gave no speed that could be measured." if silent else ""
    if doubtful:
        missing += f" {listed(doubtful)} seems faster than memory allows, so that figure is not to be trusted."
    if not ranked:
        return "No engine gave an answer that could be measured." + (missing if len(silent) > 1 else "")
    (first, best), *others = ranked
    lead = f"{first.label} decodes {SPEED.shown(best.mean)} tok/s"
    if not others:
        return f"{lead}. There is nothing to compare it with.{missing}"
    sentences = [_compared(first, best, row, speed) for row, speed in others]
    return f"{lead}: {'; '.join(sentences)}.{missing}"


def _compared(first: EngineRow, best: Distribution, row: EngineRow, speed: Distribution) -> str:
    compared = ratio(best, speed)
    assert compared is not None  # both have values, and a speed is positive
    times = f"{compared.value:.2f}× {row.label} ({SPEED.shown(speed.mean)})"
    if compared.low is None or compared.high is None:
        return f"{times}, from too few repeats to say whether that would hold"
    interval = f"95 % interval {compared.low:.2f}–{compared.high:.2f}"
    if compared.supported:
        return f"{times}, and the spread over {len(best.values)} repeats supports it ({interval})"
    return f"no measurable difference from {row.label} ({SPEED.shown(speed.mean)}; {times.split()[0]}, {interval})"


def trials(plan: Plan, contenders: tuple[Contender, ...]) -> tuple[Trial, ...]:
    """Warm-ups, then the repeats, each one request."""
    return tuple(
        Trial(f"{'warm-up' if warmup else 'repeat'} {number} of {of}", number, warmup, (plan.prompt,))
        for warmup, of in ((True, plan.warmups), (False, plan.repeats))
        for number in range(1, of + 1)
    )


def table(result: ExperimentResult) -> Table:
    """What each engine reached, how close to the memory ceiling that is, and what a million tokens would cost so."""

    def reached(row: EngineRow) -> str:
        return share(of_ceiling(result, result.distribution(row.name, SPEED).mean))

    def cost(row: EngineRow) -> str:
        answers = [one.metrics for one in result.measured(row.name) if not one.timeline.error]
        tokens = sum(answer.output_tokens or 0 for answer in answers)
        seconds = sum(answer.e2e or 0.0 for answer in answers)
        return dollars(dollars_per_million(result, tokens / seconds if seconds else None))

    return contender_table(result, TABLE_METRICS, {"Of the memory ceiling": reached, COST_HEADING: cost})


def notes(result: ExperimentResult) -> list[str]:
    lengths = {
        row.title: result.distribution(row.name, METRICS["output_tokens"]).mean
        for row in result.engines
        if result.measured(row.name)
    }
    said = [*_on_caches(result), *limit_notes(result)]
    if len({length for length in lengths.values() if length is not None}) < 2:
        return said
    told = listed([f"{title} {length:.0f}" for title, length in lengths.items() if length is not None])
    differ = f"The answers differ in length ({told} tokens): compare times per token, not times of the whole answer."
    return [differ, *said]


def _on_caches(result: ExperimentResult) -> list[str]:
    """Somebody else's server keeps its caches on, and finds each repeat's prompt there."""
    most = [(row, result.distribution(row.name, CACHED).largest) for row in result.engines if row.as_it_is]
    return [
        f"{row.title} took up to {CACHED.shown(count)} tokens of the prompt from its cache, which nobody here can "
        "empty: its first tokens came sooner for it."
        for row, count in most
        if count
    ]


EXPERIMENT = Experiment(
    name="baseline",
    title="Baseline",
    question="How fast does each engine answer one person, with nothing switched on?",
    mechanism=(
        "One request at a time, prefix cache and speculation off. Every token has to read the whole model once, "
        "so what differs is what each engine adds around that."
    ),
    plan=Plan,
    settings=(PROMPT, REPEATS, WARMUPS, ANSWER_LENGTH, LENGTH_KIND, PRICE, RACE),
    contenders=plain_contenders,
    trials=trials,
    headline=headline,
    table=table,
    charts=(
        Chart("speed", "Speed and first token", lambda result: bar_charts(result, ("decode_speed", "ttft"))),
        START_CHART,
    ),
    notes=notes,
)
