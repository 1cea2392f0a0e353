"""What speaks against a result's own numbers: the load generator's health, and values that cannot be."""

from __future__ import annotations

from collections.abc import Iterable

from engines.load import GeneratorHealth
from experiments.limits import decode_ceiling
from experiments.metrics import METRICS, MILLISECONDS, Distribution
from experiments.result import EngineRow, ExperimentResult

LATE_SECONDS = 0.005  # of sending, from which on waits are no longer the engine's alone
STALL_SECONDS = 0.025  # in which what came was read together, or stamped late where the kernel does not stamp
LATE_READ_SECONDS = 0.02  # from which on chunks of one answer are likely to be read, and so stamped, together
BUSY_SHARE = 0.8  # of a core
CEILING_TOLERANCE = 1.1  # the bandwidth behind the ceiling is itself measured


def generator_healths(result: ExperimentResult) -> list[GeneratorHealth]:
    """Of the measured trials; none in results from before it was kept."""
    return [trial.generator for trial in result.trials if trial.generator and not trial.warmup]


def _lateness(result: ExperimentResult) -> Distribution:
    """Of sending, over the measured requests."""
    return Distribution.of(row.metrics.lateness for row in result.requests if not row.warmup)


def generator_warnings(result: ExperimentResult) -> list[str]:
    """Where the load generator, and not the engine, may have been the limit."""
    said = []
    late = _lateness(result)
    if late.largest is not None and late.largest > LATE_SECONDS:
        said.append(
            f"The load generator sent requests up to {_ms(late.largest)} late (p99 {_ms(late.percentile(99))}); "
            "that delay is part of the waits."
        )
    healths = generator_healths(result)
    share = _largest(one.processor_share for one in healths)
    if share is not None and share > BUSY_SHARE:
        said.append(f"The load generator used {share:.0%} of a core, so it may have been the limit.")
    stalled = max(healths, key=lambda one: one.longest_stall, default=None)
    if stalled is not None and stalled.longest_stall > STALL_SECONDS:
        harm = "was read together, with only the last one's stamp" if stalled.stamps == "kernel" else "was stamped late"
        said.append(
            f"The load generator once stood still for {_ms(stalled.longest_stall)}; what came meanwhile {harm}."
        )
    unread = _largest(one.read_delays[1] for one in healths if one.read_delays)
    if unread is not None and unread > LATE_READ_SECONDS:
        said.append(
            f"Chunks lay unread for up to {_ms(unread)} (p99). Their stamps are right, but what was read together has "
            "only the last one's."
        )
    return said


def generator_notes(result: ExperimentResult) -> list[str]:
    """One line on who stamped, and at what cost."""
    healths = generator_healths(result)
    if not healths:
        return []
    by_kernel = all(one.stamps == "kernel" for one in healths)
    who = "by the kernel, as they came in" if by_kernel else "by the load generator, when it read them"
    delays = _largest(one.read_delays[1] for one in healths if one.read_delays)
    late = _lateness(result)
    told = [f"arrivals were stamped {who}"]
    if late.values:
        told.append(f"requests were sent {_ms(late.percentile(99))} late (p99)")
    if delays is not None:
        told.append(f"chunks were read {_ms(delays)} after they came (p99)")
    share = _largest(one.processor_share for one in healths)
    if share is not None:
        told.append(f"it used at most {share:.1%} of a core")
    return [f"The load generator: {', '.join(told)}."]


def beyond_ceiling(result: ExperimentResult, row: EngineRow) -> bool:
    """Whether this contender decodes faster than its memory can be read: then a count or a clock is wrong."""
    ceiling = decode_ceiling(result)
    speed = result.distribution(row.name, METRICS["decode_speed"]).mean
    if row.config.get("speculation") or ceiling is None or speed is None:
        return False  # with speculation several tokens come out of one reading
    return speed > CEILING_TOLERANCE * ceiling


def implausible_notes(result: ExperimentResult) -> list[str]:
    """What is left out because it cannot be, or says nothing."""
    said = []
    for row in result.engines:
        measured = result.measured(row.name)
        bunched = sum(one.metrics.bunched for one in measured)
        if bunched:
            said.append(
                f"{row.title}: {bunched} of {len(measured)} answers arrived in a few large pieces, because its server "
                "or the load generator was held up. Their speed is left out; their end is right."
            )
        backwards = sum(one.metrics.backwards for one in measured)
        if backwards:
            said.append(
                f"{row.title}: {backwards} of {len(measured)} answers have moments that cannot be (a token before its "
                "request, or out of order). Their times are left out."
            )
        if beyond_ceiling(result, row):
            said.append(
                f"⚠ {row.title} seems faster than memory allows: the bandwidth or the token count must be wrong, so "
                "its speed is not to be trusted."
            )
    return said


def _largest(values: Iterable[float | None]) -> float | None:
    return Distribution.of(values).largest


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    value = seconds * MILLISECONDS
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.2g} ms"
