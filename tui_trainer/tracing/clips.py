"""What a call of a clipping function tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch


@dataclass
class ClipCall:
    """A call of a clipping function, its figures still where they were computed."""

    kind: str
    meters: list[object]
    """Of the optimizers whose gradients it clipped and that have not stepped since."""
    max_norm: float
    readings: tuple[torch.Tensor, ...]
    """Norm before; for clipping by value also the norm after."""
    parameters: int
    two_norm: bool


def clip_call(
    kind: str,
    parameters: Any,
    limit: Any,
    norm_type: Any,
    readings: tuple[torch.Tensor, ...],
    meters: list[object],
    captured: Captured,
) -> ClipCall:
    """The record of a call that clipped `parameters`, which `meters` measure, to `limit`."""
    count = captured.count
    if not count:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        count = sum(p.grad is not None for p in given)
    return ClipCall(
        kind=kind,
        meters=meters,
        max_norm=float(limit),
        readings=tuple(scalar(reading) for reading in readings),
        parameters=count,
        two_norm=kind == "norm" and float(norm_type) == 2.0,
    )


FULL = (torch.float32, torch.float64)


class Captured:
    """The 2-norms of single gradients that a clipping function computes for its total, caught on
    the way: reading all gradients once more would cost as much as everything else we do."""

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = []
        """(tensors, their 2-norms, each 0-d)."""
        self._stacked: torch.Tensor | None = None
        """All of them as one vector, as the total is computed from."""

    def __enter__(self) -> Captured:
        original: Any = torch._foreach_norm
        self._original = original

        def foreach_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(tensors, *args, **kwargs)
            if not kwargs and (not args or (len(args) == 1 and float(args[0]) == 2.0)):
                self.calls.append((tensors, result))
            return result

        of_vector: Any = torch.linalg.vector_norm
        self._of_vector = of_vector

        def vector_norm(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self.calls and self._stacked is None:
                self._stacked = x
            return of_vector(x, *args, **kwargs)

        self._ours: Any = foreach_norm
        self._ours_of_vector: Any = vector_norm
        vars(torch)["_foreach_norm"] = foreach_norm
        vars(torch.linalg)["vector_norm"] = vector_norm
        return self

    def __exit__(self, *exc: object) -> None:
        if torch._foreach_norm is self._ours:
            vars(torch)["_foreach_norm"] = self._original
        if torch.linalg.vector_norm is self._ours_of_vector:
            vars(torch.linalg)["vector_norm"] = self._of_vector
        # They refer to us: without them we, and the gradients, go as soon as nobody needs us, and
        # not only when the garbage collector comes by. Gradients of several steps alive at once
        # cost their memory, and 5 % of time on a CPU, whose caches then never see a block again.
        self._ours = self._ours_of_vector = None

    @property
    def count(self) -> int:
        """Of how many gradients."""
        count = 0
        for tensors, _ in self.calls:
            count += len(tensors)
        return count

    def norms_of(
        self, clipped: Any, parameters: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor] | None:
        """Of the gradients of `parameters` (flattened, one each), where just these were `clipped`
        in this order and have a gradient each, as for a model on one device; else None."""
        if len(self.calls) != 1 or type(clipped) is not list:
            return None
        tensors, norms = self.calls[0]
        if not len(tensors) == len(clipped) == len(parameters) or norms[0].dtype not in FULL:
            return None
        if not all(map(is_, clipped, parameters)):
            return None
        vector = self._stacked
        if vector is not None and vector.dim() == 1 and vector.shape[0] == len(norms):
            return (vector,)
        return norms

    def by_gradient(self) -> dict[int, torch.Tensor]:
        """id(gradient) to its norm, in float32 or better."""
        return {
            id(tensor): norm
            for tensors, norms in self.calls
            for tensor, norm in zip(tensors, norms, strict=True)
            if norm.dtype in FULL
        }


def scalar(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of one element as a 0-d one, without its graph."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.reshape(()) if tensor.dim() else tensor


def total_norm(parameters: Any) -> torch.Tensor:
    """√Σ‖gᵢ‖² over the gradients of `parameters` (0-d)."""
    with torch.no_grad():
        return _total_norm(parameters)


def _total_norm(parameters: Any) -> torch.Tensor:
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = [p.grad for p in given if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    stacked = torch.stack([norm.to(norms[0].device) for norm in norms])
    total: torch.Tensor = torch.linalg.vector_norm(stacked)
    return total
