"""The experiments: each measures on a live model every value that its page states.

An experiment is a function of a seed in the module of its page's name. Values that are the same for
every seed are laws; the others belong to this model.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from tui_trainer.learn.experiment_messages import PageMeasurement, Value

PageExperiment = Callable[[], dict[str, Value]]


def find_experiment(name: str) -> PageExperiment:
    """The experiment of a page. Imports PyTorch."""
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    experiment: PageExperiment = module.experiment
    return experiment


def run_experiment(name: str, seed: int) -> PageMeasurement:
    """Run the experiment of a page with this seed; the caller's random numbers stay as they are."""
    experiment = find_experiment(name)
    import torch
    import torch._dynamo  # imported by the first optimizer otherwise, which takes two seconds

    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = experiment()
    return PageMeasurement(
        experiment=name,
        seed=seed,
        values=values,
        milliseconds=1000 * (time.perf_counter() - started),
        torch=str(torch.__version__),
    )
