"""Measures the steps of one optimizer: follows its gradients and calls its probes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import is_
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import Sign
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent
from tui_trainer.protocol.events import ClipKind
from tui_trainer.trace.governor import ActiveProbe, OnChange
from tui_trainer.trace.norms import (
    Norms,
    close,
    differing,
    equal,
    exact_in_float32,
    is_zero,
    norms_before,
    norms_from_after,
    only_scaled_down,
)
from tui_trainer.trace.optimizer_slot import OptimizerSlot
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import (
    Gradient,
    Probe,
    ProbeOptions,
    Reading,
    Readings,
    RecorderLike,
    skipped_text,
)
from tui_trainer.trace.probe_set import ProbeSet
from tui_trainer.trace.script_changes import GradientMarks, WeightWatch
from tui_trainer.trace.step import (
    BackwardPass,
    Clipping,
    CompletedStep,
    GradientReading,
    HandChange,
    Header,
    LostGradients,
    Returned,
    StepOutcome,
    record_of,
)
from tui_trainer.trace.torch_private import NormCapture
from tui_trainer.trace.transfer import TransferPart

NO_SIGNS: frozenset[Sign] = frozenset()
NO_POSITIONS: frozenset[int] = frozenset()
CAREFUL_STEPS = 3
"""Number of first steps in which gradients are read after every backward, until the tracer knows
how the script treats them. Later they are read at the clipping, which costs nothing, or once, at
the step."""
NONFINITE_STEPS = 3
"""Maximum number of steps in a row that are measured because loss or gradients are not finite."""
CHANGES_WITHOUT_STEP = 3
"""The script is assumed to update weights by itself once they have changed in this many iterations
although their optimizer has never stepped. Fewer changes may be perturbations, as in SAM."""


class StepMeasurer:
    """Follows the gradients of one optimizer, calls its probes in the course of its steps, and
    records their rows."""

    def __init__(
        self,
        tracked: TrackedParameters,
        kinds: Sequence[type[Probe]],
        recorder: RecorderLike,
        options: ProbeOptions,
        slot: OptimizerSlot,
        on_cadence_change: OnChange,
    ) -> None:
        self.tracked = tracked
        self.slot = slot
        self.probes = ProbeSet(tracked, kinds, recorder, options, slot, on_cadence_change)
        own = tracked.own
        self.marks = GradientMarks(tracked.parameters[:own], tracked.parameters[own:])
        self.passes: list[BackwardPass] = []
        """Backward passes whose gradients wait for the optimizer's step."""
        self.clips: list[Clipping] = []
        """Clippings of the waiting gradients."""
        self.reading: GradientReading | None = None
        """Norms of the gradients after the last of `passes`; None: not read yet."""
        self.skip: tuple[torch.Tensor, torch.Tensor] | None = None
        """(flag, loss scale), 0-d each, of an optimizer that skips steps with non-finite gradients
        by itself; it skips where the flag is above 0. Set when its step begins."""
        self.weights: WeightWatch | None = None
        """Set where the script updates the weights by hand."""
        self.unstepped: WeightWatch | None = None
        """Set until the optimizer first steps."""
        self._changes_without_step = 0
        self.left_alone = NO_POSITIONS
        """Positions of the parameters that the last update by hand has not changed."""
        self._own = tracked.parameters[:own]
        """The parameters that the optimizer, or the script by hand, updates."""
        self._updated: set[int] = set()
        """Positions of the parameters that the script has updated by hand so far."""
        self.trainable_changed = False
        """Whether parameters were frozen or unfrozen since the last description of the run."""
        self.scaled = False
        """Whether a GradScaler is in use."""
        self.changed_by_hand = False
        """Whether the script has changed gradients by itself, so that they are read at once."""
        self.zeroes_by_hand = False
        """Whether the script zeroes or releases gradients without `zero_grad`. Norms that are due
        are then read after every backward: the tracer learns too late which gradients are
        discarded."""
        self.given_gradients = False
        """Whether the script has set gradients that no backward has computed for this optimizer."""
        self._recorder = recorder
        self._norms = Norms(tracked.parameters, tracked.device)
        self._steps = 0
        self.float32_exact = False
        """Whether the last norms were within EXACT_IN_FLOAT32."""
        self._prepared_step = -1
        self._awaiting_norms = False
        """Whether norms are expected from the clipping in progress."""
        self._clip_norms_complete = False
        """Whether the last clipping gave the norm of every gradient."""
        self._kept_before = False
        """Whether the open backward adds to gradients that a step has used already."""
        self.noticed: set[Sign] = set()
        """Signs of the step in progress."""
        self.averaged = False
        """Whether the script has reduced gradients over several processes by itself: its later
        changes of them may belong to the averaging."""
        self._calls = 0
        """Number of calls of models in the last step."""
        self._latest: Readings | None = None
        """Norms after the last known change."""
        self._partly_unscaled = False
        """Whether `unscale_` has left the gradients of parameters in no optimizer scaled."""
        self._nonfinite_steps = 0
        """Steps in a row whose loss or gradients were not finite, up to NONFINITE_STEPS."""
        self.norms_read: Readings | None = None
        """Norms of the waiting gradients, as read by the measurer that this one replaces, perhaps
        before they were clipped. Empty where it has not read them."""
        self._frozen = frozenset(i for i, t in enumerate(tracked.trainable) if not t)
        self._frozen_zeros = NO_POSITIONS
        """Positions of frozen parameters on which `zero_grad` has left a gradient of zeros."""
        self._on_host = self.probes.on_host

    def take_over(self, before: StepMeasurer) -> None:
        """Continue in place of a measurer of the same optimizer, with other parameters."""
        self.passes, self.clips = before.passes, before.clips
        for backward in self.passes:
            backward.claims.discard(before)
            backward.claims.add(self)
        for clip in self.clips:
            clip.positions.pop(id(before), None)
            clip.readings.pop(id(before), None)
            clip.scales[id(self)] = clip.scales.pop(id(before), None)
        if self.passes and before.reading is not None:
            self.norms_read = self._norms_of(before.reading, before.tracked.parameters)
        self.changed_by_hand = before.changed_by_hand
        self.zeroes_by_hand = before.zeroes_by_hand
        self.given_gradients = before.given_gradients
        self.marks.remember()
        if self.passes and before._latest is not None and self._on_host and before._on_host:
            known = dict(zip(map(id, before.tracked.parameters), before._latest, strict=True))
            pairs = zip(self.tracked.parameters, self.norms_now(), strict=True)
            self._latest = [known.get(id(parameter), norm) for parameter, norm in pairs]

    def _norms_of(self, reading: GradientReading, given: Sequence[torch.Tensor]) -> Readings:
        """Norms in the order of our own parameters, from a `reading` of the parameters `given`."""
        parameters = self.tracked.parameters
        if len(given) == len(parameters) and all(map(is_, given, parameters)):
            return reading.norms or ()
        if reading.norms is None or not self._on_host:
            return ()
        known = dict(zip(map(id, given), reading.norms, strict=True))
        # A parameter that was added since then had no gradient to be clipped.
        now = self.norms_now()
        return [known.get(id(p), norm) for p, norm in zip(parameters, now, strict=True)]

    @property
    def has_stepped(self) -> bool:
        return self._steps > 0

    def changes_without_step(self) -> bool:
        """Whether the weights have changed in several iterations although the optimizer has never
        stepped. Called when gradients are discarded."""
        if self.unstepped is None or not self.unstepped.changed():
            return False
        self.unstepped.remember()
        self._changes_without_step += 1
        return self._changes_without_step >= CHANGES_WITHOUT_STEP

    def updates_those_of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `optimizer` has the same parameters, judged by its first one."""
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        return id(first) in self.tracked.ids

    # ------------------------------------------------------------ the gradients

    @property
    def careful(self) -> bool:
        """Whether gradients are read after every backward, so that their norms are known whatever
        happens to them afterwards."""
        return (
            self._steps < CAREFUL_STEPS
            or self.changed_by_hand
            or self.weights is not None
            or not self.float32_exact
            # `unscale_` leaves the gradients of parameters in no optimizer as they are.
            or (self.scaled and self.tracked.own < len(self.tracked.parameters))
        )

    @property
    def reads_early(self) -> bool:
        """Whether gradients are read after every backward if their norms are due."""
        return self.zeroes_by_hand or self.careful

    def before_backward(self) -> None:
        """A backward begins: remember the gradients, to see whether it reaches this optimizer."""
        if 0 < self._steps <= CAREFUL_STEPS and not self.passes and self.marks.changed():
            self.zeroes_by_hand = True  # a change by `zero_grad` would be known
        there = self.marks.before_backward()
        if not self.passes:
            self._kept_before = there and self.marks.any_kept()
            if self._kept_before and self.careful and self.all_zero():
                self._kept_before = False  # zeroed through `.data`, which leaves no mark
                self.changed_by_hand = True

    def reached_by_backward(self) -> bool:
        """Whether the backward that has just ended changed any gradient."""
        reached = self.marks.reached_by_backward()
        if reached and not self.passes:
            if self._kept_before:
                self.noticed.add("kept_gradients")
            else:
                self.noticed.discard("kept_gradients")
        return reached

    def add_pass(self, backward: BackwardPass) -> None:
        """The gradients of `backward` wait for this optimizer."""
        backward.claims.add(self)
        if not self.passes or self.passes[-1] is not backward:
            self.passes.append(backward)
        self.reading = self.norms_read = None

    def changed_between_passes(self) -> bool:
        """Whether the script has changed gradients since the last known change; while this measurer
        is careful, also through `.data`."""
        if self.marks.changed():
            return True
        if not (self.careful and self._on_host and self._latest is not None):
            return False
        own = self.tracked.own
        changed = not equal(self._latest[:own], self.norms_now()[:own])
        self.changed_by_hand = self.changed_by_hand or changed
        return changed

    def probably_changed(self) -> bool:
        """Like `changed_between_passes`, checked on one parameter where that is enough."""
        if self.careful:
            return self.changed_between_passes()
        return self.marks.first_changed()

    def change_by_hand(self) -> HandChange | None:
        """The script's own change of the gradients since the last known change; None without one.

        In-place operations raise the version of a gradient, except for those on `grad.data`: while
        this measurer is careful, norms are compared as well. Gradients that the script has released
        or zeroed count as discarded, not as changed.
        """
        changed = self.marks.changed()
        compare = self._latest is not None and self.careful
        if not changed and not compare:
            return None
        if self.averaged and self.reading is None:
            self.marks.remember()
            return None
        positions = self.marks.changed_positions() if changed else None
        before, after = self._latest, self.norms_now()
        self._latest = after
        if self._on_host and before is not None and (positions is not None or not changed):
            changed_norms = differing(before, after)
            if not changed and not any(place < self.tracked.own for place in changed_norms):
                if not changed_norms:
                    self._latest = before  # `use_clip_norms` compares it with the reading
                return None
            positions = sorted({*(positions or ()), *changed_norms})
        elif changed and positions is None:
            positions = self._probable_positions(before, after)
        if positions is not None and not (positions := self._kept(positions, after)):
            if self.thrown_away():
                self._latest = before  # the next forward or backward notices the difference
            else:
                self.marks.remember()
            return None
        self.changed_by_hand = self.changed_by_hand or changed or self._on_host
        self.marks.remember()
        if self.reading is not None and (
            self.averaged or (self._on_host and not only_scaled_down(before, after))
        ):
            self._replace_norms(after)
            return None
        if self.reading is None:
            codes = np.full(len(self.tracked.parameters), Absent.CHANGED_BY_HAND, np.uint8)
            self.reading, before = GradientReading(None, None, codes), None
        known = self.reading if before is self.reading.norms else GradientReading(before)
        return HandChange(self, before, after, positions, known, not (changed or self._on_host))

    def _probable_positions(self, before: Readings | None, after: Readings) -> list[int] | None:
        """Positions of the parameters whose gradients probably changed, where not all of them are
        watched; None: any of them."""
        if self._on_host and before is not None and (found := differing(before, after)):
            return found
        if not self._kept(self.marks.changed_watched(), after):
            return []  # released or zeroed
        there = [place for place, p in enumerate(self.tracked.parameters) if p.grad is not None]
        return None if len(there) == len(self.tracked.parameters) else there

    def _kept(self, positions: list[int], norms: Readings) -> list[int]:
        """The `positions` of gradients that are present and not known to be zero."""
        parameters = self.tracked.parameters
        kept = [place for place in positions if parameters[place].grad is not None]
        return [place for place in kept if norms[place] != 0] if self._on_host else kept

    def _replace_norms(self, norms: Readings) -> None:
        """Take the `norms` of gradients that the script has set in place of those of backward."""
        assert self.reading is not None
        self.reading = GradientReading(norms, None, self._why_absent(self.tracked.gradients()))
        self.probes.gradient_norms(norms)

    def after_clipping(self, clipping: Clipping) -> None:
        """Gradients were clipped by a function of PyTorch."""
        self._latest = self.norms_now() if self.careful else None
        if clipping.kind == "norm" and clipping.positions[id(self)] is None:
            self.marks.clipped()
        else:
            self.marks.remember()

    def refresh_norms(self) -> None:
        """Gradients were unscaled after they were read."""
        if self.careful:
            self._latest = self.norms_now()
            self._partly_unscaled = self.tracked.own < len(self.tracked.parameters)

    def before_clipping(self) -> GradientReading | None:
        """The gradients as the first clipping of the step found them."""
        if self._partly_unscaled and self._latest is not None:
            return GradientReading(self._latest)
        return self.reading

    def has_gradients(self, returned: Returned) -> tuple[bool, bool]:
        """(all, any): whether the gradients of this optimizer's parameters that were given to
        `torch.autograd.grad` are tensors that the function returned."""
        ids = {id(g) for g in (reference() for reference, _ in returned.values()) if g is not None}
        own = self.tracked.parameters[: self.tracked.own]
        there = {id(p): p.grad for p in own if p.grad is not None}
        asked = [key for key in there if key in returned] or there
        among = [id(there[key]) in ids for key in asked]
        return bool(among) and all(among), any(among)

    def positions_of(self, given: list[torch.Tensor]) -> list[int] | None:
        """Positions of the parameters `given`; None: all that are tracked."""
        parameters = self.tracked.parameters
        if len(given) == len(parameters) and all(map(is_, given, parameters)):
            return None
        ids = {id(parameter) for parameter in given}
        found = [i for i, p in enumerate(self.tracked.parameters) if id(p) in ids]
        return None if len(found) == len(self.tracked.parameters) else found

    def captured(self, captured: NormCapture) -> GradientReading:
        """The gradients before a clipping that is not the first of the step."""
        by_gradient = captured.by_gradient()
        norms: list[Reading] = []
        for gradient in self.tracked.gradients():
            norm = None if gradient is None else by_gradient.get(id(gradient))
            norms.append(0.0 if norm is None else norm)
        return GradientReading(norms)

    def gradients_zeroed(self, zeroed: Callable[[torch.Tensor], bool]) -> bool:
        """Whether none of this optimizer's gradients is left after the parameters for which
        `zeroed` is true were zeroed."""
        return all(p.grad is None or zeroed(p) for p in self._own)

    def any_gradient(self) -> bool:
        return any(p.grad is not None for p in self._own)

    def all_zero(self) -> bool:
        """Whether every gradient is zero. Waits for the device."""
        return not any(p.grad is not None and not is_zero(p.grad) for p in self._own)

    def thrown_away(self) -> bool:
        """Whether the script has released or zeroed all gradients that it uses.

        A script that updates weights by itself uses the gradients of the weights that it has
        updated so far; before its first update, those that it zeroes by itself."""
        if not self.any_gradient() or self.all_zero():
            return True
        if self.weights is None or self._updated:
            return False
        changed = self.marks.changed_positions() or ()
        gradients = [self.tracked.parameters[place].grad for place in changed]
        return bool(gradients) and all(g is None or is_zero(g) for g in gradients)

    def hides_updates(self) -> bool:
        """Whether an update by hand would be too small to be seen. False before the first one."""
        return self.weights is not None and self.weights.too_small(self._updated)

    def updated_by_hand(self) -> None:
        """The script has updated weights by itself."""
        if self.weights is None:
            return
        parameters = self.tracked.parameters[: self.tracked.own]
        self.left_alone = self.weights.left_alone()
        if len(self.left_alone) == len(parameters):
            self.left_alone = NO_POSITIONS
        self._updated |= set(range(len(parameters))) - self.left_alone
        self._own = [p for place, p in enumerate(parameters) if place in self._updated]

    # ------------------------------------------------------------ in the course of a step

    def prepare(self, step: int, stops_soon: bool) -> None:
        """Choose, once per step, the probes that measure it."""
        # Gradients may have been read before another optimizer's step.
        if self._prepared_step == step or self.reading is not None:
            if stops_soon:
                reading = self.reading
                norms = None if reading is None else reading.norms
                self.probes.measure_before_pause(step, reading is not None, norms)
            return
        self._prepared_step = step
        self.probes.begin_step(step, stops_soon)

    def watch_update(self) -> None:
        """Measure a step whose loss or gradients are not finite before the optimizer uses them: the
        weights will not be finite either. Only on the CPU, where values can be read at once."""
        reading = self.reading
        if not self._on_host or reading is None:
            return
        finite = all(_is_finite(loss) for backward in self.passes for loss in backward.losses)
        if finite and reading.norms is not None:
            finite = math.isfinite(sum(n for n in reading.norms if isinstance(n, float)))
        if finite:
            self._nonfinite_steps = 0
            return
        if self._nonfinite_steps >= NONFINITE_STEPS:
            return
        self._nonfinite_steps += 1
        if reading.norms is None and reading.absent is None and not self.clips:
            reading.norms = self.norms_now()
        self.probes.measure_norms(reading.norms)

    def read_gradients(
        self,
        scale: torch.Tensor | None,
        clipping: ClipKind | Literal[""] = "",
        gradients: list[Gradient] | None = None,
    ) -> GradientReading:
        """Read the complete gradients before clipping. `scale`: a factor still on them.

        `clipping`: the kind of clipping that follows; after one by norm, `use_clip_norms` is
        called. `gradients`: the result of `torch.autograd.grad`, instead of the current gradients.
        """
        careful = self.careful
        if clipping or careful:
            self.probes.schedule.add_clipping()
        self._awaiting_norms = (
            clipping == "norm" and self._clip_norms_complete and not careful and gradients is None
        )
        plan = self.probes.schedule.plan
        found = self.tracked.gradients() if gradients is None else gradients
        reading = self.reading = GradientReading(None, scale, self._why_absent(found))
        if self.norms_read is not None:
            self._use_norms(reading, self.norms_read)
            return reading
        if plan.gradients or plan.gradient_norms or careful:
            with self.probes.context:
                if plan.gradients:
                    self.probes.gradients(found)
                if not self._awaiting_norms and (plan.gradient_norms or careful):
                    self._read_norms(reading, found)
        return reading

    def _use_norms(self, reading: GradientReading, norms: Readings) -> None:
        self._awaiting_norms, self.norms_read = False, None
        if not norms:
            self.do_not_read()
            return
        reading.norms = norms
        self.probes.gradient_norms(norms)

    def do_not_read(self, why: Absent = Absent.CHANGED_BY_HAND) -> None:
        """Give up reading the waiting gradients, which were changed in an unknown way."""
        codes = np.full(len(self.tracked.parameters), why, np.uint8)
        self.reading = GradientReading(None, None, codes)

    def norms_now(self) -> Readings:
        """The norms of the current gradients."""
        with self.probes.context:
            return self._norms.read(self.tracked.gradients())

    def _read_norms(self, reading: GradientReading, gradients: list[Gradient]) -> None:
        began = perf_counter()
        norms = self._norms.read(gradients)
        spent_s = perf_counter() - began
        reading.norms = self._latest = norms
        self.probes.gradient_norms(norms, spent_s)
        if self._on_host:
            self.float32_exact = exact_in_float32(
                [norm for norm in norms if isinstance(norm, float)]
            )

    def _why_absent(self, gradients: Sequence[Gradient]) -> NDArray[np.uint8] | None:
        if not self.tracked.empty and not any(map(is_, gradients, repeat(None))):
            absent, frozen = None, NO_POSITIONS
        else:
            absent = self.tracked.why_absent(gradients)
            frozen = frozenset(np.flatnonzero(absent == Absent.FROZEN).tolist())
        if frozen != self._frozen:
            self._frozen = frozen
            self.trainable_changed = True
        return absent

    def _find_unused_zeros(self, reading: GradientReading) -> None:
        """Mark as absent the gradients that `zero_grad(set_to_none=False)` has left at zero on
        parameters that were frozen or replaced since. Only on the CPU, where norms are known."""
        if not self._on_host or reading.norms is None:
            return
        if 0.0 not in reading.norms and not self._frozen_zeros:
            return
        zero = [i for i, norm in enumerate(reading.norms) if type(norm) is float and norm == 0]
        if not zero and not self._frozen_zeros:
            return
        parameters, gone = self.tracked.parameters, self.tracked.gone
        absent = reading.absent
        if absent is not None:
            zero = [place for place in zero if not absent[place]]
        frozen = frozenset(i for i in zero if i not in gone and not parameters[i].requires_grad)
        if frozen != self._frozen_zeros:
            self._frozen_zeros = frozen
            self.trainable_changed = True
        replaced = gone.intersection(zero)
        if frozen or replaced:
            codes = np.zeros(len(parameters), np.uint8) if absent is None else absent.copy()
            codes[list(frozen)] = Absent.FROZEN
            codes[list(replaced)] = Absent.NOT_IN_MODEL
            reading.absent = codes

    def use_clip_norms(
        self, captured: NormCapture, clipped: Any, limit: Any, total: torch.Tensor
    ) -> None:
        """Use the norms that a clipping of the parameters `clipped` computed, with their `total`.

        They replace our own reading once a clipping has computed every norm, so that a step has the
        same digits whether it was read before or not.
        """
        norms: Readings | None = captured.norms_of(clipped, self.tracked.parameters)
        awaited, self._awaiting_norms = self._awaiting_norms, False
        if norms is not None:
            self._clip_norms_complete = True
        else:
            gradients = self.tracked.gradients()
            by_gradient = captured.by_gradient()
            self._clip_norms_complete = all(g is None or id(g) in by_gradient for g in gradients)
            if awaited or self._clip_norms_complete:
                with self.probes.context:
                    norms = norms_before(gradients, by_gradient, clipped, limit, total)
        if norms is None or self.reading is None:
            return
        known = self.reading.norms
        if awaited or (self._on_host and not self.clips and known is self._latest is not None):
            if self._on_host:
                norms = self._checked(norms, None if awaited else known, clipped, limit, total)
            if not awaited and not close(known, norms):
                return  # gradients were changed through `.data` since they were read
            self.reading.norms = norms
            self.probes.gradient_norms(norms)

    def clip_failed(self) -> None:
        """The clipping raised before it changed any gradient: read the norms if not done yet."""
        self._awaiting_norms = False
        if self.reading is not None and self.reading.norms is None:
            with self.probes.context:
                self._read_norms(self.reading, self.tracked.gradients())

    def _checked(
        self,
        norms: Readings,
        known: Readings | None,
        clipped: Any,
        limit: Any,
        total: torch.Tensor,
    ) -> Readings:
        """Norms that a clipping computed on the CPU; those that may have lost digits are computed
        again. `known`: our own norms, where they were read: the others may have underflowed to 0.
        """
        values: list[float] = []
        for norm in norms:
            if not isinstance(norm, torch.Tensor):
                values.append(norm)
            elif norm.dim():
                values += norm.tolist()
            else:
                values.append(norm.item())
        judged = values if known is None else [n for n in known if isinstance(n, float)]
        self.float32_exact = exact_in_float32(judged)
        if self.float32_exact:
            return values
        with self.probes.context:
            after = self._norms.read(self.tracked.gradients())
        factor = min(1.0, float(limit) / (float(total) + 1e-6))
        given = [clipped] if isinstance(clipped, torch.Tensor) else clipped
        scaled = {id(p) for p in given}
        factors = [factor if id(p) in scaled else 1.0 for p in self.tracked.parameters]
        return norms_from_after(values, after, factors)

    def after_update(self, outcome: StepOutcome) -> CompletedStep:
        """The optimizer has changed the weights: read them and start the transfer to the host."""
        measured = self.probes.after_update()
        reading = self.reading or GradientReading()
        self._find_unused_zeros(reading)
        completed = self._complete(outcome, reading, measured.probes, measured.reading)
        completed.signs = self._signs()
        passes = self.passes
        if len(passes) == 1:
            completed.loss_graph = passes[0].loss_graph
        for backward in passes:
            if backward.cross_entropy is not None and backward is passes[0]:
                completed.classes = self._classes()
            completed.producer = completed.producer or backward.producer
            completed.bad_batch = completed.bad_batch or backward.bad_batch
        if not self._steps:
            completed.epsilon = self.slot.epsilon
            completed.momentum = self.slot.momentum
            completed.weight_decay = self.slot.weight_decay
        self.marks.use()
        self.unstepped = None
        self._steps += 1
        self._forget()
        return completed

    def lose(self) -> LostGradients:
        """Discard the waiting gradients; return their measurements."""
        reading = self.reading or GradientReading()
        self._find_unused_zeros(reading)
        lost = LostGradients(self, reading, self.clips)
        self.probes.forget_readings()
        self._forget()
        return lost

    def _signs(self) -> frozenset[Sign]:
        signs = self.noticed
        if not self._steps:
            signs.add("new_parameters")
        if not self.passes:
            signs.discard("kept_gradients")
        calls = 0
        for each in self.passes:
            calls += each.calls
            if each.cross_entropy is not None and each.cross_entropy.of_softmax:
                signs.add("softmax_twice")
            if each.repeated:
                signs.add("backward_twice")
        if calls != self._calls and self._steps:
            signs.add("calls_vary")
        self._calls = calls
        return frozenset(signs) if signs else NO_SIGNS

    def _classes(self) -> int | None:
        """Number of classes of the single cross-entropy that is the loss of the step."""
        found = self.passes[0].cross_entropy if self.passes else None
        if found is None:
            return None
        losses = sum(len(each.losses) for each in self.passes)
        return found.classes if losses == 1 or found.divided else None

    def _forget(self) -> None:
        self.averaged = self._partly_unscaled = False
        self.noticed.clear()
        self.passes, self.clips, self.reading, self._latest = [], [], None, None
        self.norms_read = None

    def skipped(self, outcome: StepOutcome, lost: LostGradients) -> CompletedStep:
        """Start the transfer of an iteration whose gradients no optimizer used."""
        norms = lost.reading.norms
        probes = self.probes.for_skipped(norms is not None)
        reading = [probe for probe in probes if probe.hooks]
        return self._complete(outcome, lost.reading, probes, reading, norms)

    def _complete(
        self,
        outcome: StepOutcome,
        reading: GradientReading,
        probes: Sequence[ActiveProbe],
        with_readings: Sequence[ActiveProbe],
        norms: Readings | None = None,
    ) -> CompletedStep:
        """`with_readings`: the probes that have hooks. `norms`: the only readings of a skipped
        iteration."""
        header = Header(outcome, reading, None if norms is not None else self.skip, id(self))
        parts: list[TransferPart] = [(header.readings, False)]
        own_ms: dict[str, float] = {}
        for probe in with_readings:
            if norms is not None:
                flat = norms if probe.name == schema.GRAD_NORM else ()
            else:
                readings = probe.readings
                flat = readings[0] if len(readings) == 1 else [r for some in readings for r in some]
                own_ms[probe.name] = probe.spent_s * 1e3
            parts.append((flat, probe.owns_readings))
        return CompletedStep(
            optimizer=self.tracked.key,
            outcome=outcome,
            transfer=self.probes.transfer(parts, probes),
            probes=probes,
            time=time.time(),
            own_ms=own_ms,
            header=header,
            absent=reading.absent,
            left_alone=self.left_alone if norms is None else NO_POSITIONS,
        )

    # ------------------------------------------------------------ on the host

    def record(self, step: CompletedStep) -> float:
        """Record a step whose values have arrived; returns the seconds spent in probes.

        Called on the training thread, or on the recorder's where no further step follows.
        """
        record, facts, spent = record_of(step, self.probes)
        if facts.skipped_at_scale is not None:
            text = skipped_text(facts.skipped_at_scale)
            self._recorder.notice("skipped_step", text, "warning", facts.step)
        self._recorder.record(record)
        for clip in facts.clips:
            if clip.kind == "hand":
                self.changed_by_hand = True
        if not self._on_host and facts.gradient_norms is not None:
            self.float32_exact = exact_in_float32(facts.gradient_norms.tolist())
        self.probes.govern(facts)
        return spent


def _is_finite(loss: torch.Tensor) -> bool:
    """Whether a loss (0-d) is finite; True on a device, where reading it would wait."""
    return not loss.is_cpu or not loss.is_floating_point() or math.isfinite(loss.item())
