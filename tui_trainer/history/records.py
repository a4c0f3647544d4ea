"""What the training thread hands to the recorder: plain numpy, no torch, no shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tui_trainer.protocol.messages import (
    ClipKind,
    NonFiniteQuantity,
    NonFiniteValue,
    SkipReason,
)

Floats = NDArray[np.float32]

Sign = Literal["new_parameters", "kept_gradients", "eval_mode", "softmax_twice"]
"""What the tracer noticed in a step besides its numbers: it is the first of a new set of
parameters; its first backward added to gradients that the optimizer's last step had used already;
its forward ran a model in `eval()` mode that has layers for which that matters; its loss is a
cross-entropy, which takes a softmax, of a softmax."""


class Producer(NamedTuple):
    """Where a value that is not finite came from: the first module or operation whose result is not
    finite although its inputs are."""

    source: Literal["operation", "module", "weight", "input"]
    """`weight`, `input`: a parameter, or what the model was given, is itself not finite."""
    name: str
    """Path of the module, or name of the parameter; "" where it is unknown."""
    kind: str = ""
    """Class of the module."""
    operation: str = ""
    """As in the autograd graph: `log`, `div`."""
    place: str = ""
    """`file.py:12`, the call in the script's own code; "" where it is unknown."""


class NonFiniteRecord(NamedTuple):
    """A quantity that is nan or infinite."""

    quantity: NonFiniteQuantity
    parameter: str
    """The first parameter with such a value; "" for the loss."""
    value: NonFiniteValue
    finite_at: int | None
    """The last step at which the quantity was measured and finite."""


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """The clipping of one step's gradient (scale < 1)."""

    max_norm: float
    norm_before: float
    scale: float
    parameters: tuple[int, ...]
    """Indices of the parameters with the largest shares, largest first."""
    shares: tuple[float, ...]
    """‖gᵢ‖² / Σ‖g‖² of each."""
    kind: ClipKind = "norm"
    gradient_scale: float = 1.0
    """Loss scale that was still on the gradients; `norm_before` has it too."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything measured in one optimizer step."""

    step: int
    """Number of optimizer steps completed, including this one: the first is 1."""
    time: float
    """End of the step, seconds since the epoch."""
    optimizer: str
    """Key of the optimizer, as in `Table.optimizer`: "" for the first of a run."""
    rows: tuple[tuple[int, Floats], ...]
    """(table id, values of its columns) for each table measured in this step."""
    clip: ClipRecord | None = None
    nonfinite: tuple[NonFiniteRecord, ...] = ()
    own_ms: float = 0.0
    """Overhead of tracing this step, on the training thread."""
    signs: frozenset[Sign] = frozenset()
    classes: int | None = None
    """Number of classes, where the loss is seen to be one mean cross-entropy."""
    producer: Producer | None = None
    """Of the value that is not finite, where there is one and its origin was seen."""


@dataclass(frozen=True, slots=True)
class SkipRecord:
    """An iteration whose gradients no optimizer used."""

    step: int
    """The step that comes next."""
    time: float
    """When they were discarded, seconds since the epoch."""
    reason: SkipReason
    text: str
    optimizer: str
    """Key of the (first) optimizer that they were for."""
    rows: tuple[tuple[int, Floats], ...]
    """(table id, values of its columns), as those of a step."""
    clip: ClipRecord | None = None
    nonfinite: tuple[NonFiniteRecord, ...] = ()
    loss_scale: float | None = None
    """The scale at which a GradScaler skipped."""
