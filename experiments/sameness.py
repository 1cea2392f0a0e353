"""Same answer? In a run at temperature 0: how far each contender's answer goes with the first one's."""

from __future__ import annotations

from dataclasses import dataclass

from engines.agreement import Agreement, agreement
from experiments.result import EngineRow, ExperimentResult, RequestRow

MOST_GROUPS = 8


@dataclass(frozen=True, slots=True)
class Sameness:
    """One answer beside the reference: `shared` and `rest` are the text before and after the first difference."""

    row: EngineRow
    reference: EngineRow
    group: str
    agreement: Agreement
    shared: str
    rest: str

    @property
    def words(self) -> str:
        where = f" ({self.group})" if self.group else ""
        if self.agreement.whole:
            tokens = f"{self.agreement.tokens} token{'s' if self.agreement.tokens != 1 else ''}"
            return f"{self.row.title}{where}: the same as {self.reference.title} to the end, {tokens}"
        return (
            f"{self.row.title}{where}: departs from {self.reference.title} at token {self.agreement.tokens + 1}, "
            f"after {self.agreement.tokens} that agree"
        )


def same_answers(result: ExperimentResult) -> list[Sameness]:
    """Every contender's first answer in each group beside the first contender's; empty above temperature 0, where
    answers differ by intent, and of random weights, which each engine draws for itself."""
    if result.settings.get("temperature") != 0 or any(row.config.get("random_weights") for row in result.engines):
        return []
    found = []
    groups = list(dict.fromkeys(row.group for row in result.requests if not row.warmup))[:MOST_GROUPS]
    for group in groups:
        answered = [(row, first) for row in result.engines if (first := _first_answer(result, row.name, group))]
        for row, request in answered[1:]:
            reference, against = answered[0]
            compared = agreement(against.timeline, request.timeline)
            if compared:
                text = request.timeline.text
                shared, rest = text[: compared.characters], text[compared.characters :]
                found.append(Sameness(row, reference, group, compared, shared, rest))
    return found


def _first_answer(result: ExperimentResult, name: str, group: str) -> RequestRow | None:
    rows = result.measured(name, group)
    return next((row for row in rows if row.timeline.text and not row.timeline.error), None)
