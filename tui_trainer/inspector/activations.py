"""Inputs and outputs of the modules of a model in the current step, found by re-running its forward
pass. A tensor is read as soon as its module is called or has returned: a later module may write
into it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.rerun import StepCapture
from tui_trainer.inspector.tensor_catalog import info_of
from tui_trainer.protocol.inspection import TensorInfo, TensorList, TensorRef
from tui_trainer.trace.torch_private import plain_name, tensors_of, unwrapped
from tui_trainer.trace.tracer import Tracer

MAX_LISTED = 20_000
MAX_OF_ONE = 8
"""Maximum number of inputs, and of outputs, that are listed for one module."""
WHOLE = "model"
"""Name of the root module where it has no other."""
T = TypeVar("T")


def list_activations(tracer: Tracer, capture: StepCapture) -> TensorList:
    """The inputs and outputs of all modules, in the order of the calls. Raises InspectionError."""
    names = _names(tracer, capture)
    found: list[TensorInfo] = []
    calls: dict[int, int] = {}

    def called(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if calls[id(module)] == 1:
            add(module, "input", (args, kwargs))

    def returned(module: torch.nn.Module, result: Any) -> None:
        if calls.get(id(module)) == 1:
            add(module, "output", result)

    def add(module: torch.nn.Module, kind: Any, values: Any) -> None:
        for number, tensor in enumerate(tensors_of(values)[:MAX_OF_ONE]):
            ref = TensorRef(names[id(module)], kind, str(number) if number else "")
            found.append(info_of(ref, tensor))

    with capture.rerun(called, returned, gradients=False, loss=False):
        pass
    return TensorList(tuple(found[:MAX_LISTED]), max(0, len(found) - MAX_LISTED))


def with_activation(
    tracer: Tracer, capture: StepCapture, ref: TensorRef, use: Callable[[torch.Tensor], T]
) -> tuple[T, str]:
    """(`use(tensor)`, note) for an input or output of a module at its first call. Raises
    InspectionError where there is no such tensor."""
    names = _names(tracer, capture)
    wanted = {key for key, name in names.items() if name == ref.name}
    if not wanted:
        hint = "tui-trainer inspect RUN --modules lists them"
        raise InspectionError(f"there is no module {ref.name}", hint)
    first_call = _FirstCall(wanted, int(ref.key or 0), use)
    called = first_call.called if ref.kind == "input" else None
    returned = first_call.returned if ref.kind == "output" else None
    with capture.rerun(called, returned, gradients=False, loss=False) as rerun:
        notes = list(rerun.notes)
    if first_call.result is None:
        why = (
            f"has {first_call.count} of them" if first_call.calls else "is not called in this step"
        )
        raise InspectionError(f"{ref.name} {why}: there is no {ref.text}")
    if first_call.calls > 1:
        notes.append(f"called {first_call.calls} times in this step: the first one")
    return first_call.result[0], ", ".join(notes)


class _FirstCall(Generic[T]):
    """Reads one tensor of the first call of a module."""

    def __init__(self, wanted: set[int], number: int, use: Callable[[torch.Tensor], T]) -> None:
        self._wanted, self._number, self._use = wanted, number, use
        self.calls = self.count = 0
        self.result: tuple[T] | None = None

    def called(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if id(module) in self._wanted:
            self._take((args, kwargs))

    def returned(self, module: torch.nn.Module, result: Any) -> None:
        if id(module) in self._wanted:
            self._take(result)

    def _take(self, values: Any) -> None:
        self.calls += 1
        found = tensors_of(values)
        if self.calls == 1:
            self.count = len(found)
            if self._number < len(found):
                self.result = (self._use(found[self._number]),)


def _names(tracer: Tracer, capture: StepCapture) -> dict[int, str]:
    """Identity of each module → its name."""
    root = capture.current().module()
    if root is None:
        raise InspectionError("the model of this step no longer exists")
    prefix = tracer.registry.names.prefix_of(root)
    return {
        id(module): (prefix + plain_name(name)).rstrip(".") or WHOLE
        for name, module in unwrapped(root).named_modules()
    }
