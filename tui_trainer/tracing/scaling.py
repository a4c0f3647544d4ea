"""What a GradScaler does to losses and gradients, so that we can undo it in what we show."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.amp.grad_scaler import OptState


class Scaling:
    """Losses that were scaled in this step, and which optimizers' gradients still are."""

    def __init__(self) -> None:
        self._losses: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = []
        self._scaler: weakref.ref[Any] | None = None

    def scaled(self, scaler: Any, original: Any, result: Any) -> None:
        """`scaler.scale(original)` gave `result`. Keeps the value alone, never the graph."""
        self._scaler = weakref.ref(scaler)
        if isinstance(original, torch.Tensor) and isinstance(result, torch.Tensor):
            self._losses.append((weakref.ref(result), original.detach()))
        elif isinstance(original, (list, tuple)) and isinstance(result, (list, tuple)):
            for before, after in zip(original, result, strict=True):
                self.scaled(scaler, before, after)
        del self._losses[:-64]

    def original(self, loss: torch.Tensor) -> torch.Tensor:
        """What `loss` was before it was scaled; itself when it was not."""
        for reference, before in self._losses:
            if reference() is loss:
                return before
        return loss

    def gradient_scale(self, optimizer: torch.optim.Optimizer | None) -> torch.Tensor | None:
        """The factor (0-d) that is still on this optimizer's gradients; None: there is none."""
        scaler = self._scaler() if self._scaler is not None else None
        if scaler is None:
            return None
        states = scaler._per_optimizer_states
        if optimizer is not None:
            if id(optimizer) in states and states[id(optimizer)]["stage"] is not OptState.READY:
                return None
        elif any(state["stage"] is not OptState.READY for state in states.values()):
            return None
        scale = scaler._scale
        return scale if isinstance(scale, torch.Tensor) else None

    def loss_scale(self) -> torch.Tensor:
        """The factor (0-d) that losses are scaled by now; NaN where that is not known."""
        scaler = self._scaler() if self._scaler is not None else None
        scale = scaler._scale if scaler is not None else None
        return scale if isinstance(scale, torch.Tensor) else torch.tensor(float("nan"))

    def last_scale(self) -> float:
        """The loss scale now, for people. Waits for the device: the scaler itself just did."""
        scaler = self._scaler() if self._scaler is not None else None
        return float(scaler.get_scale()) if scaler is not None else float("nan")

    def step_over(self) -> None:
        """The losses of this step have been counted."""
        self._losses.clear()

    def updated(self) -> None:
        """`scaler.update()`: no gradient is scaled until `scale` is called again."""
        self._scaler = None
