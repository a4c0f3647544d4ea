"""The tracer: turns a plain PyTorch loop into phases, from outside, and has each step measured.

While attached, it observes every `zero_grad`, call of the model, `backward`, clipping and `step` on
the training thread and maps them to the phases data → zero_grad → forward → loss → backward → clip
→ step, in whatever order and number a script has them. Rules:

* One optimizer step is one step, whichever optimizer makes it: a GAN's two networks take turns.
* Evaluations (see `evaluation`) are not a phase.
* An iteration whose gradients `zero_grad` discards, or for which a GradScaler does not call the
  optimizer, is an iteration without a step. An optimizer that handles `found_inf` itself (PyTorch's
  fused ones) is called all the same and leaves the weights as they are: that is a step.
* `step` defines which losses, gradients and clippings are a step's, `phases.Phases` where a phase
  begins and ends.

Nothing here may ever change or stop the training: every method that torch calls is `guarded`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer

from tui_trainer.protocol.events import ClipKind
from tui_trainer.trace.backward_passes import BackwardPasses
from tui_trainer.trace.bad_batch import BadBatches
from tui_trainer.trace.clipping_calls import Clippings
from tui_trainer.trace.evaluation import EvaluationLosses, EvaluationModes
from tui_trainer.trace.faults import Faults, always_guarded, guarded
from tui_trainer.trace.forward_passes import ForwardPasses
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.live_values import LiveValues
from tui_trainer.trace.module_calls import Patches, RootModules
from tui_trainer.trace.nonfinite_origin import NonFiniteOrigins
from tui_trainer.trace.optimizer_registry import OptimizerRegistry, unwrapped_optimizer
from tui_trainer.trace.optimizer_steps import OptimizerSteps
from tui_trainer.trace.phase_clocks import CLIP, ZERO_GRAD
from tui_trainer.trace.phases import Phases
from tui_trainer.trace.probe import (
    Observers,
    Probe,
    ProbeOptions,
    RecorderLike,
)
from tui_trainer.trace.reports import PhaseReporter
from tui_trainer.trace.step import (
    BackwardPass,
    GradScaling,
    SkipRecorder,
)
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.torch_hooks import TorchHooks
from tui_trainer.trace.transfer import StepQueue
from tui_trainer.trace.waiting_gradients import OpenStep, WaitingGradients


class Tracer:
    """Traces the training on the thread that attaches it.

    `probes` are the classes of `tui_trainer.probes.PROBES`, or others.
    """

    def __init__(
        self,
        recorder: RecorderLike,
        gate: Gate,
        probes: Sequence[type[Probe]],
        options: ProbeOptions | None = None,
    ) -> None:
        self.recorder = recorder
        self.gate = gate
        self.training_thread = 0
        """Identity of the thread that trains; 0 while detached, suspended or switched off."""
        self.clip_calls: dict[ClipKind, float] = {}
        """The threshold with which the training last called each kind of clipping."""
        self.clip_limits: dict[ClipKind, float] = {}
        """The thresholds that a user has set instead."""
        self._attached = False
        self.faults = Faults(recorder, gate, self._give_up_step)
        self._patches = Patches()
        self._roots = RootModules(self._patches, self)
        self.evaluation = EvaluationLosses(self, self._patches)
        self.observers = Observers()
        self.registry = OptimizerRegistry(recorder, self._roots, probes, options or ProbeOptions())
        self._reporter = PhaseReporter(self)
        self._phases = Phases(gate, self._reporter)
        self._queue = StepQueue(self.faults.report)
        self._skips = SkipRecorder(recorder)
        self._scaling = GradScaling()
        self._open_step = OpenStep()
        self._waiting = WaitingGradients(
            self.registry,
            self._phases,
            self._scaling,
            gate,
            self._open_step,
            lambda skipped: self._queue.put(self._skips, skipped, gate.armed),
        )
        modes = EvaluationModes()
        bad_batches = BadBatches()
        self.origins = NonFiniteOrigins(self.registry, self._roots, self._patches)
        self._steps = OptimizerSteps(
            self.faults,
            gate,
            self._phases,
            self.registry,
            self._waiting,
            self._open_step,
            self._scaling,
            self.evaluation,
            modes,
            self.origins,
            self._queue,
            self.observers,
            self._continue_after_fault,
        )
        self._backwards = BackwardPasses(
            self.faults,
            gate,
            self._phases,
            self.registry,
            self._waiting,
            self._open_step,
            self._steps,
            self._scaling,
            self.evaluation,
            self.origins,
            bad_batches,
            self.observers,
        )
        self._clips = Clippings(
            self.faults,
            gate,
            self._phases,
            self._waiting,
            self._steps,
            self._reporter,
            recorder,
        )
        self._forwards = ForwardPasses(
            self.faults,
            gate,
            self._phases,
            self.registry,
            self._waiting,
            self._steps,
            self._backwards,
            self.evaluation,
            modes,
            bad_batches,
            self._queue,
            self._reporter,
            self.observers,
            self._continue_after_fault,
        )
        self._roots.call_model = self._forwards.call_model
        self._roots.called_without_gradients = self._forwards.rollouts.called
        self.evaluation.on_training_loss = self._forwards.loss_called
        self.evaluation.on_fault = partial(self.faults.report, "the losses of an evaluation")
        self._hooks = TorchHooks(self, self._steps, self._backwards, self._clips, self._patches)

    # ------------------------------------------------------------ attaching

    def attach(self) -> None:
        """Hook into torch, on the calling thread. Attach before a script is imported: a function
        that it takes from torch by `from … import` is then already wrapped."""
        if self._attached:
            return
        self._attached = True
        self.training_thread = threading.get_ident()
        self._hooks.install()
        self.evaluation.install()
        self.origins.install()
        self._roots.search()
        self.gate.hooks.pausing = self._reporter.report
        self.gate.hooks.work_context = self.suspended
        self.gate.hooks.before_work = self._flush_in_gate
        if self.gate.breakpoints is not None:
            self.gate.breakpoints.live = LiveValues(self)
        reference = weakref.ref(self)
        # A forked DataLoader worker has a copy of the tracer, and of the thread's identity.
        os.register_at_fork(after_in_child=lambda: _disable_after_fork(reference()))

    def detach(self) -> None:
        """Restore torch exactly as it was, and record the remaining steps."""
        if not self._attached:
            return
        self._attached = False
        if self.observers.forwards is not None:
            self.observers.forwards.detached()
        if self.training_thread == threading.get_ident():
            self._script_ended()
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
        """Take the present weights of `model`, into which a checkpoint will be loaded, as those at
        the start of the run, from which drift is measured."""
        try:
            self._roots.add(model)
            for optimizer in optimizers:
                self.registry.measurer_for(unwrapped_optimizer(optimizer))
        except Exception as fault:
            self.faults.report("register", fault)

    def rewind(self, step: int) -> None:
        """The training was taken to the end of step `step`: whatever is open is dropped."""
        self.flush()
        try:
            self._forwards.end_sampling()
            self._phases.rewind(step + 1)
            self._backwards.reset()
            self._clips.reset()
            self._open_step.reset()
            self._open_step.outer = 0
            self._scaling.reset()
            for measurer in self.registry.measurers:
                measurer.lose()
                measurer.marks.forget()
            self.faults.given_up = False
        except Exception as fault:
            self.faults.report("going back", fault)

    def flush(self) -> None:
        """Record every completed step, waiting for its values if necessary."""
        try:
            with torch.no_grad():
                self._queue.drain(everything=True)
        except Exception as fault:
            self.faults.report("flush", fault)

    def flush_idle(self) -> None:
        """Record completed steps where the training thread makes no further one for a while. Called
        by another thread, many times a second."""
        try:
            with torch.no_grad():
                self._queue.drain_idle()
        except Exception as fault:
            self.faults.report("recording", fault)

    def reset_after_fork(self) -> None:
        """Reset in a forked child, where nothing is traced."""
        self.training_thread = 0
        self._queue.reset_after_fork()

    def _flush_in_gate(self) -> None:
        """`flush`, counted as overhead, which time in the gate otherwise is not."""
        began = perf_counter()
        self.flush()
        self.faults.own_s += perf_counter() - began

    # ------------------------------------------------------------ our own faults

    def _give_up_step(self, where: str, fault: Exception) -> None:
        """Do not measure the current step after a fault; after too many in a row, switch off."""
        self.faults.report(f"step {self.step} is not measured: {where}", fault)
        try:
            if not self.faults.given_up:
                self.faults.give_up()
                if not self._phases.close_all() and where != "_end_step":
                    self._open_step.outer = 0
                self._open_step.reset()
                self._backwards.reset()
                self._clips.reset()
                self._phases.stop_clock()
                self._forwards.end_sampling()
        except Exception as further:
            self.faults.report(where, further)
        if self.faults.too_many:
            self._switch_off()

    def _continue_after_fault(self, stepped: bool) -> None:
        """The abandoned iteration is over: measure again from here."""
        self.faults.given_up = False
        step = self.step
        try:
            for measurer in self.registry.measurers:
                measurer.lose()
                measurer.marks.forget()
            self._phases.discard_iteration()
            if stepped:
                self._phases.next_step()
        except Exception as fault:
            self.faults.report(f"after step {step}", fault)
            self._switch_off()

    def _switch_off(self) -> None:
        if self.training_thread:
            self.training_thread = 0
            self._phases.close_all()
            text = "tracing is switched off after several faults; the training continues"
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
        waiting = [p for m in self.registry.measurers for p in m.passes if not p.used]
        if self._backwards.open is not None:
            waiting.append(self._backwards.open)
        passes = dict.fromkeys(waiting)
        return [loss for each in passes for loss in each.losses]

    @property
    def in_phase(self) -> bool:
        """Whether a call of a module now is part of a phase."""
        return self._phases.in_phase

    def duration_ms(self, phase: int) -> float:
        """Time of a phase in this step so far. Only while paused."""
        return self._phases.duration_ms(phase)

    def gradient_scale(self, measurer: StepMeasurer) -> float:
        """The factor that a GradScaler still has on this optimizer's gradients. Waits for the
        device."""
        scale = self._waiting.scale_of(measurer)
        return float(scale) if scale is not None else 1.0

    # ------------------------------------------------------------ zero_grad

    @guarded
    def zero_grad_began(self, owner: Optimizer | torch.nn.Module) -> bool:
        if self.registry.by_hand is not None:
            self._steps.end_by_hand(zeroing=True)
        if not self._phases.enter(ZERO_GRAD):
            return False
        if isinstance(owner, Optimizer):
            self.registry.add_pending(owner)
        if any(measurer.passes for measurer in self.registry.measurers):
            self._waiting.follow_changes_by_hand()
        for measurer in self.registry.measurers:
            # Gradients may be discarded next: this is the last moment to read them.
            if (
                measurer.passes
                and measurer.reading is None
                and any(not each.used for each in measurer.passes)
            ):
                self._waiting.resolve_returned(measurer)
                if measurer.passes:
                    self._waiting.read(measurer)
        self._phases.run()
        return True

    @guarded
    def zero_grad_ended(self, owner: Optimizer | torch.nn.Module) -> None:
        self._phases.stop_clock()
        self._waiting.zeroed(owner)
        for measurer in self.registry.measurers:
            if measurer.passes or measurer.given_gradients:
                measurer.marks.remember()
            else:
                measurer.marks.forget()
        self._phases.leave()

    # ------------------------------------------------------------ other calls

    @guarded
    def phase_failed(self) -> None:
        """The PyTorch function of the open phase raised."""
        self._backwards.open = None
        if self._phases.fail() == CLIP:
            self._clips.failed()

    def observed_clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a framework's own `clip_grad_norm_`, which is then observed like PyTorch's."""
        return self._hooks.observed_clipping(original)

    def gradients_rescaled(self, optimizer: Optimizer) -> None:
        """A framework unscales and clips the gradients of `optimizer` by itself: their earlier
        values are not measured."""
        self._waiting.rescaled.add(optimizer)

    @always_guarded
    def optimizer_created(self, optimizer: Optimizer) -> None:
        self.registry.add_created(optimizer)

    @guarded
    def optimizer_used(self, optimizer: Optimizer) -> None:
        """An optimizer is used before its first step."""
        self.registry.add_pending(optimizer)

    @always_guarded
    def module_changed(self, module: torch.nn.Module) -> None:
        self.registry.module_changed(module)

    @guarded
    def schedule_stepped(self, optimizer: Optimizer) -> None:
        """A scheduler has changed the learning rate of `optimizer`."""
        optimizer = unwrapped_optimizer(optimizer)
        for measurer in self.registry.measurers:
            if self.registry.optimizer_of(measurer) is optimizer:
                if measurer.passes:
                    measurer.noticed.add("schedule_first")
            elif measurer.has_stepped and measurer.updates_those_of(optimizer):
                measurer.noticed.add("idle_schedule")

    @guarded
    def saving_began(self) -> bool:
        if self.in_phase:
            return False
        self._phases.begin_checkpoint()
        return True

    @guarded
    def saving_ended(self) -> None:
        self._phases.resume_clock()

    @guarded
    def collective_called(self, tensors: Any) -> None:
        """The script calls `all_reduce`."""
        if not self.in_phase:
            given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            self._waiting.averaged(given)

    # ------------------------------------------------------------ loss scaling

    @always_guarded
    def loss_scaled(self, scaler: GradScaler, outputs: Any, result: Any) -> None:
        """`scaler.scale(outputs)` returned `result`."""
        self._scaling.add(scaler, outputs, result)
        for measurer in self.registry.measurers:
            measurer.scaled = True

    @guarded
    def unscale_began(self) -> None:
        """`scaler.unscale_` is called: follow what the script did to the scaled gradients."""
        if not self.in_phase:
            self._waiting.follow_changes_by_hand()

    @guarded
    def gradients_unscaled(self, optimizer: Optimizer) -> None:
        """`scaler.unscale_(optimizer)` returned."""
        self.registry.add_pending(optimizer)
        for measurer in self.registry.measurers:
            if measurer.passes:
                measurer.refresh_norms()
                measurer.marks.remember()

    @always_guarded
    def scaler_updated(self) -> None:
        self._scaling.end_iteration()

    # ------------------------------------------------------------ the end

    def _script_ended(self) -> None:
        """Report an iteration that the script has begun and never completes."""
        try:
            self._phases.close_all()
            self._open_step.reset()
            self._steps.end_by_hand()
            self._phases.stop_clock()
            self.evaluation.end()
            left: list[BackwardPass] = []
            for measurer in self.registry.measurers:
                self._waiting.between_passes(measurer)
                if measurer.reading is None and any(not each.used for each in measurer.passes):
                    self._waiting.read(measurer)
                passes = measurer.passes
                knowledge = measurer.lose()
                for backward in passes:
                    backward.lost.append(knowledge)
                    if not backward.used and backward not in left:
                        left.append(backward)
            self._waiting.skip(left, "end")
        except Exception as fault:
            self.faults.report("the end of the script", fault)


def _disable_after_fork(tracer: Tracer | None) -> None:
    if tracer is not None:
        tracer.reset_after_fork()
