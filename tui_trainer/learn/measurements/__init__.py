"""Measures the values on the pages on live models: a module for each page, with a function
`measure`. Values that are the same for every seed are laws; the others depend on the model.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from tui_trainer.learn.measurement_process import PageMeasurement, Value


def measurement_of(page: str) -> Callable[[], dict[str, Value]]:
    """The function that measures the values of a page. Imports PyTorch."""
    module = importlib.import_module(f"{__name__}.{page.replace('-', '_')}")
    return module.measure  # type: ignore[no-any-return]


def measure_page(name: str, seed: int) -> PageMeasurement:
    """Measure the values of a page with a seed, leaving the global random state unchanged."""
    measure = measurement_of(name)
    import torch
    import torch._dynamo  # imported by the first optimizer otherwise, which takes two seconds

    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = measure()
    return PageMeasurement(
        page=name,
        seed=seed,
        values=values,
        milliseconds=1000 * (time.perf_counter() - started),
        torch=str(torch.__version__),
    )
