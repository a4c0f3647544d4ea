"""Other ways of logging, as their manuals show them, at every step, for comparison with ours.

Each is called after `backward`, when the gradients have been computed and not yet clipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Log = Callable[[int, Tensor], None]


def start(name: str, model: nn.Module, folder: Path) -> Log:
    """Start logging `model` in the way called `name`, to files in `folder`. Raises ImportError if
    it is not installed."""
    return RIVALS[name](model, folder)


def item(model: nn.Module, folder: Path) -> Log:
    """The norm of every gradient and weight, each fetched by `.item()` once it is computed."""
    kept: list[tuple[float, dict[str, tuple[float, float]]]] = []

    def log(step: int, loss: Tensor) -> None:
        with torch.no_grad():
            norms = {
                name: (p.grad.norm().item(), p.norm().item())
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        kept.append((loss.item(), norms))
        del kept[:-1000]

    return log


def tensorboard_scalars(model: nn.Module, folder: Path) -> Log:
    """The loss and the norm of every gradient and weight as TensorBoard scalars."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(step: int, loss: Tensor) -> None:
        writer.add_scalar("loss", loss.item(), step)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is not None:
                    writer.add_scalar(f"gradient/{name}", p.grad.norm().item(), step)
                    writer.add_scalar(f"weight/{name}", p.norm().item(), step)

    return log


def tensorboard_histograms(model: nn.Module, folder: Path) -> Log:
    """The loss, and every gradient and weight as a TensorBoard histogram."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(step: int, loss: Tensor) -> None:
        writer.add_scalar("loss", loss.item(), step)
        for name, p in model.named_parameters():
            if p.grad is not None:
                writer.add_histogram(f"gradient/{name}", p.grad, step)
                writer.add_histogram(f"weight/{name}", p.detach(), step)

    return log


def wandb_watch(model: nn.Module, folder: Path) -> Log:
    """`wandb.watch(log="all", log_freq=1)`, offline."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    run = wandb.init(project="benchmark", dir=str(folder))
    run.watch(model, log="all", log_freq=1)

    def log(step: int, loss: Tensor) -> None:
        run.log({"loss": loss.item()})

    return log


RIVALS: dict[str, Callable[[nn.Module, Path], Log]] = {
    "item": item,
    "tensorboard-scalars": tensorboard_scalars,
    "tensorboard-histograms": tensorboard_histograms,
    "wandb-watch": wandb_watch,
}
NEEDS = {
    "tensorboard-scalars": "tensorboard",
    "tensorboard-histograms": "tensorboard",
    "wandb-watch": "wandb",
}
"""The package that each way needs (`pip install tui-trainer[bench]`)."""
