"""The 2-norms of many tensors at once, exact over the whole range of their dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.protocol.events import ClipKind
from tui_trainer.trace.probe import Gradient, Reading, Readings
from tui_trainer.trace.torch_private import is_sharded, local, norms_of

SMALL, LARGE = 1e-30, 1e36
"""Outside of these a sum of squares in float32 may have lost digits, underflowed or overflowed."""
EXACT_IN_FLOAT32 = (1e-12, 1e12)
"""Norms for which clip_grad_norm_'s own float32 sums of squares are exact."""
SAFE_SQUARE = 1e-250
"""Between this and its inverse a sum of squares in float64 has all its digits."""


def clip_scale(kind: ClipKind, max_norm: float, before: float, after: float) -> float:
    """The factor by which a clipping scaled the gradients.

    For clipping by norm it is PyTorch's formula, min(1, max_norm / (norm + 1e-6)); by value and by
    hand, the norm after divided by the norm before. nan or absent where a norm is.
    """
    if math.isnan(before):
        return before
    if kind != "norm":
        return after / before if before else 1.0
    return min(1.0, max_norm / (before + 1e-6))


class Norms:
    """Norms of a fixed number of tensors, some of which may be missing at times.

    On the CPU, BLAS computes Σx², which takes half the time of `_foreach_norm`; sums out of range
    are computed again in float64. Elsewhere one foreach norm accumulates in float64.
    """

    def __init__(self, like: Sequence[torch.Tensor], device: torch.device) -> None:
        self._plain = all(t.dtype in (torch.float32, torch.float64) for t in like)
        self._on_host = device.type == "cpu"
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self._sharded = any(is_sharded(t) for t in like)
        self._addresses: list[int] = []
        self._flat: list[torch.Tensor] = []

    def read(self, tensors: Sequence[torch.Tensor | None]) -> list[Reading]:
        """The norm of each tensor: a float on the CPU, else a 0-d tensor; 0 for a missing one."""
        if self._sharded:
            tensors = [None if t is None else local(t) for t in tensors]
        if not self._on_host:
            return self._read_on_device(tensors)
        if self._plain:
            try:
                dot = torch.dot
                squares = [
                    dot(flat := t.view(-1), flat).item()  # type: ignore[union-attr]
                    for t in tensors
                ]
            except (AttributeError, RuntimeError):  # missing, not contiguous, sparse, …
                pass
            else:
                return self._roots(squares, tensors)
        return [0.0 if t is None else norm_on_host(t) for t in tensors]

    def read_kept(self, tensors: Sequence[torch.Tensor]) -> list[Reading]:
        """Like `read`, for tensors that keep their address from step to step, such as weights."""
        if not self._on_host or self._sharded:
            return self.read([local(tensor).detach() for tensor in tensors])
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:
            self._addresses = addresses
            flat = [tensor.detach().view(-1) for tensor in tensors if tensor.is_contiguous()]
            self._flat = flat if self._plain and len(flat) == len(tensors) else []
        if self._flat:
            return self._roots([torch.dot(flat, flat).item() for flat in self._flat], tensors)
        return self.read([tensor.detach() for tensor in tensors])

    def _roots(self, squares: list[float], tensors: Sequence[torch.Tensor | None]) -> list[Reading]:
        found: list[Reading] = [math.sqrt(s) if s >= 0 else s for s in squares]
        if squares and not (min(squares) > SMALL and max(squares) < LARGE):
            for position, (square, tensor) in enumerate(zip(squares, tensors, strict=True)):
                if not SMALL < square < LARGE and tensor is not None:
                    found[position] = exact_norm(tensor)
        return found

    def _read_on_device(self, tensors: Sequence[torch.Tensor | None]) -> list[Reading]:
        present = [dense(t) for t in tensors if t is not None]
        if not present:
            return [0.0] * len(tensors)
        found = iter(norms_of(present, self._wide))
        return [0.0 if t is None else next(found) for t in tensors]


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The elements that this process has of a tensor, as a strided tensor of real numbers."""
    tensor = local(tensor)
    if tensor.layout != torch.strided:
        tensor = (
            tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()
        )
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def norm_on_host(tensor: torch.Tensor) -> float:
    """‖x‖ of a CPU tensor of any dtype and layout."""
    flat = dense(tensor).reshape(-1)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.to(torch.float32)
    square = float(torch.dot(flat, flat))
    return math.sqrt(square) if SMALL < square < LARGE else exact_norm(flat)


def exact_norm(tensor: torch.Tensor) -> float:
    """‖x‖ in float64, scaled by the largest element: infinite or nan only where an element is."""
    flat = dense(tensor.detach()).reshape(-1)
    if not flat.numel():
        return 0.0
    largest = float(flat.abs().max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(flat.to(torch.float64) / largest))


def total_norm(parameters: Any) -> Reading:
    """√Σ‖gᵢ‖² over the gradients of `parameters`."""
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = list({id(g): local(g) for p in given if (g := p.grad) is not None}.values())
    if not gradients:
        return 0.0
    with torch.no_grad():
        return total_of([Norms(gradients, gradients[0].device).read(gradients)], [None])


def total_of(
    norms: Sequence[Sequence[Reading] | None], positions: Sequence[list[int] | None]
) -> Reading:
    """√Σ‖x‖² over norms of several sets of tensors, each at some `positions` (None: all)."""
    numbers: list[float] = []
    tensors: list[torch.Tensor] = []
    for found, chosen in zip(norms, positions, strict=True):
        for place, norm in _placed(found or ()):
            if isinstance(norm, torch.Tensor):
                kept = norm if chosen is None or norm.dim() == 0 else norm[chosen]
                if norm.dim() or chosen is None or place in chosen:
                    tensors.append(kept.reshape(-1))
            elif chosen is None or place in chosen:
                numbers.append(norm)
    if any(number != number for number in numbers):
        numbers = [math.nan]  # hypot(inf, nan) is inf
    if not tensors:
        return math.hypot(*numbers)
    joined = torch.cat([t.to(tensors[0].device, torch.float64) for t in tensors])
    total: torch.Tensor = torch.linalg.vector_norm(joined)
    return torch.hypot(total, total.new_tensor(math.hypot(*numbers))) if numbers else total


def _placed(norms: Sequence[Reading]) -> Iterator[tuple[int, Reading]]:
    """Each norm, or tensor of norms, with the position of its (first) value."""
    place = 0
    for norm in norms:
        yield place, norm
        place += norm.numel() if isinstance(norm, torch.Tensor) else 1


def norms_before(
    gradients: Sequence[Gradient],
    norms: dict[int, torch.Tensor],
    clipped: Any,
    limit: Any,
    total: Any,
) -> Readings:
    """Norms before a clipping that, unexpectedly, did not compute all of them: the norm of a
    clipped gradient is divided by the factor of PyTorch's formula."""
    given = [clipped] if isinstance(clipped, torch.Tensor) else clipped
    scaled = {id(local(p.grad)) for p in given if p.grad is not None}
    factor: torch.Tensor | None = None
    found: list[torch.Tensor | float] = []
    for gradient in gradients:
        if gradient is None or id(gradient) in norms:
            found.append(0.0 if gradient is None else norms[id(gradient)])
            continue
        norm = torch.linalg.vector_norm(dense(gradient).float())
        if id(gradient) in scaled:
            if factor is None:
                factor = torch.clamp(float(limit) / (total + 1e-6), max=1.0)
            norm = norm / factor
        found.append(norm)
    return found


def norm_of(values: NDArray[np.float64]) -> float:
    """√Σx² without overflow."""
    square = float(np.dot(values, values))
    if SAFE_SQUARE < square < 1 / SAFE_SQUARE:
        return math.sqrt(square)
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(np.sum(np.square(values / largest))))


# ---------------------------------------------------------------- comparing norms


def is_zero(gradient: torch.Tensor) -> bool:
    return not bool(torch.count_nonzero(dense(gradient)))


def only_scaled_down(before: Readings | None, after: Readings) -> bool:
    """Whether no norm on the host has grown: gradients were clipped, scaled or zeroed."""
    if before is None:
        return True
    pairs = zip(before, after, strict=True)
    return all(
        isinstance(a, float)
        and isinstance(b, float)
        and (b <= a * (1 + 1e-6) or (a != a and b != b))
        for a, b in pairs
    )


def differing(before: Readings, after: Readings) -> list[int]:
    """Positions at which norms on the host differ."""
    pairs = zip(before, after, strict=True)
    return [i for i, (a, b) in enumerate(pairs) if a != b and (a == a or b == b)]


def close(before: Readings | None, after: Readings | None) -> bool:
    """Whether norms on the host differ by no more than two ways of summing do."""
    return (
        before is not None
        and after is not None
        and np.allclose(
            np.array(before, np.float64), np.array(after, np.float64), 1e-5, 0, equal_nan=True
        )
    )


def equal(before: Readings | None, after: Readings) -> bool:
    """Whether norms on the host are the same, where nan equals nan."""
    return before is not None and np.array_equal(
        np.array(before, dtype=np.float64), np.array(after, dtype=np.float64), equal_nan=True
    )


def norms_from_after(
    norms: Sequence[float], after: Readings, factors: Sequence[float]
) -> list[float]:
    """Norms before a clipping. Where float32 may have lost digits, they are computed from the norms
    `after` the clipping and the factors by which it scaled."""
    low, high = EXACT_IN_FLOAT32
    return [
        then / factor if not low < norm < high and isinstance(then, float) and factor > 0 else norm
        for norm, then, factor in zip(norms, after, factors, strict=True)
    ]


def exact_in_float32(norms: Sequence[float]) -> bool:
    """Whether float32 sums of squares of gradients with these norms are exact."""
    low, high = EXACT_IN_FLOAT32
    usual = bool(norms) and low < min(norms) and max(norms) < high
    if not usual or math.isnan(sum(norms)):  # `min` and `max` may pass over a nan
        usual = all(norm == 0 or low < norm < high for norm in norms)
    return usual
