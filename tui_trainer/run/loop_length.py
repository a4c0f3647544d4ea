"""Determines the number of steps and epochs of a training loop from its source and variables.

The loops around `optimizer.step()` are the `for` and `while` statements of the functions on the
stack. The length of `for epoch in range(epochs)`, of `for batch in loader`, of `enumerate(…)`,
`zip(…)`, `tqdm(…)` and of `while step < last` is computed from the current values of their
variables. The only code of the script that is called is the `__len__` of its iterables. A length
that cannot be determined is None, with the reason.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, TypeVar

from tui_trainer.trace.script_frames import forget_variables

T = TypeVar("T")
MAX_CALLERS = 16
MAX_LABEL = 24
"""Maximum number of characters of a data name, such as `val`."""
MAX_SOURCE = 1_000_000
"""Maximum number of characters of a source file that is parsed."""
WRAPPERS = ("tqdm", "tqdm_notebook", "track", "progress_bar", "progress", "auto_tqdm", "prange")
"""Functions that iterate over their first argument and may take its length as `total`."""
BUILTINS: dict[str, Callable[..., Any]] = {
    **{"int": int, "round": round, "abs": abs, "len": len},
    **{"max": max, "min": min},
}


class Unknown(Exception):
    """A length cannot be determined; the message is the reason."""


@dataclass(frozen=True)
class Loop:
    """A loop that is being executed."""

    file: str
    line: int
    text: str
    """First line of the loop, for messages."""
    target: str
    """The loop variables, as written."""
    length: int | None
    why: str = ""
    """Reason for an unknown length."""
    position: int | None = None
    """Number of the current iteration, from 0, if a variable holds it."""
    over_data: bool = False
    """Whether the loop iterates over a dataset or loader, not over numbers."""
    end: int = 0
    """Number of the last line."""

    @property
    def place(self) -> tuple[str, int]:
        return self.file, self.line


@dataclass(frozen=True)
class LoopNest:
    """The loops around a call, innermost first, and whether the call is conditional."""

    loops: tuple[Loop, ...]
    conditional: bool
    """Whether there is an `if` between the innermost loop and the call."""
    site: tuple[str, int]
    """File and line of the call."""


def loop_nest(frames: list[FrameType]) -> LoopNest:
    """The loops around the call that `frames` (innermost first) execute."""
    loops: list[Loop] = []
    conditional = False
    for frame in frames:
        for statement in _around(frame):
            if isinstance(statement, ast.If):
                conditional = conditional or not loops
            else:
                loops.append(_loop_of(statement, frame))
        forget_variables(frame)
    site = (frames[0].f_code.co_filename, frames[0].f_lineno) if frames else ("", 0)
    return LoopNest(tuple(loops), conditional, site)


def name_of_data(frame: FrameType) -> str:
    """The value of the innermost loop variable that is a string, of the loops that `frame` and its
    callers execute: `val` within `for split in ("train", "val")`; "" without one."""
    for _ in range(MAX_CALLERS):
        names = _loop_names(frame)
        if names:
            variables = frame.f_locals
            found = next((v for n in names if type(v := variables.get(n)) is str), "")
            del variables
            forget_variables(frame)
            if found and len(found) <= MAX_LABEL:
                return found
        if frame.f_back is None:
            break
        frame = frame.f_back
    return ""


def _loop_names(frame: FrameType) -> tuple[str, ...]:
    """The variables of the loops around the current line of a frame, innermost first."""
    key = (frame.f_code, frame.f_lineno)
    if key not in _names_around:
        found: list[str] = []
        if not str(frame.f_globals.get("__name__", "")).startswith(("torch.", "tui_trainer.")):
            for statement in _around(frame):
                if isinstance(statement, (ast.For, ast.AsyncFor)):
                    parts = ast.walk(statement.target)
                    found += [part.id for part in parts if isinstance(part, ast.Name)]
        _names_around[key] = tuple(found)
    return _names_around[key]


def forget_sources() -> None:
    """Clear the cache of syntax trees."""
    _functions.clear()


# ---------------------------------------------------------------- statements

Statement = ast.For | ast.AsyncFor | ast.While | ast.If
_names_around: dict[tuple[CodeType, int], tuple[str, ...]] = {}
_functions: dict[tuple[str, str, int], ast.AST | None] = {}


def _around(frame: FrameType) -> Iterator[Statement]:
    """The loops and conditions around the current line of a frame, innermost first."""
    function = _function_of(frame.f_code, frame.f_globals)
    if function is None:
        return
    line = frame.f_lineno
    found: list[Statement] = []
    body = list(getattr(function, "body", []))
    while body:
        statement = next((s for s in body if _first(s) <= line <= _last(s)), None)
        if statement is None or isinstance(
            statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ):
            break
        if isinstance(statement, (ast.For, ast.AsyncFor, ast.While)):
            if not any(s.lineno <= line <= _last(s) for s in statement.orelse):
                found.append(statement)
        elif isinstance(statement, ast.If):
            found.append(statement)
        body = [s for s in ast.iter_child_nodes(statement) if isinstance(s, ast.stmt)]
        for handler in getattr(statement, "handlers", ()):
            body += handler.body
        for case in getattr(statement, "cases", ()):
            body += case.body
    yield from reversed(found)


def _first(statement: ast.stmt) -> int:
    """First line, including the decorators of a function."""
    lines = [decorator.lineno for decorator in getattr(statement, "decorator_list", ())]
    return min(statement.lineno, *lines) if lines else statement.lineno


def _last(statement: ast.stmt) -> int:
    return statement.end_lineno or statement.lineno


def _function_of(code: CodeType, names: dict[str, Any]) -> ast.AST | None:
    """The syntax tree of the function or module from which `code` was compiled."""
    key = (code.co_filename, code.co_name, code.co_firstlineno)
    if key not in _functions:
        _functions[key] = _parse(code, names)
    return _functions[key]


def _parse(code: CodeType, names: dict[str, Any]) -> ast.AST | None:
    source = "".join(linecache.getlines(code.co_filename, names))
    if not source or len(source) > MAX_SOURCE:
        return None
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    if code.co_name == "<module>":
        return tree
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return next(
        (
            node
            for node in ast.walk(tree)
            if isinstance(node, kinds)
            and node.name == code.co_name
            and _first(node) == code.co_firstlineno
        ),
        None,
    )


# ---------------------------------------------------------------- lengths


def _loop_of(statement: Statement, frame: FrameType) -> Loop:
    scope = _Scope(frame)
    line = linecache.getline(frame.f_code.co_filename, statement.lineno).strip()
    target = ""
    length: int | None = None
    position: int | None = None
    over_data, why = False, ""
    try:
        if isinstance(statement, ast.While):
            length, position = _while_length(statement, scope)
        elif isinstance(statement, (ast.For, ast.AsyncFor)):
            target = ast.unparse(statement.target)
            length = _length(statement.iter, scope)
            over_data = _over_data(statement.iter)
            position = _position(statement, scope)
    except Unknown as reason:
        why = str(reason)
        if isinstance(statement, (ast.For, ast.AsyncFor)):
            over_data = _over_data(statement.iter)
            position = _quietly(lambda: _position(statement, scope))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    return Loop(
        frame.f_code.co_filename,
        statement.lineno,
        line,
        target,
        length,
        why,
        position,
        over_data,
        _last(statement),
    )


def _quietly(compute: Callable[[], T]) -> T | None:
    try:
        return compute()
    except Exception:
        return None


class _Scope:
    """The local and global variables of a frame."""

    def __init__(self, frame: FrameType) -> None:
        self._local: Mapping[str, Any] = frame.f_locals
        self._global = frame.f_globals

    def __contains__(self, name: str) -> bool:
        return name in self._local or name in self._global

    def name(self, name: str) -> Any:
        if name in self._local:
            return self._local[name]
        if name in self._global:
            return self._global[name]
        raise Unknown(f"{name} is not known")


def value_of(node: ast.expr, scope: _Scope) -> Any:
    """Evaluate an expression of names, attributes, numbers and arithmetic. Raises Unknown for
    anything that would call code of the script."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return scope.name(name)
        case ast.Attribute(value=inner, attr=name):
            return _attribute(value_of(inner, scope), name, node)
        case ast.Subscript(value=inner, slice=key):
            held = value_of(inner, scope)
            if type(held) in (dict, list, tuple):
                return held[value_of(key, scope)]
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, value_of(left, scope), value_of(right, scope), node)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(value_of(operand, scope), node)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (
            name in BUILTINS and name not in scope
        ):
            return BUILTINS[name](*(value_of(argument, scope) for argument in arguments))
    raise Unknown(f"{_short(node)} is computed")


def _attribute(owner: Any, name: str, node: ast.expr) -> Any:
    """A stored attribute. Raises Unknown for one that a property would compute."""
    held = getattr(owner, "__dict__", {})
    if isinstance(held, dict) and name in held:
        return held[name]
    from tui_trainer.trace.torch_private import own_parameters, submodules  # imports torch

    for part in (submodules(owner), own_parameters(owner)):
        if name in part:
            return part[name]
    for cls in type(owner).__mro__:
        found = vars(cls).get(name)
        if found is not None:
            if isinstance(found, (int, float, str, bool, tuple, list, dict)):
                return found
            if type(found).__name__ == "member_descriptor":  # a slot
                return found.__get__(owner, cls)
            break
    raise Unknown(f"{_short(node)} is computed")


def _number(value: Any, node: ast.expr) -> Any:
    if isinstance(value, (int, float)):
        return value
    raise Unknown(f"{_short(node)} is not a number")


def _arithmetic(op: ast.operator, left: Any, right: Any, node: ast.expr) -> Any:
    a, b = _number(left, node), _number(right, node)
    match op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.FloorDiv():
            return a // b
        case ast.Div():
            return a / b
        case ast.Mod():
            return a % b
        case ast.Pow() if abs(b) < 64:
            return a**b
    raise Unknown(f"{_short(node)} is computed")


def _short(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _called(node: ast.expr) -> str:
    """The last part of the name of the called function."""
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name):
            return function.id
        if isinstance(function, ast.Attribute):
            return function.attr
    return ""


def _length(node: ast.expr, scope: _Scope) -> int:
    """The length of an iterable."""
    name = _called(node)
    if isinstance(node, ast.Call):
        arguments = node.args
        named = {k.arg: k.value for k in node.keywords if k.arg}
        if any(isinstance(argument, ast.Starred) for argument in arguments):
            raise Unknown(f"{_short(node)} is computed")
        if name in ("range", "trange"):
            return len(range(*(int(value_of(a, scope)) for a in arguments)))
        if name in ("enumerate", "reversed", "list", "tuple", "sorted", "iter", "cycle"):
            if name == "cycle":
                raise Unknown(f"{_short(node)} has no end")
            return _length(arguments[0], scope)
        if name == "zip":
            parts = [_length(argument, scope) for argument in arguments]
            return min(parts)
        if name == "islice" and len(arguments) == 2:
            limit = int(value_of(arguments[1], scope))
            return min(limit, _length(arguments[0], scope))
        if name in WRAPPERS:
            if "total" in named and (total := value_of(named["total"], scope)) is not None:
                return int(total)
            if arguments:
                return _length(arguments[0], scope)
        raise Unknown(f"the length of {_short(node)} is not known before it ends")
    return _length_of(value_of(node, scope), node)


def _length_of(held: Any, node: ast.expr) -> int:
    total = vars(held).get("total") if type(held).__module__.startswith("tqdm") else None
    if isinstance(total, (int, float)):
        return int(total)
    if not hasattr(type(held), "__len__"):
        raise Unknown(f"{_short(node)} ({type(held).__name__}) has no length")
    try:
        return len(held)
    except TypeError as error:
        raise Unknown(f"{_short(node)} ({type(held).__name__}) has no length") from error


def _over_data(node: ast.expr) -> bool:
    """Whether a loop iterates over anything but numbers."""
    name = _called(node)
    if name in ("range", "trange", "count"):
        return False
    if isinstance(node, ast.Call) and node.args and (name in WRAPPERS or name == "enumerate"):
        return _over_data(node.args[0])
    return True


def _position(statement: ast.For | ast.AsyncFor, scope: _Scope) -> int | None:
    """The number of the current iteration, from the loop variable of `range` or `enumerate`."""
    node, target = statement.iter, statement.target
    while isinstance(node, ast.Call) and _called(node) in WRAPPERS and node.args:
        node = node.args[0]
    if not isinstance(node, ast.Call):
        return None
    name = _called(node)
    start, step = 0, 1
    if name == "enumerate" and isinstance(target, ast.Tuple):
        variable = target.elts[0]
        named = {k.arg: k.value for k in node.keywords}
        given = node.args[1] if len(node.args) > 1 else named.get("start")
        start = int(value_of(given, scope)) if given is not None else 0
    elif name in ("range", "trange"):
        variable = target
        if len(node.args) > 1:
            start = int(value_of(node.args[0], scope))
        if len(node.args) > 2:
            step = int(value_of(node.args[2], scope))
    else:
        return None
    value = value_of(variable, scope)
    return (value - start) // step if isinstance(value, int) and step else None


def _while_length(statement: ast.While, scope: _Scope) -> tuple[int, int]:
    """(iterations, current iteration) of `while step < last`, and of `while True` that breaks on
    such a condition, assuming that the variable counts up from 0 in steps of 1."""
    test = statement.test
    if isinstance(test, ast.Constant) and test.value:
        conditions = [s.test for s in statement.body if isinstance(s, ast.If) and _breaks(s)]
        negated = True
    else:
        conditions, negated = [test], False
    for condition in conditions:
        match condition:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                inclusive = isinstance(op, ast.Gt if negated else ast.LtE)
                strict = isinstance(op, ast.GtE if negated else ast.Lt)
                if not (inclusive or strict):
                    continue
                last, now = value_of(right, scope), value_of(left, scope)
                if isinstance(last, int) and isinstance(now, int):
                    return last + inclusive, now
    raise Unknown(f"`{_short(test)}` does not determine how often the loop runs")


def _breaks(statement: ast.If) -> bool:
    return any(isinstance(s, ast.Break) for s in statement.body)
