"""Follows calls that clip gradients, and assigns each to the step that it belongs to.

The norms and the limit are kept here; `probes/clipping.py` computes the scale from them.
"""

from __future__ import annotations

from typing import Any

import torch

from tui_trainer.protocol.events import ClipKind
from tui_trainer.trace.faults import Faults, guarded
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.norms import total_norm
from tui_trainer.trace.optimizer_steps import OptimizerSteps
from tui_trainer.trace.phase_clocks import CLIP, OTHER
from tui_trainer.trace.phases import Phases
from tui_trainer.trace.probe import Reading, RecorderLike
from tui_trainer.trace.reports import PhaseReporter
from tui_trainer.trace.step import Clipping
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.torch_private import NormCapture
from tui_trainer.trace.waiting_gradients import WaitingGradients


class Clippings:
    """Records the clipping in progress, or the last one."""

    def __init__(
        self,
        faults: Faults,
        gate: Gate,
        phases: Phases,
        waiting: WaitingGradients,
        steps: OptimizerSteps,
        reporter: PhaseReporter,
        recorder: RecorderLike,
    ) -> None:
        self.faults = faults
        self._measurers: list[StepMeasurer] = []
        """Optimizers whose gradients wait for their step and are clipped."""
        self._used: list[StepMeasurer] = []
        """Optimizers whose gradients are clipped although their step has used them already."""
        self._gate = gate
        self._phases = phases
        self._waiting = waiting
        self._steps = steps
        self._reporter = reporter
        self._recorder = recorder
        self._total_before: Reading | None = None
        self._late_reported = False

    def reset(self) -> None:
        self._measurers = []

    @guarded
    def clip_began(self, parameters: Any, kind: ClipKind, two_norm: bool) -> bool:
        if self._waiting.registry.by_hand is not None:
            self._steps.end_by_hand()
        if not self._phases.enter(CLIP):
            return False
        waiting = self._waiting
        waiting.registry.register_reached()
        waiting.take_unseen()
        waiting.follow_changes_by_hand()
        self._measurers, self._used, careful = [], [], False
        for measurer in waiting.registry.measurers_of(parameters):
            if not measurer.passes:
                # An update by hand that changes no weight (its gradients are zero) looks like a
                # step that has ended, so it is unknown whether the update is still to come.
                if measurer is not waiting.registry.by_hand:
                    self._used.append(measurer)
            elif waiting.waits(measurer):
                self._measurers.append(measurer)
                if measurer.reading is None:
                    waiting.read(measurer, kind)
                careful = careful or measurer.careful
        self._total_before = None
        if self._measurers and (not two_norm or careful):
            self._total_before = total_norm(parameters)
        self._reporter.keep_norms(self._measurers, self._gate.stops_soon)
        self._phases.run()
        return True

    def failed(self) -> None:
        """The clipping function raised."""
        for measurer in self._measurers:
            measurer.clip_failed()

    @guarded
    def clip_ended(
        self,
        kind: ClipKind,
        parameters: Any,
        limit: Any,
        norm_type: Any,
        total: Any,
        captured: NormCapture,
    ) -> None:
        """`total` is the norm before clipping, as the function returned it."""
        self._phases.stop_clock()
        total = captured.whole_total(total, limit)
        if not self._measurers and not self._waiting.evaluating_further:
            if self._used:
                self._report_late()
            for measurer in self._waiting.registry.measurers:
                measurer.marks.forget()
        for measurer in self._used:
            measurer.marks.forget()
            if self._waiting.evaluating_further:
                measurer.noticed.discard("clipped_late")
            else:
                measurer.noticed.add("clipped_late")
        before = self._total_before if kind == "value" else total
        if self._measurers and isinstance(before, (torch.Tensor, float)):
            for measurer in self._measurers:
                if kind == "norm":
                    measurer.use_clip_norms(captured, parameters, limit, total)
            clipping = Clipping(
                kind=kind,
                max_norm=float(limit),
                norm_before=before,
                norm_after=total_norm(parameters) if kind == "value" else None,
                total=self._total_before,
                two_norm=kind == "norm" and float(norm_type) == 2.0,
                scales={id(m): self._waiting.scale_of(m) for m in self._measurers},
            )
            given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            for measurer in self._measurers:
                clipping.positions[id(measurer)] = measurer.positions_of(given)
                found = measurer.before_clipping()
                if found is not None and not measurer.clips:
                    clipping.readings[id(measurer)] = found
                elif kind == "norm":
                    clipping.readings[id(measurer)] = measurer.captured(captured)
                measurer.clips.append(clipping)
                measurer.after_clipping(clipping)
        self._phases.leave(OTHER, owners=tuple([m.slot for m in self._measurers]))

    def _report_late(self) -> None:
        if not self._late_reported and self._waiting.registry.measurers:
            self._late_reported = True
            text = (
                "gradients are clipped after optimizer.step() has used them, which changes no "
                "update: clip between backward and step"
            )
            self._recorder.notice("clip_after_step", text, "warning", self._waiting.step)
