"""Orders and events between the page and a rented container, as JSON.

Every item that a container yields is a list of `[name, value]`: events of `experiments.base`, and `Status` for what
the engine is doing. An empty list only says that the container is still there. A run's end travels without its
requests and trials, which have come before it one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from engines.base import EngineError, Speculation
from engines.local import Status
from experiments.base import (
    Contender,
    EngineFailed,
    EngineReady,
    Event,
    Experiment,
    Plan,
    RequestEnded,
    RequestStarted,
    RunEnded,
    Spending,
    TokensArrived,
    TrialEnded,
    TrialStarted,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from engines.base import Engine

TOLD = {
    kind.__name__: kind
    for kind in (
        EngineReady,
        EngineFailed,
        TrialStarted,
        RequestStarted,
        TokensArrived,
        RequestEnded,
        TrialEnded,
        Spending,
        RunEnded,
        Status,
    )
}
BUNDLED = "bundled"  # the model that comes with the project, wherever that lies in a container
DRAFT_METHOD = "draft_model"


_adapters: dict[str, TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind.__name__ not in _adapters:
        from pydantic import TypeAdapter  # here: only rented runs pay for loading it

        _adapters[kind.__name__] = TypeAdapter(kind)
    return _adapters[kind.__name__]


def encoded(events: Iterable[Event | Status]) -> str:
    parts = []
    for event in events:
        if isinstance(event, RunEnded):
            event = RunEnded(replace(event.result, requests=(), trials=()))
        kind = type(event)
        parts.append([kind.__name__, _adapter(kind).dump_python(event)])
    return json.dumps(parts, separators=(",", ":"))  # unlike pydantic's it knows half characters and NaN


def decoded(item: str) -> list[Event | Status]:
    """Raises EngineError for what is no list of events."""
    try:
        return [_adapter(TOLD[name]).validate_python(value) for name, value in json.loads(item)]
    except (ValueError, TypeError, KeyError) as failure:  # pydantic's own errors are ValueErrors
        raise EngineError(f"The container sent something that is no event: {item[:120]}") from failure


@dataclass(frozen=True, slots=True)
class Order:
    """What a container is to do: the whole experiment's plan and contenders, of which it runs the one called `only`.

    It stops by itself after `limit_seconds`, should the page be gone by then.
    """

    experiment: str
    plan: Plan
    contenders: tuple[Contender, ...]
    only: str
    limit_seconds: float | None = None
    leave: bool = True  # let the container go at the end


def order_to_json(order: Order) -> str:
    contenders = [
        {
            "key": one.key,
            "engine": one.engine.name,
            "variant": one.variant,
            "changes": changes_to_json(one.changes),
            "compared_with": one.compared_with,
            "unavailable": one.unavailable,
        }
        for one in order.contenders
    ]
    told = {"experiment": order.experiment, "plan": asdict(order.plan), "contenders": contenders, "only": order.only}
    return json.dumps({**told, "limit_seconds": order.limit_seconds, "leave": order.leave})


def order_from_json(
    text: str, experiments: Sequence[Experiment], engines: Sequence[Engine], draft_model: str | None = None
) -> Order:
    """`draft_model`: where the container has the bundled model's draft. Raises EngineError for what is no order."""
    by_name = {engine.name: engine for engine in engines}
    try:
        told = json.loads(text)
        experiment = next(one for one in experiments if one.name == told["experiment"])
        contenders = tuple(
            Contender(
                one["key"],
                by_name[one["engine"]],
                one["variant"],
                changes_from_json(one["changes"], draft_model),
                one["compared_with"],
                one["unavailable"],
            )
            for one in told["contenders"]
        )
        plan = _adapter(experiment.plan).validate_python(told["plan"])
        return Order(experiment.name, plan, contenders, told["only"], told["limit_seconds"], told["leave"])
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as failure:
        raise EngineError(f"The container does not understand its order: {failure!r}") from failure


def changes_to_json(changes: Any) -> str:
    """A contender's changes of the configuration, always in the same order: they name its container, too."""
    return json.dumps(
        {name: asdict(value) if isinstance(value, Speculation) else value for name, value in sorted(changes.items())},
        sort_keys=True,
    )


def changes_from_json(text: str, draft_model: str | None = None) -> dict[str, Any]:
    changes: dict[str, Any] = json.loads(text)
    if told := changes.get("speculation"):
        speculation = Speculation(**told)
        if speculation.draft_model == BUNDLED:
            speculation = replace(speculation, draft_model=draft_model)
        changes["speculation"] = speculation
    return changes
