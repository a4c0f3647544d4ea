"""What the training thread hands to the recorder: plain numpy, no torch, nothing shared."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """That a step's gradient was clipped (scale < 1)."""

    max_norm: float
    norm_before: float
    scale: float
    parameters: tuple[int, ...]
    shares: tuple[float, ...]
    kind: str = "norm"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything measured in one optimizer step."""

    step: int
    """Number of optimizer steps completed, this one included: the first has 1."""
    time: float
    """Seconds since the epoch at its end."""
    optimizer: str
    rows: tuple[tuple[int, Floats], ...]
    """(table id, values of its columns) for each table measured in this step."""
    clip: ClipRecord | None = None
    nonfinite: tuple[tuple[str, str, str, int | None], ...] = field(default=())
    """(quantity, first parameter, value, last step at which it was seen to be finite) of what was
    found to be NaN or infinite."""
    own_ms: float = 0.0
    """What tracing this step cost on the training thread."""
