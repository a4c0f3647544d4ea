"""One optimizer step: what the loop did since the last one, and what is known once it completed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tui_trainer.history.records import Floats
from tui_trainer.protocol.messages import ClipKind
from tui_trainer.trace import torch_private
from tui_trainer.trace.phases import PhaseTimes
from tui_trainer.trace.probe import ClipMeasurement, StepFacts
from tui_trainer.trace.schedule import ActiveProbe
from tui_trainer.trace.torch_private import NormCapture
from tui_trainer.trace.transfer import HostTransfer

MAX_KEPT = 64
"""Losses and clip calls that are kept apart within one step."""


@dataclass
class ClipCall:
    """A call of a clipping function, its norms still on their device."""

    kind: ClipKind
    pending: list[object]
    """Measurers of the optimizers whose gradients it clipped and that have not stepped since."""
    max_norm: float
    readings: tuple[torch.Tensor, ...]
    """Norm before; for clipping by value also the norm after."""
    gradients: int
    """Number of gradients it clipped."""
    two_norm: bool

    def measurement(self, values: Iterator[float], with_gradient: int) -> ClipMeasurement:
        """The call with its `values` on the host; `with_gradient` of the optimizer's parameters
        have a gradient."""
        before, *after = (next(values) for _ in self.readings)
        return ClipMeasurement(
            kind=self.kind,
            max_norm=self.max_norm,
            norm_before=before,
            norm_after=after[0] if after else float("nan"),
            complete=self.two_norm and self.gradients == with_gradient,
        )


def make_clip_call(
    kind: ClipKind,
    parameters: Any,
    limit: Any,
    norm_type: Any,
    readings: Sequence[torch.Tensor],
    measurers: Sequence[object],
    captured: NormCapture,
) -> ClipCall:
    """The record of a call that clipped `parameters`, tracked by `measurers`, to `limit`."""
    count = captured.count
    if not count:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        count = sum(p.grad is not None for p in given)
    return ClipCall(
        kind=kind,
        pending=list(measurers),
        max_norm=float(limit),
        readings=tuple(scalar(reading) for reading in readings),
        gradients=count,
        two_norm=kind == "norm" and float(norm_type) == 2.0,
    )


class PendingStep:
    """Losses and clip calls since the last optimizer step.

    The loss of a step is the sum of the scalars on which `backward` was called since the step
    before (before any GradScaler): exactly the objective whose gradient the optimizer uses. With a
    closure it is the loss of the first evaluation. An optimizer that steps without a backward of
    its own (two optimizers for one model) shows the loss of the step before.
    """

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        """0-d each."""
        self._last_losses: list[torch.Tensor] = []
        self._clips: list[ClipCall] = []

    def add_losses(self, losses: Sequence[torch.Tensor], closure: bool) -> None:
        """`backward` is called on these tensors of one element each."""
        if closure and self.losses:
            return  # only the first evaluation is at the weights that the step began with
        self.losses += [scalar(loss) for loss in losses]
        if len(self.losses) > MAX_KEPT:
            self.losses = [torch.stack([loss.float() for loss in self.losses]).sum()]

    def add_clip(self, call: ClipCall) -> None:
        self._clips.append(call)
        del self._clips[:-MAX_KEPT]

    def take(self, measurer: object) -> tuple[list[torch.Tensor], list[ClipCall]]:
        """The losses, and the clip calls of the optimizer that `measurer` tracks: it has stepped.
        Calls that clipped other optimizers' gradients too are kept for their own steps."""
        if self.losses:
            self._last_losses, self.losses = self.losses, []
        own: list[ClipCall] = []
        if self._clips:
            own = [call for call in self._clips if measurer in call.pending]
            for call in own:
                call.pending.remove(measurer)
            self._clips = [call for call in self._clips if call.pending]
        return self._last_losses, own

    def clear(self) -> None:
        """The step was skipped."""
        self.losses, self._clips = [], []


class GradScaling:
    """What a GradScaler did to losses and gradients, so that shown values can undo it."""

    def __init__(self) -> None:
        self._losses: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = []
        """(scaled loss, its value before)."""
        self._scaler: weakref.ref[Any] | None = None
        """The scaler in use between `scale` and `update`."""

    def add(self, scaler: Any, original: Any, result: Any) -> None:
        """`scaler.scale(original)` returned `result`. Keeps values, never a graph."""
        self._scaler = weakref.ref(scaler)
        if isinstance(original, torch.Tensor) and isinstance(result, torch.Tensor):
            self._losses.append((weakref.ref(result), original.detach()))
        elif isinstance(original, (list, tuple)) and isinstance(result, (list, tuple)):
            for before, after in zip(original, result, strict=True):
                self.add(scaler, before, after)
        del self._losses[:-MAX_KEPT]

    def unscaled_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """What `loss` was before it was scaled; itself where it was not."""
        for reference, before in self._losses:
            if reference() is loss:
                return before
        return loss

    def gradient_scale(self, optimizer: torch.optim.Optimizer | None) -> torch.Tensor | None:
        """The factor (0-d) that is still on this optimizer's gradients; None: there is none."""
        scaler = self._scaler() if self._scaler is not None else None
        scale = torch_private.gradient_scale(scaler, optimizer) if scaler is not None else None
        return scale if isinstance(scale, torch.Tensor) else None

    def loss_scale(self) -> torch.Tensor:
        """The factor (0-d) on losses now; NaN where it is unknown."""
        scaler = self._scaler() if self._scaler is not None else None
        scale = torch_private.loss_scale(scaler) if scaler is not None else None
        return scale if isinstance(scale, torch.Tensor) else torch.tensor(float("nan"))

    def read_loss_scale(self) -> float:
        """The same on the host. Waits for the device, as the scaler itself has just done."""
        scaler = self._scaler() if self._scaler is not None else None
        return float(scaler.get_scale()) if scaler is not None else float("nan")

    def end_step(self) -> None:
        self._losses.clear()

    def end_iteration(self) -> None:
        """`scaler.update()`: nothing is scaled until the next `scale`."""
        self._scaler = None


def scalar(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of one element as a 0-d one, without its graph."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.reshape(()) if tensor.dim() else tensor


def total_norm(parameters: Any) -> torch.Tensor:
    """√Σ‖gᵢ‖² over the gradients of `parameters` (0-d)."""
    with torch.no_grad():
        return _total_norm(parameters)


def _total_norm(parameters: Any) -> torch.Tensor:
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = [p.grad for p in given if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    stacked = torch.stack([norm.to(norms[0].device) for norm in norms])
    total: torch.Tensor = torch.linalg.vector_norm(stacked)
    return total


@dataclass(slots=True)
class StepOutcome:
    """What the tracer knows of a step that has just completed."""

    step: int
    losses: Sequence[torch.Tensor]
    learning_rate: float | torch.Tensor
    step_ms: float
    times: PhaseTimes
    clips: Sequence[ClipCall]


@dataclass(slots=True)
class CompletedStep:
    """A step whose values are on their way to the host: a header, then the readings of each probe
    that took any."""

    optimizer: str
    """Its key: "" for the first optimizer of the run."""
    outcome: StepOutcome
    transfer: HostTransfer
    probes: Sequence[ActiveProbe]
    time: float
    own_ms: dict[str, float]
    scaled: bool
    """Whether the header holds a factor that was still on the gradients."""
    with_gradient: int
    """Number of parameters that have a gradient, as far as a clipping has shown it."""

    def facts(self, header: Floats) -> StepFacts:
        """The step on the host, from which the probes make their rows."""
        outcome = self.outcome
        values = iter(header.tolist())
        losses = [next(values) for _ in outcome.losses]
        rate = outcome.learning_rate
        learning_rate = next(values) if isinstance(rate, torch.Tensor) else rate
        clips = [call.measurement(values, self.with_gradient) for call in outcome.clips]
        scale = next(values) if self.scaled else 1.0
        skipped = next(values, 0.0) > 0  # see `StepMeasurer.skip`
        return StepFacts(
            step=outcome.step,
            time=self.time,
            loss=float(sum(losses)) if losses else float("nan"),
            loss_known=bool(losses),
            learning_rate=learning_rate,
            step_ms=outcome.step_ms,
            phase_ms=outcome.times(),
            clips=clips,
            gradient_scale=scale or 1.0,
            skipped_at_scale=next(values) if skipped else None,
            own_ms=self.own_ms,
        )


def make_header(
    outcome: StepOutcome,
    scale: torch.Tensor | None,
    skip: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[torch.Tensor]:
    """What `CompletedStep.facts` reads back, in its order."""
    header: list[torch.Tensor] = [*outcome.losses]
    if isinstance(outcome.learning_rate, torch.Tensor):
        header.append(scalar(outcome.learning_rate))
    for call in outcome.clips:
        header += call.readings
    if scale is not None:
        header.append(scalar(scale))
    if skip is not None:
        header += [scalar(value) for value in skip]
    return header
