"""What hooks.py hears of a training loop, told as phases and measured."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tui_trainer.protocol.messages import ClipKind
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.measurement import StepMeasurer
from tui_trainer.trace.module_calls import Patches, RootModules, same_face
from tui_trainer.trace.optimizers import OptimizerRegistry
from tui_trainer.trace.phases import BACKWARD, CLIP, FORWARD, LOSS, OUTSIDE, STEP, ZERO_GRAD, Phases
from tui_trainer.trace.probe import Options, Probe, RecorderLike, describe, skipped_text
from tui_trainer.trace.reports import Reporter
from tui_trainer.trace.step import (
    Captured,
    FinishedStep,
    GradScaling,
    PendingStep,
    clip_call,
    total_norm,
)

# ---- guard
# Our own time, and our own faults: neither may become the training's.


P = ParamSpec("P")
R = TypeVar("R")


class Guarded:
    """Base of what runs on the training thread in the middle of a script's own calls."""

    def __init__(self, recorder: RecorderLike, gate: Gate) -> None:
        self.recorder = recorder
        self.gate = gate
        self.owner = 0
        """Identity of the thread that trains; 0 while detached or suspended."""
        self.own_s = 0.0
        """Our own time since it was last asked for, the gate's not counted."""
        self._broken = False

    def fault(self, where: str, fault: Exception) -> None:
        """A fault of our own: say it once and go on blind; the training never hears of it."""
        self.owner = 0
        if not self._broken:
            self._broken = True
            text = f"tracing is switched off: {where}: {describe(fault)}"
            self.recorder.notice("fault", text, "error")


G = TypeVar("G", bound=Guarded)


def guarded(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
    """Count our own time, and let no fault of ours reach the training.

    Only `StopTraining` and other non-`Exception`s pass. A method that answers whether a phase has
    begun answers False after a fault.
    """

    @functools.wraps(method)
    def guarding(self: G, *args: P.args, **kwargs: P.kwargs) -> R:
        began, idle = perf_counter(), self.gate.idle_s
        try:
            return method(self, *args, **kwargs)
        except Exception as fault:
            self.fault(method.__name__, fault)
            return False  # type: ignore[return-value] # "pass by" for those that answer
        finally:
            self.own_s += perf_counter() - began - (self.gate.idle_s - idle)

    return guarding  # type: ignore[return-value] # functools.wraps names `self`


# ---- calls
# Calls of a root model: the forward phase, and evaluations, which are none.


Original = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class HearsCalls(Guarded):
    """The part of the tracer that hears of a model's calls."""

    def __init__(
        self,
        recorder: RecorderLike,
        gate: Gate,
        probes: list[type[Probe]],
        options: Options,
        reporter: Reporter,
    ) -> None:
        super().__init__(recorder, gate)
        self.reporter = reporter
        self.phases = Phases(gate, reporter.passed)
        self.patches = Patches()
        self._roots = RootModules(
            self.patches,
            lambda: self.owner,
            lambda: self.phases.open is not None,
            self._call,
        )
        self.registry = OptimizerRegistry(recorder, self._roots, probes, options)
        self._sampling: list[StepMeasurer] = []

    @property
    def roots(self) -> list[torch.nn.Module]:
        """The models that were called from outside, in order of their first call."""
        return self._roots.modules

    def fault(self, where: str, fault: Exception) -> None:
        """See `Guarded`."""
        super().fault(where, fault)
        self.phases.drop()

    def _call(self, original: Original, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """A root is called."""
        if not torch.is_grad_enabled():
            return self._evaluate(original, module, args, kwargs)
        if not self._forward_begins(module, args, kwargs):
            return original(module, *args, **kwargs)
        try:
            result = original(module, *args, **kwargs)
        except BaseException:
            self._forward_sampled()
            self.phases.fail()
            raise
        self._forward_ends(result)
        return result

    def _evaluate(
        self, original: Original, module: torch.nn.Module, args: Args, kwargs: Kwargs
    ) -> Any:
        if self.phases.open is not None:
            return original(module, *args, **kwargs)
        self._record_what_is_made()
        self.phases.pause_clock()
        try:
            return original(module, *args, **kwargs)
        finally:
            self.phases.go_on()

    @guarded
    def _record_what_is_made(self) -> None:
        """No step comes for a while."""
        self.registry.outbox.drain()

    @guarded
    def _forward_begins(self, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> bool:
        first = FORWARD not in self.phases.seen
        if not self.phases.enter(FORWARD):
            return False
        if self.gate.armed:
            self.reporter.inputs(args, kwargs)
        self.registry.register_pending()
        self.phases.forwarding(module, args, kwargs)
        if first:
            for measurer in self.registry.measurers:
                measurer.prepare(self.phases.step, self.gate.stops_soon)
                if measurer.forward_begins(module):
                    self._sampling.append(measurer)
        self.phases.run()
        return True

    @guarded
    def _forward_sampled(self) -> None:
        self._end_sampling()

    def _end_sampling(self) -> None:
        sampling, self._sampling = self._sampling, []
        for measurer in sampling:
            measurer.forward_ends()

    @guarded
    def _forward_ends(self, result: Any) -> None:
        if self._sampling:
            self._end_sampling()
        if self.gate.armed:
            self.reporter.output(result)
        self.phases.leave(LOSS)


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
        self.making = PendingStep()
        self.scaling = GradScaling()
        self._nested = 0
        self._clipping: list[StepMeasurer] = []
        self._stepping: StepMeasurer | None = None
        self._value_norm: torch.Tensor | None = None

    def phase_failed(self) -> None:
        """What the script called raised: the phase is over, and it is no boundary."""
        if self.phases.fail() == CLIP:
            for measurer in self._clipping:
                measurer.fresh = False

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
        for measurer in self.registry.measurers:
            measurer.fresh = False
        self.phases.run()
        return True

    @guarded
    def backward_ends(self) -> None:
        """It returned: the gradients are there."""
        self.phases.batch_used()
        self.phases.leave(OUTSIDE)

    # ------------------------------------------------------------ clipping

    @guarded
    def clip_begins(self, parameters: Any, kind: ClipKind) -> bool:
        """Gradients are about to be clipped: read them first."""
        if not self.phases.enter(CLIP):
            return False
        self._clipping = self.registry.meters_of(parameters)
        for measurer in self._clipping:
            if not measurer.fresh:
                self._read_gradients(measurer, kind)
        if kind == "value":
            self._value_norm = total_norm(parameters)
        if self.gate.armed:
            self.reporter.before_clip(self._clipping, self.gate.stops_soon)
        self.phases.run()
        return True

    @guarded
    def clip_ends(
        self,
        kind: ClipKind,
        parameters: Any,
        limit: Any,
        norm_type: Any,
        total: Any,
        captured: Captured,
    ) -> None:
        """They are clipped; `total` is their norm before, as the function gave it."""
        self.phases.pause_clock()
        for measurer in self._clipping:
            measurer.lend(captured, parameters, limit, total)
        found = [self._value_norm, total_norm(parameters)] if kind == "value" else [total]
        readings = tuple(r for r in found if isinstance(r, torch.Tensor))
        if len(readings) == len(found):
            measurers: list[object] = [*self._clipping]
            self.making.add_clip(
                clip_call(kind, parameters, limit, norm_type, readings, measurers, captured)
            )
        self.phases.leave(OUTSIDE)

    def _read_gradients(self, measurer: StepMeasurer, clipping: str = "") -> None:
        optimizer = self.registry.optimizer_of(measurer)
        measurer.prepare(self.phases.step, self.gate.stops_soon)
        measurer.read_gradients(self.scaling.gradient_scale(optimizer), clipping)

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
        measurer = self._stepping = self.registry.meter_for(optimizer)
        measurer.prepare(self.phases.step, self.gate.stops_soon)
        if not closure and not measurer.fresh:
            self._read_gradients(measurer)
        # A GradScaler gives it to an optimizer that skips by itself, for the time of its step.
        found_inf = getattr(optimizer, "found_inf", None)
        measurer.skip = None if found_inf is None else (found_inf, self.scaling.loss_scale())
        measurer.before_update()
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
        measurer, self._stepping = self._stepping, None
        if measurer is None:
            return
        if self.phases.closure and not measurer.fresh:
            self._read_gradients(measurer)
        made = measurer.after_update(self._finish(optimizer, measurer))
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

    def _finish(self, optimizer: Optimizer, measurer: StepMeasurer) -> FinishedStep:
        step_ms, times = self.phases.step_made()
        self.scaling.step_over()
        losses, clips = self.making.take(measurer)
        rate = optimizer.param_groups[0].get("lr", float("nan"))
        return FinishedStep(
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
        for measurer in self.registry.measurers:
            measurer.fresh = False

    # ------------------------------------------------------------ loss scaling

    @guarded
    def scaled(self, scaler: Any, outputs: Any, result: Any) -> None:
        """`scaler.scale(outputs)` gave `result`."""
        self.scaling.scaled(scaler, outputs, result)

    @guarded
    def scaler_updated(self) -> None:
        """`scaler.update()`."""
        self.scaling.updated()


# ---- hooks
# Where the tracer listens in torch: optimizers, backward, clipping, gradient scaling.
#
# Every wrapper calls straight through while torch.compile traces it, on threads that do not train
# and
# while the tracer is suspended.


Handles = list[Any]


def install_hooks(tracer: Hearing, patches: Patches) -> Handles:
    """Listen everywhere. Returns the handles of what torch itself can remove again."""
    _wrap_zero_grad(tracer, patches)
    _wrap_backward(tracer, patches)
    _wrap_clipping(tracer, patches)
    _wrap_scaler(tracer, patches)
    return _hook_optimizers(tracer)


def _passes_by(tracer: Hearing) -> bool:
    return torch.compiler.is_compiling() or get_ident() != tracer.owner


def _hook_optimizers(tracer: Hearing) -> Handles:
    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _passes_by(tracer):
            # Bound methods are called as step(optimizer, closure): args begins with the optimizer.
            rest = args[1:] if args and args[0] is optimizer else args
            closure = rest[0] if rest else kwargs.get("closure")
            tracer.step_begins(optimizer, callable(closure))

    def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _passes_by(tracer):
            tracer.step_ends(optimizer)

    return [
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    ]


def _wrap_zero_grad(tracer: Hearing, patches: Patches) -> None:
    for owner in (Optimizer, torch.nn.Module):
        original = owner.zero_grad

        def zero_grad(
            self: Any, *args: Any, _original: Callable[..., None] = original, **kwargs: Any
        ) -> None:
            if _passes_by(tracer) or not tracer.zero_grad_begins(self):
                return _original(self, *args, **kwargs)
            try:
                _original(self, *args, **kwargs)
            except BaseException:
                tracer.phase_failed()
                raise
            tracer.zero_grad_ends()
            return None

        patches.replace(owner, "zero_grad", same_face(zero_grad, original))


def _wrap_backward(tracer: Hearing, patches: Patches) -> None:
    tensor_backward: Callable[..., Any] = torch.Tensor.backward
    autograd_backward: Callable[..., Any] = torch.autograd.backward

    def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = args[0] if args else kwargs.get("tensors", ())
        if not tracer.backward_begins(tensors):
            return original(*args, **kwargs)
        try:
            result = original(*args, **kwargs)
        except BaseException:
            tracer.phase_failed()
            raise
        tracer.backward_ends()
        return result

    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _passes_by(tracer):
            return tensor_backward(self, *args, **kwargs)
        return run(tensor_backward, (self, *args), kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        if _passes_by(tracer):
            return autograd_backward(*args, **kwargs)
        return run(autograd_backward, args, kwargs)

    patches.replace(torch.Tensor, "backward", same_face(method, tensor_backward))
    patches.replace(torch.autograd, "backward", same_face(function, autograd_backward))


CLIPPING: dict[str, ClipKind] = {
    "clip_grad_norm_": "norm",
    "clip_grads_with_norm_": "norm",
    "clip_grad_value_": "value",
}
"""Functions of torch.nn.utils to the kind of clipping that they do."""


def _wrap_clipping(tracer: Hearing, patches: Patches) -> None:
    for name, kind in CLIPPING.items():
        original = getattr(torch.nn.utils, name, None)
        if original is None:
            continue
        wrapper = _clipping(tracer, original, name, kind)
        for module in (torch.nn.utils, torch.nn.utils.clip_grad):
            if getattr(module, name, None) is original:
                patches.replace(module, name, wrapper)


def _clipping(
    tracer: Hearing, original: Callable[..., Any], name: str, kind: ClipKind
) -> Callable[..., Any]:
    def clip(*args: Any, **kwargs: Any) -> Any:
        if _passes_by(tracer):
            return original(*args, **kwargs)
        parameters = args[0] if args else kwargs.get("parameters", ())
        if isinstance(parameters, Iterator):  # seen twice: by us and by the function
            parameters = list(parameters)
            if args:
                args = (parameters, *args[1:])
            else:
                kwargs["parameters"] = parameters
        if not tracer.clip_begins(parameters, kind):
            return original(*args, **kwargs)
        try:
            with Captured() as captured:
                result = original(*args, **kwargs)
        except BaseException:
            tracer.phase_failed()
            raise
        limit = args[1] if len(args) > 1 else kwargs.get("max_norm", kwargs.get("clip_value"))
        norm_type, total = 2.0, result
        if name == "clip_grads_with_norm_":
            total = args[2] if len(args) > 2 else kwargs.get("total_norm")
        elif kind == "norm":
            norm_type = args[2] if len(args) > 2 else kwargs.get("norm_type", 2.0)
        tracer.clip_ends(kind, parameters, limit, norm_type, total, captured)
        return result

    return same_face(clip, original)  # type: ignore[no-any-return]


def _wrap_scaler(tracer: Hearing, patches: Patches) -> None:
    scale, step, update = GradScaler.scale, GradScaler.step, GradScaler.update
    unscale = GradScaler.unscale_

    def scale_(self: Any, outputs: Any) -> Any:
        result = scale(self, outputs)
        if not _passes_by(tracer) and self.is_enabled():
            tracer.scaled(self, outputs, result)
        return result

    def unscale_(self: Any, optimizer: Any) -> Any:
        result = unscale(self, optimizer)
        if not _passes_by(tracer):
            tracer.optimizer_seen(optimizer)
        return result

    def step_(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if _passes_by(tracer) or not self.is_enabled():
            return step(self, optimizer, *args, **kwargs)
        before = tracer.calls_of_step
        result = step(self, optimizer, *args, **kwargs)
        if tracer.calls_of_step == before:
            tracer.step_skipped(optimizer)
        return result

    def update_(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = update(self, *args, **kwargs)
        if not _passes_by(tracer):
            tracer.scaler_updated()
        return result

    patches.replace(GradScaler, "scale", same_face(scale_, scale))
    patches.replace(GradScaler, "unscale_", same_face(unscale_, unscale))
    patches.replace(GradScaler, "step", same_face(step_, step))
    patches.replace(GradScaler, "update", same_face(update_, update))


# ---- tracer
# The tracer: turns a plain PyTorch loop into phases, from outside.
#
# Attached, it hears of every `zero_grad`, call of the model, `backward`, clipping and `step` on
# the
# training thread, and makes of them the phases data → zero_grad → forward → loss → backward → clip
# →
# step, in whatever order and number a script has them. Rules:
#
# * One optimizer step is one step, whichever optimizer makes it: a GAN's two networks take turns.
# * Evaluations (without gradients) are no phase.
# * A step for which a GradScaler does not call the optimizer is no step: the next batch belongs to
#   the same one. An optimizer that heeds `found_inf` itself (PyTorch's fused ones) is called all
# the
#   same and leaves the weights as they are: that is a step. Both are announced as skipped.
# * What a step's loss is, is said in `making.py`; where one phase ends and the next begins, in
#   `phases.py`.
#
# Nothing here may ever change or stop the training: see `guard.py`.


class Tracer(Hearing):
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
        reporter = Reporter(weakref.ref(self))
        super().__init__(recorder, gate, list(probes), options or Options(), reporter)
        self._thread = 0
        self._handles: list[Any] = []

    # ------------------------------------------------------------ life

    def attach(self) -> None:
        """Listen, on the calling thread. Attach before a script is imported: a function that it
        takes from torch by `from … import` is then already ours."""
        if self._thread:
            return
        self._thread = self.owner = threading.get_ident()
        self._handles = install_hooks(self, self.patches)
        self._roots.discover()
        self.gate.hooks.pausing = self.reporter.make
        self.gate.hooks.work_context = self.suspended
        self.gate.hooks.before_work = self._flush_in_gate
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
        self.patches.restore()
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
        with self.phases.aside():
            try:
                yield
            finally:
                self.owner = owner

    def flush_idle(self) -> None:
        """For another thread, many times a second: record the steps that were made, where the
        training thread makes no further one for a while."""
        try:
            with torch.no_grad():
                self.registry.outbox.drain_meanwhile()
        except Exception as fault:
            self.fault("recording", fault)

    def flush(self) -> None:
        """Record every step already made, waiting for its values if need be."""
        try:
            with torch.no_grad():
                self.registry.outbox.drain(everything=True)
        except Exception as fault:
            self.fault("flush", fault)

    def _flush_in_gate(self) -> None:
        """`flush`, its time counted as our own, as the rest of what is done in the gate is not."""
        began = perf_counter()
        self.flush()
        self.own_s += perf_counter() - began

    def register(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take `model` as it is now for the start of its training, before its weights are set to
        those of a checkpoint: drift counts from here."""
        try:
            self._roots.adopt(model)
            for optimizer in optimizers:
                self.registry.meter_for(optimizer)
        except Exception as fault:
            self.fault("register", fault)

    # ------------------------------------------------------------ where it is

    @property
    def step(self) -> int:
        """The optimizer step in the making; set before attaching to go on from a checkpoint."""
        return self.phases.step

    @step.setter
    def step(self, step: int) -> None:
        self.phases.step = step

    @property
    def losses(self) -> list[torch.Tensor]:
        """Losses of the step in the making (0-d each)."""
        return self.making.losses

    def duration_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far. Only while stopped."""
        return self.phases.duration_ms(phase)

    def gradient_scale(self, measurer: StepMeasurer) -> float:
        """The factor that a GradScaler still has on this optimizer's gradients. Waits for it."""
        scale = self.scaling.gradient_scale(self.registry.optimizer_of(measurer))
        return float(scale) if scale is not None else 1.0


def _silence(tracer: Tracer | None) -> None:
    if tracer is not None:
        tracer.owner = 0
        tracer.registry.outbox.forget_parent()
