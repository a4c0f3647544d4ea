"""The tracer: turns a plain PyTorch loop into phases, from outside, and has each step measured.

While attached, it observes every `zero_grad`, call of the model, `backward`, clipping and `step` on
the training thread and makes of them the phases data → zero_grad → forward → loss → backward → clip
→ step, in whatever order and number a script has them. Rules:

* One optimizer step is one step, whichever optimizer makes it: a GAN's two networks take turns.
* Evaluations (calls without gradients) are not a phase.
* A step for which a GradScaler does not call the optimizer is not a step: the next batch belongs to
  the same one. An optimizer that handles `found_inf` itself (PyTorch's fused ones) is called all
  the same and leaves the weights as they are: that is a step. Both are reported as skipped.
* `step.PendingStep` defines the loss of a step, `phases.Phases` where a phase begins and ends.

Nothing here may ever change or stop the training: every method that torch calls is `guarded`.
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
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer

from tui_trainer.protocol.messages import ClipKind
from tui_trainer.trace import torch_private
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.measurement import StepMeasurer
from tui_trainer.trace.module_calls import Patches, RootModules
from tui_trainer.trace.optimizers import OptimizerRegistry
from tui_trainer.trace.phases import BACKWARD, CLIP, FORWARD, LOSS, OUTSIDE, STEP, ZERO_GRAD, Phases
from tui_trainer.trace.probe import (
    Options,
    Probe,
    RecorderLike,
    describe_exception,
    skipped_text,
)
from tui_trainer.trace.reports import PhaseReporter
from tui_trainer.trace.step import (
    GradScaling,
    PendingStep,
    StepOutcome,
    make_clip_call,
    total_norm,
)
from tui_trainer.trace.step_queue import StepQueue
from tui_trainer.trace.torch_hooks import TorchHooks
from tui_trainer.trace.torch_private import NormCapture

P = ParamSpec("P")
R = TypeVar("R")


def guarded(
    method: Callable[Concatenate[Tracer, P], R],
) -> Callable[Concatenate[Tracer, P], R]:
    """Count our own time, and let no exception of ours reach the training.

    Only `StopTraining` and other non-`Exception`s pass. A method that tells whether a phase begins
    returns False after a fault.
    """

    @functools.wraps(method)
    def wrapper(self: Tracer, *args: P.args, **kwargs: P.kwargs) -> R:
        began, idle = perf_counter(), self.gate.idle_s
        try:
            return method(self, *args, **kwargs)
        except Exception as fault:
            self._switch_off(method.__name__, fault)
            return False  # type: ignore[return-value] # "no phase" for those that tell
        finally:
            self._own_s += perf_counter() - began - (self.gate.idle_s - idle)

    return wrapper  # type: ignore[return-value] # functools.wraps names `self`


class Tracer:
    """Traces the training on the thread that attaches it.

    `probes` are the classes of `tui_trainer.probes.PROBES`, or others.
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
        self.training_thread = 0
        """Identity of the thread that trains; 0 while detached, suspended or switched off."""
        self.optimizer_steps = 0
        """How often any optimizer's `step` began."""
        self._attached = False
        self._failed = False
        self._own_s = 0.0
        """Our overhead since it was last accounted for, without time spent in the gate."""
        self._patches = Patches()
        self._hooks = TorchHooks(self, self._patches)
        self._roots = RootModules(self._patches, self)
        self.registry = OptimizerRegistry(recorder, self._roots, probes, options or Options())
        self._reporter = PhaseReporter(self)
        self._phases = Phases(gate, self._reporter.release)
        self._queue = StepQueue()
        self._pending = PendingStep()
        self._scaling = GradScaling()
        self._sampling: list[StepMeasurer] = []
        """Measurers whose probes observe the open forward."""
        self._clipping: list[StepMeasurer] = []
        """Measurers whose gradients the open clip clips."""
        self._stepping: StepMeasurer | None = None
        self._inner_steps = 0
        """Depth of optimizer steps inside the open `step`."""
        self._norm_before_value_clip: torch.Tensor | None = None

    # ------------------------------------------------------------ attaching

    def attach(self) -> None:
        """Hook into torch, on the calling thread. Attach before a script is imported: a function
        that it takes from torch by `from … import` is then already wrapped."""
        if self._attached:
            return
        self._attached = True
        self.training_thread = threading.get_ident()
        self._hooks.install()
        self._roots.search()
        self.gate.hooks.pausing = self._reporter.report
        self.gate.hooks.work_context = self.suspended
        self.gate.hooks.before_work = self._flush_in_gate
        reference = weakref.ref(self)
        # A forked DataLoader worker has a copy of the tracer, and of the thread's identity.
        os.register_at_fork(after_in_child=lambda: _disable_after_fork(reference()))

    def detach(self) -> None:
        """Restore torch exactly as it was, and record the remaining steps."""
        if not self._attached:
            return
        self._attached = False
        self.training_thread = 0
        self._roots.clear()
        self._hooks.remove()
        self.flush()

    def __enter__(self) -> Tracer:
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Around work that is not training (evaluations, checkpoints): nothing is observed or
        timed."""
        thread, self.training_thread = self.training_thread, 0
        with self._phases.excluded():
            try:
                yield
            finally:
                self.training_thread = thread

    def register(self, model: torch.nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Take the weights of `model` as those that the run began with, before a checkpoint is
        loaded into it: drift is measured from them."""
        try:
            self._roots.add(model)
            for optimizer in optimizers:
                self.registry.measurer_for(optimizer)
        except Exception as fault:
            self._switch_off("register", fault)

    def flush(self) -> None:
        """Record every completed step, waiting for its values if necessary."""
        try:
            with torch.no_grad():
                self._queue.drain(everything=True)
        except Exception as fault:
            self._switch_off("flush", fault)

    def flush_idle(self) -> None:
        """For another thread, many times a second: record completed steps where the training thread
        makes no further one for a while."""
        try:
            with torch.no_grad():
                self._queue.drain_idle()
        except Exception as fault:
            self._switch_off("recording", fault)

    def reset_after_fork(self) -> None:
        """In a forked child, where nothing is traced."""
        self.training_thread = 0
        self._queue.reset_after_fork()

    def _flush_in_gate(self) -> None:
        """`flush`, counted as overhead, which time in the gate otherwise is not."""
        began = perf_counter()
        self.flush()
        self._own_s += perf_counter() - began

    def _switch_off(self, where: str, fault: Exception) -> None:
        """After a fault of ours: report it once and stop tracing; the training goes on."""
        self.training_thread = 0
        self._phases.close_all()
        if not self._failed:
            self._failed = True
            text = f"tracing is switched off: {where}: {describe_exception(fault)}"
            self.recorder.notice("fault", text, "error")

    # ------------------------------------------------------------ state, for reports

    @property
    def step(self) -> int:
        """The current optimizer step; set before attaching to continue from a checkpoint."""
        return self._phases.step

    @step.setter
    def step(self, step: int) -> None:
        self._phases.step = step

    @property
    def roots(self) -> list[torch.nn.Module]:
        """The models that were called, in order of their first call."""
        return self._roots.modules

    @property
    def losses(self) -> list[torch.Tensor]:
        """Losses of the current step (0-d each)."""
        return self._pending.losses

    @property
    def in_phase(self) -> bool:
        return self._phases.open is not None

    def duration_ms(self, phase: int) -> float:
        """Time of a phase in this step so far. Only while paused."""
        return self._phases.duration_ms(phase)

    def gradient_scale(self, measurer: StepMeasurer) -> float:
        """The factor that a GradScaler still has on this optimizer's gradients. Waits for it."""
        scale = self._scaling.gradient_scale(self.registry.optimizer_of(measurer))
        return float(scale) if scale is not None else 1.0

    # ------------------------------------------------------------ calls of the model

    def call_model(
        self,
        original: Callable[..., Any],
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A root module is called (see `module_calls.CallObserver`)."""
        if not torch.is_grad_enabled():
            return self._evaluate(original, module, args, kwargs)
        if not self._forward_began(module, args, kwargs):
            return original(module, *args, **kwargs)
        try:
            result = original(module, *args, **kwargs)
        except BaseException:
            self._forward_failed()
            self._phases.fail()
            raise
        self._forward_ended(result)
        return result

    def _evaluate(
        self,
        original: Callable[..., Any],
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._phases.open is not None:
            return original(module, *args, **kwargs)
        self._evaluation_began()
        self._phases.stop_clock()
        try:
            return original(module, *args, **kwargs)
        finally:
            self._phases.resume_clock()

    @guarded
    def _evaluation_began(self) -> None:
        self._queue.drain()  # the next step may be long in coming

    @guarded
    def _forward_began(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        first = FORWARD not in self._phases.seen
        if not self._phases.enter(FORWARD):
            return False
        if self.gate.armed:
            self._reporter.keep_inputs(args, kwargs)
        self.registry.register_pending()
        self._phases.before_forward(module)
        if first:
            for measurer in self.registry.measurers:
                measurer.prepare(self.step, self.gate.stops_soon)
                if measurer.before_forward(module):
                    self._sampling.append(measurer)
        self._phases.run()
        return True

    @guarded
    def _forward_failed(self) -> None:
        self._end_sampling()

    @guarded
    def _forward_ended(self, result: Any) -> None:
        if self._sampling:
            self._end_sampling()
        if self.gate.armed:
            self._reporter.keep_output(result)
        self._phases.leave(LOSS)

    def _end_sampling(self) -> None:
        sampling, self._sampling = self._sampling, []
        for measurer in sampling:
            measurer.after_forward()

    # ------------------------------------------------------------ zero_grad and backward

    @guarded
    def optimizer_found(self, optimizer: Optimizer) -> None:
        """An optimizer is used before its first step."""
        self.registry.add_pending(optimizer)

    @guarded
    def zero_grad_began(self, owner: Optimizer | torch.nn.Module) -> bool:
        if not self._phases.enter(ZERO_GRAD):
            return False
        if isinstance(owner, Optimizer):
            self.registry.add_pending(owner)
        self._phases.run()
        return True

    @guarded
    def zero_grad_ended(self) -> None:
        self._phases.leave()

    @guarded
    def backward_began(self, tensors: Any) -> bool:
        if not self._phases.enter(BACKWARD):
            return False
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        scalars = [t for t in given if isinstance(t, torch.Tensor) and t.numel() == 1]
        losses = [self._scaling.unscaled_loss(loss) for loss in scalars]
        self._phases.before_backward()
        self._pending.add_losses(losses, self._phases.closure)
        self._phases.boundary(LOSS)
        for measurer in self.registry.measurers:
            measurer.gradients_read = False
        self._phases.run()
        return True

    @guarded
    def backward_ended(self) -> None:
        self._phases.after_backward()
        self._phases.leave(OUTSIDE)

    def phase_failed(self) -> None:
        """The torch function that is the open phase raised."""
        if self._phases.fail() == CLIP:
            for measurer in self._clipping:
                measurer.gradients_read = False

    # ------------------------------------------------------------ clipping

    @guarded
    def clip_began(self, parameters: Any, kind: ClipKind) -> bool:
        if not self._phases.enter(CLIP):
            return False
        self._clipping = self.registry.measurers_of(parameters)
        for measurer in self._clipping:
            if not measurer.gradients_read:
                self._read_gradients(measurer, kind)
        if kind == "value":
            self._norm_before_value_clip = total_norm(parameters)
        if self.gate.armed:
            self._reporter.keep_norms(self._clipping, self.gate.stops_soon)
        self._phases.run()
        return True

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
        for measurer in self._clipping:
            measurer.use_clip_norms(captured, parameters, limit, total)
        found = (
            [self._norm_before_value_clip, total_norm(parameters)] if kind == "value" else [total]
        )
        readings = [r for r in found if isinstance(r, torch.Tensor)]
        if len(readings) == len(found):
            self._pending.add_clip(
                make_clip_call(
                    kind, parameters, limit, norm_type, readings, self._clipping, captured
                )
            )
        self._phases.leave(OUTSIDE)

    def _read_gradients(self, measurer: StepMeasurer, clipping: str = "") -> None:
        optimizer = self.registry.optimizer_of(measurer)
        measurer.prepare(self.step, self.gate.stops_soon)
        measurer.read_gradients(self._scaling.gradient_scale(optimizer), clipping)

    # ------------------------------------------------------------ the optimizer's step

    @guarded
    def step_began(self, optimizer: Optimizer, closure: bool) -> None:
        self.optimizer_steps += 1
        if not self._phases.enter(STEP):
            self._inner_steps += 1
            return
        self._phases.closure = closure
        self._inner_steps = 0
        self._phases.before_step()
        measurer = self._stepping = self.registry.measurer_for(optimizer)
        measurer.prepare(self.step, self.gate.stops_soon)
        if not closure and not measurer.gradients_read:
            self._read_gradients(measurer)
        skip_flag = torch_private.skip_flag(optimizer)
        measurer.skip = None if skip_flag is None else (skip_flag, self._scaling.loss_scale())
        measurer.before_update()
        self._phases.run()

    @guarded
    def step_ended(self, optimizer: Optimizer) -> None:
        """The weights have changed."""
        began = perf_counter()
        if self._inner_steps:
            self._inner_steps -= 1
            return
        if not self._phases.close(STEP):
            return
        self._phases.stop_clock()
        measurer, self._stepping = self._stepping, None
        if measurer is None:
            return
        if self._phases.closure and not measurer.gradients_read:
            self._read_gradients(measurer)
        completed = measurer.after_update(self._outcome(optimizer, measurer))
        accounted = perf_counter()
        overhead_ms = (self._own_s + accounted - began) * 1e3
        own_ms = completed.own_ms
        own_ms["tracer"] = max(0.0, overhead_ms - sum(own_ms.values()))
        self._queue.put(measurer, completed, self.gate.armed)
        # `guarded` adds the whole of this call, of which the part above is accounted for already.
        self._own_s = began - accounted - self._queue.take_accounted_s()
        unseen = self._phases.unseen()
        if unseen is not None:
            self.registry.set_phases_unseen(unseen)
        self._phases.next_step()

    def _outcome(self, optimizer: Optimizer, measurer: StepMeasurer) -> StepOutcome:
        step_ms, times = self._phases.complete_step()
        self._scaling.end_step()
        losses, clips = self._pending.take(measurer)
        rate = optimizer.param_groups[0].get("lr", float("nan"))
        return StepOutcome(
            step=self.step,
            losses=losses,
            learning_rate=rate if isinstance(rate, torch.Tensor) else float(rate),
            step_ms=step_ms,
            times=times,
            clips=clips,
        )

    @guarded
    def step_skipped(self) -> None:
        """A GradScaler did not call `optimizer.step`: the current step starts over."""
        text = skipped_text(self._scaling.read_loss_scale())
        self.recorder.notice("skipped_step", text, "warning", self.step)
        self._pending.clear()
        self._phases.skip_step()
        for measurer in self.registry.measurers:
            measurer.gradients_read = False

    # ------------------------------------------------------------ loss scaling

    @guarded
    def loss_scaled(self, scaler: GradScaler, outputs: Any, result: Any) -> None:
        """`scaler.scale(outputs)` returned `result`."""
        self._scaling.add(scaler, outputs, result)

    @guarded
    def scaler_updated(self) -> None:
        self._scaling.end_iteration()


def _disable_after_fork(tracer: Tracer | None) -> None:
    if tracer is not None:
        tracer.reset_after_fork()
