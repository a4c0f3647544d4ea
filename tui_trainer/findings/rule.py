"""The base classes of rules, which check the measurements, and the user's settings, which switch
rules off and change thresholds, such as `over-fitting=off,loss-diverges.rise=3`. The rules are
listed in `findings/rules/__init__.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from tui_trainer.findings.observation import LossTrend, Observation, RunFacts, SkippedStep, TableRow
from tui_trainer.history.records import BatchRecord
from tui_trainer.protocol import Phase
from tui_trainer.protocol.events import Confidence, Evidence, Level


@dataclass(frozen=True)
class RuleThreshold:
    """A threshold of a rule, which the user may change."""

    name: str
    """As in `--rules RULE.NAME=VALUE`."""
    default: float
    meaning: str


@dataclass(frozen=True)
class Found:
    """A report of a rule. It replaces an earlier report of the rule with the same `key`."""

    onset: int
    text: str
    level: Level | None = None
    """None: the level of the rule."""
    advice: str = ""
    """What to look at or try; "": the advice of the rule."""
    confidence: Confidence = "likely"
    parameters: tuple[str, ...] = ()
    phase: Phase | Literal[""] = ""
    evidence: tuple[Evidence, ...] = ()
    key: str = ""
    ranks: tuple[int, ...] = ()


class Rule:
    """Base class. The engine creates one instance of each rule per optimizer.

    The texts are also the rule's documentation: `tui-trainer explain NAME` and `docs/findings.md`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """The finding in a few words."""
    level: ClassVar[Level] = "warning"
    needs: ClassVar[str]
    """What has to be measured before the rule can report anything."""
    explanation: ClassVar[str]
    """What the rule tests, and why it matters."""
    advice: ClassVar[str]
    """What to look at or try."""
    source: ClassVar[str]
    """Where the test and its thresholds come from."""
    thresholds: ClassVar[tuple[RuleThreshold, ...]] = ()
    reads: str = ""
    """Attribute of `Observation` that `step` requires: it is not called where that is None or
    empty."""
    unconditional: ClassVar[bool] = False
    """Whether the rule also runs with `--rules off`, unless it is switched off by its name."""
    explained_by: ClassVar[tuple[str, ...]] = ()
    """Rules whose findings can be the cause of this rule's findings, if their onset is not
    later."""
    slack: ClassVar[int] = 10
    """Optimizer steps by which the onset of a cause may be later than that of this effect, since
    quantities are measured at different cadences."""

    exact: ClassVar[bool] = False
    """Whether the onset is exact, because every step measures what the rule reads. Findings of such
    a rule cannot be the cause of an effect that began earlier."""
    reach: ClassVar[int] = 1 << 62
    """Optimizer steps after the onset within which a finding can be the cause of another one."""

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        """`limits`: the values of `thresholds` by name."""
        self.facts = facts
        self.trend = trend
        self.limits = limits
        self.start()

    def start(self) -> None:
        """Set the initial state, when the instance is created."""

    def step(self, seen: Observation) -> Iterable[Found]:
        """Examine a step of this optimizer; `trend` already includes its loss."""
        return ()

    def skipped(self, skipped: SkippedStep) -> Iterable[Found]:
        """Examine an iteration of this optimizer that ended without a step."""
        return ()

    def ranks(self, step: int, rows: Mapping[int, TableRow]) -> Iterable[Found]:
        """Examine one step of all processes of a distributed training, as rank → row. Called for
        the rules of the first optimizer only."""
        return ()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> Iterable[Found]:
        """Examine an evaluation of the task. Called for the rules of the first optimizer only."""
        return ()


@dataclass
class Streak:
    """Counts how many times in a row a condition held, and since which step."""

    count: int = 0
    onset: int = 0

    def add(self, holds: bool, step: int) -> int:
        """Count this step; returns how many times in a row the condition has held."""
        if not holds:
            self.count = 0
        else:
            if not self.count:
                self.onset = step
            self.count += 1
        return self.count


def evidence(
    quantity: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    unit: str = "",
    table: str = "",
    column: str = "",
    text: str = "",
) -> Evidence:
    """A number with its healthy range."""
    finite = value == value and abs(value) != float("inf")
    shown = text or f"{value:.3g}{unit}"
    # Counts become floats too: they are then written alike here and when read from the store.
    known, low, high = (None if x is None else float(x) for x in (value, low, high))
    return Evidence(quantity, shown, known if finite else None, low, high, table, column)


class SignRule(Rule):
    """Base class of rules that report a sign seen at `thresholds["steps"]` steps in a row."""

    sign: ClassVar[str]
    """The sign in `Observation.signs`."""
    problem: ClassVar[str]
    """What is wrong, as the rest of a sentence that begins with `since step N`."""
    counted: ClassVar[str]
    """Name of the evidence: the kind of steps that are counted."""
    phase: ClassVar[Phase]

    reads = "signs"

    def start(self) -> None:
        self._streak = Streak()
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported:
            return
        count = self._streak.add(self.sign in seen.signs, seen.step)
        self.reads = "" if count else "signs"  # a step without any sign ends a streak
        if count < self.limits["steps"]:
            return
        self._reported = True
        yield Found(
            self._streak.onset,
            f"since step {self._streak.onset:,} {self.problem}",
            confidence="certain",
            phase=self.phase,
            evidence=(evidence(self.counted, count, high=0, text=str(count)),),
        )


class BatchRule(Rule):
    """Base class of rules that check the inputs and targets of batches and report once."""

    reads = "batch"

    def start(self) -> None:
        self.streak = Streak()
        self.done = False
        """Whether further batches are ignored."""

    def step(self, seen: Observation) -> Iterable[Found]:
        return () if self.done or seen.batch is None else self.batch(seen, seen.batch)

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        """Examine a step whose batch was recorded. Not called once the rule is `done`."""
        raise NotImplementedError

    def persists(self, wrong: bool, step: int) -> bool:
        """Count a measured step. Returns True and sets `done` once `wrong` has held at
        `thresholds["steps"]` measured steps in a row."""
        self.done = self.streak.add(wrong, step) >= self.limits["steps"]
        return self.done


def median_of(values: ArrayLike) -> float:
    """The median; nan without values. `np.median` imports numpy.ma and takes ten times as long for
    a few numbers."""
    ordered = np.sort(values)
    middle = len(ordered) // 2
    if not len(ordered):
        return math.nan
    return float(ordered[middle] if len(ordered) % 2 else ordered[middle - 1 : middle + 1].mean())


def named(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 4 more`"""
    listed = list(names)
    text = ", ".join(listed[:most])
    return text if len(listed) <= most else f"{text} and {len(listed) - most} more"


OFF_WORDS = ("off", "no", "false", "0")
ON_WORDS = ("on", "yes", "true", "1")


class SettingsError(ValueError):
    """A setting that cannot be parsed. `known`: the valid names."""

    def __init__(self, message: str, given: str = "", known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.given = given
        self.known = tuple(known)


@dataclass(frozen=True)
class RuleSettings:
    """Changes to the rules' defaults."""

    enabled: bool = True
    switches: Mapping[str, bool] = field(default_factory=dict)
    """Rule name → whether it runs, where that differs from `enabled`."""
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Rule name → threshold name → value."""

    def runs(self, rule: type[Rule]) -> bool:
        return self.switches.get(rule.name, self.enabled or rule.unconditional)

    def limits_of(self, rule: type[Rule]) -> dict[str, float]:
        changed = self.limits.get(rule.name, {})
        return {each.name: changed.get(each.name, each.default) for each in rule.thresholds}


def known_settings(text: str, rules: Iterable[type[Rule]]) -> RuleSettings:
    """Like `parse_settings`, but with the defaults for a text that only another version can
    parse."""
    try:
        return parse_settings(text, rules)
    except SettingsError:
        return RuleSettings()


def parse_settings(text: str, rules: Iterable[type[Rule]]) -> RuleSettings:
    """Settings from comma-separated `off`, `RULE=off`, `RULE=on` and `RULE.THRESHOLD=NUMBER`.

    Raises SettingsError.
    """
    known = {rule.name: rule for rule in rules}
    enabled = True
    switches: dict[str, bool] = {}
    limits: dict[str, dict[str, float]] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        left, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and left in (*OFF_WORDS, "none", *ON_WORDS, "all"):
            enabled = left in (*ON_WORDS, "all")
            continue
        name, dot, threshold = left.partition(".")
        if name not in known:
            raise SettingsError(f"there is no rule {name}", name, known)
        if not dot:
            if not equals or value.lower() not in (*OFF_WORDS, *ON_WORDS):
                raise SettingsError(f"{name} can be on or off, not {value or 'nothing'}")
            switches[name] = value.lower() in ON_WORDS
            continue
        names = [each.name for each in known[name].thresholds]
        if threshold not in names:
            raise SettingsError(f"{name} has no threshold {threshold}", threshold, names)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise SettingsError(f"{left} needs a number, not {value or 'nothing'}")
        limits.setdefault(name, {})[threshold] = number
    return RuleSettings(enabled, switches, limits)
