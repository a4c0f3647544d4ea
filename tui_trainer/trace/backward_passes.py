"""Calls of `backward`: what is known of their losses, and which optimizers they reach."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tui_trainer.trace import torch_private
from tui_trainer.trace.bad_batch import BadBatches
from tui_trainer.trace.loss_graph import loss_graph_of
from tui_trainer.trace.measurement import StepMeasurer
from tui_trainer.trace.module_calls import depends_on_mode
from tui_trainer.trace.nonfinite_origin import NonFiniteOrigins
from tui_trainer.trace.step import BackwardPass, GradScaling, scalar

GRAPHS_READ = 5
"""Optimizer steps in which the graph of the loss is looked at."""


class BackwardPasses:
    """The backward pass that is open, and the last one, to which the next may add."""

    def __init__(
        self, scaling: GradScaling, origins: NonFiniteOrigins, bad_batches: BadBatches
    ) -> None:
        self.open: BackwardPass | None = None
        self._last: BackwardPass | None = None
        self._last_loss: weakref.ref[torch.Tensor] | None = None
        self._scaling = scaling
        self._origins = origins
        self._bad_batches = bad_batches
        self._in_eval_mode: set[int] = set()
        """Identities of the first trained parameter of each model that was called in `eval()` mode
        since the last backward."""

    def reset(self) -> None:
        """What is open belongs to no step."""
        self.open = self._last = None

    @property
    def open_losses(self) -> list[torch.Tensor]:
        """Those of the open backward (0-d each)."""
        return self.open.losses if self.open is not None else []

    def model_called(self, module: torch.nn.Module) -> None:
        """Remember where a model is called for training in `eval()` mode, if it has a parameter to
        train and layers for which that matters."""
        if module.training and not self._in_eval_mode:
            return
        trained = next((id(p) for p in module.parameters() if p.requires_grad), 0)
        if module.training:
            self._in_eval_mode.discard(trained)
        elif trained and depends_on_mode(module):
            self._in_eval_mode.add(trained)

    def begin(self, outputs: Any, optimizer_steps: int) -> list[torch.Tensor]:
        """A backward of `outputs` begins; returns those of one element, the losses."""
        given = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        scalars = [t for t in given if isinstance(t, torch.Tensor) and t.numel() == 1]
        losses = [scalar(self._scaling.unscaled_loss(loss)) for loss in scalars]
        backward = self.open = BackwardPass(losses)
        if optimizer_steps < GRAPHS_READ and len(scalars) == 1:
            backward.cross_entropy = torch_private.cross_entropy_of(scalars[0])
            if not optimizer_steps:
                backward.loss_graph = loss_graph_of(scalars[0].grad_fn)
        if scalars:
            self._look_at(backward, scalars)
        return scalars

    def _look_at(self, backward: BackwardPass, scalars: list[torch.Tensor]) -> None:
        """What about these losses can be seen only now."""
        backward.producer = self._origins.producer_of(scalars)
        backward.bad_batch = self._bad_batches.look_at(scalars[0]) if len(scalars) == 1 else None
        last = self._last_loss() if self._last_loss is not None else None
        previous = self._last
        waiting = previous is not None and not previous.used and bool(previous.claims)
        backward.repeated = last is scalars[0] and waiting
        self._last_loss = weakref.ref(scalars[0])

    def end(self, reached: list[StepMeasurer], evaluated: StepMeasurer | None) -> None:
        """Put the pass to those that wait for the steps of the optimizers that it `reached`.

        `evaluated`: the optimizer whose open `step` has evaluated its closure once."""
        backward, self.open = self.open, None
        if backward is None:
            return
        # Of a closure only the first evaluation is at the weights that the step began with; where
        # the others reach further optimizers, they are no iteration of theirs.
        backward.used = evaluated is not None
        reached = [measurer for measurer in reached if measurer is not evaluated]
        last = self._last
        if (
            last is not None
            and last.claims == set(reached)
            and not (last.used or last.returned or backward.returned)
        ):
            last.add(backward.losses)
            last.repeated = last.repeated or backward.repeated
            last.producer = last.producer or backward.producer
            last.bad_batch = last.bad_batch or backward.bad_batch
            backward = last
        self._last = backward
        for measurer in reached:
            measurer.add_pass(backward)
            if self._in_eval_mode and not self._in_eval_mode.isdisjoint(measurer.tracked.ids):
                measurer.eval_forward = True
        self._in_eval_mode.clear()
