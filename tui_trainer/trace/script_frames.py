"""Reads the frames of the training loop and its callers: the objects in their variables, the line
that calls a submodule or computes an operation, and whether their code calls an optimizer's `step`.
"""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, TypeVar

from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

MAX_FRAMES = 64
MAX_HELD = 64
"""Maximum length of the lists and dictionaries that are searched."""
_OWN_PACKAGE = __name__.rpartition(".")[0]

COPY_REFERENCES = 3
"""References to a frame's copy of its variables: the frame's, ours, and that of `getrefcount`."""
MAX_NAME = 40
"""Maximum number of characters of a variable's name that is shown."""

GENERIC_NAMES = frozenset(
    ("self", "model", "module", "net", "root", "optimizer", "opt", "optim", "obj", "o", "m")
)
"""Variable names that do not distinguish several models or optimizers."""

GENERIC_ATTRIBUTES = ("optimizer", "opt", "optim")
REFERRING_CLASSES = ("scheduler", "warmup")
"""Words in the names of classes (in lower case) whose objects refer to an optimizer that they do
not own: PyTorch's `LRScheduler`, and those of timm, Accelerate and others."""

T = TypeVar("T")


def script_frames() -> Iterator[FrameType]:
    """The frames on the stack that are neither PyTorch's nor this package's, innermost first, up to
    that of the script: the innermost module that runs as `__main__`. What ran it as such, a
    launcher with `runpy`, is left out."""
    frame: FrameType | None = sys._getframe()
    for _ in range(MAX_FRAMES):
        while frame is not None and _is_ours_or_torch(frame):
            frame = frame.f_back
        if frame is None:
            return
        yield frame
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return
        frame = frame.f_back


def objects_of_script(kind: type[T]) -> list[T]:
    """The instances of `kind` in the script's variables, in lists and dictionaries in these, and in
    attributes of `self`, innermost frame first."""
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
    `things`; "" without one. Names in outer frames are preferred: a function may call all of its
    arguments `optimizer`."""
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
    """`actor.optimizer` where one of `things` is such an attribute of an object in a variable."""
    for name, value in held.items():
        if name == "self" or name.startswith("_") or not type(value).__dictoffset__:
            continue
        if issubclass(type(value), ModuleType):  # its frames are searched, and their variables
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
    """Whether the instances of a class are schedulers, which do not own their optimizer."""
    names = [each.__name__.lower() for each in kind.__mro__]
    return any(word in name for word in REFERRING_CLASSES for name in names)


def _holds(value: Any, thing: object) -> bool:
    """Whether `value` is `thing`, or Lightning's wrapper of it."""
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


OPERATORS: dict[str, type[ast.operator]] = {
    "div": ast.Div,
    "mul": ast.Mult,
    "pow": ast.Pow,
    "sub": ast.Sub,
    "add": ast.Add,
    "mm": ast.MatMult,
    "bmm": ast.MatMult,
}
CALLS = {
    "addmm": ("linear", "addmm"),
    "mm": ("linear", "matmul", "mm"),
    "bmm": ("matmul", "bmm"),
    "linalgvectornorm": ("norm", "vector_norm", "normalize"),
    "logsoftmax": ("log_softmax", "cross_entropy"),
    "binarycrossentropy": ("binary_cross_entropy",),
}
"""Operation of the autograd graph → the functions that compute it, where the names differ."""


def place_of_call(path: str, modules: Mapping[str, Any]) -> str:
    """The line, as `file.py:12`, in which the forward of the nearest class outside PyTorch calls
    the submodule at `path`; "" unless that is a single line."""
    parts = path.split(".")
    while parts:
        parent = ".".join(parts[:-1])
        owner = modules.get(parent)
        if owner is None:
            return ""
        if not type(owner).__module__.startswith("torch."):
            return _line_in(type(owner).forward, lambda node: _calls_attribute(node, parts[-1]))
        parts.pop()
    return ""


def place_of_operation(operation: str, module: Any) -> str:
    """The only line in which the forward of `module` computes an operation of the graph, or ""."""
    if type(module).__module__.startswith("torch."):
        return ""
    return _line_in(type(module).forward, lambda node: _computes(node, operation))


def place_in_frame(operation: str, frame: FrameType) -> str:
    """The only line, up to the current one, in which the function of `frame` computes an operation;
    "" unless there is a single one."""
    code, last = frame.f_code, frame.f_lineno
    lines = linecache.getlines(code.co_filename, frame.f_globals)
    if not lines:
        return ""
    first = 1 if code.co_name == "<module>" else code.co_firstlineno
    text = "".join(lines[first - 1 :]) if first > 1 else "".join(lines)
    return _single_line(
        text, code.co_filename, first, lambda node: _computes(node, operation), last, code
    )


def places_in_called(operation: str, frame: FrameType) -> set[str]:
    """Lines that compute an operation in functions of the script that the code of `frame` names."""
    code = frame.f_code
    variables = {**frame.f_globals, **frame.f_locals}
    forget_variables(frame)
    named = (variables.get(name) for name in (*code.co_names, *code.co_varnames, *code.co_freevars))
    functions = [each for each in named if type(each) is FunctionType and _is_script(each)]
    return {_line_in(each, lambda node: _computes(node, operation)) for each in functions} - {""}


def place_in_file(operation: str, frame: FrameType) -> str:
    """The only line in the file of `frame` that computes an operation, or ""."""
    file = frame.f_code.co_filename
    text = "".join(linecache.getlines(file, frame.f_globals))
    return _single_line(text, file, 1, lambda node: _computes(node, operation), None, None)


def _line_in(function: Any, matches: Any) -> str:
    try:
        lines, first = inspect.getsourcelines(function)
        file = inspect.getsourcefile(function) or ""
    except (OSError, TypeError):
        return ""
    return _single_line("".join(lines), file, first, matches, None, None)


def _single_line(
    text: str, file: str, first: int, matches: Any, last: int | None, code: CodeType | None
) -> str:
    """The only line with a matching expression, as `file.py:12`; "" unless there is just one."""
    try:
        if code is not None and first > 1:
            text = "".join(inspect.getblock(text.splitlines(keepends=True)))
        tree = ast.parse(textwrap.dedent(text))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    found = {
        node.lineno + first - 1
        for node in _expressions(tree, whole_file=code is not None and first == 1)
        if matches(node)
    }
    if last is not None:
        found = {line for line in found if line <= last}
    return f"{os.path.basename(file)}:{found.pop()}" if len(found) == 1 else ""


def _expressions(tree: ast.AST, whole_file: bool) -> list[Any]:
    """The calls and operators; with `whole_file` only those outside functions and classes."""
    found: list[Any] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if whole_file and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, (ast.Call, ast.BinOp, ast.AugAssign)):
            found.append(node)
        waiting += ast.iter_child_nodes(node)
    return found


def _calls_attribute(node: Any, name: str) -> bool:
    """`self.name(…)`"""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    )


def _computes(node: Any, operation: str) -> bool:
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else ""
        name = function.id if isinstance(function, ast.Name) else name
        return name in CALLS.get(operation, (operation,))
    operator = OPERATORS.get(operation)
    return operator is not None and isinstance(node.op, operator)


STEP_METHOD = "step"
LIBRARIES = frozenset(("torch", "numpy", "tui_trainer", *sys.stdlib_module_names)) - {"__main__"}
"""Packages whose code calls no step of the script's optimizers."""


def may_be_stepped(optimizer: Optimizer) -> bool:
    """Whether any code within reach of the training loop calls a `step` that may be that of
    `optimizer`: the functions on the stack, their modules, modules imported by these, and the class
    of the optimizer. True where that cannot be determined."""
    try:
        return _finds_call(optimizer)
    except Exception:  # an object of the script may raise when it is read
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
    return any(
        _calls_step(code, names, optimizer, seen)
        for thing, names in held
        for code in _codes_of(thing)
    )


def _codes_of(thing: Any, within_module: bool = False) -> Iterator[CodeType]:
    """Code objects of a function, of the methods of a class, or of both in a module."""
    kind = type(thing)
    if kind is ModuleType and not within_module:
        if thing.__name__.partition(".")[0] not in LIBRARIES:
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
    return str(getattr(thing, "__module__", "")).partition(".")[0] not in LIBRARIES


def _calls_step(
    code: CodeType, variables: Mapping[str, Any], optimizer: Optimizer, seen: set[CodeType]
) -> bool:
    if code in seen:
        return False
    seen.add(code)
    if STEP_METHOD in code.co_names:
        for before, call in pairwise(dis.get_instructions(code)):
            if call.argval == STEP_METHOD and _is_method(call):
                of_name = before.opname.startswith("LOAD_") and before.opname != "LOAD_ATTR"
                if not of_name or before.argval not in variables:
                    return True
                if _may_step(variables[before.argval], optimizer):
                    return True
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return any(_calls_step(each, variables, optimizer, seen) for each in inner)


def _is_method(instruction: dis.Instruction) -> bool:
    """Whether an instruction loads an attribute to be called."""
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
