"""The breakpoints of one run: changed from any thread, evaluated on the training thread."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from tui_trainer.breakpoints.compiled_conditions import MatchedValue
from tui_trainer.breakpoints.expression import (
    ConditionResult,
    Expression,
    ExpressionError,
    parse,
)
from tui_trainer.breakpoints.quantities import (
    STEPS_OF_RANKS,
    LiveContext,
    LiveStep,
    ObservedValues,
    PastStepContext,
    RecordedRun,
    SkippedContext,
    choose,
    forget_old,
    levels,
    names_of,
    nothing_matches,
)
from tui_trainer.history.records import Floats, SkipRecord, StepRecord
from tui_trainer.protocol import Phase, schema
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.events import Level, NoticeKind
from tui_trainer.protocol.messages import Breakpoint, BreakpointStop

MAX_BREAKPOINTS = 100
EVALUATIONS_BEFORE_WARNING = 10
"""Evaluations after which the log names the tables that a condition reads and the run lacks."""


class BreakpointError(UserError):
    """An invalid change of breakpoints."""


class BreakpointHost(RecordedRun, Protocol):
    """The run that breakpoints belong to. Every method may be called from any thread."""

    def notice(self, kind: NoticeKind, text: str, level: Level, step: int) -> None: ...

    def breakpoints_changed(self, breakpoints: Breakpoints) -> None:
        """Called after `phases`, `tables` or `steps` have changed."""


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
    evaluations: int = 0
    """Number of evaluations, counted up to EVALUATIONS_BEFORE_WARNING."""

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

    The training thread calls `reached`, `skipped`, `observe` and `logged`. Any thread may call the
    controls, which raise BreakpointError.
    """

    def __init__(self, run: BreakpointHost) -> None:
        self.phases: frozenset[Phase] = frozenset()
        """Phases at whose end some condition is evaluated."""
        self.tables: frozenset[str] = frozenset()
        """Tables that conditions read and that therefore have to be measured at every step."""
        self.steps: frozenset[int] = frozenset()
        """Every N of a condition `step == N` that pauses the run."""
        self.live: LiveStep | None = None
        self.stop: BreakpointStop | None = None
        """The breakpoint that fired last."""
        self._run = run
        self._lock = threading.Lock()
        self._all: dict[int, _Active] = {}
        self._next = 1
        self._plans: Mapping[Phase, tuple[_Active, ...]] = {}
        self._values = ObservedValues()
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
        # Only the ranks of a launcher send their steps, not processes that a script starts.
        expression.check_ranks(sum(not each.label for each in self._run.info().processes))
        _check_ignore(ignore)
        if expression.findings:
            self._values.known_findings = levels(self._run.findings())
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
                hint = f" ({error.hint})" if error.hint else ""
                text = f"breakpoint {each.condition} was not set: {error.message}{hint}"
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
        """Change fields of a breakpoint; None leaves a field as it is. Raises BreakpointError."""
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
            names = [names_of(t.name, [c.name for c in t.columns], quantity)[0]
                     for t in tables if t.name == quantity.table]  # fmt: skip
            if names and not any(choose(each, selector, quantity).size for each in names):
                error = nothing_matches(quantity, selector, [n for each in names for n in each])
                raise ExpressionError(error.message, expression.text, start, end, error.hint)

    def _replan(self) -> None:
        """Derive the plans and the public sets from the enabled breakpoints. Needs the lock."""
        plans: dict[Phase, list[_Active]] = {}
        for active in self._all.values():
            if active.enabled:
                plans.setdefault(active.expression.phase, []).append(active)
        enabled = [active for some in plans.values() for active in some]
        self._plans = {phase: tuple(some) for phase, some in plans.items()}
        self.phases = frozenset(plans)
        self.tables = frozenset(t for active in enabled for t in active.expression.tables)
        at_steps = (active.expression.at_step for active in enabled if not active.log_only)
        self.steps = frozenset(step for step in at_steps if step is not None)
        self._ranked = any(active.expression.ranks for active in enabled)
        self._values.keeps_steps = self._ranked
        self._run.breakpoints_changed(self)

    # ------------------------------------------------------------ training thread

    def observe(self, record: StepRecord) -> None:
        """Take the record of a completed step."""
        self._values.observe(record, self._run)

    def observe_skip(self, record: SkipRecord) -> None:
        """Take the record of an iteration without a step."""
        self._values.skip = record

    def logged(self, values: Mapping[str, float], table: str = schema.LOGGED) -> None:
        """Take values that the script has logged, or the metrics of a validation."""
        self._values.log(values, table)

    def observe_rank(self, rank: int, step: int, row: Floats) -> None:
        """Take a row of another process's table `ranks`. May be called from any thread."""
        if self._ranked:
            with self._lock:
                self._values.ranks.setdefault(rank, OrderedDict())[step] = row
                forget_old(self._values.ranks[rank])

    def reached(self, phase: Phase, step: int) -> bool:
        """Evaluate the conditions of `phase` and return whether the run has to pause. Never raises
        an Exception."""
        context = LiveContext(phase, step, self._values, self.live, self._run)
        return self._check(self._plans.get(phase, ()), context, phase, step)

    def skipped(self, phase: Phase, step: int) -> bool:
        """Evaluate the end-of-step conditions that an iteration skipped by a GradScaler can meet.

        `phase` is the last phase of the iteration. Returns whether the run has to pause.
        """
        active = [each for each in self._plans.get("step", ()) if each.expression.skips]
        if not active:
            return False
        context = SkippedContext("step", step, self._values, self.live, self._run)
        return self._check(active, context, phase, step, "GradScaler skipped this iteration")

    def _check(
        self,
        conditions: Iterable[_Active],
        context: LiveContext,
        phase: Phase,
        step: int,
        remark: str = "",
    ) -> bool:
        """Evaluate `conditions` and return whether one of them pauses the run.

        `remark` follows the values in the reason of a hit.
        """
        stop: BreakpointStop | None = None
        fired: list[_Active] = []
        for active in conditions:
            context.logged_before = active.logged_before
            try:
                outcome = self._evaluate(active, context)
            except UserError as error:
                hint = f" ({error.hint})" if error.hint else ""
                self._disable(active, f"{error.message}{hint}", step)
                continue
            except Exception as error:
                self._disable(active, f"{type(error).__name__}: {error}", step)
                continue
            active.logged_before = self._values.logged_count
            if active.evaluations < EVALUATIONS_BEFORE_WARNING:
                active.evaluations += 1
                if active.evaluations == EVALUATIONS_BEFORE_WARNING:
                    self._report_missing_tables(active, step)
            met_before, active.met = active.met, outcome.met
            if not outcome.met:
                continue
            active.hits += 1
            if active.hits <= active.ignore:
                continue
            fired.append(active)
            place = next((r for r in outcome.matched if r.parameter or r.table), MatchedValue(""))
            values = "; ".join(filter(None, (outcome.text, remark)))
            hit = BreakpointStop(active.number, active.expression.text, step, phase, values,
                                 "" if active.expression.ranks else place.parameter,
                                 place.table)  # fmt: skip
            if not active.log_only:
                stop = stop or hit
                self._run.notice("breakpoint", f"paused after {phase} at {hit.reason}", "warning",
                                 step)  # fmt: skip
            elif not met_before:
                self._run.notice("breakpoint", f"{hit.reason}, after {phase}", "info", step)
        context.end()
        if any(active.once for active in fired):
            with self._lock:
                for active in fired:
                    active.enabled = active.enabled and not active.once
                self._replan()
        if stop is not None:
            self.stop = stop
        return stop is not None

    def _report_missing_tables(self, active: _Active, step: int) -> None:
        """Warn of a condition on tables that the run lacks, such as those of attention.

        The breakpoint stays enabled: the script may still build a model that has them.
        """
        existing = {table.name for table in self._run.info().tables}
        missing = active.expression.tables - existing - {schema.LOGGED, schema.VALIDATION}
        if missing:
            names = " and ".join(sorted(name.replace("_", " ") for name in missing))
            text = f"breakpoint {active.number} waits: this run has measured no {names} so far"
            self._run.notice("breakpoint", f"{text}: {active.expression.text}", "warning", step)

    def _evaluate(self, active: _Active, context: LiveContext) -> ConditionResult:
        if not active.expression.ranks:
            return active.expression.evaluate(context)
        context.finish()
        with self._lock:
            last = self._values.last_common_step(context.step)
            first = context.step if active.compared is None else active.compared + 1
            active.compared = max(last, first - 1)
            for step in range(max(first, last - STEPS_OF_RANKS), last + 1):
                outcome = active.expression.evaluate(PastStepContext(step, self._values))
                if outcome.met:
                    active.compared = step
                    where = MatchedValue(f"at step {step:,}")
                    matched = outcome.matched if step == context.step else (*outcome.matched, where)
                    return ConditionResult(True, matched)
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
