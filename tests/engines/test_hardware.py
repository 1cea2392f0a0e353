"""What this machine is; NVIDIA GPUs are those that a program called nvidia-smi reports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engines.hardware import Hardware, this_machine

Machine = Callable[[str], Hardware]


@pytest.fixture
def machine_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """This machine as it looks when nvidia-smi is a given shell script."""

    def look(script: str) -> Hardware:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        this_machine.cache_clear()
        return this_machine()

    yield look
    this_machine.cache_clear()


def test_this_machine_is_described_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no nvidia-smi
    this_machine.cache_clear()
    machine = this_machine()
    this_machine.cache_clear()
    assert machine.cores == len(psutil.Process().cpu_affinity())
    assert machine.memory_gib == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.1)
    assert machine.cpu
    assert (machine.device, machine.gpu, machine.gpu_memory_gib, machine.gpu_count) == ("cpu", None, None, 0)


def test_the_cores_are_those_that_this_process_may_use() -> None:
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += "from engines.hardware import this_machine; print(this_machine().cores)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "1"


def test_an_nvidia_gpu_makes_the_device_cuda(machine_with: Machine) -> None:
    machine = machine_with("echo 'NVIDIA H100 80GB HBM3, 81559'")
    assert machine.device == "cuda"
    assert (machine.gpu, machine.gpu_count) == ("NVIDIA H100 80GB HBM3", 1)
    assert machine.gpu_memory_gib == 79.6  # 81559 MiB / 1024 = 79.65, shown as 79.6


def test_a_gpu_that_this_process_may_not_use_is_not_its_own(
    machine_with: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = '[ "$1 $2" = "--id 1" ] && echo "Second, 2048" && exit; echo "First, 1024"; echo "Second, 2048"'
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert (machine_with(script).gpu, machine_with(script).gpu_count) == ("Second", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine_with(script).gpu is None


def test_several_gpus_are_counted(machine_with: Machine) -> None:
    machine = machine_with("echo 'NVIDIA A100, 40960'; echo 'NVIDIA A100, 40960'")
    assert machine.gpu_count == 2
    assert machine.words.startswith("2 x NVIDIA A100 (40 GiB), ")  # 40960 / 1024 = 40


@pytest.mark.parametrize(
    "script",
    ["exit 9", "echo 'No devices were found'", "echo 'Failed to initialize NVML: Driver/library version mismatch'"],
    ids=["exit code", "no devices", "driver mismatch"],
)
def test_a_driver_that_names_no_gpu_leaves_the_cpu(machine_with: Machine, script: str) -> None:
    machine = machine_with(script)
    assert (machine.device, machine.gpu, machine.gpu_count) == ("cpu", None, 0)


def test_a_gpu_that_shares_the_machines_memory_has_none_of_its_own(machine_with: Machine) -> None:
    machine = machine_with("echo 'NVIDIA GB10, [N/A]'")
    assert (machine.device, machine.gpu, machine.gpu_memory_gib) == ("cuda", "NVIDIA GB10", None)
    assert machine.words.startswith("NVIDIA GB10, ")


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Hardware("Ryzen 9", 2, 7.8), "Ryzen 9, 2 cores, 8 GiB memory, no GPU"),
        (Hardware("Xeon", 16, 128.0, "H100", 79.6, 1), "H100 (80 GiB), Xeon, 16 cores, 128 GiB memory"),
        (Hardware("Xeon", 64, 512.0, "H200", 139.8, 4), "4 x H200 (140 GiB), Xeon, 64 cores, 512 GiB memory"),
    ],
)
def test_the_words_that_go_under_every_number(machine: Hardware, words: str) -> None:
    assert machine.words == words
