"""Keeping our own cost within a budget, by measuring dear things less often."""

from __future__ import annotations

import math
import statistics
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from tui_trainer.protocol.formatting import cadence
from tui_trainer.protocol.messages import Level
from tui_trainer.protocol.schema import Column, Table
from tui_trainer.trace.parameters import TrackedParameters, parameters_of
from tui_trainer.trace.probe import Options, Probe, Readings, RecorderLike

WINDOW = 32
"""Steps between two decisions."""
EARLIEST = 4
"""Steps before a decision that does not wait for the end of its window: more than the budget of the
whole window has been spent."""
STEADY = 5
"""First steps, which are slow in every way, do not count."""
NEVER_STRETCHED = 100
LIMITS = (32, 256, 1024)
"""How far (times its natural cadence) one thing is stretched before more important ones are."""
WATCHED_LIMIT = 16
"""How far what somebody watches is stretched, times its cadence while watched: a screen has to stay
useful."""
LEAST_ROOM = 0.1
"""Share of the budget for what can be stretched, even where the rest is over it by itself (steps
are very short): something is measured all the same."""
ROOM = 0.7
"""A cadence is restored only where the prediction stays below this share of the room, so that
cadences do not swing."""
AGAIN = 1.5
"""A budget that cannot be kept is said again once the cost is other by this factor."""


@dataclass(eq=False, kw_only=True)
class GovernedProbe:
    """One thing whose cadence may be stretched."""

    name: str
    natural: int
    """Natural cadence in steps; 0: measured only while somebody watches."""
    every: int
    """Cadence while nobody watches: the natural one times a power of two."""
    importance: int
    max_stretch: int = LIMITS[-1]
    """How many times its natural cadence it may be stretched."""
    watched_natural: int = 0
    """Natural cadence while somebody watches; 0: watching makes no difference."""
    watched_every: int = 0
    """Cadence while somebody watches: its natural one times a power of two."""
    watched: bool = False
    """Whether somebody watches, and it makes a difference."""
    held: bool = False
    """Due at every step at present, whatever the budget: it comes with something that the training
    does anyway."""
    cost_ms: float = math.nan
    """Smoothed cost of one measurement."""

    @property
    def now(self) -> int:
        """Its cadence now; 0: not measured."""
        return self.watched_every if self.watched else self.every

    @now.setter
    def now(self, every: int) -> None:
        if self.watched:
            self.watched_every = every
        else:
            self.every = every

    @property
    def usual(self) -> int:
        """Its cadence now if nothing were stretched."""
        return self.watched_natural if self.watched else self.natural

    @property
    def longest(self) -> int:
        """The longest cadence that it may have now."""
        return self.usual * (WATCHED_LIMIT if self.watched else self.max_stretch)

    def share_ms(self, every: int | None = None) -> float:
        """Mean cost per step at a cadence (default: the present one)."""
        every = self.now if every is None else every
        return self.cost_ms / every if every and not math.isnan(self.cost_ms) else 0.0

    @property
    def fixed(self) -> bool:
        """Whether its cost is no matter of choice at present."""
        return self.held or self.importance >= NEVER_STRETCHED


Changed = Callable[[Sequence[GovernedProbe], str, Level], None]
"""Told of what has another cadence now, with a sentence for people and its level."""


class Governor:
    """Stretches and restores cadences. One for each optimizer, whose steps it counts; the budget is
    a share of step time."""

    def __init__(self, budget: float, changed: Changed) -> None:
        self.budget = budget
        self._changed = changed
        self._steps = 0
        self._step_ms: deque[float] = deque(maxlen=WINDOW)
        self._fixed_ms: deque[float] = deque(maxlen=WINDOW)
        """Of the last steps, what was no matter of choice."""
        self._undecided = 0
        """Steps since the last decision, and what all the rest has cost in them."""
        self._spent_ms = 0.0
        self._watched: tuple[GovernedProbe, ...] = ()
        self._unwatched: dict[GovernedProbe, int] = {}
        """Cadences from before somebody watched."""
        self._windows_over = 0
        self._share_said = 0.0

    def step(
        self,
        measured: Sequence[GovernedProbe],
        governed: Sequence[GovernedProbe],
        own_ms: Mapping[str, float],
        step_ms: float,
    ) -> bool:
        """A step took `step_ms`, of which ours were `own_ms` (by name of what was measured).

        `measured`: those of all the `governed` that were measured in it. Whether cadences may have
        changed.
        """
        changed = self._follow_watching(governed)
        self._steps += 1
        if self._steps <= STEADY:
            return changed
        fixed_ms = own_ms.get("tracer", 0.0)
        for one in measured:
            spent = own_ms.get(one.name)
            if spent is None:
                continue
            if one.held or one.importance >= NEVER_STRETCHED:  # `fixed`, at every step
                fixed_ms += spent
            else:
                self._spent_ms += spent
            # Smoothed, and deaf to one hiccup of the machine.
            known = one.cost_ms
            one.cost_ms = spent if known != known else known + 0.2 * (min(spent, 3 * known) - known)
        self._fixed_ms.append(fixed_ms)
        self._step_ms.append(step_ms)
        self._undecided += 1
        complete = self._undecided >= WINDOW
        if not (complete or self._overdrawn()):
            return changed
        if self.budget > 0:
            self._decide(governed, complete)
        self._undecided, self._spent_ms = 0, 0.0
        return True

    def _overdrawn(self) -> bool:
        """Whether more has been spent than the whole window's budget."""
        if self.budget <= 0 or len(self._step_ms) < EARLIEST:
            return False
        most = self._spent_ms / (self.budget * WINDOW)
        return most > min(self._step_ms) and most > statistics.median(self._step_ms)

    def _decide(self, governed: Sequence[GovernedProbe], complete: bool) -> None:
        # The median: a step that waited for data or for another program pays for no measuring.
        step_ms = statistics.median(self._step_ms)
        allowed = self.budget * step_ms
        fixed = statistics.fmean(self._fixed_ms)
        for one in governed:
            if one.held and one.every != one.natural:
                one.every = one.natural
                text = f"{one.name} is measured at every step that clips gradients"
                self._changed([one], text, "info")
        pliable = [one for one in governed if one.usual and not one.fixed]
        least = sum(one.share_ms(one.longest) for one in pliable)
        room = max(allowed - fixed, least + LEAST_ROOM * allowed)
        total = sum(one.share_ms() for one in pliable)
        if total > room:
            self._stretch(pliable, total, room, step_ms)
        elif complete and fixed + total <= allowed:
            self._restore(pliable, total, ROOM * (allowed - fixed))
        if complete:
            rest = sum(one.share_ms() for one in pliable)
            self._say_whether_kept(fixed, rest, step_ms)

    def _stretch(
        self, pliable: list[GovernedProbe], total: float, room: float, step_ms: float
    ) -> None:
        """Double cadences, least important first, dearest first among equals, until it fits; what
        somebody watches goes last."""
        before = {one: one.now for one in pliable}
        order = sorted(pliable, key=lambda o: (o.watched, o.importance, -o.share_ms()))
        for most in LIMITS:
            for one in order:
                # What hardly costs anything is left alone.
                while (
                    total > room
                    and one.now < min(most * one.usual, one.longest)
                    and one.share_ms() > 0.02 * room
                ):
                    total -= one.share_ms() - one.share_ms(2 * one.now)
                    one.now *= 2
        for one in pliable:
            if one.now != before[one]:
                text = (
                    f"{one.name} is now measured every {one.now} steps: it costs "
                    f"{one.cost_ms:.2f} ms, a step takes {step_ms:.1f} ms, and the budget is "
                    f"{_percent(self.budget)}"
                )
                self._changed([one], text, "info")

    def _restore(self, pliable: list[GovernedProbe], total: float, room: float) -> None:
        """Halve one cadence, what is watched and the most important first, where that surely
        fits."""
        for one in sorted(pliable, key=lambda o: (not o.watched, -o.importance, o.share_ms())):
            if one.now > one.usual:
                faster = max(one.usual, one.now // 2)
                if total + one.share_ms(faster) - one.share_ms() <= room:
                    one.now = faster
                    text = f"{one.name} is measured {cadence(faster)} again: there is room"
                    self._changed([one], text, "info")
                    return

    def _say_whether_kept(self, fixed: float, rest: float, step_ms: float) -> None:
        """Say so where the budget cannot be kept, two windows in a row; not again before it costs
        much more or less."""
        allowed, share = self.budget * step_ms, (fixed + rest) / step_ms
        if fixed + rest <= allowed:
            self._windows_over = 0
            if share < ROOM * self.budget:
                self._share_said = 0.0
            return
        self._windows_over += 1
        said = self._share_said
        if self._windows_over < 2 or (said and said / AGAIN <= share <= said * AGAIN):
            return
        self._share_said = share
        beside = "" if fixed > allowed else f", the rest, however rarely, {rest:.2f} ms"
        text = (
            f"the budget of {_percent(self.budget)} cannot be kept: what is measured at every step "
            f"takes {fixed:.2f} ms{beside}, a step {step_ms:.1f} ms"
        )
        self._changed((), text, "warning")

    def _follow_watching(self, governed: Sequence[GovernedProbe]) -> bool:
        """Say what somebody has begun or ceased to watch. In the end everything else is measured as
        often again as before, when all of it was within the budget. Whether a cadence changed."""
        watched = tuple(one for one in governed if one.watched)
        if watched == self._watched:
            return False
        if not self._watched:
            self._unwatched = {one: one.every for one in governed}
        begun = [one for one in watched if one not in self._watched]
        over = [one for one in self._watched if one in governed and one not in watched]
        self._watched = watched
        if begun:
            text = f"measured more often while it is watched: {cadences(begun)}"
            self._changed(begun, text, "info")
        if over:
            for one, every in ({} if watched else self._unwatched).items():
                if one in governed and one.every > every:
                    one.every = every
                    over += [] if one in over else [one]
            self._changed(over, f"no longer watched: {cadences(over)}", "info")
        return True


def cadences(of: Iterable[GovernedProbe]) -> str:
    """Each by name with how often it is measured now."""
    return ", ".join(f"{one.name} {cadence(one.now)}" for one in of)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


# ---- roles
# What an optimizer is to its run, and a later optimizer that goes on in its place.
#
# A script may train one model after another: the folds of a cross-validation, the trials of a
# search.
# The model of the next fold is no further network beside the first, it comes instead of it; so its
# figures go on in the same tables, under the same names.


Optimizer = torch.optim.Optimizer


@dataclass(eq=False)
class OptimizerSlot:
    """The name and the tables of an optimizer, and of those that take its place."""

    name: str
    key: str
    """See `TrackedParameters.key`."""
    kind: type[Optimizer]
    shapes: tuple[tuple[int, ...], ...]
    optimizer: weakref.ref[Optimizer]
    models: tuple[weakref.ref[torch.nn.Module], ...] = ()
    tables: dict[str, Table] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether what it trained is gone. The optimizer itself may be left behind in a cycle (a
        scheduler's) until the collector comes by."""
        if self.models:
            return all(model() is None for model in self.models)
        return self.optimizer() is None

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer is of the same kind, over parameters of the same shapes."""
        return type(optimizer) is self.kind and shapes_of(optimizer) == self.shapes

    def hand_over(self, optimizer: Optimizer) -> None:
        """It is this optimizer's from now on."""
        self.optimizer = weakref.ref(optimizer)

    def trains(self, models: Iterable[torch.nn.Module]) -> None:
        """The models whose parameters these are."""
        self.models = tuple(weakref.ref(model) for model in models)

    def table(
        self, recorder: RecorderLike, name: str, columns: Sequence[Column], every: int, natural: int
    ) -> Table:
        """The table of this name: declared anew, or the one that is there with these columns."""
        known = self.tables.get(name)
        if known is not None and known.columns == tuple(columns):
            table = msgspec.structs.replace(known, every=every, natural=natural)
            if table != known:
                recorder.declare((table,))
        else:
            number = recorder.new_table(name, columns, every, self.key, natural)
            table = Table(number, name, tuple(columns), every, self.key, natural)
        self.tables[name] = table
        return table


def shapes_of(optimizer: Optimizer) -> tuple[tuple[int, ...], ...]:
    """The shapes of its parameters, in its order."""
    return tuple(tuple(parameter.shape) for parameter in parameters_of(optimizer))


# ---- slots
# Probes at work: their tables, their cadence, their cost, and which of them measure a step.


READING = (
    "before_forward",
    "after_forward",
    "gradients",
    "clip_norms",
    "before_update",
    "after_update",
)
"""The hooks that are called in the course of a step; a probe may have none of them."""
MOST_PLANS = 64


@dataclass(eq=False, kw_only=True)
class ActiveProbe(GovernedProbe):
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


def install_probes(
    kind: type[Probe],
    tracked: TrackedParameters,
    options: Options,
    recorder: RecorderLike,
    role: OptimizerSlot,
) -> ActiveProbe | str:
    """Set a probe to work and declare its tables; or why there is nothing for it to see."""
    with torch.no_grad():
        probe = kind(tracked, options)
    if probe.unseen:
        return probe.unseen
    natural = max(0, options.cadences.get(kind.name, kind.every))
    watched = min(kind.watched_every, natural or kind.watched_every) if kind.topic else 0
    tables: list[Table] = []
    for spec in probe.tables:
        every = natural if spec.every is None else spec.every
        usual = natural or watched if spec.every is None else spec.every
        tables.append(role.table(recorder, spec.name, spec.columns, every, usual))
    return ActiveProbe(
        name=kind.name,
        natural=natural,
        every=natural,
        importance=kind.importance,
        max_stretch=kind.max_stretch,
        watched_natural=watched,
        watched_every=watched,
        probe=probe,
        tables=tables,
    )


class StepPlan:
    """The slots of one step, by the moments at which they are called."""

    def __init__(self, slots: Sequence[ActiveProbe]) -> None:
        def those_with(hook: str) -> tuple[ActiveProbe, ...]:
            return tuple(slot for slot in slots if hook in slot.does)

        self.slots = tuple(slots)
        self.reading = tuple(slot for slot in slots if slot.does)
        self.before_forward = those_with("before_forward")
        self.after_forward = those_with("after_forward")
        self.gradients = those_with("gradients")
        self.clip_norms = those_with("clip_norms")
        self.own_gradients = tuple(s for s in self.gradients if "clip_norms" not in s.does)
        """Those that need the gradients even where their norms can be clip_norms."""
        self.before_update = those_with("before_update")
        self.after_update = those_with("after_update")


NOTHING = StepPlan(())


class ProbeSchedule:
    """Decides which slots measure a step.

    Few different sets of them ever come: each has its plan, made once, so that a step runs through
    the probes that it needs and no others.
    """

    def __init__(self, slots: list[ActiveProbe]) -> None:
        self.slots = slots
        self.plan = NOTHING
        """Of the step in the making."""
        self._made = 0
        """Steps of this optimizer so far."""
        self._chosen = 0
        self._plans: dict[int, StepPlan] = {}
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
        self.borrowers: list[ActiveProbe] = []
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
            if "clip_norms" in slot.does and slot.natural == 1:
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
            plan = self._plans[chosen] = StepPlan(slots)
        self.plan = plan

    def over(self) -> None:
        """The step is made."""
        self._made += 1
        self.plan, self._chosen = NOTHING, 0
