"""Whether a script calls `step` of an optimizer anywhere: some construct one, call its `zero_grad`,
and update the weights by themselves."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from tui_trainer.trace.script_frames import forget_variables, script_frames

NAME = "step"
OTHERS = frozenset(("torch", "numpy", "tui_trainer", *sys.stdlib_module_names)) - {"__main__"}
"""Packages whose code calls no step of the script's optimizers."""


def may_be_stepped(optimizer: Optimizer) -> bool:
    """Whether any code within reach of the training loop calls a `step` that may be this
    optimizer's: that of the functions on the stack, of their modules and of what these import, and
    of the optimizer's own class. True where that cannot be determined."""
    try:
        return _finds_call(optimizer)
    except Exception:  # of an object of the script that raises where it is looked at
        return True


def _finds_call(optimizer: Optimizer) -> bool:
    seen: set[CodeType] = set()
    held: list[tuple[Any, Mapping[str, Any]]] = [(type(optimizer), {})]
    for frame in script_frames():
        names = frame.f_globals
        variables = {**names, **frame.f_locals}
        forget_variables(frame)
        if _calls_step(frame.f_code, variables, optimizer, seen):
            return True
        del variables
        held += [(value, names) for value in list(names.values())]
        if names.get("__name__") == "__main__" and frame.f_code.co_name == "<module>":
            break  # what called the script is no part of it
    return any(
        _calls_step(code, names, optimizer, seen)
        for thing, names in held
        for code in _codes_of(thing)
    )


def _codes_of(thing: Any, within_module: bool = False) -> Iterator[CodeType]:
    """The code of a function, of the methods of a class, or of both in a module."""
    kind = type(thing)
    if kind is ModuleType and not within_module:
        if thing.__name__.partition(".")[0] not in OTHERS:
            for value in list(vars(thing).values()):
                yield from _codes_of(value, within_module=True)
    elif kind in (FunctionType, classmethod, staticmethod):
        function = getattr(thing, "__func__", thing)
        if isinstance(function, FunctionType) and _is_script(function):
            yield function.__code__
    elif issubclass(kind, type):
        for each in thing.__mro__:
            if _is_script(each):
                for value in list(vars(each).values()):
                    if type(value) in (FunctionType, classmethod, staticmethod):
                        yield from _codes_of(value)


def _is_script(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] not in OTHERS


def _calls_step(
    code: CodeType, variables: Mapping[str, Any], optimizer: Optimizer, seen: set[CodeType]
) -> bool:
    if code in seen:
        return False
    seen.add(code)
    if NAME in code.co_names:
        for before, call in pairwise(dis.get_instructions(code)):
            if call.argval == NAME and _is_method(call):
                of_name = before.opname.startswith("LOAD_") and before.opname != "LOAD_ATTR"
                if not of_name or before.argval not in variables:
                    return True
                if _may_step(variables[before.argval], optimizer):
                    return True
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return any(_calls_step(each, variables, optimizer, seen) for each in inner)


def _is_method(instruction: dis.Instruction) -> bool:
    """Whether an attribute is loaded to be called."""
    if instruction.opname == "LOAD_METHOD":  # until Python 3.11
        return True
    marked = instruction.opname == "LOAD_ATTR" and bool((instruction.arg or 0) & 1)
    return marked and "LOAD_METHOD" not in dis.opmap


def _may_step(thing: Any, optimizer: Optimizer) -> bool:
    """Whether `thing.step` may step the optimizer."""
    kind: type = type(thing)  # isinstance() would run the code of lazy objects
    if issubclass(kind, Optimizer):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in own for group in thing.param_groups for p in group["params"])
    if issubclass(kind, (GradScaler, ModuleType, type)):
        return True
    if issubclass(kind, LRScheduler):
        return False
    held = vars(thing) if kind.__dictoffset__ else {}
    return any(issubclass(type(each), Optimizer) for each in held.values())
