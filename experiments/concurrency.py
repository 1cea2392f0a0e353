"""Concurrency. Question: how many people can each engine serve at once, and what does each feel of the others?

Mechanism: for one request the processor mostly waits for the model's weights. With continuous batching every step
takes all requests along that are there, so one reading of the weights yields a token for each: the output of all
grows, until arithmetic or cache memory runs out. An engine that answers one request at a time keeps the others
waiting in a queue: its output stays flat, and the last one waits for everybody before it.

A surprise would be: more output than the spacing of arrivals allows, a naive queue whose output grows with its users,
or a wait for the first token that does not grow once the output has stopped growing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from experiments.base import (
    ANSWER_LENGTH,
    LENGTH_KIND,
    PROMPT,
    REPEATS,
    WARMUPS,
    Chart,
    Contender,
    Experiment,
    Host,
    Plan,
    PlanError,
    Setting,
    Table,
    Trial,
    check_number,
    check_whole,
    checked,
    plain_contenders,
)
from experiments.drawing import INK, PLOT_PIXELS, bar_label, colour_of, styled
from experiments.metrics import METRICS, MILLISECONDS, Distribution
from experiments.result import EngineRow, ExperimentResult, RequestRow
from experiments.telling import listed, runs, share

if TYPE_CHECKING:
    import plotly.graph_objects

Load = Literal["wave", "sustained"]
LEVELS = (1, 4, 8, 16, 32, 64, 128)
MOST_USERS, MOST_SPACING_MS, MOST_SECONDS, MOST_LIMIT_MS = 512, 10_000, 600, 600_000
WARM_LEVEL = 8  # as many at once before anything counts, so that batch shapes are compiled by then
SERVED_SHARE = 0.99  # of the requests must be within the limits for a level to count as served
LATE_SECONDS = 0.02  # of the load generator's own delay from which on it is mentioned
SEQUENTIAL = "transformers"
TTFT, TPOT, E2E = METRICS["ttft"], METRICS["tpot"], METRICS["e2e"]


@dataclass(frozen=True, slots=True)
class ConcurrencyPlan(Plan):
    """`levels`: how many users at once, one level after the other.

    A "wave" is one request per user, `spacing_ms` apart; "sustained" users ask again at once for `seconds`. The engine
    that answers one request at a time is measured up to `sequential_limit` users, with `measure_all` at every level.
    `slo_ttft_ms` and `slo_tpot_ms`: the limits that a good answer keeps to.
    """

    repeats: int = 1
    warmups: int = 1
    max_tokens: int = 128
    fixed_length: bool = True
    levels: tuple[int, ...] = LEVELS
    spacing_ms: float = 100
    load: Load = "wave"
    seconds: float = 20
    sequential_limit: int = 8
    measure_all: bool = False
    slo_ttft_ms: float = 200.0
    slo_tpot_ms: float = 50.0

    def __post_init__(self) -> None:
        super(ConcurrencyPlan, self).__post_init__()
        if not self.levels:
            raise PlanError("levels", "Type at least one number of users.")
        for level in self.levels:
            check_whole("levels", "Users", level, 1, MOST_USERS)
        check_number("spacing_ms", "Time between arrivals", self.spacing_ms, 0, MOST_SPACING_MS)
        if self.load not in get_args(Load):
            raise PlanError("load", f"The load must be one of {listed(get_args(Load))}, not {self.load}.")
        check_number("seconds", "Duration", self.seconds, 1, MOST_SECONDS)
        check_whole("sequential_limit", "Users of the naive queue", self.sequential_limit, 1, MOST_USERS)
        check_number("slo_ttft_ms", "Limit for the first token", self.slo_ttft_ms, 1, MOST_LIMIT_MS)
        check_number("slo_tpot_ms", "Limit per token", self.slo_tpot_ms, 0.1, MOST_LIMIT_MS)


def plan_of(result: ExperimentResult) -> ConcurrencyPlan:
    """The plan that a result was measured by; what it does not say is as by default."""
    known = {field.name for field in fields(ConcurrencyPlan)}
    said = {name: value for name, value in result.settings.items() if name in known}
    return ConcurrencyPlan(**{"prompt": "unknown", "engines": ("unknown",), **said})


# What is run


def is_sequential(key: str) -> bool:
    """Whether this contender answers one request at a time.

    `transformers serve` does (measured: a flat 160 tok/s from 1 to 32 requests); its continuous batching is a
    contender of its own, and the other engines cannot do without.
    """
    return key == SEQUENTIAL


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
    """Warm-ups at the smallest level and, for what batches, with eight users; then level by level every repeat."""
    assert isinstance(plan, ConcurrencyPlan)
    measured = {contender.key: set(levels_measured(plan, contender.key)) for contender in contenders}
    warming = {
        key: {min(levels)} if is_sequential(key) else {min(levels), min(WARM_LEVEL, max(levels))}
        for key, levels in measured.items()
    }
    return tuple(
        _trial(plan, level, tuple(key for key in by_key if level in by_key[key]), warmup, number, of)
        for warmup, of, by_key in ((True, plan.warmups, warming), (False, plan.repeats, measured))
        for level in sorted(set().union(*by_key.values()))
        for number in range(1, of + 1)
    )


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
    )


def users(level: int) -> str:
    return "1 user" if level == 1 else f"{level} users"


# What the numbers mean. Moments are seconds on the run's clock.


@dataclass(frozen=True, slots=True)
class LevelPoint:
    """One contender with one number of users. Times are seconds from the planned arrival; unknown is None.

    `goodput`: requests per second within both limits; `slo_share`: their share of all, failed ones included.
    `spread`: half of the 95 % confidence interval of `tokens_per_second` over the repeats.
    """

    level: int
    tokens_per_second: float | None
    ttft_p50: float | None
    ttft_p95: float | None
    ttft_p99: float | None
    e2e_p50: float | None
    e2e_p95: float | None
    e2e_p99: float | None
    tpot_p50: float | None
    failed: int | None
    goodput: float | None
    slo_share: float | None
    extrapolated: bool
    spread: float | None = None


def planned(row: RequestRow) -> float:
    """When the request was meant to be sent."""
    return row.timeline.sent if row.planned is None else row.planned


def ended(row: RequestRow) -> float:
    """When the last token came; of a failed request, when it had failed."""
    timeline = row.timeline
    last = timeline.arrivals[-1].at if timeline.arrivals else 0.0
    return timeline.sent + ((timeline.closed or last) if timeline.error else last)


def finished_trials(result: ExperimentResult, name: str, level: int) -> list[list[RequestRow]]:
    """The requests of each measured trial that came to its end: one that was stopped says nothing about a load."""
    repeats = sorted(
        trial.repeat
        for trial in result.trials
        if (trial.engine, trial.group, trial.warmup) == (name, str(level), False)
    )
    rows = result.measured(name, str(level))
    found = [[row for row in rows if row.repeat == repeat] for repeat in repeats]
    return [trial for trial in found if trial]


def token_moments(row: RequestRow) -> list[tuple[float, float]]:
    """(moment, tokens) of each arrival; together they are the answer's output tokens.

    Where the server did not say how many tokens each chunk carries, every chunk gets an equal share.
    """
    arrivals, total = row.timeline.arrivals, row.metrics.output_tokens
    if not arrivals or total is None:
        return []
    said = [arrival.tokens for arrival in arrivals if arrival.tokens is not None]
    counts: list[float] = list(said) if len(said) == len(arrivals) else [total / len(arrivals)] * len(arrivals)
    counts[-1] += total - sum(counts)  # an end-of-text token brings no text with it
    return [(row.timeline.sent + arrival.at, count) for arrival, count in zip(arrivals, counts, strict=True)]


def wave_window(trial: Sequence[RequestRow]) -> tuple[float, float] | None:
    """From the first planned arrival to the last token of an answer that succeeded."""
    ends = [ended(row) for row in trial if not row.timeline.error]
    return (min(map(planned, trial)), max(ends)) if ends else None


def steady_window(trial: Sequence[RequestRow], seconds: float) -> tuple[float, float] | None:
    """From the moment when every user has had a first token to the planned end, when the first user stops.

    Before and after it fewer users are being answered than the level says. None where that never was the case.
    """
    first: dict[int, float] = {}
    for row in trial:
        if row.timeline.arrivals:
            moment = row.timeline.sent + row.timeline.arrivals[0].at
            first[row.index] = min(first.get(row.index, moment), moment)
    if len(first) < len({row.index for row in trial}):
        return None
    start, end = max(first.values()), min(map(planned, trial)) + seconds
    return (start, end) if start < end else None


def within_limits(ttft: float | None, tpot: float | None, plan: ConcurrencyPlan) -> bool:
    """Whether an answer that began after `ttft` s and went on at `tpot` s per token is a good one."""
    if ttft is None or ttft * MILLISECONDS > plan.slo_ttft_ms:
        return False
    return tpot is None or tpot * MILLISECONDS <= plan.slo_tpot_ms  # None: after the first nothing was waited for


def is_good(row: RequestRow, plan: ConcurrencyPlan) -> bool:
    return not row.timeline.error and within_limits(row.metrics.planned_ttft, row.metrics.tpot, plan)


def rates(trial: Sequence[RequestRow], plan: ConcurrencyPlan) -> tuple[float | None, float | None]:
    """(tok/s, good requests/s) of one trial: output tokens that came, and good answers that ended, inside the window
    / its length. The window is the whole wave, under a sustained load its steady state. Failed requests give neither.
    """
    window = steady_window(trial, plan.seconds) if plan.load == "sustained" else wave_window(trial)
    if window is None or window[0] >= window[1]:
        return None, None
    start, end = window
    answered = [row for row in trial if not row.timeline.error]
    tokens = sum(count for row in answered for moment, count in token_moments(row) if start < moment <= end)
    good = sum(start < ended(row) <= end and is_good(row, plan) for row in answered)
    return tokens / (end - start), good / (end - start)


def in_flight(rows: Iterable[RequestRow]) -> list[tuple[float, int]]:
    """(s since the first planned arrival, requests in flight from then on): those that should have been sent, and
    have neither ended nor failed."""
    rows = list(rows)
    if not rows:
        return []
    begin = min(map(planned, rows))
    # At the same moment one ends before another begins, so that users who ask again do not count twice.
    changes = sorted([*((planned(row) - begin, 1) for row in rows), *((ended(row) - begin, -1) for row in rows)])
    steps: dict[float, int] = {}
    count = 0
    for moment, change in changes:
        count += change
        steps[moment] = count
    return list(steps.items())


def arrival_ceiling(result: ExperimentResult, level: int) -> float | None:
    """tok/s that no engine can exceed, because the last of N requests arrives (N - 1) * spacing s after the first:
    N * tokens / ((N - 1) * spacing + smallest E2E). None where arrivals are not spaced."""
    plan = plan_of(result)
    answered = [row for engine in result.engines for row in result.measured(engine.name) if not row.timeline.error]
    tokens = Distribution.of(row.metrics.output_tokens for row in answered).largest
    quickest = Distribution.of(row.metrics.planned_e2e for row in answered).smallest
    if plan.load == "sustained" or not plan.spacing_ms or tokens is None or not quickest:
        return None
    return level * tokens / ((level - 1) * plan.spacing_ms / MILLISECONDS + quickest)


def level_point(result: ExperimentResult, name: str, level: int) -> LevelPoint | None:
    """What was measured: percentiles over the successful requests of all repeats, the mean of each repeat's rates."""
    plan, trials = plan_of(result), finished_trials(result, name, level)
    rows = [row for trial in trials for row in trial]
    if not rows:
        return None
    answered = [row for row in rows if not row.timeline.error]
    measured = [rates(trial, plan) for trial in trials]
    output = Distribution.of(tokens for tokens, _ in measured)
    return LevelPoint(
        level,
        output.mean,
        *_percentiles(Distribution.of(row.metrics.planned_ttft for row in answered)),
        *_percentiles(Distribution.of(row.metrics.planned_e2e for row in answered)),
        Distribution.of(row.metrics.tpot for row in answered).median,
        len(rows) - len(answered),
        Distribution.of(good for _, good in measured).mean,
        sum(is_good(row, plan) for row in rows) / len(rows),
        extrapolated=False,
        spread=output.half_width,
    )


def _percentiles(values: Distribution) -> tuple[float | None, float | None, float | None]:
    return values.median, values.percentile(95), values.percentile(99)


def queued(arrivals: Iterable[float], service: float, until: float = 0.0) -> list[tuple[float, float]]:
    """(arrival, start) of each request of a queue that serves one at a time, `service` s each, first come first served:
    a request starts at its arrival or when the one before it has ended, whichever is later. Whoever is answered
    before `until` asks again at once."""
    waiting, free = deque(arrivals), 0.0
    served: list[tuple[float, float]] = []
    while waiting:
        arrival = waiting.popleft()
        start = max(arrival, free)
        free = start + service
        served.append((arrival, start))
        if free < until:
            waiting.append(free)
    return served


def lone_answers(result: ExperimentResult, name: str) -> list[RequestRow]:
    """Successful answers that had nobody before them: all with one user, else the first at the smallest level."""
    for level in sorted(_levels_in(result, name)):
        trials = finished_trials(result, name, level)
        alone = [row for trial in trials for row in (trial if level == 1 else [min(trial, key=planned)])]
        if answered := [row for row in alone if not row.timeline.error]:
            return answered
    return []


def extrapolated_point(result: ExperimentResult, name: str, level: int) -> LevelPoint | None:
    """What a queue of `level` users would give, each served as long as one user alone is (E2E p50).

    TTFT and E2E are the wait in the queue plus those of one user alone; tok/s = all tokens / when the last one ends.
    """
    plan, alone = plan_of(result), [row.metrics for row in lone_answers(result, name)]
    service = Distribution.of(metrics.e2e for metrics in alone).median
    first = Distribution.of(metrics.ttft for metrics in alone).median
    tpot = Distribution.of(metrics.tpot for metrics in alone).median
    tokens = Distribution.of(metrics.output_tokens for metrics in alone).mean
    if not service or first is None or tokens is None:
        return None
    sustained = plan.load == "sustained"
    spacing = 0.0 if sustained else plan.spacing_ms / MILLISECONDS
    served = queued((place * spacing for place in range(level)), service, plan.seconds if sustained else 0.0)
    waits = [start - arrival for arrival, start in served]
    seconds = served[-1][1] + service
    good = [within_limits(wait + first, tpot, plan) for wait in waits]
    steady = good[-1:] if sustained else good  # once all are waiting, everybody waits for all others
    return LevelPoint(
        level,
        len(served) * tokens / seconds,
        *_percentiles(Distribution.of(wait + first for wait in waits)),
        *_percentiles(Distribution.of(wait + service for wait in waits)),
        tpot,
        None,  # whether a long queue makes requests fail, nobody has seen
        sum(steady) / len(steady) * len(served) / seconds,
        sum(good) / len(good),
        extrapolated=True,
    )


def points(result: ExperimentResult, row: EngineRow) -> list[LevelPoint]:
    """One point per level that was measured or, for the naive queue alone, can be extrapolated."""
    found = []
    for level in sorted({*plan_of(result).levels, *_levels_in(result, row.name)}):
        point = level_point(result, row.name, level)
        if point is None and is_sequential(row.name):
            point = extrapolated_point(result, row.name, level)
        if point:
            found.append(point)
    return found


def _levels_in(result: ExperimentResult, name: str) -> set[int]:
    return {int(row.group) for row in result.measured(name)}


def times_one_user(point: LevelPoint, points: Sequence[LevelPoint]) -> float | None:
    """tok/s / tok/s of the same contender with one user."""
    alone = next((one.tokens_per_second for one in points if one.level == 1), None)
    return point.tokens_per_second / alone if point.tokens_per_second is not None and alone else None


def most_users(points: Iterable[LevelPoint]) -> int | None:
    """The largest measured level at which no request failed and 99 % were within the limits."""
    served = [
        point.level
        for point in points
        if not point.extrapolated and not point.failed and point.slo_share is not None
        if point.slo_share >= SERVED_SHARE
    ]
    return max(served, default=None)


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
        _called(row)
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
    (output, first, point, found), *others = there
    gain = times_one_user(point, found) if level > 1 else None
    told = "" if gain is None else f", {gain:.1f}× its own single-user speed"
    told += " (extrapolated)" if point.extrapolated else ""
    parts = [f"At {users(level)} {_called(first)} delivers {output:,.0f} tok/s{told}"]
    for output, row, point, found in others:
        gain = times_one_user(point, found) if level > 1 else None
        words = [f"{gain:.1f}×"] if gain is not None else []
        words += ["extrapolated"] if point.extrapolated else []
        parts.append(f"{_called(row)} {output:,.0f}" + (f" ({', '.join(words)})" if words else ""))
    return f"{'; '.join(parts)}. {_served(result, by_row)}{missing}"


def _served(result: ExperimentResult, by_row: list[tuple[EngineRow, list[LevelPoint]]]) -> str:
    served = [(most, _called(row)) for row, found in by_row if (most := most_users(found))]
    if not served:
        return f"Nobody keeps to {_limits(plan_of(result))} with any number of users that was measured."
    (most, name), *others = sorted(served, key=lambda one: -one[0])
    words = [f"{name} serves up to {users(most)}", *(f"{other} up to {count}" for count, other in others)]
    return f"{listed(words)} within {_limits(plan_of(result))}."


def _limits(plan: ConcurrencyPlan) -> str:
    return f"{plan.slo_ttft_ms:g} ms to the first token and {plan.slo_tpot_ms:g} ms per token"


def _called(row: EngineRow) -> str:
    """In a sentence, where a comma would read as a list."""
    return f"{row.label} with {row.variant}" if row.variant else row.label


HEADINGS = (
    ["Engine", "Users", "Output", "× one user"]
    + [f"{TTFT.label} {name}" for name in ("p50", "p95", "p99")]
    + [f"{E2E.label} {name}" for name in ("p50", "p95")]
    + [f"{TPOT.label} p50", "Within limits", "Good requests", "Failed"]
)


def table(result: ExperimentResult) -> Table:
    """One row per contender and level, times from the planned arrival; what is extrapolated has a ≈."""
    rows = []
    for row in result.engines:
        found = points(result, row)
        rows += [[row.title, *_cells(point, found)] for point in found]
        if not found:
            rows.append([row.title, runs(result, row)[0], *["–"] * (len(HEADINGS) - 2)])
    return Table(list(HEADINGS), rows)


def _cells(point: LevelPoint, points: Sequence[LevelPoint]) -> list[str]:
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
        "–" if point.failed is None else str(point.failed),
    ]
    if point.extrapolated:
        return [f"{point.level}, extrapolated", *(word if word == "–" else f"≈ {word}" for word in numbers)]
    return [str(point.level), *numbers]


def waited(seconds: float | None) -> str:
    """A wait in ms, and in s where a thousand ms would be hard to read."""
    if seconds is not None and seconds >= 10:
        return f"{seconds:,.1f} s"
    return TTFT.shown_with_unit(seconds)


def notes(result: ExperimentResult) -> list[str]:
    plan, by_row = plan_of(result), [(row, points(result, row)) for row in result.engines]
    said = [
        "p50, p95 and p99: what 50, 95 and 99 of 100 successful requests stay within, counted from the moment at which "
        f"each was meant to arrive. Good requests keep to {_limits(plan)}."
    ]
    for row, found in by_row:
        levels = [str(point.level) for point in found if point.extrapolated]
        if levels:
            said.append(
                f"{_called(row)} answers one request at a time. Its values for {listed(levels)} users are "
                "extrapolated (≈): a queue in which each answer takes as long as it took one user alone."
            )
        unsteady = [str(point.level) for point in found if point.tokens_per_second is None]
        if unsteady and plan.load == "sustained":
            said.append(
                f"{_called(row)}: with {listed(unsteady)} users not all had a first token within {plan.seconds:g} s, "
                "so there is no steady state to measure. A longer duration may help."
            )
    if plan.load == "sustained":
        said.append(
            "Output and good requests are those of the steady state; waits include the start, when all ask at once."
        )
    late = Distribution.of(row.metrics.lateness for row in result.requests if not row.warmup).largest
    if late is not None and late > LATE_SECONDS:
        said.append(
            f"The load generator itself was up to {late * MILLISECONDS:,.0f} ms late; that delay is part of the waits."
        )
    return said


# What is drawn

FAILED_COLOUR = "#DC2626"
LABEL_PIXELS, LABEL_MARGIN = 17, 170  # height of one line of a label, width that labels take right of the plot
LEAST_FLIGHT_PIXELS, MOST_FLIGHT_PIXELS = 5, 640
EXTRAPOLATED_WORDS = "dashed and hollow: extrapolated from one user alone"
CEILING_WORDS = "limit set by the spacing of arrivals"
SINCE = "seconds from the first planned arrival"
Span = Callable[[LevelPoint], tuple[float, float, float]]  # low end of the whisker, value, high end


def throughput_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """tok/s of all users together over the number of users."""
    import plotly.graph_objects as go

    def span(point: LevelPoint) -> tuple[float, float, float]:
        value, spread = point.tokens_per_second or 0.0, point.spread or 0.0
        return value - spread, value, value + spread

    def words(point: LevelPoint, found: Sequence[LevelPoint]) -> str:
        gain = times_one_user(point, found)
        return f"{span(point)[1]:,.0f} tok/s" + (f", {gain:.1f}× one user" if gain else "")

    lines = _lines(result, lambda point: point.tokens_per_second)
    if not lines:
        return None
    chart = go.Figure([trace for row, found in lines for trace in _traces(row, found, span, words)])
    levels = _level_axis(chart, lines)
    top = 1.15 * max(span(point)[2] for _, found in lines for point in found)
    ceilings = [(level, ceiling) for level in levels if (ceiling := arrival_ceiling(result, level))]
    if ceilings:
        # Far above the lines it would flatten them, so it may leave the picture at the top.
        top = max(top, min(1.1 * ceilings[-1][1], 1.5 * top))
        level, ceiling = next((one for one in reversed(ceilings) if one[1] < 0.95 * top), ceilings[0])
        chart.add_scatter(
            x=[level for level, _ in ceilings],
            y=[ceiling for _, ceiling in ceilings],
            mode="lines",
            name=CEILING_WORDS,
            line={"color": INK, "dash": "dot", "width": 1.5},
            hovertemplate=f"{CEILING_WORDS}<br>%{{y:,.0f}} tok/s<extra></extra>",
        )
        side = "left" if level == levels[0] else "right"
        _written(chart, level, min(ceiling, top), CEILING_WORDS, xanchor=side, yanchor="bottom")
    _end_labels(chart, [(row, found[-1], span(found[-1])[1]) for row, found in lines], 0, top)
    chart.update_yaxes(title="tok/s", range=[0, top])
    chart.update_layout(title="Output of all users together", showlegend=False)
    return _with_room_for_labels(chart, result, _load_words(result), lines)


def ttft_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """Wait for the first token over the number of users, median with a whisker to p95, beside its limit."""
    import plotly.graph_objects as go

    def span(point: LevelPoint) -> tuple[float, float, float]:
        middle = (point.ttft_p50 or 0.0) * MILLISECONDS
        return middle, middle, (point.ttft_p95 or 0.0) * MILLISECONDS

    def words(point: LevelPoint, found: Sequence[LevelPoint]) -> str:
        return f"p50 {waited(point.ttft_p50)}, p95 {waited(point.ttft_p95)}, p99 {waited(point.ttft_p99)}"

    lines = _lines(result, lambda point: point.ttft_p50 or None)  # a logarithmic axis has no zero
    if not lines:
        return None
    limit = plan_of(result).slo_ttft_ms
    chart = go.Figure([trace for row, found in lines for trace in _traces(row, found, span, words)])
    levels = _level_axis(chart, lines)
    chart.add_scatter(
        x=[levels[0], levels[-1]],
        y=[limit, limit],
        mode="lines",
        name="limit",
        line={"color": INK, "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )
    _written(chart, levels[0], math.log10(limit), f"limit: {limit:g} ms", xanchor="left", yanchor="bottom")
    spans = [end for _, found in lines for point in found for end in (span(point)[0], span(point)[2])]
    low, high = math.floor(math.log10(min(*spans, limit))), math.ceil(math.log10(max(*spans, limit)))
    high += low == high
    _end_labels(chart, [(row, found[-1], math.log10(span(found[-1])[1])) for row, found in lines], low, high)
    chart.update_yaxes(title="ms", type="log", range=[low, high], dtick=1, tickformat=",")
    chart.update_layout(title="Wait for the first token", showlegend=False)
    how = f"points: median from the planned arrival, whiskers: up to p95 · {_load_words(result)}"
    return _with_room_for_labels(chart, result, how, lines)


def flight_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """Every request of each contender's largest measured level: its wait light, its answer in the engine's colour."""
    from plotly.subplots import make_subplots

    flights = _flights(result)
    if not flights:
        return None
    titles = [f"{bar_label(row)}<br>{users(level)}" for row, level, _ in flights]
    chart = make_subplots(rows=1, cols=len(flights), subplot_titles=titles, shared_xaxes="all")
    longest = max(ended(one) - min(map(planned, rows)) for _, _, rows in flights for one in rows)
    for column, (row, level, rows) in enumerate(flights, start=1):
        for trace in _flight_bars(row, rows):
            chart.add_trace(trace, row=1, col=column)
        chart.update_yaxes(range=[level + 0.5, 0.5], **_counting(level), row=1, col=column)
    chart.update_xaxes(title=_below("seconds"), range=[0, 1.03 * longest])
    chart.update_yaxes(title="request" if plan_of(result).load == "wave" else "user", col=1)
    title = {"text": f"Every request, {SINCE}", "y": 0.98, "yanchor": "top"}
    chart.update_layout(title=title, showlegend=False, barmode="overlay")
    most = max(level for _, level, _ in flights)
    pixels = max(PLOT_PIXELS, min(LEAST_FLIGHT_PIXELS * most, MOST_FLIGHT_PIXELS))
    how = "light: from the planned arrival to the first token, full: the answer, red with a cross: failed"
    styled(chart, result, f"{how}{_of_repeat_one(result)}", pixels)
    return chart.update_layout(margin={"t": 112}, height=chart.layout.height + 64)  # titles of three lines


def in_flight_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """How many requests are under way at each moment, at each contender's largest measured level."""
    import plotly.graph_objects as go

    flights = _flights(result)
    if not flights:
        return None
    chart = go.Figure()
    for row, level, rows in flights:
        steps = in_flight(rows)
        chart.add_scatter(
            x=[moment for moment, _ in steps],
            y=[count for _, count in steps],
            mode="lines",
            name=f"{row.title}: {users(level)}, at most {max(count for _, count in steps)} in flight",
            line={"color": row.colour, "shape": "hv", "dash": _dash(row)},
            hovertemplate=f"{row.title}<br>%{{y}} in flight after %{{x:.2f}} s<extra></extra>",
        )
    chart.update_xaxes(title=_below(SINCE), rangemode="tozero")
    chart.update_yaxes(title="requests", rangemode="tozero", **_counting(max(level for _, level, _ in flights)))
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
    title = {"text": "Requests in flight", "y": 0.98, "yanchor": "top"}
    chart.update_layout(title=title, showlegend=True, legend=legend)
    how = f"in flight: from the planned arrival to the last token{_of_repeat_one(result)}"
    styled(chart, result, how)
    return chart.update_layout(margin={"t": 100}, height=chart.layout.height + 52)


Line = tuple[EngineRow, list[LevelPoint]]


def _lines(result: ExperimentResult, read: Callable[[LevelPoint], float | None]) -> list[Line]:
    """The contenders with the points at which `read` gives something, if there are any."""
    lines = [(row, [one for one in points(result, row) if read(one) is not None]) for row in result.engines]
    return [(row, found) for row, found in lines if found]


def _dash(row: EngineRow) -> str:
    return "dashdot" if row.variant else "solid"


def _traces(
    row: EngineRow, points: list[LevelPoint], span: Span, words: Callable[[LevelPoint, Sequence[LevelPoint]], str]
) -> list[dict[str, Any]]:
    """The measured points, and the extrapolated ones as a dashed line that goes on from the last measured one."""
    symbol = "diamond" if row.variant else "circle"
    measured = [point for point in points if not point.extrapolated]
    guessed = [point for point in points if point.extrapolated]
    parts = [(row.title, measured, _dash(row), symbol)] if measured else []
    if guessed:
        parts.append((f"{row.title}, extrapolated", [*measured[-1:], *guessed], "dash", f"{symbol}-open"))
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [point.level for point in found],
            "y": [span(point)[1] for point in found],
            "line": {"color": row.colour, "dash": dash, "width": 2.5},
            # The measured point from which the dashed line goes on is drawn once, as a measured one.
            "marker": {
                "symbol": mark,
                "size": [9 if point in guessed or found is measured else 0 for point in found],
                "color": row.colour,
                "opacity": 1,
            },
            "error_y": {
                "type": "data",
                "visible": any(span(point)[0] < span(point)[2] for point in found),
                "symmetric": False,
                "array": [span(point)[2] - span(point)[1] for point in found],
                "arrayminus": [span(point)[1] - span(point)[0] for point in found],
                "thickness": 1.2,
                "width": 3,
            },
            "hovertext": [
                f"{row.title}<br>{users(point.level)}{', extrapolated' if point.extrapolated else ''}"
                f"<br>{words(point, points)}"
                for point in found
            ],
            "hoverinfo": "text",
        }
        for name, found, dash, mark in parts
    ]


def _level_axis(chart: plotly.graph_objects.Figure, lines: list[Line]) -> list[int]:
    """Equal steps for equal factors, with the levels as ticks; returns them."""
    levels = sorted({point.level for _, found in lines for point in found})
    room = 0.04 * math.log10(levels[-1] / levels[0]) or 0.1
    ends = [math.log10(levels[0]) - room, math.log10(levels[-1]) + room]
    names = [str(level) for level in levels]
    chart.update_xaxes(title=_below("users"), type="log", range=ends, tickvals=levels, ticktext=names)
    return levels


def _below(words: str) -> dict[str, Any]:
    """A title of the x axis, close enough to it to stay clear of the small print."""
    return {"text": words, "standoff": 3, "font": {"size": 12}}


def _counting(most: int) -> dict[str, Any]:
    """The ticks of an axis that counts to `most`: whole numbers, about eight of them."""
    return {"tick0": 0, "dtick": max(1, round(most / 8))}


def _written(chart: plotly.graph_objects.Figure, level: int, y: float, words: str, **place: Any) -> None:
    """Words at a point of the picture. Unlike a trace, an annotation wants a logarithmic axis' logarithm."""
    font = {"size": 12, "color": INK}
    chart.add_annotation(**{"x": math.log10(level), "y": y, "text": words, "showarrow": False, "font": font, **place})


def _end_labels(
    chart: plotly.graph_objects.Figure, ends: list[tuple[EngineRow, LevelPoint, float]], low: float, high: float
) -> None:
    """Each line's name at its end, moved apart where two would overlap. `low` and `high`: the ends of the y axis."""
    taken = -math.inf  # up to which pixel
    for row, point, y in sorted(ends, key=lambda end: end[2]):
        words = bar_label(row) + ("<br>(extrapolated)" if point.extrapolated else "")
        height = LABEL_PIXELS * (1 + words.count("<br>"))
        wanted = (y - low) / (high - low) * PLOT_PIXELS
        centre = max(wanted, taken + height / 2)
        taken = centre + height / 2
        font = {"size": 13, "color": row.colour}
        place = {"xanchor": "left", "xshift": 10, "yanchor": "middle", "yshift": centre - wanted, "align": "left"}
        _written(chart, point.level, y, words, font=font, **place)


def _with_room_for_labels(
    chart: plotly.graph_objects.Figure, result: ExperimentResult, how: str, lines: list[Line]
) -> plotly.graph_objects.Figure:
    if any(point.extrapolated for _, found in lines for point in found):
        how += f" · {EXTRAPOLATED_WORDS}"
    return styled(chart, result, how).update_layout(margin={"r": LABEL_MARGIN})


def _load_words(result: ExperimentResult) -> str:
    plan = plan_of(result)
    if plan.load == "sustained":
        return f"each user asks again at once, for {plan.seconds:g} s; tok/s while all users are being answered"
    return f"one request per user, one every {plan.spacing_ms:g} ms"


def _of_repeat_one(result: ExperimentResult) -> str:
    return "; the first repeat" if plan_of(result).repeats > 1 else ""


def _flights(result: ExperimentResult) -> list[tuple[EngineRow, int, list[RequestRow]]]:
    """Each contender with the first finished trial at its largest measured level."""
    found = []
    for row in result.engines:
        for level in sorted(_levels_in(result, row.name), reverse=True):
            if trials := finished_trials(result, row.name, level):
                found.append((row, level, trials[0]))
                break
    return found


def _flight_bars(row: EngineRow, rows: list[RequestRow]) -> list[dict[str, Any]]:
    begin = min(map(planned, rows))
    failed = [one for one in rows if one.timeline.error]
    answered = [one for one in rows if not one.timeline.error]
    first = [one.timeline.sent + one.timeline.arrivals[0].at for one in answered]
    parts = [
        (f"{row.title}: wait", answered, [*map(planned, answered)], first, {"color": row.colour, "opacity": 0.3}),
        (f"{row.title}: answer", answered, first, [*map(ended, answered)], colour_of(row)),
        (f"{row.title}: failed", failed, [*map(planned, failed)], [*map(ended, failed)], {"color": FAILED_COLOUR}),
    ]
    bars: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [one.index + 1 for one in those],
            "base": [start - begin for start in starts],
            "x": [end - start for start, end in zip(starts, ends, strict=True)],
            "width": 0.85,  # else as wide as the gap between the requests of this trace, which failures widen
            "marker": {"line": {"width": 0}, **marker},
            "hovertext": [_flight_words(one) for one in those],
            "hoverinfo": "text",
        }
        for name, those, starts, ends, marker in parts
        if those
    ]
    if failed:
        bars.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{row.title}: failed here",
                "x": [ended(one) - begin for one in failed],
                "y": [one.index + 1 for one in failed],
                "marker": {"symbol": "x", "size": 8, "color": FAILED_COLOUR},
                "hoverinfo": "skip",
            }
        )
    return bars


def _flight_words(row: RequestRow) -> str:
    if row.timeline.error:
        return f"request {row.index + 1} failed after {ended(row) - planned(row):.2f} s"
    first, whole = waited(row.metrics.planned_ttft), E2E.shown_with_unit(row.metrics.planned_e2e)
    return f"request {row.index + 1}<br>first token after {first}<br>whole answer after {whole}"


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
        ),
        Setting(
            "measure_all",
            "switch",
            "Measure the naive queue in full",
            "Nothing is extrapolated. The last of 128 users may wait for many minutes.",
            False,
        ),
        Setting(
            "slo_ttft_ms",
            "number",
            "Limit for the first token, ms",
            "A good request keeps to it (service level objective, SLO, for TTFT).",
            200.0,
            1,
            MOST_LIMIT_MS,
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
        ),
        replace(REPEATS, default=1, info="Measured runs per engine and number of users; more narrow the spread."),
        replace(WARMUPS, default=1, info="Rounds before them that do not count: the fewest users, then up to eight."),
        replace(ANSWER_LENGTH, default=128),
        replace(LENGTH_KIND, default=True),
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
    ),
    notes=notes,
)
