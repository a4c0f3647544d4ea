"""Images, batches, epochs and updates."""

from __future__ import annotations

from dataclasses import dataclass

from tui_trainer.config.errors import ConfigurationError


@dataclass(frozen=True)
class EpochPlan:
    """How many updates a training makes. Only full batches count: each epoch leaves out the rest,
    which is different images each time."""

    images: int
    batch_size: int
    epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.images < self.batch_size:
            raise ConfigurationError(
                f"{self.images:,} training images do not fill one batch of {self.batch_size:,}",
                f"try --batch-size {max(1, self.images // 2)}",
            )

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass."""
        return self.images // self.batch_size

    @property
    def left_out(self) -> int:
        """Images that one pass leaves out, since they do not fill a batch."""
        return self.images % self.batch_size

    @property
    def updates(self) -> int:
        """Optimizer steps in all."""
        return self.steps or (self.epochs or 1) * self.batches_per_epoch
