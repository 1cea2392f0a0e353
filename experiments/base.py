"""What an experiment is, what happens while it runs, and what it needs of a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from engines.base import Engine, EngineConfig
from engines.hardware import Hardware
from engines.local import Serving
from engines.timeline import Arrival
from experiments.result import EngineRow, ExperimentResult, RequestRow

DEFAULT_PROMPT = "Write a short paragraph about LLM inference serving optimizations."
TOKEN_LIMIT = 2048
REPEAT_LIMIT = 20


class PlanError(ValueError):
    """A setting that cannot be used: `field` names it, so that the message stands where it was typed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class Host(Protocol):
    """Where engines run."""

    name: str
    label: str
    model: str
    model_label: str
    model_note: str
    engines: tuple[Engine, ...]
    hardware: Hardware
    resident_together: bool

    def config(self, name: str) -> EngineConfig: ...
    def ready(self, name: str, config: EngineConfig | None = None) -> Serving: ...
    def settle(self, name: str) -> bool: ...
    def busy(self, name: str) -> AbstractContextManager[None]: ...
    def in_use(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Raises PlanError for what cannot be run.

    `race`: all engines at once, instead of taking turns on the machine they share.
    """

    prompt: str
    engines: tuple[str, ...]
    repeats: int = 3
    warmups: int = 2
    max_tokens: int = 128
    fixed_length: bool = True
    race: bool = False
    temperature: float = 0.0
    seed: int = 42

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise PlanError("prompt", "Type a prompt first: there is nothing to answer.")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):
            raise PlanError("prompt", "The prompt holds half a character, which no engine can read. Please retype it.")
        if not self.engines:
            raise PlanError("engines", "Choose at least one engine.")
        _check_whole("repeats", "Repeats", self.repeats, 1, REPEAT_LIMIT)
        _check_whole("warmups", "Warm-ups", self.warmups, 0, REPEAT_LIMIT)
        _check_whole("max_tokens", "Answer length", self.max_tokens, 1, TOKEN_LIMIT)


def _check_whole(field: str, label: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        shown = "nothing" if value is None else value
        raise PlanError(field, f"{label} must be a whole number from {low} to {high}, not {shown}.")


# What happens during a run, in the order in which it happens.


@dataclass(frozen=True, slots=True)
class EngineReady:
    row: EngineRow


@dataclass(frozen=True, slots=True)
class EngineFailed:
    row: EngineRow


@dataclass(frozen=True, slots=True)
class RequestStarted:
    engine: str
    warmup: bool
    repeat: int
    of: int


@dataclass(frozen=True, slots=True)
class TokensArrived:
    engine: str
    arrival: Arrival


@dataclass(frozen=True, slots=True)
class RequestEnded:
    row: RequestRow


@dataclass(frozen=True, slots=True)
class RunEnded:
    result: ExperimentResult


Event = EngineReady | EngineFailed | RequestStarted | TokensArrived | RequestEnded | RunEnded
Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Experiment:
    """One row of the table of experiments: its words, and its sentence about a result."""

    name: str
    title: str
    question: str
    mechanism: str
    headline: Callable[[ExperimentResult], str]
    charted: Sequence[str]  # metrics of the catalogue, in the order of their charts
