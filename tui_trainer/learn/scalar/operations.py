"""The operations of scalar graphs: values, derivatives, and the notation of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tui_trainer.learn.scalar.translation import Message, say

Formulas = tuple[str, ...]


class DomainError(ValueError):
    """An operation without a real, finite result, such as a division by zero."""

    def __init__(self, message: Message) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True)
class Operation:
    """One operation on scalars. `derivatives` takes the operands and the result, and returns the
    derivative of the result with respect to each operand; `formulas` writes them with names."""

    value: Callable[..., float]
    """Raises DomainError."""
    derivatives: Callable[..., tuple[float, ...]]
    formulas: Callable[..., Formulas]
    """Takes the names of the operands and of the result."""
    text: Callable[..., str]
    """The operation with the names of its operands: `a*b`."""
    passes: Callable[..., tuple[bool, ...]] = lambda *operands: (True,) * len(operands)
    """Whether the gradient is passed to each operand. If not, the operand receives 0, even if the
    gradient is infinite or nan, as in PyTorch."""


def _too_large(formula: str) -> Message:
    return say("{formula} is too large for a float64", formula=formula)


def _divide(a: float, b: float) -> float:
    if b == 0:
        raise DomainError(say("division by zero"))
    return a / b


def _power(a: float, b: float) -> float:
    if a == 0 and b < 0:
        raise DomainError(say("division by zero: 0 to a negative power"))
    try:
        value = a**b
    except OverflowError:
        raise DomainError(_too_large(f"{a:g}**{b:g}")) from None
    if isinstance(value, complex):
        power = f"({a:g})**{b:g}"
        raise DomainError(say("{formula} is not a real number", formula=power))
    return float(value)


def _raw_power(a: float, b: float) -> float:
    """Power as in IEEE 754: inf and nan instead of exceptions."""
    if a == 0 and b < 0:
        return math.inf
    try:
        value = a**b
    except OverflowError:
        return math.inf
    return math.nan if isinstance(value, complex) else float(value)


def _power_derivatives(a: float, b: float, result: float) -> tuple[float, float]:
    """The derivatives of a**b. The one with respect to b is 0 for a = 0 and b >= 0, as in PyTorch,
    and nan for a < 0."""
    by_base = 0.0 if b == 0 else b * _raw_power(a, b - 1)
    if a > 0:
        return by_base, result * math.log(a)
    return by_base, 0.0 if a == 0 and b >= 0 else math.nan


def _power_formulas(a: str, b: str, result: str) -> Formulas:
    try:
        exponent = float(b)
    except ValueError:
        return f"{b}*{a}**({b} - 1)", f"{result}*log({a})"
    less = exponent - 1
    powered = a if less == 1 else f"{a}**{less:g}" if less >= 0 else f"{a}**({less:g})"
    return f"{exponent:g}*{powered}", f"{result}*log({a})"


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        raise DomainError(_too_large(f"exp({x:g})")) from None


def _log(x: float) -> float:
    if x == 0:
        raise DomainError(say("the logarithm of zero"))
    if x < 0:
        raise DomainError(say("the logarithm of a negative number, {x:g}", x=x))
    return math.log(x)


def _function(name: str) -> Callable[[str], str]:
    return lambda x: f"{name}({x})"


def _infix(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"{a}{sign}{b}"


OPERATIONS: dict[str, Operation] = {
    "+": Operation(
        lambda a, b: a + b, lambda a, b, r: (1.0, 1.0), lambda a, b, r: ("1", "1"), _infix(" + ")
    ),
    "-": Operation(
        lambda a, b: a - b, lambda a, b, r: (1.0, -1.0), lambda a, b, r: ("1", "(-1)"),
        _infix(" - "),
    ),
    "*": Operation(
        lambda a, b: a * b, lambda a, b, r: (b, a), lambda a, b, r: (b, a), _infix("*")
    ),
    "/": Operation(
        _divide, lambda a, b, r: (1 / b, -r / b), lambda a, b, r: (f"1/{b}", f"-{a}/{b}**2"),
        _infix("/"),
    ),
    "**": Operation(
        _power, _power_derivatives, _power_formulas, _infix("**"),
        lambda a, b: (b != 0, True),
    ),
    "neg": Operation(
        lambda x: -x, lambda x, r: (-1.0,), lambda x, r: ("(-1)",), lambda x: f"-{x}"
    ),
    "tanh": Operation(
        math.tanh, lambda x, r: (1 - r * r,), lambda x, r: (f"(1 - {r}**2)",), _function("tanh")
    ),
    "relu": Operation(
        lambda x: max(x, 0.0), lambda x, r: (1.0 if x > 0 else 0.0,), lambda x, r: (f"({x} > 0)",),
        _function("relu"), lambda x: (x > 0,),
    ),
    "exp": Operation(_exp, lambda x, r: (r,), lambda x, r: (r,), _function("exp")),
    "log": Operation(_log, lambda x, r: (1 / x,), lambda x, r: (f"1/{x}",), _function("log")),
}  # fmt: skip
