"""Adaptive sampling: the active probes of an optimizer, with their cadences and costs, and the
governor that keeps the overhead within a budget by measuring expensive quantities less often.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from tui_trainer.protocol.events import Level
from tui_trainer.protocol.formatting import cadence, milliseconds, percent
from tui_trainer.protocol.schema import Table
from tui_trainer.trace.probe import Probe, Readings

STEP_HOOKS = (
    "before_forward",
    "after_forward",
    "model_called",
    "loss_called",
    "gradients",
    "gradient_norms",
    "before_update",
    "after_update",
)
"""The hooks of a probe that are called in the course of a step; each is optional."""
NEVER_STRETCHED = 100
"""Importance from which a cadence is never stretched."""
LIMITS = (32, 256, 1024)
"""Maximum stretches of a probe, in turn, before more important ones are stretched further."""
WATCHED_LIMIT = 16
"""Maximum stretch of a watched probe, as a multiple of its cadence while watched."""


@dataclass(eq=False, kw_only=True)
class ActiveProbe:
    """A probe of one optimizer, with its tables, its cadence and its cost."""

    probe: Probe
    tables: list[Table]
    name: str
    natural: int
    """Natural cadence in steps; 0: measured only while watched."""
    every: int
    """Cadence while not watched: the natural one times a power of two."""
    importance: int
    max_stretch: int = LIMITS[-1]
    """Largest factor by which the natural cadence may be stretched."""
    watched_natural: int = 0
    """Natural cadence while watched; 0: watching makes no difference."""
    watched_every: int = 0
    """Cadence while watched: `watched_natural` times a power of two."""
    watched: bool = False
    """Whether a viewer watches the probe and watching makes a difference."""
    with_clipping: bool = False
    """Whether every step is measured at present, whatever the budget, from norms that clipping
    computes."""
    cost_ms: float = math.nan
    """Smoothed cost of one measurement."""
    failed: bool = False
    """Whether the probe raised an exception and is no longer called."""
    readings: list[Readings] = field(default_factory=list)
    spent_s: float = 0.0
    """Time on the training thread in this step."""
    needed: bool = False
    """Whether a breakpoint reads one of its tables, so that it measures every step."""

    def __post_init__(self) -> None:
        kind = type(self.probe)
        self.hooks = frozenset(
            name for name in STEP_HOOKS if getattr(kind, name) is not getattr(Probe, name)
        )
        """Hooks that the probe implements; the others need not be called."""
        self.rows = self.probe.rows
        self.owns_readings = kind.owns_readings

    @property
    def now(self) -> int:
        """The current cadence; 0: not measured."""
        return self.watched_every if self.watched else self.every

    @now.setter
    def now(self, every: int) -> None:
        if self.watched:
            self.watched_every = every
        else:
            self.every = every

    @property
    def unstretched(self) -> int:
        """The current cadence if nothing were stretched."""
        return self.watched_natural if self.watched else self.natural

    @property
    def longest(self) -> int:
        """The longest cadence that the probe may have now."""
        return self.unstretched * (WATCHED_LIMIT if self.watched else self.max_stretch)

    def mean_ms(self, every: int | None = None) -> float:
        """Mean cost per step at a cadence (default: the current one)."""
        every = self.now if every is None else every
        return self.cost_ms / every if every and not math.isnan(self.cost_ms) else 0.0

    @property
    def fixed(self) -> bool:
        """Whether its cadence cannot be stretched at present."""
        return self.with_clipping or self.importance >= NEVER_STRETCHED


_IS_WATCHED = attrgetter("watched")

WINDOW = 32
"""Steps between two decisions."""
EARLIEST = 4
"""Steps before a decision that does not wait for the end of its window, because the budget of the
whole window has been spent."""
WARM_UP = 5
"""First steps, which are slow in every way and do not count."""
MIN_ROOM = 0.1
"""Share of the budget for probes that can be stretched, even where fixed costs alone exceed the
budget (very short steps), so that something is always measured."""
RESTORE_BELOW = 0.7
"""A cadence is restored only where the prediction stays below this share of the room, so that
cadences do not oscillate."""
MIN_MEASUREMENTS = 4
"""Minimum number of measurements, among the steps so far, of a probe with `often_in_short_runs`."""

OnChange = Callable[[Sequence[ActiveProbe], str, Level], None]
"""Called with the probes whose cadence has changed, a sentence for the log and its level."""


class Governor:
    """Stretches and restores the cadences of one optimizer's probes.

    `budget` is a share of step time.
    """

    def __init__(self, budget: float, on_change: OnChange) -> None:
        self.budget = budget
        self._on_change = on_change
        self._steps = 0
        self._step_ms: deque[float] = deque(maxlen=WINDOW)
        self._fixed_ms: deque[float] = deque(maxlen=WINDOW)
        """Cost of what cannot be stretched, in each of the last steps."""
        self._since_decision = 0
        self._spent_ms = 0.0
        """Cost of the probes that can be stretched, since the last decision."""
        self._watched: tuple[ActiveProbe, ...] = ()
        self._before_watching: dict[ActiveProbe, int] = {}
        """Cadences from before anything was watched."""
        self._windows_over = 0
        self._reported = False
        self._reported_slower: set[str] = set()
        """Probes whose longer cadence has been logged."""

    def step(
        self, probes: Sequence[ActiveProbe], own_ms: Mapping[str, float], step_ms: float
    ) -> bool:
        """A step took `step_ms`, of which our overhead was `own_ms` (by probe).

        `probes` are all that may be stretched; those that have measured the step are in `own_ms`.
        Returns whether cadences may have changed.
        """
        changed = self._follow_watching(probes)
        self._steps += 1
        if self._steps <= WARM_UP:
            return changed
        stretched_ms = 0.0
        for probe in probes:
            spent = own_ms.get(probe.name)
            if spent is None:  # it has not measured this step
                continue
            if not probe.with_clipping:
                stretched_ms += spent
            # Smoothed, and limited so that one hiccup of the machine counts little.
            known = probe.cost_ms
            probe.cost_ms = (
                spent if known != known else known + 0.2 * (min(spent, 3 * known) - known)
            )
        self._spent_ms += stretched_ms
        self._fixed_ms.append(sum(own_ms.values()) - stretched_ms)
        self._step_ms.append(step_ms)
        self._since_decision += 1
        complete = self._since_decision >= WINDOW
        if not (complete or self._overspent()):
            return changed
        if self.budget > 0:
            self._decide(probes, complete)
        self._since_decision, self._spent_ms = 0, 0.0
        return True

    def _overspent(self) -> bool:
        """Whether the budget of the whole window has been spent."""
        if self.budget <= 0 or len(self._step_ms) < EARLIEST:
            return False
        affordable = self._spent_ms / (self.budget * WINDOW)
        return affordable > min(self._step_ms) and affordable > statistics.median(self._step_ms)

    def _decide(self, probes: Sequence[ActiveProbe], complete: bool) -> None:
        # The median: a step that waited for data or another program does not enlarge the budget.
        step_ms = statistics.median(self._step_ms)
        allowed = self.budget * step_ms
        fixed = statistics.fmean(self._fixed_ms)
        for probe in probes:
            if probe.with_clipping and probe.every != probe.natural:
                probe.every = probe.natural
                text = f"{probe.name} is measured at every step that clips gradients"
                self._on_change([probe], text, "info")
        stretchable = [probe for probe in probes if probe.unstretched and not probe.fixed]
        least = sum(probe.mean_ms(probe.longest) for probe in stretchable)
        room = max(allowed - fixed, least + MIN_ROOM * allowed)
        total = sum(probe.mean_ms() for probe in stretchable)
        if total > room:
            self._stretch(stretchable, total, room, step_ms)
        elif complete and fixed + total <= allowed:
            self._restore(stretchable, total, RESTORE_BELOW * (allowed - fixed))
        if complete:
            rest = sum(probe.mean_ms() for probe in stretchable)
            self._report_if_exceeded(fixed, rest, step_ms)

    def _stretch(
        self, probes: list[ActiveProbe], total: float, room: float, step_ms: float
    ) -> None:
        """Double cadences until the cost fits: least important first, then most expensive; watched
        probes last."""
        before = {probe: probe.now for probe in probes}
        order = sorted(probes, key=lambda p: (p.watched, p.importance, -p.mean_ms()))
        for limit in LIMITS:
            for probe in order:
                while (
                    total > room
                    and probe.now < min(limit * probe.unstretched, probe.longest)
                    and not (probe.probe.often_in_short_runs and self._would_be_rare(2 * probe.now))
                    and probe.mean_ms() > 0.02 * room  # stretching cheap probes gains nothing
                ):
                    total -= probe.mean_ms() - probe.mean_ms(2 * probe.now)
                    probe.now *= 2
        slowed = [
            probe
            for probe in probes
            if probe.now != before[probe] and probe.name not in self._reported_slower
        ]
        if slowed:
            self._reported_slower |= {probe.name for probe in slowed}
            costs = ", ".join(
                f"{probe.name} {cadence(probe.now)} ({milliseconds(probe.cost_ms, 0)})"
                for probe in slowed
            )
            text = (
                f"measured less often from now on, to keep within {percent(self.budget, 0)} of a "
                f"{milliseconds(step_ms, 0)} step: {costs}; the help lists how often now"
            )
            self._on_change(slowed, text, "info")

    def _would_be_rare(self, every: int) -> bool:
        """Whether a cadence leaves less than MIN_MEASUREMENTS among as many steps as have passed:
        in a run of 300 steps, one in 320 would measure nothing."""
        return every * MIN_MEASUREMENTS > self._steps

    def _restore(self, probes: list[ActiveProbe], total: float, room: float) -> None:
        """Halve one cadence where that fits: watched first, then the most important."""
        for probe in sorted(probes, key=lambda p: (not p.watched, -p.importance, p.mean_ms())):
            if probe.now > probe.unstretched:
                faster = max(probe.unstretched, probe.now // 2)
                if total + probe.mean_ms(faster) - probe.mean_ms() <= room:
                    probe.now = faster
                    if faster == probe.unstretched and probe.name in self._reported_slower:
                        self._reported_slower.discard(probe.name)
                        text = f"{probe.name} is measured {cadence(faster)} again"
                        self._on_change([probe], f"{text}: the budget allows it", "info")
                    return

    def _report_if_exceeded(self, fixed: float, rest: float, step_ms: float) -> None:
        """Report an exceeded budget once, after two windows over it, and again only after the
        budget was kept."""
        allowed, share = self.budget * step_ms, (fixed + rest) / step_ms
        if fixed + rest <= allowed:
            self._windows_over = 0
            if share < RESTORE_BELOW * self.budget:
                self._reported = False
            return
        self._windows_over += 1
        if self._windows_over < 2 or self._reported:
            return
        self._reported = True
        others = f", the others at their longest cadence {milliseconds(rest, 0)}"
        others = "" if fixed > allowed else others
        text = (
            f"overhead exceeds the budget of {percent(self.budget, 0)}: measurements at every step "
            f"take {milliseconds(fixed, 0)}{others}, of a {milliseconds(step_ms, 0)} step"
        )
        self._on_change((), text, "info")

    def _follow_watching(self, probes: Sequence[ActiveProbe]) -> bool:
        """Report probes that are watched now or no longer. When none is watched, restore cadences
        that were stretched for watched probes. Returns whether a cadence changed."""
        watched = tuple(filter(_IS_WATCHED, probes))
        if watched == self._watched:
            return False
        if not self._watched:
            self._before_watching = {probe: probe.every for probe in probes}
        begun = [probe for probe in watched if probe not in self._watched]
        ended = [probe for probe in self._watched if probe in probes and probe not in watched]
        self._watched = watched
        if begun:
            text = f"measured more often while on screen: {cadences_text(begun)}"
            self._on_change(begun, text, "info")
        if ended:
            for probe, every in ({} if watched else self._before_watching).items():
                if probe in probes and probe.every > every:
                    probe.every = every
                    ended += [] if probe in ended else [probe]
            self._on_change(ended, f"no longer on screen: {cadences_text(ended)}", "info")
        return True


def cadences_text(probes: Iterable[ActiveProbe]) -> str:
    return ", ".join(f"{probe.name} {cadence(probe.now)}" for probe in probes)
