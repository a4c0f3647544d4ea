"""Interfaces of what observes a traced training, besides the probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer


class LoopObserver(Protocol):
    """Observes the loop around the first steps."""

    def model_called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A model is called with gradients."""

    def step_completed(self, step: int) -> None:
        """The training thread is in the call of the optimizer's `step`."""


class UpdateObserver(Protocol):
    """Observes the weights around the steps of optimizers. Raises nothing."""

    def step_began(self, optimizer: Optimizer) -> None:
        """The weights are about to change."""

    def step_ended(self, optimizer: Optimizer) -> None:
        """They have changed."""


class ForwardObserver(Protocol):
    """Observes how the loss of a step is computed. Raises nothing."""

    def forward_began(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A root module is about to be called for training."""

    def forward_ended(self, result: Any) -> None:
        """The forward has returned `result`."""

    def loss_called(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: torch.Tensor,
    ) -> None:
        """A loss function of torch returned a scalar."""

    def backward_began(self, loss: torch.Tensor, value: torch.Tensor) -> None:
        """The gradients of this scalar are about to be computed; `value`: it without its graph and
        the scale of a GradScaler."""

    def detached(self) -> None:
        """The tracer is detached: nothing more is observed."""


@dataclass(eq=False)
class Observers:
    """Calls everything that observes the training now."""

    loop: LoopObserver | None = None
    updates: UpdateObserver | None = None
    rates: UpdateObserver | None = None
    """Sets other learning rates for the duration of an optimizer's step."""
    forwards: ForwardObserver | None = None
