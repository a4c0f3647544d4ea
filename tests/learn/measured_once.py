"""The measured values of the pages, once for all tests of a process."""

from __future__ import annotations

from functools import cache

from tui_trainer.learn.measurement_process import PageMeasurement
from tui_trainer.learn.measurements import measure_page


@cache
def measured(name: str, seed: int = 1) -> PageMeasurement:
    """The values of a page."""
    return measure_page(name, seed)
