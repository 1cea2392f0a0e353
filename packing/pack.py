"""Packs engines for a GPU machine that has torch but no network: wheels in, parts of a given size out.

What the machine has is read from a list of its packages (`pip freeze`). What it lacks of an engine's pinned set is
downloaded, stripped of what is never loaded there, and compressed. The format is described in `packing.unpack`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.environments import normalised, pinned
from packing.choices import ANY_BASE, reason_to_leave_out, reason_to_strip
from packing.needs import unmet
from packing.unpack import FORMAT, INDEX, MANIFEST, MIB, part_name, public, sum_of

REQUIREMENTS = Path(__file__).parent / "requirements"
APP = "app"
BLOCK = 16 * MIB  # raw bytes; large enough to compress well, small enough for 16 cores to share the work
PRESET = 6
ROUND = 16  # blocks compressed before any of them is written

Progress = Callable[[str], None]


class PackError(Exception):
    """What the person who packs can do something about."""


@dataclass(frozen=True)
class Plan:
    """One environment: where each pinned distribution comes from. Versions are the pinned ones."""

    name: str
    device: str
    packed: dict[str, str]
    base: dict[str, str | None]  # None: the machine's own version, whatever it is
    left_out: dict[str, str]  # name -> reason

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.device}-packed"


@dataclass(frozen=True)
class Member:
    """One file: whose it is, where it goes inside an environment, and where its bytes are."""

    distribution: str  # name==version
    path: str
    executable: bool
    size: int
    wheel: Path
    entry: str


def read_freeze(text: str) -> dict[str, str | None]:
    """Distribution -> version of `pip freeze`'s lines; None for a bare name, whose version is not known."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        line = line.partition("#")[0].partition(";")[0].strip()
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\s*==\s*(\S+)|\s*@\s*\S+)?", line)
        if match:
            found[normalised(match.group(1))] = public(match.group(2)) if match.group(2) else None
    return found


def plan(name: str, requirements: Path, base: dict[str, str | None], device: str = "cuda") -> Plan:
    """Raises PackError when the machine's torch is not the pinned one."""
    packed, from_base, left_out = {}, dict[str, str | None](), {}
    for distribution, version in pinned(requirements).items():
        if reason := reason_to_leave_out(name, distribution):
            left_out[distribution] = reason
        elif distribution in base and distribution in ANY_BASE:
            from_base[distribution] = None
        elif distribution in base and base[distribution] == version:
            from_base[distribution] = version
        elif distribution == "torch":
            has = f"torch {base['torch']}" if base.get("torch") else "no torch of a known version"
            raise PackError(f"{name} needs torch {version}; the machine has {has}.")
        else:
            packed[distribution] = version
    return Plan(name, device, packed, from_base, left_out)


def platforms(glibc: str) -> list[str]:
    """The platform tags of wheels that run with this version of glibc, the newest first. pip takes each literally."""
    major, minor = map(int, glibc.split("."))
    newest = [f"manylinux_{major}_{number}_x86_64" for number in range(minor, 4, -1)]
    return [*newest, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def download(plans: list[Plan], wheels: Path, python: str, glibc: str, progress: Progress) -> None:
    """Raises PackError with pip's own words. One call per environment: pip takes one version of a package a call."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--implementation", "cp"]
    command += ["--python-version", python, "--abi", f"cp{python.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
    for platform in platforms(glibc):
        command += ["--platform", platform]
    for wanted in plans:
        pins = [f"{name}=={version}" for name, version in wanted.packed.items()]
        if not pins:
            continue
        progress(f"downloading {len(pins)} packages of {wanted.name}")
        done = subprocess.run([*command, "--dest", str(wheels), *pins], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise PackError("\n".join(errors or done.stderr.splitlines()[-5:]))


def wheel_of(wheels: Path, name: str, version: str) -> Path:
    for path in sorted(wheels.glob("*.whl")):
        found, its_version, *_ = path.name.split("-")
        if normalised(found) == name and its_version == version:
            return path
    raise PackError(f"pip did not leave a wheel of {name} {version} in {wheels}.")


def place_of(path: str, python: str) -> str | None:
    """Where a wheel's file goes inside an environment; None for a folder of it that is not installed."""
    packages = f"lib/python{python}/site-packages"
    match = re.match(r"[^/]+\.data/(purelib|platlib|scripts|data|headers)/(.+)", path)
    if not match:
        return f"{packages}/{path}"
    folder, rest = match.groups()
    if folder == "headers":
        return None  # for building extensions against the package
    return {"purelib": f"{packages}/{rest}", "platlib": f"{packages}/{rest}", "scripts": f"bin/{rest}", "data": rest}[
        folder
    ]


def members_of(wheel: Path, name: str, version: str, python: str) -> tuple[list[Member], dict[str, int]]:
    """The wheel's files that travel, and the bytes that do not, by reason."""
    members, stripped = [], dict[str, int]()
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            reason = reason_to_strip(name, entry.filename, python)
            place = place_of(entry.filename, python)
            if reason or not place:
                reason = reason or "headers for building against the package"
                stripped[reason] = stripped.get(reason, 0) + entry.file_size
                continue
            executable = bool(entry.external_attr >> 16 & 0o111) or place.startswith("bin/")
            members.append(Member(f"{name}=={version}", place, executable, entry.file_size, wheel, entry.filename))
    return members, stripped


def without_overwritten(members: list[Member], plans: list[Plan]) -> list[Member]:
    """Of two packages' files in one place, the later package's: what pip would leave.

    Raises PackError when the two meet in one environment and not in another.
    """
    environments = {
        f"{name}=={version}": {wanted.name for wanted in plans if wanted.packed.get(name) == version}
        for each in plans
        for name, version in each.packed.items()
    }
    kept: dict[tuple[str, str], Member] = {}  # (environment, path)
    lost: set[Member] = set()
    for member in members:
        for environment in environments[member.distribution]:
            before = kept.get((environment, member.path))
            if before is not None:
                lost.add(before)
            kept[environment, member.path] = member
    both = lost & set(kept.values())
    if both:
        member = next(iter(both))
        raise PackError(f"{member.path} of {member.distribution} is overwritten in one environment and not in another.")
    return [member for member in members if member not in lost]


def blocks_of(members: list[Member]) -> Iterator[tuple[bytes, list[tuple[int, int, int]]]]:
    """(raw bytes, [(number of the member, offset in the block, length), ...]) of at most BLOCK bytes each.

    Large files begin a block of their own, so that the same file gives the same blocks in every pack.
    """
    raw = bytearray()
    pieces: list[tuple[int, int, int]] = []
    archive: zipfile.ZipFile | None = None
    for number, member in enumerate(members):
        if archive is None or archive.filename != str(member.wheel):
            archive = zipfile.ZipFile(member.wheel)
        if member.size >= BLOCK // 2 and raw:
            yield bytes(raw), pieces
            raw, pieces = bytearray(), []
        if member.size == 0:
            continue
        with archive.open(member.entry) as file:
            while piece := file.read(BLOCK - len(raw)):
                pieces.append((number, len(raw), len(piece)))
                raw += piece
                if len(raw) == BLOCK:
                    yield bytes(raw), pieces
                    raw, pieces = bytearray(), []
    if raw:
        yield bytes(raw), pieces


def compressed(raw: bytes, kept: Path | None) -> bytes:
    """An xz stream; from the folder of kept ones when the same bytes were compressed before."""
    file = kept / f"{hashlib.sha256(raw).hexdigest()}-{PRESET}.xz" if kept else None
    if file and file.exists():
        return file.read_bytes()
    stream = lzma.compress(raw, preset=PRESET)
    if file:
        partial = file.with_suffix(".part")
        partial.write_bytes(stream)
        partial.replace(file)
    return stream


class Parts:
    """Writes blocks one after the other into parts of at most `limit` bytes."""

    def __init__(self, out: Path, limit: int) -> None:
        self.out = out
        self.limit = limit
        self.sizes: list[int] = []

    def add(self, stream: bytes) -> tuple[int, int, int]:
        """(part, offset, bytes). Raises PackError when the block alone is larger than a part."""
        if len(stream) > self.limit:
            raise PackError(f"A block of {len(stream) / 1e6:.1f} MB does not fit into a part: make parts larger.")
        if not self.sizes or self.sizes[-1] + len(stream) > self.limit:
            self.sizes.append(0)
        part, offset = len(self.sizes) - 1, self.sizes[-1]
        with (self.out / part_name(part)).open("ab") as file:
            file.write(stream)
        self.sizes[-1] += len(stream)
        return part, offset, len(stream)


def pack(
    plans: list[Plan],
    wheels: Path,
    out: Path,
    python: str,
    part_bytes: int,
    processes: int = 1,
    kept: Path | None = None,
    progress: Progress = lambda message: None,
) -> dict[str, Any]:
    """Writes the parts, the index and the manifest into `out`, in place of an earlier pack; returns the manifest."""
    distributions = sorted({item for wanted in plans for item in wanted.packed.items()})
    members: list[Member] = []
    stripped: dict[str, int] = {}
    for name, version in distributions:
        found, dropped = members_of(wheel_of(wheels, name, version), name, version, python)
        members += found
        for reason, size in dropped.items():
            stripped[f"{name}: {reason}"] = size
    members = without_overwritten(members, plans)
    # Inside a wheel, alike lies beside alike: all Python, then all headers.
    members.sort(key=lambda member: (member.distribution, member.size >= BLOCK // 2, Path(member.path).suffix))

    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("part-*"), out / INDEX, out / MANIFEST]:
        old.unlink(missing_ok=True)
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
    parts = Parts(out, part_bytes)
    blocks: list[tuple[int, int, int]] = []
    segments: list[list[tuple[int, int, int]]] = [[] for _ in members]
    total = sum(member.size for member in members)
    done = 0
    pool = ThreadPoolExecutor(processes)  # lzma releases the interpreter while it works

    def write(waiting: list[tuple[bytes, list[tuple[int, int, int]]]]) -> int:
        for stream, (_, pieces) in zip(
            pool.map(lambda block: compressed(block[0], kept), waiting), waiting, strict=True
        ):
            blocks.append(parts.add(stream))
            for number, offset, length in pieces:
                segments[number].append((len(blocks) - 1, offset, length))
        return sum(len(raw) for raw, _ in waiting)

    with pool:
        waiting = []
        for block in blocks_of(members):
            waiting.append(block)
            if len(waiting) == ROUND:
                done += write(waiting)
                waiting = []
                progress(f"packed {done / 1e6:,.0f} of {total / 1e6:,.0f} MB into {sum(parts.sizes) / 1e6:,.0f} MB")
        write(waiting)

    files = [
        (member.distribution, member.path, member.executable, pieces)
        for member, pieces in zip(members, segments, strict=True)
    ]
    (out / INDEX).write_bytes(lzma.compress(json.dumps({"blocks": blocks, "files": files}).encode(), preset=PRESET))
    described = [
        {"name": name, "bytes": (out / name).stat().st_size, "sha256": sum_of(out / name)}
        for name in [INDEX, *(part_name(number) for number in range(len(parts.sizes)))]
    ]
    whole = hashlib.sha256()
    for part in described[1:]:
        whole.update((out / str(part["name"])).read_bytes())
    manifest = {
        "format": FORMAT,
        "python": python,
        "made": time.strftime("%Y-%m-%d"),
        "bytes": sum(parts.sizes),
        "sha256": whole.hexdigest(),  # of all parts one after the other
        "unpacked_bytes": total,
        "index": described[0],
        "parts": described[1:],
        "stripped": stripped,
        "environments": [
            {
                "name": wanted.name,
                "device": wanted.device,
                "folder": wanted.folder,
                "packed": wanted.packed,
                "base": wanted.base,
                "left_out": wanted.left_out,
            }
            for wanted in plans
        ],
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", action="append", default=[], help="vllm, sglang or transformers; several times")
    parser.add_argument("--with-app", action="store_true", help="also what `python -m experiments` needs")
    parser.add_argument("--python", default="3.12", help="the machine's Python (default: 3.12)")
    parser.add_argument("--torch", default="2.11", help="the machine's torch, which chooses the pinned set")
    parser.add_argument("--glibc", default="2.35", help="the machine's glibc (default: 2.35)")
    parser.add_argument("--base", type=Path, required=True, help="the machine's packages: what pip freeze says there")
    parser.add_argument("--part-megabytes", type=float, default=58, help="the size of a part at most (default: 58)")
    parser.add_argument("--out", type=Path, required=True, help="where the parts go")
    parser.add_argument("--wheels", type=Path, required=True, help="where downloaded wheels are kept")
    parser.add_argument("--kept-blocks", type=Path, help="keep compressed blocks here: packing again is quick")
    parser.add_argument("--processes", type=int, default=1, help="blocks compressed at once (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()

    def progress(message: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {message}", flush=True)

    try:
        base = read_freeze(arguments.base.read_text(encoding="utf-8"))
        names = [*arguments.engine, *([APP] if arguments.with_app else [])]
        if not names:
            raise PackError("Nothing to pack: name an --engine, or --with-app.")
        plans = []
        for name in names:
            file = REQUIREMENTS / ("app.txt" if name == APP else f"{name}-cuda-torch{arguments.torch}.txt")
            if not file.exists():
                there = ", ".join(sorted(path.stem for path in REQUIREMENTS.glob("*.txt")))
                raise PackError(f"There is no pinned set {file.name}; there are: {there}.")
            plans.append(plan(name, file, base))
        arguments.wheels.mkdir(parents=True, exist_ok=True)
        download(plans, arguments.wheels, arguments.python, arguments.glibc, progress)
        for wanted in plans:
            wheels = {name: wheel_of(arguments.wheels, name, version) for name, version in wanted.packed.items()}
            for sentence in unmet(wheels, wanted.packed, base, wanted.left_out, arguments.python):
                progress(f"{wanted.name}: {sentence}")
        manifest = pack(
            plans,
            arguments.wheels,
            arguments.out,
            arguments.python,
            int(arguments.part_megabytes * 1e6),
            arguments.processes,
            arguments.kept_blocks,
            progress,
        )
    except (PackError, OSError) as failure:
        print(failure, file=sys.stderr)
        return 1
    for reason, size in manifest["stripped"].items():
        progress(f"left behind {size / 1e6:8.1f} MB  {reason}")
    count = len(manifest["parts"])
    raw, packed = manifest["unpacked_bytes"] / 1e6, manifest["bytes"] / 1e6
    progress(f"{count} parts in {arguments.out}: {packed:,.0f} MB for {raw:,.0f} MB unpacked")
    return 0
