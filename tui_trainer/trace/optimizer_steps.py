"""Follows the steps of optimizers: how they begin and end, and those that a GradScaler skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.trace import torch_private
from tui_trainer.trace.evaluation import EvaluationLosses, EvaluationModes
from tui_trainer.trace.faults import Faults, guarded
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.nonfinite_origin import NonFiniteOrigins
from tui_trainer.trace.optimizer_registry import OptimizerRegistry, unwrapped_optimizer
from tui_trainer.trace.phase_clocks import STEP
from tui_trainer.trace.phases import Phases
from tui_trainer.trace.probe import Observers
from tui_trainer.trace.step import BackwardPass, GradScaling, StepOutcome
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.transfer import StepQueue
from tui_trainer.trace.waiting_gradients import OpenStep, WaitingGradients


class OptimizerSteps:
    """Follows the calls of `step`, and updates that a script makes by hand."""

    def __init__(
        self,
        faults: Faults,
        gate: Gate,
        phases: Phases,
        registry: OptimizerRegistry,
        waiting: WaitingGradients,
        open_step: OpenStep,
        scaling: GradScaling,
        evaluation: EvaluationLosses,
        modes: EvaluationModes,
        origins: NonFiniteOrigins,
        queue: StepQueue,
        observers: Observers,
        resume: Callable[[bool], None],
    ) -> None:
        """`resume(stepped)` is called at the end of an abandoned step."""
        self.faults = faults
        self.begun = 0
        """Number of calls of `step` that began, of all optimizers."""
        self._gate = gate
        self._phases = phases
        self._registry = registry
        self._waiting = waiting
        self._open_step = open_step
        self._scaling = scaling
        self._evaluation = evaluation
        self._modes = modes
        self._origins = origins
        self._queue = queue
        self._observers = observers
        self._resume = resume

    def step_began(self, optimizer: Optimizer, closure: bool) -> None:
        self.begun += 1
        observers = self._observers
        if observers.rates is not None:
            observers.rates.step_began(optimizer)
        if observers.updates is not None:
            observers.updates.step_began(optimizer)
        if self.faults.given_up:
            self._open_step.outer = self._open_step.outer or id(optimizer)
        else:
            self._begin_step(optimizer, closure)

    @guarded
    def _begin_step(self, optimizer: Optimizer, closure: bool) -> None:
        if not self._phases.enter(STEP):
            self._open_step.inner += 1
            return
        self._open_step.outer = id(optimizer)
        self._phases.closure = closure
        self._open_step.begin()
        self._phases.before_step()
        measurer = self._registry.stepping(optimizer, self._follow_gradients)
        self._open_step.measurer = measurer
        measurer.prepare(self._phases.step, self._gate.stops_soon)
        if measurer.norms_read is not None:
            self._waiting.read(measurer)
        if optimizer in self._waiting.rescaled:
            self._waiting.rescaled.discard(optimizer)
            self._waiting.take_unseen()
            measurer.do_not_read(Absent.CHANGED_BY_FRAMEWORK)
        if not closure:
            self._follow_gradients()
            if measurer.reading is None:
                self._waiting.read(measurer)
            if measurer.reading is not None:
                self._origins.before_step(measurer, measurer.reading.norms)
        self._origins.stepped()
        measurer.watch_update()
        skip_flag = torch_private.skip_flag(optimizer)
        measurer.skip = None if skip_flag is None else (skip_flag, self._scaling.loss_scale())
        measurer.probes.before_update()
        self._phases.run()

    def _follow_gradients(self) -> None:
        """Follow the script's own changes of gradients since the last phase."""
        self._waiting.take_unseen()
        self._waiting.follow_changes_by_hand()

    @guarded
    def evaluation_began(self) -> None:
        """The closure of the open `step` is called."""
        self._open_step.evaluations += 1

    @guarded
    def evaluation_ended(self) -> None:
        measurer = self._open_step.measurer
        if measurer is not None and self._open_step.evaluations == 1:
            self._phases.stop_clock()
            self._follow_gradients()
            if measurer.reading is None:
                self._waiting.read(measurer)
            self._open_step.evaluated = measurer
            self._phases.resume_clock()

    def step_ended(self, optimizer: Optimizer) -> None:
        """The weights have changed."""
        observers = self._observers
        if observers.updates is not None:
            observers.updates.step_ended(optimizer)
        step = self._phases.step
        self._end_step(optimizer)
        if self.faults.given_up and id(optimizer) == self._open_step.outer:
            self._resume(self._phases.step == step)
        if observers.rates is not None:
            observers.rates.step_ended(optimizer)

    @guarded
    def _end_step(self, optimizer: Optimizer) -> None:
        began = perf_counter()
        if self._open_step.inner:
            self._open_step.inner -= 1
            return
        if not self._phases.close(STEP):
            return
        self._phases.stop_clock()
        measurer = self._open_step.measurer
        self._open_step.reset()
        if measurer is None:
            return
        if measurer.reading is None:
            self._waiting.read(measurer)
        if self._phases.closure:
            measurer.marks.remember()  # the gradients of the last evaluation
        rate = optimizer.param_groups[0].get("lr", absent(Absent.NO_LEARNING_RATE))
        evaluations = (
            self._open_step.evaluations if self._phases.closure else absent(Absent.NO_CLOSURE)
        )
        self._complete(measurer, rate, evaluations, began)

    def end_by_hand(self, zeroing: bool = False) -> None:
        """Complete the step of a script that updates its weights by itself, if it has done so.

        Gradients that are zeroed count as used where their update would be too small to be seen.
        The script's own changes of gradients since the last phase are not followed: it may have
        made them after the update.
        """
        measurer = self._registry.by_hand
        if measurer is None or not measurer.passes or self._phases.open is not None:
            return
        weights = measurer.weights
        if weights is None:
            return
        if not weights.changed() and not (
            measurer.hides_updates() and (zeroing or measurer.thrown_away())
        ):
            return
        began = perf_counter()
        measurer.updated_by_hand()
        if not measurer.any_gradient():  # released since the update that used them
            for backward in measurer.passes:
                backward.returned = {}
        self._waiting.resolve_returned(measurer)
        self._phases.end_step_by_hand()
        measurer.marks.remember()
        rate, evaluations = absent(Absent.NO_LEARNING_RATE), absent(Absent.NO_CLOSURE)
        self._complete(measurer, rate, evaluations, began)

    def _complete(
        self, measurer: StepMeasurer, rate: Any, evaluations: float, began: float
    ) -> None:
        """Complete the step of `measurer`. `began`: time at which our own work for it began."""
        phases, faults = self._phases, self.faults
        step, passes = phases.step, measurer.passes
        shared = bool(passes)
        for backward in passes:
            shared = shared and backward.used
        mixed = len(passes) > 1 and not shared and not evaluations > 0 and _are_mixed(passes)
        step_ms, times = phases.complete_step(measurer.slot, shared, bool(measurer.clips))
        self._scaling.end_step()
        if self._waiting.unclaimed is not None:
            self._waiting.unclaimed.used = True
            self._waiting.unclaimed = None
        for backward in passes:
            backward.used = True
            backward.claims.discard(measurer)
        outcome = StepOutcome(
            step=step,
            losses=passes[0].losses
            if len(passes) == 1
            else [loss for each in passes for loss in each.losses]
            if passes
            else None,
            learning_rate=rate if isinstance(rate, torch.Tensor) else float(rate),
            step_ms=step_ms,
            times=times,
            clips=measurer.clips,
            evaluations=evaluations,
        )
        completed = measurer.after_update(outcome)
        if mixed:
            completed.signs |= {"mixed_losses"}
        if self._modes.in_train_mode(step, self._evaluation.losses_computed):
            completed.signs |= {"evaluated_in_train_mode"}
        if measurer.trainable_changed:
            measurer.trainable_changed = False
            self._registry.update_trainable(measurer)
        accounted = perf_counter()
        overhead_ms = (faults.own_s + accounted - began) * 1e3
        own_ms = completed.own_ms
        own_ms["tracer"] = max(0.0, overhead_ms - sum(own_ms.values()))
        self._queue.put(measurer, completed, self._gate.armed)
        # `guarded` adds the time of this whole call, part of which is accounted for already.
        faults.own_s = began - accounted - self._queue.take_accounted_s()
        if self._observers.loop is not None:
            self._observers.loop.step_completed(step)
        unseen = phases.unseen()
        if unseen is not None:
            self._registry.set_phases_unseen(unseen)
        phases.next_step()
        faults.in_a_row = 0

    def step_skipped(self, optimizer: Optimizer) -> None:
        """A GradScaler did not call `optimizer.step`."""
        if self._skip_step(optimizer) and self._gate.break_phases:
            self._phases.iteration_skipped()
        if self.faults.given_up:
            self._resume(False)

    @guarded
    def _skip_step(self, optimizer: Optimizer) -> bool:
        """Record a skipped iteration; return whether gradients were waiting."""
        measurer = self._registry.measurer_for(unwrapped_optimizer(optimizer))
        self._phases.stop_clock()
        self._waiting.take_unseen()
        if measurer.reading is None:
            self._waiting.read(measurer)
        passes = measurer.passes
        knowledge = measurer.lose()
        for backward in passes:
            backward.claims.discard(measurer)
            backward.used, backward.lost = True, [knowledge]
        self._waiting.skip(passes, "scaler")
        self._phases.resume_clock()
        return bool(passes)


def _are_mixed(passes: Sequence[BackwardPass]) -> bool:
    """Whether another optimizer has used one of `passes` alone and may use a later one as well."""
    used = any(each.used for each in passes)
    return used and any(not each.used and len(each.claims) > 1 for each in passes)
