"""What every experiment's words share: cells with their spread, the table of contenders, lists in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from experiments.base import Table
from experiments.metrics import METRICS, Distribution, Metric, Ratio
from experiments.result import EngineRow, ExperimentResult


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of one metric: the mean and how far the repeats spread."""

    metric: Metric
    distribution: Distribution

    @property
    def words(self) -> str:
        """e.g. "228 ±4 tok/s": the mean, and half of its 95 % confidence interval (Student's t)."""
        mean, half = self.distribution.mean, self.distribution.half_width
        if mean is None:
            return "–"
        # Equal values, such as a fixed length, have no spread worth a sign.
        spread = f" ±{self.metric.shown(half)}" if half else ""
        return f"{self.metric.shown(mean)}{spread} {self.metric.unit}".strip()


def contender_table(
    result: ExperimentResult, names: Sequence[str], more: Mapping[str, Callable[[EngineRow], str]] | None = None
) -> Table:
    """One row per contender with the named metrics over all its measured requests, and more cells by their heading."""
    metrics = [METRICS[name] for name in names]
    rows = [
        [
            row.title,
            row.version or "–",
            *(Cell(metric, result.distribution(row.name, metric)).words for metric in metrics),
            *(tell(row) for tell in (more or {}).values()),
        ]
        + runs(result, row)
        for row in result.engines
    ]
    return Table(["Engine", "Version", *(metric.label for metric in metrics), *(more or {}), "Runs", "Failed"], rows)


def runs(result: ExperimentResult, row: EngineRow) -> list[str]:
    """[measured requests or why there are none, failed ones]."""
    if row.unavailable:
        return ["not available here", "–"]
    count = "could not run" if row.error else str(len(result.measured(row.name)))
    return [count, str(len(result.failures(row.name)))]


def times(ratio: Ratio | None) -> str:
    """e.g. "1.48× (1.40–1.56)"; a dash when unknown."""
    if ratio is None:
        return "–"
    interval = f" ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.low is not None and ratio.high is not None else ""
    return f"{ratio.value:.2f}×{interval}"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
