"""One optimizer step: the backward passes and clippings that lead to it, and its outcome.

The rules:

* The loss of a step is the sum of the losses that were backpropagated into its optimizer's
  parameters since the optimizer's last step, without those whose gradients `zero_grad` discarded:
  exactly the objective whose gradient the optimizer uses. With a closure it is the loss of the
  first evaluation, at the weights that the step began with.
* The gradients of a step are those after the last of these backward passes, before any clipping.
* A clipping belongs to the step that uses the clipped gradients; one after the update to no step.
* Gradients that are discarded before any optimizer has used them make a skipped iteration.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import (
    BadBatch,
    LossGraph,
    Producer,
    Sign,
    SkipRecord,
    StepRecord,
    WeightDecay,
)
from tui_trainer.protocol import formatting
from tui_trainer.protocol.absent import Absent, absent, why_absent
from tui_trainer.protocol.events import ClipKind, SkipReason
from tui_trainer.trace import torch_private
from tui_trainer.trace.governor import ActiveProbe
from tui_trainer.trace.nonfinite_origin import merged
from tui_trainer.trace.phase_clocks import PhaseTimes
from tui_trainer.trace.probe import (
    ClipMeasurement,
    Reading,
    Readings,
    RecorderLike,
    StepFacts,
    Values,
    skipped_text,
)
from tui_trainer.trace.probe_set import ProbeSet
from tui_trainer.trace.transfer import HostTransfer, Transfers, length_of

MAX_KEPT = 64
"""Maximum number of losses, and of scaled tensors, within one step that are kept apart."""


@dataclass(eq=False, slots=True)
class GradientReading:
    """The norms of one optimizer's gradients at one moment, on their device."""

    norms: Readings | None = None
    """Norm of each tracked parameter's gradient, flattened; None if they were not measured."""
    scale: torch.Tensor | None = None
    """The factor (0-d) that a GradScaler still had on the gradients."""
    absent: NDArray[np.uint8] | None = None
    """As `StepFacts.absent_gradients`."""


@dataclass(eq=False, slots=True)
class Clipping:
    """One clipping of gradients, its norms still on their device."""

    kind: ClipKind
    max_norm: float
    norm_before: Reading
    """Norm as the function returned it."""
    norm_after: Reading | None
    """None for clipping by norm, where it follows from the scale."""
    total: Reading | None
    """√Σ‖g‖² of all clipped gradients, measured where `norm_before` may be something else."""
    two_norm: bool
    scales: dict[int, torch.Tensor | None]
    """id(measurer) → the loss scale (0-d) that was still on its gradients."""
    positions: dict[int, list[int] | None] = field(default_factory=dict)
    """id(measurer) → positions of the clipped parameters; None: all that have a gradient."""
    readings: dict[int, GradientReading] = field(default_factory=dict)
    """id(measurer) → its gradients before this clipping."""
    tentative: bool = False
    """Whether it is uncertain that the script changed the gradients: it did if the norms differ."""


Returned = dict[int, tuple[weakref.ref[torch.Tensor], int]]
"""id(parameter) → (its gradient, the version of the gradient when it was returned)."""


@dataclass(eq=False, slots=True)
class BackwardPass:
    """One or several calls of `backward` whose gradients wait for the same optimizers."""

    losses: list[torch.Tensor]
    """0-d each, without any loss scale."""
    claims: set[Any] = field(default_factory=set)
    """Measurers of the optimizers that have neither used nor lost the gradients."""
    cross_entropy: torch_private.CrossEntropy | None = None
    loss_graph: LossGraph | None = None
    """Both are set for some of the passes."""
    producer: Producer | None = None
    """The origin of a non-finite loss, where it was found."""
    bad_batch: BadBatch | None = None
    repeated: bool = False
    """Whether one of the losses was backpropagated before, into the same gradients."""
    calls: int = 0
    """Number of calls of models before the backward."""
    used: bool = False
    lost: list[LostGradients] = field(default_factory=list)
    returned: Returned = field(default_factory=dict)
    """Gradients that `torch.autograd.grad` returned. They count once the script assigns them."""

    def add(self, losses: Sequence[torch.Tensor]) -> None:
        self.losses += losses
        if len(self.losses) > MAX_KEPT:
            self.losses = [torch.stack([loss.double() for loss in self.losses]).sum()]


@dataclass(eq=False, slots=True)
class LostGradients:
    """Measurements of one optimizer's gradients, which were then discarded."""

    measurer: Any
    reading: GradientReading
    clips: list[Clipping]
    number: int = field(default_factory=count().__next__)
    """Later ones have higher numbers."""


class GradScaling:
    """Follows a GradScaler, so that losses and gradients are shown without its scale."""

    def __init__(self) -> None:
        self._losses: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = []
        """(scaled loss, its value before)."""
        self._scaler: weakref.ref[Any] | None = None
        """The scaler in use between `scale` and `update`."""
        self.in_use = False
        """Whether a scaler has scaled anything since the last `update`."""

    def reset(self) -> None:
        """Forget everything that was scaled."""
        self._losses.clear()
        self._scaler, self.in_use = None, False

    def add(self, scaler: Any, original: Any, result: Any) -> None:
        """`scaler.scale(original)` returned `result`. Keeps values, never a graph."""
        self._scaler, self.in_use = weakref.ref(scaler), True
        if isinstance(original, torch.Tensor) and isinstance(result, torch.Tensor):
            self._losses.append((weakref.ref(result), original.detach()))
            torch_private.mark_graph(result)
        elif isinstance(original, (list, tuple)) and isinstance(result, (list, tuple)):
            for before, after in zip(original, result, strict=True):
                self.add(scaler, before, after)
        del self._losses[:-MAX_KEPT]

    def unscaled_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` before it was scaled; `loss` itself if it was not scaled."""
        for reference, before in self._losses:
            if reference() is loss:
                return before
        if self._scaler is not None and torch_private.graph_is_marked(loss):
            scale = self.loss_scale()  # `loss` was computed from a scaled one, as in `scaled / n`
            return loss.detach() / scale.to(loss.device)
        return loss

    def gradient_scale(self, optimizer: torch.optim.Optimizer | None) -> torch.Tensor | None:
        """The factor (0-d) that is still on this optimizer's gradients; None without one."""
        scaler = self._scaler() if self._scaler is not None else None
        scale = torch_private.gradient_scale(scaler, optimizer) if scaler is not None else None
        return scale if isinstance(scale, torch.Tensor) else None

    def loss_scale(self) -> torch.Tensor:
        """The present factor (0-d) on losses; nan where it is unknown."""
        scaler = self._scaler() if self._scaler is not None else None
        scale = torch_private.loss_scale(scaler) if scaler is not None else None
        return scale if isinstance(scale, torch.Tensor) else torch.tensor(float("nan"))

    def read_loss_scale(self) -> float:
        """The loss scale on the host. Waits for the device, as the scaler has done just before."""
        scaler = self._scaler() if self._scaler is not None else None
        return float(scaler.get_scale()) if scaler is not None else float("nan")

    def end_step(self) -> None:
        self._losses.clear()

    def end_iteration(self) -> None:
        """`scaler.update()`: nothing is scaled until the next `scale`."""
        self._scaler, self.in_use = None, False


def scalar(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of one element as a 0-d tensor, without its graph."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.reshape(()) if tensor.dim() else tensor


# ---------------------------------------------------------------- completed


@dataclass(eq=False, slots=True)
class StepOutcome:
    """Facts about a step that has just completed, or about a skipped iteration."""

    step: int
    losses: Sequence[torch.Tensor] | None
    """None: no backward since the optimizer's last step. Empty: no backward of a scalar."""
    learning_rate: float | torch.Tensor
    step_ms: float
    times: PhaseTimes
    clips: Sequence[Clipping]
    evaluations: float = absent(Absent.NO_CLOSURE)


@dataclass(eq=False, slots=True)
class CompletedStep:
    """A step whose values are on their way to the host: a header, then the readings of each probe
    that has hooks."""

    optimizer: str
    """Key of the optimizer: "" for the first one of the run."""
    outcome: StepOutcome
    transfer: HostTransfer
    probes: Sequence[ActiveProbe]
    time: float
    own_ms: dict[str, float]
    header: Header
    absent: NDArray[np.uint8] | None
    """As `StepFacts.absent_gradients`."""
    left_alone: frozenset[int] = frozenset()
    """As in `StepFacts`."""
    signs: frozenset[Sign] = frozenset()
    classes: int | None = None
    loss_graph: LossGraph | None = None
    producer: Producer | None = None
    bad_batch: BadBatch | None = None
    epsilon: float | None = None
    momentum: float | None = None
    weight_decay: WeightDecay | None = None
    """As in `StepRecord`."""

    def facts(self, header: Values) -> StepFacts:
        """The step on the host, from which the probes make their rows."""
        outcome = self.outcome
        values = self.header.read(header)
        return StepFacts(
            step=outcome.step,
            time=self.time,
            loss=values.loss,
            learning_rate=values.learning_rate,
            step_ms=outcome.step_ms,
            phase_ms=outcome.times(),
            clips=values.clips,
            gradient_scale=values.gradient_scale,
            absent_gradients=self.absent,
            left_alone=self.left_alone,
            evaluations=outcome.evaluations,
            skipped_at_scale=values.skipped_at_scale,
            own_ms=self.own_ms,
        )


@dataclass(slots=True)
class HeaderValues:
    """The result of `Header.read`."""

    loss: float
    learning_rate: float
    clips: list[ClipMeasurement]
    gradient_scale: float
    skipped_at_scale: float | None


class Header:
    """The readings of a step that belong to no probe: losses, learning rate, clippings, scales."""

    def __init__(
        self,
        outcome: StepOutcome,
        reading: GradientReading,
        skip: tuple[torch.Tensor, torch.Tensor] | None,
        measurer: int,
    ) -> None:
        """`skip` as `StepMeasurer.skip`; `measurer`: the key of the optimizer in `Clipping`."""
        self._losses = outcome.losses
        self._rate = outcome.learning_rate
        self._clips = outcome.clips
        self._reading = reading
        self._skip = skip
        self._measurer = measurer
        self.readings: list[Reading] = [*(outcome.losses or ())]
        found: list[Reading | None] = [self._rate, reading.scale]
        for clip in self._clips:
            found += (
                clip.norm_before,
                clip.norm_after,
                clip.total,
                clip.scales.get(measurer),
            )
            norms = self._norms_before(clip)
            if norms:
                self._add(found)
                self.readings += norms
                found = []
        found += skip or ()
        self._add(found)

    def _add(self, values: list[Reading | None]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                self.readings.append(scalar(value))

    def _norms_before(self, clip: Clipping) -> Readings | None:
        """The norms before a clipping, if they differ from the norms of the step."""
        reading = clip.readings.get(self._measurer)
        return None if reading is None or reading is self._reading else reading.norms

    def read(self, values: Values) -> HeaderValues:
        """The same quantities as numbers, from the `values` of `readings` on the host."""
        left = values.tolist()
        left.reverse()

        def take(value: Reading | None, default: float = math.nan) -> float:
            if isinstance(value, torch.Tensor):
                return float(left.pop())
            return default if value is None else value

        if self._losses is None:
            loss = absent(Absent.NO_LOSS)
        elif not self._losses:
            loss = absent(Absent.LOSS_NOT_SEEN)
        else:
            loss = float(sum([left.pop() for _ in self._losses]))
        rate = take(self._rate)
        scale = take(self._reading.scale, 1.0) or 1.0
        clips = []
        for clip in self._clips:
            before = take(clip.norm_before)
            after = take(clip.norm_after, absent(Absent.NOT_MEASURED))
            total = take(clip.total, before if clip.two_norm else absent(Absent.NOT_MEASURED))
            clip_scale = take(clip.scales.get(self._measurer), 1.0) or 1.0
            norms = self._norms_before(clip)
            own = None
            if norms is not None:
                own = np.array([left.pop() for _ in range(length_of(norms))])
            known = clip.readings.get(self._measurer)
            clips.append(
                ClipMeasurement(
                    kind=clip.kind,
                    max_norm=clip.max_norm,
                    norm_before=before,
                    norm_after=after,
                    two_norm=clip.two_norm,
                    total_before=total,
                    gradient_scale=clip_scale,
                    norms=own,
                    known=known is not None and known.norms is not None,
                    positions=clip.positions.get(self._measurer),
                    tentative=clip.tentative,
                )
            )
        skipped = None
        if self._skip is not None:
            flag, at = (take(value) for value in self._skip)
            skipped = at if flag > 0 else None
        return HeaderValues(loss, rate, clips, scale, skipped)


@dataclass(frozen=True)
class HandChange:
    """Gradients that the script changed by itself."""

    measurer: Any
    """The `StepMeasurer` of their optimizer."""
    before: Readings | None
    """Norms before the change; None where they were not read."""
    after: Readings
    positions: list[int] | None
    """Positions of the parameters whose gradients changed; None: unknown."""
    reading: GradientReading | None
    tentative: bool
    """Whether it is uncertain, until the norms are on the host, that any gradient changed."""


def record_of(step: CompletedStep, probes: ProbeSet) -> tuple[StepRecord, StepFacts, float]:
    """(record of a step or a skipped iteration, its facts, seconds spent in probes)."""
    header, *parts = step.transfer.parts()
    if isinstance(header, Exception):
        raise header
    facts = step.facts(header)
    began = perf_counter()
    rows = probes.rows(step.probes, parts, facts)
    spent = perf_counter() - began
    record = StepRecord(
        step=facts.step,
        time=facts.time,
        optimizer=step.optimizer,
        rows=rows,
        clip=facts.clip,
        nonfinite=tuple(facts.nonfinite),
        own_ms=sum(facts.own_ms.values()),
        signs=step.signs,
        classes=step.classes,
        loss_graph=step.loss_graph,
        producer=merged(facts.producer, step.producer),
        batch=facts.batch,
        bad_batch=step.bad_batch,
        units=facts.units,
        dropout_off=facts.dropout_off,
        kept_update=facts.kept_update,
        initial=facts.initial,
        epsilon=step.epsilon,
        momentum=step.momentum,
        weight_decay=step.weight_decay,
    )
    return record, facts, spent


class SkippedIteration:
    """An iteration whose gradients no optimizer used, with values on their way to the host."""

    def __init__(
        self,
        reason: SkipReason,
        loss_scale: float | None,
        parts: list[tuple[Any, CompletedStep]],
        producer: Producer | None = None,
        bad_batch: BadBatch | None = None,
    ) -> None:
        """`parts`: (measurer, its measurements) for each optimizer that could have used the
        gradients. `loss_scale`: the scale at which a GradScaler skipped. `producer`: the origin of
        a non-finite loss."""
        self.reason = reason
        self.loss_scale = loss_scale
        self.parts = parts
        self.producer = producer
        self.bad_batch = bad_batch
        self.transfer = Transfers([step.transfer for _, step in parts])


class SkipRecorder:
    """Records skipped iterations."""

    def __init__(self, recorder: RecorderLike) -> None:
        self._recorder = recorder

    def record(self, skipped: SkippedIteration) -> float:
        """See `transfer.StepRecorder`."""
        records: list[StepRecord] = []
        spent = 0.0
        total = 0.0
        loss = float("nan")
        for measurer, step in skipped.parts:
            record, facts, seconds = record_of(step, measurer.probes)
            records.append(record)
            spent += seconds
            loss, total = facts.loss, math.hypot(total, facts.total_norm)
        first = records[0]
        clips = [record.clip for record in records if record.clip is not None]
        self._recorder.skip(
            SkipRecord(
                step=first.step,
                time=first.time,
                reason=skipped.reason,
                text=_skip_text(skipped, loss, total),
                optimizer=first.optimizer,
                rows=tuple(row for record in records for row in record.rows),
                clip=clips[0] if clips else None,
                nonfinite=tuple(found for record in records for found in record.nonfinite),
                loss_scale=skipped.loss_scale,
                producer=skipped.producer,
                bad_batch=skipped.bad_batch,
            )
        )
        return spent


def _skip_text(skipped: SkippedIteration, loss: float, norm: float) -> str:
    if skipped.reason == "scaler":
        text = skipped_text(skipped.loss_scale or math.nan)
    elif skipped.reason == "hand":
        text = "skipped by the script: gradients were discarded before any step used them"
    else:
        text = "the script ended before the step"
    known = [
        f"{name} {formatting.number(value, 0)}"
        for name, value in (("loss", loss), ("gradient norm", norm))
        if why_absent(value) is None
    ]
    return f"{text} ({', '.join(known)})" if known else text
