"""Follows the calls of the models: forward passes for training, and evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tui_trainer.trace.backward_passes import BackwardPasses
from tui_trainer.trace.bad_batch import BadBatches
from tui_trainer.trace.evaluation import EvaluationLosses, EvaluationModes, Rollouts
from tui_trainer.trace.faults import Faults, guarded
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.module_calls import depends_on_mode
from tui_trainer.trace.optimizer_registry import OptimizerRegistry
from tui_trainer.trace.optimizer_steps import OptimizerSteps
from tui_trainer.trace.phase_clocks import BACKWARD, DATA, EVAL, FORWARD, LOSS
from tui_trainer.trace.phases import Phases
from tui_trainer.trace.probe import Observers
from tui_trainer.trace.reports import PhaseReporter
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.transfer import StepQueue
from tui_trainer.trace.waiting_gradients import WaitingGradients


class ForwardPasses:
    """Follows the calls of the models and of the loss functions."""

    def __init__(
        self,
        faults: Faults,
        gate: Gate,
        phases: Phases,
        registry: OptimizerRegistry,
        waiting: WaitingGradients,
        steps: OptimizerSteps,
        backwards: BackwardPasses,
        evaluation: EvaluationLosses,
        modes: EvaluationModes,
        bad_batches: BadBatches,
        queue: StepQueue,
        reporter: PhaseReporter,
        observers: Observers,
        resume: Callable[[bool], None],
    ) -> None:
        """`resume(stepped)` is called at the end of an abandoned iteration."""
        self.faults = faults
        self._gate = gate
        self._phases = phases
        self._registry = registry
        self._waiting = waiting
        self._steps = steps
        self._backwards = backwards
        self._evaluation = evaluation
        self._modes = modes
        self._bad_batches = bad_batches
        self._queue = queue
        self._reporter = reporter
        self._observers = observers
        self._resume = resume
        self.rollouts = Rollouts()
        self._sampling: list[StepMeasurer] = []
        """Measurers whose probes observe the open forward."""

    def call_model(
        self,
        original: Callable[..., Any],
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A root module is called (see `module_calls.CallObserver`)."""
        if self.faults.given_up and self._registry.by_hand is not None:
            self._resume(False)
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

    # ------------------------------------------------------------ for training

    @guarded
    def _forward_began(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        phases, gate = self._phases, self._gate
        if self._registry.by_hand is not None:
            self._steps.end_by_hand()
        waiting = False
        if not phases.in_phase:
            for measurer in self._registry.measurers:
                if measurer.passes:
                    waiting = True
                    if measurer.probably_changed():
                        self._waiting.between_passes(measurer)
        first = FORWARD not in phases.seen
        if not phases.enter(FORWARD):
            return False
        self._evaluation.trains(module)
        self.rollouts.training_begins(self._evaluation.losses_before)
        observers = self._observers
        if observers.loop is not None:
            observers.loop.model_called(args, kwargs)
        self._bad_batches.model_called(args, kwargs)
        if not self._registry.measurers:
            self._registry.search_further_roots()
        if gate.armed or "data" in gate.break_phases:
            self._reporter.keep_inputs(args, kwargs)
        if observers.forwards is not None:
            observers.forwards.forward_began(module, args, kwargs)
        phases.before_forward(module, waiting)
        self._backwards.model_called(module)
        if first:
            if not phases.closure:
                self._registry.refresh()
            stops_soon = gate.stops_soon
            for measurer in self._registry.measurers:
                measurer.prepare(phases.step, stops_soon)
        for measurer in self._registry.measurers:
            if measurer.probes.before_forward(module, args, kwargs, first):
                self._sampling.append(measurer)
        phases.run()
        return True

    @guarded
    def _forward_failed(self) -> None:
        self.end_sampling()
        self._phases.fail()

    @guarded
    def _forward_ended(self, result: Any) -> None:
        if self._sampling:
            self.end_sampling()
        if self._observers.forwards is not None:
            self._observers.forwards.forward_ended(result)
        if self._gate.armed or "forward" in self._gate.break_phases:
            self._reporter.keep_output(result)
        self._backwards.model_returned()
        self._phases.leave(LOSS)

    def end_sampling(self) -> None:
        """The open forward is over, or abandoned."""
        sampling, self._sampling = self._sampling, []
        for measurer in reversed(sampling):  # they undo replacements, the last one first
            measurer.probes.after_forward()

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
        self._phases.loss_called()
        if not isinstance(result, torch.Tensor) or result.dim():
            return
        self._bad_batches.loss_called(function, name, args, kwargs)
        if self._observers.forwards is not None:
            self._observers.forwards.loss_called(function, args, kwargs, result)
        for measurer in self._registry.measurers:
            if measurer.probes.schedule.plan.loss_called:
                measurer.probes.loss_called(name, args, kwargs, result)

    # ------------------------------------------------------------ evaluations

    def _evaluate(
        self,
        original: Callable[..., Any],
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._phases.in_phase:
            return original(module, *args, **kwargs)
        self._evaluation_call_began(module, args)
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
        if not self._evaluation.includes(module):
            return False
        if self._registry.by_hand is not None:
            self._steps.end_by_hand()
        return not self._within_iteration

    @guarded
    def _evaluation_call_began(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if self._registry.by_hand is not None:
            self._steps.end_by_hand()
        within = self._within_iteration
        collecting = self.rollouts.collecting and not within
        self._phases.begin_evaluation(DATA if collecting else EVAL)
        self._queue.drain()  # the next step may come late
        if not within:
            self.rollouts.called(args)
            self._evaluation.call_began(module, self._phases.step - 1)
            if module.training and not collecting and depends_on_mode(module):
                self._modes.evaluated(args)

    @guarded
    def _evaluation_call_ended(self) -> None:
        self._phases.resume_clock()
