"""The language of conditions: `loss > 3 * ema(loss)`, `grad_norm("blocks.0.*") > 10 at backward`.

A condition is parsed with `ast` and compiled to closures over a whitelist of nodes, quantities and
functions; nothing is ever executed as Python. Numbers are float64.

* A comparison of a quantity with several columns, such as `grad_norm(any)`, is true if it is true
  for any column.
* A comparison with an absent value is neither true nor false. A condition is met only if it is
  true.
* A condition is evaluated at the end of the step, or at the end of the phase after `at`.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from tui_trainer.breakpoints.compiled_conditions import (
    Compiled,
    ConditionQuantity,
    Evaluate,
    EvaluationContext,
    ExponentialMovingAverage,
    MatchedValue,
    Number,
    Selector,
    Truth,
    absolute,
    arithmetic,
    compare,
    conjunction_of,
    constant,
    disjunction_of,
    extreme,
    reported,
)
from tui_trainer.breakpoints.quantities import (
    ABS,
    ANY,
    COLUMN_QUANTITIES,
    EMA,
    FINDING,
    FUNCTIONS,
    LOGS,
    MAXIMUM,
    MINIMUM,
    NAMES,
    NONFINITE,
    RANK,
    RANK_QUANTITIES,
    SCALARS,
    WITH_RANKS,
)
from tui_trainer.findings.rules import RULES, rules_named
from tui_trainer.protocol import PHASES, Phase, schema
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.events import Level

MAX_CHARACTERS = 300
MAX_DEPTH = 30
EMA_STEPS = 20
"""Steps over which `ema` averages by default."""
MAX_MATCHED_VALUES = 3
"""Maximum number of values in the text of a hit."""


class ExpressionError(UserError):
    """A condition that cannot be parsed, with the position of the error."""

    def __init__(self, message: str, text: str, start: int, end: int, hint: str = "") -> None:
        """`text[start:end]` is the part of `text` that is wrong."""
        super().__init__(message, hint)
        self.text = text
        self.start = min(max(start, 0), len(text))
        self.end = max(end, self.start + 1)

    @property
    def pointed(self) -> str:
        """The message, the condition, and a line of carets under the part that is wrong."""
        marks = " " * self.start + "^" * (self.end - self.start)
        return f"{self.message}\n    {self.text}\n    {marks}"


@dataclass(frozen=True)
class ConditionResult:
    """The result of evaluating a condition."""

    met: bool
    matched: tuple[MatchedValue, ...] = ()

    @property
    def text(self) -> str:
        """The values, such as `loss 7.1`."""
        return ", ".join(value.text for value in self.matched)


# ---------------------------------------------------------------- conditions


@dataclass
class Expression:
    """A compiled condition. Stateful: it holds the moving averages of `ema`."""

    text: str
    phase: Phase
    """The phase at whose end the condition is evaluated."""
    at_step: int | None = None
    """The N of a condition `step == N`; None for any other condition."""
    tables: frozenset[str] = frozenset()
    """The tables that the condition reads."""
    findings: bool = False
    """Whether the condition reads findings."""
    skips: bool = False
    """Whether an iteration without a step, which a GradScaler skips, can meet the condition."""
    ranks: tuple[tuple[int | None, int, int], ...] = ()
    """(rank or None for any, start, end in `text`) of each rank. A condition on ranks is evaluated
    for steps that all processes have ended."""
    selectors: tuple[tuple[ConditionQuantity, Selector, int, int], ...] = ()
    """(quantity, selector, start, end in `text`) of each selector."""
    _evaluate: Evaluate = field(default=lambda context, matched: True, repr=False)

    def evaluate(self, context: EvaluationContext) -> ConditionResult:
        """Evaluate the condition now. Raises UserError if a selector matches nothing."""
        matched: list[MatchedValue] = []
        if self._evaluate(context, matched) is not True:
            return ConditionResult(False)
        return ConditionResult(True, tuple(dict.fromkeys(matched))[:MAX_MATCHED_VALUES])

    def check_ranks(self, count: int) -> None:
        """Raise ExpressionError for a rank that a run of `count` processes does not have."""
        for rank, start, end in self.ranks:
            if count < 2:
                message, hint = "the run has one process", "leave out the rank, as in loss > 5"
            elif rank is not None and rank >= count:
                message, hint = f"there is no rank {rank}", f"the run has ranks 0 to {count - 1}"
            else:
                continue
            raise ExpressionError(message, self.text, start, end, hint)


_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_AT = re.compile(r"(?:^|\s)at\s+(\S+)\s*$")
_AT_STEP = re.compile(r"step\s*==\s*(\d{1,15})")


def parse(text: str) -> Expression:
    """Compile a condition. Raises ExpressionError."""
    text = text.strip()
    if not text:
        raise ExpressionError("the condition is empty", "", 0, 1, "such as loss > 5")
    if len(text) > MAX_CHARACTERS:
        message = f"a condition has at most {MAX_CHARACTERS} characters"
        raise ExpressionError(message, text[:60], 0, 60)
    outside_quotes = _QUOTED.sub(lambda quoted: " " * len(quoted.group()), text)
    comment = outside_quotes.find("#")
    for position, character in enumerate(text):
        if character == "\\" or position == comment or not character.isprintable():
            raise ExpressionError(
                "this character is not allowed in a condition",
                text.encode("ascii", "replace").decode() if not text.isprintable() else text,
                position,
                position + 1,
            )
    condition = text
    phase: Phase = "step"
    at = _AT.search(text)
    if at is not None:
        phase, condition = _phase(text, at), text[: at.start()].rstrip()
        if not condition:
            return Expression(text, phase)
    if at is None and "validation" in condition:
        # An evaluation runs between two steps: stop before the next one changes the weights.
        with contextlib.suppress(ExpressionError):
            return _compiled(text, condition, "data")
    return _compiled(text, condition, phase)


def _compiled(text: str, condition: str, phase: Phase) -> Expression:
    compiler = _Compiler(text, condition, phase)
    compiled = compiler.compile()
    only = _AT_STEP.fullmatch(condition)
    return Expression(
        text,
        phase,
        None if only is None else int(only.group(1)),
        frozenset(compiler.tables),
        compiler.findings,
        phase == "step" and (compiler.findings or compiler.nonfinite),
        tuple(compiler.ranks),
        tuple(compiler.selectors),
        compiled,
    )


def _phase(text: str, at: re.Match[str]) -> Phase:
    name = at.group(1)
    if name not in PHASES:
        start, end = at.span(1)
        raise ExpressionError(f"there is no phase {name}", text, start, end, _near(name, PHASES))
    return name


def _near(given: str, names: Sequence[str]) -> str:
    """A hint for a misspelled name."""
    similar = difflib.get_close_matches(given.casefold(), names, n=2, cutoff=0.55)
    if not similar:
        similar = [name for name in names if given.casefold() in name][:2]
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    if len(names) <= 10:
        return "choose from " + ", ".join(names)
    return "such as loss, grad_norm, clip.scale, nonfinite: docs/breakpoints.md lists all"


# ---------------------------------------------------------------- compiling

COMPARISONS: dict[type[ast.cmpop], tuple[Callable[[Any, Any], Any], int]] = {
    ast.Gt: (operator.gt, 1),
    ast.GtE: (operator.ge, 1),
    ast.Lt: (operator.lt, -1),
    ast.LtE: (operator.le, -1),
    ast.Eq: (operator.eq, 0),
    ast.NotEq: (operator.ne, 0),
}
"""(function, side on which the most extreme value lies: 1 above, -1 below, 0 neither)"""
ARITHMETIC: dict[type[ast.operator], Callable[..., NDArray[np.float64]]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Mod: np.mod,
}


class _Compiler:
    def __init__(self, text: str, condition: str, phase: Phase) -> None:
        self._text = text
        self._condition = condition
        self._bytes = condition.encode()
        self._phase: Phase = phase
        self.tables: set[str] = set()
        self.findings = False
        self.nonfinite = False
        self.ranks: list[tuple[int | None, int, int]] = []
        self._not_with_ranks: tuple[str, ast.expr] | None = None
        self.selectors: list[tuple[ConditionQuantity, Selector, int, int]] = []

    def compile(self) -> Evaluate:
        try:
            tree = ast.parse(self._condition, mode="eval")
        except SyntaxError as error:
            raise self._syntax_error(error) from None
        except (ValueError, RecursionError, MemoryError):
            raise self._error("this is not a valid condition", None) from None
        part = self._part(tree.body, 0)
        if part.kind != "truth":
            raise self._error("this is a number, not a condition", tree.body, "such as loss > 3")
        if self.ranks and self._not_with_ranks is not None:
            name, node = self._not_with_ranks
            known = ", ".join(WITH_RANKS)
            raise self._error(f"{name} cannot be compared with ranks", node, f"only {known} can")
        return part.evaluate

    # ------------------------------------------------------------ errors

    def _place(self, node: ast.AST | None) -> tuple[int, int]:
        start = getattr(node, "col_offset", None)
        end = getattr(node, "end_col_offset", None)
        if start is None or end is None:
            return 0, len(self._condition)
        return (
            len(self._bytes[:start].decode(errors="ignore")),
            len(self._bytes[:end].decode(errors="ignore")),
        )

    def _error(self, message: str, node: ast.AST | None, hint: str = "") -> ExpressionError:
        return ExpressionError(message, self._text, *self._place(node), hint)

    def _syntax_error(self, error: SyntaxError) -> ExpressionError:
        text = self._condition
        # Python gives 0 where the condition ends too early.
        start = error.offset - 1 if error.offset else len(text)
        hint = ""
        if re.search(r"&&|\|\|", text):
            hint = "write `and` and `or`"
        elif (reversed_ := re.search(r"=[<>]", text)) is not None:
            hint = f"write {reversed_.group()[::-1]}"
        elif re.search(r"(?<![<>=!])=(?!=)", text):
            hint = "write == to compare"
        elif (place := re.search(r"(?:^|\s)at\b", text)) is not None:
            start = place.end() - len("at")
            hint = "a condition ends with `at` and a phase, such as loss > 5 at backward"
        elif text.count('"') % 2 or text.count("'") % 2:
            hint = "a quotation mark is missing"
        elif text.count("(") != text.count(")"):
            hint = "a parenthesis is missing"
        elif start >= len(text):
            hint = "the condition ends too early"
        return ExpressionError("this is not a valid condition", self._text, start, start + 1, hint)

    # ------------------------------------------------------------ nodes

    def _part(self, node: ast.expr, depth: int) -> Compiled:
        if depth > MAX_DEPTH:
            raise self._error("this is nested too deeply", node)
        depth += 1
        match node:
            case ast.Constant(value=value) if type(value) in (int, float):
                # An int of up to MAX_CHARACTERS digits fits into a float.
                return Compiled("number", constant(float(cast(float, value))))
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                return self._name(node, f"{owner}.{name}")
            case ast.Attribute(value=ast.Call(func=ast.Name(id="rank")) as call, attr=name):
                return self._rank(node, call, name)
            case ast.Call():
                return self._call(node, depth)
            case ast.Compare():
                return self._comparison(node, depth)
            case ast.BoolOp(op=op, values=values):
                return self._bool(isinstance(op, ast.And), values, depth)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self._not(operand, depth)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                sign = -1.0 if isinstance(node.op, ast.USub) else 1.0
                part = self._number(operand, depth)
                return Compiled(part.kind, arithmetic(np.multiply, constant(sign), part.evaluate))
            case ast.BinOp(op=operation) if type(operation) in ARITHMETIC:
                left, right = self._number(node.left, depth), self._number(node.right, depth)
                several = "several" in (left.kind, right.kind)
                function = ARITHMETIC[type(operation)]
                return Compiled(
                    "several" if several else "number",
                    arithmetic(function, left.evaluate, right.evaluate),
                )
        raise self._error(
            "this is not supported in a condition", node, "comparisons, + - * / %, and, or, not"
        )

    def _number(self, node: ast.expr, depth: int) -> Compiled:
        part = self._part(node, depth)
        if part.kind == "truth":
            raise self._error("this is a condition, not a number", node)
        return part

    def _truth(self, node: ast.expr, depth: int) -> Compiled:
        part = self._part(node, depth)
        if part.kind != "truth":
            raise self._error("this is a number, not a condition", node, "such as loss > 3")
        return part

    def _name(self, node: ast.expr, name: str) -> Compiled:
        if name not in WITH_RANKS:
            self._not_with_ranks = self._not_with_ranks or (name, node)
        if name == NONFINITE:
            self._check_phase(node, NONFINITE, "loss")
            self.nonfinite = True
            return Compiled("truth", reported(lambda context: context.nonfinite()))
        quantity = SCALARS.get(name)
        if quantity is None:
            if name in COLUMN_QUANTITIES or name in FUNCTIONS:
                examples = {FINDING: '("exploding")', RANK: "(1).loss", EMA: "(loss)"}
                example = '("name")' if name in LOGS else examples.get(name, "(any)")
                raise self._error(f"{name} is a function", node, f"such as {name}{example}")
            if name == ANY:
                message = "any is only allowed in parentheses"
                raise self._error(message, node, "such as grad_norm(any)")
            raise self._error(f"there is no quantity {name}", node, _near(name, NAMES))
        self._check_phase(node, name, quantity.known_from)
        if quantity.table:
            self.tables.add(quantity.table)
        if name == "step":
            return Compiled("number", lambda context, matched: float(context.step))

        def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Number:
            value = context.number(name)
            if value is not None:
                matched.append(MatchedValue(f"{name} {value:.4g}", table=quantity.table))
            return value

        return Compiled("number", evaluate)

    def _check_phase(self, node: ast.AST, name: str, known_from: Phase) -> None:
        if PHASES.index(self._phase) < PHASES.index(known_from):
            raise self._error(
                f"{name} is not known yet at {self._phase}",
                node,
                f"at {known_from} or later",
            )

    # ------------------------------------------------------------ functions

    def _call(self, node: ast.Call, depth: int) -> Compiled:
        name = _dotted(node.func)
        if name is None:
            raise self._error("this is not a function", node.func)
        if name in COLUMN_QUANTITIES or name in LOGS or name == FINDING:
            self._not_with_ranks = self._not_with_ranks or (name, node)
        if name in COLUMN_QUANTITIES:
            return self._several(node, COLUMN_QUANTITIES[name])
        if name == FINDING:
            if self._phase != "step":
                message = "findings are only known at the end of the step"
                raise self._error(message, node, f"leave out `at {self._phase}`")
            rules, level = self._finding(node)
            self.findings = True
            return Compiled("truth", reported(lambda context: context.finding(rules, level)))
        if name in LOGS:
            return self._logged(LOGS[name], self._string(node, "a name", '("accuracy")'))
        if name == RANK:
            raise self._error("this is a rank, not a quantity", node, "such as rank(1).loss")
        if name == EMA:
            return self._ema(node, depth)
        if name == ABS:
            self._count(node, 1, 1)
            part_ = self._number(node.args[0], depth)
            return Compiled(part_.kind, absolute(part_.evaluate))
        if name in (MINIMUM, MAXIMUM):
            self._count(node, 1, 10)
            parts = [self._number(each, depth) for each in node.args]
            return Compiled("number", extreme(name == MAXIMUM, [p.evaluate for p in parts]))
        if name in SCALARS or name == NONFINITE:
            raise self._error(f"{name} is not a function", node, f"write {name}")
        names = [*COLUMN_QUANTITIES, *FUNCTIONS]
        raise self._error(f"there is no function {name}", node.func, _near(name, names))

    def _count(self, node: ast.Call, least: int, most: int) -> None:
        if node.keywords or not least <= len(node.args) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            name = _dotted(node.func)
            raise self._error(f"{name} takes {count} value{'s' * (most > 1)}", node)

    def _string(self, node: ast.Call, what: str, example: str) -> str:
        match node:
            case ast.Call(args=[ast.Constant(value=str(text))], keywords=[]) if text:
                return text
        name = _dotted(node.func)
        raise self._error(f"{name} takes {what} in quotes", node, f"such as {name}{example}")

    def _finding(self, node: ast.Call) -> tuple[frozenset[str] | None, Level]:
        """The names of the rules (None: any rule), and the lowest level of a finding."""
        match node:
            case ast.Call(
                args=[], keywords=[ast.keyword(arg="level", value=ast.Constant(value=level))]
            ) if level in get_args(Level):
                return None, cast(Level, level)
        example = '("exploding"), or finding(level="warning")'
        part = self._string(node, "(part of) the name of a rule", example)
        found = rules_named(part)
        if not found:
            names = [rule.name for rule in RULES]
            words = dict.fromkeys(word for name in names for word in (name, *name.split("-")))
            close = difflib.get_close_matches(part, words, 2, 0.7)
            hint = f"did you mean {' or '.join(close)}?"
            if part in get_args(Level):
                hint = f'did you mean finding(level="{part}")?'
            elif not close:
                hint = "tui-trainer explain lists them"
            raise self._error(f"there is no rule {part}", node.args[0], hint)
        return found, "info"

    def _several(self, node: ast.Call, quantity: ConditionQuantity) -> Compiled:
        selector = self._selector(node, quantity)
        self._check_phase(node, quantity.name, quantity.known_from)
        self.tables.add(quantity.table)
        self.selectors.append((quantity, selector, *self._place(node)))
        return Compiled(
            "several",
            lambda context, matched: context.several(quantity, selector),
            label=quantity.name,
            table=quantity.table,
        )

    def _selector(self, node: ast.Call, quantity: ConditionQuantity) -> Selector:
        match node:
            case ast.Call(args=[] | [ast.Name(id="any")], keywords=[]):
                return Selector()
            case ast.Call(args=[ast.Constant(value=str(pattern))], keywords=[]) if pattern:
                return Selector(pattern=pattern)
            case ast.Call(
                args=[],
                keywords=[ast.keyword(arg="layer", value=ast.Constant(value=int(layer)))],
            ) if type(layer) is int and quantity.table != schema.PHASE_MS:
                return Selector(layer=layer)
        example = f'{quantity.name}(any), {quantity.name}("blocks.0.*"), {quantity.name}(layer=2)'
        if quantity.table == schema.PHASE_MS:
            example = 'phase_ms("data")'
        raise self._error(f"{quantity.name} takes a selector", node, f"such as {example}")

    def _logged(self, table: str, name: str) -> Compiled:
        self.tables.add(table)
        label = f"validation {name}" if table == schema.VALIDATION else name

        def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Number:
            value = context.logged(table, name)
            if value is not None:
                matched.append(MatchedValue(f"{label} {value:.4g}", table=table))
            return value

        return Compiled("number", evaluate)

    def _rank(self, node: ast.expr, call: ast.Call, name: str) -> Compiled:
        """`rank(1).loss`, or `rank(any).loss` of all processes."""
        column = RANK_QUANTITIES.get(name)
        if column is None:
            hint = _near(name, tuple(RANK_QUANTITIES))
            raise self._error(f"a rank has no quantity {name}", node, hint)
        if self._phase != "step":
            message = "ranks are only compared at the end of the step"
            raise self._error(message, node, f"leave out `at {self._phase}`")
        number: int | None
        match call:
            case ast.Call(args=[ast.Constant(value=int(given))], keywords=[]) if (
                type(given) is int and given >= 0
            ):
                number = given
            case ast.Call(args=[ast.Name(id="any")], keywords=[]):
                number = None
            case _:
                hint = "such as rank(1).loss or rank(any).loss"
                raise self._error("rank takes a number or any", call, hint)
        self.ranks.append((number, *self._place(call)))
        self.tables.add(schema.STEP)
        if number is None:
            return Compiled("several", lambda context, matched: context.ranks(column), label=name)

        def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Number:
            found = context.ranks(column)
            if found is None or f"rank {number}" not in found.names:
                return None
            place = found.names.index(f"rank {number}")
            if not found.present[place]:
                return None
            value = float(found.values[place])
            matched.append(MatchedValue(f"{name} of rank {number} {value:.4g}"))
            return value

        return Compiled("number", evaluate)

    def _ema(self, node: ast.Call, depth: int) -> Compiled:
        steps = EMA_STEPS
        match node:
            case ast.Call(args=[_], keywords=[]):
                pass
            case ast.Call(args=[_, ast.Constant(value=int(given))], keywords=[]) if (
                type(given) is int and 1 <= given <= 10**6
            ):
                steps = given
            case _:
                raise self._error(
                    "ema takes a quantity and optionally a number of steps",
                    node,
                    "such as ema(loss, 50)",
                )
        part = self._number(node.args[0], depth)
        if part.kind == "several":
            hint = "such as ema(max(grad_norm(any)))"
            raise self._error("ema takes one number", node.args[0], hint)
        return Compiled("number", ExponentialMovingAverage(part.evaluate, steps))

    # ------------------------------------------------------------ comparisons and logic

    def _comparison(self, node: ast.Compare, depth: int) -> Compiled:
        operands = [self._number(each, depth) for each in (node.left, *node.comparators)]
        compared = []
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            if type(op) not in COMPARISONS:
                raise self._error("this is not a comparison", node, "> >= < <= == !=")
            compared.append((left, *COMPARISONS[type(op)], right))

        def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Truth:
            # Evaluate every operand exactly once: `ema` is stateful.
            values = [cast(Number, each.evaluate(context, matched)) for each in operands]
            truths = [
                compare(values[i], values[i + 1], function, side, left, right, matched)
                for i, (left, function, side, right) in enumerate(compared)
            ]
            return conjunction_of(truths)

        return Compiled("truth", evaluate)

    def _bool(self, conjunction: bool, values: Sequence[ast.expr], depth: int) -> Compiled:
        parts = [self._truth(each, depth).evaluate for each in values]

        def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Truth:
            truths = [cast(Truth, part(context, matched)) for part in parts]  # `ema` is stateful
            return conjunction_of(truths) if conjunction else disjunction_of(truths)

        return Compiled("truth", evaluate)

    def _not(self, operand: ast.expr, depth: int) -> Compiled:
        part = self._truth(operand, depth).evaluate

        def evaluate(context: EvaluationContext, matched: list[MatchedValue]) -> Truth:
            truth = cast(Truth, part(context, matched))
            return None if truth is None else not truth

        return Compiled("truth", evaluate)


def _dotted(node: ast.expr) -> str | None:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return f"{owner}.{name}"
    return None
