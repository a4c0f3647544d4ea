"""The batch of a step whose loss is far above the usual one: its rows by their share of that loss.

Only on the CPU, where reading a loss waits for nothing.
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
FACTOR = 4.0
"""Times the highest of the last losses from which a batch is looked at."""
OF_FIRST = 0.5
"""Smallest share of the first loss that such a batch has: near zero, four times the usual loss is
little."""
MAX_LOOKED_AT = 20
MAX_HELD = 1 << 20
"""Elements of a tensor that is kept from the loss function to backward."""
MAX_ROWS = 5
ROW_LOSSES = (
    *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
)
"""Loss functions that can be taken of each row."""


class BadBatches:
    """Follows the loss, and keeps weak references to what the last one was computed from."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._first = 0.0
        self._inputs: list[weakref.ref[torch.Tensor]] = []
        self._loss: tuple[Callable[..., Any], str, list[Any], dict[str, Any]] | None = None
        self._left = MAX_LOOKED_AT

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
        """`function`: torch's own."""
        if self._left and name in ROW_LOSSES and len(args) <= 2:
            named = {key: _weak(value) for key, value in kwargs.items()} if kwargs else {}
            self._loss = function, name, list(map(_weak, args)), named

    def look_at(self, value: float) -> BadBatch | None:
        """Called before backward: describes the batch of a loss of this `value` if that is far
        above the losses before."""
        try:
            return self._look_at(value)
        finally:
            self._loss = None

    def _look_at(self, value: float) -> BadBatch | None:
        if math.isfinite(value):
            recent = self._recent
            usual = max(recent, default=0.0)
            self._first = self._first or abs(value)
            far = value > FACTOR * usual > 0 and value > OF_FIRST * self._first
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
    """A small tensor itself, without its graph: in `cross_entropy(model(x), y)` nothing else holds
    the logits until backward."""
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
