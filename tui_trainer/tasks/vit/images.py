"""Loads the images that a ViT trains on: the bundled digits, or a folder with one sub-folder per
class."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.tasks.vit.config import VitConfig

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
LAYOUT = "a folder with one sub-folder per class, each with images of that class"


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message says why."""


class Images(Protocol):
    """Labelled images that are decoded one at a time; pickled for worker processes."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    """Class numbers, int64 of shape (images,)."""

    def __len__(self) -> int: ...

    def name_of(self, index: int) -> str:
        """The name of an image, for the log."""

    def load(self, index: int) -> Tensor:
        """Pixels, uint8 of shape (channels, S, S). Raises UnreadableImageError."""

    def subset(self, indices: Tensor) -> Images:
        """The images at `indices`, in that order."""


def load_images(config: VitConfig) -> tuple[Images, Images]:
    """Training and validation images; the latter may be empty.

    Raises ConfigurationError.
    """
    if config.data is None:
        digits = DigitImages.bundled(config.image_size, int(config.channels))
        return split(digits, config.validation_share)
    root = Path(config.data).expanduser()
    _require_folder(root)
    held_out = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and held_out is not None:  # the layout of ImageNet
        training = find_images(root / "train", config)
        validation = find_images(held_out, config, classes=training.classes)
        _require_readable(training)
        return training, validation
    images = find_images(root, config)
    _require_readable(images)
    return split(images, config.validation_share)


def split(images: Images, validation_share: float) -> tuple[Images, Images]:
    """Training and validation images, chosen at random but the same for every run and seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    count = round(len(images) * validation_share)
    training = images.subset(order[count:].sort().values)
    return training, images.subset(order[:count])


# ---------------------------------------------------------------- digits


@dataclass
class DigitImages:
    """scikit-learn's copy of the UCI digits: 1,797 handwritten digits of 8×8 pixels, 16 greys."""

    pixels: Tensor
    """uint8 of shape (images, channels, S, S)."""
    labels: Tensor
    name: str = "handwritten digits"
    classes: tuple[str, ...] = tuple("0123456789")

    @classmethod
    def bundled(cls, image_size: int, channels: int) -> DigitImages:
        """All digits, resized."""
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
        return f"digit {index}"

    def load(self, index: int) -> Tensor:
        return self.pixels[index]

    def subset(self, indices: Tensor) -> DigitImages:
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


DIGITS_FILE = Path("datasets", "data", "digits.csv.gz")
"""Path in the installed package of scikit-learn."""


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scans of shape (1797, 8, 8), greys from 0 to 16, and labels of shape (1797,).

    Read from the file that scikit-learn installs, since importing it takes half a second, a third
    of the start of a run.
    """
    spec = find_spec("sklearn")
    path = Path(spec.origin).parent / DIGITS_FILE if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        return _load_with_sklearn()
    rows = np.loadtxt(path, delimiter=",", dtype=np.float64)
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


def _load_with_sklearn() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


# ---------------------------------------------------------------- folders


@dataclass
class FolderImages:
    """Image files, decoded with Pillow."""

    root: Path
    files: tuple[str, ...]
    """Paths relative to `root`."""
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
        return self.files[index]

    def load(self, index: int) -> Tensor:
        return decode(self.root / self.files[index], self.image_size, self.channels)

    def subset(self, indices: Tensor) -> FolderImages:
        files = tuple(self.files[index] for index in indices.tolist())
        return replace(self, files=files, labels=self.labels[indices])


def decode(path: Path | str, size: int, channels: int) -> Tensor:
    """The middle square of an image file, resized: uint8 of shape (channels, size, size).

    Raises UnreadableImageError.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(os.fspath(path)) as opened:
            opened.draft(mode, (size, size))  # lets JPEG decode at a smaller scale, much faster
            upright = ImageOps.exif_transpose(opened).convert(mode)
            square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise UnreadableImageError(_reason(error, path)) from None
    array = np.array(square, dtype=np.uint8).reshape(size, size, channels)  # (S, S, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()  # -> (channels, S, S)


def _reason(error: Exception, path: Path | str) -> str:
    """Why a file cannot be decoded, as a text that follows its name."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image" if os.path.getsize(path) else "it is empty"
    return (str(error) or type(error).__name__).replace(os.fspath(path), "it")


def find_images(
    root: Path, config: VitConfig, classes: tuple[str, ...] | None = None
) -> FolderImages:
    """The images below `root`, of the given `classes` only. Raises ConfigurationError."""
    folders = sorted(entry.name for entry in os.scandir(root) if _is_class_folder(entry))
    if classes is not None:
        folders = [name for name in folders if name in classes]
    if not folders:
        loose = any(_is_image(entry.name) for entry in os.scandir(root))
        what = "images but no sub-folders" if loose else "no sub-folders of images"
        raise ConfigurationError(f"{root} has {what}: there are no classes", f"--data is {LAYOUT}")
    by_class = {name: list(_files_below(root / name, name)) for name in folders}
    empty = [name for name, files in by_class.items() if not files]
    if len(empty) == len(by_class):
        raise ConfigurationError(
            f"no sub-folder of {root} has an image in it", f"--data is {LAYOUT}"
        )
    if empty:
        logger.warning("%d sub-folders without images, such as %s", len(empty), empty[0])
    names = classes or tuple(name for name in folders if by_class[name])
    if len(names) < 2:
        raise ConfigurationError(
            f"{root} has only one class, {names[0]}: a classifier needs two",
            f"--data is {LAYOUT}, with at least two classes",
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
        raise ConfigurationError(f"there is no folder {root}", f"--data takes {LAYOUT}")
    if not root.is_dir():
        raise ConfigurationError(f"{root} is a file", f"--data takes {LAYOUT}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ConfigurationError(
            f"{root} cannot be read: permission denied", "--data takes a folder that you may read"
        )


def _require_readable(images: FolderImages) -> None:
    """Raises ConfigurationError if no image can be decoded; stops at the first that can."""
    reason = ""
    for index in range(len(images)):
        try:
            images.load(index)
            return
        except UnreadableImageError as error:
            reason = reason or f"{images.name_of(index)}: {error}"
    raise ConfigurationError(
        f"none of the {len(images):,} images in {images.root} can be read ({reason})",
        "check that they are complete image files",
    )


def _is_class_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _files_below(folder: Path, prefix: str) -> Iterator[str]:
    """Sorted paths of the image files at any depth, each beginning with `prefix`."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _files_below(folder / entry.name, path)
        elif _is_image(entry.name):
            yield path


class SkippedImages:
    """Counts the images that could not be decoded, and logs each of them once."""

    def __init__(self, kind: str = "image") -> None:
        """`kind`: the word for an image in the log."""
        self.reasons: dict[str, str] = {}
        """Why each image could not be decoded, by name."""
        self._kind = kind

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        if name not in self.reasons:
            self.reasons[name] = reason
            logger.warning(
                "skipped unreadable %s %s: %s (%d so far)", self._kind, name, reason, len(self)
            )
