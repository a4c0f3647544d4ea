"""The calls of the modules inside one forward pass.

The function to which `torch.nn.Module.__call__` delegates is replaced while the forward of a root
model is open, and restored at its end. Nothing is attached to a module, and nothing is replaced in
a compiled model.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch

from tui_trainer.trace.torch_private import call_impl, is_compiled, set_call_impl

OnCall = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]
OnReturn = Callable[[torch.nn.Module, Any], None]
MAX_TENSORS = 4
"""Tensors that are looked at of a module's arguments or result."""
MAX_DEPTH = 2


class SubmoduleCalls:
    """Reports every call of a module below the root on the thread that began."""

    def __init__(self, called: OnCall, returned: OnReturn) -> None:
        """Both are called on the training thread; neither may change anything."""
        self.called = called
        self.returned = returned
        self.thread = 0
        """Identity of the thread whose calls are reported."""
        self.fault: Exception | None = None
        """What a callback raised: the rest of the forward is not observed."""
        self.left_out: torch.nn.Module | None = None
        """The model whose call had begun before it was observed."""

    def begin(self, root: torch.nn.Module, under_way: bool = False) -> bool:
        """The forward of `root` begins; False where it cannot be observed. `under_way`: it has been
        called already, and this call is not reported."""
        if any(is_compiled(module) for module in root.modules()):
            return False
        self.fault, self.thread = None, get_ident()
        self.left_out = root if under_way else None
        _replacement.add(self)
        return True

    def end(self) -> None:
        """The forward is over, or nothing more has to be observed."""
        self.left_out = None
        _replacement.discard(self)


class _Replacement:
    """The function in place of torch's, one for all that observe calls."""

    def __init__(self) -> None:
        self._observers: tuple[SubmoduleCalls, ...] = ()
        self._original: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None

    def add(self, observer: SubmoduleCalls) -> None:
        if observer not in self._observers:
            self._observers = (*self._observers, observer)
        if self._ours is None:
            self._original = call_impl()
            self._ours = self._function(self._original)
            set_call_impl(self._ours)

    def discard(self, observer: SubmoduleCalls) -> None:
        self._observers = tuple(each for each in self._observers if each is not observer)
        if not self._observers and self._original is not None:
            if call_impl() is self._ours:
                set_call_impl(self._original)
            self._original = self._ours = None

    def _function(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def observed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self._observers or torch.compiler.is_compiling():
                return original(module, *args, **kwargs)
            thread = get_ident()
            for each in self._observers:
                if each.thread == thread and each.fault is None and each.left_out is not module:
                    try:
                        each.called(module, args, kwargs)
                    except Exception as fault:
                        each.fault = fault
            result = original(module, *args, **kwargs)
            for each in self._observers:
                if each.thread == thread and each.fault is None and each.left_out is not module:
                    try:
                        each.returned(module, result)
                    except Exception as fault:
                        each.fault = fault
            return result

        return observed


_replacement = _Replacement()


def tensors_in(value: Any, depth: int = MAX_DEPTH) -> list[torch.Tensor]:
    """The first tensors in a tensor, or in a list, tuple or dictionary of them."""
    if isinstance(value, torch.Tensor):
        return [value]
    if depth and isinstance(value, (tuple, list)):
        elements = list(value[: 2 * MAX_TENSORS])
    elif depth and isinstance(value, dict):
        elements = list(value.values())[: 2 * MAX_TENSORS]
    else:
        return []
    found: list[torch.Tensor] = []
    for element in elements:
        found += tensors_in(element, depth - 1)
        if len(found) >= MAX_TENSORS:
            break
    return found[:MAX_TENSORS]
