"""Finding the model that a loop calls, and seeing each of its calls.

While a model is looked for, `torch.nn.Module.__call__` is ours: the outermost module called that
has something to train is a root. From then on only `__call__` of the root's own class is ours, so
that its sub-modules cost nothing and torch.compile sees no hook: global module hooks cost 2 to 3 µs
for every sub-module call, and compiled graphs guard on them. A class attribute is neither pickled
nor copied with a model.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch

# ---- patching
# Replacing attributes of torch for as long as a tracer is attached, and putting them back.


_ABSENT = object()


class Patches:
    """Attributes that were replaced, restored in reverse order exactly as they were found."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Set `owner.name`, remembering what stood in the owner's own namespace (or that nothing
        did: then the attribute was inherited, and restoring deletes ours)."""
        found = vars(owner).get(name, _ABSENT)
        setattr(owner, name, new)
        self._replaced.append((owner, name, found, new))

    def restore(self, owner: Any = None, name: str = "") -> None:
        """Put everything back, or only `owner.name`.

        Where somebody replaced ours in the meantime, theirs stays: ours is inert inside it.
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


def same_face(wrapper: Any, original: Any) -> Any:
    """Give `wrapper` the name, documentation and signature of `original`."""
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        if hasattr(original, attribute):
            setattr(wrapper, attribute, getattr(original, attribute))
    with contextlib.suppress(TypeError, ValueError):
        wrapper.__signature__ = inspect.signature(original)
    return wrapper


Call = Callable[[Callable[..., Any], torch.nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class RootModules:
    """The models that a training loop calls from outside, in order of their first call."""

    def __init__(
        self, patches: Patches, owner: Callable[[], int], busy: Callable[[], bool], call: Call
    ) -> None:
        self._patches = patches
        self._owner = owner
        """Identity of the thread that counts; 0 while nothing does."""
        self._busy = busy
        """Whether a phase is open, so that a call is not an outermost one."""
        self._call = call
        self._known: dict[int, weakref.ref[torch.nn.Module]] = {}
        self._classes: set[type] = set()
        self._discovering = False

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Those that are still alive."""
        return [m for m in (ref() for ref in self._known.values()) if m is not None]

    def discover(self) -> None:
        """Look for a (further) root among the modules that are called from now on."""
        if self._discovering:
            return
        self._discovering = True
        original = torch.nn.Module.__call__

        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not self._is_root(module):
                return original(module, *args, **kwargs)
            self.adopt(module)
            return type(module).__call__(module, *args, **kwargs)

        self._patches.replace(torch.nn.Module, "__call__", same_face(__call__, original))

    def _is_root(self, module: torch.nn.Module) -> bool:
        """Whether a module that is called now is a root that is not known yet."""
        return (
            get_ident() == self._owner()
            and not self._busy()
            and torch.is_grad_enabled()
            and id(module) not in self._known
            and any(p.requires_grad for p in module.parameters())
        )

    def found_enough(self) -> None:
        """Stop looking."""
        if self._discovering:
            self._discovering = False
            self._patches.restore(torch.nn.Module, "__call__")

    def forget(self) -> None:
        """See no calls any more, of any module: the patches are about to be restored."""
        self._discovering = False
        self._known.clear()
        self._classes.clear()

    def adopt(self, module: torch.nn.Module) -> None:
        """`module` is a root: see its calls from now on."""
        self.found_enough()
        key = id(module)
        self._known[key] = weakref.ref(module, lambda _: self._known.pop(key, None))
        if type(module) not in self._classes:
            self._classes.add(type(module))
            self._wrap(type(module))

    def _wrap(self, cls: type[torch.nn.Module]) -> None:
        original = cls.__call__
        known, owner, call = self._known, self._owner, self._call

        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or get_ident() != owner():
                return original(module, *args, **kwargs)
            if id(module) not in known:
                # A further model of the same class: the call that discovers is hidden behind us.
                if not (self._discovering and self._is_root(module)):
                    return original(module, *args, **kwargs)
                self.adopt(module)
            return call(original, module, args, kwargs)

        self._patches.replace(cls, "__call__", same_face(__call__, original))
