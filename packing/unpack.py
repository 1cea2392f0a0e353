"""Makes the engines' environments out of packed parts, on a machine without a network.

Needs Python 3.10 or later and its standard library, and nothing of this project: the file can be copied and run alone,
`python unpack.py PARTS --cache CACHE`.

A pack is a folder: `manifest.json` (what is in it, and the sums), `index.xz` (which piece of which file lies in which
block) and `part-00`, `part-01`, ... A part is whole blocks one after the other; each block is an xz stream of its own,
so that all cores unpack at once. An environment is a folder like a virtual environment's. A `.pth` file in it adds
the folders of the machine's own Python behind its own, so that the engine finds the torch that is there; a package that
several environments share is written once and linked.
"""

from __future__ import annotations

import argparse
import compileall
import configparser
import hashlib
import importlib.metadata
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = "index.xz"
MARKER = "complete.json"  # engines.environments looks for it
BASE_PATHS = "zz-base.pth"
MIB = 1 << 20

ASK_THE_BASE = """
import json, os, sys
folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and os.path.isdir(path)]
print(json.dumps({"version": "%d.%d" % sys.version_info[:2], "program": sys._base_executable, "folders": folders}))
"""

SCRIPT = """#!{python}
import sys
from {module} import {first}
if __name__ == "__main__":
    sys.exit({function}())
"""


class UnpackError(Exception):
    """What the person who unpacks can do something about."""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def part_name(number: int) -> str:
    return f"part-{number:02d}"


def sum_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MIB):
            digest.update(piece)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The pack's manifest. Raises UnpackError when there is none, or one of another format."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnpackError(f"{folder / MANIFEST} is not there: copy it here beside the parts.") from None
    except ValueError as failure:
        raise UnpackError(f"{folder / MANIFEST} is damaged: {failure}. Copy it again.") from None
    if manifest.get("format") != FORMAT:
        raise UnpackError(f"The pack has format {manifest.get('format')}, this program reads {FORMAT}.")
    return manifest


def check_parts(folder: Path, manifest: dict[str, Any], workers: int) -> None:
    """Raises UnpackError that names every part that is missing or damaged."""
    expected = [manifest["index"], *manifest["parts"]]
    missing = [part["name"] for part in expected if not (folder / part["name"]).is_file()]
    if missing:
        raise UnpackError(f"{folder} lacks {', '.join(missing)} (of {len(manifest['parts'])} parts): copy it here.")
    with ThreadPoolExecutor(workers) as pool:
        sums = list(pool.map(lambda part: sum_of(folder / part["name"]), expected))
    damaged = [part["name"] for part, found in zip(expected, sums, strict=True) if part["sha256"] != found]
    if damaged:
        raise UnpackError(f"Damaged on the way: {', '.join(damaged)}. Copy it again.")


def ask_base(python: str) -> dict[str, Any]:
    """Version, underlying program and package folders of the Python that holds torch."""
    command = [python, "-I", "-c", ASK_THE_BASE]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as failure:
        raise UnpackError(f"{python} cannot be run: {failure}") from failure
    base: dict[str, Any] = json.loads(answer)
    return base


def distributions_in(folders: list[str]) -> dict[str, str]:
    """Distribution name (normalised) -> version; of two, the one in the earlier folder."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=folders):
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(normalised(name), distribution.version)
    return found


def public(version: str) -> str:
    """2.11.0 of 2.11.0+cu130."""
    return version.partition("+")[0]


def check_base(manifest: dict[str, Any], base: dict[str, Any], present: dict[str, str], any_versions: bool) -> None:
    """Raises UnpackError when the machine's own Python is not the one that the pack was made for."""
    if base["version"] != manifest["python"]:
        raise UnpackError(f"The pack is for Python {manifest['python']}, the machine's is {base['version']}.")
    problems = []
    for environment in manifest["environments"]:
        for name, version in environment["base"].items():
            if name not in present:
                problems.append(f"{environment['name']} needs {name}, which is not there")
            elif version and public(present[name]) != version and (name == "torch" or not any_versions):
                problems.append(f"{environment['name']} needs {name} {version}, {present[name]} is there")
    if problems:
        advice = "Pack again with this machine's own list of packages (pip freeze) as --base"
        advice += "." if any_versions else ", or go on with --any-base-version (not for another torch)."
        raise UnpackError(f"The machine's packages do not fit: {'; '.join(problems)}. {advice}")


def read_index(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """`blocks`: [part, offset, bytes]; `files`: [distribution, path, executable, [[block, offset, length], ...]]."""
    index: dict[str, Any] = json.loads(lzma.decompress((folder / manifest["index"]["name"]).read_bytes()))
    return index


def write_files(
    folder: Path, manifest: dict[str, Any], index: dict[str, Any], owners: dict[str, Path], workers: int
) -> None:
    """Every distribution's files, under the folder that `owners` gives for it."""
    pieces: dict[int, list[tuple[str, int, int, int]]] = {number: [] for number in range(len(index["blocks"]))}
    made: set[str] = set()
    modes = []
    for key, path, executable, segments in index["files"]:
        if key not in owners:
            continue
        target = os.path.join(owners[key], path)
        parent = os.path.dirname(target)
        if parent not in made:
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
        if len(segments) != 1:  # several threads write it: it has to be there before
            open(target, "wb").close()
        position = 0
        for block, offset, length in segments:
            pieces[block].append((target, -1 if len(segments) == 1 else position, offset, length))
            position += length
        if executable:
            modes.append(target)

    def unpack_block(number: int) -> None:
        part, start, size = index["blocks"][number]
        with (folder / manifest["parts"][part]["name"]).open("rb") as file:
            file.seek(start)
            raw = memoryview(lzma.decompress(file.read(size)))
        for target, position, offset, length in pieces[number]:
            with open(target, "wb" if position < 0 else "r+b") as out:
                out.seek(max(position, 0))
                out.write(raw[offset : offset + length])

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(unpack_block, [number for number, wanted in pieces.items() if wanted]):
            pass
    for target in modes:
        os.chmod(target, 0o755)


def link(source: Path, target: Path, paths: list[str]) -> None:
    made: set[str] = set()
    for path in paths:
        destination = os.path.join(target, path)
        parent = os.path.dirname(destination)
        if parent not in made:
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
        os.link(os.path.join(source, path), destination)


def make_python(folder: Path, base: dict[str, Any]) -> None:
    """`bin/python` and `pyvenv.cfg`: what makes a folder a virtual environment."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("python", "python3", f"python{base['version']}"):
        (folder / "bin" / name).symlink_to(base["program"])
    settings = {"home": str(Path(base["program"]).parent), "include-system-site-packages": "false"}
    settings["version"] = base["version"]
    text = "".join(f"{name} = {value}\n" for name, value in settings.items())
    (folder / "pyvenv.cfg").write_text(text, encoding="utf-8")


def write_scripts(folder: Path, search: list[str], names: set[str]) -> None:
    """The programs that these distributions name as theirs; a shebang of the packing machine never gets in."""
    python = folder / "bin" / "python"
    for program in (folder / "bin").iterdir():  # a wheel's ready-made scripts say "#!python"
        if program.is_symlink():
            continue
        first, newline, rest = program.read_bytes().partition(b"\n")
        if first.startswith(b"#!python"):
            program.unlink()  # another environment may share the file
            program.write_bytes(f"#!{python}".encode() + newline + rest)
            program.chmod(0o755)
    done: set[str] = set()
    for distribution in importlib.metadata.distributions(path=search):
        name = normalised(distribution.metadata["Name"] or "")
        if name not in names or name in done:
            continue
        done.add(name)
        parser = configparser.ConfigParser(delimiters=("=",), strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]  # its documented way to keep capitals
        parser.read_string(distribution.read_text("entry_points.txt") or "")
        for program_name, target in parser.items("console_scripts") if parser.has_section("console_scripts") else []:
            module, _, function = target.partition("[")[0].strip().partition(":")
            script = SCRIPT.format(python=python, module=module, first=function.partition(".")[0], function=function)
            program = folder / "bin" / program_name
            program.unlink(missing_ok=True)
            program.write_text(script, encoding="utf-8")
            program.chmod(0o755)


def unpack(
    folder: Path,
    cache: Path,
    python: str = sys.executable,
    any_base_version: bool = False,
    compile_too: bool = False,
    workers: int | None = None,
) -> list[Path]:
    """Makes every environment of the pack under `<cache>/environments`, in place of what an earlier unpacking left.

    `python` is the Python that holds torch. Returns the environments' folders. Raises UnpackError; an environment
    without its marker is one that was not finished.
    """
    workers = workers or os.cpu_count() or 1
    manifest = read_manifest(folder)
    base = ask_base(python)
    present = distributions_in(base["folders"])
    check_base(manifest, base, present, any_base_version)
    check_parts(folder, manifest, workers)
    root = cache.absolute() / "environments"
    root.mkdir(parents=True, exist_ok=True)
    places = {environment["name"]: root / environment["folder"] for environment in manifest["environments"]}
    for place in places.values():
        if place.exists():
            (place / MARKER).unlink(missing_ok=True)
            shutil.rmtree(place)
    free = shutil.disk_usage(root).free
    if free < manifest["unpacked_bytes"]:
        needed = manifest["unpacked_bytes"] / 1e9
        raise UnpackError(f"The environments need {needed:.1f} GB, {free / 1e9:.1f} GB are free in {root}.")

    owners: dict[str, Path] = {}
    shared: list[tuple[str, Path]] = []
    for environment in manifest["environments"]:
        place = places[environment["name"]]
        for name, version in environment["packed"].items():
            key = f"{name}=={version}"
            if owners.setdefault(key, place) != place:
                shared.append((key, place))
    try:
        index = read_index(folder, manifest)
        write_files(folder, manifest, index, owners, workers)
        for key, place in shared:
            link(owners[key], place, [path for owner, path, *_ in index["files"] if owner == key])
        for environment in manifest["environments"]:
            finish(places[environment["name"]], environment, base, present, compile_too)
    except lzma.LZMAError as failure:
        raise UnpackError(f"A block cannot be unpacked ({failure}) though the sums are right: pack again.") from failure
    except OSError as failure:
        raise UnpackError(f"Unpacking failed: {failure}") from failure
    return list(places.values())


def finish(
    place: Path, environment: dict[str, Any], base: dict[str, Any], present: dict[str, str], compile_too: bool
) -> None:
    """What is written once the packages lie there: Python, the way to the base, programs, and the marker last."""
    make_python(place, base)
    packages = place / "lib" / f"python{base['version']}" / "site-packages"
    packages.mkdir(parents=True, exist_ok=True)
    (packages / BASE_PATHS).write_text("".join(f"{path}\n" for path in base["folders"]), encoding="utf-8")
    write_scripts(place, [str(packages), *base["folders"]], {*environment["packed"], *environment["base"]})
    if compile_too:
        compileall.compile_dir(str(packages), quiet=2, workers=0)  # a template that is no Python fails, and may
    from_base = {name: present[name] for name in environment["base"]}
    marker = {
        "engine": environment["name"],
        "device": environment["device"],
        "installed": {**from_base, **environment["packed"]},
        "base": from_base,
        "base_folders": base["folders"],
        "left_out": environment["left_out"],
    }
    partial = place / (MARKER + ".part")
    partial.write_text(json.dumps(marker, indent=1), encoding="utf-8")
    partial.replace(place / MARKER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where manifest.json, index.xz and the parts lie")
    parser.add_argument("--cache", type=Path, required=True, help="the app's cache; also set BAKEOFF_CACHE to it")
    parser.add_argument("--base-python", default=sys.executable, help="the Python that holds torch (default: this one)")
    parser.add_argument("--any-base-version", action="store_true", help="accept other versions than packed for")
    parser.add_argument("--compile", action="store_true", help="compile all modules now, on all cores")
    parser.add_argument("--workers", type=int, help="how many blocks at once (default: one per core)")


def run(arguments: argparse.Namespace) -> int:
    try:
        places = unpack(
            arguments.folder,
            arguments.cache,
            arguments.base_python,
            arguments.any_base_version,
            arguments.compile,
            arguments.workers,
        )
    except UnpackError as failure:
        print(failure, file=sys.stderr)
        return 1
    for place in places:
        print(place)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes the engines' environments out of packed parts.")
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
