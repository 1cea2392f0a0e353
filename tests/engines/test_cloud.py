"""What a rented machine costs per second, written out, and the names by which it is asked for."""

from __future__ import annotations

import pytest

from engines.cloud import GPU_CHOICES, GpuChoice, Machine, Rates, Rental, listed_rates
from engines.gpus import CORE_DOLLARS_PER_SECOND, GIBIBYTE_DOLLARS_PER_SECOND, GPUS, PRICES_OF

# 4 cores and 32 GiB beside the GPU: 4 * 0.0000131 + 32 * 0.00000222 $/s
BESIDE = 0.0000524 + 0.00007104


@pytest.mark.parametrize(
    ("gpu", "count", "words"),
    [("L4", 1, "L4"), ("L4", 4, "L4:4"), ("H100!", 1, "H100!"), ("H100!", 2, "H100!:2"), ("", 1, ""), ("", 2, "")],
)
def test_a_gpu_is_asked_for_by_its_name_and_their_number(gpu: str, count: int, words: str) -> None:
    assert Rental("vllm", "owner/model", gpu=gpu, gpu_count=count).gpu_words == words


def test_rentals_that_differ_in_anything_are_different_containers() -> None:
    plain = Rental("vllm", "owner/model")
    others = {
        plain,
        Rental("sglang", "owner/model"),
        Rental("vllm", "owner/other"),
        Rental("vllm", "owner/model", "owner/draft"),
        Rental("vllm", "owner/model", features='{"prefix_caching": true}'),
        Rental("vllm", "owner/model", gpu="H100!"),
        Rental("vllm", "owner/model", gpu_count=2),
        Rental("vllm", "owner/model", snapshot=True),
    }
    assert len(others) == 8
    assert Rental("vllm", "owner/model") in others


# Prices


def test_a_container_costs_its_gpu_its_cores_and_its_memory() -> None:
    machine = Machine()
    assert (machine.cores, machine.gibibytes) == (4, 32)
    rate = listed_rates().dollars_per_second("L4", 1, machine.cores, machine.gibibytes)
    assert rate == pytest.approx(0.80 / 3600 + BESIDE)  # 0.000222 + 0.000123 = 0.000346 $/s, $1.24 per hour
    assert rate * 3600 == pytest.approx(1.244, abs=0.001)


def test_several_gpus_cost_several_times_one_and_what_is_beside_them_once() -> None:
    rates = listed_rates()
    assert rates.dollars_per_second("L4", 2, 4, 32) == pytest.approx(2 * 0.80 / 3600 + BESIDE)


def test_exactly_an_h100_costs_what_an_h100_does() -> None:
    rates = listed_rates()
    assert rates.dollars_per_second("H100!", 1, 4, 32) == pytest.approx(3.95 / 3600 + BESIDE)
    assert rates.dollars_per_second("H100!", 1, 4, 32) == rates.dollars_per_second("H100", 1, 4, 32)


def test_of_an_unknown_gpu_no_price_is_known() -> None:
    assert listed_rates().dollars_per_second("X9000", 1, 4, 32) is None


def test_a_machine_without_a_gpu_costs_its_cores_and_its_memory() -> None:
    assert listed_rates().dollars_per_second("", 1, 4, 32) == pytest.approx(BESIDE)
    assert Rates({}, 0.5, 0.25, "by hand").dollars_per_second("", 1, 2, 8) == 2 * 0.5 + 8 * 0.25


def test_listed_prices_are_those_of_the_table_per_second() -> None:
    rates = listed_rates()
    per_hour = {gpu.name: gpu.dollars_per_hour for gpu in GPUS if gpu.dollars_per_hour is not None}
    assert {name: price * 3600 for name, price in rates.gpus.items()} == pytest.approx(per_hour)
    assert (rates.core, rates.gibibyte) == (CORE_DOLLARS_PER_SECOND, GIBIBYTE_DOLLARS_PER_SECOND)
    assert rates.source == f"Modal's list prices of {PRICES_OF}"


# What can be asked for


@pytest.mark.parametrize("choice", GPU_CHOICES, ids=lambda choice: choice.name)
def test_no_gpu_can_be_exchanged_for_a_larger_one_unasked(choice: GpuChoice) -> None:
    # Modal may answer "H100" with an H200, "A100" with either size, and "B200+" with a B300
    assert choice.exactly not in {"H100", "A100"}
    assert not choice.exactly.endswith("+")
    assert choice.exactly.rstrip("!") == choice.name


def test_an_h100_is_exactly_one_and_an_a100_has_a_size() -> None:
    exactly = {choice.name: choice.exactly for choice in GPU_CHOICES}
    assert len(exactly) == len(GPU_CHOICES)
    assert exactly["H100"] == "H100!"
    assert {name for name in exactly if name.startswith("A100")} == {"A100-40GB", "A100-80GB"}
