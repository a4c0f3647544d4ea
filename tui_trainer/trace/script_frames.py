"""The frames of the training loop and its callers, and what their variables hold."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any, TypeVar

MAX_FRAMES = 64
MAX_HELD = 64
"""Longest lists and dictionaries that are searched."""
_OWN_PACKAGE = __name__.rpartition(".")[0]

COPY_REFERENCES = 3
"""To a frame's copy of its variables: the frame's, ours, and that of the call that counts."""
MAX_NAME = 40
"""Characters of a variable's name that is shown."""

GENERIC_NAMES = frozenset(
    ("self", "model", "module", "net", "root", "optimizer", "opt", "optim", "obj", "o", "m")
)
"""Variable names that do not distinguish several models or optimizers."""

GENERIC_ATTRIBUTES = ("optimizer", "opt", "optim")
REFERRING_CLASSES = ("scheduler", "warmup")
"""In the names of classes, in lower case, whose objects refer to an optimizer of the script's:
torch's `LRScheduler`, and those of timm, Accelerate and others."""

T = TypeVar("T")


def script_frames() -> Iterator[FrameType]:
    """The frames that called into torch or into this package, innermost first."""
    frame: FrameType | None = sys._getframe()
    for _ in range(MAX_FRAMES):
        while frame is not None and _is_ours_or_torch(frame):
            frame = frame.f_back
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def objects_of_script(kind: type[T]) -> list[T]:
    """The instances of `kind` that the script's variables hold, by themselves, in a list or
    dictionary, or as an attribute of `self`; innermost first."""
    found: dict[int, T] = {}
    for frame in script_frames():
        variables = frame.f_locals
        held = list(variables.values())
        if frame.f_globals is not variables:
            held += frame.f_globals.values()
        held += getattr(variables.get("self"), "__dict__", {}).values()
        for value in _with_elements(held):
            # The type, not isinstance(), which would run the code of lazy objects.
            if issubclass(type(value), kind):
                found.setdefault(id(value), value)
        del variables, held
        forget_variables(frame)
    return list(found.values())


def forget_variables(frame: FrameType) -> None:
    """Drop the copy of a function's variables that reading `f_locals` leaves in its frame: it would
    keep a batch and its activations alive for as long as the function runs.

    A copy that the script holds, by `locals()`, is left alone. From Python 3.13 on there is none.
    """
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.version_info < (3, 13):
        copied = frame.f_locals
        if type(copied) is dict and sys.getrefcount(copied) <= COPY_REFERENCES:
            copied.clear()


def variable_of(*things: object) -> str:
    """The name of the variable, or of the attribute of `self`, in which the script holds one of
    `things`; "" where there is none. That of an outer frame is preferred: a function may call all
    of its arguments `optimizer`."""
    for frame in reversed(list(script_frames())):
        name = _variable_in(frame, things)
        forget_variables(frame)
        if name:
            return name
    return ""


def _variable_in(frame: FrameType, things: tuple[object, ...]) -> str:
    from tui_trainer.trace.torch_private import submodules  # imports torch

    variables = frame.f_locals
    held = dict(variables)
    held |= getattr(variables.get("self"), "__dict__", {})
    held |= submodules(variables.get("self"))
    if frame.f_globals is not variables:
        held = {**frame.f_globals, **held}
    in_list = ""
    for name, value in held.items():
        if name in GENERIC_NAMES or name.startswith("_") or len(name) > MAX_NAME:
            continue
        for suffix, element in _named_elements(value):
            if any(_holds(element, thing) for thing in things):
                if not suffix.startswith("["):
                    return name + suffix
                in_list = in_list or name + suffix
    return _attribute_of(held, things) or in_list


def _attribute_of(held: dict[str, Any], things: tuple[object, ...]) -> str:
    """`actor.optimizer`, for what is such an attribute of an object in a variable."""
    for name, value in held.items():
        if name == "self" or name.startswith("_") or not type(value).__dictoffset__:
            continue
        if issubclass(type(value), ModuleType):  # its variables are searched with its frames
            continue
        if _refers_to_optimizer(type(value)):
            continue
        try:  # not getattr(), which would run the code of lazy objects
            attributes = object.__getattribute__(value, "__dict__")
        except (AttributeError, TypeError):
            continue
        for attribute in GENERIC_ATTRIBUTES:
            element = attributes.get(attribute)
            if element is not None and any(_holds(element, thing) for thing in things):
                return f"{name}.{attribute}" if len(name) <= MAX_NAME else ""
    return ""


def _refers_to_optimizer(kind: type) -> bool:
    """Whether its instances are learning-rate schedulers, which do not own their optimizer."""
    names = [each.__name__.lower() for each in kind.__mro__]
    return any(word in name for word in REFERRING_CLASSES for name in names)


def _holds(value: Any, thing: object) -> bool:
    """Whether it is `thing`, or Lightning's wrapper of it."""
    return value is thing or (
        type(value).__name__ == "LightningOptimizer" and vars(value).get("_optimizer") is thing
    )


def _named_elements(value: Any) -> Iterator[tuple[str, Any]]:
    yield "", value
    if type(value) in (list, tuple) and len(value) <= MAX_HELD:
        for number, element in enumerate(value):
            yield f"[{number}]", element
    elif type(value) is dict and len(value) <= MAX_HELD:
        for key, element in list(value.items()):
            if type(key) is str and len(key) <= MAX_NAME:
                yield f".{key}", element


def _with_elements(held: list[Any]) -> Iterator[Any]:
    for value in held:
        yield value
        if type(value) in (list, tuple) and len(value) <= MAX_HELD:
            yield from value
        elif type(value) is dict and len(value) <= MAX_HELD:
            yield from list(value.values())


def _is_ours_or_torch(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == _OWN_PACKAGE or name.startswith((f"{_OWN_PACKAGE}.", "torch.", "contextlib"))
