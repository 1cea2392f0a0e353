"""What the numbers mean: one request's metrics, a distribution of them, and the catalogue that names each.

Seconds throughout; unit and rounding belong to the catalogue. Unknown is None, never 0. Formulas follow
`vllm bench serve` where the field disagrees, except that tokens are counted, never chunks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from engines.timeline import Timeline

BUNCH = 8  # chunks per read from which on an answer counts as bunched


@dataclass(frozen=True)  # without slots, so that what takes a look at every arrival is computed once
class RequestMetrics:
    """The metrics of one request, each a property of its timeline, and of when it was meant to be sent."""

    timeline: Timeline
    planned: float | None = None  # s on the run's clock

    @property
    def ttft(self) -> float | None:
        """Time to first token, s: from sending the request to the first chunk with text, thinking included."""
        arrivals = self.timeline.arrivals
        return arrivals[0].at if arrivals and not self.backwards else None

    @property
    def time_to_first_answer(self) -> float | None:
        """s until the first token that is not thinking."""
        return next((arrival.at for arrival in self.timeline.arrivals if not arrival.reasoning), None)

    @property
    def e2e(self) -> float | None:
        """End-to-end latency, s: from sending the request to the last token. None when the answer broke off."""
        if self.timeline.error or not self.timeline.arrivals or self.backwards:
            return None
        return self.timeline.arrivals[-1].at

    @property
    def lateness(self) -> float | None:
        """s between the planned and the actual sending: the load generator's own delay."""
        return None if self.planned is None else self.timeline.sent - self.planned

    @property
    def planned_ttft(self) -> float | None:
        """TTFT from the planned sending, s: a late load generator cannot hide a wait in it."""
        return None if self.ttft is None else self.ttft + (self.lateness or 0.0)

    @property
    def planned_e2e(self) -> float | None:
        """E2E from the planned sending, s."""
        return None if self.e2e is None else self.e2e + (self.lateness or 0.0)

    @property
    def output_tokens(self) -> int | None:
        """Tokens of the answer: the server's count, else one per chunk (then marked as estimated)."""
        if self.timeline.usage.output_tokens is not None:
            return self.timeline.usage.output_tokens
        arrivals = self.timeline.arrivals
        return sum(arrival.tokens or 1 for arrival in arrivals) if arrivals else None

    @property
    def first_tokens(self) -> int | None:
        """Tokens that came in the first read, which TPOT must not count as decoded after it.

        A chunk may bundle tokens, and a server that was held up delivers many chunks in one piece.
        """
        arrivals = self.timeline.arrivals
        if not arrivals:
            return None
        first = [arrival for arrival in arrivals if arrival.at == arrivals[0].at]
        return sum(1 if arrival.tokens is None else arrival.tokens for arrival in first) or 1

    @cached_property
    def bunched(self) -> bool:
        """Whether the chunks came in so few pieces (the median ITL is 0) that the speed says little of the engine."""
        arrivals = self.timeline.arrivals
        return len(arrivals) >= BUNCH and len({arrival.at for arrival in arrivals}) * BUNCH <= len(arrivals)

    @cached_property
    def backwards(self) -> bool:
        """Whether a token came before its request or before the one before it, which cannot be."""
        moments = [0.0, *(arrival.at for arrival in self.timeline.arrivals)]
        return any(after < before for before, after in pairwise(moments))

    @property
    def decoded_tokens(self) -> int | None:
        """Tokens that came after the first read, up to the last text (an end-of-text token has none)."""
        if self.output_tokens is None or self.first_tokens is None:
            return None
        total = self.output_tokens
        if self.timeline.token_source == "per chunk":
            total = sum(arrival.tokens or 0 for arrival in self.timeline.arrivals)
        decoded = total - self.first_tokens
        return decoded if decoded > 0 else None

    @property
    def tpot(self) -> float | None:
        """Time per output token, s: (last token - first token) / tokens after the first read.

        None where the answer came in a few large pieces: their distance is the server's hold-up, not its pace.
        """
        if self.bunched or self.e2e is None or self.ttft is None or self.decoded_tokens is None:
            return None
        if self.e2e <= self.ttft:
            return None
        return (self.e2e - self.ttft) / self.decoded_tokens

    @property
    def decode_speed(self) -> float | None:
        """tok/s once the answer has begun: 1 / TPOT."""
        return 1 / self.tpot if self.tpot else None

    @property
    def output_speed(self) -> float | None:
        """tok/s as the user feels it, the wait for the first token included: output tokens / E2E."""
        return self.output_tokens / self.e2e if self.output_tokens and self.e2e else None

    @property
    def inter_token_latencies(self) -> list[float]:
        """ITL, s: the gaps between chunks; a chunk of k tokens counts as k gaps of a k-th each."""
        gaps: list[float] = []
        arrivals = self.timeline.arrivals
        before = arrivals[0].at if arrivals else 0.0
        for arrival in arrivals[1:]:
            tokens = 1 if arrival.tokens is None else arrival.tokens
            if tokens > 0:  # text without a new token leaves its gap to the next token
                gaps += [(arrival.at - before) / tokens] * tokens
                before = arrival.at
        return gaps

    @property
    def itl_p99(self) -> float | None:
        """s: the 99th percentile of this request's inter-token latencies; a stall shows here."""
        if self.backwards:
            return None
        return percentile(self.inter_token_latencies, 99)

    @property
    def prompt_tokens(self) -> int | None:
        return self.timeline.usage.prompt_tokens

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that the engine took from its prefix cache, as it reports them."""
        return self.timeline.usage.cached_tokens


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values of one metric over repeats. Every statistic is None when there are too few values for it."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution:
        return cls(tuple(value for value in values if value is not None))

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def smallest(self) -> float | None:
        return min(self.values, default=None)

    @property
    def largest(self) -> float | None:
        return max(self.values, default=None)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def percentile(self, share: float) -> float | None:
        return percentile(self.values, share)

    @property
    def median(self) -> float | None:
        return self.percentile(50)

    @property
    def geometric_mean(self) -> float | None:
        """None also where a value is not positive."""
        return statistics.geometric_mean(self.values) if self.values and min(self.values) > 0 else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval of the mean, Student's t."""
        if self.deviation is None:
            return None
        return student_t(len(self.values) - 1) * self.deviation / math.sqrt(len(self.values))


def percentile(values: Iterable[float], share: float) -> float | None:
    """Linear interpolation between the closest ranks, as numpy's default; `share` in percent."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def student_t(degrees: float, confidence: float = 0.95) -> float:
    """The two-sided quantile of Student's t for `degrees` of freedom, e.g. 4.303 for 2."""
    from scipy.special import stdtrit  # here, because loading it costs half a second of the page's start

    return float(stdtrit(degrees, 0.5 + confidence / 2))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times `a` is `b`, with the 95 % interval of the ratio of their means."""

    value: float
    low: float | None
    high: float | None

    @property
    def supported(self) -> bool:
        """Whether the spread over repeats supports that the two differ."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def ratio(a: Distribution, b: Distribution) -> Ratio | None:
    """Ratio of geometric means with Welch's interval on the logarithms; no interval below two values each."""
    if not a.values or not b.values or min(*a.values, *b.values) <= 0:
        return None
    logs = [[math.log(value) for value in side.values] for side in (a, b)]
    means = [statistics.fmean(side) for side in logs]
    value = math.exp(means[0] - means[1])
    if min(len(side) for side in logs) < 2:
        return Ratio(value, None, None)
    squares = [statistics.variance(side) / len(side) for side in logs]
    total = sum(squares)
    if total == 0:
        return Ratio(value, value, value)
    degrees = total**2 / sum(square**2 / (len(side) - 1) for square, side in zip(squares, logs, strict=True))
    half = student_t(degrees) * math.sqrt(total)
    return Ratio(value, math.exp(means[0] - means[1] - half), math.exp(means[0] - means[1] + half))


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue: how a metric is called, shown and compared, wherever it appears."""

    name: str
    label: str
    term: str  # the field's own name for it
    unit: str
    scale: float  # shown value = value * scale
    digits: int
    better: Literal["higher", "lower", "neither"]
    explanation: str
    read: Callable[[RequestMetrics], float | int | None]

    def shown(self, value: float | int | None) -> str:
        """The value in the metric's unit, without the unit; a dash when unknown."""
        return "–" if value is None else f"{value * self.scale:,.{self.digits}f}"

    def shown_with_unit(self, value: float | int | None) -> str:
        return "–" if value is None else f"{self.shown(value)} {self.unit}".strip()


MILLISECONDS = 1000.0
CATALOGUE: tuple[Metric, ...] = (
    Metric(
        "decode_speed",
        "Speed",
        "decode throughput",
        "tok/s",
        1,
        0,
        "higher",
        "Tokens per second once the answer has begun (1 / TPOT).",
        lambda metrics: metrics.decode_speed,
    ),
    Metric(
        "ttft",
        "First token",
        "TTFT, time to first token",
        "ms",
        MILLISECONDS,
        1,
        "lower",
        "From sending the request to the first token on our side.",
        lambda metrics: metrics.ttft,
    ),
    Metric(
        "tpot",
        "Per token",
        "TPOT, time per output token",
        "ms",
        MILLISECONDS,
        2,
        "lower",
        "Average time per token after the first.",
        lambda metrics: metrics.tpot,
    ),
    Metric(
        "itl_p99",
        "Worst gaps",
        "ITL p99, inter-token latency",
        "ms",
        MILLISECONDS,
        2,
        "lower",
        "The gap between tokens that only one in a hundred exceeds: stalls show here.",
        lambda metrics: metrics.itl_p99,
    ),
    Metric(
        "e2e",
        "Whole answer",
        "E2E latency",
        "s",
        1,
        2,
        "lower",
        "From sending the request to the last token.",
        lambda metrics: metrics.e2e,
    ),
    Metric(
        "output_speed",
        "Speed with wait",
        "output throughput of the request",
        "tok/s",
        1,
        0,
        "higher",
        "Tokens per second with the wait for the first token included.",
        lambda metrics: metrics.output_speed,
    ),
    Metric(
        "output_tokens",
        "Tokens",
        "output tokens",
        "",
        1,
        0,
        "neither",
        "Tokens of the answer, as the engine counts them.",
        lambda metrics: metrics.output_tokens,
    ),
    Metric(
        "prompt_tokens",
        "Prompt tokens",
        "prompt tokens",
        "",
        1,
        0,
        "neither",
        "Tokens of the prompt with its chat template.",
        lambda metrics: metrics.prompt_tokens,
    ),
    Metric(
        "cached_tokens",
        "Cached tokens",
        "cached prompt tokens",
        "",
        1,
        0,
        "neither",
        "Prompt tokens that came from the engine's prefix cache.",
        lambda metrics: metrics.cached_tokens,
    ),
)
METRICS = {metric.name: metric for metric in CATALOGUE}
