"""Concurrency. Question: how many people can each engine serve at once, and what does each feel of the others?

Mechanism: for one request the processor mostly waits for the model's weights. With continuous batching every step
takes all requests along that are there, so one reading of the weights yields a token for each: the output of all
grows, until arithmetic or cache memory runs out. An engine that answers one request at a time keeps the others
waiting in a queue: its output stays flat, and the last one waits for everybody before it.

A surprise would be: more output than the spacing of arrivals allows, a naive queue whose output grows with its users,
or a wait for the first token that does not grow once the output has stopped growing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engines.spending import dollars
from experiments.base import (
    ANSWER_LENGTH,
    LENGTH_KIND,
    PRICE,
    PROMPT,
    REPEATS,
    WARMUPS,
    Chart,
    Contender,
    Experiment,
    Host,
    Plan,
    Setting,
    Table,
    Trial,
    checked,
    plain_contenders,
)
from experiments.drawing import START_CHART
from experiments.level_charts import flight_chart, in_flight_chart, throughput_chart, ttft_chart
from experiments.levels import (
    E2E,
    LEVELS,
    MOST_LIMIT_MS,
    MOST_SECONDS,
    MOST_SPACING_MS,
    MOST_USERS,
    SEQUENTIAL_SECONDS,
    TPOT,
    TTFT,
    ConcurrencyPlan,
    LevelPoint,
    called,
    is_sequential,
    limits_words,
    most_users,
    plan_of,
    points,
    times_one_user,
    too_long,
    users,
    waited,
)
from experiments.limits import COST_HEADING, dollars_per_million, limit_notes, of_ceiling
from experiments.metrics import MILLISECONDS, Distribution, ratio
from experiments.result import EngineRow, ExperimentResult
from experiments.telling import listed, runs, share

WARM_TOKENS = 16  # of a warm-up's answers: enough for the shapes of a batch, and over soon


# What is run


def contenders(plan: Plan, host: Host) -> tuple[Contender, ...]:
    """Every engine as it is, and the one that queues by default with continuous batching too."""
    found: list[Contender] = []
    for plain in plain_contenders(plan, host):
        found.append(plain)
        if is_sequential(plain.key):
            changes = {"continuous_batching": True}
            batching = Contender(f"{plain.key}+batching", plain.engine, "continuous batching", changes, plain.key)
            found.append(checked(batching, host))
    return tuple(found)


def levels_measured(plan: ConcurrencyPlan, key: str) -> tuple[int, ...]:
    """The levels at which this contender is measured; the naive queue at least with one user, to extrapolate from."""
    levels = tuple(sorted(set(plan.levels)))
    if not is_sequential(key) or plan.measure_all:
        return levels
    return tuple(level for level in levels if level <= plan.sequential_limit) or (1,)


def trials(plan: Plan, contenders: tuple[Contender, ...]) -> tuple[Trial, ...]:
    """Level by level: warm-ups with as many users as will be measured, then every repeat.

    What answers one request at a time computes the same with any number of users, so it is warmed up once.
    """
    assert isinstance(plan, ConcurrencyPlan)
    measured = {contender.key: set(levels_measured(plan, contender.key)) for contender in contenders}
    found = []
    for level in sorted(set().union(*measured.values())):
        keys = tuple(key for key, levels in measured.items() if level in levels)
        cold = tuple(key for key in keys if not is_sequential(key) or level == min(measured[key]))
        for taking_part, warmup, of in ((cold, True, plan.warmups), (keys, False, plan.repeats)):
            if taking_part:
                found += [_trial(plan, level, taking_part, warmup, number, of) for number in range(1, of + 1)]
    return tuple(found)


def _trial(plan: ConcurrencyPlan, level: int, keys: tuple[str, ...], warmup: bool, number: int, of: int) -> Trial:
    sustained = plan.load == "sustained"
    return Trial(
        f"{users(level)}, {'warm-up' if warmup else 'repeat'} {number} of {of}",
        number,
        warmup,
        (plan.prompt,) * level,
        group=str(level),
        spacing=0.0 if warmup or sustained else plan.spacing_ms / MILLISECONDS,  # a warm-up's batch is to be full
        sustained_seconds=plan.seconds if sustained and not warmup else None,
        only=keys,
        max_tokens=min(WARM_TOKENS, plan.max_tokens) if warmup else None,
    )


# What it says


def headline(result: ExperimentResult) -> str:
    """Output at the largest level that was measured, and how many users are served within the limits."""
    by_row = [(row, points(result, row)) for row in result.engines]
    measured = [
        point.level
        for _, found in by_row
        for point in found
        if not point.extrapolated and point.tokens_per_second is not None
    ]
    silent = [
        called(row)
        for row, found in by_row
        if not row.unavailable and all(point.tokens_per_second is None for point in found)
    ]
    missing = f" {listed(silent)} gave no output that could be measured." if silent else ""
    if not measured:
        return "No engine gave output that could be measured." + (missing if len(silent) > 1 else "")
    level = max(measured)
    there = [
        (point.tokens_per_second, row, point, found)
        for row, found in by_row
        for point in found
        if point.level == level and point.tokens_per_second is not None
    ]
    there.sort(key=lambda one: -one[0])
    (output, first, best, found), *others = there
    gain = times_one_user(best, found) if level > 1 else None
    told = "" if gain is None else f", {gain:.1f}× its own single-user speed"
    told += " (extrapolated)" if best.extrapolated else ""
    parts = [f"At {users(level)} {called(first)} delivers {output:,.0f} tok/s{told}"]
    for output, row, point, found in others:
        gain = times_one_user(point, found) if level > 1 else None
        words = [f"{gain:.1f}×"] if gain is not None else []
        words += ["extrapolated"] if point.extrapolated else []
        compared = ratio(Distribution(best.outputs), Distribution(point.outputs))
        if compared and compared.low is not None and not compared.supported:
            words.append("no measurable difference")
        parts.append(f"{called(row)} {output:,.0f}" + (f" ({', '.join(words)})" if words else ""))
    return f"{'; '.join(parts)}. {_served(result, by_row)}{missing}"


def _served(result: ExperimentResult, by_row: list[tuple[EngineRow, list[LevelPoint]]]) -> str:
    served = [(most, called(row)) for row, found in by_row if (most := most_users(found))]
    if not served:
        return f"Nobody keeps to {limits_words(plan_of(result))} with any number of users that was measured."
    (most, name), *others = sorted(served, key=lambda one: -one[0])
    words = [f"{name} serves up to {users(most)}", *(f"{other} up to {count}" for count, other in others)]
    return f"{listed(words)} within {limits_words(plan_of(result))}."


HEADINGS = (
    ["Engine", "Users", "Output", "× one user"]
    + [f"{TTFT.label} {name}" for name in ("p50", "p95", "p99")]
    + [f"{E2E.label} {name}" for name in ("p50", "p95")]
    + [f"{TPOT.label} p50", "Within limits", "Good requests", "Of the memory ceiling", COST_HEADING, "Failed"]
)


def table(result: ExperimentResult) -> Table:
    """One row per contender and level, times from the planned arrival; what is extrapolated has a ≈."""
    rows = []
    for row in result.engines:
        found = points(result, row)
        rows += [[row.title, *_cells(result, row, point, found)] for point in found]
        if not found:
            rows.append([row.title, runs(result, row)[0], *["–"] * (len(HEADINGS) - 2)])
    return Table(list(HEADINGS), rows)


def _cells(result: ExperimentResult, row: EngineRow, point: LevelPoint, points: Sequence[LevelPoint]) -> list[str]:
    spread = f" ±{point.spread:,.0f}" if point.spread else ""
    output = "–" if point.tokens_per_second is None else f"{point.tokens_per_second:,.0f}{spread} tok/s"
    gain = times_one_user(point, points)
    numbers = [
        output,
        "–" if gain is None else f"{gain:.1f}×",
        *(waited(value) for value in (point.ttft_p50, point.ttft_p95, point.ttft_p99)),
        *(E2E.shown_with_unit(value) for value in (point.e2e_p50, point.e2e_p95)),
        TPOT.shown_with_unit(point.tpot_p50),
        share(point.slo_share),
        "–" if point.goodput is None else f"{point.goodput:.2f}/s",
        share(of_ceiling(result, point.tokens_per_second, 1 if is_sequential(row.name) else point.level)),
        dollars(dollars_per_million(result, point.tokens_per_second)),
        "–" if point.failed is None else str(point.failed),
    ]
    if point.extrapolated:
        return [f"{point.level}, extrapolated", *(word if word == "–" else f"≈ {word}" for word in numbers)]
    return [str(point.level), *numbers]


def notes(result: ExperimentResult) -> list[str]:
    plan, by_row = plan_of(result), [(row, points(result, row)) for row in result.engines]
    said = [
        "p50, p95 and p99: what 50, 95 and 99 of 100 successful requests stay within, counted from the moment at which "
        f"each was meant to arrive. Good requests keep to {limits_words(plan)}."
    ]
    for row, found in by_row:
        levels = [str(point.level) for point in found if point.extrapolated]
        if levels:
            said.append(
                f"{called(row)} answers one request at a time. Its values for {listed(levels)} users are "
                "extrapolated (≈): a queue in which each answer takes as long as it took one user alone."
            )
        left_out = [str(point.level) for point in found if point.extrapolated and point.level <= plan.sequential_limit]
        if left_out:
            said.append(
                f"{called(row)} was not measured with {listed(left_out)} users because all their answers, one after "
                f"the other, would have taken more than {SEQUENTIAL_SECONDS:g} s."
            )
        unsteady = [str(point.level) for point in found if point.tokens_per_second is None]
        if unsteady and plan.load == "sustained":
            said.append(
                f"{called(row)}: with {listed(unsteady)} users not all had a first token within {plan.seconds:g} s, "
                "so there is no steady state to measure. A longer duration may help."
            )
    if plan.load == "sustained":
        said.append(
            "Output and good requests are those of the steady state; waits include the start, when all ask at once."
        )
    return said + limit_notes(result)


EXPERIMENT = Experiment(
    name="concurrency",
    title="Concurrency",
    question="How many people can each engine serve at once, and how long do they wait?",
    mechanism=(
        "One reading of the model's weights can yield a token for every request in the batch. With continuous batching "
        "a new request joins at the next step, so the output grows with the users; a naive queue makes them wait."
    ),
    plan=ConcurrencyPlan,
    settings=(
        PROMPT,
        Setting(
            "levels",
            "wholes",
            "Users at once",
            "Each number is measured on its own (concurrency levels), with commas between them.",
            ", ".join(map(str, LEVELS)),
        ),
        Setting(
            "load",
            "choice",
            "How do they ask?",
            "A wave fills and drains; sustained users give the speed while all are served (closed loop, steady state).",
            "wave",
            choices={"Each once, one after the other (wave)": "wave", "Again and again (sustained)": "sustained"},
        ),
        Setting(
            "spacing_ms",
            "number",
            "Time between arrivals, ms",
            "For a wave. It limits the output: 10 requests per second at 100 ms (offered load).",
            100,
            0,
            MOST_SPACING_MS,
            10,
        ),
        Setting("seconds", "number", "Duration, s", "For sustained users, per number of users.", 20, 1, MOST_SECONDS),
        Setting(
            "sequential_limit",
            "whole",
            "Naive queue up to so many users",
            "HF Transformers answers one at a time; above this its values are extrapolated, to save hours.",
            8,
            1,
            MOST_USERS,
            group="measure",
        ),
        Setting(
            "measure_all",
            "switch",
            "Measure the naive queue in full",
            "Nothing is extrapolated. The last of 128 users may wait for many minutes.",
            False,
            group="measure",
        ),
        Setting(
            "slo_ttft_ms",
            "number",
            "Limit for the first token, ms",
            "A good request keeps to it (service level objective, SLO, for TTFT).",
            200.0,
            1,
            MOST_LIMIT_MS,
            group="measure",
        ),
        Setting(
            "slo_tpot_ms",
            "number",
            "Limit per token, ms",
            "A good request keeps to it on average (SLO for TPOT). Good requests per second are the goodput.",
            50.0,
            0.1,
            MOST_LIMIT_MS,
            0.1,
            group="measure",
        ),
        replace(REPEATS, default=1, info="Measured runs per engine and number of users; more narrow the spread."),
        replace(
            WARMUPS,
            default=1,
            info="Rounds before them that do not count: as many users, short answers.",
        ),
        replace(ANSWER_LENGTH, default=128),
        replace(LENGTH_KIND, default=True),
        PRICE,
    ),
    contenders=contenders,
    trials=trials,
    headline=headline,
    table=table,
    charts=(
        Chart("throughput", "Output over users", throughput_chart),
        Chart("ttft", "Wait for the first token", ttft_chart),
        Chart("flight", "Every request", flight_chart),
        Chart("in_flight", "Requests in flight", in_flight_chart),
        START_CHART,
    ),
    notes=notes,
    too_long=too_long,
)
