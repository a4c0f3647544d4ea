"""The parameter groups of all optimizers, parameters outside of them, and the memory of a run's
tensors."""

from __future__ import annotations

from typing import Any

import torch

from tui_trainer.inspector.tensor_catalog import TensorCatalog, TracedRun
from tui_trainer.protocol.inspection import (
    MAX_NAMES,
    HeldBytes,
    OptimizerGroup,
    ParameterUse,
    TensorKind,
)
from tui_trainer.protocol.schema import Scalar
from tui_trainer.trace.torch_private import local


def parameter_use(run: TracedRun, catalog: TensorCatalog) -> ParameterUse:
    """The parameter groups, the parameters that are not updated, and the memory of all tensors."""
    parameters = list(catalog.parameters())
    names = {id(parameter): name for name, parameter in parameters}
    groups, held = _groups(run, names)
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    some = any(p.grad is not None for _, p in trained)
    idle = [name for name, p in trained if p.grad is None and id(p) in held] if some else []
    return ParameterUse(
        groups=tuple(groups),
        memory=_memory(catalog, parameters),
        frozen=_few([name for name, p in parameters if not p.requires_grad]),
        without_optimizer=_few([name for name, p in trained if id(p) not in held]),
        without_gradient=_few(idle),
        shared=tuple(catalog.shared())[:MAX_NAMES],
    )


def _few(names: list[str]) -> tuple[str, ...]:
    return tuple(names[:MAX_NAMES])


def _groups(run: TracedRun, names: dict[int, str]) -> tuple[list[OptimizerGroup], set[int]]:
    """The groups of all optimizers, and the identities of the parameters in them."""
    found: list[OptimizerGroup] = []
    held: set[int] = set()
    for optimizer_name, optimizer in run.registry.existing():
        for number, group in enumerate(optimizer.param_groups):
            own = group["params"]
            held |= {id(each) for each in own}
            found.append(
                OptimizerGroup(
                    optimizer=optimizer_name,
                    number=number,
                    settings={k: scalar_of(v) for k, v in group.items() if k != "params"},
                    names=_few([names.get(id(each), f"param_{i}") for i, each in enumerate(own)]),
                    parameters=len(own),
                    elements=sum(each.numel() for each in own),
                )
            )
    return found, held


def _memory(
    catalog: TensorCatalog, parameters: list[tuple[str, torch.Tensor]]
) -> tuple[HeldBytes, ...]:
    """Bytes held by kind and device; for sharded tensors, those of the shard."""
    counted: dict[tuple[TensorKind, str], tuple[int, int]] = {}
    seen: set[int] = set()

    def add(kind: TensorKind, tensor: torch.Tensor) -> None:
        if id(tensor) in seen:
            return
        seen.add(id(tensor))
        held = local(tensor)
        tensors, size = counted.get((kind, str(held.device)), (0, 0))
        size += held.numel() * held.element_size()
        counted[kind, str(held.device)] = (tensors + 1, size)

    for _, parameter in parameters:
        add("parameter", parameter)
        if parameter.grad is not None:
            add("gradient", parameter.grad)
        for _, tensor in catalog.state_of(parameter):
            add("state", tensor)
    for _, buffer in catalog.buffers():
        add("buffer", buffer)
    return tuple(HeldBytes(*key, *value) for key, value in counted.items())


def scalar_of(value: Any) -> Scalar:
    """A hyper-parameter as a value that a message can hold."""
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else str(tuple(value.shape))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{scalar_of(each)}" for each in value)
    return type(value).__name__
