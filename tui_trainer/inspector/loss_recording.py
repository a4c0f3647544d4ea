"""Records every call of PyTorch between the return of the model and `backward`, so that any loss
can be computed again. `loss_replay` does not need this for the usual losses.

A `TorchFunctionMode` sees the calls, in steps for which a request is likely. It lies below all
modes of the script, so that those are left in the order in which they were entered. Tensors without
a gradient (targets from the model itself, masks, detached tensors) keep their values of the step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.trace.torch_private import (
    TreeSpec,
    compiled_code_exists,
    function_modes,
    remove_function_mode,
    tree_flatten,
    tree_unflatten,
    version_of_value,
)

MAX_CALLS = 2_000
"""Maximum number of calls that are recorded for a loss."""
READING = frozenset(("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__"))
"""Functions that read numbers from tensors; a replay uses the numbers of the step."""
NARROWING: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
}


UNKNOWN = (
    "the loss is computed from more than the output of the last call of a model, or by a function "
    "that is not torch's"
)


@dataclass(frozen=True)
class Slot:
    """A tensor that is computed from the outputs of the model, by number."""

    number: int


@dataclass(frozen=True)
class ParameterName:
    """A parameter of the model."""

    name: str


@dataclass(frozen=True)
class Constant:
    """Any other tensor, such as the targets."""

    tensor: torch.Tensor
    version: int


@dataclass
class RecordedCall:
    """One call of a PyTorch function."""

    function: Callable[..., Any]
    leaves: list[Any]
    """The flattened arguments, with a Slot, ParameterName or Constant for each tensor."""
    spec: TreeSpec
    gradients: bool
    autocast: tuple[str, bool, torch.dtype]
    results: list[int]
    """Slots of the tensors in the result."""

    @property
    def arguments(self) -> list[int]:
        """Slots among the arguments."""
        return [leaf.number for leaf in self.leaves if isinstance(leaf, Slot)]

    @property
    def in_place(self) -> bool:
        return not self.results or not set(self.results).isdisjoint(self.arguments)


class LossRecorder(TorchFunctionMode):
    """Active from the return of the model to `backward`, on the training thread."""

    def __init__(
        self,
        outputs: Sequence[torch.Tensor],
        model: torch.nn.Module,
        listening: Callable[[], bool],
    ) -> None:
        """`listening()`: whether calls on the current thread are to be recorded."""
        super().__init__()
        self._listening = listening
        self.missing = ""
        """Why the loss cannot be computed again."""
        self._unknown = ""
        """Why the loss cannot be computed again if it depends on a tensor of unknown origin."""
        self.read = False
        """Whether numbers were taken out of tensors that the model has computed."""
        self.calls: list[RecordedCall] = []
        self._model: torch.nn.Module | None = model
        self._names: dict[int, str] | None = None
        self._slots = {id(tensor): number for number, tensor in enumerate(outputs)}
        self._alive = list(outputs)
        """The tensors of the slots, kept so that no other tensor gets the same id."""

    @classmethod
    def begin(
        cls,
        outputs: Sequence[torch.Tensor],
        model: torch.nn.Module,
        listening: Callable[[], bool],
    ) -> LossRecorder | None:
        """Record from now on. None if a mode of the script is active, which would be left in the
        wrong order, or if compiled code exists, which would be compiled again."""
        if function_modes() != 0 or compiled_code_exists():
            return None
        recorder = cls(outputs, model, listening)
        recorder.__enter__()  # type: ignore[no-untyped-call]
        return recorder

    def end(self, loss: torch.Tensor | None) -> int | None:
        """Stop recording and release all tensors but the constants; returns the slot of the loss,
        None if it has none."""
        remove_function_mode(self)
        slot = self._slots.get(id(loss)) if loss is not None else None
        if slot is None:
            self.missing = self.missing or self._unknown
        self._slots, self._alive, self._names, self._model = {}, [], None, None
        self.calls = _needed(self.calls, slot) if slot is not None else []
        return slot

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # The tracer's wrapper of a loss function has been called already, and has called this.
        function = getattr(function, "observed_function", function)
        named = kwargs or {}
        begun = None
        if not self.missing and self._alive and self._listening():
            try:
                begun = self._begin(function, args, named)
            except InspectionError as error:
                self.missing = error.message
            except Exception as fault:
                self.missing = f"{type(fault).__name__}: {fault}"
        result = function(*args, **named)
        if begun is not None:
            try:
                self._finish(begun, result)
            except Exception as fault:
                self.missing = f"{type(fault).__name__}: {fault}"
        return result

    def _begin(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> RecordedCall | None:
        """Begin to record a call; None if it does not depend on the model. Raises
        InspectionError."""
        leaves, spec = tree_flatten((args, dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        parameters = [t for t in tensors if t.requires_grad and self._name_of(t) is not None]
        if not parameters and not any(id(each) in self._slots for each in tensors):
            if any(each.grad_fn is not None for each in tensors):
                self._unknown = UNKNOWN
            return None
        if len(self.calls) >= MAX_CALLS:
            raise InspectionError(f"the loss is computed by more than {MAX_CALLS:,} calls")
        kept = [self._kept(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        device = tensors[0].device.type
        autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        return RecordedCall(function, kept, spec, torch.is_grad_enabled(), autocast, [])

    def _kept(self, tensor: torch.Tensor) -> Slot | ParameterName | Constant:
        slot = self._slots.get(id(tensor))
        if slot is not None:
            return Slot(slot)
        name = self._name_of(tensor)
        if name is not None:
            return ParameterName(name)
        if tensor.grad_fn is not None:
            raise InspectionError(UNKNOWN)
        return Constant(tensor, version_of_value(tensor))

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        if self._names is None:
            assert self._model is not None
            self._names = {id(each): name for name, each in self._model.named_parameters()}
        return self._names.get(id(tensor))

    def _finish(self, call: RecordedCall, result: Any) -> None:
        name = getattr(call.function, "__name__", "")
        if name in READING and not _called_by_us():
            self.read = True
        for leaf in call.leaves:
            if isinstance(leaf, Constant) and version_of_value(leaf.tensor) != leaf.version:
                self.missing = f"{name} writes into a tensor that the model has not computed"
                return
        tensors = [each for each in tree_flatten(result)[0] if isinstance(each, torch.Tensor)]
        if result is not None and not any(tensor.requires_grad for tensor in tensors):
            return
        for tensor in tensors:
            slot = self._slots.get(id(tensor))
            if slot is None:
                slot = self._slots[id(tensor)] = len(self._alive)
                self._alive.append(tensor)
            call.results.append(slot)
        self.calls.append(call)


def _called_by_us() -> bool:
    """Whether code of tui-trainer, not of the script, has called the method of a tensor."""
    frame = sys._getframe(3)
    return str(frame.f_globals.get("__name__", "")).startswith("tui_trainer.")


def _needed(calls: list[RecordedCall], slot: int) -> list[RecordedCall]:
    """The calls from which `slot` is computed; all calls if some write into their arguments, which
    may be views."""
    if any(call.in_place for call in calls):
        return calls
    needed, found = {slot}, []
    for call in reversed(calls):
        if not needed.isdisjoint(call.results):
            found.append(call)
            needed.update(call.arguments)
    return found[::-1]


def replay(
    calls: Sequence[RecordedCall],
    outputs: Sequence[torch.Tensor],
    slot: int,
    model: torch.nn.Module,
    wide: bool,
) -> torch.Tensor:
    """Repeat the recorded calls with other outputs of the model; returns the tensor in `slot`.
    `wide`: in float64. Raises InspectionError."""
    values = dict(enumerate(outputs))
    parameters = dict(model.named_parameters())

    def filled(leaf: Any) -> Any:
        match leaf:
            case Slot(number):
                if number not in values:
                    raise InspectionError("the model returned something else this time")
                return values[number]
            case ParameterName(name):
                return parameters[name]
            case Constant(tensor, version):
                if version_of_value(tensor) != version:
                    raise InspectionError("the targets of this step have been overwritten since")
                return tensor.double() if wide and tensor.is_floating_point() else tensor
            case torch.dtype() if wide and leaf.is_floating_point:
                return torch.float64
        return leaf

    for call in calls:
        args, kwargs = tree_unflatten([filled(leaf) for leaf in call.leaves], call.spec)
        function = call.function
        if wide:
            function = NARROWING.get(function, function)
        device, enabled, dtype = call.autocast
        with (
            torch.set_grad_enabled(call.gradients and torch.is_grad_enabled()),
            torch.autocast(device, dtype, enabled and not wide, cache_enabled=False),
        ):
            result = function(*args, **kwargs)
        tensors = [each for each in tree_flatten(result)[0] if isinstance(each, torch.Tensor)]
        values.update(zip(call.results, tensors, strict=True))
    if slot not in values:
        raise InspectionError("the model returned something else this time")
    return values[slot]
