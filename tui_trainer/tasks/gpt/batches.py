"""Pieces of a text, in random order."""

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
    """`total` batches of pieces of a text, the same ones for the same seed.

    An epoch takes every piece once, in a new order, cut from a new offset: at as many steps a
    model has seen more of the text than with pieces drawn from anywhere. Iterating goes on from
    `position`, and what comes is a function of the seed and the position alone.
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
        self.seed = seed
        self.device = device
        self.position = 0
        """Batches handed out so far."""

    def __len__(self) -> int:
        return self.total

    @property
    def pieces(self) -> int:
        """Pieces per epoch, wherever the first one begins."""
        return (len(self.tokens) - self.block_size) // self.block_size

    @property
    def per_epoch(self) -> int:
        """Batches per epoch."""
        return max(1, self.pieces // self.batch_size)

    def __iter__(self) -> Iterator[Pair]:
        order, order_epoch = torch.empty(0), -1
        while self.position < self.total:
            epoch, place = divmod(self.position, self.per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            starts = order[place * self.batch_size : (place + 1) * self.batch_size]
            inputs, targets = cut(self.tokens, starts, self.block_size)
            self.position += 1
            yield self._move(inputs), self._move(targets)

    def _order(self, epoch: int) -> Tensor:
        """Where the pieces of an epoch start, int64 of shape (at least B,)."""
        generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
        if self.pieces < self.batch_size:  # a text too short for one batch of different pieces
            places = len(self.tokens) - self.block_size
            return torch.randint(places, (self.batch_size,), generator=generator)
        offset = torch.randint(self.block_size, (), generator=generator)
        return offset + self.block_size * torch.randperm(self.pieces, generator=generator)

    def _move(self, batch: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned memory lets the copy overlap with the last step
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.position = int(state["position"])
