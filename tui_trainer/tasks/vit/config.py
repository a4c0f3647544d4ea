"""Options of the vision transformer task, and its presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import option
from tui_trainer.config.training import DATA, MODEL, TrainingConfig, check_heads
from tui_trainer.protocol.schema import Scalar


@dataclass(frozen=True, kw_only=True)
class VitConfig(TrainingConfig):
    """Options of a vision transformer that classifies images, and of its training."""

    data: str | None = option(
        None, "a folder with one sub-folder of images per class; default: handwritten digits",
        group=DATA,
    )  # fmt: skip
    workers: int | None = option(
        None, "processes that decode images; default: depends on the number of cores", group=DATA,
        minimum=0, maximum=256,
    )  # fmt: skip
    flip: bool = option(False, "flip training images horizontally at random", group=DATA)
    shift: int = option(
        0, "shift training images at random by up to this", group=DATA, unit="pixels", minimum=0
    )
    image_size: int = option(
        224, "side of the square that images are resized to", group=MODEL, unit="pixels",
        minimum=1, maximum=8192,
    )  # fmt: skip
    channels: Literal["1", "3"] = option("3", "1: grey, 3: colour", group=MODEL)
    patch_size: int = option(14, "side of a patch", group=MODEL, unit="pixels", minimum=1)
    layers: int = option(12, "transformer blocks", group=MODEL, minimum=1, maximum=1000)
    heads: int = option(6, "attention heads per block", group=MODEL, minimum=1)
    width: int = option(384, "size of a patch's embedding", group=MODEL, minimum=1, maximum=1 << 17)
    pooling: Literal["class", "mean"] = option(
        "class", "what represents the image: a class token or the mean of its patches", group=MODEL
    )
    embedding: int = option(
        0, "dimensions of the image embedding before the head; 0: none", group=MODEL, minimum=0
    )
    dropout: float = option(0.0, "dropout probability", group=MODEL, minimum=0, below=1)

    @property
    def patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    def check(self) -> None:
        """Check combinations of fields. Raises ConfigurationError."""
        super().check()
        check_heads(self.width, self.heads)
        if self.data is None and self.channels == "3":
            what = f"preset {self.preset}" if self.preset else "a ViT on colour images"
            raise ConfigurationError(
                f"{what} trains on your own images",
                "give their path: --data FOLDER, with one sub-folder per class",
            )
        rest = self.image_size % self.patch_size
        if rest:
            divisors = [n for n in range(1, self.image_size + 1) if self.image_size % n == 0]
            near = min(divisors, key=lambda size: abs(size - self.patch_size))
            raise ConfigurationError(
                f"patches of {self.patch_size} pixels do not tile an image of {self.image_size}",
                f"try --patch-size {near}, or --image-size "
                f"{self.image_size - rest or self.patch_size}",
            )
        if self.shift >= self.image_size:
            raise ConfigurationError(
                f"--shift {self.shift} moves the whole image of {self.image_size} pixels out",
                f"try --shift {max(1, self.image_size // 8)}",
            )


PRESETS: Mapping[str, Mapping[str, Scalar]] = {
    "digits": {
        "epochs": 80,
        "batch_size": 64,
        "image_size": 8,
        "channels": "1",
        "patch_size": 2,
        "layers": 4,
        "heads": 4,
        "width": 64,
        "pooling": "mean",
        "validation_share": 0.2,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-5,
        "warmup_steps": 50,
        "weight_decay": 0.1,
        "dropout": 0.1,
        "eval_every": 100,
    },
    "images": {
        # the default for a folder of images: small enough for a machine without a GPU
        "epochs": 30,
        "batch_size": 64,
        "image_size": 64,
        "channels": "3",
        "patch_size": 8,
        "layers": 6,
        "heads": 6,
        "width": 192,
        "pooling": "mean",
        "validation_share": 0.1,
        "learning_rate": 5e-4,
        "min_learning_rate": 1e-6,
        "warmup_steps": 100,
        "weight_decay": 0.05,
        "beta2": 0.999,
        "flip": True,
        "shift": 4,
        "eval_every": 200,
    },
    "face-s14": {
        "epochs": 40,
        "batch_size": 128,
        "image_size": 224,
        "channels": "3",
        "patch_size": 14,
        "layers": 12,
        "heads": 6,
        "width": 384,
        "pooling": "class",
        "embedding": 512,
        "validation_share": 0.0,  # trains on every image of the folder
        "learning_rate": 5e-4,
        "min_learning_rate": 1e-6,
        "warmup_steps": 2000,
        "weight_decay": 0.05,
        "beta2": 0.999,
        "flip": True,
        "eval_every": 1000,
        "eval_batches": 8,
    },
}
