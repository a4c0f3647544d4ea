"""Probes at work: their tables, their cadence, their cost, and which of them measure a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from tui_trainer.protocol.describe import Table
from tui_trainer.tracing.governor import Governed
from tui_trainer.tracing.interface import RecorderLike
from tui_trainer.tracing.probe import Options, Probe, Readings
from tui_trainer.tracing.roles import Role
from tui_trainer.tracing.subject import Subject

READING = (
    "before_forward",
    "after_forward",
    "gradients",
    "borrowed",
    "before_update",
    "after_update",
)
"""The hooks that are called in the course of a step; a probe may have none of them."""
MOST_PLANS = 64


@dataclass(eq=False, kw_only=True)
class Slot(Governed):
    """A probe at work."""

    probe: Probe
    tables: list[Table]
    off: bool = False
    readings: list[Readings] = field(default_factory=list)
    spent: float = 0.0
    """Seconds on the training thread in this step."""

    def __post_init__(self) -> None:
        self.does = frozenset(
            name for name in READING if getattr(type(self.probe), name) is not getattr(Probe, name)
        )
        """Which of the hooks it has: the others need not be called."""

    def reset(self) -> None:
        """A step begins."""
        self.spent = 0.0
        self.readings = []


def install(
    kind: type[Probe], subject: Subject, options: Options, recorder: RecorderLike, role: Role
) -> Slot | str:
    """Set a probe to work and declare its tables; or why there is nothing for it to see."""
    with torch.no_grad():
        probe = kind(subject, options)
    if probe.unseen:
        return probe.unseen
    natural = max(0, options.cadences.get(kind.name, kind.every))
    watched = min(kind.watched_every, natural or kind.watched_every) if kind.topic else 0
    tables: list[Table] = []
    for spec in probe.tables:
        every = natural if spec.every is None else spec.every
        usual = natural or watched if spec.every is None else spec.every
        tables.append(role.table(recorder, spec.name, spec.columns, every, usual))
    return Slot(
        name=kind.name,
        natural=natural,
        every=natural,
        importance=kind.importance,
        furthest=kind.furthest,
        watched_natural=watched,
        watched_every=watched,
        probe=probe,
        tables=tables,
    )


class Plan:
    """The slots of one step, by the moments at which they are called."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        def those_with(hook: str) -> tuple[Slot, ...]:
            return tuple(slot for slot in slots if hook in slot.does)

        self.slots = tuple(slots)
        self.reading = tuple(slot for slot in slots if slot.does)
        self.before_forward = those_with("before_forward")
        self.after_forward = those_with("after_forward")
        self.gradients = those_with("gradients")
        self.borrowed = those_with("borrowed")
        self.own_gradients = tuple(s for s in self.gradients if "borrowed" not in s.does)
        """Those that need the gradients even where their norms can be borrowed."""
        self.before_update = those_with("before_update")
        self.after_update = those_with("after_update")


NOTHING = Plan(())


class Schedule:
    """Decides which slots measure a step.

    Few different sets of them ever come: each has its plan, made once, so that a step runs through
    the probes that it needs and no others.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots
        self.plan = NOTHING
        """Of the step in the making."""
        self._made = 0
        """Steps of this optimizer so far."""
        self._chosen = 0
        self._plans: dict[int, Plan] = {}
        self._watched: Collection[str] = ()
        """Topics."""
        self.arrange()

    def arrange(self) -> None:
        """Cadences have changed, or a probe was switched off."""
        self.at_work = [slot for slot in self.slots if not slot.off]
        self._always = 0
        self._sometimes: list[tuple[int, int]] = []
        """Cadence and bit."""
        self._with_clipping = 0
        self.borrowers: list[Slot] = []
        """Those that measure every step whose gradients are clipped."""
        self._plans.clear()
        for position, slot in enumerate(self.slots):
            bit = 1 << position
            if slot.off:
                continue
            every = slot.now
            if every == 1:
                self._always |= bit
            elif every:
                self._sometimes.append((every, bit))
            if "borrowed" in slot.does and slot.natural == 1:
                self._with_clipping |= bit
                self.borrowers.append(slot)

    def decide(self, step: int, watched: Collection[str], wanted: bool) -> None:
        """For a step that begins. `wanted`: somebody is about to look at it.

        Cadences count the steps of this optimizer: where two take turns, the run's own count would
        meet one of them at even steps alone.
        """
        if watched != self._watched:
            self._watched = watched
            for slot in self.slots:
                slot.watched = slot.watched_natural > 0 and slot.probe.topic in watched
            self.arrange()
        chosen = self._always
        for every, bit in self._sometimes:
            if self._made % every == 0:
                chosen |= bit
        self._choose(chosen | self._wanted(step) if wanted else chosen)
        for slot in self.plan.reading:
            slot.reset()

    def add_wanted(self, step: int) -> None:
        """Somebody is about to look after all: what needs no gradients can still be measured."""
        self._add(self._wanted(step, without="gradients"))

    def _wanted(self, step: int, without: str = "") -> int:
        """Those that want to measure a step that somebody is about to look at; all are asked, that
        they may measure more of it than at their cadence."""
        wanted = 0
        for position, slot in enumerate(self.slots):
            if not slot.off and without not in slot.does and slot.probe.wants(step):
                wanted |= 1 << position
        return wanted

    def add_clipping(self) -> None:
        """Gradients are about to be clipped."""
        if self._with_clipping & ~self._chosen:
            self._add(self._with_clipping)

    def _add(self, bits: int) -> None:
        known = self.plan.slots
        self._choose(self._chosen | bits)
        for slot in self.plan.reading:
            if slot not in known:
                slot.reset()

    def _choose(self, chosen: int) -> None:
        self._chosen = chosen
        plan = self._plans.get(chosen)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            slots = [s for i, s in enumerate(self.slots) if chosen >> i & 1 and not s.off]
            plan = self._plans[chosen] = Plan(slots)
        self.plan = plan

    def over(self) -> None:
        """The step is made."""
        self._made += 1
        self.plan, self._chosen = NOTHING, 0
