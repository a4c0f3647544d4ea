"""Rows of the tables that every run has, for runs that are recorded without a tracer."""

from __future__ import annotations

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.protocol.absent import Absent, absent


def step_row(loss: float, learning_rate: float, norm: float, milliseconds: float) -> Floats:
    """A row of table `step`, of an optimizer without a closure."""
    values = [loss, learning_rate, norm, milliseconds, absent(Absent.NO_CLOSURE)]
    return np.array(values, np.float32)


def clip_row(max_norm: float, norm_before: float, norm_after: float, scale: float) -> Floats:
    """A row of table `clip`, without a loss scale."""
    return np.array([max_norm, norm_before, norm_after, scale, 1.0], np.float32)
