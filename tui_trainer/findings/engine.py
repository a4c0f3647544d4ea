"""Evaluates the rules after every step and turns their reports into findings.

Runs on the recorder's thread. A rule that raises an exception is switched off and reported once;
the training is not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from tui_trainer.findings.observation import LossTrend, Reader, TableRow
from tui_trainer.findings.rule import Found, Rule, RuleSettings
from tui_trainer.findings.rules import RULES
from tui_trainer.findings.rules.nonfinite import origin_text
from tui_trainer.history.records import Floats, Producer, SkipRecord, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.events import LEVEL_ORDER, Finding, Level
from tui_trainer.protocol.schema import RunInfo

MAX_FINDINGS = 200
MAX_RANK_STEPS = 64
"""Maximum number of steps that wait for the rows of further ranks."""
MAX_UPDATES = 5
"""How many times the text of a finding may change at the same level."""


NOTHING: tuple[object, ...] = (None, (), frozenset())
"""Values of an attribute of `Observation` that was not measured or is empty."""


def _ignore(text: str) -> None:
    pass


class _OptimizerRules:
    """The rules of one optimizer."""

    def __init__(self, rules: Sequence[Rule], trend: LossTrend) -> None:
        self.trend = trend
        self.steps = 0
        self.rules = list(rules)
        self.on_step = [rule for rule in rules if type(rule).step is not Rule.step]
        self.reads = {rule.reads for rule in self.on_step if rule.reads}
        self.on_skip = [rule for rule in rules if type(rule).skipped is not Rule.skipped]
        self.on_evaluation = [
            rule for rule in rules if type(rule).evaluation is not Rule.evaluation
        ]
        self.on_ranks = [rule for rule in rules if type(rule).ranks is not Rule.ranks]

    def drop(self, rule: Rule) -> None:
        for rules in (
            self.rules,
            self.on_step,
            self.on_skip,
            self.on_evaluation,
            self.on_ranks,
        ):
            if rule in rules:
                rules.remove(rule)


class FindingsEngine:
    """The findings of one run."""

    def __init__(
        self,
        settings: RuleSettings | None = None,
        on_fault: Callable[[str], None] = _ignore,
        rules: Sequence[type[Rule]] = RULES,
    ) -> None:
        """`on_fault(text)` is called when a rule has raised an exception and is switched off."""
        self._settings = settings or RuleSettings()
        self._on_fault = on_fault
        self._kinds = [rule for rule in rules if self._settings.runs(rule)]
        self._explained_by = {rule.name: frozenset(rule.explained_by) for rule in rules}
        self._slack = {rule.name: rule.slack for rule in rules}
        self._reach = {rule.name: rule.reach for rule in rules}
        self._exact = {rule.name for rule in rules if rule.exact}
        self._reader = Reader()
        self._by_optimizer: dict[str, _OptimizerRules] = {}
        self._rank_rows: dict[int, dict[int, TableRow]] = {}
        """Step → rank → row, of the steps that still lack the row of some rank."""
        self._failed: set[str] = set()
        self.findings: list[Finding] = []
        """Findings by number, each as it was last reported."""
        self._own_levels: list[Level] = []
        """The level of each finding without its effects."""
        self._numbers: dict[tuple[str, str, str], int] = {}
        self._updates: dict[int, int] = {}

    def describe(self, info: RunInfo) -> None:
        """Take the run's description, at the start and whenever it changes."""
        self._reader.update(info)

    @staticmethod
    def origin(producer: Producer) -> str:
        """The origin of a non-finite value, as a part of a sentence."""
        return origin_text(producer)

    def step(self, record: StepRecord) -> list[Finding]:
        """Evaluate the rules for a step and return new and changed findings, without ids."""
        if not self._kinds:
            return []
        seen = self._reader.observe(record)
        active = self._rules_of(record.optimizer)
        if "new_parameters" in record.signs and active.steps:
            del self._by_optimizer[record.optimizer]
            active = self._rules_of(record.optimizer)
        active.steps += 1
        if seen.loss is not None:
            active.trend.add(seen.step, seen.loss)
        reports: list[tuple[Rule, Found]] = []
        missing = {name for name in active.reads if getattr(seen, name) in NOTHING}
        for rule in tuple(active.on_step):
            if rule.reads in missing:
                continue
            try:
                found = list(rule.step(seen))
            except Exception as error:
                self._switch_off(rule, error)
            else:
                if found:
                    reports += [(rule, each) for each in found]
        return self._publish(reports, record.step, record.time, record.optimizer) if reports else []

    def skipped(self, record: SkipRecord) -> list[Finding]:
        """Evaluate the rules for an iteration without a step."""
        if not self._kinds:
            return []
        active = self._rules_of(record.optimizer)
        skipped = self._reader.observe_skip(record)
        reports: list[tuple[Rule, Found]] = []
        for rule in tuple(active.on_skip):
            self._call(rule, rule.skipped, reports, skipped)
        return self._publish(reports, record.step, record.time, record.optimizer) if reports else []

    def row(self, table: int, step: int, values: Floats, time: float) -> list[Finding]:
        """Evaluate the rules for a row measured outside a step: an evaluation, or the row of a rank
        that completes those of a step. Rows of other tables are ignored."""
        name, columns = self._reader.table(table)
        rank = self._reader.rank_of(table)
        if name == schema.RANKS and rank is not None:
            return self._rank_row(rank, step, TableRow(name, columns, values), time)
        if name != schema.VALIDATION or not self._by_optimizer:
            return []
        metrics = {
            column: value
            for column, value in zip(columns, values.tolist(), strict=False)
            if why_absent(value) is None
        }
        key, active = next(iter(self._by_optimizer.items()))
        reports: list[tuple[Rule, Found]] = []
        for rule in tuple(active.on_evaluation):
            self._call(rule, rule.evaluation, reports, step, metrics)
        return self._publish(reports, step, time, key) if reports else []

    def _rank_row(self, rank: int, step: int, row: TableRow, time: float) -> list[Finding]:
        count = self._reader.facts.ranks
        if count < 2:
            return []
        rows = self._rank_rows.setdefault(step, {})
        rows[rank] = row
        if len(rows) < count:
            if len(self._rank_rows) > MAX_RANK_STEPS:
                del self._rank_rows[min(self._rank_rows)]
            return []
        del self._rank_rows[step]
        key = next(iter(self._by_optimizer), "")
        active = self._rules_of(key)
        reports: list[tuple[Rule, Found]] = []
        for rule in tuple(active.on_ranks):
            self._call(rule, rule.ranks, reports, step, rows)
        return self._publish(reports, step, time, key) if reports else []

    # ------------------------------------------------------------ rules

    def _rules_of(self, optimizer: str) -> _OptimizerRules:
        active = self._by_optimizer.get(optimizer)
        if active is None:
            trend = LossTrend()
            facts, settings = self._reader.facts, self._settings
            rules = [
                kind(facts, trend, settings.limits_of(kind))
                for kind in self._kinds
                if kind.name not in self._failed
            ]
            active = self._by_optimizer[optimizer] = _OptimizerRules(rules, trend)
        return active

    def _call(
        self,
        rule: Rule,
        method: Callable[..., Iterable[Found]],
        reports: list[tuple[Rule, Found]],
        *arguments: object,
    ) -> None:
        try:
            reports += [(rule, found) for found in method(*arguments)]
        except Exception as error:
            self._switch_off(rule, error)

    def _switch_off(self, rule: Rule, error: Exception) -> None:
        self._failed.add(rule.name)
        for active in self._by_optimizer.values():
            for each in [each for each in active.rules if each.name == rule.name]:
                active.drop(each)
        self._on_fault(f"rule {rule.name} is switched off: {type(error).__name__}: {error}")

    # ------------------------------------------------------------ findings

    def _publish(
        self, reports: list[tuple[Rule, Found]], step: int, time: float, optimizer: str
    ) -> list[Finding]:
        changed: dict[int, Finding] = {}
        for rule, found in reports:
            finding = self._finding(rule, found, step, time, optimizer)
            if finding is not None:
                self._set(finding, changed)
        for number in list(changed):
            self._link(self.findings[number], changed, step, time)
        self._raise_levels(changed, step, time)
        return list(changed.values())

    def _finding(
        self, rule: Rule, found: Found, step: int, time: float, optimizer: str
    ) -> Finding | None:
        """The new or replaced finding; None where nothing has changed or there are too many."""
        key = (rule.name, optimizer, found.key)
        number = self._numbers.get(key)
        if number is None:
            if len(self.findings) >= MAX_FINDINGS:
                return None
            number = self._numbers[key] = len(self.findings)
        finding = Finding(
            id=0,
            step=step,
            time=time,
            number=number,
            rule=rule.name,
            level=found.level or rule.level,
            onset=found.onset,
            title=rule.title,
            text=found.text,
            advice=found.advice or rule.advice,
            confidence=found.confidence,
            parameters=found.parameters,
            phase=found.phase,
            optimizer=optimizer,
            evidence=found.evidence,
            ranks=found.ranks,
        )
        if number == len(self.findings):
            self._own_levels.append(finding.level)
            return finding
        known, level = self.findings[number], self._own_levels[number]
        if (known.text, level) == (finding.text, finding.level):
            return None
        updates = self._updates[number] = self._updates.get(number, 0) + 1
        if updates > MAX_UPDATES and finding.level == level:
            return None
        self._own_levels[number] = finding.level
        return msgspec.structs.replace(finding, cause=known.cause)

    def _set(self, finding: Finding, changed: dict[int, Finding]) -> None:
        if finding.number == len(self.findings):
            self.findings.append(finding)
        else:
            self.findings[finding.number] = finding
        changed[finding.number] = finding

    def _link(self, new: Finding, changed: dict[int, Finding], step: int, time: float) -> None:
        """Find the cause of a finding, and the findings of which it is the cause."""
        for other in tuple(self.findings):
            if other.number == new.number:
                continue
            if new.cause is None and self._explains(other, new) and other.cause != new.number:
                root = other.number if other.cause is None else other.cause
                new = msgspec.structs.replace(new, cause=root)
                self._set(new, changed)
            elif other.cause is None and self._explains(new, other):
                root = new.number if new.cause is None else new.cause
                if root != other.number:
                    effect = msgspec.structs.replace(other, cause=root, step=step, time=time)
                    self._set(effect, changed)
                    self._move_effects(effect, changed, step, time)
        self._move_effects(new, changed, step, time)

    def _move_effects(
        self, finding: Finding, changed: dict[int, Finding], step: int, time: float
    ) -> None:
        """Attribute the effects of a finding that has a cause itself to the root cause."""
        cause = finding.cause
        if cause is None:
            return
        for other in tuple(self.findings):
            if other.cause == finding.number and other.number != cause:
                moved = msgspec.structs.replace(other, cause=cause, step=step, time=time)
                self._set(moved, changed)

    def _raise_levels(self, changed: dict[int, Finding], step: int, time: float) -> None:
        """Give each cause the worst level among itself and its effects: where only causes are
        shown, a warning must not hide an error."""
        levels = list(self._own_levels)
        for finding in self.findings:
            if finding.cause is not None:
                own, cause = self._own_levels[finding.number], finding.cause
                levels[cause] = min(levels[cause], own, key=LEVEL_ORDER.__getitem__)
        for finding, level in zip(tuple(self.findings), levels, strict=True):
            if finding.level != level:
                raised = msgspec.structs.replace(finding, level=level, step=step, time=time)
                self._set(raised, changed)

    def _explains(self, cause: Finding, effect: Finding) -> bool:
        slack = 0 if cause.rule in self._exact else self._slack[effect.rule]
        return (
            cause.rule in self._explained_by.get(effect.rule, ())
            and cause.onset <= effect.onset + slack
            and effect.onset <= cause.onset + self._reach[cause.rule]
            and cause.level != "info"
        )
