"""The experiments, in the order of their tabs. Draws nothing; `python -m experiments` is the command line."""

from __future__ import annotations

from experiments import baseline, concurrency, prefix_caching, speculation
from experiments.base import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    baseline.EXPERIMENT,
    speculation.EXPERIMENT,
    prefix_caching.EXPERIMENT,
    concurrency.EXPERIMENT,
)
EXPERIMENTS_BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
