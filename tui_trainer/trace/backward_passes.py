"""Follows calls of `backward`, `torch.autograd.grad` and functions of `torch.func`: their losses,
and the optimizers whose parameters they reach."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch

from tui_trainer.trace import torch_private
from tui_trainer.trace.bad_batch import BadBatches
from tui_trainer.trace.evaluation import EvaluationLosses
from tui_trainer.trace.faults import Faults, guarded
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.loss_graph import loss_graph_of
from tui_trainer.trace.module_calls import depends_on_mode
from tui_trainer.trace.nonfinite_origin import NonFiniteOrigins
from tui_trainer.trace.optimizer_registry import OptimizerRegistry
from tui_trainer.trace.optimizer_steps import OptimizerSteps
from tui_trainer.trace.phase_clocks import BACKWARD, LOSS, OTHER
from tui_trainer.trace.phases import Phases
from tui_trainer.trace.probe import Observers
from tui_trainer.trace.script_changes import WeightWatch
from tui_trainer.trace.step import BackwardPass, GradScaling, scalar
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.waiting_gradients import OpenStep, WaitingGradients

GRAPHS_READ = 5
"""Number of first optimizer steps in which the graph of the loss is read."""


class BackwardPasses:
    """Keeps the open backward pass, and the last one, to which the next may add its losses."""

    def __init__(
        self,
        faults: Faults,
        gate: Gate,
        phases: Phases,
        registry: OptimizerRegistry,
        waiting: WaitingGradients,
        open_step: OpenStep,
        steps: OptimizerSteps,
        scaling: GradScaling,
        evaluation: EvaluationLosses,
        origins: NonFiniteOrigins,
        bad_batches: BadBatches,
        observers: Observers,
    ) -> None:
        self.faults = faults
        self.open: BackwardPass | None = None
        self._last: BackwardPass | None = None
        self._last_loss: weakref.ref[torch.Tensor] | None = None
        self._gate = gate
        self._phases = phases
        self._registry = registry
        self._waiting = waiting
        self._open_step = open_step
        self._steps = steps
        self._scaling = scaling
        self._evaluation = evaluation
        self._origins = origins
        self._bad_batches = bad_batches
        self._observers = observers
        self._calls = 0
        """Calls of models since the last backward."""
        self._in_eval_mode: dict[int, weakref.ref[torch.nn.Module]] = {}
        """Models called in `eval()` mode since the last backward, by the `id` of their first
        trainable parameter, which a wrapper shares with the model that it wraps."""

    def reset(self) -> None:
        """Forget the open pass and the last one: they belong to no step."""
        self.open = self._last = None

    def model_called(self, module: torch.nn.Module) -> None:
        """Remember `module` if it is called for training in `eval()` mode, has a trainable
        parameter, and has layers for which the mode matters."""
        self._calls += 1
        if module.training and not self._in_eval_mode:
            return
        trained = next((id(p) for p in module.parameters() if p.requires_grad), 0)
        if module.training:
            self._in_eval_mode.pop(trained, None)
        elif trained and depends_on_mode(module):
            self._in_eval_mode[trained] = weakref.ref(module)

    def _called_in_eval_mode(self, measurer: StepMeasurer) -> bool:
        """Whether a model that was called in `eval()` mode has a parameter of this optimizer."""
        ids = measurer.tracked.ids
        models = (reference() for reference in self._in_eval_mode.values())
        return any(
            id(parameter) in ids
            for model in models
            if model is not None
            for parameter in model.parameters()
        )

    def model_returned(self) -> None:
        """The forward pass of a model for training has returned."""
        self._origins.outside.model_returned()

    # ------------------------------------------------------------ calls

    @guarded
    def backward_began(self, tensors: Any) -> bool:
        return self._open_backward(tensors)

    def _open_backward(self, outputs: Any) -> bool:
        registry, phases = self._registry, self._phases
        if registry.by_hand is not None:
            self._steps.end_by_hand()
        if not phases.enter(BACKWARD):
            return False
        for module in self._evaluation.gradients_computed():
            self.model_called(module)
        phases.before_backward()
        for measurer in registry.measurers:
            if measurer.passes:
                self._waiting.between_passes(measurer)
        scalars = self._begin(outputs)
        forwards = self._observers.forwards
        if scalars and forwards is not None and self.open is not None:
            forwards.backward_began(scalars[0], self.open.losses[0])
        phases.boundary(LOSS)
        for measurer in registry.measurers:
            measurer.before_backward()
        phases.run()
        return True

    @guarded
    def backward_ended(self) -> None:
        self._phases.stop_clock()
        reached = [m for m in self._registry.measurers if m.reached_by_backward()]
        for measurer in self._registry.register_reached():
            measurer.marks.remember()
            if measurer not in reached:
                reached.append(measurer)
        if not reached and not self._registry.measurers:
            by_hand = self._registry.measure_hand_updates()
            if by_hand is not None:
                by_hand.marks.remember()
                reached.append(by_hand)
        self._end(reached)
        for measurer in reached:
            if measurer.reading is None and measurer.passes and measurer.reads_early:
                self._waiting.read(measurer)
            if measurer.weights is not None:
                self._expect_update_by_hand(measurer, measurer.weights)
        self._phases.after_backward()
        self._phases.leave(OTHER)

    def _expect_update_by_hand(self, measurer: StepMeasurer, weights: WeightWatch) -> None:
        measurer.prepare(self._phases.step, self._gate.stops_soon)
        measurer.probes.before_update()
        weights.remember()

    @guarded
    def gradients_began(self, outputs: Any, inputs: Any) -> bool:
        """`torch.autograd.grad` is called: a backward if `inputs` has an optimizer's parameters."""
        for module in self._evaluation.gradients_computed():
            self.model_called(module)
        given = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        parameters = [t for t in given if isinstance(t, torch.Tensor) and t.is_leaf]
        self._registry.register_holders(parameters)
        if not self._registry.measurers:
            self._registry.measure_hand_updates(parameters)
        if not self._registry.measurers_of(parameters):
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
        if self.open is not None:
            self.open.returned = {
                key: (weakref.ref(g), torch_private.version_of(g)) for key, g in gradients.items()
            }
        reached = self._registry.measurers_of(given)
        self._end(reached)
        for measurer in reached:
            if measurer.reading is None and measurer.passes and measurer.reads_early:
                tracked = measurer.tracked
                pairs = zip(tracked.parameters, tracked.gradients(), strict=True)
                # The script may have asked for the gradients of some parameters only.
                found = [gradients.get(id(p), gradient) for p, gradient in pairs]
                self._waiting.read(measurer, gradients=found)
            if measurer.weights is not None:
                self._expect_update_by_hand(measurer, measurer.weights)
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
        if self.open is not None:
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                self.open.losses = [scalar(value)]
            leaves = torch_private.tensors_of(gradients)
            self.open.returned = {
                -n: (weakref.ref(g), torch_private.version_of(g)) for n, g in enumerate(leaves)
            }
        self._end(list(self._registry.measurers))
        self._phases.after_backward()
        self._phases.leave(OTHER)

    # ------------------------------------------------------------ one pass

    def _begin(self, outputs: Any) -> list[torch.Tensor]:
        """Open a pass for a backward of `outputs`; return the losses: outputs of one element."""
        if isinstance(outputs, torch.Tensor):
            scalars = [outputs] if outputs.numel() == 1 else []
        else:
            scalars = [t for t in outputs if isinstance(t, torch.Tensor) and t.numel() == 1]
        losses = list(map(scalar, map(self._scaling.unscaled_loss, scalars)))
        backward = self.open = BackwardPass(losses, calls=self._calls)
        self._calls = 0
        if self._steps.begun < GRAPHS_READ and len(scalars) == 1:
            backward.cross_entropy = torch_private.cross_entropy_of(scalars[0])
            if not self._steps.begun:
                backward.loss_graph = loss_graph_of(scalars[0].grad_fn, self._name_of)
        if scalars:
            self._examine_losses(backward, scalars)
        return scalars

    def _name_of(self, parameter: torch.Tensor | None) -> str:
        if parameter is None:
            return ""
        for measurer in self._registry.measurers:
            tracked = measurer.tracked
            for known, name in zip(tracked.parameters, tracked.names, strict=True):
                if known is parameter:
                    return name
        return ""

    def _examine_losses(self, backward: BackwardPass, scalars: list[torch.Tensor]) -> None:
        """Record what is visible only before backward: the origin of a non-finite loss, a bad
        batch, a loss that is backpropagated twice."""
        searched = False
        for loss in scalars:
            if not loss.is_cpu:  # reading its value would wait for the device
                continue
            value = loss.item()
            if math.isfinite(abs(value)):
                if loss is scalars[0]:
                    self._origins.outside.watch(loss)
            elif not searched:
                searched = True
                backward.producer = self._origins.producer_of(loss)
            if len(scalars) == 1 and isinstance(value, (int, float)):
                backward.bad_batch = self._bad_batches.examine(value)
        last = self._last_loss() if self._last_loss is not None else None
        previous = self._last
        waiting = previous is not None and not previous.used and bool(previous.claims)
        backward.repeated = last is scalars[0] and waiting
        self._last_loss = weakref.ref(scalars[0])

    def _end(self, reached: list[StepMeasurer]) -> None:
        """Close the pass and add it to the measurers of the optimizers that it `reached`."""
        self._origins.outside.backward_ended()
        evaluated = self._open_step.evaluated
        backward, self.open = self.open, None
        if backward is None:
            return
        # Only the first evaluation of a closure is at the weights that the step began with. Where
        # a later one reaches further optimizers, it is no iteration of theirs.
        backward.used = evaluated is not None
        if evaluated in reached:
            reached = [measurer for measurer in reached if measurer is not evaluated]
        last = self._last
        if (
            last is not None
            and not (last.used or last.returned or backward.returned)
            and last.claims == set(reached)
        ):
            last.add(backward.losses)
            last.calls += backward.calls
            last.repeated = last.repeated or backward.repeated
            last.producer = last.producer or backward.producer
            last.bad_batch = last.bad_batch or backward.bad_batch
            backward = last
        self._last = backward
        if not reached and evaluated is None:
            self._waiting.add_unclaimed(backward)
        for measurer in reached:
            measurer.add_pass(backward)
            if self._in_eval_mode and self._called_in_eval_mode(measurer):
                measurer.noticed.add("eval_mode")
        self._in_eval_mode.clear()
