"""Follows gradients between backward and the optimizer's step: how the script changes them by
itself, and which of them it discards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim.optimizer import Optimizer

from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.events import ClipKind, SkipReason
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.norms import total_of
from tui_trainer.trace.optimizer_registry import OptimizerRegistry
from tui_trainer.trace.parameters import parameters_of
from tui_trainer.trace.phases import Phases
from tui_trainer.trace.step import (
    BackwardPass,
    Clipping,
    GradientReading,
    GradScaling,
    HandChange,
    Returned,
    SkippedIteration,
    StepOutcome,
)
from tui_trainer.trace.step_measurer import StepMeasurer


@dataclass(eq=False)
class OpenStep:
    """The call of an optimizer's `step` that is open."""

    measurer: StepMeasurer | None = None
    evaluated: StepMeasurer | None = None
    """`measurer`, once its closure was evaluated: later passes belong to further evaluations."""
    evaluations: int = 0
    """Number of evaluations of the closure."""
    inner: int = 0
    """Depth of the open steps of other optimizers inside this one."""
    outer: int = 0
    """Identity of the outermost optimizer whose `step` is open, or was the last."""

    def begin(self) -> None:
        self.inner = self.evaluations = 0
        self.evaluated = None

    def reset(self) -> None:
        """The call is over, or abandoned."""
        self.measurer = self.evaluated = None
        self.inner = 0


class WaitingGradients:
    """Follows the gradients that wait for the steps of the optimizers of `registry`."""

    def __init__(
        self,
        registry: OptimizerRegistry,
        phases: Phases,
        scaling: GradScaling,
        gate: Gate,
        open_step: OpenStep,
        on_skip: Callable[[SkippedIteration], None],
    ) -> None:
        """`on_skip` is called with each iteration whose gradients no optimizer used."""
        self.registry = registry
        self._phases = phases
        self._scaling = scaling
        self._gate = gate
        self._open_step = open_step
        self._on_skip = on_skip
        self.unclaimed: BackwardPass | None = None
        """Backward passes since the last step that have reached no optimizer, as one."""
        self.rescaled: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers whose gradients a framework has unscaled and clipped with its own code."""

    @property
    def step(self) -> int:
        """The current optimizer step."""
        return self._phases.step

    @property
    def evaluating_further(self) -> bool:
        """Whether a closure is evaluated whose first evaluation was measured."""
        return self._open_step.evaluated is not None

    def waits(self, measurer: StepMeasurer) -> bool:
        """Whether gradients wait for this optimizer's step."""
        return bool(measurer.passes) and measurer is not self._open_step.evaluated

    def scale_of(self, measurer: StepMeasurer) -> torch.Tensor | None:
        """The factor (0-d) that a GradScaler still has on this optimizer's gradients, without
        waiting for the device; None without one."""
        if not self._scaling.in_use:
            return None
        return self._scaling.gradient_scale(self.registry.optimizer_of(measurer))

    def read(
        self,
        measurer: StepMeasurer,
        clipping: ClipKind | Literal[""] = "",
        gradients: list[torch.Tensor | None] | None = None,
    ) -> GradientReading:
        measurer.prepare(self._phases.step, self._gate.stops_soon)
        scale = self.scale_of(measurer) if self._scaling.in_use else None
        return measurer.read_gradients(scale, clipping, gradients)

    def take_unseen(self) -> None:
        """Take note of gradients that came without a visible backward: set by the script, or by
        code that calls the autograd engine directly."""
        for measurer in self.registry.measurers:
            if measurer.passes:
                self.resolve_returned(measurer)
            if not measurer.passes and measurer.marks.changed() and measurer.any_gradient():
                # Gradients changed in place are those that the last step has used.
                others = any(each.passes for each in self.registry.measurers)
                used = (others or self._phases.just_stepped) and not measurer.marks.any_replaced()
                if not used and not self._waits_elsewhere(measurer):
                    # The script has copied gradients, as to weights in a higher precision.
                    losses = self.unclaimed.losses if self.unclaimed is not None else ()
                    measurer.add_pass(BackwardPass([*losses]))
                    measurer.given_gradients = True
                measurer.marks.remember()

    def add_unclaimed(self, backward: BackwardPass) -> None:
        """A backward pass has reached no optimizer."""
        if self.unclaimed is None:
            self.unclaimed = backward
        elif self.unclaimed is not backward:
            self.unclaimed.add(backward.losses)

    def _waits_elsewhere(self, measurer: StepMeasurer) -> bool:
        """Whether the changed gradients wait for the step of another optimizer that shares their
        parameters, for which the script has then changed them."""
        changed = measurer.marks.changed_positions()
        if not changed:
            return False
        waiting = [each for each in self.registry.measurers if each.passes]
        parameters = [measurer.tracked.parameters[place] for place in changed]
        return all(any(id(p) in each.tracked.ids for each in waiting) for p in parameters)

    def averaged(self, tensors: Sequence[torch.Tensor]) -> None:
        """The script reduces `tensors` over several processes: gradients, or a buffer of them."""
        if any(tensor.numel() > 1 for tensor in tensors):
            for measurer in self.registry.measurers:
                if measurer.passes:
                    measurer.averaged = True

    def resolve_returned(self, measurer: StepMeasurer) -> None:
        """Keep the passes by `torch.autograd.grad` whose gradients the script has assigned."""
        for backward in measurer.passes.copy():
            if not backward.returned:
                continue
            returned, backward.returned = backward.returned, {}
            for holder in list(backward.claims):
                self._resolve_for(holder, backward, returned)

    def _resolve_for(
        self,
        measurer: StepMeasurer,
        backward: BackwardPass,
        returned: Returned,
    ) -> None:
        same, some = measurer.has_gradients(returned)
        alone = len(measurer.passes) == 1
        if some or (alone and measurer.marks.changed() and measurer.any_gradient()):
            if not same:  # changed before they were assigned
                measurer.reading = None
            measurer.marks.assigned(returned)
        else:
            measurer.passes.remove(backward)
            backward.claims.discard(measurer)
            measurer.marks.remember()

    def follow_changes_by_hand(self) -> None:
        """Record a clipping by hand if the script itself has changed gradients between backward and
        step: scaled, clipped or averaged them."""
        changes: list[HandChange] = []
        for measurer in self.registry.measurers:
            if measurer.passes and measurer is not self._open_step.evaluated:
                change = measurer.change_by_hand()
                if change is not None:
                    changes.append(change)
        if not changes:
            return
        before = [change.before for change in changes]
        positions = _distinct(changes)
        clipping = Clipping(
            kind="hand",
            max_norm=absent(Absent.NO_LIMIT),
            norm_before=absent(Absent.CHANGED_BY_HAND)
            if None in before
            else total_of(before, positions),
            norm_after=total_of([change.after for change in changes], positions),
            total=None,
            two_norm=True,
            scales={id(change.measurer): self.scale_of(change.measurer) for change in changes},
            tentative=all(change.tentative for change in changes),
        )
        for change in changes:
            measurer = change.measurer
            clipping.positions[id(measurer)] = change.positions
            if change.reading is not None:
                clipping.readings[id(measurer)] = change.reading
            measurer.clips.append(clipping)

    # ------------------------------------------------------------ discarded gradients

    def zeroed(self, owner: Optimizer | torch.nn.Module) -> None:
        """`owner.zero_grad()` has returned: release the passes of the optimizers that have no
        gradients left."""
        waiting = [m for m in self.registry.measurers if m.passes and self.waits(m)]
        if not waiting:
            return
        zeroed = _zeroed_by(owner)
        lost: list[BackwardPass] = []
        for measurer in waiting:
            if measurer.gradients_zeroed(zeroed):
                lost += self._discard(measurer)
        self.skip(lost, "hand")

    def _discard(self, measurer: StepMeasurer) -> list[BackwardPass]:
        """Discard the gradients of `measurer`; return the passes that no optimizer has used or can
        still use."""
        passes = measurer.passes
        knowledge = measurer.lose()
        if measurer.unstepped is not None and measurer.changes_without_step():
            self.registry.set_aside(measurer)
        lost: list[BackwardPass] = []
        for backward in passes:
            backward.claims.discard(measurer)
            if measurer is self._open_step.measurer:
                backward.used = True  # a closure begins its next evaluation
            backward.lost.append(knowledge)
            if not backward.claims and not backward.used:
                lost.append(backward)
        return lost

    def skip(self, lost: list[BackwardPass], reason: SkipReason) -> None:
        """Report an iteration whose gradients no optimizer used."""
        if not lost:
            return
        losses = [loss for backward in lost for loss in backward.losses]
        step_ms, times = self._phases.discard_iteration()
        parts = []
        # For each optimizer its last knowledge: passes may have been discarded one by one.
        made = {part.number: part for backward in lost for part in backward.lost}
        for knowledge in {made[n].measurer: made[n] for n in sorted(made)}.values():
            outcome = StepOutcome(
                step=self._phases.step,
                losses=losses,
                learning_rate=absent(Absent.NOT_MEASURED),
                step_ms=step_ms,
                times=times,
                clips=knowledge.clips,
            )
            parts.append((knowledge.measurer, knowledge.measurer.skipped(outcome, knowledge)))
        scale = self._scaling.read_loss_scale() if reason == "scaler" else None
        producers = (backward.producer for backward in lost if backward.producer is not None)
        batches = (backward.bad_batch for backward in lost if backward.bad_batch is not None)
        skipped = SkippedIteration(reason, scale, parts, next(producers, None), next(batches, None))
        self._on_skip(skipped)

    def between_passes(self, measurer: StepMeasurer) -> None:
        """Follow the script's own changes of gradients before a further backward."""
        self.resolve_returned(measurer)
        if not measurer.passes or measurer is self._open_step.evaluated:
            return
        if not measurer.changed_between_passes():
            return
        if not measurer.thrown_away():
            self.follow_changes_by_hand()
        else:
            self.skip(self._discard(measurer), "hand")
            measurer.zeroes_by_hand = True
            measurer.marks.forget()


def _distinct(changes: Sequence[HandChange]) -> list[list[int] | None]:
    """The positions of the changed parameters, each parameter with one measurer only."""
    seen: set[int] = set()
    found: list[list[int] | None] = []
    for change in changes:
        parameters = change.measurer.tracked.parameters
        positions = range(len(parameters)) if change.positions is None else change.positions
        new = [position for position in positions if id(parameters[position]) not in seen]
        seen.update(id(parameters[position]) for position in new)
        found.append(None if len(new) == len(parameters) else new)
    return found


def _zeroed_by(owner: Optimizer | torch.nn.Module) -> Callable[[torch.Tensor], bool]:
    """A predicate of a parameter: whether `owner.zero_grad()` zeroes its gradient."""
    if isinstance(owner, Optimizer):
        ids = {id(p) for p in parameters_of(owner)}
    else:
        ids = {id(p) for p in owner.parameters()}
    return lambda parameter: id(parameter) in ids
