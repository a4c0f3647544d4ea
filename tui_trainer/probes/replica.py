"""Computes checksums of the weights, by which the replicas of a data-parallel run are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, TableSpec, Values

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HALF = 24
"""Bits that float32 holds exactly."""
SAMPLED = 512
"""Number of elements of a parameter in the sample of every step."""


class ReplicaChecksum(Probe):
    """Table `replica`: a sum over the bits of all weights, which equal weights have in common."""

    name = schema.REPLICA
    every = 50
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        if tracked.key:
            self.unseen = "measured with the first optimizer"
        elif tracked.sharded:
            self.unseen = "the weights are sharded: no process has a replica"
        else:
            self.tables = (TableSpec(schema.REPLICA, schema.REPLICA_COLUMNS),)

    def after_update(self) -> Readings:
        return _halves(checksum(self.tracked.parameters))

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        return (np.array(values, dtype=np.float32),)


class ReplicaSample(Probe):
    """Table `replica_sample`: a checksum of a few elements of the first, the middle and the last
    parameter, before each update. That of the first step shows whether ranks start equal."""

    name = schema.REPLICA_SAMPLE
    importance = 60

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        if tracked.key or tracked.sharded:
            self.unseen = "as for the checksum of all weights"
            return
        own = range(tracked.own)
        self._positions = sorted({own[0], own[len(own) // 2], own[-1]}) if own else []
        self._readings: Readings = ()
        self.tables = (TableSpec(schema.REPLICA_SAMPLE, schema.REPLICA_SAMPLE_COLUMNS),)

    def before_update(self) -> None:
        sampled = [
            part
            for at in self._positions
            if (part := sample(self.tracked.parameters[at])) is not None
        ]
        self._readings = _halves(checksum(sampled)) if sampled else ()

    def after_update(self) -> Readings:
        readings, self._readings = self._readings, ()
        return readings

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        return (np.array(values, dtype=np.float32) if len(values) else None,)


def sample(parameter: torch.Tensor) -> torch.Tensor | None:
    """A view of SAMPLED elements at equal distances; None where the layout does not allow it."""
    count = parameter.numel()
    if parameter.layout != torch.strided or not count or not _is_dense(parameter):
        return None
    taken = min(SAMPLED, count)
    return parameter.detach().as_strided((taken,), (count // taken,))


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _halves(total: torch.Tensor) -> Readings:
    return [total >> HALF, total & ((1 << HALF) - 1)]


def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A checksum (0-d int64, 48 bits). The bits of each tensor's elements are added as integers, in
    any order."""
    device = tensors[0].device
    sums = [
        tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64).to(device)
        for tensor in tensors
        if tensor.element_size() in BITS and tensor.layout == torch.strided
    ]
    factors = torch.arange(1, 2 * len(sums) + 1, 2, device=device)
    total: torch.Tensor = (torch.stack(sums) * factors).sum() & ((1 << 2 * HALF) - 1)
    return total
