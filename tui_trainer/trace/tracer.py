"""The tracer: turns a plain PyTorch loop into phases, from outside, and has each step measured.

While attached, it observes every `zero_grad`, call of the model, `backward`, clipping and `step` on
the training thread and makes of them the phases data → zero_grad → forward → loss → backward → clip
→ step, in whatever order and number a script has them. Rules:

* One optimizer step is one step, whichever optimizer makes it: a GAN's two networks take turns.
* Evaluations (see `evaluation`) are not a phase.
* Gradients that `zero_grad` throws away, or with which a GradScaler does not call the optimizer,
  are an iteration without a step. An optimizer that handles `found_inf` itself (PyTorch's fused
  ones) is called all the same and leaves the weights as they are: that is a step.
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
from time import perf_counter
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer

from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.events import ClipKind
from tui_trainer.trace import torch_private
from tui_trainer.trace.backward_passes import BackwardPasses
from tui_trainer.trace.bad_batch import BadBatches
from tui_trainer.trace.clippings import Clippings
from tui_trainer.trace.evaluation import EvaluationLosses, EvaluationModes
from tui_trainer.trace.faults import Faults, always_guarded, guarded
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.live_values import LiveValues
from tui_trainer.trace.measurement import StepMeasurer
from tui_trainer.trace.module_calls import Patches, RootModules, depends_on_mode
from tui_trainer.trace.nonfinite_origin import NonFiniteOrigins
from tui_trainer.trace.observers import ForwardObserver, LoopObserver, UpdateObserver
from tui_trainer.trace.optimizers import OptimizerRegistry, unwrapped_optimizer
from tui_trainer.trace.phases import BACKWARD, CLIP, FORWARD, LOSS, OTHER, STEP, ZERO_GRAD, Phases
from tui_trainer.trace.probe import (
    Probe,
    ProbeOptions,
    RecorderLike,
)
from tui_trainer.trace.reports import PhaseReporter
from tui_trainer.trace.step import (
    BackwardPass,
    GradScaling,
    SkipRecorder,
    StepOutcome,
    scalar,
)
from tui_trainer.trace.step_queue import StepQueue
from tui_trainer.trace.torch_hooks import TorchHooks
from tui_trainer.trace.torch_private import NormCapture
from tui_trainer.trace.waiting_gradients import OpenStep, WaitingGradients

GRAPHS_READ = 5
"""Optimizer steps in which the graph of the loss is looked at."""


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
        self.optimizer_steps = 0
        """How often any optimizer's `step` began."""
        self.clip_calls: dict[ClipKind, float] = {}
        """The threshold with which the training last called each kind of clipping."""
        self.clip_limits: dict[ClipKind, float] = {}
        """The thresholds that a user has set instead."""
        self._attached = False
        self.faults = Faults(recorder)
        self.own_s = 0.0
        """Our overhead since it was last accounted for, without time spent in the gate."""
        self._patches = Patches()
        self._hooks = TorchHooks(self, self._patches)
        self._roots = RootModules(self._patches, self)
        self.evaluation = EvaluationLosses(self, self._patches)
        self.loop: LoopObserver | None = None
        self.updates: UpdateObserver | None = None
        self.rates: UpdateObserver | None = None
        """Sets other learning rates for the duration of an optimizer's step."""
        self.forwards: ForwardObserver | None = None
        self.registry = OptimizerRegistry(recorder, self._roots, probes, options or ProbeOptions())
        self._reporter = PhaseReporter(self)
        self._phases = Phases(gate, self._reporter.release)
        self._queue = StepQueue(self.faults.report)
        self._skips = SkipRecorder(recorder)
        self._scaling = GradScaling()
        self._modes = EvaluationModes()
        self._bad_batches = BadBatches()
        self.origins = NonFiniteOrigins(self.registry, self._roots, self._patches)
        self._passes = BackwardPasses(self._scaling, self.origins, self._bad_batches)
        self._open_step = OpenStep()
        self._waiting = WaitingGradients(
            self.registry,
            self._phases,
            self._scaling,
            gate,
            self._open_step,
            lambda skipped: self._queue.put(self._skips, skipped, gate.armed),
        )
        self._clips = Clippings(self._waiting, recorder)
        self._sampling: list[StepMeasurer] = []
        """Measurers whose probes observe the open forward."""

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
        self.evaluation.on_training_loss = self.loss_called
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
        """Take the weights of `model` as those that the run began with, before a checkpoint is
        loaded into it: drift is measured from them."""
        try:
            self._roots.add(model)
            for optimizer in optimizers:
                self.registry.measurer_for(unwrapped_optimizer(optimizer))
        except Exception as fault:
            self.faults.report("register", fault)

    def rewind(self, step: int) -> None:
        """The training was taken to the end of step `step`: what is open belongs to no step."""
        self.flush()
        try:
            self._end_sampling()
            self._phases.rewind(step + 1)
            self._passes.reset()
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
        """For another thread, many times a second: record completed steps where the training thread
        makes no further one for a while."""
        try:
            with torch.no_grad():
                self._queue.drain_idle()
        except Exception as fault:
            self.faults.report("recording", fault)

    def reset_after_fork(self) -> None:
        """In a forked child, where nothing is traced."""
        self.training_thread = 0
        self._queue.reset_after_fork()

    def _flush_in_gate(self) -> None:
        """`flush`, counted as overhead, which time in the gate otherwise is not."""
        began = perf_counter()
        self.flush()
        self.own_s += perf_counter() - began

    # ------------------------------------------------------------ faults of ours

    def give_up_step(self, where: str, fault: Exception) -> None:
        """After a fault: the current step is not measured. After too many in a row nothing is."""
        self.faults.report(f"step {self.step} is not measured: {where}", fault)
        try:
            if not self.faults.given_up:
                self.faults.give_up()
                if not self._phases.close_all() and where != "_end_step":
                    self._open_step.outer = 0
                self._open_step.reset()
                self._passes.reset()
                self._clips.reset()
                self._phases.stop_clock()
                self._end_sampling()
        except Exception as further:
            self.faults.report(where, further)
        if self.faults.too_many:
            self._switch_off()

    def _continue_after_fault(self, stepped: bool) -> None:
        """The iteration that was given up is over: measure again from here."""
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
        if self._passes.open is not None:
            waiting.append(self._passes.open)
        passes = dict.fromkeys(waiting)
        return [loss for each in passes for loss in each.losses]

    @property
    def in_phase(self) -> bool:
        """Whether a call of a module now is part of a phase."""
        return self._phases.open is not None and not self._phases.in_closure

    def duration_ms(self, phase: int) -> float:
        """Time of a phase in this step so far. Only while paused."""
        return self._phases.duration_ms(phase)

    def gradient_scale(self, measurer: StepMeasurer) -> float:
        """The factor that a GradScaler still has on this optimizer's gradients. Waits for it."""
        scale = self._waiting.scale_of(measurer)
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
        if self.faults.given_up and self.registry.by_hand is not None:
            self._continue_after_fault(stepped=False)
        if not torch.is_grad_enabled() or (not module.training and self._is_evaluation(module)):
            return self._evaluate(original, module, args, kwargs)
        if not self._forward_began(module, args, kwargs):
            return original(module, *args, **kwargs)
        try:
            result = original(module, *args, **kwargs)
        except BaseException:
            self._forward_failed()
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
        if self.in_phase:
            return original(module, *args, **kwargs)
        self._evaluation_call_began(module)
        try:
            return original(module, *args, **kwargs)
        finally:
            self._evaluation_call_ended()

    @property
    def _within_iteration(self) -> bool:
        return bool(self._phases.seen & {FORWARD, LOSS, BACKWARD})

    @guarded
    def _is_evaluation(self, module: torch.nn.Module) -> bool:
        """Whether this call in `eval()` mode with gradients is not for training."""
        if not self.evaluation.includes(module):
            return False
        self._end_step_by_hand()
        return not self._within_iteration

    @guarded
    def _evaluation_call_began(self, module: torch.nn.Module) -> None:
        self._end_step_by_hand()
        self._phases.begin_evaluation()
        self._queue.drain()  # the next step may be long in coming
        if not self._within_iteration:
            self.evaluation.call_began(module, self.step - 1)
            if module.training and depends_on_mode(module):
                self._modes.evaluated()

    @guarded
    def _evaluation_call_ended(self) -> None:
        self._phases.resume_clock()

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
    def _forward_began(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        self._end_step_by_hand()
        if not self.in_phase:
            for measurer in self.registry.measurers:
                if measurer.passes and measurer.probably_changed():
                    self._waiting.between_passes(measurer)
        first = FORWARD not in self._phases.seen
        if not self._phases.enter(FORWARD):
            return False
        self.evaluation.trains(module)
        if self.loop is not None:
            self.loop.model_called(args, kwargs)
        self._bad_batches.model_called(args, kwargs)
        self.registry.search_further_roots()
        if self.gate.may_pause_at("data"):
            self._reporter.keep_inputs(args, kwargs)
        if self.forwards is not None:
            self.forwards.forward_began(module, args, kwargs)
        self._phases.before_forward(module)
        self._passes.model_called(module)
        if first:
            if not self._phases.closure:
                self.registry.refresh()
            for measurer in self.registry.measurers:
                measurer.prepare(self.step, self.gate.stops_soon)
        for measurer in self.registry.measurers:
            if measurer.before_forward(module, args, kwargs, first):
                self._sampling.append(measurer)
        self._phases.run()
        return True

    @guarded
    def _forward_failed(self) -> None:
        self._end_sampling()
        self._phases.fail()

    @guarded
    def _forward_ended(self, result: Any) -> None:
        if self._sampling:
            self._end_sampling()
        if self.forwards is not None:
            self.forwards.forward_ended(result)
        if self.gate.may_pause_at("forward"):
            self._reporter.keep_output(result)
        self._phases.leave(LOSS)

    @guarded
    def collective_called(self, tensors: Any) -> None:
        """The script calls `all_reduce`."""
        if not self.in_phase:
            given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            self._waiting.averaged(given)

    def _end_sampling(self) -> None:
        sampling, self._sampling = self._sampling, []
        for measurer in reversed(sampling):  # in the reverse order of what they replaced
            measurer.probes.after_forward()

    @always_guarded
    def module_changed(self, module: torch.nn.Module) -> None:
        self.registry.module_changed(module)

    # ------------------------------------------------------------ backward

    @guarded
    def backward_began(self, tensors: Any) -> bool:
        return self._open_backward(tensors)

    def _open_backward(self, outputs: Any) -> bool:
        self._end_step_by_hand()
        if not self._phases.enter(BACKWARD):
            return False
        self.evaluation.gradients_computed()
        self._phases.before_backward()
        for measurer in self.registry.measurers:
            if measurer.passes:
                self._waiting.between_passes(measurer)
        scalars = self._passes.begin(outputs, self.optimizer_steps)
        if scalars and self.forwards is not None:
            self.forwards.backward_began(scalars[0], self._passes.open_losses[0])
        self._phases.boundary(LOSS)
        for measurer in self.registry.measurers:
            measurer.before_backward()
        self._phases.run()
        return True

    @guarded
    def loss_called(
        self,
        function: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """A loss function was called with gradients."""
        if not isinstance(result, torch.Tensor) or result.dim():
            return
        self._bad_batches.loss_called(function, name, args, kwargs)
        if self.forwards is not None:
            self.forwards.loss_called(function, args, kwargs, result)
        for measurer in self.registry.measurers:
            if measurer.probes.schedule.plan.loss_called:
                measurer.probes.loss_called(name, args, kwargs, result)

    @guarded
    def schedule_stepped(self, optimizer: Optimizer) -> None:
        """A scheduler has changed the learning rate of `optimizer`."""
        optimizer = unwrapped_optimizer(optimizer)
        for measurer in self.registry.measurers:
            if measurer.passes and self.registry.optimizer_of(measurer) is optimizer:
                measurer.schedule_first = True

    @guarded
    def backward_ended(self) -> None:
        self._phases.stop_clock()
        reached = [m for m in self.registry.measurers if m.reached_by_backward()]
        for measurer in self.registry.register_reached():
            measurer.marks.remember()
            if measurer not in reached:
                reached.append(measurer)
        if not reached and not self.registry.measurers:
            by_hand = self.registry.measure_hand_updates()
            if by_hand is not None:
                by_hand.marks.remember()
                reached.append(by_hand)
        self._passes.end(reached, self._open_step.evaluated)
        for measurer in reached:
            if measurer.careful and measurer.reading is None and measurer.passes:
                self._waiting.read(measurer)
            self._expect_update_by_hand(measurer)
        self._phases.after_backward()
        self._phases.leave(OTHER)

    def _expect_update_by_hand(self, measurer: StepMeasurer) -> None:
        if measurer.weights is not None:
            measurer.prepare(self.step, self.gate.stops_soon)
            measurer.before_update()
            measurer.weights.remember()

    @guarded
    def gradients_began(self, outputs: Any, inputs: Any) -> bool:
        """`torch.autograd.grad`: a backward if it is for the parameters of an optimizer."""
        self.evaluation.gradients_computed()
        given = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        parameters = [t for t in given if isinstance(t, torch.Tensor) and t.is_leaf]
        self.registry.register_holders(parameters)
        if not self.registry.measurers:
            self.registry.measure_hand_updates(parameters)
        if not self.registry.measurers_of(parameters):
            return False
        return self._open_backward(outputs)

    @guarded
    def gradients_ended(self, inputs: Any, result: Any) -> None:
        self._phases.stop_clock()
        given = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        gradients = {
            id(parameter): gradient
            for parameter, gradient in zip(given, result, strict=False)
            if isinstance(gradient, torch.Tensor)
        }
        if self._passes.open is not None:
            self._passes.open.returned = {
                key: (weakref.ref(g), torch_private.version_of(g)) for key, g in gradients.items()
            }
        reached = self.registry.measurers_of(given)
        self._passes.end(reached, self._open_step.evaluated)
        for measurer in reached:
            if measurer.careful and measurer.reading is None and measurer.passes:
                found = [gradients.get(id(p)) for p in measurer.tracked.parameters]
                self._waiting.read(measurer, gradients=found)
            self._expect_update_by_hand(measurer)
        self._phases.after_backward()
        self._phases.leave(OTHER)

    @guarded
    def functional_began(self) -> bool:
        """A function made by `torch.func.grad` or `grad_and_value` is called."""
        return self._open_backward(())

    @guarded
    def functional_ended(self, result: Any, has_value: bool) -> None:
        self._phases.stop_clock()
        gradients, value = result if has_value else (result, None)
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if self._passes.open is not None:
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                self._passes.open.losses = [scalar(value)]
            leaves = torch_private.tensors_of(gradients)
            self._passes.open.returned = {
                -n: (weakref.ref(g), torch_private.version_of(g)) for n, g in enumerate(leaves)
            }
        self._passes.end(list(self.registry.measurers), self._open_step.evaluated)
        self._phases.after_backward()
        self._phases.leave(OTHER)

    @guarded
    def phase_failed(self) -> None:
        """The torch function that is the open phase raised."""
        self._passes.open = None
        if self._phases.fail() == CLIP:
            self._clips.failed()

    # ------------------------------------------------------------ zero_grad, and what it discards

    @always_guarded
    def optimizer_created(self, optimizer: Optimizer) -> None:
        self.registry.add_created(optimizer)

    @guarded
    def optimizer_used(self, optimizer: Optimizer) -> None:
        """An optimizer is used before its first step."""
        self.registry.add_pending(optimizer)

    @guarded
    def zero_grad_began(self, owner: Optimizer | torch.nn.Module) -> bool:
        self._end_step_by_hand(zeroing=True)
        if not self._phases.enter(ZERO_GRAD):
            return False
        if isinstance(owner, Optimizer):
            self.registry.add_pending(owner)
        for measurer in self.registry.measurers:
            # About to be thrown away, perhaps: the last moment to read them.
            if measurer.reading is None and any(not each.used for each in measurer.passes):
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
            if measurer.passes:
                measurer.marks.remember()
            else:
                measurer.marks.forget()
        self._phases.leave()

    # ------------------------------------------------------------ clipping

    @guarded
    def clip_began(self, parameters: Any, kind: ClipKind, two_norm: bool) -> bool:
        self._end_step_by_hand()
        if not self._phases.enter(CLIP):
            return False
        self._clips.began(parameters, kind, two_norm)
        if self.gate.armed:
            self._reporter.keep_norms(self._clips.measurers, self.gate.stops_soon)
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
        self._clips.ended(kind, parameters, limit, norm_type, total, captured)
        self._phases.leave(OTHER, owners=tuple(m.slot for m in self._clips.measurers))

    # ------------------------------------------------------------ the optimizer's step

    def step_began(self, optimizer: Optimizer, closure: bool) -> None:
        self.optimizer_steps += 1
        if self.rates is not None and self.training_thread:
            self.rates.step_began(optimizer)
        if self.updates is not None and self.training_thread:
            self.updates.step_began(optimizer)
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
        measurer = self._open_step.measurer = self.registry.stepping(optimizer)
        measurer.prepare(self.step, self.gate.stops_soon)
        if not closure:
            self._waiting.take_unseen()
            self._waiting.follow_changes_by_hand(compare=True)
            if measurer.reading is None:
                self._waiting.read(measurer)
            if measurer.reading is not None:
                self.origins.before_step(measurer, measurer.reading.norms)
        skip_flag = torch_private.skip_flag(optimizer)
        measurer.skip = None if skip_flag is None else (skip_flag, self._scaling.loss_scale())
        measurer.before_update()
        self._phases.run()

    @guarded
    def evaluation_began(self) -> None:
        """The closure of the open `step` is called."""
        self._open_step.evaluations += 1

    @guarded
    def evaluation_ended(self) -> None:
        measurer = self._open_step.measurer
        if measurer is not None and self._open_step.evaluations == 1:
            self._phases.stop_clock()
            self._waiting.take_unseen()
            self._waiting.follow_changes_by_hand(compare=True)
            if measurer.reading is None:
                self._waiting.read(measurer)
            self._open_step.evaluated = measurer
            self._phases.resume_clock()

    def step_ended(self, optimizer: Optimizer) -> None:
        """The weights have changed."""
        if self.updates is not None and self.training_thread:
            self.updates.step_ended(optimizer)
        step = self.step
        self._end_step(optimizer)
        if self.faults.given_up and id(optimizer) == self._open_step.outer:
            self._continue_after_fault(stepped=self.step == step)
        if self.rates is not None:
            self.rates.step_ended(optimizer)

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
        rate = optimizer.param_groups[0].get("lr", absent(Absent.NO_LEARNING_RATE))
        evaluations = (
            self._open_step.evaluations if self._phases.closure else absent(Absent.NO_CLOSURE)
        )
        self._complete(measurer, rate, evaluations, began)

    def _end_step_by_hand(self, zeroing: bool = False) -> None:
        """Complete a step of a script that updates its weights by itself, once it has.

        Gradients that are being zeroed have been used where their update would not be seen.
        """
        measurer = self.registry.by_hand
        if measurer is None or not measurer.passes or self._phases.open is not None:
            return
        weights = measurer.weights
        if weights is None or not (weights.changed() or (zeroing and weights.too_small())):
            return
        began = perf_counter()
        measurer.updated_by_hand()
        if not measurer.any_gradient():  # released since the update that used them
            for backward in measurer.passes:
                backward.returned = {}
        self._waiting.resolve_returned(measurer)
        self._phases.end_step_by_hand()
        if measurer.marks.changed() and measurer.any_gradient() and not measurer.all_zero():
            self._waiting.follow_changes_by_hand()
        rate, evaluations = absent(Absent.NO_LEARNING_RATE), absent(Absent.NO_CLOSURE)
        self._complete(measurer, rate, evaluations, began)

    def _complete(
        self, measurer: StepMeasurer, rate: Any, evaluations: float, began: float
    ) -> None:
        """The step of `measurer` is complete; `began`: when our part of its end began."""
        passes = measurer.passes
        shared = bool(passes) and all(backward.used for backward in passes)
        step_ms, times = self._phases.complete_step(measurer.slot, shared, bool(measurer.clips))
        self._scaling.end_step()
        for backward in passes:
            backward.used = True
            backward.claims.discard(measurer)
        outcome = StepOutcome(
            step=self.step,
            losses=[loss for each in passes for loss in each.losses] if passes else None,
            learning_rate=rate if isinstance(rate, torch.Tensor) else float(rate),
            step_ms=step_ms,
            times=times,
            clips=measurer.clips,
            evaluations=evaluations,
        )
        completed = measurer.after_update(outcome)
        if self._modes.in_train_mode(self.step, self.evaluation.losses_computed):
            completed.signs |= {"evaluated_in_train_mode"}
        if measurer.trainable_changed:
            measurer.trainable_changed = False
            self.registry.update_trainable(measurer)
        accounted = perf_counter()
        overhead_ms = (self.own_s + accounted - began) * 1e3
        own_ms = completed.own_ms
        own_ms["tracer"] = max(0.0, overhead_ms - sum(own_ms.values()))
        self._queue.put(measurer, completed, self.gate.armed)
        # `guarded` adds the whole of this call, of which the part above is accounted for already.
        self.own_s = began - accounted - self._queue.take_accounted_s()
        if self.loop is not None:
            self.loop.step_completed(self.step)
        unseen = self._phases.unseen()
        if unseen is not None:
            self.registry.set_phases_unseen(unseen)
        self._phases.next_step()
        self.faults.in_a_row = 0

    def step_skipped(self, optimizer: Optimizer) -> None:
        """A GradScaler did not call `optimizer.step`."""
        self._skip_step(optimizer)
        if self.faults.given_up:
            self._continue_after_fault(stepped=False)

    @guarded
    def _skip_step(self, optimizer: Optimizer) -> None:
        measurer = self.registry.measurer_for(unwrapped_optimizer(optimizer))
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

    def _script_ended(self) -> None:
        """Report what was left of a step that never came."""
        try:
            self._phases.close_all()
            self._open_step.reset()
            self._end_step_by_hand()
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
            self._waiting.follow_changes_by_hand(compare=True)

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


def _disable_after_fork(tracer: Tracer | None) -> None:
    if tracer is not None:
        tracer.reset_after_fork()
