"""Batches of images: which ones when, decoded in worker processes, on the device and normalised."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.tasks.vit.config import EpochPlan, VitConfig

# ---- digits
# The bundled digits: scikit-learn's copy of the UCI set.


FILE = Path("datasets", "data", "digits.csv.gz")


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scans of shape (1797, 8, 8), greys from 0 to 16, and labels of shape (1797,).

    Read from the file that scikit-learn installs: importing scikit-learn for it takes half a
    second, a third of a run's start.
    """
    found = find_spec("sklearn")
    path = Path(found.origin).parent / FILE if found is not None and found.origin else None
    if path is None or not path.is_file():
        return _by_scikit_learn()
    rows = np.loadtxt(path, delimiter=",", dtype=np.float64)
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


def _by_scikit_learn() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images, found.target.astype(np.int64)


# ---- images
# Where images come from: the bundled digits, or a folder with one sub-folder per class.


EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)


class UnreadableImageError(Exception):
    """An image that cannot be decoded, and why."""


class Images(Protocol):
    """Labelled images, decoded one at a time. Travels to worker processes by pickle."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    """Class numbers, int64 of shape (images,)."""

    def __len__(self) -> int:
        """How many."""

    def name_of(self, index: int) -> str:
        """What to call an image in the log."""

    def load(self, index: int) -> Tensor:
        """Pixels, uint8 of shape (channels, S, S). Raises UnreadableImageError."""

    def subset(self, indices: Tensor) -> Images:
        """Those images alone, in that order."""


@dataclass
class DigitImages:
    """scikit-learn's copy of the UCI digits: 1,797 handwritten digits of 8×8 pixels, 16 greys."""

    pixels: Tensor
    """uint8 of shape (images, 1, S, S)."""
    labels: Tensor
    name: str = "handwritten digits"
    classes: tuple[str, ...] = tuple("0123456789")

    @classmethod
    def bundled(cls, image_size: int, channels: int) -> DigitImages:
        """All of them, brought to the given size."""
        found, labels = read_digits()
        scans = torch.from_numpy(found).float()[:, None] * (255 / 16)  # (images, 1, 8, 8)
        if image_size != 8:
            scans = torch.nn.functional.interpolate(
                scans, size=(image_size, image_size), mode="bilinear", antialias=True
            )
        pixels = scans.round().to(torch.uint8).expand(-1, channels, -1, -1).contiguous()
        return cls(pixels, torch.from_numpy(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """What to call an image in the log."""
        return f"digit {index}"

    def load(self, index: int) -> Tensor:
        """Pixels, uint8 of shape (channels, S, S)."""
        return self.pixels[index]

    def subset(self, indices: Tensor) -> DigitImages:
        """Those images alone, in that order."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


@dataclass
class FolderImages:
    """Image files, decoded with Pillow when they are asked for."""

    root: Path
    files: tuple[str, ...]
    """Paths below `root`."""
    labels: Tensor
    classes: tuple[str, ...]
    image_size: int
    channels: int
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = str(self.root)

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, index: int) -> str:
        """What to call an image in the log."""
        return self.files[index]

    def load(self, index: int) -> Tensor:
        """Pixels, uint8 of shape (channels, S, S): the middle square of the image, resized."""
        return decode(self.root / self.files[index], self.image_size, self.channels)

    def subset(self, indices: Tensor) -> FolderImages:
        """Those images alone, in that order."""
        files = tuple(self.files[index] for index in indices.tolist())
        return replace(self, files=files, labels=self.labels[indices])


def decode(path: Path | str, size: int, channels: int) -> Tensor:
    """An image file as uint8 of shape (channels, size, size). Raises UnreadableImageError."""
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(os.fspath(path)) as opened:
            opened.draft(mode, (size, size))  # lets JPEG decode at a smaller scale, much faster
            upright = ImageOps.exif_transpose(opened).convert(mode)
            square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    except Exception as fault:  # a damaged file makes Pillow's decoders raise nearly anything
        raise UnreadableImageError(_reason(fault, path)) from None
    array = np.array(square, dtype=np.uint8).reshape(size, size, channels)  # (S, S, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()  # -> (channels, S, S)


def _reason(fault: Exception, path: Path | str) -> str:
    """In words that stand after the file's name."""
    if isinstance(fault, UnidentifiedImageError):
        return "it is no image" if os.path.getsize(path) else "it is empty"
    return (str(fault) or type(fault).__name__).replace(os.fspath(path), "it")


# ---- folder
# Finding the images and classes of a folder, and what to train on and what to validate on.


logger = logging.getLogger(__name__)

VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
_LAYOUT = "a folder with one sub-folder per class, each with images of that class"


def load_images(config: VitConfig) -> tuple[Images, Images]:
    """Training and validation images, the latter perhaps none. Raises ConfigurationError."""
    if config.data is None:
        everything: Images = DigitImages.bundled(config.image_size, int(config.channels))
        return split(everything, config.validation_share)
    root = Path(config.data).expanduser()
    _require_folder(root)
    held_out = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and held_out is not None:  # ImageNet's layout
        training = find_images(root / "train", config)
        validation = find_images(held_out, config, classes=training.classes)
        _require_readable(training)
        return training, validation
    found = find_images(root, config)
    _require_readable(found)
    return split(found, config.validation_share)


def split(images: Images, validation_share: float) -> tuple[Images, Images]:
    """Held out at random, but the same for every run, whatever its seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    count = round(len(images) * validation_share)
    training = images.subset(order[count:].sort().values)
    return training, images.subset(order[:count])


def find_images(
    root: Path, config: VitConfig, classes: tuple[str, ...] | None = None
) -> FolderImages:
    """The images below `root`; with `classes`, only of those. Raises ConfigurationError."""
    folders = sorted(entry.name for entry in os.scandir(root) if _is_class(entry))
    if classes is not None:
        folders = [name for name in folders if name in classes]
    if not folders:
        loose = any(_is_image(entry.name) for entry in os.scandir(root))
        what = "images but no sub-folders" if loose else "no sub-folders of images"
        raise ConfigurationError(f"{root} has {what}: there are no classes", f"--data is {_LAYOUT}")
    by_class = {name: list(_files_below(root / name, name)) for name in folders}
    empty = [name for name, files in by_class.items() if not files]
    if len(empty) == len(by_class):
        raise ConfigurationError(
            f"no sub-folder of {root} has an image in it", f"--data is {_LAYOUT}"
        )
    if empty:
        logger.warning("%d sub-folders without images, such as %s", len(empty), empty[0])
    names = classes or tuple(name for name in folders if by_class[name])
    if len(names) < 2:
        raise ConfigurationError(
            f"{root} has only one class, {names[0]}: there is nothing to tell apart",
            f"--data is {_LAYOUT}, two classes or more",
        )
    number = {name: index for index, name in enumerate(names)}
    files = [(file, number[name]) for name in folders for file in by_class[name]]
    return FolderImages(
        root=root,
        files=tuple(file for file, _ in files),
        labels=torch.tensor([label for _, label in files]),
        classes=names,
        image_size=config.image_size,
        channels=int(config.channels),
    )


def _require_folder(root: Path) -> None:
    if not root.exists():
        raise ConfigurationError(f"there is no folder {root}", f"--data takes {_LAYOUT}")
    if not root.is_dir():
        raise ConfigurationError(f"{root} is a file", f"--data is {_LAYOUT}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ConfigurationError(
            f"{root} cannot be read: permission denied", "--data takes a folder that you may read"
        )


def _require_readable(images: FolderImages) -> None:
    """At least one image can be decoded. Looks no further than the first such one."""
    reason = ""
    for index in range(len(images)):
        try:
            images.load(index)
            return
        except UnreadableImageError as fault:
            reason = reason or f"{images.name_of(index)}: {fault}"
    raise ConfigurationError(
        f"none of the {len(images):,} images in {images.root} can be read ({reason})",
        "check that they are whole image files",
    )


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _files_below(folder: Path, prefix: str) -> Iterator[str]:
    """Image files at any depth, as paths that start with `prefix`, sorted."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _files_below(folder / entry.name, path)
        elif _is_image(entry.name):
            yield path


# ---- skipped
# Images that cannot be decoded.


logger = logging.getLogger(__name__)


class SkippedImages:
    """Those met so far: each is counted, and named in the log, once."""

    def __init__(self, kind: str = "image") -> None:
        """`kind`: what the log calls one of them."""
        self.reasons: dict[str, str] = {}
        """Name to why it cannot be decoded."""
        self._kind = kind

    def __len__(self) -> int:
        return len(self.reasons)

    def note(self, name: str, reason: str) -> None:
        """One was met, perhaps not for the first time."""
        if name not in self.reasons:
            self.reasons[name] = reason
            logger.warning(
                "skipped unreadable %s %s: %s (%d so far)", self._kind, name, reason, len(self)
            )


Pick = tuple[int, int]
"""(index of the image, key of its random changes)."""


class LoadedBatch(NamedTuple):
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
class Decoder(Dataset[LoadedBatch]):
    """Decodes picks. In place of an unreadable image comes the next readable one, so that batches
    stay full and what is in them depends on the files and the seed alone."""

    images: Images
    flip: bool = False
    shift: int = 0

    def __getitem__(self, pick: Pick) -> LoadedBatch:
        index, key = pick
        skipped: list[tuple[str, str]] = []
        for step in range(len(self.images)):
            place = (index + step) % len(self.images)
            try:
                pixels = self.images.load(place)
            except UnreadableImageError as fault:
                skipped.append((self.images.name_of(place), str(fault)))
                continue
            return LoadedBatch(self._change(pixels, key), self.images.labels[place], skipped)
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


def collate(items: list[LoadedBatch]) -> LoadedBatch:
    """A batch of B images."""
    return LoadedBatch(
        torch.stack([item.pixels for item in items]),  # (B, channels, S, S)
        torch.stack([item.label for item in items]),  # (B,)
        [entry for item in items for entry in item.skipped],
    )


@dataclass
class BatchOrder:
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
        self.skipped = SkippedImages()

    def __len__(self) -> int:
        return self.plan.updates

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.decoder,
            batch_sampler=BatchOrder(self.plan, self.seed, self.position),
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
