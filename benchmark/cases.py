"""What is measured: how many streams, at which pace, with which oddity."""

from __future__ import annotations

from dataclasses import dataclass

from benchmark.truth import Schedule


@dataclass(frozen=True, slots=True)
class Case:
    """`streams` answers at once, each `chunks_per_second` for `seconds`."""

    name: str
    words: str
    streams: int
    chunks_per_second: float
    seconds: float
    tokens_per_chunk: int = 1
    stall_seconds: float = 0.0  # once, in mid-stream
    phases_together: bool = False
    early_role: bool = False  # a delta with a role and no text long before the first token

    @property
    def chunks(self) -> int:
        return round(self.chunks_per_second * self.seconds)

    @property
    def tokens(self) -> int:
        return self.chunks * self.tokens_per_chunk

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            first_token=0.3,
            gap=1 / self.chunks_per_second,
            phases="together" if self.phases_together else "spread",
            role="at once" if self.early_role else "with the first token",
            tokens_per_chunk=(self.tokens_per_chunk,),
            stall_after=self.chunks // 2 if self.stall_seconds else 0,
            stall=self.stall_seconds,
        )

    @property
    def prompts(self) -> list[str]:
        """One per stream; the answer begins with the last word, so that it can be told whose it is."""
        return [f"Please answer this question of the benchmark w{place:04d}" for place in range(self.streams)]


def cases(seconds: float) -> tuple[Case, ...]:
    return (
        Case("1", "1 stream x 100 tok/s", 1, 100, seconds),
        Case("32", "32 streams x 100 tok/s", 32, 100, seconds),
        Case("128", "128 streams x 100 tok/s", 128, 100, seconds),
        Case("256", "256 streams x 50 tok/s", 256, 50, seconds),
        Case(
            "together", "128 streams x 100 tok/s, all chunks of a step at once", 128, 100, seconds, phases_together=True
        ),
        Case("four", "32 streams x 100 chunks/s of 4 tokens", 32, 100, seconds, tokens_per_chunk=4),
        Case("role", "32 streams x 100 tok/s, a role without text 300 ms before", 32, 100, seconds, early_role=True),
        Case("stall", "32 streams x 100 tok/s that stand still for 500 ms", 32, 100, seconds, stall_seconds=0.5),
    )
