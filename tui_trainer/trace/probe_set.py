"""Chooses the probes that measure a step of one optimizer (by cadence, by what is watched, and by
what clipping computes) and calls them in the course of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import torch

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import Table
from tui_trainer.trace.governor import NEVER_STRETCHED, ActiveProbe, Governor, OnChange
from tui_trainer.trace.optimizer_slot import OptimizerSlot
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import (
    Gradient,
    Probe,
    ProbeOptions,
    Readings,
    RecorderLike,
    StepFacts,
    Values,
    describe_exception,
)
from tui_trainer.trace.torch_private import set_grad_enabled
from tui_trainer.trace.transfer import HostTransfer, TransferPart

FORWARD_HOOKS = frozenset(("before_forward", "after_forward", "model_called", "loss_called"))
"""Hooks that come too early for a probe that is chosen within the step."""
MAX_PLANS = 64
NO_READINGS: Values = np.empty(0)
_ARRAYS = frozenset({np.ndarray})


class StepPlan:
    """The probes of one step, by the hooks through which they are called."""

    def __init__(
        self, probes: Sequence[ActiveProbe], resting: Collection[ActiveProbe] = ()
    ) -> None:
        """`resting`: the probes among `probes` that need not observe the forward."""

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

    Few different sets of probes ever occur. Each has a plan, made once, so that a step calls the
    probes that measure it and touches no others.
    """

    def __init__(self, probes: list[ActiveProbe]) -> None:
        self.probes = probes
        self.plan = NOTHING
        """Plan of the current step."""
        self._steps = 0
        """Steps of this optimizer so far."""
        self._chosen = 0
        """Bit set of the probes that measure the current step."""
        self._resting = 0
        """Bit set of the probes that need not observe the forward of the current step."""
        self._plans: dict[tuple[int, int], StepPlan] = {}
        self._working = 0
        """Bit set of the probes that have not failed, for which the plans were made."""
        self._watched: Collection[str] = ()
        """Topics that are watched."""
        self.update()

    def update(self) -> None:
        """Follow changed cadences and failed probes."""
        self.stretchable = [
            probe
            for probe in self.probes
            if not probe.failed and probe.importance < NEVER_STRETCHED
        ]
        self._always = 0
        self._periodic = 0
        """Bit set of the probes that measure some steps, and any step before a pause."""
        self._sometimes: list[tuple[int, int, int]] = []
        """(cadence, number of first steps that are all measured, bit)."""
        self._next_due: float = math.inf
        """The next of this optimizer's steps that is due by a cadence."""
        self._due = 0
        """Bit set of the probes that are due at `_next_due`."""
        self._may_rest: list[tuple[Probe, int]] = []
        self._with_clipping = 0
        self.clip_readers: list[ActiveProbe] = []
        """Probes that measure every step whose gradients are clipped."""
        working = sum(1 << i for i, probe in enumerate(self.probes) if not probe.failed)
        if working != self._working:
            self._working = working
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
                if type(probe.probe).wants is Probe.wants:  # others are asked before a pause
                    self._periodic |= bit
            if "gradient_norms" in probe.hooks and probe.natural == 1:
                self._with_clipping |= bit
                self.clip_readers.append(probe)
        self._find_next_due()

    def begin_step(self, step: int, watched: Collection[str], stops_soon: bool) -> None:
        """Choose the probes of a new step. `stops_soon`: the run is about to pause in it.

        Cadences count the steps of this optimizer: where two take turns, one of them makes only the
        run's even steps.
        """
        if watched != self._watched:
            self._watched = watched
            for probe in self.probes:
                probe.watched = probe.watched_natural > 0 and probe.probe.topic in watched
                probe.needed = any(f"needed:{table.name}" in watched for table in probe.tables)
            self.update()
        chosen = self._always
        if self._steps == self._next_due:
            chosen |= self._due
        if stops_soon:  # the user is about to look at this step: measure everything
            chosen |= self._before_pause(step)
        self._resting = 0
        for each, bit in self._may_rest:
            if each.resting:
                self._resting |= bit
        self._choose(chosen)
        for probe in self.plan.reading:
            probe.spent_s, probe.readings = 0.0, []

    def _find_next_due(self) -> None:
        """Find the next step, from the current one on, that is due by a cadence."""
        steps = self._steps
        self._next_due, self._due = math.inf, 0
        for every, first, bit in self._sometimes:
            due = steps if steps < first else -(-steps // every) * every
            if due < self._next_due:
                self._next_due, self._due = due, bit
            elif due == self._next_due:
                self._due |= bit

    def add_before_pause(self, step: int, passed: frozenset[str]) -> list[ActiveProbe]:
        """Add the probes that can still measure a step after the hooks `passed`; return the added
        ones."""
        return self._add(self._before_pause(step, without=passed))

    def add_named(self, names: Collection[str]) -> list[ActiveProbe]:
        """Add the working probes of these names; return the added ones."""
        working = [(place, p) for place, p in enumerate(self.probes) if not p.failed]
        return self._add(sum(1 << place for place, probe in working if probe.name in names))

    def add_clipping(self) -> None:
        """Gradients are about to be clipped: add the probes that read the norms of clipping."""
        if self._with_clipping & ~self._chosen:
            self._add(self._with_clipping)

    def end_step(self) -> None:
        self._steps += 1
        self.plan, self._chosen = NOTHING, 0
        if self._steps > self._next_due:
            self._find_next_due()

    def _before_pause(self, step: int, without: frozenset[str] = frozenset()) -> int:
        """Bit set of the probes that measure a step before a pause, except for those with any of
        the hooks `without`. Every probe is asked, since it may measure more then than usual."""
        chosen = 0
        for position, probe in enumerate(self.probes):
            if probe.failed or not without.isdisjoint(probe.hooks):
                continue
            bit = 1 << position
            if self._periodic & bit or probe.probe.wants(step):
                chosen |= bit
        return chosen

    def _add(self, bits: int) -> list[ActiveProbe]:
        """Add a bit set of probes; return the probes that were not chosen before."""
        before = self.plan.probes
        self._choose(self._chosen | bits)
        added = [probe for probe in self.plan.probes if probe not in before]
        for probe in added:
            probe.spent_s, probe.readings = 0.0, []
        return added

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


class ProbeContext:
    """Disables gradients, and autocast, under which a script may step.

    Entered several times a step: a class takes a third of the time of a generator around
    `torch.no_grad`.
    """

    __slots__ = ("autocast", "depth", "device_type", "gradients")

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.depth = 0
        self.gradients = False
        self.autocast: torch.autocast | None = None

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        self.gradients = torch.is_grad_enabled()
        if self.gradients:
            set_grad_enabled(False)
        if torch.is_autocast_enabled(self.device_type):
            self.autocast = torch.autocast(self.device_type, enabled=False)
            self.autocast.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: object) -> None:
        self.depth -= 1
        if self.depth:
            return
        if self.autocast is not None:
            self.autocast.__exit__(*exc)
            self.autocast = None
        if self.gradients:
            set_grad_enabled(True)


class ProbeSet:
    """Calls and times the probes that measure a step, transfers their readings and collects their
    rows. A probe that raises is switched off."""

    def __init__(
        self,
        tracked: TrackedParameters,
        kinds: Sequence[type[Probe]],
        recorder: RecorderLike,
        options: ProbeOptions,
        slot: OptimizerSlot,
        on_cadence_change: OnChange,
    ) -> None:
        self.active: list[ActiveProbe] = []
        self.unseen: dict[str, str] = {}
        """Why probes that have nothing to measure were left out."""
        self.context = ProbeContext(tracked.device)
        self.on_host = all(parameter.is_cpu for parameter in tracked.parameters)
        self._tracked = tracked
        self._recorder = recorder
        self._governor = Governor(options.budget, on_cadence_change)
        options = replace(options, probe_names=tuple(kind.name for kind in kinds))
        for kind in kinds:
            if kind.name not in options.switched_off:
                self._add(kind, options, slot)
        self.schedule = ProbeSchedule(self.active)
        self._schedule_outdated = False
        """Whether cadences changed or a probe failed, perhaps on another thread."""

    def _add(self, kind: type[Probe], options: ProbeOptions, slot: OptimizerSlot) -> None:
        try:
            with self.context:  # the script may be within autocast
                probe = kind(self._tracked, options)
            if probe.unseen:
                self.unseen[kind.name] = probe.unseen
            else:
                self.active.append(self._activate(probe, options, slot))
        except Exception as fault:
            text = f"probe {kind.name}: {describe_exception(fault)}"
            self._recorder.notice("fault", text, "error")

    def _activate(self, probe: Probe, options: ProbeOptions, slot: OptimizerSlot) -> ActiveProbe:
        natural = max(0, options.cadences.get(probe.name, probe.every))
        watched = min(probe.watched_every, natural or probe.watched_every) if probe.topic else 0
        tables: list[Table] = []
        for spec in probe.tables:
            every = natural if spec.every is None else spec.every
            unstretched = natural or watched if spec.every is None else spec.every
            tables.append(slot.table(self._recorder, spec.name, spec.columns, every, unstretched))
        return ActiveProbe(
            name=probe.name,
            natural=natural,
            every=natural,
            importance=probe.importance,
            max_stretch=probe.max_stretch,
            watched_natural=watched,
            watched_every=watched,
            probe=probe,
            tables=tables,
        )

    def table(self, name: str) -> Table | None:
        """The table of this name that one of the probes fills."""
        return next((t for p in self.active for t in p.tables if t.name == name), None)

    def named(self, name: str) -> Probe | None:
        """The working probe of this name."""
        return next((p.probe for p in self.active if p.name == name and not p.failed), None)

    # ------------------------------------------------------------ in the course of a step

    def begin_step(self, step: int, stops_soon: bool) -> None:
        """Decide which probes measure a new step."""
        if self._schedule_outdated:
            self._schedule_outdated = False
            self.schedule.update()
        self.schedule.begin_step(step, self._recorder.watched(step), stops_soon)

    def measure_before_pause(self, step: int, read: bool, norms: Readings | None) -> None:
        """The run is about to pause in a step that has begun: measure everything that still can be.
        `read`: whether the gradients have been read, with these `norms` where they are known."""
        passed = FORWARD_HOOKS
        if read:
            passed |= {"gradients"} if norms is not None else {"gradients", "gradient_norms"}
        added = self.schedule.add_before_pause(step, passed)
        if read and norms is not None:
            self._give_norms(added, norms)

    def measure_norms(self, norms: Readings | None) -> None:
        """Measure the update and the norms of the weights after it, and record `norms`, those of
        the gradients, where they are known. Cadences do not matter here."""
        names = [schema.UPDATE_RATIO, schema.WEIGHT_NORM]
        names += [] if norms is None else [schema.GRAD_NORM]
        added = self.schedule.add_named(names)
        if norms is not None:
            self._give_norms(added, norms)

    def _give_norms(self, added: Sequence[ActiveProbe], norms: Readings) -> None:
        for probe in added:
            if "gradient_norms" in probe.hooks:
                probe.readings = [self._call(probe, probe.probe.gradient_norms, norms) or ()]

    def before_forward(
        self,
        root: torch.nn.Module,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        first: bool = True,
    ) -> bool:
        """A forward of the step begins, the `first` one or a further one; returns whether
        `after_forward` must be called."""
        plan = self.schedule.plan
        beginning = plan.before_forward if first else plan.further_forward
        if beginning:
            with self.context:
                for probe in plan.model_called:
                    if first or probe.probe.every_forward:
                        self._call(probe, probe.probe.model_called, root, args, kwargs or {})
                for probe in beginning:
                    self._call(probe, probe.probe.before_forward, root)
        return bool(plan.after_forward)

    def after_forward(self) -> None:
        with self.context:
            # The probes undo their replacements in reverse order.
            for probe in reversed(self.schedule.plan.after_forward):
                self._call(probe, probe.probe.after_forward)

    def loss_called(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """A loss function has returned."""
        with self.context:
            for probe in self.schedule.plan.loss_called:
                self._call(probe, probe.probe.loss_called, name, args, kwargs, result)

    def gradients(self, gradients: list[Gradient]) -> None:
        for probe in self.schedule.plan.gradients:
            probe.readings = [self._call(probe, probe.probe.gradients, gradients) or ()]

    def gradient_norms(self, norms: Readings, spent_s: float = 0.0) -> None:
        """`spent_s`: seconds that reading the norms took."""
        for probe in self.schedule.plan.gradient_norms:
            probe.spent_s += spent_s
            spent_s = 0.0
            probe.readings = [self._call(probe, probe.probe.gradient_norms, norms) or ()]

    def before_update(self) -> None:
        plan = self.schedule.plan
        if plan.before_update:
            with self.context:
                for probe in plan.before_update:
                    self._call(probe, probe.probe.before_update)

    def after_update(self) -> StepPlan:
        """End the step; returns the probes that have measured it."""
        plan = self.schedule.plan
        self.schedule.end_step()
        if plan.after_update:
            with self.context:
                began = perf_counter()
                for probe in plan.after_update:
                    if probe.failed:
                        continue
                    try:  # like `_call`, but with one reading of the clock per probe
                        readings = probe.probe.after_update()
                        if readings:
                            probe.readings.append(readings)
                    except Exception as fault:
                        self._switch_off(probe, fault)
                    ended = perf_counter()
                    probe.spent_s += ended - began
                    began = ended
        return plan

    def forget_readings(self) -> None:
        """The gradients of the step are discarded."""
        for probe in self.schedule.plan.reading:
            probe.readings = []

    def for_skipped(self, norms: bool) -> list[ActiveProbe]:
        """The probes that make rows of an iteration without a step. `norms`: whether the norms of
        its gradients were read."""
        kept = [schema.STEP, schema.CLIP, schema.PHASE_MS, "nonfinite"]
        if norms:
            kept.append(schema.GRAD_NORM)
        return [probe for probe in self.active if probe.name in kept and not probe.failed]

    def _call(self, probe: ActiveProbe, hook: Callable[..., Any], *args: Any) -> Any:
        """Call a hook and add its time to the probe's cost; switch the probe off if it raises."""
        if probe.failed:
            return None
        began = perf_counter()
        try:
            return hook(*args)
        except Exception as fault:
            self._switch_off(probe, fault)
            return None
        finally:
            probe.spent_s += perf_counter() - began

    def _switch_off(self, probe: ActiveProbe, fault: Exception) -> None:
        probe.failed = True
        self._schedule_outdated = True
        text = f"probe {probe.name} is switched off: {describe_exception(fault)}"
        self._recorder.notice("fault", text, "error")

    # ------------------------------------------------------------ to the host

    def transfer(self, parts: list[TransferPart], probes: Sequence[ActiveProbe]) -> HostTransfer:
        """Start the transfer of the header and of the readings of each of `probes`. A probe whose
        readings cannot be transferred is switched off."""
        try:
            return HostTransfer(parts, self.on_host)
        except Exception:
            for position, probe in enumerate((p for p in probes if p.hooks), 1):
                try:
                    HostTransfer([parts[position]], self.on_host)
                except Exception as fault:
                    self._switch_off(probe, fault)
                    parts[position] = (), False
            return HostTransfer(parts, self.on_host)

    def rows(
        self, probes: Sequence[ActiveProbe], parts: Sequence[Values | Exception], facts: StepFacts
    ) -> tuple[tuple[int, Floats], ...]:
        """(table id, row) of every row that `probes` make of a step."""
        rows: list[tuple[int, Floats]] = []
        own_ms = facts.own_ms
        remaining = iter(parts)
        arrived = _ARRAYS.issuperset(map(type, parts))
        values: Any
        began = perf_counter()
        for probe in probes:
            if probe.hooks:
                values = next(remaining)
                spent_ms = own_ms.get(probe.name, 0.0)
            else:
                values, spent_ms = NO_READINGS, 0.0
            if probe.failed:
                continue
            try:
                if not arrived and isinstance(values, Exception):
                    raise values
                found = probe.rows(values, facts)
            except Exception as fault:
                self._switch_off(probe, fault)
                continue
            if found:
                for table, row in zip(probe.tables, found, strict=False):
                    if row is not None:
                        rows.append((table.id, row))
            ended = perf_counter()
            own_ms[probe.name] = spent_ms + (ended - began) * 1e3
            began = ended
        return tuple(rows)

    def govern(self, facts: StepFacts) -> None:
        """A step is recorded: adapt the cadences of the probes to their cost."""
        for probe in self.schedule.clip_readers:
            probe.with_clipping = bool(facts.clips)
        if self._governor.step(self.schedule.stretchable, facts.own_ms, facts.step_ms):
            self._schedule_outdated = True
