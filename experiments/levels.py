"""What the numbers of the concurrency experiment mean: its plan, one point per number of users, and its limits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from experiments.base import Plan, PlanError, Trial, check_number, check_whole
from experiments.metrics import METRICS, MILLISECONDS, Distribution
from experiments.result import EngineRow, ExperimentResult, RequestRow
from experiments.telling import listed

Load = Literal["wave", "sustained"]
LEVELS = (1, 4, 8, 16, 32, 64, 128)
MOST_USERS, MOST_SPACING_MS, MOST_SECONDS, MOST_LIMIT_MS = 512, 10_000, 600, 600_000
SERVED_SHARE = 0.99  # of the requests must be within the limits for a level to count as served
SEQUENTIAL = "transformers"
SEQUENTIAL_SECONDS = 90.0  # of a level that the naive queue is measured at; what would take longer is extrapolated
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


def is_sequential(key: str) -> bool:
    """Whether this contender answers one request at a time.

    `transformers serve` does (measured: a flat 160 tok/s from 1 to 32 requests); its continuous batching is a
    contender of its own, and the other engines cannot do without.
    """
    return key == SEQUENTIAL


def too_long(plan: Plan, trial: Trial, key: str, seen: Sequence[RequestRow]) -> bool:
    """Whether the naive queue would need more than SEQUENTIAL_SECONDS for all repeats of this level, by the slowest
    answer so far that had nobody before it. Its smallest level is always measured: the rest is extrapolated from it."""
    assert isinstance(plan, ConcurrencyPlan)
    users = len(trial.prompts)
    if plan.measure_all or not is_sequential(key) or trial.warmup:
        return False
    answers = [row for row in seen if row.engine == key and not row.warmup and not row.timeline.error]
    smaller = {(row.group, row.repeat) for row in answers if int(row.group) < users}
    quickest = [
        Distribution.of(row.metrics.e2e for row in answers if (row.group, row.repeat) == trial_seen).smallest
        for trial_seen in smaller
    ]
    slowest = Distribution.of(quickest).largest
    return slowest is not None and plan.repeats * users * slowest > SEQUENTIAL_SECONDS


# Moments are seconds on the run's clock.


@dataclass(frozen=True, slots=True)
class LevelPoint:
    """One contender with one number of users. Times are seconds from the planned arrival; unknown is None.

    `goodput`: requests per second within both limits; `slo_share`: their share of all, failed ones included.
    `outputs`: the tok/s of each repeat, of which `tokens_per_second` is the mean.
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
    outputs: tuple[float, ...] = ()

    @property
    def spread(self) -> float | None:
        """Half of the 95 % confidence interval of `tokens_per_second` over the repeats, Student's t."""
        return Distribution(self.outputs).half_width


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
        outputs=output.values,
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
    for level in sorted(levels_in(result, name)):
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
    for level in sorted({*plan_of(result).levels, *levels_in(result, row.name)}):
        point = level_point(result, row.name, level)
        if point is None and is_sequential(row.name):
            point = extrapolated_point(result, row.name, level)
        if point:
            found.append(point)
    return found


def levels_in(result: ExperimentResult, name: str) -> set[int]:
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


# In words


def users(level: int) -> str:
    return "1 user" if level == 1 else f"{level} users"


def limits_words(plan: ConcurrencyPlan) -> str:
    return f"{plan.slo_ttft_ms:g} ms to the first token and {plan.slo_tpot_ms:g} ms per token"


def called(row: EngineRow) -> str:
    """In a sentence, where a comma would read as a list."""
    return f"{row.label} with {row.variant}" if row.variant else row.label


def waited(seconds: float | None) -> str:
    """A wait in ms, and in s where a thousand ms would be hard to read."""
    if seconds is not None and seconds >= 10:
        return f"{seconds:,.1f} s"
    return TTFT.shown_with_unit(seconds)
