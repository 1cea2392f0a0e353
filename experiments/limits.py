"""What bounds a result and what it costs: the memory ceiling, and dollars per million output tokens."""

from __future__ import annotations

from engines.gpus import PRICES_OF, Price, gpu_named
from engines.hardware import Hardware
from engines.spending import dollars
from experiments.base import Plan
from experiments.metrics import MILLISECONDS, Distribution
from experiments.result import ExperimentResult

CEILING_WORDS = "memory ceiling"
COST_HEADING = "Cost per million tokens"


def price_of(plan: Plan, hardware: Hardware | None) -> Price | None:
    """As typed, else as listed for the GPU; None where nobody has said."""
    if plan.dollars_per_hour is not None:
        return Price(plan.dollars_per_hour, "as typed")
    gpu = gpu_named(hardware.gpu) if hardware else None
    if gpu is None or gpu.dollars_per_hour is None:
        return None
    return Price(gpu.dollars_per_hour, f"Modal's list price of {PRICES_OF} for one {gpu.name}")


def decode_ceiling(result: ExperimentResult, requests: int = 1) -> float | None:
    """tok/s that no engine can exceed which yields one token per request and step: each step reads the weights once
    and every request's keys and values. N * bandwidth / bytes of a step; None where either is unknown."""
    if result.model_shape is None or result.bandwidth is None:
        return None
    read = _step_bytes(result, requests)
    return requests * result.bandwidth.bytes_per_second / read if read else None


def _step_bytes(result: ExperimentResult, requests: int) -> float:
    assert result.model_shape is not None
    return result.model_shape.step_bytes(requests, _mean_context(result))


def _mean_context(result: ExperimentResult) -> float:
    """Tokens behind the one that is written, on average: the prompt and half of the answer."""
    contexts = []
    for row in result.requests:
        prompt, output = row.timeline.usage.prompt_tokens, row.metrics.output_tokens
        if not row.warmup and not row.timeline.error and prompt is not None and output is not None:
            contexts.append(prompt + output / 2)
    return Distribution.of(contexts).mean or 0.0


def of_ceiling(result: ExperimentResult, tokens_per_second: float | None, requests: int = 1) -> float | None:
    """The share of the ceiling that is reached."""
    ceiling = decode_ceiling(result, requests)
    return tokens_per_second / ceiling if tokens_per_second is not None and ceiling else None


def dollars_per_million(result: ExperimentResult, tokens_per_second: float | None) -> float | None:
    """$ per million output tokens: price per second / tok/s * 1e6."""
    if result.price is None or not tokens_per_second:
        return None
    return result.price.dollars_per_hour / 3600 / tokens_per_second * 1e6


def three_digits(value: float) -> str:
    """Three digits that count, and every digit before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spending_notes(result: ExperimentResult) -> list[str]:
    """What a run on rented machines has cost, and what lay between them and the page."""
    if result.spent is None:
        return []
    spent = result.spent
    cost = "at a price that is not known" if spent.dollars is None else f"about {dollars(spent.dollars)}"
    said = [
        f"Rented: {spent.gpu_seconds:,.0f} GPU-seconds, {cost} ({spent.source}), starts and the end included. "
        "Modal's own bill counts."
    ]
    delays = [row.network_seconds * MILLISECONDS for row in result.engines if row.network_seconds is not None]
    if delays:
        low, high = f"{min(delays):.0f}", f"{max(delays):.0f}"
        said.append(
            f"The network between this page and the containers: {low if low == high else f'{low} to {high}'} ms there "
            "and back. It delays what you see and is part of no number: those were taken in the containers."
        )
    return said


def limit_notes(result: ExperimentResult) -> list[str]:
    """How the ceiling comes about, and who says what the hardware costs."""
    said = []
    ceiling = decode_ceiling(result)
    if ceiling is not None and result.bandwidth is not None:
        read, rate = _step_bytes(result, 1) / 1e6, result.bandwidth.bytes_per_second / 1e9
        said.append(
            f"The memory ceiling: to write one token the processor reads {three_digits(read)} MB (the weights, and the "
            f"keys and values of the text so far). At {three_digits(rate)} GB/s ({result.bandwidth.source}) that "
            f"allows one user {three_digits(ceiling)} tok/s, unless several tokens come out of one step."
        )
    if result.price is not None:
        said.append(f"Cost: ${result.price.dollars_per_hour:,.2f} per hour ({result.price.source}).")
    return said
