"""Replacing attributes of torch for as long as a tracer is attached, and putting them back."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

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
