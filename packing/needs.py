"""What the packed packages ask for and do not get: each line is a choice made here, or a mistake in a pinned set."""

from __future__ import annotations

import email
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from engines.environments import normalised


def requirements_of(wheel: Path) -> list[Requirement]:
    """The wheel's Requires-Dist lines."""
    with zipfile.ZipFile(wheel) as archive:
        entry = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(entry))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def unmet(
    wheels: dict[str, Path], packed: dict[str, str], base: dict[str, str | None], left_out: dict[str, str], python: str
) -> list[str]:
    """Sentences, sorted. `wheels`: distribution -> its wheel, of every packed one. `base`: all that the machine has.

    A package of the machine's in a version that is not known is taken to serve.
    """
    machine = {"python_version": python, "python_full_version": f"{python}.0"}  # the rest is as here: Linux, x86-64
    found: set[str] = set()
    done: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, frozenset[str]()) for name in packed]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        for asked in requirements_of(wheels[name]):
            wanted = normalised(asked.name)
            applies = [
                asked.marker is None or asked.marker.evaluate({**machine, "extra": extra}) for extra in ("", *extras)
            ]
            if not any(applies):
                continue
            if wanted in packed and asked.extras:
                waiting.append((wanted, frozenset(asked.extras)))
            version = packed.get(wanted) or base.get(wanted)
            if wanted in left_out:
                found.add(f"{name} asks for {asked.name}: left out, {left_out[wanted]}")
            elif version is None and wanted not in base:
                found.add(f"{name} asks for {asked.name}{asked.specifier}: nobody has it")
            elif version and not asked.specifier.contains(version, prereleases=True):
                found.add(f"{name} asks for {asked.name}{asked.specifier}: gets {version}")
    return sorted(found)
