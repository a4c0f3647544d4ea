"""What a probe is: one quantity, measured on a cadence, as a few tensors per step.

The tracer makes one instance of each registered class for every optimizer. A probe never waits for
a device: its hooks return tensors, those of all probes travel to the host in one copy, and `rows`
is called when they have arrived (at once on the CPU, a step later on an accelerator).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import ClipRecord, Floats, StepRecord
from tui_trainer.protocol.messages import (
    ClipKind,
    Level,
    NonFiniteQuantity,
    NonFiniteValue,
    NoticeKind,
    PhaseReport,
)
from tui_trainer.protocol.schema import AttentionInfo, Column, Table
from tui_trainer.trace.parameters import TrackedParameters

Readings = Sequence[torch.Tensor]
"""0-d or 1-d tensors of any dtype and device."""
Gradient = torch.Tensor | None


@dataclass(frozen=True)
class Options:
    """How a run is measured."""

    budget: float = 0.01
    """Our share of step time on the training thread; 0: every quantity at its natural cadence."""
    cadences: dict[str, int] = field(default_factory=dict)
    """Probe name to natural cadence, in place of the probe's own."""
    switched_off: frozenset[str] = frozenset()
    """Names of probes that do not run."""
    attention_pattern: str | None = None
    """Regular expression over parameter names with the groups `layer` and one of `q`, `k`, `v`,
    `qkv`, where the usual names are not used."""
    copy_budget_bytes: int = 64 * 1024 * 1024
    """Maximum memory for copies of weights, from which update ratios are computed."""


@dataclass(frozen=True)
class TableSpec:
    """A table that a probe fills."""

    name: str
    columns: tuple[Column, ...]
    every: int | None = None
    """`Table.every`, where it is not the probe's cadence (0: by the clock)."""


@dataclass(frozen=True)
class ClipMeasurement:
    """One call of a clipping function, with its norms on the host."""

    kind: ClipKind
    max_norm: float
    norm_before: float
    """In the caller's norm type, before un-scaling."""
    norm_after: float
    """NaN for clipping by norm, where it follows from the scale."""
    complete: bool
    """Whether it was the 2-norm over every parameter of the optimizer that has a gradient."""


@dataclass
class StepFacts:
    """One step on the host, while its rows are made. Probes run in the order of the registry, so
    that later ones can use what earlier ones have found."""

    step: int
    time: float
    loss: float
    """NaN also where `loss_known` is false."""
    learning_rate: float
    step_ms: float
    phase_ms: Sequence[float]
    """Milliseconds of each of `PHASES`."""
    loss_known: bool = True
    clips: Sequence[ClipMeasurement] = ()
    gradient_scale: float = 1.0
    """What a GradScaler had multiplied the gradients by when they were measured."""
    skipped_at_scale: float | None = None
    """The loss scale at which the optimizer itself skipped its update."""
    own_ms: dict[str, float] = field(default_factory=dict)
    """Our overhead on the training thread by probe, `tracer` for the rest."""
    gradient_norms: NDArray[np.float64] | None = None
    weight_norms: NDArray[np.float64] | None = None
    total_norm: float | None = None
    clip: ClipRecord | None = None
    nonfinite: list[tuple[NonFiniteQuantity, str, NonFiniteValue, int | None]] = field(
        default_factory=list
    )


class Probe:
    """Base class: measures nothing, at every step."""

    name: ClassVar[str]
    every: ClassVar[int] = 1
    """Natural cadence in steps; 0: only while its topic is watched."""
    topic: ClassVar[str] = ""
    """Topic of a viewer that has it measured more often, at `watched_every`."""
    watched_every: ClassVar[int] = 1
    importance: ClassVar[int] = 0
    """The governor stretches the less important ones first, and never those of 100 or more."""
    max_stretch: ClassVar[int] = 1024
    """How many times its natural cadence the governor may stretch it."""
    owns_readings: ClassVar[bool] = False
    """Its readings are tensors that nobody else writes to: they may be fetched later."""
    tables: tuple[TableSpec, ...] = ()
    """Set by `__init__`; empty when there is nothing to measure here."""
    attention: tuple[AttentionInfo, ...] = ()
    """The attention layers that it found."""
    unseen: str = ""
    """Why nothing is measured, for the panel. May change during the run: see `set_unseen`."""
    partly_unseen: str = ""
    """What is not measured besides what is, and why, for the log."""
    on_unseen_change: Callable[[], None] | None = None

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        self.tracked = tracked
        self.options = options

    def set_unseen(self, reason: str) -> None:
        """There is nothing to measure after all; "": there is."""
        if reason != self.unseen:
            self.unseen = reason
            if self.on_unseen_change is not None:
                self.on_unseen_change()

    def wants(self, step: int) -> bool:
        """Whether a step before a pause should be measured although its cadence does not call for
        it. May be called several times, for no other step."""
        return False

    def before_forward(self, root: torch.nn.Module) -> None:
        """The first forward of a measured step begins; `after_forward` follows in any case."""

    def after_forward(self) -> None:
        """That forward returned or raised."""

    def gradients(self, gradients: Sequence[Gradient]) -> Readings:
        """Gradients are complete and not clipped yet; in the order of `tracked.parameters`."""
        return ()

    def clip_norms(self, norms: Readings) -> Readings | None:
        """In place of `gradients`, for a probe that needs only the 2-norm of each gradient
        (flattened, one for each; 0 without a gradient): `clip_grad_norm_` computes them anyway.

        A probe with this hook measures every step whose gradients are clipped."""
        return None

    def before_update(self) -> None:
        """The optimizer is about to change the weights."""

    def after_update(self) -> Readings:
        """The optimizer has changed the weights."""
        return ()

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        """One row per table, or None for a table that has none at this step.

        `values` holds the readings of `gradients` and then of `after_update`, flattened. Called for
        one step after the other, perhaps on another thread than the hooks and at the same time.
        """
        return ()


class RecorderLike(Protocol):
    """The recorder as the training thread sees it. Every call returns at once and never raises
    because of a viewer, a disk or a socket."""

    def new_table(
        self,
        name: str,
        columns: Sequence[Column],
        every: int = 1,
        optimizer: str = "",
        natural: int = 0,
    ) -> int:
        """Declare a table under the next free id, before its first row; returns the id."""

    def declare(self, tables: Sequence[Table]) -> None:
        """Change the declaration of known tables (only `every` differs)."""

    def describe(self, **changes: Any) -> None:
        """Set fields of `RunInfo` (`parameters`, `attention`, `optimizers`, `unseen`, …)."""

    def record(self, record: StepRecord) -> None:
        """Add one optimizer step's measurements: O(1)."""

    def notice(
        self,
        kind: NoticeKind,
        text: str,
        level: Level = "info",
        step: int | None = None,
        who: str = "",
    ) -> None:
        """Add a line to the log."""

    def report(self, report: PhaseReport | None) -> None:
        """What the phase produced at whose end the run is paused; None: it continues."""

    def watched(self) -> frozenset[str]:
        """Topics that a viewer has on its screen now."""


def skipped_text(scale: float) -> str:
    return f"GradScaler skipped the step: gradients are not finite at loss scale {scale:g}"


def describe_exception(fault: BaseException) -> str:
    """An exception in one line, with the place in our code where it was raised."""
    text = str(fault).strip().splitlines()
    trace = fault.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        file = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
        where = f" ({file}:{trace.tb_lineno})"
    return f"{type(fault).__name__}: {text[0] if text else ''}{where}"
