"""What travels: which packages the machine has, what stays behind, and how files become parts."""

from __future__ import annotations

import random
import re
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from engines import ENGINES
from engines.environments import normalised, pinned
from packing import pack
from packing.choices import ANY_BASE, LEFT_OUT, LEFT_OUT_OF, STRIPPED, reason_to_strip
from packing.pack import PackError, Plan, blocks_of, members_of, plan, platforms, read_freeze, without_overwritten
from tests.packing.conftest import PYTHON, MakeWheel

SETS = sorted(pack.REQUIREMENTS.glob("*.txt"))


def test_the_list_of_the_machines_packages_is_read_as_pip_writes_it() -> None:
    text = "# list\nTorch==2.11.0+cu130\nnumpy==2.5.2 ; python_version > '3'\nscipy\nmine @ file:///x\n-e .\n\n"
    assert read_freeze(text) == {"torch": "2.11.0", "numpy": "2.5.2", "scipy": None, "mine": None}


def requirements(folder: Path, *pins: str) -> Path:
    file = folder / "pins.txt"
    file.write_text("\n".join(pins))
    return file


def test_what_the_machine_has_in_that_version_does_not_travel(tmp_path: Path) -> None:
    file = requirements(
        tmp_path, "torch==2.11.0", "Numpy==2.5.2", "typer==1.0", "rich==2.0", "scipy==1.18", "z3-solver==4"
    )
    base: dict[str, str | None] = {"torch": "2.11.0", "numpy": "2.5.2", "typer": "1.1", "rich": None, "scipy": None}
    assert plan("fast", file, base) == Plan(
        name="fast",
        device="cuda",
        packed={"typer": "1.0", "rich": "2.0"},  # another version; a version that is not known
        base={"torch": "2.11.0", "numpy": "2.5.2", "scipy": None},
        left_out={"z3-solver": LEFT_OUT["z3-solver"]},
    )


def test_a_package_that_any_version_serves_for_travels_when_the_machine_lacks_it(tmp_path: Path) -> None:
    assert plan("fast", requirements(tmp_path, "scipy==1.18"), {}).packed == {"scipy": "1.18"}


@pytest.mark.parametrize(
    ("base", "has"),
    [({"torch": "2.13.0"}, "torch 2.13.0"), ({"torch": None}, "no torch of a known version"), ({}, "no torch")],
)
def test_another_torch_is_refused(tmp_path: Path, base: dict[str, str | None], has: str) -> None:
    with pytest.raises(PackError, match=rf"^fast needs torch 2\.11\.0; the machine has {has}"):
        plan("fast", requirements(tmp_path, "torch==2.11.0"), base)


def test_pip_is_given_every_platform_tag_down_from_the_machines_glibc() -> None:
    tags = platforms("2.35")
    assert tags[0] == "manylinux_2_35_x86_64"
    assert {"manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(tags)
    assert "manylinux_2_36_x86_64" not in tags


@pytest.mark.parametrize(
    ("distribution", "path", "stays"),
    [
        ("vllm", "vllm/vllm-rs", True),
        ("vllm", "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", True),
        ("vllm", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", False),
        ("other", "vllm/vllm-rs", False),
        ("any", "any/_C.cpython-310-x86_64-linux-gnu.so", True),
        ("any", "any/_C.cpython-312-x86_64-linux-gnu.so", False),
        ("any", "any/_C.abi3.so", False),
        ("sglang-kernel", "sgl_kernel/sm100/common_ops.abi3.so", True),
        ("sglang-kernel", "sgl_kernel/sm90/common_ops.abi3.so", False),
    ],
)
def test_what_stays_behind(distribution: str, path: str, stays: bool) -> None:
    assert (reason_to_strip(distribution, path, "3.12") is not None) is stays


def test_a_wheels_files_go_where_an_installer_puts_them(wheel: MakeWheel, shelf: Path) -> None:
    wheel(
        "fast",
        "1",
        {
            "fast.py": "",
            "fast-1.data/scripts/fast-tool": "#!python\n",
            "fast-1.data/purelib/more.py": "",
            "fast-1.data/data/share/fast.txt": "",
            "fast-1.data/headers/fast.h": "//",
        },
    )
    members, stripped = members_of(shelf / "fast-1-py3-none-any.whl", "fast", "1", "3.12")
    packages = "lib/python3.12/site-packages"
    assert {member.path for member in members if "dist-info" not in member.path} == {
        f"{packages}/fast.py",
        f"{packages}/more.py",
        "bin/fast-tool",
        "share/fast.txt",
    }
    assert [member.path for member in members if member.executable] == ["bin/fast-tool"]
    assert stripped == {"headers for building against the package": 2}


def test_of_two_packages_files_in_one_place_the_later_ones_stays(wheel: MakeWheel, shelf: Path) -> None:
    members = []
    for name in ("libs-base", "libs-cu13"):
        wheel(name, "1", {"libs/core.so": name, f"libs/{name}.py": ""})
        members += members_of(shelf / f"{name.replace('-', '_')}-1-py3-none-any.whl", name, "1", "3.12")[0]
    both = Plan("fast", "cuda", {"libs-base": "1", "libs-cu13": "1"}, {}, {})
    kept = without_overwritten(members, [both])
    assert [member.distribution for member in kept if member.path.endswith("core.so")] == ["libs-cu13==1"]
    assert len(kept) == len(members) - 1
    with pytest.raises(PackError, match="overwritten in one environment and not in another"):
        without_overwritten(members, [both, Plan("slow", "cuda", {"libs-base": "1"}, {}, {})])


def test_blocks_hold_every_byte_once(wheel: MakeWheel, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "BLOCK", 1000)
    chance = random.Random(7)
    files: dict[str, str | bytes] = {f"part{size}.bin": chance.randbytes(size) for size in (0, 1, 300, 499, 700, 2500)}
    wheel("fast", "1", files)
    path = shelf / "fast-1-py3-none-any.whl"
    members, _ = members_of(path, "fast", "1", "3.12")
    found = {member.entry: b"" for member in members}
    for raw, pieces in blocks_of(members):
        assert 0 < len(raw) <= 1000
        assert sum(length for _, _, length in pieces) == len(raw)
        for number, offset, length in pieces:
            found[members[number].entry] += raw[offset : offset + length]
    with zipfile.ZipFile(path) as archive:
        assert found == {name: archive.read(name) for name in archive.namelist()}


def test_parts_never_exceed_their_limit_and_a_block_too_large_is_refused(tmp_path: Path) -> None:
    parts = pack.Parts(tmp_path, 100)
    assert [parts.add(bytes(size)) for size in (60, 40, 1, 99, 50)] == [
        (0, 0, 60),
        (0, 60, 40),
        (1, 0, 1),
        (1, 1, 99),
        (2, 0, 50),
    ]
    assert [(tmp_path / f"part-0{number}").stat().st_size for number in range(3)] == [100, 100, 50]
    with pytest.raises(PackError, match="make parts larger"):
        parts.add(bytes(101))


def test_a_kept_block_is_not_compressed_again(tmp_path: Path) -> None:
    stream = pack.compressed(b"block" * 100, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == stream
    kept.write_bytes(b"from the folder")
    assert pack.compressed(b"block" * 100, tmp_path) == b"from the folder"


def test_a_package_that_cannot_be_had_is_said_in_pips_words(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="no-such-engine==1"):
        pack.download(
            [Plan("fast", "cuda", {"no-such-engine": "1"}, {}, {})], tmp_path, PYTHON, "2.35", lambda message: None
        )


# The pinned sets


@pytest.mark.parametrize("file", SETS, ids=lambda file: file.stem)
def test_every_line_of_a_set_is_a_name_and_a_version(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][A-Za-z0-9.]*", line)] == []
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    assert len(pinned(file)) == len(lines) > 20
    versions = [line.partition("==")[2] for line in lines]
    assert [version for version in versions if str(Version(version)) != version] == []


def test_every_engine_has_a_set_with_the_engine_and_torch() -> None:
    for engine in ENGINES:
        if "cuda" in engine.requirements:
            pins = pinned(pack.REQUIREMENTS / f"{engine.name}-cuda-torch2.11.txt")
            assert pins["torch"] == "2.11.0"
            assert normalised(engine.package_for("cuda")) in pins


def test_what_is_chosen_by_name_is_in_a_set() -> None:
    listed = set().union(*(pinned(file) for file in SETS))
    assert set(LEFT_OUT) <= listed
    assert set(ANY_BASE) <= listed
    assert {distribution for distribution, _, _ in STRIPPED} <= listed
    assert not set(LEFT_OUT) & set(ANY_BASE)
    for engine, chosen in LEFT_OUT_OF.items():
        assert set(chosen) <= set(pinned(pack.REQUIREMENTS / f"{engine}-cuda-torch2.11.txt"))


def test_what_one_engine_leaves_out_another_takes_along(tmp_path: Path) -> None:
    file = requirements(tmp_path, "nvidia-cutlass-dsl==4.5.2")
    assert set(plan("sglang", file, {}).left_out) == {"nvidia-cutlass-dsl"}
    assert set(plan("vllm", file, {}).packed) == {"nvidia-cutlass-dsl"}
