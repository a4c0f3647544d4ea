"""Batches of images: shuffled, decoded in worker processes, augmented and moved to the device.

The order and the random changes depend on the seed and the position alone, so that a resumed
training sees the same batches, with any number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.tasks.vit.images import Images, SkippedImages, UnreadableImageError


@dataclass(frozen=True)
class EpochPlan:
    """Epochs, batches and updates of a training.

    Only full batches count: each epoch leaves out a remainder of different images.
    """

    images: int
    batch_size: int
    epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigurationError."""
        if self.images < self.batch_size:
            raise ConfigurationError(
                f"{self.images:,} training images do not fill one batch of {self.batch_size:,}",
                f"try --batch-size {max(1, self.images // 2)}",
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.images // self.batch_size

    @property
    def left_out(self) -> int:
        """Images per epoch that do not fill a batch."""
        return self.images % self.batch_size

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole training."""
        return self.steps or (self.epochs or 1) * self.batches_per_epoch


Pick = tuple[int, int]
"""Index of an image, and the key of its random changes."""


@dataclass
class BatchOrder:
    """Yields the picks of each update, from update `start` on; every epoch has a new order."""

    plan: EpochPlan
    seed: int
    start: int = 0

    def __len__(self) -> int:
        return self.plan.updates - self.start

    def __iter__(self) -> Iterator[list[Pick]]:
        shuffled, shuffled_epoch = torch.empty(0), -1
        size = self.plan.batch_size
        for update in range(self.start, self.plan.updates):
            epoch, batch = divmod(update, self.plan.batches_per_epoch)
            if epoch != shuffled_epoch:
                generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
                shuffled = torch.randperm(self.plan.images, generator=generator)
                shuffled_epoch = epoch
            indices = shuffled[batch * size : (batch + 1) * size].tolist()
            key = ((self.seed << 40) + update) * size
            yield [(index, key + position) for position, index in enumerate(indices)]


class LoadedBatch(NamedTuple):
    """An image, or a batch of images, from a worker."""

    pixels: Tensor
    """uint8 of shape (channels, S, S), or (B, channels, S, S)."""
    label: Tensor
    """int64 of shape () or (B,)."""
    skipped: list[tuple[str, str]]
    """(name, reason) of the unreadable images in its place."""


@dataclass
class Decoder(Dataset[LoadedBatch]):
    """Decodes and augments picks.

    An unreadable image is replaced by the next readable one, so that batches stay full and depend
    only on the files and the seed.
    """

    images: Images
    flip: bool = False
    shift: int = 0

    def __getitem__(self, pick: Pick) -> LoadedBatch:
        index, key = pick
        skipped: list[tuple[str, str]] = []
        for offset in range(len(self.images)):
            candidate = (index + offset) % len(self.images)
            try:
                pixels = self.images.load(candidate)
            except UnreadableImageError as error:
                skipped.append((self.images.name_of(candidate), str(error)))
                continue
            return LoadedBatch(self._augment(pixels, key), self.images.labels[candidate], skipped)
        raise ConfigurationError(f"no image of {self.images.name} can be read", "check --data")

    def _augment(self, pixels: Tensor, key: int) -> Tensor:
        """Flip and shift as `key` determines, which is the same in every process."""
        generator = random.Random(key)
        if self.flip and generator.random() < 0.5:
            pixels = pixels.flip(-1)
        if self.shift:
            down, right = (generator.randint(-self.shift, self.shift) for _ in range(2))
            pixels = shifted(pixels, down, right)
        return pixels


def shifted(pixels: Tensor, down: int, right: int) -> Tensor:
    """`pixels` (channels, S, S) shifted, with black pixels at the edges that become free."""
    result = torch.zeros_like(pixels)
    size = pixels.shape[-1]
    to_rows, to_columns = (slice(max(0, by), size + min(0, by)) for by in (down, right))
    from_rows, from_columns = (slice(max(0, -by), size - max(0, by)) for by in (down, right))
    result[:, to_rows, to_columns] = pixels[:, from_rows, from_columns]
    return result


def collate(items: list[LoadedBatch]) -> LoadedBatch:
    """A batch of B images."""
    return LoadedBatch(
        torch.stack([item.pixels for item in items]),  # (B, channels, S, S)
        torch.stack([item.label for item in items]),  # (B,)
        [entry for item in items for entry in item.skipped],
    )


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels as floats from -1 to 1."""
    return pixels.float() / 127.5 - 1.0


class ImageBatches:
    """All batches of a training as (images, labels) on the device.

    Images are normalised floats of shape (B, channels, S, S), labels int64 of shape (B,). Iterating
    continues from `position`.
    """

    def __init__(
        self, decoder: Decoder, plan: EpochPlan, seed: int, device: torch.device, workers: int
    ) -> None:
        self.decoder = decoder
        self.plan = plan
        self.seed = seed
        self.device = device
        self.workers = workers
        self.position = 0
        """Number of batches taken so far."""
        self.skipped = SkippedImages()

    def __len__(self) -> int:
        return self.plan.updates

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def batches_per_epoch(self) -> int:
        return self.plan.batches_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.position < self.plan.updates:
            yield from self._in_order(BatchOrder(self.plan, self.seed, self.position))

    def _in_order(self, order: BatchOrder) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `order`, until batch size or seed is changed."""
        loader = DataLoader(
            self.decoder,
            batch_sampler=order,
            collate_fn=collate,
            # Its own generator: the global one must not depend on when workers are started.
            generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
            **worker_options(self.workers),
        )
        for pixels, labels, skipped in loader:
            for name, reason in skipped:
                self.skipped.add(name, reason)
            self.position += 1
            yield (
                normalise(pixels.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
            )
            if (order.plan, order.seed) != (self.plan, self.seed):
                return

    def change(self, batch_size: int, seed: int) -> None:
        """Change batch size and seed from the next batch on, as if all earlier batches had had
        them. The number of batches of the training stays the same."""
        self.plan = replace(self.plan, batch_size=batch_size, steps=self.plan.updates)
        self.seed = seed

    def check(self, batch_size: int) -> None:
        """Raises ConfigurationError for a batch that is larger than the set of images."""
        if not 1 <= batch_size <= self.plan.images:
            raise ConfigurationError(
                f"batch_size cannot be {batch_size:,}",
                f"there are {self.plan.images:,} training images: give a number from 1 to that",
            )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])


# ---------------------------------------------------------------- workers


def worker_options(workers: int) -> dict[str, Any]:
    """DataLoader's arguments for a number of worker processes.

    A fork server starts the workers: a fork of the training process would copy the locks of its
    threads and its sockets.
    """
    if not workers:
        return {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        "prefetch_factor": 4,
        "worker_init_fn": _start_worker,
    }


def _start_worker(_: int) -> None:
    """Ignore Ctrl-C, which the training process handles, and end if that process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_training, daemon=True).start()


def _exit_with_training() -> None:
    training = multiprocessing.parent_process()  # not the fork server, which stays alive for us
    if training is not None:
        training.join()
        os._exit(1)
