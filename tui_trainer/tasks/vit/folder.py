"""Finding the images and classes of a folder, and what to train on and what to validate on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.tasks.vit.config import VitConfig
from tui_trainer.tasks.vit.images import (
    EXTENSIONS,
    DigitImages,
    FolderImages,
    Images,
    UnreadableImageError,
)

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
