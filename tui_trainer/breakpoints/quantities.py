"""The quantities that a condition can name, and their values: those of the newest step, of the step
in progress and, for conditions that compare processes, of past steps."""

from __future__ import annotations

import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tui_trainer.breakpoints.compiled_conditions import (
    ColumnValues,
    ConditionQuantity,
    MatchedValue,
    Selector,
)
from tui_trainer.findings.rules import RULES
from tui_trainer.history.records import Floats, SkipRecord, StepRecord
from tui_trainer.protocol import PHASES, Phase, schema
from tui_trainer.protocol.absent import absent_mask, why_absent
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.events import LEVEL_ORDER, Finding, Level
from tui_trainer.protocol.schema import RunInfo


def _attention(names: Iterable[str], table: str) -> list[ConditionQuantity]:
    text = "of the attention layers: (any), (layer=2) or a pattern"
    return [ConditionQuantity(name, f"{name} {text}", "step", table) for name in names]


SCALARS = {
    quantity.name: quantity
    for quantity in (
        ConditionQuantity("step", "the number of the optimizer step", "data"),
        ConditionQuantity("loss", "the loss of the step", "loss", schema.STEP),
        ConditionQuantity("learning_rate", "the learning rate", "step", schema.STEP),
        ConditionQuantity("lr", "the learning rate", "step", schema.STEP),
        ConditionQuantity(
            "grad_norm", "the norm of all gradients before clipping", "backward", schema.STEP
        ),
        ConditionQuantity(
            "step_ms", "the duration of the step in milliseconds", "step", schema.STEP
        ),
        ConditionQuantity("clip.scale", "the factor that clipping applied", "clip", schema.CLIP),
        ConditionQuantity("clip.max_norm", "the threshold of the clipping", "clip", schema.CLIP),
        ConditionQuantity("clip.norm_before", "the norm before clipping", "clip", schema.CLIP),
        ConditionQuantity("clip.norm_after", "the norm after clipping", "clip", schema.CLIP),
    )
}
"""Quantities of one number."""

COLUMN_QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        ConditionQuantity("grad_norm", "norms of gradients: (any) or a pattern of parameter names",
                 "backward", schema.GRAD_NORM),
        ConditionQuantity("weight_norm", "norms of parameters", "step", schema.WEIGHT_NORM),
        ConditionQuantity("update_ratio", "sizes of updates relative to the weights", "step",
                 schema.UPDATE_RATIO),
        ConditionQuantity(
            "phase_ms", 'milliseconds of a phase: phase_ms("data")', "step", schema.PHASE_MS
        ),
        *_attention(schema.ATTENTION_STATISTICS, schema.ATTENTION),
        *_attention(schema.SPECTRUM_STATISTICS, schema.ATTENTION_SPECTRUM),
        *_attention(schema.HEALTH_STATISTICS, schema.ATTENTION_HEALTH),
    )
}  # fmt: skip
"""Quantities of several columns, called with a selector."""

NONFINITE, FINDING, ANY, RANK = "nonfinite", "finding", "any", "rank"
LOGS = {"log": schema.LOGGED, "logged": schema.LOGGED, "validation": schema.VALIDATION}
"""Functions that read values by name → the table that holds the values."""
RANK_QUANTITIES = {
    "loss": "loss",
    "grad_norm": "grad_norm_preclip",
    "step_ms": "step_ms",
    "lag_ms": "lag_ms",
}
"""Quantity after `rank(1).` → its column in table `ranks`."""
WITH_RANKS = ("step", "loss", "grad_norm", "learning_rate", "lr", "step_ms")
"""Quantities that a condition on ranks can use as well: they are known for past steps."""
EMA, ABS, MINIMUM, MAXIMUM = "ema", "abs", "min", "max"
FUNCTIONS = {
    FINDING: "a new finding, by (part of) the name of its rule",
    "log": "a number that the script logs with tui_trainer.log",
    "logged": "the same as log",
    "validation": "a result of an evaluation, such as its loss",
    RANK: "a quantity of one process, or of any: rank(1).loss, rank(any).grad_norm",
    EMA: "the exponential moving average of a quantity over the previous steps",
    ABS: "the absolute value",
    MINIMUM: "the smallest of numbers, or of several columns",
    MAXIMUM: "the largest of numbers, or of several columns",
}
NAMES = tuple(dict.fromkeys((NONFINITE, *SCALARS, *COLUMN_QUANTITIES, *FUNCTIONS)))
"""All names, for completion."""


def completions(text: str, columns: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """Completions of the last word of `text`: a quantity, a function or a phase; within quotes, a
    rule or a column. `columns`: table → names of its columns."""
    if text.count('"') % 2:
        return _quoted_completions(text, columns or {})
    at = re.search(r"(?:^|\s)at\s+(\w*)$", text)
    if at is not None:
        start, words = at.start(1), [*map(str, PHASES)]
    else:
        word = re.search(r"[A-Za-z_][\w.]*$", text)
        if word is None:
            return []
        start = word.start()
        words = [f"{n}(" if n in FUNCTIONS or (n in COLUMN_QUANTITIES and n not in SCALARS) else n
                 for n in NAMES]  # fmt: skip
        words += [f"{n}(" for n in COLUMN_QUANTITIES if n in SCALARS]
    given = text[start:]
    return [text[:start] + word for word in words if word.startswith(given) and word != given]


def _quoted_completions(text: str, columns: Mapping[str, Sequence[str]]) -> list[str]:
    called = re.search(r'(\w+)\(\s*"([^"]*)$', text)
    if called is None:
        return []
    function, given = called.groups()
    words: Sequence[str]
    if function == FINDING:
        words = [rule.name for rule in RULES]
    else:
        quantity = COLUMN_QUANTITIES.get(function)
        words = columns.get(quantity.table if quantity is not None else LOGS.get(function, ""), ())
    start = called.start(2)
    return [f'{text[:start]}{word}")' for word in words if word.startswith(given)]


COLUMN_OF = {"lr": "learning_rate", "grad_norm": "grad_norm_preclip"}
"""Scalar quantity → its column in table `step`, where the names differ."""
ATTENTION_TABLES = (schema.ATTENTION, schema.ATTENTION_SPECTRUM, schema.ATTENTION_HEALTH)
MAX_LISTED_LAYERS = 8
"""Maximum number of layers in a message."""
STEPS_OF_RANKS = 256
"""Steps that are kept to compare processes, and by which a process may lag behind."""


class LiveStep(Protocol):
    """The step in progress, on the training thread."""

    def finish(self) -> None:
        """Make the records of all completed steps available."""

    def loss(self) -> float | None:
        """The loss of the step so far."""

    def gradient_norms(self) -> tuple[tuple[str, ...], list[float | None]]:
        """(parameter names, norms of their gradients before clipping); None without a gradient."""

    def clip(self) -> Mapping[str, float]:
        """The known columns of table `clip`; empty before the clipping."""


class RecordedRun(Protocol):
    """The run whose values are read. Both methods may be called from any thread."""

    def info(self) -> RunInfo: ...

    def findings(self) -> Sequence[Finding]:
        """The findings of all completed steps."""


@dataclass(slots=True)
class ObservedValues:
    """The newest completed step, and all other values that conditions read."""

    record: StepRecord | None = None
    broken: frozenset[str] = frozenset()
    """Quantities that were not finite in the newest step."""
    newly_broken: str = ""
    broken_parameter: str = ""
    skip: SkipRecord | None = None
    """The newest iteration without a step."""
    broken_within: dict[Phase, bool] = field(default_factory=dict)
    """Phase → whether a value was not finite at its end in the last step."""
    numbers: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    """Logged values: (table, name) → (`logged_count` at the time, value)."""
    keeps_steps: bool = False
    """Whether `steps` is filled, which conditions that compare processes need."""
    steps: OrderedDict[int, dict[str, float]] = field(default_factory=OrderedDict)
    """Newest steps of this process: step → column of table `step` → value."""
    ranks: dict[int, OrderedDict[int, Floats]] = field(default_factory=dict)
    """Newest steps of the other processes: rank → step → row of table `ranks`."""
    logged_count: int = 0
    """Number of calls of `log`."""
    known_findings: dict[int, Level] = field(default_factory=dict)
    tables: dict[int, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    chosen: dict[
        tuple[ConditionQuantity, Selector, int], tuple[tuple[str, ...], NDArray[np.intp]]
    ] = field(default_factory=dict)
    """(quantity, selector, table) → (names, positions) of the selected columns."""

    def observe(self, record: StepRecord, run: RecordedRun) -> None:
        self.record = record
        if self.keeps_steps and not record.optimizer:
            self._keep(record, run)
        before, self.newly_broken, self.broken_parameter = self.broken, "", ""
        if not record.nonfinite and not before:
            return
        self.broken = frozenset(quantity for quantity, *_ in record.nonfinite)
        for quantity, parameter, value, _ in record.nonfinite:
            if quantity not in before:
                where = f" in {parameter}" if parameter else ""
                self.newly_broken = f"{quantity} {value}{where}"
                self.broken_parameter = parameter
                return

    def log(self, values: Mapping[str, float], table: str) -> None:
        self.logged_count += 1
        for name, value in values.items():
            self.numbers[table, name] = (self.logged_count, value)

    def _keep(self, record: StepRecord, run: RecordedRun) -> None:
        for number, values in record.rows:
            name, columns = self.table(number, len(values), run)
            if name == schema.STEP:
                self.steps[record.step] = dict(zip(columns, values.tolist(), strict=False))
        forget_old(self.steps)

    def last_common_step(self, step: int) -> int:
        """The last step up to `step` whose row is known of every process that keeps up."""
        newest = [max(rows) for rows in self.ranks.values() if rows]
        return min([step, *(last for last in newest if step - last < STEPS_OF_RANKS)])

    def table(self, number: int, width: int, run: RecordedRun) -> tuple[str, tuple[str, ...]]:
        """Name and columns of a table."""
        known = self.tables.get(number)
        if known is None or len(known[1]) != width:
            self.chosen.clear()
            self.tables = {
                table.id: (table.name, tuple(column.name for column in table.columns))
                for table in run.info().tables
            }
            known = self.tables.get(number, ("", ()))
        return known

    def row(self, name: str, run: RecordedRun) -> tuple[int, tuple[str, ...], Floats] | None:
        """(id, columns, values) of the table called `name` in the newest step."""
        for number, values in self.record.rows if self.record is not None else ():
            found, columns = self.table(number, len(values), run)
            if found == name:
                return number, columns, values
        return None


class LiveContext:
    """The state of the run at the end of a phase."""

    def __init__(
        self,
        phase: Phase,
        step: int,
        values: ObservedValues,
        live: LiveStep | None,
        run: RecordedRun,
    ) -> None:
        self.phase = phase
        self.step = step
        self.logged_before = 0
        self._values = values
        self._live = live
        self._run = run
        self._rows: dict[str, tuple[int, tuple[str, ...], Floats] | None] = {}
        self._finished = False
        self._norms: ColumnValues | None = None
        self._broken: MatchedValue | str | None = ""
        self._findings: list[Finding] | None = None

    def end(self) -> None:
        """Called after all conditions of the boundary have been evaluated."""
        if self._findings is not None:
            self._values.known_findings.update(levels(self._findings))

    # ------------------------------------------------------------ quantities

    def number(self, name: str) -> float | None:
        if self.phase != "step":
            return self._number_within(name)
        owner, _, column = name.rpartition(".")
        row = self._row(owner or schema.STEP)
        column = column if owner else COLUMN_OF.get(name, name)
        return None if row is None else _present(row, column)

    def _number_within(self, name: str) -> float | None:
        """A quantity of the step in progress."""
        if self._live is None:
            return None
        if name == "loss":
            return self._live.loss()
        if name == "grad_norm":
            norms = self._gradient_norms()
            if norms is None or not norms.present.any():
                return None
            return float(np.sqrt(np.square(norms.values[norms.present]).sum()))
        if name in SCALARS and name.startswith("clip."):
            return self._live.clip().get(name.removeprefix("clip."))
        return None

    def several(self, quantity: ConditionQuantity, selector: Selector) -> ColumnValues | None:
        if self.phase != "step":
            norms = self._gradient_norms()
            if norms is None:
                return None
            places = choose(norms.names, selector, quantity)
            if not places.size:
                raise nothing_matches(quantity, selector, norms.names)
            names = tuple(norms.names[place] for place in places)
            return ColumnValues(names, norms.values[places], norms.present[places])
        row = self._row(quantity.table)
        if row is None:
            return None
        table, columns, values = row
        chosen = self._values.chosen.get((quantity, selector, table))
        if chosen is None:
            names, positions = names_of(quantity.table, columns, quantity)
            places = choose(names, selector, quantity)
            if not places.size:
                raise nothing_matches(quantity, selector, names)
            chosen = tuple(names[place] for place in places), positions[places]
            self._values.chosen[quantity, selector, table] = chosen
        found = values[chosen[1]]
        return ColumnValues(chosen[0], found.astype(np.float64), ~absent_mask(found))

    def _row(self, name: str) -> tuple[int, tuple[str, ...], Floats] | None:
        if name not in self._rows:
            self.finish()
            record = self._values.record
            current = record is not None and record.step == self.step
            self._rows[name] = self._values.row(name, self._run) if current else None
        return self._rows[name]

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            if self._live is not None:
                self._live.finish()

    def _gradient_norms(self) -> ColumnValues | None:
        if self._norms is None and self._live is not None:
            names, norms = self._live.gradient_norms()
            present = np.array([norm is not None for norm in norms], np.bool_)
            values = np.array([math.nan if n is None else n for n in norms], np.float64)
            self._norms = ColumnValues(names, values, present)
        return self._norms if self._norms is not None and self._norms.names else None

    # ------------------------------------------------------------ logged values, nan, findings

    def logged(self, table: str, name: str) -> float | None:
        count, value = self._values.numbers.get((table, name), (0, 0.0))
        return value if count > self.logged_before else None

    def nonfinite(self) -> MatchedValue | None:
        if isinstance(self._broken, str):
            self._broken = self._nonfinite_step() if self.phase == "step" else self._nonfinite_now()
        return self._broken

    def _nonfinite_step(self) -> MatchedValue | None:
        self.finish()
        values, record = self._values, self._values.record
        if record is None or record.step != self.step or not values.newly_broken:
            return None
        return MatchedValue(values.newly_broken, values.broken_parameter, schema.GRAD_NORM)

    def _nonfinite_now(self) -> MatchedValue | None:
        found: MatchedValue | None = None
        loss = self._live.loss() if self._live is not None else None
        if loss is not None and not math.isfinite(loss):
            found = MatchedValue(f"loss {loss}", table=schema.STEP)
        elif self.phase in ("backward", "clip") and (norms := self._gradient_norms()) is not None:
            broken = np.flatnonzero(norms.present & ~np.isfinite(norms.values))
            if broken.size:
                name, value = norms.names[broken[0]], norms.values[broken[0]]
                found = MatchedValue(f"gradient {value} in {name}", name, schema.GRAD_NORM)
        before = self._values.broken_within.get(self.phase, False)
        self._values.broken_within[self.phase] = found is not None
        return None if before else found

    def finding(self, rules: frozenset[str] | None, level: Level) -> MatchedValue | None:
        if self._findings is None:
            self.finish()
            known = self._values.known_findings
            self._findings = [
                finding
                for finding in self._run.findings()
                if finding.number not in known
                or LEVEL_ORDER[finding.level] < LEVEL_ORDER[known[finding.number]]
            ]
        for finding in self._findings:
            named = rules is None or finding.rule in rules
            if named and LEVEL_ORDER[finding.level] <= LEVEL_ORDER[level]:
                parameter = finding.parameters[0] if finding.parameters else ""
                table = next((each.table for each in finding.evidence if each.table), "")
                return MatchedValue(f"{finding.rule}: {finding.title}", parameter, table)
        return None

    def ranks(self, column: str) -> ColumnValues | None:
        return None  # see PastStepContext


class SkippedContext(LiveContext):
    """The state of the run after an iteration that a GradScaler has skipped.

    Measured quantities are absent, and `nonfinite` is met by a loss only: gradients overflow
    regularly while the loss scale is tuned. Findings and logged values are read as after a step.
    """

    def number(self, name: str) -> float | None:
        return None

    def several(self, quantity: ConditionQuantity, selector: Selector) -> ColumnValues | None:
        return None

    def nonfinite(self) -> MatchedValue | None:
        self.finish()
        skip = self._values.skip
        if skip is not None and skip.step == self.step:
            for found in skip.nonfinite:
                if found.quantity == "loss":
                    return MatchedValue(f"loss {found.value}", table=schema.STEP)
        return None


class PastStepContext:
    """The state of the run at the end of a step that every process has ended, for conditions that
    compare processes."""

    def __init__(self, step: int, values: ObservedValues) -> None:
        self.step = step
        self._values = values

    def number(self, name: str) -> float | None:
        value = self._values.steps.get(self.step, {}).get(COLUMN_OF.get(name, name))
        return None if value is None or why_absent(value) is not None else value

    def ranks(self, column: str) -> ColumnValues | None:
        found: dict[str, float] = {}
        own = self._values.steps.get(self.step, {}).get(column)
        if own is not None:
            found["rank 0"] = own
        for rank, rows in sorted(self._values.ranks.items()):
            if self.step in rows:
                found[f"rank {rank}"] = float(rows[self.step][schema.RANK_INDEX[column]])
        if not found:
            return None
        values = np.array(list(found.values()), np.float32)
        return ColumnValues(tuple(found), values.astype(np.float64), ~absent_mask(values))

    # The compiler rejects the following quantities in a condition on ranks.

    def several(self, quantity: ConditionQuantity, selector: Selector) -> ColumnValues | None:
        return None

    def logged(self, table: str, name: str) -> float | None:
        return None

    def nonfinite(self) -> MatchedValue | None:
        return None

    def finding(self, rules: frozenset[str] | None, level: Level) -> MatchedValue | None:
        return None


def forget_old(steps: OrderedDict[int, Any]) -> None:
    while len(steps) > STEPS_OF_RANKS:
        steps.popitem(last=False)


def _present(row: tuple[int, tuple[str, ...], Floats], column: str) -> float | None:
    _, columns, values = row
    try:
        value = float(values[columns.index(column)])
    except (ValueError, IndexError):
        return None
    return None if why_absent(value) is not None else value


# ---------------------------------------------------------------- selecting


def names_of(
    table: str, columns: Sequence[str], quantity: ConditionQuantity
) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """(names, positions) of the columns of a quantity. Names are those of parameters, layers or
    phases."""
    if table not in ATTENTION_TABLES:
        return tuple(columns), np.arange(len(columns))
    suffix = f".{quantity.name}"
    positions = [i for i, column in enumerate(columns) if column.endswith(suffix)]
    names = tuple(columns[i].removesuffix(suffix) for i in positions)
    return names, np.array(positions, np.intp)


def choose(
    names: Sequence[str], selector: Selector, quantity: ConditionQuantity
) -> NDArray[np.intp]:
    """Positions of the selected names. `layer=n` selects the n-th attention layer, from 0, or the
    parameters whose names have n as their first number."""
    if selector.layer is None:
        chosen = [i for i, name in enumerate(names) if selector.matches(name)]
    elif quantity.table in ATTENTION_TABLES:
        chosen = [selector.layer] if selector.layer < len(names) else []
    else:
        number = str(selector.layer)
        chosen = [i for i, name in enumerate(names) if _first_number(name) == number]
    return np.array(chosen, np.intp)


def _first_number(name: str) -> str:
    return next((part for part in name.split(".") if part.isdecimal()), "")


def nothing_matches(
    quantity: ConditionQuantity, selector: Selector, names: Sequence[str]
) -> UserError:
    if selector.layer is not None:
        numbers = [_first_number(name) for name in names]
        if quantity.table in ATTENTION_TABLES:
            numbers = [*map(str, range(len(names)))]
        known = list(dict.fromkeys(filter(None, numbers)))
        few = len(known) <= MAX_LISTED_LAYERS
        words = ", ".join(known if few else [*known[:MAX_LISTED_LAYERS], "…", known[-1]])
        hint = f"its layers are {words}" if known else ""
        return UserError(f"{quantity.name} has no {selector}", hint)
    pattern = selector.pattern or ""
    near = difflib.get_close_matches(pattern, names, n=2, cutoff=0.3) or list(names[:2])
    hint = f"such as {' or '.join(near)}" if near else ""
    return UserError(f'no column of {quantity.name} matches "{pattern}"', hint)


def levels(findings: Iterable[Finding]) -> dict[int, Level]:
    return {finding.number: finding.level for finding in findings}
