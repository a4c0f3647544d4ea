"""Batches of images: which ones when, decoded in worker processes, on the device and normalised."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.tasks.vit.arithmetic import EpochPlan
from tui_trainer.tasks.vit.images import Images, UnreadableImageError
from tui_trainer.tasks.vit.skipped import Skipped

Pick = tuple[int, int]
"""(index of the image, key of its random changes)."""


class Loaded(NamedTuple):
    """One image, or a batch of them, as they come from a worker."""

    pixels: Tensor
    """uint8 of shape (channels, S, S), or (B, channels, S, S)."""
    label: Tensor
    """int64 of shape () or (B,)."""
    skipped: list[tuple[str, str]]
    """(name, reason) of unreadable images that were met on the way."""


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels to floats from -1 to 1."""
    return pixels.float() / 127.5 - 1.0


@dataclass
class Decoder(Dataset[Loaded]):
    """Decodes picks. In place of an unreadable image comes the next readable one, so that batches
    stay full and what is in them depends on the files and the seed alone."""

    images: Images
    flip: bool = False
    shift: int = 0

    def __getitem__(self, pick: Pick) -> Loaded:
        index, key = pick
        skipped: list[tuple[str, str]] = []
        for step in range(len(self.images)):
            place = (index + step) % len(self.images)
            try:
                pixels = self.images.load(place)
            except UnreadableImageError as fault:
                skipped.append((self.images.name_of(place), str(fault)))
                continue
            return Loaded(self._change(pixels, key), self.images.labels[place], skipped)
        raise ConfigurationError(f"no image of {self.images.name} can be read", "check --data")

    def _change(self, pixels: Tensor, key: int) -> Tensor:
        """Mirror and move, by the key alone: the same in whichever process it happens."""
        chance = random.Random(key)
        if self.flip and chance.random() < 0.5:
            pixels = pixels.flip(-1)
        if self.shift:
            down, right = (chance.randint(-self.shift, self.shift) for _ in range(2))
            pixels = _moved(pixels, down, right)
        return pixels


def _moved(pixels: Tensor, down: int, right: int) -> Tensor:
    """(channels, S, S) moved, black where nothing came from."""
    moved = torch.zeros_like(pixels)
    size = pixels.shape[-1]
    to_rows, to_columns = (slice(max(0, by), size + min(0, by)) for by in (down, right))
    of_rows, of_columns = (slice(max(0, -by), size - max(0, by)) for by in (down, right))
    moved[:, to_rows, to_columns] = pixels[:, of_rows, of_columns]
    return moved


def collate(items: list[Loaded]) -> Loaded:
    """A batch of B images."""
    return Loaded(
        torch.stack([item.pixels for item in items]),  # (B, channels, S, S)
        torch.stack([item.label for item in items]),  # (B,)
        [entry for item in items for entry in item.skipped],
    )


@dataclass
class Order:
    """The picks of each update, from update `start` on: a new order for each epoch."""

    plan: EpochPlan
    seed: int
    start: int = 0

    def __len__(self) -> int:
        return self.plan.updates - self.start

    def __iter__(self) -> Iterator[list[Pick]]:
        shuffled, shuffled_epoch = torch.empty(0), -1
        size = self.plan.batch_size
        for update in range(self.start, self.plan.updates):
            epoch, place = divmod(update, self.plan.batches_per_epoch)
            if epoch != shuffled_epoch:
                generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
                shuffled = torch.randperm(self.plan.images, generator=generator)
                shuffled_epoch = epoch
            indices = shuffled[place * size : (place + 1) * size].tolist()
            key = ((self.seed << 40) + update) * size
            yield [(index, key + slot) for slot, index in enumerate(indices)]


class ImageBatches:
    """All batches of a training, as (images, labels) on the device; images are normalised floats of
    shape (B, channels, S, S), labels int64 of shape (B,).

    Iterating goes on from `position`: the order is a function of the seed and the position alone.
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
        """Batches handed out so far."""
        self.skipped = Skipped()

    def __len__(self) -> int:
        return self.plan.updates

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.decoder,
            batch_sampler=Order(self.plan, self.seed, self.position),
            collate_fn=collate,
            generator=torch.Generator(),  # its own: PyTorch's must not depend on who loads when
            pin_memory=self.device.type == "cuda",
            **worker_options(self.workers),
        )
        for pixels, labels, skipped in loader:
            for name, reason in skipped:
                self.skipped.note(name, reason)
            self.position += 1
            yield (
                normalise(pixels.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
            )

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.position = int(state["position"])


def worker_options(workers: int) -> dict[str, Any]:
    """DataLoader's arguments for so many worker processes.

    They come from a fork server: a fork of the training process itself would copy its threads'
    locks and its sockets.
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
    """Ctrl-C is for the training process, which ends its workers; if it is killed, they end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_training, daemon=True).start()


def _end_with_training() -> None:
    training = multiprocessing.parent_process()  # not the fork server, which outlives it for us
    if training is not None:
        training.join()
        os._exit(1)
