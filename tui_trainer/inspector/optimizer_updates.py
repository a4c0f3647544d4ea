"""Explains the update of one parameter, term by term, from the observed steps of its optimizer.

Around a step the values of one entry are cloned, which takes about 0.2 ms; those of a whole tensor
only while the run is paused or stepping. Nothing waits for the device. The observation ends when
requests stop. The formulas are computed in the order and precision of PyTorch. Their symbols: `w`
weight, `g` gradient, `η` learning rate, `λ` weight decay, `t` number of the step.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.parameter_groups import scalar_of
from tui_trainer.inspector.tensor_catalog import TensorCatalog, info_of, readable
from tui_trainer.protocol.inspection import (
    NOT_OBSERVED,
    ExplainUpdate,
    TensorRef,
    UpdateExplanation,
    UpdateTerm,
)
from tui_trainer.trace.tracer import Tracer


@dataclass(frozen=True)
class Term:
    """One line of an update."""

    name: str
    formula: str
    values: torch.Tensor
    numbers: str = ""
    """The formula with its numbers, for a single entry."""


@dataclass(frozen=True)
class UpdateInputs:
    """The inputs of an update: the state before the step."""

    settings: Mapping[str, Any]
    """The settings of the parameter's group."""
    weight: torch.Tensor
    gradient: torch.Tensor
    state: Mapping[str, torch.Tensor]
    """Empty before the first step."""
    decoupled: bool = False
    """Whether weight decay is that of AdamW."""

    def setting(self, name: str, default: float = 0.0) -> float:
        """A number; learning rates and betas may be tensors."""
        value = self.settings.get(name, default)
        return float(default if value is None else value)

    @property
    def betas(self) -> tuple[float, float]:
        first, second = self.settings["betas"]
        return float(first), float(second)

    @property
    def count(self) -> int:
        """`t`: the number of this parameter's step, from 1."""
        step = self.state.get("step")
        return int(step) + 1 if step is not None else 1

    def state_of(self, name: str) -> torch.Tensor:
        """A tensor of the state: zeros before the first step."""
        found = self.state.get(name)
        return torch.zeros_like(self.weight) if found is None else found


@dataclass
class ExplainedUpdate:
    """The terms of an update, and the weight that it leads to."""

    single: bool
    """Whether the update is that of a single entry, which is shown with numbers."""
    terms: list[Term] = field(default_factory=list)
    new: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, name: str, formula: str, values: torch.Tensor, *numbers: object) -> torch.Tensor:
        """Append a line; `numbers` are the parts of its formula, with numbers for symbols."""
        shown = "".join(map(self._text, numbers)) if self.single else ""
        self.terms.append(Term(name, formula, values, shown))
        return values

    @staticmethod
    def _text(part: object) -> str:
        if isinstance(part, str):
            return part
        value = float(part)  # type: ignore[arg-type] # a number or a tensor of one
        text = f"{value:.4g}"
        return f"({text})" if value < 0 else text


def _gradient(inputs: UpdateInputs, out: ExplainedUpdate) -> torch.Tensor:
    """The gradient with its sign, including coupled decay."""
    w, g = inputs.weight, inputs.gradient
    out.add("g", "gradient", g)
    if inputs.settings.get("maximize"):
        g = out.add("g", "−g (maximize)", -g, "−", g)
    decay = inputs.setting("weight_decay")
    if decay and not inputs.decoupled:
        g = out.add("g", "g + λ·w", g.add(w, alpha=decay), g, " + ", decay, "·", w)
    return g


def _apply(
    inputs: UpdateInputs, out: ExplainedUpdate, formula: str, update: torch.Tensor, *numbers: object
) -> None:
    """The last two lines: the update and the new weight."""
    update = out.add("Δw", formula, update, *numbers)
    w = inputs.weight
    out.new = out.add("w", "w + Δw", w + update, w, " + ", update)


def sgd(inputs: UpdateInputs, out: ExplainedUpdate) -> None:
    """SGD with momentum `μ`, dampening `τ` and Nesterov's step."""
    lr, momentum = inputs.setting("lr"), inputs.setting("momentum")
    g = direction = _gradient(inputs, out)
    if momentum:
        before = inputs.state.get("momentum_buffer")
        if before is None:
            direction = out.add("b", "g (first step)", g.clone(), g)
        else:
            rest = 1 - inputs.setting("dampening")
            values = before.mul(momentum).add(g, alpha=rest)
            parts = (momentum, "·", before, " + ", rest, "·", g)
            direction = out.add("b", "μ·b + (1−τ)·g", values, *parts)
        if inputs.settings.get("nesterov"):
            b = direction
            values = g.add(b, alpha=momentum)
            direction = out.add("d", "g + μ·b (Nesterov)", values, g, " + ", momentum, "·", b)
    symbol = "d" if inputs.settings.get("nesterov") else "b" if momentum else "g"
    _apply(inputs, out, f"−η·{symbol}", direction * -lr, "−", lr, "·", direction)


def adam(inputs: UpdateInputs, out: ExplainedUpdate) -> None:
    """Adam and AdamW with bias correction; amsgrad keeps the largest `v`."""
    beta1, beta2 = inputs.betas
    lr, eps, decay = inputs.setting("lr"), inputs.setting("eps"), inputs.setting("weight_decay")
    t = inputs.count
    g = _gradient(inputs, out)
    m, v = inputs.state_of("exp_avg"), inputs.state_of("exp_avg_sq")
    values = m.lerp(g, 1 - beta1)
    m = out.add("m", "β₁·m + (1−β₁)·g", values, beta1, "·", m, " + ", 1 - beta1, "·", g)
    values = v.mul(beta2).addcmul(g, g, value=1 - beta2)
    v = out.add("v", "β₂·v + (1−β₂)·g²", values, beta2, "·", v, " + ", 1 - beta2, "·", g, "²")
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    if inputs.settings.get("amsgrad"):
        largest = inputs.state_of("max_exp_avg_sq")
        v = out.add("v", "max(v_max, v) (amsgrad)", torch.maximum(largest, v),
                    "max(", largest, ", ", v, ")")  # fmt: skip
    m_hat = out.add("m'", "m / (1−β₁ᵗ)", m / correction1, m, " / ", correction1)
    root = out.add("√v'", "√(v / (1−β₂ᵗ))", v.sqrt() / correction2**0.5, "√(", v, " / ",
                   correction2, ")")  # fmt: skip
    if decay and inputs.decoupled:
        w = inputs.weight
        shrunk = w * (1 - lr * decay)
        shrunk = out.add("w", "(1 − η·λ)·w (decoupled decay)", shrunk, 1 - lr * decay, "·", w)
        inputs = UpdateInputs(inputs.settings, shrunk, inputs.gradient, inputs.state, True)
    update = m.div(root + eps) * (-lr / correction1)
    parts = ("−", lr, "·", m_hat, " / (", root, " + ", eps, ")")
    _apply(inputs, out, "−η·m' / (√v' + ε)", update, *parts)


def rmsprop(inputs: UpdateInputs, out: ExplainedUpdate) -> None:
    """RMSprop, centered or not, with momentum `μ`."""
    lr, alpha, eps = inputs.setting("lr"), inputs.setting("alpha"), inputs.setting("eps")
    momentum = inputs.setting("momentum")
    g = _gradient(inputs, out)
    s = inputs.state_of("square_avg")
    values = s.mul(alpha).addcmul(g, g, value=1 - alpha)
    s = out.add("s", "α·s + (1−α)·g²", values, alpha, "·", s, " + ", 1 - alpha, "·", g, "²")
    if inputs.settings.get("centered"):
        a = inputs.state_of("grad_avg")
        values = a.lerp(g, 1 - alpha)
        a = out.add("a", "α·a + (1−α)·g", values, alpha, "·", a, " + ", 1 - alpha, "·", g)
        values = s.addcmul(a, a, value=-1).sqrt()
        root = out.add("r", "√(s − a²) (centered)", values, "√(", s, " − ", a, "²)")
    else:
        root = out.add("r", "√s", s.sqrt(), "√", s)
    if momentum > 0:
        b = inputs.state_of("momentum_buffer")
        values = b.mul(momentum).addcdiv(g, root + eps)
        parts = (momentum, "·", b, " + ", g, " / (", root, " + ", eps, ")")
        b = out.add("b", "μ·b + g / (r + ε)", values, *parts)
        _apply(inputs, out, "−η·b", b * -lr, "−", lr, "·", b)
    else:
        update = g.div(root + eps) * -lr
        _apply(
            inputs, out, "−η·g / (r + ε)", update, "−", lr, "·", g, " / (", root, " + ", eps, ")"
        )


FORMULAS: dict[type[Optimizer], Callable[[UpdateInputs, ExplainedUpdate], None]] = {
    torch.optim.AdamW: adam,
    torch.optim.Adam: adam,
    torch.optim.SGD: sgd,
    torch.optim.RMSprop: rmsprop,
}


def formula_of(optimizer: Optimizer) -> Callable[[UpdateInputs, ExplainedUpdate], None]:
    """The formula of an optimizer. Raises InspectionError where it is not known."""
    for cls in type(optimizer).__mro__:
        if cls in FORMULAS:
            return FORMULAS[cls]
        if "step" in vars(cls):  # a subclass that overrides `step`
            break
    known = ", ".join(cls.__name__ for cls in FORMULAS)
    raise InspectionError(
        f"the update of {type(optimizer).__name__} is not explained", f"those of {known} are"
    )


def is_decoupled(optimizer: Optimizer, settings: Mapping[str, Any]) -> bool:
    """Whether weight decay is that of AdamW."""
    own = isinstance(optimizer, torch.optim.AdamW)
    return bool(settings.get("decoupled_weight_decay", own) or own)


def explain(optimizer: Optimizer, inputs: UpdateInputs, single: bool) -> ExplainedUpdate:
    """The terms of an update. Raises InspectionError for an optimizer that is not known."""
    out = ExplainedUpdate(single)
    formula_of(optimizer)(inputs, out)
    return out


STEPS_OBSERVED = 200
"""Steps without a further request after which the observation ends."""
MAX_ELEMENTS = 1 << 22
"""Elements of the largest tensor that is explained as a whole: for Adam, five copies of it are
held."""
Optimizer = torch.optim.Optimizer


@dataclass
class _Step:
    """One step of the optimizer: its inputs and the new weight."""

    number: int
    """The step of the run."""
    inputs: UpdateInputs
    new: torch.Tensor | None = None


class UpdateCapture:
    """Observes the updates of one parameter, or of one entry. Used on the training thread."""

    def __init__(self, tracer: Tracer, request: ExplainUpdate) -> None:
        """Raises InspectionError where the update cannot be explained."""
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
        if not tracer.gate.within_step:
            step = self._last
            if step is None or step.new is None:
                whole = ", while the run is paused or steps" if self._place is None else ""
                raise InspectionError(NOT_OBSERVED, f"from now on it is{whole}: step and ask again")
            done = tracer.gate.completed
            other = step.number != done
            origin = (f"of step {step.number:,}, the last one of {self._name}",) if other else ()
            return self._explanation(optimizer, parameter, step.inputs, step.new, origin)
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
        own_scale = getattr(optimizer, "grad_scale", None)  # of fused optimizers during a step
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
    """Check the index of an entry; None for the whole tensor. Raises InspectionError."""
    if index is None:
        if tensor.numel() > MAX_ELEMENTS:
            raise InspectionError(
                f"the tensor has {tensor.numel():,} entries; the update of a whole tensor is "
                f"explained up to {MAX_ELEMENTS:,}",
                "choose an entry",
            )
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
