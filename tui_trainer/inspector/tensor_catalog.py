"""The tensors of a run that can be inspected, by name.

Everything is looked up again for each request, and nothing is kept: a script may replace layers,
optimizers and gradients at any time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import torch
from msgspec import structs

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.protocol.inspection import TensorInfo, TensorList, TensorRef
from tui_trainer.trace.optimizers import OptimizerRegistry
from tui_trainer.trace.reports import tensors_in
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.torch_private import is_sharded, local, plain_name, unwrapped

MAX_LISTED = 20_000
"""Tensors in one list: about 2 MB of a message."""
SHARD = "the shard of this process"


class TracedRun(Protocol):
    """The tracer, on its training thread at a phase boundary."""

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
        for ref, tensor in self._all():
            if len(found) < MAX_LISTED:
                also = others.get(ref.name, ()) if ref.kind != "buffer" else ()
                found.append(structs.replace(info_of(ref, tensor), also=also))
            else:
                left_out += 1
        return TensorList(tuple(found), left_out)

    def find(self, ref: TensorRef) -> torch.Tensor:
        """The tensor itself. Raises InspectionError where there is none."""
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

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, parameter), each once: those of the models, then those of optimizers alone."""
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
        """Raises InspectionError where there is none of this name."""
        found = next((each for known, each in self.parameters() if known == name), None)
        if found is None:
            first = next((names[0] for names in self.shared() if name in names), None)
            if first is not None:
                return self.parameter(first)
            raise self._unknown(name)
        return found

    def shared(self) -> Iterator[tuple[str, ...]]:
        """The names of each parameter that a model has under several ones, the first one first."""
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
        """(key, tensor) of the optimizer state of a parameter, nested ones as `key[0]`."""
        for _, optimizer in self._run.registry.existing():
            # `get`, since a lookup in the defaultdict would add an entry.
            state = optimizer.state.get(parameter)
            if state:
                yield from tensors_in((str(key), value) for key, value in state.items())

    def _all(self) -> Iterator[tuple[TensorRef, torch.Tensor]]:
        for name, parameter in self.parameters():
            yield TensorRef(name), parameter
            if parameter.grad is not None:
                yield TensorRef(name, "gradient"), parameter.grad
            for key, tensor in self.state_of(parameter):
                yield TensorRef(name, "state", key), tensor
        for name, buffer in self.buffers():
            yield TensorRef(name, "buffer"), buffer

    # ------------------------------------------------------------ reasons

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
    """Describe a tensor, of a sharded one the shard."""
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
