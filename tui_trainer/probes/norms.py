"""The 2-norms of many tensors at once, in the way that is fastest on their device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import Floats


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor as real numbers; of a sparse tensor, its values."""
    if tensor.layout != torch.strided:
        tensor = (
            tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()
        )
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Norms:
    """Norms of a fixed number of tensors, some of which may be None.

    On the CPU Σx² by BLAS, since one call per tensor takes half the time of `_foreach_norm`;
    elsewhere one foreach norm. Low precision is accumulated in float32.
    """

    def __init__(self, like: Sequence[torch.Tensor], device: torch.device) -> None:
        self._plain = all(t.dtype in (torch.float32, torch.float64) for t in like)
        self._squares = device.type == "cpu"
        self.zero = torch.zeros((), device=device)
        self.one = torch.ones((), device=device)
        self._where: list[int] = []
        self._flat: list[torch.Tensor] = []

    def read(self, tensors: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor]:
        """A 0-d tensor for each; zero for None."""
        if self._squares:
            if self._plain:
                try:
                    dot = torch.dot
                    return [dot(flat := t.view(-1), flat) for t in tensors]  # type: ignore[union-attr]
                except (AttributeError, RuntimeError):  # absent, not contiguous, sparse, …
                    pass
            return [self.zero if t is None else _sum_of_squares(t) for t in tensors]
        present = [_dense(t) for t in tensors if t is not None]
        if not present:
            return [self.zero] * len(tensors)
        low = any(t.dtype in (torch.bfloat16, torch.float16) for t in present)
        norms = torch._foreach_norm(present, 2, torch.float32) if low else _norms(present)
        found = iter(norms)
        return [self.zero if t is None else next(found) for t in tensors]

    def read_kept(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The same for tensors whose memory stays the same from step to step, such as weights."""
        if not self._squares:
            return self.read(tensors)
        where = [tensor.data_ptr() for tensor in tensors]
        if where != self._where:
            self._where = where
            flat = [tensor.detach().view(-1) for tensor in tensors if tensor.is_contiguous()]
            self._flat = flat if self._plain and len(flat) == len(tensors) else []
        if self._flat:
            return [torch.dot(flat, flat) for flat in self._flat]
        return self.read([tensor.detach() for tensor in tensors])

    def values(self, read: Floats, clip_norms: bool = False) -> NDArray[np.float64]:
        """The norms, from what `read` gave; those that were `clip_norms` are norms already."""
        values = read.astype(np.float64)
        return np.sqrt(values) if self._squares and not clip_norms else values


def _norms(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    return torch._foreach_norm(tensors)


def _sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    try:
        flat = tensor.view(-1)
    except RuntimeError:  # not contiguous, or not dense
        flat = _dense(tensor).reshape(-1)
    if flat.dtype in (torch.float32, torch.float64):
        return torch.dot(flat, flat)
    flat = _dense(flat).reshape(-1).to(torch.float32)
    return torch.dot(flat, flat)
