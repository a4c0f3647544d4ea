"""A checksum of the weights, by which the replicas of a data-parallel training are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Options, Probe, Readings, StepFacts, TableSpec, Values

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HALF = 24
"""Bits that float32 holds exactly."""


class ReplicaChecksum(Probe):
    """Table `replica`: a sum over the bits of all weights, equal where they are."""

    name = schema.REPLICA
    every = 50
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        super().__init__(tracked, options)
        if tracked.key:
            self.unseen = "measured with the first optimizer"
        elif tracked.sharded:
            self.unseen = "the weights are sharded: no process has a replica"
        else:
            self.tables = (TableSpec(schema.REPLICA, schema.REPLICA_COLUMNS),)

    def after_update(self) -> Readings:
        total = checksum(self.tracked.parameters)
        return [total >> HALF, total & ((1 << HALF) - 1)]

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        return (np.array(values, dtype=np.float32),)


def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """An int64 of 48 bits. Elements of each tensor are added up as integers, in any order."""
    device = tensors[0].device
    sums = [
        tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64).to(device)
        for tensor in tensors
        if tensor.element_size() in BITS and tensor.layout == torch.strided
    ]
    factors = torch.arange(1, 2 * len(sums) + 1, 2, device=device)
    total: torch.Tensor = (torch.stack(sums) * factors).sum() & ((1 << 2 * HALF) - 1)
    return total
