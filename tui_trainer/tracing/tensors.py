"""Tensors that can be shown: those in arguments and results, those among a loop's variables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch

from tui_trainer.protocol.messages import Quantity

MOST_TENSORS = 6
_OWN_PACKAGE = __name__.rpartition(".")[0]


def shape(tensor: torch.Tensor) -> str:
    """Its type and shape, as `float32 12×64`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {'×'.join(map(str, tensor.shape)) or '0-d'}"


def summary(name: str, tensor: torch.Tensor) -> Iterator[Quantity]:
    """Its shape and, over its elements, mean, standard deviation and range."""
    yield Quantity(name, shape(tensor))
    if not tensor.numel() or tensor.is_complex() or tensor.layout != torch.strided:
        return
    values = tensor.detach().to(torch.float32)
    yield Quantity(f"{name} mean", float(values.mean()))
    if tensor.is_floating_point() and tensor.numel() > 1:
        yield Quantity(f"{name} std", float(values.std()))
    yield Quantity(f"{name} min", float(values.min()))
    yield Quantity(f"{name} max", float(values.max()))


def tensors_in(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in arguments and results, however they are packed."""
    for name, thing in named:
        if isinstance(thing, torch.Tensor):
            yield name, thing
        elif isinstance(thing, dict):
            yield from tensors_in((str(key), value) for key, value in thing.items())
        elif isinstance(thing, (list, tuple)):
            yield from tensors_in((f"{name}[{i}]", value) for i, value in enumerate(thing))


def frame_of_the_loop() -> FrameType | None:
    """The innermost call on this thread that is neither ours nor torch's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and _is_ours_or_torch(frame):
        frame = frame.f_back
    return frame


def locals_of_the_loop() -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the variables of the training loop: before `zero_grad` the batch is known
    to nobody else."""
    frame = frame_of_the_loop()
    if frame is None:
        return
    found = 0
    for name, thing in tensors_in(list(frame.f_locals.items())):
        whole = "[" not in name and not name.startswith("_")
        data = not thing.requires_grad and thing.dim() > 0
        if whole and data and not isinstance(thing, torch.nn.Parameter):
            yield name, thing
            found += 1
            if found == MOST_TENSORS:
                return


def _is_ours_or_torch(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == _OWN_PACKAGE or name.startswith((f"{_OWN_PACKAGE}.", "torch.", "contextlib"))
