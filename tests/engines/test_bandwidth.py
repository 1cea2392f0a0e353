"""Memory bandwidth: this machine's own as it is measured, and the data sheet's of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from engines import bandwidth
from engines.bandwidth import Bandwidth, measured_bandwidth, memory_bandwidth
from engines.base import Engine
from engines.hardware import Hardware
from engines.local import LocalHost
from engines.model_shape import ModelShape
from tests.conftest import MACHINE

MEGABYTES = 1_000_000


@pytest.mark.parametrize(("threads", "readers"), [(1, "1 thread"), (2, "2 threads")])
def test_a_processor_is_measured_in_so_many_threads(threads: int, readers: str) -> None:
    found = measured_bandwidth(8 * MEGABYTES, threads)
    assert 0.5e9 < found.bytes_per_second < 2000e9  # from the slowest memory to the quickest cache
    assert found.source == f"measured: {readers} reading 8 MB again and again"


def test_more_threads_than_cores_are_measured_too() -> None:
    assert 0.5e9 < measured_bandwidth(2 * MEGABYTES, 7).bytes_per_second < 2000e9


def test_a_block_is_neither_too_small_to_be_timed_nor_larger_than_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = measured_bandwidth.__wrapped__  # nothing that this test changes may be remembered
    assert measure(10, 1).source == "measured: 1 thread reading 1 MB again and again"
    monkeypatch.setattr(bandwidth, "LARGEST_READ", 3 * MEGABYTES)
    assert measure(140_000 * MEGABYTES, 1).source == "measured: 1 thread reading 3 MB again and again"


def test_the_same_block_is_measured_once() -> None:
    machine = replace(MACHINE, cpu="Another CPU")
    assert memory_bandwidth(MACHINE, 8 * MEGABYTES, 1) is memory_bandwidth(machine, 8 * MEGABYTES, 1)


def test_a_gpus_bandwidth_is_its_data_sheets() -> None:
    machine = replace(MACHINE, gpu="NVIDIA H100 80GB HBM3", gpu_count=1)
    assert memory_bandwidth(machine, 8 * MEGABYTES, 1) == Bandwidth(3350e9, "data sheet of the H100")


def test_of_an_unknown_gpu_no_bandwidth_is_known() -> None:
    assert memory_bandwidth(replace(MACHINE, gpu="Test GPU"), 8 * MEGABYTES, 1) is None


def test_a_host_reads_what_one_step_does_in_as_many_threads_as_its_engines(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    # All weights and a quarter of the experts: 1 + 8 / 4 MB. Of two cores one is left to the server and the page
    shape = ModelShape(MEGABYTES, 100, expert_bytes=8 * MEGABYTES, expert_count=4, experts_used=1)
    found = make_host(scripted()).memory_bandwidth(shape)
    assert found is not None
    assert found.source == "measured: 1 thread reading 3 MB again and again"
    with_gpu = make_host(scripted(), hardware=replace(MACHINE, gpu="NVIDIA L4", gpu_count=1))
    assert with_gpu.memory_bandwidth(shape) == Bandwidth(300e9, "data sheet of the L4")


SHAPE = ModelShape(MEGABYTES, 100)
L4 = replace(MACHINE, gpu="NVIDIA L4", gpu_count=2)


def test_gpus_that_compute_a_token_together_read_at_the_same_time(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost]
) -> None:
    host = make_host(scripted(), hardware=L4, tensor_parallel=2)
    assert host.memory_bandwidth(SHAPE) == Bandwidth(2 * 300e9, "2 x data sheet of the L4")
    unknown = make_host(scripted(), hardware=replace(L4, gpu="Test GPU"), tensor_parallel=2)
    assert unknown.memory_bandwidth(SHAPE) is None


@pytest.mark.parametrize("hardware", [L4, MACHINE])
def test_of_several_copies_no_bandwidth_is_known(
    scripted: Callable[..., Engine], make_host: Callable[..., LocalHost], hardware: Hardware
) -> None:
    assert make_host(scripted(), hardware=hardware, replicas=2).memory_bandwidth(SHAPE) is None
