"""What this machine is, in the words that go under every number."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from engines.base import Device

GIB = 1 << 30
UNKNOWN_WORDS = "hardware not known: somebody else's server"


@dataclass(frozen=True, slots=True)
class Hardware:
    """`gpu` is None without an NVIDIA GPU; `gpu_memory_gib` also where the GPU shares the machine's memory.
    `cores` are those this process may use."""

    cpu: str
    cores: int
    memory_gib: float
    gpu: str | None = None
    gpu_memory_gib: float | None = None
    gpu_count: int = 0
    system: str = ""

    @property
    def device(self) -> Device:
        return "cuda" if self.gpu else "cpu"

    @property
    def words(self) -> str:
        machine = f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB memory"
        if not self.gpu:
            return f"{machine}, no GPU"
        count = f"{self.gpu_count} x " if self.gpu_count > 1 else ""
        memory = "" if self.gpu_memory_gib is None else f" ({self.gpu_memory_gib:.0f} GiB)"
        return f"{count}{self.gpu}{memory}, {machine}"


def hardware_words(hardware: Hardware | None) -> str:
    """None: of a server that is not ours."""
    return hardware.words if hardware else UNKNOWN_WORDS


@cache
def this_machine() -> Hardware:
    gpus = _nvidia_gpus()
    return Hardware(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / GIB, 1),
        gpu=gpus[0][0] if gpus else None,
        gpu_memory_gib=gpus[0][1] if gpus else None,
        gpu_count=len(gpus),
        system=f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _nvidia_gpus() -> list[tuple[str, float | None]]:
    """(name, memory in GiB) of each GPU that this process may use, as nvidia-smi reports it; empty where there is none.

    nvidia-smi itself does not heed CUDA_VISIBLE_DEVICES, but takes what stands in it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi") or visible in ("", "-1"):
        return []
    chosen = ["--id", visible] if visible else []
    try:
        answer = subprocess.run(
            ["nvidia-smi", *chosen, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []  # a driver that does not answer is a GPU that cannot be used
    rows = [line.rpartition(",") for line in answer.stdout.splitlines()]
    return [(name.strip(), _gibibytes(memory.strip())) for name, _, memory in rows if name]  # else it is a message


def _gibibytes(mebibytes: str) -> float | None:
    try:
        return round(float(mebibytes) / 1024, 1)
    except ValueError:
        return None  # "[N/A]": it has no memory of its own
