"""The closures that conditions are compiled to, and the values that they operate on.
`breakpoint_list.py` calls the closures at the phase boundaries of the training.

An `Evaluate` reads the state of the run and returns a Number or a Truth; None stands for absent.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tui_trainer.protocol import Phase
from tui_trainer.protocol.events import Level


@dataclass(frozen=True, slots=True)
class ColumnValues:
    """The values of several columns."""

    names: tuple[str, ...]
    values: NDArray[np.float64]
    present: NDArray[np.bool_]
    """Mask of the values that are present."""


@dataclass(frozen=True)
class Selector:
    """Selects all columns, those of one layer, or those whose names match a pattern."""

    pattern: str | None = None
    layer: int | None = None

    def __str__(self) -> str:
        if self.layer is not None:
            return f"layer={self.layer}"
        return "any" if self.pattern is None else f'"{self.pattern}"'

    def matches(self, name: str) -> bool:
        """Whether the pattern matches `name`, or a part of `name` that ends before a dot."""
        if self.pattern is None:
            return True
        return fnmatch.fnmatchcase(name, self.pattern) or fnmatch.fnmatchcase(
            name, f"{self.pattern}.*"
        )


@dataclass(frozen=True, slots=True)
class MatchedValue:
    """A value that made a condition true."""

    text: str
    parameter: str = ""
    table: str = ""


@dataclass(frozen=True)
class ConditionQuantity:
    """A quantity that conditions can read."""

    name: str
    help: str
    known_from: Phase
    """The earliest phase at whose end the quantity is known."""
    table: str = ""
    """The table that holds the quantity."""


class EvaluationContext(Protocol):
    """The state of a run at a phase boundary, as read by conditions."""

    @property
    def step(self) -> int: ...

    def number(self, name: str) -> float | None:
        """The value of a quantity in SCALARS; None where it is absent."""

    def several(self, quantity: ConditionQuantity, selector: Selector) -> ColumnValues | None:
        """The selected columns; None where they were not measured.

        Raises UserError where nothing matches the selector.
        """

    def logged(self, table: str, name: str) -> float | None:
        """The newest value of `name` in `table` (`logged` or `validation`); None if no value was
        added since the condition was last evaluated."""

    def ranks(self, column: str) -> ColumnValues | None:
        """The values of `column` in this step, named `rank 0`, `rank 1`, … by process."""

    def nonfinite(self) -> MatchedValue | None:
        """The quantity that has just become nan or inf; None without one."""

    def finding(self, rules: frozenset[str] | None, level: Level) -> MatchedValue | None:
        """A new finding of one of `rules` (None: of any rule) with at least `level`."""


Number = float | ColumnValues | None
Truth = bool | None
Evaluate = Callable[[EvaluationContext, list[MatchedValue]], object]


@dataclass(frozen=True)
class Compiled:
    """A compiled part of a condition."""

    kind: Literal["number", "several", "truth"]
    evaluate: Evaluate
    """Returns a Number or a Truth; appends the values to report to its second argument."""
    label: str = ""
    table: str = ""


def conjunction_of(truths: Sequence[Truth]) -> Truth:
    """Three-valued `and`: None if the result depends on an absent part."""
    if False in truths:
        return False
    return None if None in truths else True


def disjunction_of(truths: Sequence[Truth]) -> Truth:
    """Three-valued `or`: None if the result depends on an absent part."""
    if True in truths:
        return True
    return None if None in truths else False


def constant(value: float) -> Evaluate:
    return lambda context, matched: value


def reported(find: Callable[[EvaluationContext], MatchedValue | None]) -> Evaluate:
    """True where `find` returns a value, which is then reported."""

    def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Truth:
        found = find(context)
        if found is not None:
            matched.append(found)
        return found is not None

    return evaluate


def _aligned(left: ColumnValues, right: ColumnValues) -> tuple[ColumnValues, ColumnValues]:
    """Restrict both to their common columns."""
    if left.names == right.names:
        return left, right
    places = {name: position for position, name in enumerate(right.names)}
    common = [(i, places[name]) for i, name in enumerate(left.names) if name in places]
    ours, theirs = [i for i, _ in common], [j for _, j in common]
    names = tuple(left.names[i] for i in ours)
    return (
        ColumnValues(names, left.values[ours], left.present[ours]),
        ColumnValues(names, right.values[theirs], right.present[theirs]),
    )


def _joined(left: Number, right: Number) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """The column names of two operands, and the mask of columns in which both are present. At least
    one operand has columns."""
    if isinstance(left, ColumnValues):
        if isinstance(right, ColumnValues):
            return left.names, left.present & right.present
        return left.names, left.present
    assert isinstance(right, ColumnValues)
    return right.names, right.present


def _values(number: Number) -> NDArray[np.float64] | np.float64:
    return number.values if isinstance(number, ColumnValues) else np.float64(cast(float, number))


def arithmetic(
    function: Callable[..., NDArray[np.float64]], left: Evaluate, right: Evaluate
) -> Evaluate:
    def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Number:
        a = cast(Number, left(context, matched))
        b = cast(Number, right(context, matched))
        if a is None or b is None:
            return None
        if isinstance(a, ColumnValues) and isinstance(b, ColumnValues):
            a, b = _aligned(a, b)
        with np.errstate(all="ignore"):
            result = function(_values(a), _values(b))
        if isinstance(a, ColumnValues) or isinstance(b, ColumnValues):
            names, present = _joined(a, b)
            return ColumnValues(names, result, present)
        return float(result)

    return evaluate


def absolute(part: Evaluate) -> Evaluate:
    def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Number:
        value = cast(Number, part(context, matched))
        if isinstance(value, ColumnValues):
            return ColumnValues(value.names, np.abs(value.values), value.present)
        return None if value is None else abs(value)

    return evaluate


def extreme(largest: bool, parts: Sequence[Evaluate]) -> Evaluate:
    def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Number:
        found: list[float] = []
        for part in parts:
            value = cast(Number, part(context, matched))
            if isinstance(value, ColumnValues):
                found += value.values[value.present].tolist()
            elif value is not None:
                found.append(value)
        if not found:
            return None
        if any(math.isnan(value) for value in found):
            return math.nan
        return max(found) if largest else min(found)

    return evaluate


class ExponentialMovingAverage:
    """The exponential moving average of the finite values before the current one."""

    def __init__(self, part: Evaluate, steps: int) -> None:
        self._part = part
        self._steps = steps
        self._count = 0
        self._mean = math.nan

    def __call__(self, context: EvaluationContext, matched: list[MatchedValue]) -> Number:
        value = cast(Number, self._part(context, []))
        mean = self._mean if self._count else None
        if isinstance(value, float) and math.isfinite(value):
            self._count = min(self._count + 1, self._steps)
            if self._count == 1 and mean is None:
                self._mean = value
            else:
                self._mean += (value - self._mean) / self._count
        return mean


def compare(
    left: Number,
    right: Number,
    function: Callable[[Any, Any], Any],
    side: int,
    left_part: Compiled,
    right_part: Compiled,
    matched: list[MatchedValue],
) -> Truth:
    """Whether the comparison holds, in any column if there are several; None for absent values.

    Appends the most extreme column in which it holds to `matched`. `function` and `side` are those
    of COMPARISONS.
    """
    if left is None or right is None:
        return None
    if not isinstance(left, ColumnValues) and not isinstance(right, ColumnValues):
        return bool(function(left, right))
    if isinstance(left, ColumnValues) and isinstance(right, ColumnValues):
        left, right = _aligned(left, right)
    names, present = _joined(left, right)
    if not present.any():
        return None
    with np.errstate(all="ignore"):
        holds = cast("NDArray[np.bool_]", function(_values(left), _values(right))) & present
        if not holds.any():
            return False
        distance = np.where(holds, side * (_values(left) - _values(right)), -np.inf)
    place = int(np.argmax(holds if side == 0 or np.isnan(distance).any() else distance))
    shown, part = left, left_part
    if not isinstance(shown, ColumnValues):
        shown, part = right, right_part
    assert isinstance(shown, ColumnValues)
    value = float(shown.values[place])
    label = f"{part.label} of " if part.label else ""
    matched.append(MatchedValue(f"{label}{names[place]} {value:.4g}", names[place], part.table))
    return True
