"""What a client reported beside what was true. Pure. Times are seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmark.running import TrueAnswer
from experiments.metrics import percentile


@dataclass(frozen=True, slots=True)
class Reported:
    """One answer as a client tells of it, each number by its own formula; what it does not tell is None.

    `gaps`: its inter-token latencies; `moments`: when it saw each chunk, on the one clock (with two of them: the first
    and the last).
    """

    prompt: str
    ttft: float | None
    tpot: float | None
    gaps: tuple[float, ...] | None = None
    moments: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How far one client was from the truth in one case.

    `late_p50`, `late_p99`: between a chunk's handing to the kernel and the client's stamp, over all chunks. The errors
    are absolute: p99 over the requests of TTFT's, of TPOT's and of the longest gap's, and that of the p50 of all
    inter-token latencies. `processor`: cores, from the first request to the last chunk. `lost`: chunks that it did not
    report; `failed`: answers.
    """

    client: str
    case: str
    answers: int
    failed: int
    lost: int
    late_p50: float | None
    late_p99: float | None
    ttft_error: float | None
    tpot_error: float | None
    itl_error: float | None
    longest_gap_error: float | None
    processor: float | None
    server_late_p99: float | None


def score(
    client: str, case: str, truths: Sequence[TrueAnswer], reports: Iterable[Reported], processor: float | None
) -> Score:
    """Join by prompt. Answers that the client did not report count as failed, chunks that it did not see as lost."""
    by_prompt = {report.prompt: report for report in reports}
    pairs = [(true, by_prompt[true.prompt]) for true in truths if true.prompt in by_prompt]
    late: list[float] = []
    lost = 0
    for true, report in pairs:
        if report.moments is None:
            continue
        if len(report.moments) == len(true.moments):
            late += [mine - handed for mine, handed in zip(report.moments, true.moments, strict=True)]
        elif len(report.moments) == 2:
            late += [report.moments[0] - true.moments[0], report.moments[1] - true.moments[-1]]
        else:
            lost += abs(len(true.moments) - len(report.moments))
    with_gaps = [(true, report.gaps) for true, report in pairs if report.gaps]
    pooled = percentile([gap for _, gaps in with_gaps for gap in gaps], 50)
    true_pooled = percentile([gap for true, _ in with_gaps for gap in true.inter_token_latencies], 50)
    return Score(
        client,
        case,
        answers=len(pairs),
        failed=len(truths) - len(pairs),
        lost=lost,
        late_p50=percentile(late, 50),
        late_p99=percentile(late, 99),
        ttft_error=_p99(abs(report.ttft - true.ttft) for true, report in pairs if report.ttft is not None),
        tpot_error=_p99(abs(report.tpot - true.tpot) for true, report in pairs if report.tpot is not None),
        itl_error=None if pooled is None or true_pooled is None else abs(pooled - true_pooled),
        longest_gap_error=_p99(abs(max(gaps) - max(true.inter_token_latencies)) for true, gaps in with_gaps),
        processor=processor,
        server_late_p99=percentile([late for true in truths for late in true.late], 99),
    )


def _p99(values: Iterable[float]) -> float | None:
    return percentile(list(values), 99)
