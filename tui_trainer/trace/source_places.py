"""The line of the source that calls a submodule or computes an operation, found by its syntax."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import textwrap
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

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
"""Operation of the autograd graph to the functions that compute it, where the names differ."""


def place_of_call(path: str, modules: Mapping[str, Any]) -> str:
    """`file.py:12`: where the forward of the nearest class that is not torch's calls the submodule
    at `path`; "" where that is not one single line."""
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
    """Where the forward of `module` computes an operation of the autograd graph."""
    if type(module).__module__.startswith("torch."):
        return ""
    return _line_in(type(module).forward, lambda node: _computes(node, operation))


def place_in_frame(operation: str, frame: FrameType) -> str:
    """Where the function of `frame` computes an operation, at or before its current line."""
    code, last = frame.f_code, frame.f_lineno
    lines = linecache.getlines(code.co_filename, frame.f_globals)
    if not lines:
        return ""
    first = 1 if code.co_name == "<module>" else code.co_firstlineno
    text = "".join(lines[first - 1 :]) if first > 1 else "".join(lines)
    return _single_line(
        text, code.co_filename, first, lambda node: _computes(node, operation), last, code
    )


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
    """The place of the only line with a matching expression."""
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
    """The calls and operators; of a whole file those outside of its functions and classes."""
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
