"""How much memory a copy takes on each device, and how much is free there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import psutil
import torch

HOST = torch.device("cpu")
Bytes = dict[torch.device, int]


def bytes_by_device(tensors: Iterable[torch.Tensor]) -> Bytes:
    """The size of tensors, each counted once."""
    found: Bytes = defaultdict(int)
    for tensor in {id(each): each for each in tensors}.values():
        found[tensor.device] += tensor.numel() * tensor.element_size()
    return found


def free_bytes(device: torch.device) -> int | None:
    """What a process can still allocate there; None where that is not known."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Torch keeps what was freed, and allocates from it.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None
