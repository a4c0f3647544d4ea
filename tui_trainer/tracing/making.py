"""The step in the making: the losses and the clippings that its record will tell of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tui_trainer.tracing.clips import ClipCall, scalar

MOST = 64
"""Losses and clippings that are kept apart within one step."""


class Making:
    """What the loop has done since its last optimizer step.

    The loss of a step is the sum of the scalars that `backward` was called on since the step before
    (before any GradScaler): exactly the objective whose gradient the optimizer uses. With a closure
    it is the closure's first evaluation. An optimizer that steps without a backward of its own (two
    optimizers for one model) shows the loss of the step before.
    """

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        """0-d each."""
        self._last: list[torch.Tensor] = []
        self._clips: list[ClipCall] = []

    def add_losses(self, losses: Sequence[torch.Tensor], closure: bool) -> None:
        """`backward` is called on these, one element each."""
        if closure and self.losses:
            return  # the first evaluation of the closure is the one at the step's own weights
        self.losses += [scalar(loss) for loss in losses]
        if len(self.losses) > MOST:
            self.losses = [torch.stack([loss.float() for loss in self.losses]).sum()]

    def add_clip(self, call: ClipCall) -> None:
        """Gradients were clipped."""
        self._clips.append(call)
        del self._clips[:-MOST]

    def take(self, meter: object) -> tuple[list[torch.Tensor], list[ClipCall]]:
        """The optimizer that `meter` measures has stepped: its losses, and the clippings of its
        gradients; those of other optimizers' wait for their own step."""
        if self.losses:
            self._last, self.losses = self.losses, []
        mine: list[ClipCall] = []
        if self._clips:
            mine = [call for call in self._clips if meter in call.meters]
            for call in mine:
                call.meters.remove(meter)
            self._clips = [call for call in self._clips if call.meters]
        return self._last, mine

    def forget(self) -> None:
        """The step is not made: its scaler skipped it."""
        self.losses, self._clips = [], []
