"""What the experiments measure, once for all tests of a process."""

from __future__ import annotations

from functools import cache

from tui_trainer.learn.experiment_messages import PageMeasurement
from tui_trainer.learn.experiments import run_experiment


@cache
def measured(name: str, seed: int = 1) -> PageMeasurement:
    """The values of a page."""
    return run_experiment(name, seed)
