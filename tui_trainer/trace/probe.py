"""The interface of probes: one quantity each, measured on a cadence, as a few tensors per step.

The tracer makes one instance of each registered class for every optimizer. A probe never waits for
a device: its hooks return tensors, the tensors of all probes are copied to the host together, and
`rows` is called when they have arrived (at once on the CPU, a step later on an accelerator). Other
observers of a traced training implement the interfaces at the end. The probes are listed in
`probes/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.optimizer import Optimizer

from tui_trainer.history.records import (
    BatchRecord,
    ClipRecord,
    Floats,
    InitialWeight,
    NonFiniteRecord,
    Producer,
    SkipRecord,
    StepRecord,
    UnitsRecord,
)
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.events import ClipKind, Level, NoticeKind
from tui_trainer.protocol.messages import PhaseReport
from tui_trainer.protocol.schema import AttentionInfo, Column, Table
from tui_trainer.trace.parameters import TrackedParameters

Reading = torch.Tensor | float
"""A 0-d or 1-d tensor of any dtype and device, or a number on the host."""
Readings = Sequence[Reading]
Values = NDArray[np.float64]
"""Readings on the host."""
Gradient = torch.Tensor | None


@dataclass(frozen=True)
class ProbeOptions:
    """How a run is measured."""

    budget: float = 0.01
    """Our share of step time on the training thread; 0: every quantity at its natural cadence."""
    cadences: dict[str, int] = field(default_factory=dict)
    """Probe name to natural cadence, in place of the probe's own."""
    switched_off: frozenset[str] = frozenset()
    """Names of probes that do not run."""
    attention_pattern: str | None = None
    """Regular expression over parameter names with the groups `layer` and one of `q`, `k`, `v`,
    `qkv`, for models without the usual names."""
    probe_names: tuple[str, ...] = ()
    """Names of all probes of the run, including those switched off; set by `ProbeSet`."""
    watch_nonfinite: bool = False
    """Whether the outputs of all modules are watched for nan and inf at every step."""
    copy_budget_bytes: int = 64 * 1024 * 1024
    """Maximum memory for copies of weights, from which update ratios are computed."""


@dataclass(frozen=True)
class TableSpec:
    """A table that a probe fills."""

    name: str
    columns: tuple[Column, ...]
    every: int | None = None
    """`Table.every`, where it is not the probe's cadence (0: by the clock)."""


@dataclass(eq=False, slots=True)
class ClipMeasurement:
    """One clipping of gradients, on the host. Norms are those at the time of the clipping, with any
    loss scale that was still on the gradients."""

    kind: ClipKind
    max_norm: float
    """The limit; absent where the script clips without a function of PyTorch."""
    norm_before: float
    """Norm in the caller's norm type, as the function returned it."""
    norm_after: float
    """Absent for clipping by norm, where it follows from the scale."""
    two_norm: bool
    total_before: float
    """√Σ‖g‖² of all clipped gradients."""
    gradient_scale: float
    """The loss scale that was still on the gradients."""
    norms: Values | None
    """Norms of the gradients before the clipping; None: `StepFacts.gradient_norms`, times its
    scale, if they are `known`."""
    known: bool
    positions: list[int] | None
    """Positions of the parameters that were clipped; None: all that have a gradient."""
    tentative: bool
    """Whether it is uncertain that the script changed the gradients: it did if the norms differ."""


@dataclass(eq=False, slots=True)
class StepFacts:
    """One step on the host, while its rows are made. Probes run in the order of `PROBES`, so that
    later ones can use the results of earlier ones."""

    step: int
    time: float
    loss: float
    """May be absent (see `protocol.absent`), like any of these numbers."""
    learning_rate: float
    step_ms: float
    phase_ms: Sequence[float]
    """Milliseconds of each column of table `phase_ms`."""
    clips: Sequence[ClipMeasurement] = ()
    gradient_scale: float = 1.0
    """The factor that a GradScaler had on the gradients when they were measured."""
    absent_gradients: NDArray[np.uint8] | None = None
    """Why each tracked parameter has no gradient (`Absent`), 0 where it has one; None: every
    parameter has one."""
    left_alone: frozenset[int] = frozenset()
    """Positions of the parameters that an update by hand has not changed in this step: their
    gradients are not part of the total."""
    evaluations: float = absent(Absent.NO_CLOSURE)
    """How often the optimizer evaluated its closure."""
    skipped_at_scale: float | None = None
    """The loss scale at which the optimizer itself skipped its update."""
    own_ms: dict[str, float] = field(default_factory=dict)
    """Our overhead on the training thread by probe, `tracer` for the rest."""
    gradient_norms: NDArray[np.float64] | None = None
    """Gradient norm of each tracked parameter, set by the probe `Gradients`."""
    weight_norms: NDArray[np.float64] | None = None
    total_norm: float = absent(Absent.NOT_MEASURED)
    """√Σ‖g‖² over the optimizer's own parameters."""
    clip: ClipRecord | None = None
    nonfinite: list[NonFiniteRecord] = field(default_factory=list)
    producer: Producer | None = None
    batch: BatchRecord | None = None
    units: UnitsRecord | None = None
    dropout_off: tuple[str, ...] | None = None
    kept_update: float | None = None
    initial: tuple[InitialWeight, ...] = ()


class Probe:
    """Base class of probes, which measures nothing, at every step."""

    name: ClassVar[str]
    every: ClassVar[int] = 1
    """Natural cadence in steps; 0: only while its topic is watched."""
    first_steps: int = 0
    """Number of first steps that are always measured, since problems often begin there."""
    topic: ClassVar[str] = ""
    """Topic whose viewers have the probe measure more often, at `watched_every`."""
    watched_every: ClassVar[int] = 1
    importance: ClassVar[int] = 0
    """The governor stretches less important probes first, and never those of 100 or more."""
    max_stretch: ClassVar[int] = 1024
    """Largest factor by which the governor may stretch the natural cadence."""
    often_in_short_runs: ClassVar[bool] = False
    """Whether the governor keeps at least four measurements among the steps so far, whatever the
    budget."""
    every_forward: ClassVar[bool] = False
    """Whether `before_forward`, `after_forward` and `model_called` are called for every forward of
    a step, not only for the first."""
    owns_readings: ClassVar[bool] = False
    """Whether no other code writes to the tensors of its readings, so that they may be fetched
    later."""
    tables: tuple[TableSpec, ...] = ()
    """Set by `__init__`; empty when there is nothing to measure here."""
    attention: tuple[AttentionInfo, ...] = ()
    """The attention layers that the probe found."""
    unseen: str = ""
    """Why nothing is measured, for the panel. May change during the run: see `set_unseen`."""
    partly_unseen: str = ""
    """Why part of the quantity is not measured, for the log."""
    on_unseen_change: Callable[[], None] | None = None

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        self.tracked = tracked
        self.options = options

    def set_unseen(self, reason: str) -> None:
        """Set the reason why nothing is measured from now on; "" where it is measured again."""
        if reason != self.unseen:
            self.unseen = reason
            if self.on_unseen_change is not None:
                self.on_unseen_change()

    @property
    def resting(self) -> bool:
        """Whether the forward of the next step need not be observed: `model_called`,
        `before_forward` and `after_forward` are not called then."""
        return False

    def wants(self, step: int) -> bool:
        """Whether a step before a pause should be measured although the cadence does not call for
        it. Only called for steps before a pause, perhaps several times."""
        return False

    def before_forward(self, root: torch.nn.Module) -> None:
        """The first forward of a measured step begins; `after_forward` follows in any case."""

    def after_forward(self) -> None:
        """The forward returned or raised."""

    def model_called(
        self, root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A root model is about to be called with these arguments in a measured step."""

    def loss_called(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """A loss function of torch.nn.functional has returned `result` in a measured step, before
        its first backward has ended."""

    def gradients(self, gradients: Sequence[Gradient]) -> Readings:
        """Read the complete gradients before clipping, in the order of `tracked.parameters`."""
        return ()

    def gradient_norms(self, norms: Readings) -> Readings:
        """Like `gradients`, for a probe that needs only the 2-norm of each gradient (flattened; 0
        without a gradient), which clipping may have computed anyway.

        A probe with this hook and a natural cadence of 1 measures every step whose gradients are
        clipped."""
        return norms

    def before_update(self) -> None:
        """The optimizer is about to change the weights."""

    def after_update(self) -> Readings:
        """The optimizer has changed the weights."""
        return ()

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Make one row per table, or None for a table without a row at this step.

        `values` holds the readings of `gradients` and then of `after_update`, flattened. Called for
        one step after another, perhaps on another thread than the hooks and concurrently with them.
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

    def skip(self, record: SkipRecord) -> None:
        """Add an iteration without a step: O(1)."""

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
        """Show the report of the phase at whose end the run is paused; None: the run continues."""

    def watched(self, step: int) -> frozenset[str]:
        """Topics that a viewer has on screen now, or that are needed in `step`."""


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


class LoopObserver(Protocol):
    """Observes the loop around the first steps."""

    def model_called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A model is called with gradients."""

    def step_completed(self, step: int) -> None:
        """The training thread is in the call of the optimizer's `step`."""


class UpdateObserver(Protocol):
    """Observes the weights around the steps of optimizers. Raises nothing."""

    def step_began(self, optimizer: Optimizer) -> None:
        """The weights are about to change."""

    def step_ended(self, optimizer: Optimizer) -> None:
        """The weights have changed."""


class ForwardObserver(Protocol):
    """Observes how the loss of a step is computed. Raises nothing."""

    def forward_began(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A root module is about to be called for training."""

    def forward_ended(self, result: Any) -> None:
        """The forward has returned `result`."""

    def loss_called(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: torch.Tensor,
    ) -> None:
        """A loss function of PyTorch returned the scalar `result`."""

    def backward_began(self, loss: torch.Tensor, value: torch.Tensor) -> None:
        """The gradients of `loss` are about to be computed. `value`: the loss without its graph and
        without the scale of a GradScaler."""

    def detached(self) -> None:
        """The tracer is detached: nothing more is observed."""


@dataclass(eq=False)
class Observers:
    """Everything that observes the training at present."""

    loop: LoopObserver | None = None
    updates: UpdateObserver | None = None
    rates: UpdateObserver | None = None
    """Sets other learning rates for the duration of an optimizer's step."""
    forwards: ForwardObserver | None = None
