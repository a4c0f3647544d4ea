"""Chooses the probes that measure a step: by cadence, by what is watched, and by what clipping
computes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tui_trainer.trace.active_probe import ActiveProbe
from tui_trainer.trace.probe import Probe

MAX_PLANS = 64


class StepPlan:
    """The probes of one step, by the hooks through which they are called."""

    def __init__(
        self, probes: Sequence[ActiveProbe], resting: Collection[ActiveProbe] = ()
    ) -> None:
        """`resting`: those of `probes` that need not observe the forward."""

        def those_with(hook: str) -> tuple[ActiveProbe, ...]:
            return tuple([probe for probe in probes if hook in probe.hooks])

        self.probes = tuple(probes)
        self.reading = tuple([probe for probe in probes if probe.hooks])
        self.before_forward = tuple([p for p in those_with("before_forward") if p not in resting])
        self.after_forward = tuple([p for p in those_with("after_forward") if p not in resting])
        self.further_forward = tuple([p for p in self.before_forward if p.probe.every_forward])
        self.model_called = tuple([p for p in those_with("model_called") if p not in resting])
        self.loss_called = those_with("loss_called")
        self.gradients = those_with("gradients")
        self.gradient_norms = those_with("gradient_norms")
        self.before_update = those_with("before_update")
        self.after_update = those_with("after_update")


NOTHING = StepPlan(())


class ProbeSchedule:
    """Decides which probes measure a step.

    Few different sets of probes ever occur: each has a plan, made once, so that a step calls the
    probes that it needs and looks at no others.
    """

    def __init__(self, probes: list[ActiveProbe]) -> None:
        self.probes = probes
        self.plan = NOTHING
        """Of the current step."""
        self._steps = 0
        """Steps of this optimizer so far."""
        self._chosen = 0
        """Bit set over `probes`."""
        self._resting = 0
        """Bit set of those chosen that need not observe the forward of the step."""
        self._plans: dict[tuple[int, int], StepPlan] = {}
        self._watched: Collection[str] = ()
        """Topics."""
        self.update()

    def update(self) -> None:
        """Follow changed cadences and failed probes."""
        self.working = [probe for probe in self.probes if not probe.failed]
        self._always = 0
        self._periodic = 0
        """Those that measure some steps, and any step before a pause."""
        self._sometimes: list[tuple[int, int, int]] = []
        """(cadence, first steps that are all measured, bit)."""
        self._may_rest: list[tuple[Probe, int]] = []
        self._with_clipping = 0
        self.clip_readers: list[ActiveProbe] = []
        """Those that measure every step whose gradients are clipped."""
        self._plans.clear()
        for position, probe in enumerate(self.probes):
            bit = 1 << position
            if probe.failed:
                continue
            if type(probe.probe).resting is not Probe.resting:
                self._may_rest.append((probe.probe, bit))
            every = probe.now
            if every == 1 or probe.needed:
                self._always |= bit
            elif every:
                self._sometimes.append((every, probe.probe.first_steps, bit))
                if type(probe.probe).wants is Probe.wants:  # others say so themselves
                    self._periodic |= bit
            if "gradient_norms" in probe.hooks and probe.natural == 1:
                self._with_clipping |= bit
                self.clip_readers.append(probe)

    def begin_step(self, step: int, watched: Collection[str], stops_soon: bool) -> None:
        """Choose the probes of a new step. `stops_soon`: the run is about to pause in it.

        Cadences count the steps of this optimizer: where two take turns, the run's own number would
        match one of them at even steps only.
        """
        if watched != self._watched:
            self._watched = watched
            for probe in self.probes:
                probe.watched = probe.watched_natural > 0 and probe.probe.topic in watched
                probe.needed = any(f"needed:{table.name}" in watched for table in probe.tables)
            self.update()
        chosen = self._always
        for every, first, bit in self._sometimes:
            if self._steps % every == 0 or self._steps < first:
                chosen |= bit
        if stops_soon:  # what the user is about to look at is measured in full
            chosen |= self._requested(step) | self._periodic
        self._resting = 0
        for each, bit in self._may_rest:
            if each.resting:
                self._resting |= bit
        self._choose(chosen)
        for probe in self.plan.reading:
            probe.begin_step()

    def add_requested(self, step: int) -> None:
        """The run is about to pause after all: add what needs no gradients."""
        self._add(self._requested(step, without=frozenset(("gradients", "gradient_norms"))))

    def add_clipping(self) -> None:
        """Gradients are about to be clipped: add the probes that this serves."""
        if self._with_clipping & ~self._chosen:
            self._add(self._with_clipping)

    def end_step(self) -> None:
        self._steps += 1
        self.plan, self._chosen = NOTHING, 0

    def _requested(self, step: int, without: frozenset[str] = frozenset()) -> int:
        """Those that want to measure a step before a pause. All are asked, since a probe may then
        measure more than at its cadence."""
        requested = 0
        for position, probe in enumerate(self.probes):
            if probe.failed or not without.isdisjoint(probe.hooks):
                continue
            if probe.probe.wants(step):
                requested |= 1 << position
        return requested

    def _add(self, bits: int) -> None:
        before = self.plan.probes
        self._choose(self._chosen | bits)
        for probe in self.plan.reading:
            if probe not in before:
                probe.begin_step()

    def _choose(self, chosen: int) -> None:
        self._chosen = chosen
        key = chosen, self._resting
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = StepPlan(
                [p for i, p in enumerate(self.probes) if chosen >> i & 1 and not p.failed],
                [p for i, p in enumerate(self.probes) if self._resting >> i & 1],
            )
        self.plan = plan
