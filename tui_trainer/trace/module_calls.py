"""Finds the models that a training loop calls, and observes each of their calls and, where wanted,
the calls of the modules inside.

While a model is searched for, `torch.nn.Module.__call__` is replaced: the outermost called module
that has trainable parameters is a root. From then on only `__call__` of the root's own class is
replaced, so that sub-modules cost nothing and torch.compile sees no hook: global module hooks cost
2 to 3 µs for every sub-module call, and compiled graphs guard on them. A class attribute is neither
pickled nor copied with a model.

For the calls inside, the function to which `torch.nn.Module.__call__` delegates is replaced while
the forward of a root is open. Nothing is attached to a module, and nothing is replaced in a
compiled model.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any, Protocol

import torch

from tui_trainer.trace.torch_private import (
    BatchNormLayer,
    DropoutLayer,
    call_impl,
    is_compiled,
    set_call_impl,
)

_ABSENT = object()
_DEPENDS_ON_MODE: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
MAX_TENSORS = 4
"""Maximum number of tensors that are read from a module's arguments or result."""
MAX_DEPTH = 2
"""Maximum depth of nested lists, tuples and dictionaries in which tensors are found."""


class Patches:
    """Replaced attributes, restored in reverse order exactly as they were."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Set `owner.name` and remember what the owner's own namespace held; an attribute that was
        inherited is restored by deleting ours."""
        found = vars(owner).get(name, _ABSENT)
        setattr(owner, name, new)
        self._replaced.append((owner, name, found, new))

    def restore(self, owner: Any = None, name: str = "") -> None:
        """Restore everything, or only `owner.name`.

        An attribute that someone else has replaced since is left alone: our function is inert
        inside theirs.
        """
        for entry in reversed(self._replaced[:]):
            entry_owner, entry_name, found, ours = entry
            if owner is not None and (entry_owner is not owner or entry_name != name):
                continue
            self._replaced.remove(entry)
            if vars(entry_owner).get(entry_name, _ABSENT) is not ours:
                continue
            if found is _ABSENT:
                delattr(entry_owner, entry_name)
            else:
                setattr(entry_owner, entry_name, found)


def copy_metadata(wrapper: Any, original: Any) -> Any:
    """Give `wrapper` the name, documentation and signature of `original`."""
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        if hasattr(original, attribute):
            setattr(wrapper, attribute, getattr(original, attribute))
    with contextlib.suppress(TypeError, ValueError):
        wrapper.__signature__ = inspect.signature(original)
    return wrapper


CallModel = Callable[
    [Callable[..., Any], torch.nn.Module, tuple[Any, ...], dict[str, Any]],
    Any,
]
"""Calls `original(module, *args, **kwargs)` and returns its result."""


class CallObserver(Protocol):
    """Observes the calls of root models: the tracer."""

    training_thread: int
    """Identity of the thread whose calls count; 0: none."""

    @property
    def in_phase(self) -> bool:
        """Whether a phase is open, so that a call is not an outermost one."""


class RootModules:
    """The models that a training loop calls, in order of their first call."""

    def __init__(self, patches: Patches, observer: CallObserver) -> None:
        self._patches = patches
        self._observer = observer
        self.call_model: CallModel = _call
        """Called in place of each call of a root."""
        self.called_without_gradients: Callable[[tuple[Any, ...]], None] = _ignore
        """Called with the arguments of each outermost call without gradients of a model that could
        be a root, while the first root is searched for."""
        self._known: dict[int, weakref.ref[torch.nn.Module]] = {}
        self._classes: set[type] = set()
        self._searching = False
        self._within_call = False
        """Whether a call that was given to `called_without_gradients` is open."""

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The models that still exist."""
        return [m for m in (ref() for ref in self._known.values()) if m is not None]

    def search(self) -> None:
        """Look for another root among the modules that are called from now on."""
        if self._searching:
            return
        self._searching = True
        original = torch.nn.Module.__call__

        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(module, *args, **kwargs)
            if self._is_new_root(module):
                self.add(module)
                return type(module).__call__(module, *args, **kwargs)
            if self._known or self._within_call or torch.is_grad_enabled():
                return original(module, *args, **kwargs)
            return self._call_before_training(original, module, args, kwargs)

        self._patches.replace(torch.nn.Module, "__call__", copy_metadata(__call__, original))

    def _call_before_training(
        self,
        original: Callable[..., Any],
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A module is called without gradients before any root was found."""
        on_thread = get_ident() == self._observer.training_thread
        if not on_thread or not any(p.requires_grad for p in module.parameters()):
            return original(module, *args, **kwargs)
        self._within_call = True
        try:
            with contextlib.suppress(Exception):  # the script's own objects
                self.called_without_gradients(args)
            return original(module, *args, **kwargs)
        finally:
            self._within_call = False

    def add(self, module: torch.nn.Module) -> None:
        """Make `module` a root: its calls are observed from now on."""
        self._end_search()
        key = id(module)
        self._known[key] = weakref.ref(module, lambda _: self._known.pop(key, None))
        if type(module) not in self._classes:
            self._classes.add(type(module))
            self._observe(type(module))

    def clear(self) -> None:
        """Stop observing; the caller restores the patches."""
        self._searching = False
        self._known.clear()
        self._classes.clear()

    def _is_new_root(self, module: torch.nn.Module) -> bool:
        observer = self._observer
        return (
            get_ident() == observer.training_thread
            and not observer.in_phase
            and torch.is_grad_enabled()
            and id(module) not in self._known
            and any(p.requires_grad for p in module.parameters())
        )

    def _end_search(self) -> None:
        if self._searching:
            self._searching = False
            self._patches.restore(torch.nn.Module, "__call__")

    def _observe(self, cls: type[torch.nn.Module]) -> None:
        original = cls.__call__
        known, observer = self._known, self._observer

        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or get_ident() != observer.training_thread:
                return original(module, *args, **kwargs)
            if id(module) not in known:
                # Another model of the same class: our `Module.__call__` is hidden behind this one.
                if not (self._searching and self._is_new_root(module)):
                    return original(module, *args, **kwargs)
                self.add(module)
            return self.call_model(original, module, args, kwargs)

        self._patches.replace(cls, "__call__", copy_metadata(__call__, original))


def _ignore(args: tuple[Any, ...]) -> None:
    pass


def _call(
    original: Callable[..., Any],
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    return original(module, *args, **kwargs)


def depends_on_mode(module: torch.nn.Module) -> bool:
    """Whether a model has layers for which `train()` and `eval()` differ: dropout, batch norm."""
    known = _DEPENDS_ON_MODE.get(module)
    if known is None:
        known = _DEPENDS_ON_MODE[module] = any(
            isinstance(each, BatchNormLayer)
            or (isinstance(each, DropoutLayer) and each.p > 0)
            or (isinstance(each, torch.nn.MultiheadAttention) and each.dropout > 0)
            for each in module.modules()
        )
    return known


OnCall = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]
OnReturn = Callable[[torch.nn.Module, Any], None]


class SubmoduleCalls:
    """Reports every call of a module inside a root, on the thread that called `begin`."""

    def __init__(self, called: OnCall, returned: OnReturn) -> None:
        """Both are called on the training thread; neither may change anything."""
        self.called = called
        self.returned = returned
        self.thread = 0
        """Identity of the thread whose calls are reported."""
        self.fault: Exception | None = None
        """The exception of a callback, after which the rest of the forward is not observed."""
        self.left_out: torch.nn.Module | None = None
        """The model whose call was under way at `begin` and is not reported."""

    def begin(self, root: torch.nn.Module, under_way: bool = False) -> bool:
        """Observe the forward of `root`, which begins; False where it cannot be observed. With
        `under_way` the call of `root` has begun already and is not reported."""
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
    """Replaces the function that calls modules by a single one of ours, for all observers."""

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
            observers = self._observers
            if not observers or torch.compiler.is_compiling():
                return original(module, *args, **kwargs)
            thread = get_ident()
            for each in observers:
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
