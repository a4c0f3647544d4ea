"""Random pieces of a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def cut(tokens: Tensor, starts: Tensor, block_size: int) -> Pair:
    """Inputs and targets, int64 of shape (B, T): the target of each character is the next one."""
    offsets = torch.arange(block_size + 1)  # (T + 1,)
    pieces = tokens[starts[:, None] + offsets].long()  # (B, 1) + (T + 1,) -> (B, T + 1)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


class TextBatches:
    """`total` batches of pieces from random places, the same ones for the same seed.

    Iterating goes on from `position`, so a loaded state continues the very sequence.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        batch_size: int,
        block_size: int,
        total: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.tokens = tokens
        self.batch_size = batch_size
        self.block_size = block_size
        self.total = total
        self.device = device
        self.position = 0
        """Batches handed out so far."""
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Pair]:
        while self.position < self.total:
            places = len(self.tokens) - self.block_size
            starts = torch.randint(places, (self.batch_size,), generator=self._generator)
            inputs, targets = cut(self.tokens, starts, self.block_size)
            self.position += 1
            yield self._move(inputs), self._move(targets)

    def _move(self, batch: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned memory lets the copy overlap with the last step
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"position": self.position, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.position = int(state["position"])
        self._generator.set_state(state["generator"].cpu())
