"""Measuring the steps of one optimizer: what waits in its gradients, and its probes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import Floats, Sign, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent
from tui_trainer.protocol.schema import Table
from tui_trainer.trace.governor import Governor, OnChange
from tui_trainer.trace.norms import Norms, dense
from tui_trainer.trace.optimizer_slot import OptimizerSlot
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import (
    Gradient,
    Options,
    Probe,
    Reading,
    Readings,
    RecorderLike,
    StepFacts,
    Values,
    describe_exception,
    skipped_text,
)
from tui_trainer.trace.schedule import ActiveProbe, ProbeSchedule
from tui_trainer.trace.step import (
    BackwardPass,
    Clipping,
    CompletedStep,
    GradientReading,
    Header,
    LostGradients,
    Returned,
    StepOutcome,
)
from tui_trainer.trace.torch_private import NormCapture, local
from tui_trainer.trace.transfer import HostTransfer, TransferPart

NO_READINGS: Values = np.empty(0)
NO_SIGNS: frozenset[Sign] = frozenset()
CAREFUL_STEPS = 3
"""First steps in which gradients are read after every backward, until it is known how the script
treats them: later they are read at the clipping or the step, which costs nothing or once."""
COMFORTABLE = (1e-12, 1e12)
"""Norms for which clip_grad_norm_'s own float32 sums of squares are exact."""
MAX_WATCHED = 256
"""Parameters whose gradients are checked for changes; of larger models evenly spaced ones."""

SAMPLED = 64
"""Elements of a weight from which an update by hand is told."""

Marks = list[tuple[int, int] | None]
"""(identity, version) of gradients; None where there is none."""


@dataclass(frozen=True)
class HandChange:
    """Gradients that the script changed by itself."""

    measurer: StepMeasurer
    before: Readings | None
    """Norms; None where they were not read before."""
    after: Readings
    positions: list[int] | None
    """Of the parameters whose gradients changed; None: unknown."""
    reading: GradientReading | None
    tentative: bool
    """Whether they changed at all is known once the norms are on the host."""


class WeightWatch:
    """Finds out whether a script that has no optimizer has updated its weights."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._versions: list[int] = []
        self._samples: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Parameters and copies of their first elements: an update through `.data` leaves no other
        trace."""

    def remember(self) -> None:
        """A backward has ended: an update may follow."""
        self._versions = [p._version for p in self._parameters]
        self._samples = [(p, _first_elements(p).clone()) for p in self._parameters if p.numel()]

    def changed(self) -> bool:
        """Whether weights have changed since. May wait for the device."""
        if [p._version for p in self._parameters] != self._versions:
            return True
        return any(not torch.equal(_first_elements(p), copy) for p, copy in self._samples)


def _first_elements(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().reshape(-1)[:SAMPLED]


class StepMeasurer:
    """Follows the gradients of one optimizer, calls its probes in the course of its steps, and
    records their rows."""

    def __init__(
        self,
        tracked: TrackedParameters,
        kinds: Sequence[type[Probe]],
        recorder: RecorderLike,
        options: Options,
        slot: OptimizerSlot,
        on_cadence_change: OnChange,
    ) -> None:
        self.tracked = tracked
        self.slot = slot
        self.probes: list[ActiveProbe] = []
        self.unseen: dict[str, str] = {}
        """Why probes that have nothing to measure were left out."""
        self.passes: list[BackwardPass] = []
        """Backward passes whose gradients wait for the optimizer's step."""
        self.clips: list[Clipping] = []
        """Clippings of these gradients."""
        self.reading: GradientReading | None = None
        """The gradients as they were after the last of these passes; None: not read yet."""
        self.skip: tuple[torch.Tensor, torch.Tensor] | None = None
        """For an optimizer that skips a step by itself when gradients are not finite: whether it
        does (above 0), and the loss scale (0-d each). Set when its step begins."""
        self.weights: WeightWatch | None = None
        """Set where the script updates the weights by itself."""
        self.trainable_changed = False
        """Whether parameters were frozen or unfrozen since this was last looked at."""
        self.scaled = False
        """Whether a GradScaler is in use."""
        self.changed_by_hand = False
        """Whether the script has changed gradients by itself: they are read at once then."""
        self._recorder = recorder
        self._governor = Governor(options.budget, on_cadence_change)
        self._norms = Norms(tracked.parameters, tracked.device)
        self._steps = 0
        self._comfortable = False
        """Whether the last norms were in COMFORTABLE."""
        self._prepared_step = -1
        self._awaiting_norms = False
        """Whether norms are expected from the clipping in progress."""
        self._clip_norms_complete = False
        """Whether the last clipping gave the norm of every gradient."""
        own = tracked.parameters[: tracked.own]
        self._watched = own[:: -(-len(own) // MAX_WATCHED)] if own else []
        self._marks: Marks | None = [None] * len(self._watched)
        """Of the watched parameters' gradients, since the last change that is known; None: they may
        have changed."""
        self._before_backward: Marks = []
        self._used: Marks = []
        """Marks of the gradients that the last step used."""
        self._kept_before = False
        """Whether the open backward finds gradients that a step has used already."""
        self.kept_gradients = False
        """Whether the first of the passes added to gradients that a step had used already."""
        self.eval_forward = False
        """Whether the model was called in `eval()` mode for this step."""
        self._latest: Readings | None = None
        """Norms after the last change that is known."""
        self._frozen = frozenset(i for i, t in enumerate(tracked.trainable) if not t)
        self._on_host = all(parameter.is_cpu for parameter in tracked.parameters)
        for kind in kinds:
            if kind.name not in options.switched_off:
                self._add_probe(kind, options, slot)
        self._schedule = ProbeSchedule(self.probes)
        self._schedule_outdated = False
        """Cadences changed or a probe failed, perhaps on another thread."""

    def _add_probe(self, kind: type[Probe], options: Options, slot: OptimizerSlot) -> None:
        try:
            with torch.no_grad():
                probe = kind(self.tracked, options)
            if probe.unseen:
                self.unseen[kind.name] = probe.unseen
            else:
                self.probes.append(self._activate(probe, options, slot))
        except Exception as fault:
            text = f"probe {kind.name}: {describe_exception(fault)}"
            self._recorder.notice("fault", text, "error")

    def _activate(self, probe: Probe, options: Options, slot: OptimizerSlot) -> ActiveProbe:
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

    def take_over(self, before: StepMeasurer) -> None:
        """Continue in place of a measurer of the same optimizer, with other parameters."""
        self.passes, self.clips = before.passes, before.clips
        for backward in self.passes:
            backward.claims.discard(before)
            backward.claims.add(self)
        for clip in self.clips:
            clip.positions.pop(id(before), None)
            clip.readings.pop(id(before), None)
        self.changed_by_hand = before.changed_by_hand
        self._marks = self._current_marks()

    def table(self, name: str) -> Table | None:
        """The table of this name that one of the probes fills."""
        return next((t for p in self.probes for t in p.tables if t.name == name), None)

    def probe(self, name: str) -> Probe | None:
        """The working probe of this name."""
        return next((p.probe for p in self.probes if p.name == name and not p.failed), None)

    # ------------------------------------------------------------ the gradients

    @property
    def careful(self) -> bool:
        """Whether gradients are read after every backward: whatever happens to them afterwards,
        their norms are known."""
        return (
            self._steps < CAREFUL_STEPS
            or self.changed_by_hand
            or self.weights is not None
            or not self._comfortable
            # `unscale_` leaves the gradients of parameters in no optimizer as they are.
            or (self.scaled and self.tracked.own < len(self.tracked.parameters))
        )

    def before_backward(self) -> None:
        """A backward begins: remember the gradients, to see whether it reaches this optimizer."""
        marks = self._before_backward = self._current_marks()
        if not self.passes:
            self._kept_before = _any_kept(marks, self._used)
            if self._kept_before and self.careful and self.all_zero():
                self._kept_before = False  # zeroed through `.data`, which leaves no mark
                self.changed_by_hand = True

    def reached_by_backward(self) -> bool:
        """Whether the backward that has just ended changed any gradient."""
        marks = self._current_marks()
        reached = marks != self._before_backward
        if reached and not self.passes:
            self.kept_gradients = self._kept_before
        if reached:
            self._marks = marks
        return reached

    def add_pass(self, backward: BackwardPass) -> None:
        """The gradients of `backward` wait for this optimizer."""
        backward.claims.add(self)
        if not self.passes or self.passes[-1] is not backward:
            self.passes.append(backward)
        self.reading = None

    def gradients_changed(self) -> bool:
        """Whether the script has changed gradients since the last change that is known."""
        return self._marks is not None and self._current_marks() != self._marks

    def changed_between_passes(self) -> bool:
        """`gradients_changed`, also through `.data` while this measurer is careful."""
        if self.gradients_changed():
            return True
        if not (self.careful and self._on_host and self._latest is not None):
            return False
        own = self.tracked.own
        changed = not _equal(self._latest[:own], self.norms_now()[:own])
        self.changed_by_hand = self.changed_by_hand or changed
        return changed

    def probably_changed(self) -> bool:
        """`changed_between_passes`, judged by one parameter where that is enough."""
        if self.careful:
            return self.changed_between_passes()
        for position, mark in enumerate(self._marks or ()):
            if mark is not None:
                gradient = self._watched[position].grad
                return gradient is None or (id(gradient), gradient._version) != mark
        return False

    def gradients_known(self) -> None:
        """The gradients are now as they should be."""
        self._marks = self._current_marks()

    def forget_marks(self) -> None:
        """The gradients have changed in a way that is known; the next backward marks them."""
        self._marks = None

    def change_by_hand(self, before_step: bool) -> HandChange | None:
        """What the script has done to the gradients by itself since the last change that is known.

        Its in-place operations leave a mark, but for those on `grad.data`: while this measurer is
        careful, the norms are compared as well `before_step`.
        """
        changed = self.gradients_changed()
        compare = before_step and self.careful and self._latest is not None
        if not changed and not compare:
            return None
        positions = self._changed_positions() if changed else None
        before, after = self._latest, self.norms_now()
        self._latest = after
        own = self.tracked.own
        if not changed and self._on_host and _equal(before and before[:own], after[:own]):
            return None
        self.changed_by_hand = self.changed_by_hand or changed or self._on_host
        self.gradients_known()
        if self.reading is not None and self._on_host and not _scaled_down(before, after):
            self._replace_norms(after)
            return None
        if self.reading is None:
            codes = np.full(len(self.tracked.parameters), Absent.CHANGED_BY_HAND, np.uint8)
            self.reading, before = GradientReading(None, None, codes), None
        known = self.reading if before is self.reading.norms else GradientReading(before)
        return HandChange(self, before, after, positions, known, not (changed or self._on_host))

    def _replace_norms(self, norms: Readings) -> None:
        """The script has set other gradients than those that backward computed."""
        assert self.reading is not None
        self.reading = GradientReading(norms, None, self._why_absent(self.tracked.gradients()))
        for probe in self._schedule.plan.gradient_norms:
            probe.readings = [self._call(probe, probe.probe.gradient_norms, norms) or ()]

    def _changed_positions(self) -> list[int] | None:
        marks, before = self._current_marks(), self._marks
        if before is None or len(self._watched) < self.tracked.own:
            return None
        return [i for i, (a, b) in enumerate(zip(marks, before, strict=True)) if a != b]

    def after_clipping(self) -> None:
        """Gradients were clipped by torch."""
        if self.careful:
            self._latest = self.norms_now()
        self.gradients_known()

    def refresh_norms(self) -> None:
        """Gradients were unscaled after they were read."""
        if self.careful:
            self._latest = self.norms_now()

    def assigned(self, returned: Returned) -> None:
        """The script has assigned gradients that `torch.autograd.grad` returned: what it did to
        them since is its own change."""
        versions = {
            id(g): version for ref, version in returned.values() if (g := ref()) is not None
        }
        self._marks = [
            mark and (mark[0], versions.get(mark[0], mark[1])) for mark in self._current_marks()
        ]

    def has_gradients(self, returned: Returned) -> tuple[bool, bool]:
        """Whether all, and whether any, of this optimizer's gradients are among those that
        `torch.autograd.grad` returned."""
        ids = {id(g) for g in (reference() for reference, _ in returned.values()) if g is not None}
        there = [g for g in self.tracked.gradients()[: self.tracked.own] if g is not None]
        among = [id(gradient) in ids for gradient in there]
        return bool(among) and all(among), any(among)

    def positions_of(self, given: list[torch.Tensor]) -> list[int] | None:
        """Positions of these parameters; None: all that are tracked."""
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
        """Whether none of this optimizer's gradients is left, where those of the parameters for
        which `zeroed` is true are zero."""
        return all(p.grad is None or zeroed(p) for p in self.tracked.parameters[: self.tracked.own])

    def any_gradient(self) -> bool:
        return any(p.grad is not None for p in self.tracked.parameters[: self.tracked.own])

    def all_zero(self) -> bool:
        """Whether every gradient is zero. Waits for the device."""
        return not any(
            p.grad is not None and bool(torch.count_nonzero(dense(p.grad)))
            for p in self.tracked.parameters[: self.tracked.own]
        )

    def _current_marks(self) -> Marks:
        return [
            None if (gradient := p.grad) is None else (id(gradient), gradient._version)
            for p in self._watched
        ]

    # ------------------------------------------------------------ in the course of a step

    def prepare(self, step: int, stops_soon: bool) -> None:
        """Decide, once per step, which probes measure it."""
        # Gradients may have been read before another optimizer's step.
        if self._prepared_step == step or self.reading is not None:
            if stops_soon:
                self._schedule.add_requested(step)
            return
        self._prepared_step = step
        if self._schedule_outdated:
            self._schedule_outdated = False
            self._schedule.update()
        self._schedule.begin_step(step, self._recorder.watched(), stops_soon)

    def before_forward(self, root: torch.nn.Module) -> bool:
        """The first forward of the step begins; returns whether `after_forward` must be called."""
        plan = self._schedule.plan
        if plan.before_forward:
            with probe_context(self.tracked.device):
                for probe in plan.before_forward:
                    self._call(probe, probe.probe.before_forward, root)
        return bool(plan.after_forward)

    def after_forward(self) -> None:
        with probe_context(self.tracked.device):
            for probe in self._schedule.plan.after_forward:
                self._call(probe, probe.probe.after_forward)

    def read_gradients(
        self,
        scale: torch.Tensor | None,
        clipping: str = "",
        gradients: list[Gradient] | None = None,
    ) -> GradientReading:
        """Gradients are complete and not clipped yet. `scale`: a factor still on them.

        `clipping`: the kind of clipping that follows; by norm, `use_clip_norms` is called then.
        `gradients`: those that `torch.autograd.grad` returned, in place of the current ones.
        """
        careful = self.careful
        if clipping or careful:
            self._schedule.add_clipping()
        self._awaiting_norms = (
            clipping == "norm" and self._clip_norms_complete and not careful and gradients is None
        )
        plan = self._schedule.plan
        found = self.tracked.gradients() if gradients is None else gradients
        reading = self.reading = GradientReading(None, scale, self._why_absent(found))
        if plan.gradients or plan.gradient_norms or careful:
            with probe_context(self.tracked.device):
                for probe in plan.gradients:
                    probe.readings = [self._call(probe, probe.probe.gradients, found) or ()]
                if not self._awaiting_norms and (plan.gradient_norms or careful):
                    self._read_norms(reading, found)
        return reading

    def norms_now(self) -> Readings:
        """The norms of the current gradients."""
        with probe_context(self.tracked.device):
            return self._norms.read(self.tracked.gradients())

    def _read_norms(self, reading: GradientReading, gradients: list[Gradient]) -> None:
        began = perf_counter()
        norms = self._norms.read(gradients)
        spent_s = perf_counter() - began
        reading.norms = self._latest = norms
        for probe in self._schedule.plan.gradient_norms:
            probe.spent_s += spent_s
            spent_s = 0.0
            probe.readings = [self._call(probe, probe.probe.gradient_norms, norms) or ()]
        if self._on_host:
            self._judge([norm for norm in norms if isinstance(norm, float)])

    def _judge(self, norms: Sequence[float]) -> None:
        """Whether float32 sums of squares of such gradients are exact."""
        low, high = COMFORTABLE
        self._comfortable = all(norm == 0 or low < norm < high for norm in norms)

    def _why_absent(self, gradients: Sequence[Gradient]) -> NDArray[np.uint8] | None:
        if not self.tracked.empty and not any(gradient is None for gradient in gradients):
            self._set_frozen(frozenset())
            return None
        absent = np.zeros(len(gradients), np.uint8)
        for position, (gradient, parameter) in enumerate(
            zip(gradients, self.tracked.parameters, strict=True)
        ):
            if gradient is None:
                if position in self.tracked.gone:
                    absent[position] = Absent.NOT_IN_MODEL
                elif parameter.requires_grad:
                    absent[position] = Absent.NOT_REACHED
                else:
                    absent[position] = Absent.FROZEN
            elif position in self.tracked.empty:
                absent[position] = Absent.EMPTY
        self._set_frozen(frozenset(np.flatnonzero(absent == Absent.FROZEN).tolist()))
        return absent

    def _set_frozen(self, frozen: frozenset[int]) -> None:
        if frozen != self._frozen:
            self._frozen = frozen
            self.trainable_changed = True

    def use_clip_norms(
        self, captured: NormCapture, clipped: Any, limit: Any, total: torch.Tensor
    ) -> None:
        """The clipping of the parameters `clipped` computed norms of gradients and their `total`.

        The norms replace our own reading once a clipping has given every one of them, so that a
        step has the same digits whether it was read before or not.
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
                with probe_context(self.tracked.device):
                    norms = norms_before(gradients, by_gradient, clipped, limit, total)
        if norms is None or self.reading is None:
            return
        known = self.reading.norms
        if awaited or (self._on_host and not self.clips and known is self._latest is not None):
            if self._on_host:
                norms = self._checked(norms, clipped, limit, total)
            if not awaited and not _close(known, norms):
                return  # changed through `.data` since they were read
            self.reading.norms = norms
            for probe in self._schedule.plan.gradient_norms:
                probe.readings = [self._call(probe, probe.probe.gradient_norms, norms) or ()]

    def clip_failed(self) -> None:
        """The clipping raised: its norms are not known."""
        self._awaiting_norms = False
        if self.reading is not None and self.reading.norms is None:
            self.reading = None

    def _checked(
        self, norms: Readings, clipped: Any, limit: Any, total: torch.Tensor
    ) -> Readings | None:
        """Norms that a clipping computed on the CPU, with those that may have lost digits computed
        again; None where they cannot be."""
        values: list[float] = []
        for norm in norms:
            if not isinstance(norm, torch.Tensor):
                values.append(norm)
            elif norm.dim():
                values += norm.tolist()
            else:
                values.append(norm.item())
        self._judge(values)
        if self._comfortable:
            return values
        with probe_context(self.tracked.device):
            after = self._norms.read(self.tracked.gradients())
        factor = min(1.0, float(limit) / (float(total) + 1e-6))
        low, high = COMFORTABLE
        given = [clipped] if isinstance(clipped, torch.Tensor) else clipped
        scaled = {id(p) for p in given}
        found: list[float] = []
        for value, norm, parameter in zip(values, after, self.tracked.parameters, strict=True):
            if not low < value < high and isinstance(norm, float):
                if id(parameter) not in scaled:
                    value = norm
                elif factor > 0:
                    value = norm / factor
            found.append(value)
        return found

    def before_update(self) -> None:
        """The optimizer is about to change the weights."""
        plan = self._schedule.plan
        if plan.before_update:
            with probe_context(self.tracked.device):
                for probe in plan.before_update:
                    self._call(probe, probe.probe.before_update)

    def after_update(self, outcome: StepOutcome) -> CompletedStep:
        """The optimizer has changed the weights: read them and start the transfer to the host."""
        plan = self._schedule.plan
        self._schedule.end_step()
        if plan.after_update:
            with probe_context(self.tracked.device):
                for probe in plan.after_update:
                    probe.readings.append(self._call(probe, probe.probe.after_update) or ())
        reading = self.reading or GradientReading()
        completed = self._complete(outcome, reading, plan.probes)
        completed.signs = self._signs()
        completed.classes = self._classes()
        self._used = self._marks or []
        self._steps += 1
        self._forget()
        return completed

    def lose(self) -> LostGradients:
        """The gradients that wait are thrown away: what is known of them."""
        lost = LostGradients(self, self.reading or GradientReading(), self.clips)
        for probe in self._schedule.plan.reading:
            probe.readings = []
        self._forget()
        return lost

    def _signs(self) -> frozenset[Sign]:
        signs: list[Sign] = []
        if not self._steps:
            signs.append("new_parameters")
        if self.kept_gradients and self.passes:
            signs.append("kept_gradients")
        if self.eval_forward:
            signs.append("eval_mode")
        if any(each.cross_entropy and each.cross_entropy.of_softmax for each in self.passes):
            signs.append("softmax_twice")
        return frozenset(signs) if signs else NO_SIGNS

    def _classes(self) -> int | None:
        """Those of the one cross-entropy that is the loss of the step."""
        found = self.passes[0].cross_entropy if self.passes else None
        if found is None:
            return None
        losses = sum(len(each.losses) for each in self.passes)
        return found.classes if losses == 1 or found.divided else None

    def _forget(self) -> None:
        self.eval_forward = self.kept_gradients = False
        self.passes, self.clips, self.reading, self._latest = [], [], None, None

    def skipped(self, outcome: StepOutcome, lost: LostGradients) -> CompletedStep:
        """An iteration whose gradients no optimizer used."""
        kept = (schema.STEP, schema.CLIP, schema.GRAD_NORM, schema.PHASE_MS, "nonfinite")
        probes = [p for p in self.probes if p.name in kept and not p.failed]
        if lost.reading.norms is None:
            probes = [p for p in probes if p.name != schema.GRAD_NORM]
        return self._complete(outcome, lost.reading, probes, lost.reading.norms)

    def _complete(
        self,
        outcome: StepOutcome,
        reading: GradientReading,
        probes: Sequence[ActiveProbe],
        norms: Readings | None = None,
    ) -> CompletedStep:
        """`norms`: the only readings, of an iteration that was skipped."""
        header = Header(outcome, reading, None if norms is not None else self.skip, id(self))
        parts = [TransferPart(header.readings, False)]
        own_ms: dict[str, float] = {}
        for probe in probes:
            if not probe.hooks:
                continue
            if norms is not None:
                flat = norms if probe.name == schema.GRAD_NORM else ()
            else:
                readings = probe.readings
                flat = readings[0] if len(readings) == 1 else [r for some in readings for r in some]
                own_ms[probe.name] = probe.spent_s * 1e3
            parts.append(TransferPart(flat, probe.probe.owns_readings))
        return CompletedStep(
            optimizer=self.tracked.key,
            outcome=outcome,
            transfer=self._transfer(parts, [probe for probe in probes if probe.hooks]),
            probes=probes,
            time=time.time(),
            own_ms=own_ms,
            header=header,
            absent=reading.absent,
        )

    def _transfer(self, parts: list[TransferPart], probes: Sequence[ActiveProbe]) -> HostTransfer:
        """Start the transfer of the header and of what each of `probes` has read. A probe whose
        readings cannot be transferred is switched off."""
        try:
            return HostTransfer(parts, self._on_host)
        except Exception:
            for position, probe in enumerate(probes, 1):
                try:
                    HostTransfer([parts[position]], self._on_host)
                except Exception as fault:
                    self._switch_off(probe, fault)
                    parts[position] = TransferPart((), False)
            return HostTransfer(parts, self._on_host)

    # ------------------------------------------------------------ on the host

    def record(self, step: CompletedStep) -> float:
        """Record a step whose values have arrived; returns the seconds spent in probes.

        Called on the training thread, or on the recorder's where no further step follows.
        """
        record, facts, spent = self.rows_of(step)
        if facts.skipped_at_scale is not None:
            text = skipped_text(facts.skipped_at_scale)
            self._recorder.notice("skipped_step", text, "warning", facts.step)
        self._recorder.record(record)
        if any(clip.kind == "hand" for clip in facts.clips):
            self.changed_by_hand = True
        if not self._on_host and facts.gradient_norms is not None:
            self._judge(facts.gradient_norms.tolist())
        for probe in self._schedule.clip_readers:
            probe.with_clipping = bool(facts.clips)
        if self._governor.step(step.probes, self._schedule.working, facts.own_ms, facts.step_ms):
            self._schedule_outdated = True
        return spent

    def rows_of(self, step: CompletedStep) -> tuple[StepRecord, StepFacts, float]:
        """The record of a step or a skipped iteration, what it was made from, and the seconds spent
        in probes."""
        header, *parts = step.transfer.parts()
        if isinstance(header, Exception):
            raise header
        facts = step.facts(header)
        began = perf_counter()
        rows = self._rows(step.probes, parts, facts)
        spent = perf_counter() - began
        record = StepRecord(
            step=facts.step,
            time=facts.time,
            optimizer=step.optimizer,
            rows=rows,
            clip=facts.clip,
            nonfinite=tuple(facts.nonfinite),
            own_ms=sum(facts.own_ms.values()),
            signs=step.signs,
            classes=step.classes,
        )
        return record, facts, spent

    def _rows(
        self, probes: Sequence[ActiveProbe], parts: Sequence[Values | Exception], facts: StepFacts
    ) -> tuple[tuple[int, Floats], ...]:
        """(table id, row) of everything that the probes make of a step."""
        rows: list[tuple[int, Floats]] = []
        own_ms = facts.own_ms
        remaining = iter(parts)
        began = perf_counter()
        for probe in probes:
            values = next(remaining) if probe.hooks else NO_READINGS
            if probe.failed:
                continue
            try:
                if isinstance(values, Exception):
                    raise values
                found = probe.probe.rows(values, facts)
            except Exception as fault:
                self._switch_off(probe, fault)
                continue
            if found:
                for table, row in zip(probe.tables, found, strict=False):
                    if row is not None:
                        rows.append((table.id, row))
            ended = perf_counter()
            own_ms[probe.name] = own_ms.get(probe.name, 0.0) + (ended - began) * 1e3
            began = ended
        return tuple(rows)

    def _call(self, probe: ActiveProbe, hook: Callable[..., Any], *args: Any) -> Any:
        """Call a hook on the probe's own account; switch the probe off if it raises."""
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


def _any_kept(now: Marks, used: Marks) -> bool:
    """Whether gradients are those that the last step used, judged by three of them."""
    if len(now) != len(used) or not now:
        return False
    places = (0, len(now) // 2, len(now) - 1)
    return any(now[place] is not None and now[place] == used[place] for place in places)


def _scaled_down(before: Readings | None, after: Readings) -> bool:
    """Whether no norm on the host has grown: gradients were clipped, scaled or zeroed."""
    if before is None:
        return True
    pairs = zip(before, after, strict=True)
    return all(
        isinstance(a, float)
        and isinstance(b, float)
        and (b <= a * (1 + 1e-6) or (a != a and b != b))
        for a, b in pairs
    )


def _close(before: Readings | None, after: Readings | None) -> bool:
    """Whether norms on the host differ by no more than two ways of summing do."""
    return (
        before is not None
        and after is not None
        and np.allclose(
            np.array(before, np.float64), np.array(after, np.float64), 1e-5, 0, equal_nan=True
        )
    )


def _equal(before: Readings | None, after: Readings) -> bool:
    """Whether norms on the host are the same, NaN and all."""
    return before is not None and np.array_equal(
        np.array(before, dtype=np.float64), np.array(after, dtype=np.float64), equal_nan=True
    )


@contextmanager
def probe_context(device: torch.device) -> Iterator[None]:
    """No gradients, and the tensors' own precision also where a script steps under autocast."""
    with torch.no_grad():
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


def norms_before(
    gradients: Sequence[Gradient],
    norms: dict[int, torch.Tensor],
    clipped: Any,
    limit: Any,
    total: Any,
) -> Readings:
    """Norms before a clipping that, unexpectedly, did not compute all of them: the norm of what it
    clipped is divided by the factor of PyTorch's own formula."""
    given = [clipped] if isinstance(clipped, torch.Tensor) else clipped
    scaled = {id(local(p.grad)) for p in given if p.grad is not None}
    factor: torch.Tensor | None = None
    found: list[torch.Tensor | float] = []
    for gradient in gradients:
        if gradient is None or id(gradient) in norms:
            found.append(0.0 if gradient is None else norms[id(gradient)])
            continue
        norm = torch.linalg.vector_norm(dense(gradient).float())
        if id(gradient) in scaled:
            if factor is None:
                factor = torch.clamp(float(limit) / (total + 1e-6), max=1.0)
            norm = norm / factor
        found.append(norm)
    return found
