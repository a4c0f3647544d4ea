"""What a call of a clipping function tells."""

from __future__ import annotations

from typing import Any

import torch

from tui_trainer.tracing.meter import ClipCall, Meter


def clip_call(
    kind: str,
    parameters: Any,
    limit: Any,
    norm_type: Any,
    readings: tuple[torch.Tensor, ...],
    meters: list[Meter],
) -> ClipCall:
    """The record of a call that clipped `parameters`, which `meters` measure, to `limit`."""
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    return ClipCall(
        kind=kind,
        meters=meters,
        max_norm=float(limit),
        readings=tuple(reading.detach().reshape(()) for reading in readings),
        parameters=sum(p.grad is not None for p in given),
        two_norm=kind == "norm" and float(norm_type) == 2.0,
    )


class Captured:
    """The 2-norms of single gradients that a clipping function computes for its total, caught on
    the way: reading all gradients once more would cost as much as everything else we do."""

    def __init__(self) -> None:
        self.norms: dict[int, torch.Tensor] = {}
        """id(gradient) to its norm (0-d), in float32 or better."""

    def __enter__(self) -> Captured:
        original: Any = torch._foreach_norm
        self._original = original

        def foreach_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(tensors, *args, **kwargs)
            if not kwargs and (not args or (len(args) == 1 and float(args[0]) == 2.0)):
                for tensor, norm in zip(tensors, result, strict=True):
                    if norm.dtype in (torch.float32, torch.float64):
                        self.norms[id(tensor)] = norm
            return result

        self._ours: Any = foreach_norm
        vars(torch)["_foreach_norm"] = self._ours
        return self

    def __exit__(self, *exc: object) -> None:
        if torch._foreach_norm is self._ours:
            vars(torch)["_foreach_norm"] = self._original


def total_norm(parameters: Any) -> torch.Tensor:
    """√Σ‖gᵢ‖² over the gradients of `parameters` (0-d)."""
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = [p.grad for p in given if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    stacked = torch.stack([norm.to(norms[0].device) for norm in norms])
    total: torch.Tensor = torch.linalg.vector_norm(stacked)
    return total
