"""What hooks.py hears of a training loop, told as phases and measured."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from tui_trainer.tracing.calls import HearsCalls
from tui_trainer.tracing.clips import Captured, clip_call, total_norm
from tui_trainer.tracing.faults import skipped_text
from tui_trainer.tracing.gate import Gate
from tui_trainer.tracing.guard import guarded
from tui_trainer.tracing.interface import RecorderLike
from tui_trainer.tracing.made import Finished
from tui_trainer.tracing.making import Making
from tui_trainer.tracing.meter import Meter
from tui_trainer.tracing.phases import BACKWARD, CLIP, LOSS, STEP, ZERO_GRAD
from tui_trainer.tracing.probe import Options, Probe
from tui_trainer.tracing.reports import Reporter
from tui_trainer.tracing.scaling import Scaling
from tui_trainer.tracing.timing import OUTSIDE

Optimizer = torch.optim.Optimizer


class Hearing(HearsCalls):
    """The part of the tracer that hears of zero_grad, backward, clipping, scaling and steps."""

    def __init__(
        self,
        recorder: RecorderLike,
        gate: Gate,
        probes: list[type[Probe]],
        options: Options,
        reporter: Reporter,
    ) -> None:
        super().__init__(recorder, gate, probes, options, reporter)
        self.calls_of_step = 0
        """How often any optimizer's `step` began."""
        self.making = Making()
        self.scaling = Scaling()
        self._nested = 0
        self._clipping: list[Meter] = []
        self._stepping: Meter | None = None
        self._value_norm: torch.Tensor | None = None

    def phase_failed(self) -> None:
        """What the script called raised: the phase is over, and it is no boundary."""
        if self.phases.fail() == CLIP:
            for meter in self._clipping:
                meter.fresh = False

    # ------------------------------------------------------------ zero_grad and backward

    @guarded
    def optimizer_seen(self, optimizer: Optimizer) -> None:
        """An optimizer showed itself before its first step."""
        self.registry.seen(optimizer)

    @guarded
    def zero_grad_begins(self, thing: Any) -> bool:
        """`thing.zero_grad()`, an optimizer's or a module's."""
        if not self.phases.enter(ZERO_GRAD):
            return False
        if isinstance(thing, Optimizer):
            self.registry.seen(thing)
        self.phases.zeroing(thing)
        self.phases.run()
        return True

    @guarded
    def zero_grad_ends(self) -> None:
        """It returned."""
        self.phases.leave()

    @guarded
    def backward_begins(self, tensors: Any) -> bool:
        """`backward` is called on one tensor or several."""
        if not self.phases.enter(BACKWARD):
            return False
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        scalars = [t for t in given if isinstance(t, torch.Tensor) and t.numel() == 1]
        losses = [self.scaling.original(loss) for loss in scalars]
        self.phases.losing()
        self.making.add_losses(losses, self.phases.closure)
        self.phases.boundary(LOSS)
        for meter in self.registry.meters:
            meter.fresh = False
        self.phases.run()
        return True

    @guarded
    def backward_ends(self) -> None:
        """It returned: the gradients are there."""
        self.phases.batch_used()
        self.phases.leave(OUTSIDE)

    # ------------------------------------------------------------ clipping

    @guarded
    def clip_begins(self, parameters: Any, kind: str) -> bool:
        """Gradients are about to be clipped: read them first."""
        if not self.phases.enter(CLIP):
            return False
        self._clipping = self.registry.meters_of(parameters)
        for meter in self._clipping:
            if not meter.fresh:
                self._read_gradients(meter, kind)
        if kind == "value":
            self._value_norm = total_norm(parameters)
        if self.gate.armed:
            self.reporter.before_clip(self._clipping, self.gate.stops_soon)
        self.phases.run()
        return True

    @guarded
    def clip_ends(
        self,
        kind: str,
        parameters: Any,
        limit: Any,
        norm_type: Any,
        total: Any,
        captured: Captured,
    ) -> None:
        """They are clipped; `total` is their norm before, as the function gave it."""
        self.phases.pause_clock()
        for meter in self._clipping:
            meter.lend(captured, parameters, limit, total)
        found = [self._value_norm, total_norm(parameters)] if kind == "value" else [total]
        readings = tuple(r for r in found if isinstance(r, torch.Tensor))
        if len(readings) == len(found):
            meters: list[object] = [*self._clipping]
            self.making.add_clip(
                clip_call(kind, parameters, limit, norm_type, readings, meters, captured)
            )
        self.phases.leave(OUTSIDE)

    def _read_gradients(self, meter: Meter, clipping: str = "") -> None:
        optimizer = self.registry.optimizer_of(meter)
        meter.prepare(self.phases.step, self.gate.stops_soon)
        meter.read_gradients(self.scaling.gradient_scale(optimizer), clipping)

    # ------------------------------------------------------------ the optimizer's step

    @guarded
    def step_begins(self, optimizer: Optimizer, closure: bool) -> None:
        """`optimizer.step` begins."""
        self.calls_of_step += 1
        if not self.phases.enter(STEP):
            self._nested += 1
            return
        self.phases.closure = closure
        self._nested = 0
        meter = self._stepping = self.registry.meter_for(optimizer)
        meter.prepare(self.phases.step, self.gate.stops_soon)
        if not closure and not meter.fresh:
            self._read_gradients(meter)
        # A GradScaler gives it to an optimizer that skips by itself, for the time of its step.
        found_inf = getattr(optimizer, "found_inf", None)
        meter.skip = None if found_inf is None else (found_inf, self.scaling.loss_scale())
        meter.before_update()
        self.phases.run()

    @guarded
    def step_ends(self, optimizer: Optimizer) -> None:
        """It returned: the weights have changed."""
        began = perf_counter()
        if self._nested:
            self._nested -= 1
            return
        if not self.phases.end(STEP):
            return
        self.phases.pause_clock()
        meter, self._stepping = self._stepping, None
        if meter is None:
            return
        if self.phases.closure and not meter.fresh:
            self._read_gradients(meter)
        made = meter.after_update(self._finish(optimizer, meter))
        counted = perf_counter()
        own_ms = (self.own_s + counted - began) * 1e3
        made.own_ms["tracer"] = max(0.0, own_ms - sum(made.own_ms.values()))
        self.registry.outbox.put(made, self.gate.armed)
        # `guarded` adds the whole of this call; what is counted above does not count again.
        self.own_s = began - counted - self.registry.outbox.take_accounted_s()
        unseen = self.phases.unseen()
        if unseen is not None:
            self.registry.phases_unseen(unseen)
        self.phases.next_step()

    def _finish(self, optimizer: Optimizer, meter: Meter) -> Finished:
        step_ms, times = self.phases.step_made()
        self.scaling.step_over()
        losses, clips = self.making.take(meter)
        rate = optimizer.param_groups[0].get("lr", float("nan"))
        return Finished(
            step=self.phases.step,
            losses=losses,
            learning_rate=rate if isinstance(rate, torch.Tensor) else float(rate),
            step_ms=step_ms,
            times=times,
            clips=clips,
        )

    @guarded
    def step_skipped(self, optimizer: Optimizer) -> None:
        """A GradScaler did not call `optimizer.step`: the step in the making begins anew."""
        text = skipped_text(self.scaling.last_scale())
        self.recorder.notice("skipped_step", text, "warning", self.phases.step)
        self.making.forget()
        self.phases.step_skipped()
        for meter in self.registry.meters:
            meter.fresh = False

    # ------------------------------------------------------------ loss scaling

    @guarded
    def scaled(self, scaler: Any, outputs: Any, result: Any) -> None:
        """`scaler.scale(outputs)` gave `result`."""
        self.scaling.scaled(scaler, outputs, result)

    @guarded
    def scaler_updated(self) -> None:
        """`scaler.update()`."""
        self.scaling.updated()
