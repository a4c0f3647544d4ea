"""Keeping our own cost within a budget, by measuring dear things less often."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WINDOW = 32
"""Steps between two decisions."""
STEADY = 5
"""First steps, which are slow in every way, do not count."""
NEVER_STRETCHED = 100
LIMITS = (32, 256, 1024)
"""How far (times its natural cadence) one thing is stretched before more important ones are."""
LEAST_ROOM = 0.1
"""Share of the budget for what can be stretched, even where the rest is over it by itself (steps
are very short): something is measured all the same."""
ROOM = 0.7
"""A cadence is restored only where the prediction stays below this share of the room, so that
cadences do not swing."""


@dataclass(eq=False, kw_only=True)
class Governed:
    """One thing whose cadence may be stretched."""

    name: str
    natural: int
    """Natural cadence in steps; 0: measured on request alone, which is not governed."""
    every: int
    """Cadence now: the natural one times a power of two."""
    importance: int
    furthest: int = LIMITS[-1]
    """How many times its natural cadence it may be stretched."""
    held: bool = False
    """Due at every step at present, whatever the budget: it comes with something that the training
    does anyway."""
    cost_ms: float = math.nan
    """Smoothed cost of one measurement."""

    def share_ms(self, every: int | None = None) -> float:
        """Mean cost per step at a cadence (default: the present one)."""
        every = self.every if every is None else every
        return self.cost_ms / every if every and not math.isnan(self.cost_ms) else 0.0

    @property
    def fixed(self) -> bool:
        """Whether its cost is no matter of choice at present."""
        return self.held or self.importance >= NEVER_STRETCHED


class Governor:
    """Stretches and restores cadences. One for each optimizer, whose steps it counts; the budget is
    a share of step time."""

    def __init__(self, budget: float, changed: Callable[[Governed, str], None]) -> None:
        self.budget = budget
        self._changed = changed
        """Told of each new cadence, with a sentence for people."""
        self._steps = 0
        self._step_ms: list[float] = []
        self._fixed_ms = 0.0

    def step(
        self,
        measured: Sequence[Governed],
        governed: Sequence[Governed],
        own_ms: Mapping[str, float],
        step_ms: float,
    ) -> bool:
        """A step took `step_ms`, of which ours were `own_ms` (by name of what was measured).

        `measured`: those of all the `governed` that were measured in it. Whether cadences may have
        changed.
        """
        self._steps += 1
        if self._steps <= STEADY:
            return False
        self._fixed_ms += own_ms.get("tracer", 0.0)
        for one in measured:
            spent = own_ms.get(one.name)
            if spent is None:
                continue
            if one.held or one.importance >= NEVER_STRETCHED:
                self._fixed_ms += spent
            # Smoothed, and deaf to one hiccup of the machine.
            known = one.cost_ms
            one.cost_ms = spent if known != known else known + 0.2 * (min(spent, 3 * known) - known)
        self._step_ms.append(step_ms)
        if len(self._step_ms) < WINDOW:
            return False
        if self.budget > 0:
            self._decide(governed)
        self._fixed_ms = 0.0
        self._step_ms.clear()
        return True

    def _decide(self, governed: Sequence[Governed]) -> None:
        # The median: a step that waited for data or for another program pays for no measuring.
        step_ms = statistics.median(self._step_ms)
        allowed = self.budget * step_ms
        for one in governed:
            if one.held and one.every != one.natural:
                one.every = one.natural
                self._changed(one, f"{one.name} is measured at every step that clips gradients")
        pliable = [one for one in governed if one.natural and not one.fixed]
        least = sum(one.share_ms(one.furthest * one.natural) for one in pliable)
        room = max(allowed - self._fixed_ms / len(self._step_ms), least + LEAST_ROOM * allowed)
        total = sum(one.share_ms() for one in pliable)
        if total > room:
            self._stretch(pliable, total, room, step_ms)
        else:
            self._restore(pliable, total, ROOM * room)

    def _stretch(self, pliable: list[Governed], total: float, room: float, step_ms: float) -> None:
        """Double cadences, least important first, dearest first among equals, until it fits."""
        before = {id(one): one.every for one in pliable}
        order = sorted(pliable, key=lambda o: (o.importance, -o.share_ms()))
        for most in LIMITS:
            for one in order:
                # What hardly costs anything is left alone.
                while (
                    total > room
                    and one.every < min(most, one.furthest) * one.natural
                    and one.share_ms() > 0.02 * room
                ):
                    total -= one.share_ms() - one.share_ms(2 * one.every)
                    one.every *= 2
        for one in pliable:
            if one.every != before[id(one)]:
                self._changed(
                    one,
                    f"{one.name} is now measured every {one.every} steps: it costs "
                    f"{one.cost_ms:.2f} ms, a step takes {step_ms:.1f} ms, and the budget is "
                    f"{self.budget:.1%}",
                )

    def _restore(self, pliable: list[Governed], total: float, room: float) -> None:
        """Halve one cadence, the most important first, where that surely fits."""
        for one in sorted(pliable, key=lambda o: (-o.importance, o.share_ms())):
            if one.every > one.natural:
                faster = max(one.natural, one.every // 2)
                if total + one.share_ms(faster) - one.share_ms() <= room:
                    one.every = faster
                    often = "every step" if faster == 1 else f"every {faster} steps"
                    self._changed(one, f"{one.name} is measured {often} again: there is room")
                    return
