"""What earlier runs have measured already, so that a series of experiments goes on where it was broken off."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from demo_model.bundled import model_label
from engines.hardware import hardware_words
from engines.local import LocalHost
from experiments.base import Experiment, Host, Plan, PlanError
from experiments.library import read
from experiments.rented import RentedMachine
from experiments.result import EngineRow, ExperimentResult, ResultError
from experiments.servers import ServersMachine

OF_THE_MACHINE = ("random_weights", "cache_gib", "tensor_parallel", "replicas")

log = logging.getLogger("bakeoff")


def measured_already(plans: Sequence[tuple[Experiment, Plan]], host: Host, folder: Path) -> dict[str, Path]:
    """By the experiment's name, the file in `folder` (the last by name) whose result is whole and answers the plan's
    question on this host. Files that cannot be read are passed over with a log line."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = read(path)
        except ResultError as error:
            log.info("%s is passed over: %s", path, error)
            continue
        for experiment, plan in plans:
            if _same_question(result, experiment, plan, host) and _whole(result, experiment, plan, host):
                found[experiment.name] = path
    return found


def measured_something(result: ExperimentResult) -> bool:
    """Whether any request that counts was answered."""
    return any(not row.timeline.error for engine in result.engines for row in result.measured(engine.name))


def _same_question(result: ExperimentResult, experiment: Experiment, plan: Plan, host: Host) -> bool:
    settings = _as_in_a_file(asdict(plan))
    told = _as_in_a_file(_defaults(plan)) | result.settings  # an older file does not have what came later
    where, there = hardware_words(host.hardware), result.hardware.get("words")
    if isinstance(host, RentedMachine):  # which machine it got, only the result knows: what was asked for counts
        settings["rent"] = asdict(host.rent)
        where, there = host.name, result.host
    if isinstance(host, ServersMachine):  # its servers are all that is known of it
        where = " ".join(server.url.base_url for server in host.servers)
        there = " ".join(str(row.config.get("url")) for row in result.engines if not row.variant)
    asked = (experiment.name, settings, host.model_label, where)
    answered = (result.experiment, told, result.model, there)
    return asked == answered and all(_same_draft(row, host) and _same_machine(row, host) for row in result.engines)


def _as_in_a_file(settings: dict[str, Any]) -> dict[str, Any]:
    """Tuples become lists."""
    read: dict[str, Any] = json.loads(json.dumps(settings))
    return read


def _defaults(plan: Plan) -> dict[str, Any]:
    return {one.name: one.default for one in fields(plan) if one.default is not MISSING}


def _same_machine(row: EngineRow, host: Host) -> bool:
    """Whether the engine had as much of this machine as it would have today. What was rented stands in the settings."""
    if not isinstance(host, LocalHost) or "cache_gib" not in row.config:
        return True
    names = {engine.name for engine in host.engines}
    if row.engine not in names:
        return True
    today = asdict(host.config(row.engine))
    return all(row.config.get(name) == today[name] for name in OF_THE_MACHINE)


def _same_draft(row: EngineRow, host: Host) -> bool:
    """A draft model is no setting of the plan; it stands in the configuration of the rows that used it."""
    speculation = row.config.get("speculation")
    draft = speculation.get("draft_model") if isinstance(speculation, dict) else None
    return not draft or (host.draft_model is not None and model_label(str(draft)) == model_label(host.draft_model))


def _whole(result: ExperimentResult, experiment: Experiment, plan: Plan, host: Host) -> bool:
    """Whether nothing failed and everybody is there, variants included, who would take part today."""
    if result.stopped_early or any(row.error for row in result.engines) or not measured_something(result):
        return False
    try:
        wanted = {contender.key for contender in experiment.contenders(plan, host)}
    except PlanError:
        return False  # measuring it will say why it cannot be run
    return wanted <= {row.name for row in result.engines}
