"""Describes the batch of a step whose loss is not finite or far above the last ones: its rows by
their share of the loss.

Only on the CPU, where reading a loss does not wait for a device.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from tui_trainer.history.records import BadBatch
from tui_trainer.trace.module_calls import tensors_in
from tui_trainer.trace.torch_private import is_dense

RECENT = 32
"""Number of last losses with which a loss is compared."""
FACTOR = 4.0
"""A batch is described if its loss exceeds the highest of the last losses by this factor …"""
MIN_SHARE_OF_FIRST = 0.5
"""… and the first loss times this one: near zero, even four times the last losses are little."""
MAX_DESCRIBED = 20
"""Maximum number of batches described in a run."""
MAX_HELD = 1 << 20
"""Maximum number of elements of a tensor that is kept from the loss function to backward."""
MAX_ROWS = 5
ROW_LOSSES = (
    *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
)
"""Loss functions that return a loss for each row with `reduction="none"`."""


class BadBatches:
    """Follows the loss, and keeps what the last one was computed from, by weak references except
    for small tensors."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._first = 0.0
        self._inputs: list[weakref.ref[torch.Tensor]] = []
        self._loss: tuple[Callable[..., Any], str, list[Any], dict[str, Any]] | None = None
        self._left = MAX_DESCRIBED

    def model_called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            self._inputs = [weakref.ref(args[0])]
        else:
            self._inputs = list(map(weakref.ref, tensors_in((*args, *kwargs.values()))))
        self._loss = None

    def loss_called(
        self,
        function: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """`function` is PyTorch's own, without a wrapper."""
        if self._left and name in ROW_LOSSES and len(args) <= 2:
            named = {key: _weak(value) for key, value in kwargs.items()} if kwargs else {}
            self._loss = function, name, list(map(_weak, args)), named

    def examine(self, value: float) -> BadBatch | None:
        """Describe the batch if its loss, `value`, is not finite or far above the last losses.
        Called before backward."""
        try:
            return self._examine(value)
        finally:
            self._loss = None

    def _examine(self, value: float) -> BadBatch | None:
        if math.isfinite(value):
            recent = self._recent
            usual = max(recent, default=0.0)
            self._first = self._first or abs(value)
            far = value > FACTOR * usual > 0 and value > MIN_SHARE_OF_FIRST * self._first
            high = far and len(recent) == RECENT
            recent.append(abs(value))
            if not high:
                return None
        elif len(self._recent) < 2:
            usual = 0.0
        else:
            usual = max(self._recent)
        if not self._left:
            return None
        self._left -= 1
        with torch.no_grad():
            return self._described(value, usual)

    def _described(self, value: float, usual: float) -> BadBatch:
        low = high = math.nan
        broken: tuple[int, ...] = ()
        for reference in self._inputs:
            tensor = reference()
            if tensor is None or not is_dense(tensor) or not tensor.is_floating_point():
                continue
            if not tensor.is_cpu or not tensor.dim() or not tensor.numel():
                continue
            x = tensor.detach()
            finite = torch.isfinite(x)
            rows = (~finite).reshape(x.shape[0], -1).any(1).nonzero().flatten()
            broken = broken or tuple(rows[:MAX_ROWS].tolist())
            if math.isnan(low) and bool(finite.any()):
                low, high = float(x[finite].min()), float(x[finite].max())
        shares = self._row_shares()
        return BadBatch(value, usual, low, high, broken, shares)

    def _row_shares(self) -> tuple[tuple[int, float], ...]:
        """(row, share of the loss) of the rows with the largest shares."""
        if self._loss is None:
            return ()
        function, _, args, kwargs = self._loss
        given = [_strong(value) for value in args]
        named = {key: _strong(value) for key, value in kwargs.items()}
        if any(value is _GONE for value in (*given, *named.values())):
            return ()
        named["reduction"] = "none"
        losses = function(*given, **named)
        if not losses.dim() or losses.shape[0] < 2:
            return ()
        rows = losses.reshape(losses.shape[0], -1).double().sum(1).abs()
        total = float(rows.sum())
        if not math.isfinite(total) or total <= 0:
            return ()
        top = rows.topk(min(MAX_ROWS, len(rows)))
        return tuple(
            (int(row), float(share) / total)
            for row, share in zip(top.indices, top.values, strict=True)
        )


_GONE = object()


def _weak(value: Any) -> Any:
    """A weak reference to a large tensor or one on a device; a small one itself, detached: in
    `cross_entropy(model(x), y)` nothing else holds the logits until backward."""
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_cpu or value.numel() > MAX_HELD:
        return weakref.ref(value)
    return value.detach() if value.requires_grad else value


def _strong(value: Any) -> Any:
    if not isinstance(value, weakref.ref):
        return value
    found = value()
    return _GONE if found is None else found.detach()
