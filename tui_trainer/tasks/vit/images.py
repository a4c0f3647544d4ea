"""Where images come from: the bundled digits, or a folder with one sub-folder per class."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tui_trainer.tasks.vit.digits import read_digits

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
