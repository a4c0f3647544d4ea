"""Experiments on a shipped task: comparing settings, finding a learning rate, and measuring the
loss along a direction. Each runs steps of the task's loop from the present state without recording
them, and then restores everything. `script_landscape` measures the loss along a direction in a
script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tui_trainer.protocol.travel import (
    MAX_POINTS,
    MAX_STEPS,
    Curve,
    Experiment,
    ExperimentResult,
    FindLearningRate,
    MeasureLandscape,
    WhatIf,
)
from tui_trainer.settings.edits import LiveEdits, SettingEdit
from tui_trainer.tasks.definition import Training
from tui_trainer.trace.gate import Refusal
from tui_trainer.travel.snapshots import SnapshotStore, TrainingParts, TrainingState

DIVERGED = 4.0
"""The search for a learning rate ends once the loss is this many times its smallest value."""


class _LeaveLoop(BaseException):
    """Raised within the task's loop to leave it after enough steps."""


class Experiments:
    """Runs experiments on the training thread, outside of the loop, with the tracer suspended."""

    def __init__(
        self,
        task: Training,
        edits: LiveEdits,
        parts: TrainingParts,
        snapshots: SnapshotStore,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """`wanted()` is false once no viewer waits for the result."""
        self._task = task
        self._edits = edits
        self._parts = parts
        self._snapshots = snapshots
        self._wanted = wanted
        self._optimizer = parts.optimizers[0]

    def run(self, experiment: Experiment) -> ExperimentResult:
        """Run an experiment and leave the training bit for bit as before. Raises Refusal."""
        state, edits = TrainingState.take(self._parts), self._edits.snapshot()
        try:
            state.restore()  # the loop was left within a step, whose batch is drawn already
            self._edits.restore(edits)
            match experiment:
                case WhatIf():
                    return self._what_if(experiment, state, edits)
                case FindLearningRate():
                    return self._find_rate(experiment)
                case MeasureLandscape():
                    return self._landscape(experiment, state)
        finally:
            state.restore()
            self._edits.restore(edits)

    # ------------------------------------------------------------ the three

    def _what_if(self, asked: WhatIf, state: TrainingState, edits: Any) -> ExperimentResult:
        steps = _limited(asked.steps, MAX_STEPS)
        present = self._losses(steps)
        state.restore()
        self._edits.restore(edits)
        self._edits.apply(SettingEdit(0, asked.changes), silent=True)
        made = " ".join(change.text for change in asked.changes)
        changed = self._losses(steps)
        first = self._task.stateful["batches"].position - len(changed) + 1
        x = tuple(float(first + number) for number in range(max(len(present), len(changed))))
        text = (
            f"after {len(changed)} steps the loss is {_last(changed)} instead of {_last(present)}"
        )
        curves = (
            Curve("present settings", x[: len(present)], tuple(present)),
            Curve(made, x[: len(changed)], tuple(changed)),
        )
        return ExperimentResult("step", curves, text)

    def _find_rate(self, asked: FindLearningRate) -> ExperimentResult:
        steps = _limited(asked.steps, MAX_STEPS)
        if not 0 < asked.low < asked.high:
            raise Refusal("the lowest learning rate must be above 0 and below the highest")
        ratio = (asked.high / asked.low) ** (1 / max(1, steps - 1))
        rates = [asked.low * ratio**number for number in range(steps)]
        losses = self._losses(steps, rates)
        rates = rates[: len(losses)]
        text = "the loss falls nowhere: start lower"
        if (best := _steepest(rates, losses)) is not None:
            text = f"the loss falls fastest at {best:.2g}; stay well below where it rises"
        return ExperimentResult(
            "learning rate", (Curve("loss", tuple(rates), tuple(losses)),), text
        )

    def _landscape(self, asked: MeasureLandscape, state: TrainingState) -> ExperimentResult:
        positions = positions_of(asked)
        weights = [p for p in self._task.model.parameters() if p.requires_grad]
        origin: Sequence[torch.Tensor] | None = None
        match asked.direction:
            case "snapshots":
                origin = weights_of(self._snapshots, asked.first, weights)
                end = weights_of(self._snapshots, asked.second, weights)
                direction = difference(origin, end, weights)
            case "random":
                direction = random_direction(weights)
            case "gradient":
                direction = self._downhill(weights)
        losses = []
        for along in positions:
            state.restore()
            with torch.no_grad():
                for number, (parameter, way) in enumerate(zip(weights, direction, strict=True)):
                    if origin is not None:
                        parameter.copy_(origin[number])
                    parameter.add_(way, alpha=along)
            losses.append(self._loss())
        return landscape_result(asked, positions, losses, "on the next batch")

    def _downhill(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The step of plain gradient descent, computed in place of the gradients."""
        self._losses(1, before_step=True)
        factor = -float(self._optimizer.param_groups[0]["lr"])
        scale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer divides by it
        if scale is not None:
            factor /= float(scale)
        return [
            torch.zeros_like(p) if p.grad is None else dense(p.grad).mul_(factor) for p in weights
        ]

    # ------------------------------------------------------------ steps of the loop

    def _losses(
        self, steps: int, rates: Sequence[float] = (), before_step: bool = False
    ) -> list[float]:
        """The losses of the next steps; with `rates`, one learning rate per step, until the loss
        diverges. `before_step`: stop before the first step, with its gradients in `.grad`."""
        losses: list[torch.Tensor] = []
        smallest = math.inf

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            nonlocal smallest
            self._require_wanted()
            if len(losses) > steps:  # the GradScaler has skipped the last step
                raise _LeaveLoop
            if before_step:
                raise _LeaveLoop
            if not rates:
                return
            loss = float(losses[-1])
            smallest = min(smallest, loss) if math.isfinite(loss) else smallest
            if not math.isfinite(loss) or loss > DIVERGED * smallest:
                raise _LeaveLoop
            for group in optimizer.param_groups:
                group["lr"] = rates[len(losses) - 1]

        def after(*_: Any) -> None:
            if len(losses) >= steps:
                raise _LeaveLoop

        handles = [
            self._optimizer.register_step_pre_hook(before),
            self._optimizer.register_step_post_hook(after),
        ]
        try:
            with _backward_replaced(lambda loss: losses.append(self._unscaled(loss)), True):
                self._loop()
        finally:
            for handle in handles:
                handle.remove()
        return [float(loss) for loss in losses[:steps]]

    def _require_wanted(self) -> None:
        """Raises Refusal once no viewer waits for the result."""
        if not self._wanted():
            raise Refusal("the experiment was cancelled")

    def _loss(self) -> float:
        """The loss of the next batch."""
        self._require_wanted()
        found: list[float] = []

        def note(loss: torch.Tensor) -> None:
            found.append(float(self._unscaled(loss)))
            raise _LeaveLoop

        with _backward_replaced(note, False):
            self._loop()
        return found[0] if found else math.nan

    def _loop(self) -> None:
        try:
            with torch.enable_grad():
                self._task.loop()
        except _LeaveLoop:
            pass

    def _unscaled(self, loss: torch.Tensor) -> torch.Tensor:
        scaler = self._task.stateful.get("scaler")
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        return loss.detach() / scale if scale != 1.0 else loss.detach()


@contextmanager
def _backward_replaced(note: Callable[[torch.Tensor], object], run: bool) -> Iterator[None]:
    """Replace `Tensor.backward` by a function that calls `note(loss)` and then, if `run`, runs
    backward."""
    original: Callable[..., Any] = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        note(self)
        return original(self, *args, **kwargs) if run else None

    torch.Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = original  # type: ignore[method-assign]


# ---------------------------------------------------------------- losses along a direction


def positions_of(asked: MeasureLandscape) -> list[float]:
    """The positions at which to measure the loss, in units of the direction. Raises Refusal."""
    points = _limited(asked.points, MAX_POINTS)
    sides = 3 if asked.direction == "snapshots" else 2  # also beyond the second snapshot
    return [asked.reach * (sides * n / max(1, points - 1) - 1) for n in range(points)]


def weights_of(
    snapshots: SnapshotStore, step: int, weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The values of these parameters at a step, on the host. Raises Refusal."""
    snapshot = snapshots.before(step)
    if snapshot is None or snapshot.step != step:
        kept = ", ".join(f"{each:,}" for each in snapshots.steps) or "none"
        raise Refusal(f"there is no snapshot of step {step:,}", f"steps with a snapshot: {kept}")
    state = snapshot.state
    saved = dict(zip(map(id, state.parts.tensors()), state.tensors, strict=True))
    if not all(id(parameter) in saved for parameter in weights):
        raise Refusal(f"the snapshot of step {step:,} lacks parameters of the model")
    return [saved[id(parameter)] for parameter in weights]


def difference(
    begin: Sequence[torch.Tensor], end: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The direction from `begin` to `end`, on the devices of the parameters `weights`."""
    return [(b - a).to(p.device) for a, b, p in zip(begin, end, weights, strict=True)]


def random_direction(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A random direction in which the part of each parameter has the parameter's norm, so that
    layers of different scales count the same (Li et al. 2018)."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for parameter in weights:
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        found.append(drawn.mul_(parameter.detach().norm() / (drawn.norm() + 1e-12)))
    return found


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient as a dense tensor; those of embeddings may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def landscape_result(
    asked: MeasureLandscape, positions: Sequence[float], losses: Sequence[float], batch: str
) -> ExperimentResult:
    """The result of a landscape; `batch` says on which batch the losses were computed."""
    lowest = min(zip(positions, losses, strict=True), key=lambda each: _order(each[1]))[0]
    curve = Curve("loss", tuple(positions), tuple(losses))
    return ExperimentResult(
        asked.direction, (curve,), f"the loss is lowest at {lowest:.3g}, {batch}"
    )


def _limited(count: int, most: int) -> int:
    if not 1 <= count <= most:
        raise Refusal(f"{count:,} is not possible", f"give a number from 1 to {most:,}")
    return count


def _last(losses: Sequence[float]) -> str:
    return f"{losses[-1]:.4g}" if losses else "unknown"


def _order(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The learning rate at which the loss, averaged over neighbouring rates, falls fastest per
    decade; None if it never falls."""
    smooth = []
    for number in range(len(losses)):
        near = losses[max(0, number - 2) : number + 3]
        smooth.append(sum(near) / len(near))
    falls = [(smooth[n + 1] - smooth[n], rates[n]) for n in range(len(smooth) - 1)]
    lowest = min(falls, default=None)
    return lowest[1] if lowest is not None and lowest[0] < 0 else None
