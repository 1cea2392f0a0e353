"""Memory bandwidth: the data sheet's for a GPU that we know, measured for a CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from engines.clock import monotonic_clock
from engines.gpus import gpu_named
from engines.hardware import Hardware

ROUNDS = 12
LEAST_ROUND_SECONDS = 0.02  # shorter rounds would measure the starting of threads
LARGEST_READ = 1 << 30  # bytes; beyond every cache a larger block reads no slower


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """`source` says in words where the number comes from."""

    bytes_per_second: float
    source: str


def memory_bandwidth(hardware: Hardware, block_bytes: int, threads: int) -> Bandwidth | None:
    """Of the GPU, or else of the processor as `threads` threads read a block of that size; None for unknown GPUs."""
    if hardware.gpu:
        gpu = gpu_named(hardware.gpu)
        return Bandwidth(gpu.gigabytes_per_second * 1e9, f"data sheet of the {gpu.name}") if gpu else None
    return measured_bandwidth(block_bytes, threads)


@cache
def measured_bandwidth(block_bytes: int, threads: int) -> Bandwidth:
    """The best of several rounds in which threads read the block again and again, each its own part.

    The block is as large as what decoding reads per step, so that it lies in the caches where the model would, too.
    """
    import numpy as np

    size = max(1 << 20, min(block_bytes, LARGEST_READ))
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    repeats, best = 1, 0.0
    with ThreadPoolExecutor(threads) as pool:
        done = 0
        while done < ROUNDS:
            together = threading.Barrier(threads)

            def read(part: Any, times: int = repeats, start: threading.Barrier = together) -> tuple[float, float]:
                start.wait()
                began = monotonic_clock()
                for _ in range(times):
                    np.bitwise_or.reduce(part)
                return began, monotonic_clock()

            spans = list(pool.map(read, parts))
            seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
            if seconds < LEAST_ROUND_SECONDS:
                repeats *= 2
                continue
            best, done = max(best, repeats * size / seconds), done + 1
    readers = "1 thread" if threads == 1 else f"{threads} threads"
    return Bandwidth(best, f"measured: {readers} reading {size / 1e6:,.0f} MB again and again")
