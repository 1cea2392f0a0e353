"""Where results live: a folder of one JSON per run, beside the recordings that came with the app."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import EXPERIMENTS_BY_NAME
from experiments.kept import Kept
from experiments.plain import plain_result
from experiments.result import EngineRow, ExperimentResult, RequestRow, ResultError, TrialRow, new_id

RECORDINGS = Path(__file__).parent.parent / "recordings"
SAFE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")  # it becomes a file's name
LARGEST_UPLOAD = 64_000_000  # bytes
LOADED_AT_ONCE = 6  # the recordings and one or two more; the largest take 100 MB of memory each
# What reading numbers that make no sense ends in: somebody else's file may hold anything.
NOT_SHOWABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)


@dataclass(frozen=True, slots=True)
class Entry:
    """One run in the list. `recorded`: it came with the app and cannot be deleted."""

    id: str
    experiment: str
    started: str
    model: str
    hardware: str
    recorded: bool

    @property
    def words(self) -> str:
        title = EXPERIMENTS_BY_NAME[self.experiment].title
        kind = ", came with the app" if self.recorded else ""
        return f"{title} · {self.model} · {self.hardware} · {self.started[:16].replace('T', ' ')}{kind}"


class Library:
    """The results of `folder` and the recordings; a file is read again only when it has changed.

    What lies in the recordings' folder itself is what tabs show first; in its subfolders are further ones.
    """

    def __init__(self, folder: Path, recordings: Path = RECORDINGS) -> None:
        self.folder, self.recordings = folder, recordings
        self._known: dict[Path, tuple[int, Entry | None]] = {}
        self._loaded: Kept[ExperimentResult] = Kept(LOADED_AT_ONCE)

    def entries(self, experiment: str = "") -> list[Entry]:
        """Newest first, own runs before recordings; of one experiment or of all. Broken files are left out."""
        found = []
        for paths in (self.folder.glob("*.json"), self.recorded()):
            entries = [entry for path in paths if (entry := self._entry(path))]
            found += sorted(entries, key=lambda entry: entry.started, reverse=True)
        return [entry for entry in found if experiment in ("", entry.experiment)]

    def recorded(self) -> list[Path]:
        """The files of all recordings."""
        return [*self.recordings.glob("*.json"), *self.recordings.glob("*/*.json")]

    def has_recording(self, experiment: str) -> bool:
        """Whether there seems to be one, without reading it."""
        return any(self.recordings.glob(f"{experiment}-*.json"))

    def recording(self, experiment: str) -> Entry | None:
        """The newest recording of the experiment among those that tabs show first. Files are named after it, so that no
        other one has to be read."""
        entries = [entry for path in self.recordings.glob(f"{experiment}-*.json") if (entry := self._entry(path))]
        return max(
            (entry for entry in entries if entry.experiment == experiment),
            key=lambda entry: entry.started,
            default=None,
        )

    def load(self, run: str) -> ExperimentResult:
        """Raises ResultError when there is no such run or its file is broken. An unchanged file is the same object."""
        path = self._path(run)
        try:
            changed = path.stat().st_mtime_ns
        except OSError as failure:  # deleted meanwhile
            raise ResultError(f"This file cannot be read: {failure}.") from failure
        return self._loaded.get((path, changed), lambda: read(path))

    def checked(self, text: str) -> ExperimentResult:
        """Somebody's file as a result that can be shown, with nothing kept. Raises ResultError."""
        if len(text) > LARGEST_UPLOAD:
            raise ResultError(f"This file is larger than {LARGEST_UPLOAD // 1_000_000} MB.")
        return drawable(known(ExperimentResult.from_json(text)))

    def add(self, text: str) -> ExperimentResult:
        """Keep somebody's file. A run of the same id stays; an id that is no file's name is replaced."""
        result = self.checked(text)
        if not SAFE_ID.fullmatch(result.id) or any(entry.id == result.id for entry in self.entries()):
            result = replace(result, id=new_id(result.experiment))
        result.save(self.folder)
        return result

    def delete(self, run: str) -> None:
        path = self._path(run)
        if path.parent != self.folder:
            raise ResultError("This run came with the app and stays.")
        path.unlink(missing_ok=True)

    def archive(self) -> bytes:
        """Every result, recordings included, as a zip."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bundle:
            for entry in self.entries():
                bundle.write(self._path(entry.id), f"{entry.id}.json")
        return out.getvalue()

    def _path(self, run: str) -> Path:
        if SAFE_ID.fullmatch(run):
            for path in (self.folder / f"{run}.json", *self.recorded()):
                if path.stem == run and path.is_file():
                    return path
        raise ResultError(f"There is no run called {run[:100]!r} here.")

    def _came_with_the_app(self, path: Path) -> bool:
        return self.recordings in (path.parent, path.parent.parent)

    def _entry(self, path: Path) -> Entry | None:
        try:
            changed = path.stat().st_mtime_ns
        except OSError:  # deleted meanwhile
            return None
        if self._known.get(path, (0, None))[0] != changed:
            self._known[path] = (changed, _entry_of(path, self._came_with_the_app(path)))
        return self._known[path][1]


def _entry_of(path: Path, recorded: bool) -> Entry | None:
    try:
        result = read(path)
    except ResultError:
        return None
    return entry_of(result, recorded)


def entry_of(result: ExperimentResult, recorded: bool = False) -> Entry:
    hardware = str(result.hardware.get("words", "unknown hardware"))
    return Entry(result.id, result.experiment, result.started, result.model, hardware, recorded)


def read(path: Path) -> ExperimentResult:
    """A result's file; raises ResultError. Its name is its id, whatever stands in it."""
    try:
        return replace(known(ExperimentResult.from_json(path.read_text(encoding="utf-8"))), id=path.stem)
    except (OSError, UnicodeDecodeError) as failure:
        raise ResultError(f"This file cannot be read: {failure}.") from failure


def known(result: ExperimentResult) -> ExperimentResult:
    """The result in plain words, if its experiment is one of ours and can make sense of it; else ResultError."""
    if result.experiment not in EXPERIMENTS_BY_NAME:
        raise ResultError(f"This app knows no experiment called {result.experiment[:100]!r}.")
    result = plain_result(result)
    try:
        EXPERIMENTS_BY_NAME[result.experiment].table(result)
    except NOT_SHOWABLE as failure:
        raise ResultError(f"This result cannot be shown: {str(failure)[:200]}") from failure
    return result


def drawable(result: ExperimentResult) -> ExperimentResult:
    """The result, if all of it can be shown, its pictures too; else ResultError. Takes as long as drawing them."""
    from experiments.report import figures_html, notes

    try:
        notes(result)
        figures_html(result)
    except NOT_SHOWABLE as failure:
        raise ResultError(f"This result cannot be drawn: {str(failure)[:200]}") from failure
    return result


def overlaid(first: ExperimentResult, second: ExperimentResult) -> ExperimentResult:
    """Both runs as one result, so that the experiment's own charts and table show them side by side."""
    if first.experiment != second.experiment:
        raise ResultError("Only runs of the same experiment can be laid over each other.")

    def name(row: str) -> str:
        return f"{row}-second" if "+" in row else f"{row}+second"

    def renamed(row: EngineRow) -> EngineRow:
        when = second.started[:16].replace("T", " ")
        words = second.hardware.get("words", "unknown hardware")
        where = "" if words == first.hardware.get("words", "unknown hardware") else f" on {words}"
        variant = f"{row.variant}, {when}{where}" if row.variant else f"{when}{where}"
        return replace(
            row,
            name=name(row.name),
            variant=variant,
            compared_with=name(row.compared_with) if row.compared_with else "",
        )

    def request(row: RequestRow) -> RequestRow:
        return replace(row, engine=name(row.engine))

    def trial(row: TrialRow) -> TrialRow:
        return replace(row, engine=name(row.engine))

    differing = [field for field in ("model", "settings") if getattr(first, field) != getattr(second, field)]
    warning = (f"The two runs differ in {' and '.join(differing)}: compare with care.",) if differing else ()
    return replace(
        first,
        engines=first.engines + tuple(map(renamed, second.engines)),
        requests=first.requests + tuple(map(request, second.requests)),
        trials=first.trials + tuple(map(trial, second.trials)),
        labels=(f"Two runs: {first.source_line}; {second.source_line}", *warning)
        + tuple(dict.fromkeys(first.labels + second.labels)),
    )
