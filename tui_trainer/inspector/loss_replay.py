"""Recomputes the loss of a step from the model's output.

Records the calls of PyTorch's loss functions with their targets. Simple operations between the
model's output and a loss function (views, casts, slices, means) are read from the autograd graph.
Any other loss is recomputed call by call from the calls recorded by `loss_recording`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.loss_recording import LossRecorder, RecordedCall, replay
from tui_trainer.trace.module_calls import tensors_in
from tui_trainer.trace.torch_private import (
    has_saved,
    node_name,
    result_of,
    saved,
    saved_dim,
    signed,
    tensors_of,
    version_of_value,
)

MAX_CHAIN = 32
"""Maximum number of operations between an output of the model and a loss function."""
MAX_NODES = 256
"""Maximum number of nodes between the tensor on which backward is called and the loss functions."""
MAX_CALLS = 32

OutputKey = tuple[Any, int]
"""(node of the graph, index of its output): identifies a tensor within a graph."""
TensorOperation = Callable[[torch.Tensor], torch.Tensor]
"""An operation on a tensor that can be repeated."""


@dataclass(frozen=True)
class Cast:
    """A cast to another floating-point dtype."""

    dtype: torch.dtype

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype)


@dataclass(frozen=True)
class Derived:
    """A tensor that was computed from an output of the model."""

    position: int
    """Index of the output among those of the model."""
    steps: tuple[TensorOperation, ...]

    def recompute(self, outputs: Sequence[torch.Tensor], wide: bool) -> torch.Tensor:
        if self.position >= len(outputs):
            raise InspectionError("the model returned something else this time")
        tensor = outputs[self.position]
        for step in self.steps:
            if not (wide and isinstance(step, Cast)):
                tensor = step(tensor)
        return tensor


@dataclass(frozen=True)
class Kept:
    """A tensor that was not computed by the model, such as the targets."""

    tensor: torch.Tensor
    version: int

    def recompute(self, wide: bool) -> torch.Tensor:
        if version_of_value(self.tensor) != self.version:
            raise InspectionError("the targets of this step have been overwritten since")
        return self.tensor.double() if wide and self.tensor.is_floating_point() else self.tensor


@dataclass
class LossCall:
    """A call of one of PyTorch's loss functions."""

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    value: torch.Tensor
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    key: OutputKey | None
    """Identifies the result; None once backward has begun."""

    def recompute(self, outputs: Sequence[torch.Tensor], wide: bool) -> torch.Tensor:
        def filled(value: Any) -> Any:
            if isinstance(value, Derived):
                return value.recompute(outputs, wide)
            return value.recompute(wide) if isinstance(value, Kept) else value

        args = [filled(value) for value in self.args]
        kwargs = {name: filled(value) for name, value in self.kwargs.items()}
        result: torch.Tensor
        device, enabled, dtype = self.autocast[0]
        with torch.autocast(device, dtype, enabled and not wide, cache_enabled=False):
            result = self.function(*args, **kwargs)
        return result


@dataclass(frozen=True)
class _Recorded:
    """All calls between the model and the loss."""

    calls: list[RecordedCall]
    slot: int
    """Slot of the tensor on which backward was called."""
    scale: float
    """Loss scale of a GradScaler by which that tensor is multiplied."""
    read: bool


class LossReplay:
    """Recomputes the loss of one step, from the calls recorded during the step."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        """The loss of the step without a GradScaler's scale, 0-d; None before backward."""
        self.missing = ""
        """Why the loss cannot be recomputed."""
        self._outputs: list[OutputKey] = []
        self._calls: list[LossCall] = []
        self._direct: Derived | None = None
        """The loss, if it is an output of the model or computed from one output alone."""
        self._terms: list[LossCall] = []
        self._others = False
        """Whether the loss has terms that no recorded loss function computed."""
        self._recorded: _Recorded | None = None
        """Used if `_direct` and `_terms` do not give the whole loss."""

    # ------------------------------------------------------------ recording

    def forward_ended(self, result: Any) -> None:
        """Note the outputs of the model."""
        self._outputs = [_key(tensor) for tensor in outputs_of(result)]

    def called(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: torch.Tensor,
    ) -> None:
        """Note that a loss function was called and returned a scalar."""
        if len(self._calls) >= MAX_CALLS or result.grad_fn is None:
            return
        device = result.device.type
        autocast = ((device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),)
        try:
            kept = [self._kept(value) for value in args]
            named = {name: self._kept(value) for name, value in kwargs.items()}
        except InspectionError as error:
            self.missing = error.message
            return
        value = result.detach().clone()
        self._calls.append(LossCall(function, kept, named, value, autocast, _key(result)))

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.grad_fn is None:
            return Kept(value, version_of_value(value))
        return self._derived(value)

    def _derived(self, tensor: torch.Tensor) -> Derived:
        """The operations by which a tensor was computed from one output. Raises InspectionError."""
        steps: list[TensorOperation] = []
        node, number = _key(tensor)
        for _ in range(MAX_CHAIN):
            if (node, number) in self._outputs:
                return Derived(self._outputs.index((node, number)), tuple(reversed(steps)))
            following = [each for each in node.next_functions if each[0] is not None]
            if len(following) != 1:
                break
            step = _step(node)
            if step is None:
                operation = node_name(node).lower()
                raise InspectionError(f"{operation} between the model and its loss is not repeated")
            steps.append(step)
            node, number = following[0]
        raise InspectionError(
            "the loss is computed from more than the output of the last call of a model"
        )

    def backward_began(self, loss: torch.Tensor, value: torch.Tensor) -> None:
        """Find how `loss`, on which backward is called, is computed; `value`: the loss without its
        graph and loss scale."""
        self.value = value.detach().clone()
        try:
            if loss.grad_fn is not None:
                self._take(loss)
        finally:  # a node would keep its graph alive, with the activations in it
            self._outputs = []
            for call in self._calls:
                call.key = None

    def recorded(self, recorder: LossRecorder, slot: int | None, loss: torch.Tensor) -> None:
        """Keep the calls of `recorder` if they are needed; `slot`: that of `loss`. Called after
        `backward_began`."""
        whole = self._direct is not None or (self._terms and not self._others)
        if whole or self.value is None or loss.dim() != self.value.dim():
            return
        if slot is None or recorder.missing:
            self.missing = recorder.missing or self.missing
            return
        value, scaled = float(self.value), float(loss.detach())
        scale = scaled / value if value and scaled != value else 1.0
        self._recorded = _Recorded(recorder.calls, slot, scale, recorder.read)

    def _take(self, loss: torch.Tensor) -> None:
        calls = {call.key: call for call in self._calls}
        if _key(loss) in calls:
            self._terms = [calls[_key(loss)]]
            return
        if not calls:
            try:
                self._direct, self.missing = self._derived(loss), ""
            except InspectionError as error:
                self.missing = self.missing or error.message
            return
        waiting, seen = [_key(loss)], {_key(loss)}
        while waiting and len(seen) < MAX_NODES:
            key = waiting.pop()
            if key in calls:
                self._terms.append(calls[key])
                continue
            following = [each for each in key[0].next_functions if each[0] is not None]
            self._others = self._others or not following or key in self._outputs
            new = [each for each in following if each not in seen]
            seen.update(new)
            waiting += new
        self._others = self._others or bool(waiting)

    # ------------------------------------------------------------ recomputing

    def recompute(
        self, output: Any, model: torch.nn.Module, wide: bool = False
    ) -> torch.Tensor | None:
        """The loss (0-d) for the output of a re-run of `model`; None if its computation is unknown.
        `wide`: in float64, as the output is."""
        outputs = outputs_of(output)
        if self._recorded is not None:
            loss = replay(self._recorded.calls, outputs, self._recorded.slot, model, wide)
            return loss if self._recorded.scale == 1.0 else loss / self._recorded.scale
        if self._direct is not None:
            return self._direct.recompute(outputs, wide)
        if not self._terms:
            return None
        terms = [call.recompute(outputs, wide) for call in self._terms]
        total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        factor = self._factor
        if factor == 1.0:
            return total
        parts = round(1 / factor)
        # Divided, as in scripts that accumulate gradients; a product differs in the last place.
        return total / parts if parts and abs(parts * factor - 1) < 1e-5 else total * factor

    @property
    def _factor(self) -> float:
        """The factor by which the script multiplied a single term, as for accumulated
        gradients."""
        if self.value is None or len(self._terms) != 1 or self._others or self._recorded:
            return 1.0
        before, after = float(self._terms[0].value), float(self.value)
        if before == after or not before or not math.isfinite(before * after):
            return 1.0
        return after / before

    def why_missing(self, returned: bool) -> str:
        """Why the re-run has no loss. `returned`: whether the model has returned in this step."""
        if not returned:
            return "the model has not been called yet in this step"
        if self.missing:
            return self.missing
        if self.value is None:
            return "it is not computed yet: continue to backward"
        return "none of torch's loss functions was called on the output of the model"

    def notes(self, loss: torch.Tensor, stepped: bool) -> list[str]:
        """Notes on the `loss` of a re-run (without a graph); `stepped`: the weights have been
        updated since."""
        notes = []
        factor = self._factor
        if self.value is None:
            notes.append("of the loss functions called so far: backward has not begun")
        elif factor != 1.0:
            notes.append(f"the loss times {factor:.6g}, as backward was called on it")
        if self._recorded is not None and self._recorded.read:
            notes.append("numbers that the script read out of tensors are those of the step")
        if self._others and self._recorded is None:
            notes.append(
                "terms of the loss that torch's loss functions did not compute are left out"
            )
        if self.value is not None and not stepped:
            expected = float(self.value)
            found = float(loss)
            if found != expected and not (math.isnan(found) and math.isnan(expected)):
                notes.append(f"the step's own loss was {expected:.8g}, this one is {found:.8g}")
        return notes


def outputs_of(result: Any) -> list[torch.Tensor]:
    """The tensors in a model's result through which gradients can flow."""
    found = tensors_of(result) or tensors_in(result)
    if not found and dataclasses.is_dataclass(result) and not isinstance(result, type):
        found = tensors_of(dict(vars(result)))
    return [each for each in found if each.is_floating_point() or each.is_complex()]


def _key(tensor: torch.Tensor) -> OutputKey:
    return tensor.grad_fn, tensor.output_nr


# ---------------------------------------------------------------- operations


def _step(node: Any) -> TensorOperation | None:
    """The repeatable operation of a node; None where it is unknown."""
    name = node_name(node)
    if name in RESHAPING:
        shape, _ = result_of(node)
        return lambda x: x.reshape(shape)
    if name == "ToCopy":
        return Cast(result_of(node)[1])
    if name in PLAIN:
        return PLAIN[name]
    made = _WITH_SETTINGS.get(name)
    return made(node) if made is not None else None


RESHAPING = ("View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze")
PLAIN: dict[str, TensorOperation] = {
    "Clone": torch.clone,
    "T": torch.t,
    "Neg": torch.neg,
    "Exp": torch.exp,
    "Log": torch.log,
    "Abs": torch.abs,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Relu": torch.relu,
}


def _transpose(node: Any) -> TensorOperation:
    first, second = saved_dim(node, "dim0"), saved_dim(node, "dim1")
    return lambda x: x.transpose(first, second)


def _permute(node: Any) -> TensorOperation:
    dims = tuple(signed(each) for each in saved(node, "dims"))
    return lambda x: x.permute(dims)


def _slice(node: Any) -> TensorOperation:
    dim, (shape, _) = saved_dim(node), result_of(node)
    first, step = saved(node, "start") or 0, saved(node, "step")
    length = shape[dim]

    def cut(x: torch.Tensor) -> torch.Tensor:
        start = signed(first)
        start = max(0, start + x.shape[dim]) if start < 0 else start
        return x[(slice(None),) * (dim % x.dim()) + (slice(start, start + length * step, step),)]

    return cut


def _select(node: Any) -> TensorOperation:
    dim, index = saved_dim(node), saved_dim(node, "index")
    return lambda x: x.select(dim, index)


def _reduce(name: str, whole: bool) -> Callable[[Any], TensorOperation]:
    def made(node: Any) -> TensorOperation:
        function = getattr(torch, name)
        if whole:
            return lambda x: function(x)
        dim = saved(node, "dim")
        dims = tuple(map(signed, dim)) if isinstance(dim, tuple) else signed(dim)
        keepdim = saved(node, "keepdim")
        return lambda x: function(x, dims, keepdim)

    return made


def _along(name: str) -> Callable[[Any], TensorOperation]:
    def made(node: Any) -> TensorOperation:
        function, dim = getattr(torch, name), saved_dim(node)
        return lambda x: function(x, dim)

    return made


def _mean_or_sum(name: str) -> Callable[[Any], TensorOperation]:
    def made(node: Any) -> TensorOperation:
        return _reduce(name, not has_saved(node, "dim"))(node)

    return made


def _power(node: Any) -> TensorOperation:
    exponent = saved(node, "exponent")
    return lambda x: x.pow(exponent)


_WITH_SETTINGS: dict[str, Callable[[Any], TensorOperation]] = {
    "Transpose": _transpose,
    "Permute": _permute,
    "Slice": _slice,
    "Select": _select,
    "Mean": _mean_or_sum("mean"),
    "Sum": _mean_or_sum("sum"),
    "LogSoftmax": _along("log_softmax"),
    "Softmax": _along("softmax"),
    "Pow": _power,
}
