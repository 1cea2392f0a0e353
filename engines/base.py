"""The vocabulary that engines, experiments and the page share. Imports the standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

Device = Literal["cpu", "cuda"]


class EngineError(Exception):
    """What went wrong with an engine, in words meant for the person at the page.

    `log_tail` holds the last lines of the engine's own log where it has one.
    """

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.log_tail = log_tail


class EngineStopped(EngineError):
    """The engine was stopped on purpose while somebody waited for it: no failure of its own."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Draft several tokens cheaply, verify them in one step of the model.

    `method`: "mtp" uses the model's own multi-token-prediction head, "draft_model" a second, smaller model,
    "ngram" looks the next words up in the text so far. `draft_tokens` is how many are drafted per step.
    `simulated_length`: the engine is told to keep as many drafts as make this mean acceptance length, whatever it
    drafted; None: it checks them.
    """

    method: Literal["mtp", "draft_model", "ngram"]
    draft_tokens: int = 1
    draft_model: str | None = None
    simulated_length: float | None = None

    def __post_init__(self) -> None:
        if self.draft_tokens < 1:
            raise EngineError("Speculation needs at least one draft token per step.")
        if self.method == "draft_model" and not self.draft_model:
            raise EngineError("Speculation with a draft model needs the draft model's folder or name.")
        if self.simulated_length is not None and not 1 <= self.simulated_length <= self.draft_tokens + 1:
            most = self.draft_tokens + 1
            raise EngineError(
                f"A simulated acceptance length must lie between 1 and {most}, the draft tokens and the one that "
                f"checking them yields, not {self.simulated_length:g}."
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to serve one model, in our words; each engine's file translates it into that engine's flags."""

    model: str
    device: Device = "cpu"
    dtype: str = "bfloat16"
    max_context: int = 4096  # tokens, prompt and answer together
    prefix_caching: bool = False
    speculation: Speculation | None = None
    memory_share: float = 0.85  # of the GPU's memory; a CPU engine's cache has a fixed size in its own file
    continuous_batching: bool | None = None  # None: as the engine does by itself; only Transformers has a choice
    port: int = 8000
    cpu_threads: int | None = None  # for computing on the CPU; None: as many as the engine likes
    tensor_parallel: int = 1  # GPUs that compute each token together
    replicas: int = 1  # copies of the model behind one address, each on GPUs of its own
    can_sleep: bool = False  # it can be told to empty the GPU's memory and to fill it again, for a snapshot
    random_weights: bool = False  # the model's folder has its shape alone: the engine draws the weights
    cache_gib: float | None = None  # for keys and values, beside other engines on one GPU; None: what the share leaves

    def __post_init__(self) -> None:
        if not 0 < self.memory_share < 1:
            raise EngineError(f"The share of GPU memory must lie between 0 and 1, not {self.memory_share}.")
        if self.cache_gib is not None and self.cache_gib <= 0:
            raise EngineError(f"The cache for keys and values must have a size above 0 GiB, not {self.cache_gib:g}.")
        if self.max_context < 1:
            raise EngineError(f"The longest context must be at least 1 token, not {self.max_context}.")
        if self.tensor_parallel < 1 or self.replicas < 1:
            raise EngineError("An engine needs at least one GPU per copy of the model, and at least one copy.")


@dataclass(frozen=True, slots=True)
class Request:
    """One chat request. With `fixed_length` the engine writes exactly `max_tokens` tokens, else it may stop."""

    prompt: str
    max_tokens: int = 512
    fixed_length: bool = True
    temperature: float = 0.0
    seed: int = 42


@dataclass(frozen=True, slots=True)
class SpeculationCounters:
    """What speculation did in one request or over a stretch of time, as the engine itself counted it.

    `steps`: times the model verified a draft; `drafted` and `accepted`: draft tokens over all steps; `accepted_at`: how
    often the draft token at each position, from the first, was accepted.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()

    def since(self, before: SpeculationCounters) -> SpeculationCounters:
        """What was added after the reading `before` of the same server."""
        earlier = (*before.accepted_at, *[0] * len(self.accepted_at))
        return SpeculationCounters(
            self.steps - before.steps,
            self.drafted - before.drafted,
            self.accepted - before.accepted,
            tuple(now - then for now, then in zip(self.accepted_at, earlier, strict=False)),
        )

    def plus(self, other: SpeculationCounters) -> SpeculationCounters:
        mine, theirs = self.accepted_at, other.accepted_at
        return SpeculationCounters(
            self.steps + other.steps,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            tuple(a + b for a, b in zip_longest(mine, theirs, fillvalue=0)),
        )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens that one step of the model yields on average: the accepted ones and the one it adds itself."""
        return 1 + self.accepted / self.steps if self.steps else None

    @property
    def acceptance_per_position(self) -> tuple[float, ...]:
        """Share of steps in which the draft token at each position was accepted."""
        return tuple(count / self.steps for count in self.accepted_at) if self.steps else ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the server reports them; what it does not report is None."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    speculation: SpeculationCounters | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one server-sent event carried. A role-only or empty delta has neither text nor reasoning."""

    text: str = ""
    reasoning: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def has_output(self) -> bool:
        return bool(self.text or self.reasoning)


@dataclass(frozen=True, slots=True)
class Engine:
    """One row of the table of engines.

    `serve_command` is pure: the words of the command line, without a shell, whose first word is a program in
    the engine's own environment. It raises EngineError for what the engine cannot do, before anything starts.
    `phases` maps a pattern in the log to the phase that begins when a line matches it.
    """

    name: str
    label: str
    colour: str
    package: str | Mapping[Device, str]  # the distribution whose version is the engine's version
    serve_command: Callable[[EngineConfig], list[str]]
    variables: Callable[[EngineConfig], dict[str, str]]
    request_fields: Callable[[Request], dict[str, Any]]
    phases: tuple[tuple[str, str], ...] = ()
    caveat: Callable[[EngineConfig], str | None] = lambda config: None
    empty_caches_path: str = ""  # POST there forgets every cached prefix; empty: the engine keeps none
    read_counters: Callable[[str], SpeculationCounters | None] | None = None  # of the text at /metrics
    sleep_path: str = ""  # POST there empties the GPU's memory; empty: it cannot
    wake_path: str = ""  # POST there fills it again
    requirements: Mapping[Device, str] = field(default_factory=dict)  # empty: runs in the app's own environment
    install_gib: float = 0.0  # disk that the installed environment takes, for the check before installing
    as_it_is: bool = False  # somebody else's server: nothing about it can be switched or emptied from here

    def package_for(self, device: Device) -> str:
        return self.package if isinstance(self.package, str) else self.package[device]


def usage_with_each_chunk(request: Request) -> dict[str, Any]:
    """Request fields of servers that know vLLM's extensions: token counts with every chunk, and a fixed length."""
    fields: dict[str, Any] = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    if request.fixed_length:
        fields["ignore_eos"] = True
    return fields
