"""Estimates the memory that experiments and time travel need, and reads how much is free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import psutil
import torch

from tui_trainer.protocol.formatting import bytes_, cost_text
from tui_trainer.protocol.travel import (
    Experiment,
    ExperimentCost,
    FindLearningRate,
    MeasureLandscape,
    WhatIf,
)
from tui_trainer.trace.gate import Refusal
from tui_trainer.travel.snapshots import TrainingParts

HOST = torch.device("cpu")
FORWARD_SHARE = 0.5
"""Share of a step that a forward pass takes, at most."""
Bytes = dict[torch.device, int]


def estimate_cost(
    experiment: Experiment, parts: TrainingParts, steps_left: int | None, step_s: float | None
) -> ExperimentCost:
    """The cost of an experiment, in addition to the memory that a step needs.

    `steps_left`: steps up to the end of a task; None for a script, in which only `MeasureLandscape`
    is possible. `step_s`: seconds per step, if known.
    """
    script, left = steps_left is None, steps_left or 0
    unit: Literal["step", "evaluation"] = "step"
    share, copies = 1.0, 0
    match experiment:
        case WhatIf(steps=steps):
            made = 2 * min(steps, left)
        case FindLearningRate(steps=steps):
            made = min(steps, left)
        case MeasureLandscape(points=made):
            # A copy for the direction; in a script another one to be moved in place of the weights.
            unit, share, copies = "evaluation", FORWARD_SHARE, 2 if script else 1
    trained = [p for model in parts.models for p in model.parameters() if p.requires_grad]
    needed = {device: copies * size for device, size in bytes_by_device(trained).items()}
    host = needed.pop(HOST, 0) + (0 if script else parts.nbytes())
    if copies:  # the direction of one parameter at a time is drawn, or subtracted, on the host
        host += max((each.nbytes for each in trained), default=0)
    seconds = made * step_s * share if step_s is not None else None
    free = free_bytes(HOST) or 0
    return ExperimentCost(made, seconds, host, free, *_fullest(needed), unit)


def require_memory(cost: ExperimentCost) -> None:
    """Raises Refusal where there is too little memory for an experiment."""
    if not cost.possible:
        free = bytes_(cost.free, 0)
        if cost.device_free is not None:
            free += f", and {bytes_(cost.device_free, 0)} on {cost.device}"
        raise Refusal(f"too little memory: {cost_text(cost)}, of which {free} are free")


def require_room(parts: TrainingParts) -> None:
    """Raises Refusal where the host has too little memory for a copy of the present state."""
    needed, free = parts.nbytes(), free_bytes(HOST) or 0
    if needed > free:
        text = f"a copy of the present state takes {bytes_(needed, 0)}, and {bytes_(free, 0)}"
        raise Refusal(f"{text} are free")


def bytes_by_device(tensors: Iterable[torch.Tensor]) -> Bytes:
    """The bytes of `tensors` on each device; every tensor counts once."""
    found: Bytes = defaultdict(int)
    for tensor in {id(each): each for each in tensors}.values():
        found[tensor.device] += tensor.numel() * tensor.element_size()
    return found


def free_bytes(device: torch.device) -> int | None:
    """The bytes that this process can still allocate on a device; None where this is unknown."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # PyTorch's allocator reserves freed memory and allocates from it.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def _fullest(needed: Bytes) -> tuple[str, int, int | None]:
    """(name, needed bytes, free bytes) of the device with the least room for the copies."""
    found = [(str(device), size, free_bytes(device)) for device, size in needed.items() if size]
    return max(found, key=lambda each: each[1] / max(1, each[2] or each[1]), default=("", 0, None))
