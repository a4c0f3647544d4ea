"""The loss of a script along a direction, on the batch of its current step.

A script's loop cannot be left and called again, but the forward pass of its step can be re-run with
the same batch and random numbers (`inspector.rerun`). The re-run uses copies of the parameters, so
that no tensor of the training is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.rerun import (
    ModelCall,
    StepCapture,
    call_context,
    copy_parameters,
    evaluate,
)
from tui_trainer.protocol.travel import ExperimentResult, MeasureLandscape
from tui_trainer.trace.gate import Refusal
from tui_trainer.trace.optimizer_registry import Optimizer
from tui_trainer.travel.experiments import (
    dense,
    difference,
    landscape_result,
    positions_of,
    random_direction,
    weights_of,
)
from tui_trainer.travel.snapshots import SnapshotStore


def measure_landscape(
    capture: StepCapture,
    optimizers: Sequence[Optimizer],
    snapshots: SnapshotStore,
    asked: MeasureLandscape,
    wanted: Callable[[], bool],
) -> ExperimentResult:
    """Measure the loss along a direction. Called on the training thread at a phase boundary.
    `wanted()` is false once no viewer waits for the result. Raises Refusal or InspectionError."""
    call = capture.current()
    positions = positions_of(asked)
    with call_context(call) as model:
        notes = capture.notes(call, model)
        weights = [each for each in model.parameters() if each.requires_grad]
        origin: Sequence[torch.Tensor] = weights
        direction: Sequence[torch.Tensor] = ()
        match asked.direction:  # while the modules have their own parameters
            case "snapshots":
                origin = weights_of(snapshots, asked.first, weights)
                end = weights_of(snapshots, asked.second, weights)
                direction = difference(origin, end, weights)
            case "random":
                direction = random_direction(weights)
        copies = copy_parameters(model, weights)
        if asked.direction == "gradient":
            direction = _downhill(model, call, weights, copies, optimizers)
        losses = []
        for along in positions:
            if not wanted():
                raise Refusal("the experiment was cancelled")
            with torch.no_grad():
                for copied, start, way in zip(copies, origin, direction, strict=True):
                    copied.copy_(start)
                    copied.add_(way, alpha=along)
            losses.append(float(_loss(model, call).detach()))
    batch = f"on the batch of step {call.step:,}"
    return landscape_result(asked, positions, losses, "; ".join([batch, *notes]))


def _loss(model: torch.nn.Module, call: ModelCall) -> torch.Tensor:
    """The loss with the present copies. Raises InspectionError."""
    loss = evaluate(model, call, wide=False)
    if loss is None:
        why = call.loss.why_missing(call.returned)
        raise InspectionError(f"the loss cannot be computed again: {why}")
    return loss


def _downhill(
    model: torch.nn.Module,
    call: ModelCall,
    weights: Sequence[torch.Tensor],
    copies: Sequence[torch.Tensor],
    optimizers: Sequence[Optimizer],
) -> list[torch.Tensor]:
    """The step of plain gradient descent with the learning rate of each parameter; 0 for parameters
    of no optimizer. Raises InspectionError."""
    loss = _loss(model, call)
    if loss.grad_fn is None:
        raise InspectionError("the loss of this step has no gradient")
    rates = {
        id(parameter): float(group["lr"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    gradients = torch.autograd.grad(loss, copies, allow_unused=True)
    return [
        torch.zeros_like(own) if gradient is None
        else dense(gradient).mul_(-rates.get(id(own), 0.0))
        for own, gradient in zip(weights, gradients, strict=True)
    ]  # fmt: skip
