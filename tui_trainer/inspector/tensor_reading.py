"""The elements of a tensor as real numbers, in parts of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.trace.torch_private import local

CPU_ELEMENTS, DEVICE_ELEMENTS = 1 << 20, 1 << 24
"""Elements that are converted at a time: what fits a cache, and what occupies an accelerator."""


def part_elements(tensor: torch.Tensor) -> int:
    """How many elements to work on at a time."""
    return CPU_ELEMENTS if tensor.device.type == "cpu" else DEVICE_ELEMENTS


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor to read, of a sharded one the shard, without a graph.

    Raises InspectionError, with the reason, where it has no elements that can be read.
    """
    tensor = local(tensor).detach()
    if tensor.is_meta:
        raise InspectionError("it is on the meta device, which holds shapes without values")
    if tensor.is_nested:
        raise InspectionError("it is a nested tensor, which has no regular shape")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise InspectionError(f"it is sparse ({layout}): only dense tensors can be inspected")
    if tensor.is_quantized:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InspectionError(f"it is quantized ({dtype}): its elements are not numbers")
    return tensor


def as_real(part: torch.Tensor) -> torch.Tensor:
    """float32 or float64 values; of complex ones the absolute values."""
    if part.dtype in (torch.float32, torch.float64):
        return part
    if part.is_complex():
        return part.abs()
    wide = not part.is_floating_point() and part.dtype != torch.bool
    return part.to(torch.float64 if wide and part.device.type != "mps" else torch.float32)


def parts_of(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset in C order, view) of all parts."""
    yield from _parts(tensor, part_elements(tensor), 0)


def _parts(tensor: torch.Tensor, size: int, offset: int) -> Iterator[tuple[int, torch.Tensor]]:
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        for first in range(0, flat.numel(), size):
            yield offset + first, flat[first : first + size]
    elif tensor.numel() <= size:
        yield offset, tensor
    else:
        inner = tensor[0].numel()
        rows = size // inner
        for first in range(0, tensor.shape[0], max(1, rows)):
            if rows:
                yield offset + first * inner, tensor[first : first + rows]
            else:
                yield from _parts(tensor[first], size, offset + first * inner)


def flat_values(part: torch.Tensor) -> torch.Tensor:
    """Real values in C order; a contiguous part of floats is not copied."""
    return as_real(part.reshape(-1))


def evenly_spaced(tensor: torch.Tensor, wanted: int) -> torch.Tensor:
    """At most `wanted` elements at equal distances in C order, as one dimension."""
    count = tensor.numel()
    if count <= wanted:
        return as_real(tensor.reshape(-1))
    # Not a divisor of the row length: every k-th element would be in the same few columns.
    stride = -(-count // wanted)
    inner = tensor.shape[-1] if tensor.dim() else 1
    while stride > 1 and inner > 1 and math.gcd(stride, inner) > 1:
        stride += 1
    if tensor.is_contiguous():
        return as_real(tensor.view(-1)[::stride])
    index = torch.arange(0, count, stride, device=tensor.device)
    places = torch.unravel_index(index, tensor.shape)
    return as_real(tensor[places])


def matrix_shape(tensor: torch.Tensor) -> tuple[int, int]:
    """The first dimension by all others; one dimension is one row."""
    rows = tensor.shape[0] if tensor.dim() > 1 else 1
    return rows, math.prod(tensor.shape[1:]) if tensor.dim() > 1 else tensor.numel()
