"""What a rented machine is to the rest of the app: what one asks for, what it says of itself, what it costs.

`modal_cloud.py` rents from Modal; tests and rehearsals put something else behind the same interface.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from engines.gpus import CORE_DOLLARS_PER_SECOND, GIBIBYTE_DOLLARS_PER_SECOND, GPUS, PRICES_OF
from engines.hardware import Hardware

Stage = Literal["waiting for a GPU", "starting the container"]
WIRE_VERSION = 1  # of orders and events between page and container
RESTARTED = "restarted"  # among a container's events: it was taken away, and another one begins the order anew


@dataclass(frozen=True, slots=True)
class Rental:
    """What one contender needs: an engine under one configuration, on GPUs of one kind.

    `gpu` is the name that the cloud knows ("H100!" is exactly an H100), empty for a machine without one. `features`:
    the configuration's differences as JSON, so that each gets containers of its own. `keep_seconds`: how long an idle
    container is kept, and paid for; 0 lets it go at once. `snapshot`: start from a picture of the memory.
    """

    engine: str
    model: str
    draft_model: str = ""
    features: str = "{}"
    gpu: str = "L4"
    gpu_count: int = 1
    keep_seconds: int = 0
    snapshot: bool = False

    @property
    def gpu_words(self) -> str:
        """As the cloud wants to hear it: "H100!:2"."""
        return f"{self.gpu}:{self.gpu_count}" if self.gpu and self.gpu_count > 1 else self.gpu


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """What a container says of itself. `alive_seconds`: since its process began; `import_seconds`: of that, until our
    code was loaded; `calls`: how often it was called before, 0 in a fresh one."""

    container: str
    hardware: Hardware
    alive_seconds: float
    import_seconds: float
    calls: int
    region: str = ""
    wire_version: int = WIRE_VERSION
    from_snapshot: bool = False


@dataclass(frozen=True, slots=True)
class Rates:
    """$ per second: of one GPU by its name, of a core, and of a GiB of memory. `source` says in words whose prices."""

    gpus: Mapping[str, float]
    core: float
    gibibyte: float
    source: str

    def dollars_per_second(self, gpu: str, count: int, cores: float, gibibytes: float) -> float | None:
        """Of one container; None for a GPU without a known price."""
        base = self.core * cores + self.gibibyte * gibibytes
        if not gpu:
            return base
        price = self.gpus.get(gpu.rstrip("!"))
        return None if price is None else base + price * count


def listed_rates() -> Rates:
    """The dated table's."""
    gpus = {gpu.name: gpu.dollars_per_hour / 3600 for gpu in GPUS if gpu.dollars_per_hour is not None}
    source = f"Modal's list prices of {PRICES_OF}"
    return Rates(gpus, CORE_DOLLARS_PER_SECOND, GIBIBYTE_DOLLARS_PER_SECOND, source)


class Container(Protocol):
    """A container that answers. `network_seconds`: the shortest of several round trips to it and back."""

    facts: ContainerFacts
    network_seconds: float | None

    def events(self, order: str) -> AsyncGenerator[str, None]:
        """Carry out `order` there; what it yields, as it comes. Closing it early ends the work there, too, and the
        container. `RESTARTED` comes where the cloud took the container away and began anew on another one."""
        ...


@dataclass(frozen=True, slots=True)
class Machine:
    """What every container gets beside its GPUs, whether it uses it or not."""

    cores: float = 4.0
    gibibytes: float = 32.0


class Cloud(Protocol):
    """Whoever rents out containers. Whatever goes wrong is an EngineError in words with the next step."""

    name: str
    label: str
    machine: Machine
    measures: bool  # False: what comes back is no measurement of now

    async def rates(self) -> Rates: ...

    async def start(self, rental: Rental, on_stage: Callable[[Stage], None]) -> Container:
        """A container for `rental`, running already or started now. Cancelling it gives the place in the line back."""
        ...

    async def let_go(self, rental: Rental) -> None:
        """Make the rental's containers end, whatever they are doing."""
        ...

    async def running(self, rental: Rental) -> int:
        """How many containers of the rental there are now."""
        ...


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """A GPU that can be asked for. `exactly`: the name that gives this kind and no other; `most`: in one container."""

    name: str
    exactly: str
    most: int = 8


# `H100` alone may be answered with an H200 and `A100` with the larger one: a benchmark asks for the exact name.
GPU_CHOICES = (
    GpuChoice("T4", "T4"),
    GpuChoice("L4", "L4"),
    GpuChoice("A10", "A10", most=4),
    GpuChoice("L40S", "L40S"),
    GpuChoice("A100-40GB", "A100-40GB"),
    GpuChoice("A100-80GB", "A100-80GB"),
    GpuChoice("RTX-PRO-6000", "RTX-PRO-6000"),
    GpuChoice("H100", "H100!"),
    GpuChoice("H200", "H200"),
    GpuChoice("B200", "B200"),
)
