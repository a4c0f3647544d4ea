"""Checks a gradient of autograd against finite differences of the loss, with the batch and the
random numbers of the current step. The modules get copies of their parameters, in float64 if these
fit into the memory limit, and one entry of a copy is changed at a time.
"""

from __future__ import annotations

import contextlib
import math
from itertools import pairwise
from time import monotonic
from typing import Any

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.rerun import (
    ModelCall,
    StepCapture,
    call_context,
    copy_parameters,
    evaluate,
    no_loss,
)
from tui_trainer.inspector.tensor_catalog import TensorCatalog
from tui_trainer.protocol.autograd import (
    MAX_CHECKED,
    CheckedEntry,
    CheckGradient,
    GradientCheck,
    GradientStep,
)
from tui_trainer.protocol.formatting import bytes_, rough_duration
from tui_trainer.trace.torch_private import own_buffers
from tui_trainer.trace.tracer import Tracer

STEPS = tuple(10.0**-k for k in range(1, 10))
"""Step sizes in float64."""
COARSE_STEPS = tuple(10.0**-k for k in range(1, 6))
"""Step sizes in narrower types, in which smaller steps are rounded away."""
MAX_BYTES = 1 << 30
"""Memory limit of the copies in float64, unless the request sets another one."""
MAX_S = 30.0
"""Time after which no further entry is checked."""
ROUNDINGS = 10
"""Rounding error of a loss that is a sum of many numbers, in units of the last place."""
SAME_LOSS = 1e-3
"""Relative difference of the losses up to which float64 is assumed to draw the same random
numbers."""


def check_gradient(
    tracer: Tracer, catalog: TensorCatalog, capture: StepCapture, request: CheckGradient
) -> GradientCheck:
    """Check entries of the gradient of one parameter. Raises InspectionError."""
    parameter = catalog.parameter(request.name)
    call = capture.current()
    stepped = not tracer.gate.within_step
    notes = ["with the weights as they are now, after the step"] if stepped else []
    with call_context(call) as model:
        size = _double_bytes(model)
        limit = request.max_bytes or MAX_BYTES
        wide = parameter.device.type != "mps" and size <= limit
        if size > limit:
            needed = f"the parameters in float64 hold {bytes_(size, 0)}, of at most"
            notes.append(f"{needed} {bytes_(limit, 0)}: checked in their own type")
        own = list(model.parameters())
        if all(each is not parameter for each in own):
            raise InspectionError("it is not a parameter of the model that was called last")
        chosen = own if wide else [parameter]
        copies = copy_parameters(model, chosen, wide)
        target = next(c for c, each in zip(copies, chosen, strict=True) if each is parameter)
        if wide:
            _widen_buffers(model)
        with _without_autocast(call, wide):
            loss = evaluate(model, call, wide)
            if loss is None or loss.grad_fn is None:
                raise no_loss(call, loss)
            (gradient,) = torch.autograd.grad(loss, (target,), allow_unused=True)
            if gradient is None:
                raise InspectionError(f"the loss of this step does not depend on {request.name}")
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            value = float(loss.detach())
            if not stepped:
                notes += _loss_notes(call, value, wide)
            del loss
            entries: list[CheckedEntry] = []
            began = monotonic()
            for index in _chosen(request, gradient):
                if entries and monotonic() - began > MAX_S:
                    notes.append(
                        f"stopped after {rough_duration(MAX_S)}: further entries are left out"
                    )
                    break
                entries.append(_checked(model, call, target, gradient, index, wide))
    held = sum(each.numel() * each.element_size() for each in copies)
    dtype = str(target.dtype).removeprefix("torch.")
    of_step = _gradients_of_step(tracer, parameter, entries)
    return GradientCheck(request.name, dtype, value, tuple(entries), held, of_step, tuple(notes))


def _double_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return sum(8 * tensor.numel() for tensor in tensors)


def _widen_buffers(model: torch.nn.Module) -> None:
    """Replace buffers and plain tensors by copies in float64, which `call_context` undoes."""
    for module in model.modules():
        for held in (own_buffers(module), module.__dict__):
            for name, each in held.items():
                if isinstance(each, torch.Tensor) and each.is_floating_point():
                    held[name] = each.double()


def _without_autocast(call: ModelCall, wide: bool) -> contextlib.AbstractContextManager[Any]:
    device = call.autocast[-1].device
    return torch.autocast(device, enabled=False) if wide else contextlib.nullcontext()


def _loss_notes(call: ModelCall, value: float, wide: bool) -> list[str]:
    own = call.loss.value
    if own is None:
        return []
    expected = float(own)
    if abs(value - expected) <= SAME_LOSS * max(abs(expected), abs(value)):
        return []
    why = ": other random numbers are drawn in float64" if wide else ""
    return [f"the loss of the step was {expected:.6g}, this one is {value:.6g}{why}"]


def _chosen(request: CheckGradient, gradient: torch.Tensor) -> list[tuple[int, ...]]:
    """The entries to check. Raises InspectionError for one that does not exist."""
    shape = tuple(gradient.shape)
    for index in request.indices:
        inside = len(index) == len(shape) and all(
            0 <= each < size for each, size in zip(index, shape, strict=True)
        )
        if not inside:
            raise InspectionError(f"there is no entry {list(index)} in a tensor of shape {shape}")
    if request.indices:
        return list(request.indices[:MAX_CHECKED])
    wanted = min(max(1, request.entries), MAX_CHECKED, gradient.numel())
    largest = gradient.reshape(-1).abs().topk((wanted + 1) // 2).indices.tolist()
    spaced = [k * gradient.numel() // wanted for k in range(wanted)]
    flat = list(dict.fromkeys([*largest, *spaced]))[:wanted]
    return [_unraveled(each, shape) for each in flat]


def _unraveled(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    found: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        found.append(rest)
    return tuple(reversed(found))


def _checked(
    model: torch.nn.Module,
    call: ModelCall,
    target: torch.Tensor,
    gradient: torch.Tensor,
    index: tuple[int, ...],
    wide: bool,
) -> CheckedEntry:
    """Change one entry by each h, in both directions."""
    autograd = float(gradient[index])
    with torch.no_grad():
        # `target` is a copy of the parameter: no graph of the training checks its version.
        place = target.detach()
        value = float(place[index])

        def loss_at(moved: float) -> tuple[float, float]:
            """(value as rounded to the dtype, loss with that value)"""
            place[index] = moved
            loss = evaluate(model, call, wide)
            return float(place[index]), math.nan if loss is None else float(loss)

        _, here = loss_at(value)
        steps = []
        for h in STEPS if wide else COARSE_STEPS:
            above, after = loss_at(value + h)
            below, before = loss_at(value - h)
            forward = (after - here) / (above - value) if above != value else math.nan
            central = (after - before) / (above - below) if above != below else math.nan
            errors = relative_error(autograd, forward), relative_error(autograd, central)
            steps.append(GradientStep(h, forward, central, *errors))
        place[index] = value
    spacing = abs(here) * torch.finfo(target.dtype).eps
    return CheckedEntry(index, value, autograd, tuple(steps), steadiest(steps, spacing))


def relative_error(a: float, b: float) -> float:
    """|a − b| / max(|a|, |b|); 0 for two zeros."""
    largest = max(abs(a), abs(b))
    return abs(a - b) / largest if largest else 0.0


def steadiest(steps: list[GradientStep], spacing: float) -> int:
    """Index of the h whose central difference is probably the best: the one for which the change
    from the next larger h, which shows the curvature, plus the rounding error of the losses
    (`spacing` of numbers near them) is smallest. The gradient of autograd is not used."""
    errors = [
        (abs(after.central - before.central) + ROUNDINGS * spacing / after.h, number)
        for number, (before, after) in enumerate(pairwise(steps), 1)
    ]
    known = [each for each in errors if not math.isnan(each[0])]
    return min(known)[1] if known else 0


def _gradients_of_step(
    tracer: Tracer, parameter: torch.Tensor, entries: list[CheckedEntry]
) -> tuple[float, ...]:
    """The values of these entries in `.grad`, divided by the loss scale; () without a dense one."""
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse:
        return ()
    measurers = tracer.registry.measurers_of(parameter)
    scale = next((tracer.gradient_scale(each) for each in measurers), 1.0)
    return tuple(float(gradient[entry.index]) / scale for entry in entries)
