"""Observes the optimizer steps of one parameter, so that its update can be explained afterwards.

Around a step of its optimizer the values of one entry are cloned, which takes about 0.2 ms; those
of a whole tensor only while the run is paused or stepping. Nothing waits for the device. The
observation ends when requests stop.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.parameter_groups import scalar_of
from tui_trainer.inspector.tensor_catalog import TensorCatalog, info_of, readable
from tui_trainer.inspector.update_formulas import UpdateInputs, explain, formula_of, is_decoupled
from tui_trainer.protocol.inspection import (
    NOT_OBSERVED,
    ExplainUpdate,
    TensorRef,
    UpdateExplanation,
    UpdateTerm,
)
from tui_trainer.trace.tracer import Tracer

STEPS_OBSERVED = 200
"""Steps without a further request after which the observation ends."""
MAX_ELEMENTS = 1 << 22
"""Elements of the largest tensor that is explained as a whole: with the state of Adam five copies
are held."""
Optimizer = torch.optim.Optimizer


@dataclass
class _Step:
    """One step of the optimizer: its inputs and the new weight."""

    number: int
    """The step of the run."""
    inputs: UpdateInputs
    new: torch.Tensor | None = None


class UpdateCapture:
    """The observation of one parameter, or of one entry. Used on the training thread."""

    def __init__(self, tracer: Tracer, request: ExplainUpdate) -> None:
        """Raises InspectionError where its update cannot be explained."""
        self.request = request
        self._tracer = weakref.ref(tracer)
        self._left = STEPS_OBSERVED
        self._last: _Step | None = None
        catalog = TensorCatalog(tracer)
        parameter = catalog.parameter(request.name)
        self._place = _place(readable(parameter), request.index)
        found = catalog.optimizer_of(parameter)
        if found is None:
            frozen = "" if parameter.requires_grad else ", and it is frozen"
            raise InspectionError(f"no optimizer holds {request.name}{frozen}")
        self._name, optimizer = found
        formula_of(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._parameter = weakref.ref(parameter)

    # ------------------------------------------------------------ observing

    def step_began(self, optimizer: Optimizer) -> None:
        """Clone the inputs of the step."""
        tracer, parameter = self._tracer(), self._parameter()
        if optimizer is not self._optimizer() or tracer is None or parameter is None:
            return
        self._left -= 1
        self._last = None
        if self._left <= 0:
            tracer.observers.updates = None
        elif parameter.grad is not None and (
            self.request.index is not None or tracer.gate.stops_soon
        ):
            try:
                self._last = _Step(tracer.step, self._inputs(optimizer, parameter, 1.0))
            except Exception:  # such as too little memory: the step is not explained
                self._last = None

    def step_ended(self, optimizer: Optimizer) -> None:
        """Clone the new weight."""
        parameter = self._parameter()
        if self._last is not None and optimizer is self._optimizer() and parameter is not None:
            try:
                self._last.new = self._cut(parameter)
            except Exception:
                self._last = None

    # ------------------------------------------------------------ explaining

    def explain(self) -> UpdateExplanation:
        """Explain the step that has ended or, before it, predict the next one. Raises
        InspectionError."""
        self._left = STEPS_OBSERVED
        tracer, optimizer, parameter = self._tracer(), self._optimizer(), self._parameter()
        if tracer is None or optimizer is None or parameter is None:
            raise InspectionError(f"{self.request.name} or its optimizer is gone")
        if tracer.gate.phase in ("step", ""):
            step = self._last
            if step is None or step.new is None:
                whole = ", while the run is paused or steps" if self._place is None else ""
                raise InspectionError(NOT_OBSERVED, f"from now on it is{whole}: step and ask again")
            done = tracer.gate.completed
            other = step.number != done
            said = (f"of step {step.number:,}, the last one of {self._name}",) if other else ()
            return self._explanation(optimizer, parameter, step.inputs, step.new, said)
        if parameter.grad is None:
            hint = "pause after backward: break RUN 'step > 0 at backward'"
            raise InspectionError(f"{self.request.name} has no gradient yet", hint)
        notes = []
        if tracer.gate.phase not in ("backward", "clip"):
            notes.append(f"after {tracer.gate.phase}: the gradient is not that of the whole step")
        measurers = tracer.registry.measurers_of(parameter)
        scale = next((tracer.gradient_scale(each) for each in measurers), 1.0)
        if scale != 1.0:
            notes.append(f"the gradient without the loss scale {scale:,g} that is still on it")
        if tracer.gate.phase == "backward":
            notes.append("with the gradient as it is now: clipping would still change it")
        inputs = self._inputs(optimizer, parameter, scale)
        return self._explanation(optimizer, parameter, inputs, None, tuple(notes))

    def _inputs(self, optimizer: Optimizer, parameter: torch.Tensor, scale: float) -> UpdateInputs:
        group = _group_of(optimizer, parameter)[1]
        gradient = parameter.grad
        assert gradient is not None
        own_scale = getattr(optimizer, "grad_scale", None)  # of fused ones, during the step
        g = self._cut(gradient)
        if scale != 1.0 or own_scale is not None:
            g = g / (scale if own_scale is None else own_scale.to(g.dtype))
        shape = parameter.shape
        state = {
            str(key): self._cut(value) if value.shape == shape else value.clone()
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }
        settings = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        decoupled = is_decoupled(optimizer, group)
        return UpdateInputs(settings, self._cut(parameter), g, state, decoupled)

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            held = readable(tensor)
            return (held if self._place is None else held[self._place]).clone()

    def _explanation(
        self,
        optimizer: Optimizer,
        parameter: torch.Tensor,
        inputs: UpdateInputs,
        new: torch.Tensor | None,
        notes: tuple[str, ...],
    ) -> UpdateExplanation:
        single = self.request.index is not None
        found = explain(optimizer, inputs, single)
        size = _value if single else _norm
        terms = [UpdateTerm(t.name, t.formula, size(t.values), t.numbers) for t in found.terms]
        spacing = torch.finfo(inputs.weight.dtype).eps * torch.maximum(
            inputs.weight.abs(), found.new.abs()
        )
        return UpdateExplanation(
            tensor=info_of(TensorRef(self.request.name), parameter),
            index=self.request.index,
            optimizer=self._name,
            group=_group_of(optimizer, parameter)[0],
            settings={key: scalar_of(value) for key, value in inputs.settings.items()},
            count=0 if isinstance(optimizer, torch.optim.SGD) else inputs.count,
            terms=tuple(terms),
            old=size(inputs.weight),
            predicted=size(found.new),
            actual=None if new is None else size(new),
            difference=None if new is None else _norm(found.new.double() - new.double()),
            precision=_norm(spacing),
            notes=notes,
        )


def _place(tensor: torch.Tensor, index: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The index of an entry. Raises InspectionError where there is no such entry."""
    if index is None:
        if tensor.numel() > MAX_ELEMENTS:
            text = f"it has {tensor.numel():,} entries, of at most {MAX_ELEMENTS:,} as a whole"
            raise InspectionError(f"{text} the update is explained", "choose an entry")
        return None
    inside = len(index) == tensor.dim() and all(
        0 <= each < size for each, size in zip(index, tensor.shape, strict=True)
    )
    if not inside:
        shape = ", ".join(map(str, tensor.shape))
        raise InspectionError(f"there is no entry {list(index)} in a tensor of shape [{shape}]")
    return index


def _group_of(optimizer: Optimizer, parameter: torch.Tensor) -> tuple[int, dict[str, Any]]:
    for number, group in enumerate(optimizer.param_groups):
        if any(each is parameter for each in group["params"]):
            return number, group
    raise InspectionError("its optimizer no longer holds it")


def _value(tensor: torch.Tensor) -> float:
    return float(tensor)


def _norm(tensor: torch.Tensor) -> float:
    found = float(torch.linalg.vector_norm(tensor.float()))
    return found if math.isfinite(found) else float(torch.linalg.vector_norm(tensor.double()))
