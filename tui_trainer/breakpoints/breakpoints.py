"""The breakpoints of one run: changed from any thread, evaluated on the training thread."""

from __future__ import annotations

import difflib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tui_trainer.breakpoints.evaluation import Reading, Selector, Several, Variable
from tui_trainer.breakpoints.expression import (
    SCALARS,
    ConditionResult,
    Expression,
    ExpressionError,
    parse,
)
from tui_trainer.findings.verdict import LEVEL_ORDER
from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol import Phase, schema
from tui_trainer.protocol.absent import absent_mask, why_absent
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.messages import Breakpoint, BreakpointStop, Finding, Level, NoticeKind
from tui_trainer.protocol.schema import RunInfo

MAX_BREAKPOINTS = 100
COLUMN_OF = {"lr": "learning_rate", "grad_norm": "grad_norm_preclip"}
"""Scalar quantities whose column in table `step` has another name."""
ATTENTION_TABLES = (schema.ATTENTION, schema.ATTENTION_SPECTRUM, schema.ATTENTION_HEALTH)


STEPS_OF_RANKS = 256
"""Steps that are kept to compare processes, and by which one may lag behind."""


class BreakpointError(UserError):
    """An invalid change of breakpoints."""


class LiveStep(Protocol):
    """The step in progress, on the training thread."""

    def finish(self) -> None:
        """Make the records of all completed steps available."""

    def loss(self) -> float | None:
        """The loss of the step so far."""

    def gradient_norms(self) -> tuple[tuple[str, ...], list[float | None]]:
        """The norm of each parameter's gradient before clipping; None where there is none."""

    def clip(self) -> Mapping[str, float]:
        """Columns of table `clip` as far as they are known; empty before the clipping."""


class BreakpointHost(Protocol):
    """The run that breakpoints belong to. Every method may be called on any thread."""

    def info(self) -> RunInfo: ...

    def findings(self) -> Sequence[Finding]:
        """The findings of all completed steps."""

    def notice(self, kind: NoticeKind, text: str, level: Level, step: int) -> None: ...

    def breakpoints_changed(self, breakpoints: Breakpoints) -> None:
        """`phases` or `tables` have changed."""


@dataclass(eq=False)
class _Active:
    """A breakpoint and its compiled condition."""

    number: int
    expression: Expression
    enabled: bool = True
    hits: int = 0
    ignore: int = 0
    once: bool = False
    log_only: bool = False
    fault: str = ""
    met: bool = False
    """Whether the condition was met at the last boundary."""
    logged_before: int = 0
    """How many values had been logged at the last boundary."""
    compared: int | None = None
    """The last step for which the processes were compared."""

    def as_message(self) -> Breakpoint:
        return Breakpoint(
            self.number,
            self.expression.text,
            self.enabled,
            self.hits,
            self.ignore,
            self.once,
            self.log_only,
            self.fault,
        )


class Breakpoints:
    """The breakpoints of one run.

    `reached`, `observe` and `logged` are called on the training thread; the controls, which raise
    BreakpointError, on any.
    """

    def __init__(self, run: BreakpointHost) -> None:
        self.phases: frozenset[Phase] = frozenset()
        """Phases at whose end a condition is evaluated."""
        self.tables: frozenset[str] = frozenset()
        """Tables that conditions read, which have to be measured at every step."""
        self.live: LiveStep | None = None
        self.stop: BreakpointStop | None = None
        """The breakpoint that fired last."""
        self._run = run
        self._lock = threading.Lock()
        self._all: dict[int, _Active] = {}
        self._next = 1
        self._plans: Mapping[Phase, tuple[_Active, ...]] = {}
        self._values = _Values()
        self._ranked = False

    # ------------------------------------------------------------ controls, for any thread

    def list(self) -> tuple[Breakpoint, ...]:
        return tuple(each.as_message() for each in tuple(self._all.values()))

    def add(
        self, condition: str, *, ignore: int = 0, once: bool = False, log_only: bool = False
    ) -> Breakpoint:
        """Add a breakpoint. Raises ExpressionError and BreakpointError."""
        expression = parse(condition)
        self._check_selectors(expression)
        _check_ignore(ignore)
        if expression.findings:
            self._values.known_findings = _levels(self._run.findings())
        with self._lock:
            if len(self._all) >= MAX_BREAKPOINTS:
                raise BreakpointError(f"a run has at most {MAX_BREAKPOINTS} breakpoints")
            active = _Active(self._next, expression, ignore=ignore, once=once, log_only=log_only)
            active.logged_before = self._values.logged_count
            self._next += 1
            self._all = {**self._all, active.number: active}
            self._replan()
        return active.as_message()

    def restore(self, saved: Iterable[Breakpoint]) -> None:
        """Restore the breakpoints of an earlier run, with their hits reset to 0."""
        for each in saved:
            try:
                added = self.add(
                    each.condition, ignore=each.ignore, once=each.once, log_only=each.log_only
                )
            except UserError as error:
                text = f"breakpoint {each.condition} was not restored: {error.message}"
                self._run.notice("breakpoint", text, "warning", 0)
            else:
                if not each.enabled:
                    self.change(added.number, enabled=False)

    def change(
        self,
        number: int,
        *,
        enabled: bool | None = None,
        ignore: int | None = None,
        once: bool | None = None,
        log_only: bool | None = None,
    ) -> Breakpoint:
        """Change fields of a breakpoint; None leaves one as it is. Raises BreakpointError."""
        if ignore is not None:
            _check_ignore(ignore)
        with self._lock:
            active = self._find(number)
            if ignore is not None:  # counted from now on
                active.ignore, active.hits = ignore, 0
            active.once = active.once if once is None else once
            active.log_only = active.log_only if log_only is None else log_only
            if enabled is not None:
                active.enabled, active.fault, active.met = enabled, "", False
                active.logged_before = self._values.logged_count
            self._replan()
            return active.as_message()

    def delete(self, number: int) -> Breakpoint:
        """Raises BreakpointError."""
        with self._lock:
            active = self._find(number)
            self._all = {n: each for n, each in self._all.items() if n != number}
            self._replan()
            return active.as_message()

    def _find(self, number: int) -> _Active:
        if number not in self._all:
            numbers = ", ".join(map(str, self._all))
            hint = f"there are {numbers}" if numbers else "there are none"
            raise BreakpointError(f"there is no breakpoint {number}", hint)
        return self._all[number]

    def _check_selectors(self, expression: Expression) -> None:
        """Raise ExpressionError for selectors that match nothing in the tables known so far."""
        tables = self._run.info().tables
        for quantity, selector, start, end in expression.selectors:
            names = [_names(t.name, [c.name for c in t.columns], quantity)[0]
                     for t in tables if t.name == quantity.table]  # fmt: skip
            if names and not any(_chosen(each, selector, quantity).size for each in names):
                error = _nothing_matches(quantity, selector, [n for each in names for n in each])
                raise ExpressionError(error.message, expression.text, start, end, error.hint)

    def _replan(self) -> None:
        """With the lock held."""
        plans: dict[Phase, list[_Active]] = {}
        for active in self._all.values():
            if active.enabled:
                plans.setdefault(active.expression.phase, []).append(active)
        enabled = [active for some in plans.values() for active in some]
        self._plans = {phase: tuple(some) for phase, some in plans.items()}
        self.phases = frozenset(plans)
        self.tables = frozenset(t for active in enabled for t in active.expression.tables)
        self._ranked = any(active.expression.ranks for active in enabled)
        self._values.keeps_steps = self._ranked
        self._run.breakpoints_changed(self)

    # ------------------------------------------------------------ training thread

    def observe(self, record: StepRecord) -> None:
        """Take the record of a completed step."""
        self._values.observe(record, self._run)

    def logged(self, values: Mapping[str, float], table: str = schema.LOGGED) -> None:
        """Take values that the script has logged, or the results of an evaluation."""
        self._values.log(values, table)

    def observe_rank(self, rank: int, step: int, row: Floats) -> None:
        """Take the row of table `ranks` of another process, on any thread."""
        if self._ranked:
            with self._lock:
                self._values.ranks.setdefault(rank, OrderedDict())[step] = row
                _forget(self._values.ranks[rank])

    def reached(self, phase: Phase, step: int) -> bool:
        """Evaluate the conditions of `phase`; returns whether the run has to pause. Never raises an
        Exception."""
        stop: BreakpointStop | None = None
        fired: list[_Active] = []
        moment = _Moment(phase, step, self._values, self.live, self._run)
        for active in self._plans.get(phase, ()):
            moment.logged_before = active.logged_before
            try:
                outcome = self._evaluate(active, moment)
            except UserError as error:
                hint = f" ({error.hint})" if error.hint else ""
                self._disable(active, f"{error.message}{hint}", step)
                continue
            except Exception as error:
                self._disable(active, f"{type(error).__name__}: {error}", step)
                continue
            active.logged_before = self._values.logged_count
            met_before, active.met = active.met, outcome.met
            if not outcome.met:
                continue
            active.hits += 1
            if active.hits <= active.ignore:
                continue
            fired.append(active)
            place = next((r for r in outcome.readings if r.parameter or r.table), Reading(""))
            hit = BreakpointStop(active.number, active.expression.text, step, phase, outcome.text,
                                 "" if active.expression.ranks else place.parameter,
                                 place.table)  # fmt: skip
            if not active.log_only:
                stop = stop or hit
                self._run.notice("breakpoint", f"paused after {phase} at {hit.reason}", "warning",
                                 step)  # fmt: skip
            elif not met_before:
                self._run.notice("breakpoint", f"{hit.reason}, after {phase}", "info", step)
        moment.end()
        if any(active.once for active in fired):
            with self._lock:
                for active in fired:
                    active.enabled = active.enabled and not active.once
                self._replan()
        if stop is not None:
            self.stop = stop
        return stop is not None

    def _evaluate(self, active: _Active, moment: _Moment) -> ConditionResult:
        if not active.expression.ranks:
            return active.expression.evaluate(moment)
        moment.finish()
        with self._lock:
            last = self._values.last_common_step(moment.step)
            first = moment.step if active.compared is None else active.compared + 1
            active.compared = max(last, first - 1)
            for step in range(max(first, last - STEPS_OF_RANKS), last + 1):
                outcome = active.expression.evaluate(_PastStep(step, self._values))
                if outcome.met:
                    active.compared = step
                    where = Reading(f"at step {step:,}")
                    readings = (
                        outcome.readings if step == moment.step else (*outcome.readings, where)
                    )
                    return ConditionResult(True, readings)
        return ConditionResult(False)

    def _disable(self, active: _Active, why: str, step: int) -> None:
        with self._lock:
            active.enabled, active.fault = False, why
            self._replan()
        text = f"breakpoint {active.number} is disabled: {active.expression.text}: {why}"
        self._run.notice("breakpoint", text, "warning", step)


def _check_ignore(ignore: int) -> None:
    if not 0 <= ignore <= 10**12:
        raise BreakpointError(f"the number of ignored hits must be from 0 to {10**12:,}")


def _levels(findings: Iterable[Finding]) -> dict[int, Level]:
    return {finding.number: finding.level for finding in findings}


# ---------------------------------------------------------------- values


@dataclass(slots=True)
class _Values:
    """The newest completed step, and what has changed with it."""

    record: StepRecord | None = None
    broken: frozenset[str] = frozenset()
    """Quantities that were not finite in the newest step."""
    newly_broken: str = ""
    broken_parameter: str = ""
    broken_within: dict[Phase, bool] = field(default_factory=dict)
    """Phase → whether a value was not finite there in the last step."""
    numbers: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    """Logged values: (table, name) → (count, value)."""
    keeps_steps: bool = False
    """Whether `steps` is kept: a condition compares processes."""
    steps: OrderedDict[int, dict[str, float]] = field(default_factory=OrderedDict)
    """The newest steps of this process: quantities of table `step`."""
    ranks: dict[int, OrderedDict[int, Floats]] = field(default_factory=dict)
    """Rank → step → row of table `ranks`, of the other processes."""
    logged_count: int = 0
    known_findings: dict[int, Level] = field(default_factory=dict)
    tables: dict[int, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    chosen: dict[tuple[Variable, Selector, int], tuple[tuple[str, ...], NDArray[np.intp]]] = field(
        default_factory=dict
    )
    """(names, positions) of the columns that a selector chooses in a table."""

    def observe(self, record: StepRecord, run: BreakpointHost) -> None:
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

    def _keep(self, record: StepRecord, run: BreakpointHost) -> None:
        for number, values in record.rows:
            name, columns = self.table(number, len(values), run)
            if name == schema.STEP:
                self.steps[record.step] = dict(zip(columns, values.tolist(), strict=False))
        _forget(self.steps)

    def last_common_step(self, step: int) -> int:
        """The last step, up to this one, that is known of every process that keeps up."""
        newest = [max(rows) for rows in self.ranks.values() if rows]
        return min([step, *(last for last in newest if step - last < STEPS_OF_RANKS)])

    def table(self, number: int, width: int, run: BreakpointHost) -> tuple[str, tuple[str, ...]]:
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

    def row(self, name: str, run: BreakpointHost) -> tuple[int, tuple[str, ...], Floats] | None:
        """(table, columns, values) of the newest step."""
        for number, values in self.record.rows if self.record is not None else ():
            found, columns = self.table(number, len(values), run)
            if found == name:
                return number, columns, values
        return None


class _Moment:
    """The end of a phase, for `Expression.evaluate`."""

    def __init__(
        self, phase: Phase, step: int, values: _Values, live: LiveStep | None, run: BreakpointHost
    ) -> None:
        self.phase = phase
        self.step = step
        self.logged_before = 0
        self._values = values
        self._live = live
        self._run = run
        self._rows: dict[str, tuple[int, tuple[str, ...], Floats] | None] = {}
        self._finished = False
        self._norms: Several | None = None
        self._broken: Reading | str | None = ""
        self._findings: list[Finding] | None = None

    def end(self) -> None:
        """Called after all conditions of the boundary have been evaluated."""
        if self._findings is not None:
            self._values.known_findings.update(_levels(self._findings))

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

    def several(self, quantity: Variable, selector: Selector) -> Several | None:
        if self.phase != "step":
            norms = self._gradient_norms()
            if norms is None:
                return None
            places = _chosen(norms.names, selector, quantity)
            if not places.size:
                raise _nothing_matches(quantity, selector, norms.names)
            names = tuple(norms.names[place] for place in places)
            return Several(names, norms.values[places], norms.present[places])
        row = self._row(quantity.table)
        if row is None:
            return None
        table, columns, values = row
        chosen = self._values.chosen.get((quantity, selector, table))
        if chosen is None:
            names, positions = _names(quantity.table, columns, quantity)
            places = _chosen(names, selector, quantity)
            if not places.size:
                raise _nothing_matches(quantity, selector, names)
            chosen = tuple(names[place] for place in places), positions[places]
            self._values.chosen[quantity, selector, table] = chosen
        found = values[chosen[1]]
        return Several(chosen[0], found.astype(np.float64), ~absent_mask(found))

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

    def _gradient_norms(self) -> Several | None:
        if self._norms is None and self._live is not None:
            names, norms = self._live.gradient_norms()
            present = np.array([norm is not None for norm in norms], np.bool_)
            values = np.array([math.nan if n is None else n for n in norms], np.float64)
            self._norms = Several(names, values, present)
        return self._norms if self._norms is not None and self._norms.names else None

    # ------------------------------------------------------------ logged values, nan, findings

    def logged(self, table: str, name: str) -> float | None:
        count, value = self._values.numbers.get((table, name), (0, 0.0))
        return value if count > self.logged_before else None

    def nonfinite(self) -> Reading | None:
        if isinstance(self._broken, str):
            self._broken = self._nonfinite_step() if self.phase == "step" else self._nonfinite_now()
        return self._broken

    def _nonfinite_step(self) -> Reading | None:
        self.finish()
        values, record = self._values, self._values.record
        if record is None or record.step != self.step or not values.newly_broken:
            return None
        return Reading(values.newly_broken, values.broken_parameter, schema.GRAD_NORM)

    def _nonfinite_now(self) -> Reading | None:
        found: Reading | None = None
        loss = self._live.loss() if self._live is not None else None
        if loss is not None and not math.isfinite(loss):
            found = Reading(f"loss {loss}", table=schema.STEP)
        elif self.phase in ("backward", "clip") and (norms := self._gradient_norms()) is not None:
            broken = np.flatnonzero(norms.present & ~np.isfinite(norms.values))
            if broken.size:
                name, value = norms.names[broken[0]], norms.values[broken[0]]
                found = Reading(f"gradient {value} in {name}", name, schema.GRAD_NORM)
        before = self._values.broken_within.get(self.phase, False)
        self._values.broken_within[self.phase] = found is not None
        return None if before else found

    def finding(self, part: str, level: Level) -> Reading | None:
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
            if part in finding.rule and LEVEL_ORDER[finding.level] <= LEVEL_ORDER[level]:
                parameter = finding.parameters[0] if finding.parameters else ""
                table = next((each.table for each in finding.evidence if each.table), "")
                return Reading(f"{finding.rule}: {finding.title}", parameter, table)
        return None

    def ranks(self, column: str) -> Several | None:
        return None  # see _PastStep


class _PastStep:
    """The end of a step that every process has ended, for conditions that compare processes."""

    def __init__(self, step: int, values: _Values) -> None:
        self.step = step
        self._values = values

    def number(self, name: str) -> float | None:
        value = self._values.steps.get(self.step, {}).get(COLUMN_OF.get(name, name))
        return None if value is None or why_absent(value) is not None else value

    def ranks(self, column: str) -> Several | None:
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
        return Several(tuple(found), values.astype(np.float64), ~absent_mask(values))

    # The language does not allow the others in such a condition.

    def several(self, quantity: Variable, selector: Selector) -> Several | None:
        return None

    def logged(self, table: str, name: str) -> float | None:
        return None

    def nonfinite(self) -> Reading | None:
        return None

    def finding(self, part: str, level: Level) -> Reading | None:
        return None


def _forget(steps: OrderedDict[int, Any]) -> None:
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


def _names(
    table: str, columns: Sequence[str], quantity: Variable
) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """The columns of a quantity: their names (of parameters, layers or phases) and positions."""
    if table not in ATTENTION_TABLES:
        return tuple(columns), np.arange(len(columns))
    suffix = f".{quantity.name}"
    positions = [i for i, column in enumerate(columns) if column.endswith(suffix)]
    names = tuple(columns[i].removesuffix(suffix) for i in positions)
    return names, np.array(positions, np.intp)


def _chosen(names: Sequence[str], selector: Selector, quantity: Variable) -> NDArray[np.intp]:
    """Positions of the selected names. Layers count from 0: the n-th attention layer, or the first
    number in a parameter's name."""
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


def _nothing_matches(
    quantity: Variable, selector: Selector, names: Sequence[str]
) -> BreakpointError:
    if selector.layer is not None:
        return BreakpointError(f"{quantity.name} has no {selector}")
    pattern = selector.pattern or ""
    near = difflib.get_close_matches(pattern, names, n=2, cutoff=0.3) or list(names[:2])
    hint = f"such as {' or '.join(near)}" if near else ""
    return BreakpointError(f'no column of {quantity.name} matches "{pattern}"', hint)
