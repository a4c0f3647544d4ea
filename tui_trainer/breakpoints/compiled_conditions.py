"""The closures that conditions are compiled to, and the values that they work on.
`breakpoint_list.py` calls them at the boundaries of the training.

An `Evaluate` returns a Number or a Truth in the state of the run; an absent value is None.
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
    """Mask of values that are not absent."""


@dataclass(frozen=True)
class Selector:
    """Selects columns by a pattern of their names, by layer, or all of them."""

    pattern: str | None = None
    layer: int | None = None

    def __str__(self) -> str:
        if self.layer is not None:
            return f"layer={self.layer}"
        return "any" if self.pattern is None else f'"{self.pattern}"'

    def matches(self, name: str) -> bool:
        """Whether a name matches the pattern: in full, or up to one of its dots."""
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
    """The earliest phase at whose end it is known."""
    table: str = ""
    """The table that it is read from."""


class EvaluationContext(Protocol):
    """The state of a run at a phase boundary, as read by conditions."""

    @property
    def step(self) -> int: ...

    def number(self, name: str) -> float | None:
        """A quantity of SCALARS; None where it is absent."""

    def several(self, quantity: ConditionQuantity, selector: Selector) -> ColumnValues | None:
        """The selected columns; None where they were not measured.

        Raises UserError where nothing matches the selector.
        """

    def logged(self, table: str, name: str) -> float | None:
        """The value of this name that was logged, or measured by an evaluation, since the last
        evaluation of the condition. `table`: `logged` or `validation`."""

    def ranks(self, column: str) -> ColumnValues | None:
        """A column of every process in this step, by the number of its rank."""

    def nonfinite(self) -> MatchedValue | None:
        """The quantity that has become nan or inf."""

    def finding(self, rules: frozenset[str] | None, level: Level) -> MatchedValue | None:
        """A new finding of at least this level, of one of these rules (None: of any)."""


Number = float | ColumnValues | None
Truth = bool | None
Evaluate = Callable[[EvaluationContext, list[MatchedValue]], object]


@dataclass(frozen=True)
class Compiled:
    """A compiled part of a condition."""

    kind: Literal["number", "several", "truth"]
    evaluate: Evaluate
    """Returns a Number or a Truth. Appends the values to report."""
    label: str = ""
    table: str = ""


def conjunction_of(truths: Sequence[Truth]) -> Truth:
    """None where it depends on a part that is absent."""
    if False in truths:
        return False
    return None if None in truths else True


def disjunction_of(truths: Sequence[Truth]) -> Truth:
    """None where it depends on a part that is absent."""
    if True in truths:
        return True
    return None if None in truths else False


def constant(value: float) -> Evaluate:
    return lambda context, matched: value


def reported(find: Callable[[EvaluationContext], MatchedValue | None]) -> Evaluate:
    """Whether `find` returns a reading, which is then reported."""

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
    """The names of two values, at least one of which has columns, and where both are present."""
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


class ExponentialMean:
    """The exponential mean of the finite values before the current one."""

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
    """Whether the comparison holds, for any column where there are several; None where a value is
    absent."""
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
