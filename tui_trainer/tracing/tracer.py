"""The tracer: turns a plain PyTorch loop into phases, from outside.

Attached, it hears of every `zero_grad`, call of the model, `backward`, clipping and `step` on the
training thread, and makes of them the phases data → zero_grad → forward → loss → backward → clip →
step, in whatever order and number a script has them. Rules:

* One optimizer step is one step, whichever optimizer makes it: a GAN's two networks take turns.
* The loss of a step is the sum of the scalars that `backward` was called on since the step before
  (before any GradScaler): exactly the objective whose gradient the optimizer uses. With a closure
  it is the closure's first evaluation. An optimizer that steps without a backward of its own (two
  optimizers for one model) shows the loss of the step before.
* What lies between a step and the next forward is `data`, wherever `zero_grad` falls in it; what
  lies between a forward and its backward is `loss`. Evaluations (without gradients) are no phase.
* A step that a GradScaler skips is no step.

Nothing here may ever change or stop the training: see `_guarded`.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from tui_trainer.protocol import PHASES
from tui_trainer.tracing.clips import Captured, ClipCall, clip_call, scalar, total_norm
from tui_trainer.tracing.faults import describe, skipped_text
from tui_trainer.tracing.gate import Gate
from tui_trainer.tracing.hooks import install
from tui_trainer.tracing.interface import RecorderLike
from tui_trainer.tracing.made import Finished
from tui_trainer.tracing.meter import Meter
from tui_trainer.tracing.patching import Patches
from tui_trainer.tracing.probe import Options, Probe
from tui_trainer.tracing.registration import Registry
from tui_trainer.tracing.reports import Reporter
from tui_trainer.tracing.roots import Roots
from tui_trainer.tracing.scaling import Scaling
from tui_trainer.tracing.timing import OUTSIDE, Clock, HostClock, Times, clock_for

DATA, ZERO_GRAD, FORWARD, LOSS, BACKWARD, CLIP, STEP = range(len(PHASES))
MOST_LOSSES = 64
STEPS_BEFORE_UNSEEN = 5

WHY_UNSEEN = {
    ZERO_GRAD: "this run never calls zero_grad",
    FORWARD: "the model is never called from outside in a way that can be seen: the whole step may "
    "be compiled, or `model.forward` called directly",
    BACKWARD: "backward is never called: gradients are made in another way",
    CLIP: "this run never clips its gradients by torch.nn.utils",
}

P = ParamSpec("P")
R = TypeVar("R")


def _guarded(
    method: Callable[Concatenate[Tracer, P], R],
) -> Callable[Concatenate[Tracer, P], R]:
    """Count our own time, and let no fault of ours reach the training.

    Only `StopTraining` and other non-`Exception`s pass.
    """

    @functools.wraps(method)
    def guarded(self: Tracer, *args: P.args, **kwargs: P.kwargs) -> R:
        began, idle = perf_counter(), self.gate.idle_s
        try:
            return method(self, *args, **kwargs)
        except Exception as fault:
            self._fault(method.__name__, fault)
            return False  # type: ignore[return-value] # "pass by" for those that answer
        finally:
            self._own_s += perf_counter() - began - (self.gate.idle_s - idle)

    return guarded  # type: ignore[return-value] # functools.wraps names `self`


class Tracer:
    """Watches the training that happens on the thread that attaches it.

    `probes` are the classes of `tui_trainer.probes.PROBES`, or any others.
    """

    def __init__(
        self,
        recorder: RecorderLike,
        gate: Gate,
        probes: Sequence[type[Probe]],
        options: Options | None = None,
    ) -> None:
        self.recorder = recorder
        self.gate = gate
        self.owner = 0
        """Identity of the thread that trains; 0 while detached or suspended."""
        self.calls_of_step = 0
        """How often any optimizer's `step` began."""
        self.step = 1
        """The optimizer step in the making."""
        self._thread = 0
        self._patches = Patches()
        self._handles: list[Any] = []
        self._roots = Roots(self._patches, lambda: self.owner, self._busy, self._call)
        self.registry = Registry(recorder, self._roots, probes, options or Options())
        self._reporter = Reporter(self)
        self.clock: Clock = HostClock()
        self._clock_due = True
        """Where the models are is not known before the first of them is called."""
        self._times: Times = lambda: [0.0] * OUTSIDE
        self.scaling = Scaling()
        self._open: list[int] = []
        self._nested = 0
        self._gap = OUTSIDE
        self._closure = False
        self._batch_due = True
        self._zeroes_first: bool | None = None
        self._seen: set[int] = set()
        self._sampling: list[Meter] = []
        self.losses: list[torch.Tensor] = []
        self._last_losses: list[torch.Tensor] = []
        self._clips: list[ClipCall] = []
        self._clipping: list[Meter] = []
        self._stepping: Meter | None = None
        self._own_s = 0.0
        self._last_end = 0.0
        self._idle_before = 0.0
        self._in_gate = False
        self._broken = False
        self._seen_ever: set[int] = set()
        self._said: set[int] = set()
        self._value_norm: torch.Tensor | None = None

    # ------------------------------------------------------------ life

    def attach(self) -> None:
        """Listen, on the calling thread. Attach before a script is imported: a function that it
        takes from torch by `from … import` is then already ours."""
        if self._thread:
            return
        self._thread = self.owner = threading.get_ident()
        self._handles = install(self, self._patches)
        self._roots.discover()
        self.gate.on_stop_here = self._reporter.make
        self.gate.working = self.suspended
        reference = weakref.ref(self)
        # A forked DataLoader worker has a copy of us, and of our thread's identity.
        os.register_at_fork(after_in_child=lambda: _silence(reference()))

    def detach(self) -> None:
        """Put back everything exactly as it was, and record what is still under way."""
        if not self._thread:
            return
        self.owner = self._thread = 0
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._roots.forget()
        self._patches.restore()
        self.flush()

    def __enter__(self) -> Tracer:
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Around work that is not training (evaluations, checkpoints): nothing is seen or timed."""
        owner, self.owner = self.owner, 0
        current = self._open[-1] if self._open else self._gap
        began = perf_counter()
        if not self._in_gate:  # there nothing is timed anyway
            self.clock.switch(OUTSIDE)
        try:
            yield
        finally:
            self.owner = owner
            if not self._in_gate:
                if self._last_end:  # 0 until the first phase has begun
                    self._last_end += perf_counter() - began
                self.clock.switch(current)

    def flush(self) -> None:
        """Record every step already made, waiting for its values if need be."""
        try:
            with torch.no_grad():
                self.registry.outbox.drain(everything=True)
        except Exception as fault:
            self._fault("flush", fault)

    def duration_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far. Only while stopped."""
        return self._times()[phase] if phase == STEP else self.clock.total_ms(phase)

    def gradient_scale(self, meter: Meter) -> float:
        """The factor that a GradScaler still has on this optimizer's gradients. Waits for it."""
        scale = self.scaling.gradient_scale(self.registry.optimizer_of(meter))
        return float(scale) if scale is not None else 1.0

    @property
    def roots(self) -> list[torch.nn.Module]:
        """The models that were called from outside, in order of their first call."""
        return self._roots.modules

    def _busy(self) -> bool:
        return bool(self._open)

    def _fault(self, where: str, fault: Exception) -> None:
        """A fault of our own: say it once and go on blind; the training never hears of it."""
        self.owner = 0
        self._open.clear()
        if not self._broken:
            self._broken = True
            text = f"tracing is switched off: {where}: {describe(fault)}"
            self.recorder.notice("fault", text, "error", self.step)

    # ------------------------------------------------------------ phases

    def _enter(self, phase: int) -> bool:
        """Begin a phase; False when another is already open (a backward inside a forward, …)."""
        if self._open:
            if self._open[-1] != STEP:
                return False
            if not self._closure:
                if phase == STEP:
                    return False
                self._open.clear()  # an optimizer raised and the script went on
        if self._last_end == 0.0:
            self._last_end, self._idle_before = perf_counter(), self.gate.idle_s
        self._open.append(phase)
        self._seen.add(phase)
        return True

    def _run(self) -> None:
        """The phase just entered begins to run now, after whatever we did first."""
        self.clock.switch(self._open[-1])

    def _leave(self, gap: int) -> None:
        """The open phase has ended; what follows it is `gap` until something else is known."""
        phase = self._open.pop()
        self._gap = gap
        self._pass(phase)

    def _pass(self, phase: int) -> None:
        """Through the gate at the end of `phase`; nothing is timed there."""
        self.clock.switch(OUTSIDE)
        self._in_gate = True
        try:
            if self.gate.armed or (phase == STEP and self.gate.between_steps):
                with torch.enable_grad():  # for what others have the gate do here
                    self.gate.reached(PHASES[phase], self.step)
            else:
                self.gate.reached(PHASES[phase], self.step)
        finally:
            self._in_gate = False
            if self._reporter.holds:
                self._reporter.clear()

    def _go_on(self) -> None:
        """Back to the script."""
        self.clock.switch(self._open[-1] if self._open else self._gap)

    def phase_failed(self) -> None:
        """What the script called raised: the phase is over, and it is no boundary."""
        if self._open and self._open.pop() == CLIP:
            for meter in self._clipping:
                meter.fresh = False
        self._go_on()

    def _data_ends(self) -> None:
        """Something begins that needs the batch."""
        if self._gap == OUTSIDE and BACKWARD in self._seen:
            self.clock.relabel(DATA)  # the next micro-batch of an accumulated step
        if self._batch_due:
            self._batch_due = False
            self._pass(DATA)

    # ------------------------------------------------------------ what hooks.py hears

    @_guarded
    def optimizer_seen(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer showed itself before its first step."""
        self.registry.seen(optimizer)

    @_guarded
    def zero_grad_begins(self, thing: Any) -> bool:
        """`thing.zero_grad()`, an optimizer's or a module's."""
        if not self._enter(ZERO_GRAD):
            return False
        if isinstance(thing, torch.optim.Optimizer):
            self.registry.seen(thing)
        if self._zeroes_first is None:
            self._zeroes_first = FORWARD not in self._seen
        if self._zeroes_first and self._batch_due and not self._closure:
            self._data_ends()
        self._run()
        return True

    @_guarded
    def zero_grad_ends(self) -> None:
        """It returned."""
        self._leave(self._gap)
        self._go_on()

    def _call(
        self,
        original: Callable[..., Any],
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A root is called."""
        if not torch.is_grad_enabled():
            return self._evaluate(original, module, args, kwargs)
        if not self._forward_begins(module, args, kwargs):
            return original(module, *args, **kwargs)
        try:
            result = original(module, *args, **kwargs)
        except BaseException:
            self._forward_sampled()
            self.phase_failed()
            raise
        self._forward_ends(result)
        return result

    def _evaluate(
        self,
        original: Callable[..., Any],
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._open:
            return original(module, *args, **kwargs)
        self._show_all_made()
        self.clock.switch(OUTSIDE)
        try:
            return original(module, *args, **kwargs)
        finally:
            self.clock.switch(self._gap)

    @_guarded
    def _show_all_made(self) -> None:
        """Record what has arrived: no step comes for a while."""
        self.registry.outbox.drain()

    @_guarded
    def _forward_begins(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        first = FORWARD not in self._seen
        if not self._enter(FORWARD):
            return False
        if self._zeroes_first is None:
            self._zeroes_first = False
        if self.gate.armed:
            self._reporter.inputs(args, kwargs)
        self.registry.register_pending()
        self._choose_clock(module)
        self._data_ends()
        if first:
            for meter in self.registry.meters:
                meter.prepare(self.step, self.gate.stops_soon)
                if meter.forward_begins(module):
                    self._sampling.append(meter)
        self._run()
        return True

    @_guarded
    def _forward_sampled(self) -> None:
        self._end_sampling()

    def _end_sampling(self) -> None:
        sampling, self._sampling = self._sampling, []
        for meter in sampling:
            meter.forward_ends()

    @_guarded
    def _forward_ends(self, result: Any) -> None:
        if self._sampling:
            self._end_sampling()
        if self.gate.armed:
            self._reporter.output(result)
        self._leave(LOSS)
        self._go_on()

    def _choose_clock(self, module: torch.nn.Module) -> None:
        if self._clock_due and isinstance(self.clock, HostClock):
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device.type == "cuda":
                self.clock = clock_for(parameter.device)

    @_guarded
    def backward_begins(self, tensors: Any) -> bool:
        """`backward` is called on one tensor or several."""
        if not self._enter(BACKWARD):
            return False
        self._add_losses([tensors] if isinstance(tensors, torch.Tensor) else list(tensors))
        self._pass(LOSS)
        for meter in self.registry.meters:
            meter.fresh = False
        self._run()
        return True

    def _add_losses(self, tensors: list[torch.Tensor]) -> None:
        if self._closure and self.losses:
            return  # the first evaluation of the closure is the one at the step's own weights
        scalars = [t for t in tensors if isinstance(t, torch.Tensor) and t.numel() == 1]
        self.losses += [scalar(self.scaling.original(t)) for t in scalars]
        if len(self.losses) > MOST_LOSSES:
            self.losses = [torch.stack([t.float() for t in self.losses]).sum()]

    @_guarded
    def backward_ends(self) -> None:
        """It returned: the gradients are there."""
        self._batch_due = True
        self._leave(OUTSIDE)
        self._go_on()

    @_guarded
    def clip_begins(self, parameters: Any, kind: str) -> bool:
        """Gradients are about to be clipped: read them first."""
        if not self._enter(CLIP):
            return False
        self._clipping = self.registry.meters_of(parameters)
        for meter in self._clipping:
            if not meter.fresh:
                self._read_gradients(meter, kind)
        if kind == "value":
            self._value_norm = total_norm(parameters)
        if self.gate.armed:
            self._reporter.before_clip(self._clipping)
        self._run()
        return True

    @_guarded
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
        self.clock.switch(OUTSIDE)
        for meter in self._clipping:
            meter.lend(captured, parameters, limit, total)
        found = [self._value_norm, total_norm(parameters)] if kind == "value" else [total]
        readings = tuple(r for r in found if isinstance(r, torch.Tensor))
        if len(readings) == len(found):
            meters = list(self._clipping)
            self._clips.append(
                clip_call(kind, parameters, limit, norm_type, readings, meters, captured)
            )
            del self._clips[:-MOST_LOSSES]
        self._leave(OUTSIDE)
        self._go_on()

    def _read_gradients(self, meter: Meter, clipping: str = "") -> None:
        optimizer = self.registry.optimizer_of(meter)
        meter.prepare(self.step, self.gate.stops_soon)
        meter.read_gradients(
            self.scaling.gradient_scale(optimizer),
            getattr(optimizer, "found_inf", None),
            clipping,
        )

    @_guarded
    def step_begins(self, optimizer: torch.optim.Optimizer, closure: bool) -> None:
        """`optimizer.step` begins."""
        self.calls_of_step += 1
        if not self._enter(STEP):
            self._nested += 1
            return
        self._closure = closure
        self._nested = 0
        meter = self._stepping = self.registry.meter_for(optimizer)
        meter.prepare(self.step, self.gate.stops_soon)
        if not closure and not meter.fresh:
            self._read_gradients(meter)
        meter.before_update()
        self._run()

    @_guarded
    def step_ends(self, optimizer: torch.optim.Optimizer) -> None:
        """It returned: the weights have changed."""
        began = perf_counter()
        if self._nested:
            self._nested -= 1
            return
        if not self._open or self._open[-1] != STEP:
            return
        self._open.pop()
        self._gap = DATA
        self.clock.switch(OUTSIDE)
        meter, self._stepping = self._stepping, None
        if meter is None:
            return
        if self._closure and not meter.fresh:
            self._read_gradients(meter)
        self._closure = False
        made = meter.after_update(self._finish(optimizer, meter))
        counted = perf_counter()
        own_ms = (self._own_s + counted - began) * 1e3
        made.own_ms["tracer"] = max(0.0, own_ms - sum(made.own_ms.values()))
        self.registry.outbox.put(made, self.gate.armed)
        # `_guarded` adds the whole of this call; what is counted above does not count again.
        self._own_s = began - counted - self.registry.outbox.take_accounted_s()
        self._say_unseen()
        self._pass(STEP)
        self.step += 1
        self._go_on()

    def _finish(self, optimizer: torch.optim.Optimizer, meter: Meter) -> Finished:
        now, idle = perf_counter(), self.gate.idle_s
        step_ms = (now - self._last_end - (idle - self._idle_before)) * 1e3
        self._last_end, self._idle_before = now, idle
        if self.losses:
            self._last_losses, self.losses = self.losses, []
        self.scaling.step_over()
        mine: list[ClipCall] = []
        if self._clips:
            mine = [call for call in self._clips if meter in call.meters]
            for call in mine:
                call.meters.remove(meter)
            self._clips = [call for call in self._clips if call.meters]
        rate = optimizer.param_groups[0].get("lr", float("nan"))
        self._batch_due = True
        self._clock_due = False
        self._seen_ever |= self._seen
        self._seen = set()
        self._times = self.clock.take()
        return Finished(
            step=self.step,
            losses=self._last_losses,
            learning_rate=rate if isinstance(rate, torch.Tensor) else float(rate),
            step_ms=step_ms,
            times=self._times,
            clips=mine,
        )

    @_guarded
    def step_skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """A GradScaler did not let the optimizer step."""
        scale = self.scaling.last_scale()
        self.recorder.notice("skipped_step", skipped_text(scale), "warning", self.step)
        self.losses = []
        self._clips = []
        self._batch_due = True
        self._gap = DATA
        for meter in self.registry.meters:
            meter.fresh = False

    @_guarded
    def scaled(self, scaler: Any, outputs: Any, result: Any) -> None:
        """`scaler.scale(outputs)` gave `result`."""
        self.scaling.scaled(scaler, outputs, result)

    @_guarded
    def scaler_updated(self) -> None:
        """`scaler.update()`."""
        self.scaling.updated()

    # ------------------------------------------------------------ what cannot be seen

    def _say_unseen(self) -> None:
        """Say which phases this script does not have, once it has made a few steps."""
        if self.step >= STEPS_BEFORE_UNSEEN and self._seen_ever != self._said:
            self._said = set(self._seen_ever)
            missing = {PHASES[p]: why for p, why in WHY_UNSEEN.items() if p not in self._said}
            self.registry.phases_unseen(missing)


def _silence(tracer: Tracer | None) -> None:
    if tracer is not None:
        tracer.owner = 0
