"""Which row of the table a driver's name means."""

from __future__ import annotations

import pytest

from engines.gpus import GPUS, Gpu, gpu_named

ROWS = {
    "NVIDIA B200": "B200",
    "NVIDIA H200": "H200",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA A100-SXM4-40GB": "A100-40GB",
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA A100-PCIE-40GB": "A100-40GB",
    "NVIDIA A100 80GB PCIe": "A100-80GB PCIe",
    "NVIDIA L40S": "L40S",
    "NVIDIA L4": "L4",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": "A10",
    "Tesla T4": "T4",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
}
UNKNOWN = [
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GH200 480GB",
    "NVIDIA GB200",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A1000",
    "NVIDIA L40",
    "NVIDIA T400 4GB",
    "Test GPU",
    "",
    None,
]


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_a_drivers_name_finds_its_row(name: str, row: str) -> None:
    found = gpu_named(name)
    assert found is not None
    assert found.name == row


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_name_that_is_not_in_the_table_finds_none(name: str | None) -> None:
    assert gpu_named(name) is None


def test_every_row_is_found_by_a_name() -> None:
    assert set(ROWS.values()) == {gpu.name for gpu in GPUS}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_row_is_in_gigabytes_per_second_and_dollars_per_hour(gpu: Gpu) -> None:
    # A digit too many or too few would leave these bounds: an L4 reads 300 GB/s, a B200 8,000
    assert 300 <= gpu.gigabytes_per_second <= 8000
    assert gpu.dollars_per_hour is None or 0.5 < gpu.dollars_per_hour < 10
