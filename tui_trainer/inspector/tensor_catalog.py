"""Finds the tensors of a run by name, and reads them in parts of bounded size.

Tensors are looked up again for each request, and none is kept: a script may replace layers,
optimizers and gradients at any time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import torch
from msgspec import structs

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.protocol.inspection import TensorInfo, TensorList, TensorRef
from tui_trainer.trace.optimizer_registry import OptimizerRegistry
from tui_trainer.trace.reports import tensors_in
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.torch_private import is_sharded, local, plain_name, unwrapped

MAX_LISTED = 20_000
"""Maximum number of tensors in one list, a message of about 2 MB."""
SHARD = "the shard of this process"


class TracedRun(Protocol):
    """The tracer, used on its training thread at a phase boundary."""

    registry: OptimizerRegistry

    @property
    def roots(self) -> list[torch.nn.Module]: ...

    def gradient_scale(self, measurer: StepMeasurer) -> float: ...


class TensorCatalog:
    """Finds the parameters, buffers, gradients and optimizer states of a traced run."""

    def __init__(self, run: TracedRun) -> None:
        self._run = run

    def list_tensors(self) -> TensorList:
        """All tensors: parameters and buffers in the order of the models, each parameter followed
        by its gradient and its optimizer state."""
        found: list[TensorInfo] = []
        left_out = 0
        others = {names[0]: names[1:] for names in self.shared()}
        for ref, tensor in self.all_tensors():
            if len(found) < MAX_LISTED:
                also = others.get(ref.name, ()) if ref.kind != "buffer" else ()
                found.append(structs.replace(info_of(ref, tensor), also=also))
            else:
                left_out += 1
        return TensorList(tuple(found), left_out)

    def find(self, ref: TensorRef) -> torch.Tensor:
        """The tensor that `ref` names. Raises InspectionError where there is none."""
        if ref.kind == "buffer":
            buffer = next((each for name, each in self.buffers() if name == ref.name), None)
            if buffer is None:
                raise self._unknown(ref.name)
            return buffer
        parameter = self.parameter(ref.name)
        if ref.kind == "parameter":
            return parameter
        if ref.kind == "gradient":
            if parameter.grad is None:
                raise InspectionError(*self._no_gradient(ref.name, parameter))
            return parameter.grad
        state = dict(self.state_of(parameter))
        if ref.key not in state:
            raise InspectionError(*self._no_state(ref, parameter, state))
        return state[ref.key]

    def note(self, ref: TensorRef) -> str:
        """A note on the values of a tensor."""
        if ref.kind != "gradient":
            return ""
        parameter = self.parameter(ref.name)
        for measurer in self._run.registry.measurers_of(parameter):
            scale = self._run.gradient_scale(measurer)
            if scale != 1.0:
                return f"still multiplied by the loss scale {scale:,g}"
        return ""

    # ------------------------------------------------------------ looking up

    def all_tensors(self) -> Iterator[tuple[TensorRef, torch.Tensor]]:
        """(reference, tensor) of all tensors, in the order of `list_tensors`."""
        for name, parameter in self.parameters():
            yield TensorRef(name), parameter
            if parameter.grad is not None:
                yield TensorRef(name, "gradient"), parameter.grad
            for key, tensor in self.state_of(parameter):
                yield TensorRef(name, "state", key), tensor
        for name, buffer in self.buffers():
            yield TensorRef(name, "buffer"), buffer

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, parameter), each once: those of the models, then those only in optimizers."""
        registry = self._run.registry
        seen: set[int] = set()
        for root in self._run.roots:
            for name, parameter in registry.names.parameters(root):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter
        for measurer in registry.measurers:
            tracked = measurer.tracked
            for name, parameter in zip(tracked.names, tracked.parameters, strict=True):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def parameter(self, name: str) -> torch.Tensor:
        """The parameter called `name`. Raises InspectionError where there is none."""
        found = next((each for known, each in self.parameters() if known == name), None)
        if found is None:
            first = self.first_name(name)
            if first != name:
                return self.parameter(first)
            raise self._unknown(name)
        return found

    def first_name(self, name: str) -> str:
        """The name under which a parameter with several names is listed."""
        return next((names[0] for names in self.shared() if name in names), name)

    def shared(self) -> Iterator[tuple[str, ...]]:
        """The names of each parameter that a model has under several names, the listed one
        first."""
        found: dict[int, list[str]] = defaultdict(list)
        for root in self._run.roots:
            prefix = self._run.registry.names.prefix_of(root)
            for name, parameter in unwrapped(root).named_parameters(remove_duplicate=False):
                found[id(parameter)].append(prefix + plain_name(name))
        several = (tuple(dict.fromkeys(names)) for names in found.values())
        return (names for names in several if len(names) > 1)

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, buffer) of the models."""
        for root in self._run.roots:
            prefix = self._run.registry.names.prefix_of(root)
            for name, buffer in unwrapped(root).named_buffers():
                yield prefix + plain_name(name), buffer

    def optimizer_of(self, parameter: torch.Tensor) -> tuple[str, torch.optim.Optimizer] | None:
        """The first optimizer that updates a parameter, with its name."""
        for name, optimizer in self._run.registry.existing():
            if any(p is parameter for group in optimizer.param_groups for p in group["params"]):
                return name, optimizer
        return None

    def state_of(self, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, tensor) of the optimizer state of a parameter; nested tensors have keys such as
        `key[0]`."""
        for _, optimizer in self._run.registry.existing():
            # `get`, since a lookup in the defaultdict would add an entry.
            state = optimizer.state.get(parameter)
            if state:
                yield from tensors_in((str(key), value) for key, value in state.items())

    # ------------------------------------------------------------ errors

    def _unknown(self, name: str) -> InspectionError:
        if not self._run.roots:
            return InspectionError("no model has been called yet", "its first call is the forward")
        return InspectionError(f"there is no parameter or buffer {name}")

    def _no_gradient(self, name: str, parameter: torch.Tensor) -> tuple[str, str]:
        if not parameter.requires_grad:
            return f"{name} has no gradient: it is frozen (requires_grad is False)", ""
        hint = "pause after backward: b on the screen, or break RUN 'step > 0 at backward'"
        return f"{name} has no gradient now: none was computed, or zero_grad released it", hint

    def _no_state(
        self, ref: TensorRef, parameter: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> tuple[str, str]:
        optimizer = self.optimizer_of(parameter)
        if optimizer is None:
            return f"no optimizer holds {ref.name}", ""
        if not state:
            return f"{optimizer[0]} has no state for {ref.name} (yet)", "it begins with a step"
        return f"{optimizer[0]} has no {ref.key} for {ref.name}", f"it has {', '.join(state)}"


def info_of(ref: TensorRef, tensor: torch.Tensor, note: str = "") -> TensorInfo:
    """Describe a tensor, or the local shard of a sharded one."""
    held = local(tensor)
    notes = [SHARD] if is_sharded(tensor) else []
    notes += [note] if note else []
    return TensorInfo(
        ref=ref,
        shape=tuple(held.shape),
        dtype=str(held.dtype).removeprefix("torch."),
        device=str(held.device),
        bytes=held.numel() * held.element_size(),
        note=", ".join(notes),
    )


CPU_ELEMENTS, DEVICE_ELEMENTS = 1 << 20, 1 << 24
"""Elements that are converted at a time: few enough for a CPU's cache, enough to keep an
accelerator busy."""


def part_elements(tensor: torch.Tensor) -> int:
    """Number of elements to work on at a time."""
    return CPU_ELEMENTS if tensor.device.type == "cpu" else DEVICE_ELEMENTS


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor to read, or the local shard of a sharded one, without a graph.

    Raises InspectionError, with the reason, if it has no elements that can be read.
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
    """The values in float32 or float64; absolute values of complex numbers."""
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
    """(rows, columns) of a tensor as a matrix: the first dimension by all others; a tensor of one
    dimension is one row."""
    rows = tensor.shape[0] if tensor.dim() > 1 else 1
    return rows, math.prod(tensor.shape[1:]) if tensor.dim() > 1 else tensor.numel()
