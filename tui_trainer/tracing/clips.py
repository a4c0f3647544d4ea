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
