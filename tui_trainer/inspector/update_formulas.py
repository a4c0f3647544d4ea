"""The updates of PyTorch's optimizers, term by term, in the order and precision of PyTorch.

`w` weight, `g` gradient, `η` learning rate, `λ` weight decay, `t` number of the step. Tensors of
any shape: single entries, or whole parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tui_trainer.inspector.errors import InspectionError

Optimizer = torch.optim.Optimizer


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
    """Whether it is of a single entry, which is shown with its numbers."""
    terms: list[Term] = field(default_factory=list)
    new: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, name: str, formula: str, values: torch.Tensor, *numbers: object) -> torch.Tensor:
        """Append a line; `numbers` are its parts, with numbers in place of symbols."""
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
        if "step" in vars(cls):  # a subclass with a step of its own
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
