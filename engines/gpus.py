"""What is known of each GPU: one row per model, its memory bandwidth and what renting it costs."""

from __future__ import annotations

import re
from dataclasses import dataclass

PRICES_OF = "2026-09"  # Modal's list prices, as transcribed then
# Billed beside the GPU, for what a container asked for: $ per second of a physical core and of a GiB of memory.
CORE_DOLLARS_PER_SECOND = 0.0000131
GIBIBYTE_DOLLARS_PER_SECOND = 0.00000222


@dataclass(frozen=True, slots=True)
class Gpu:
    """`pattern` matches the name that the driver reports. `gigabytes_per_second`: its memory, by the data sheet;
    `dollars_per_hour`: Modal's list price of PRICES_OF, None where Modal does not rent it."""

    name: str
    pattern: str
    gigabytes_per_second: float
    dollars_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """What the hardware of a run costs, and in words who says so."""

    dollars_per_hour: float
    source: str


# More exact patterns first.
GPUS = (
    Gpu("B200", r"\bB200\b", 8000, 6.25),
    Gpu("H200", r"\bH200\b", 4800, 4.54),
    Gpu("H100 PCIe", r"\bH100 PCIe\b", 2000),
    Gpu("H100 NVL", r"\bH100 NVL\b", 3900),
    Gpu("H100", r"\bH100\b", 3350, 3.95),
    Gpu("A100-80GB", r"\bA100-SXM4?-80GB\b", 2039, 2.50),
    Gpu("A100-80GB PCIe", r"\bA100.*80GB\b", 1935, 2.50),
    Gpu("A100-40GB", r"\bA100\b.*40GB\b", 1555, 2.10),
    Gpu("L40S", r"\bL40S\b", 864, 1.95),
    Gpu("L4", r"\bL4\b", 300, 0.80),
    Gpu("A10", r"\bA10G?\b", 600, 1.10),
    Gpu("T4", r"\bT4\b", 320, 0.59),
    Gpu("RTX-PRO-6000", r"\bRTX PRO 6000 Blackwell Server\b", 1597, 3.03),
    Gpu("RTX 5090", r"\bRTX 5090\b(?! (Laptop|Mobile))", 1792),
    Gpu("RTX 4090", r"\bRTX 4090\b(?! (Laptop|Mobile|D))", 1008),
    Gpu("RTX 3090", r"\bRTX 3090\b(?! Ti)", 936),
)


def gpu_named(name: str | None) -> Gpu | None:
    """The row of a driver's name such as "NVIDIA H100 80GB HBM3"; None for what is not in the table."""
    return next((gpu for gpu in GPUS if name and re.search(gpu.pattern, name)), None)
