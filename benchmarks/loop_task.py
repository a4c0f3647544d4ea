"""`loop.py` as a third party's task: `tui-trainer loop`."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tui_trainer.config.options import option
from tui_trainer.config.training import MODEL, TrainingConfig
from tui_trainer.tasks.definition import TaskDefinition

if TYPE_CHECKING:
    from tui_trainer.tasks.definition import Training


@dataclass(frozen=True, kw_only=True)
class LoopConfig(TrainingConfig):
    """The options of loop.py."""

    shape: Literal["tiny", "gpt", "gpt-gpu", "gpt2", "vit"] = option(
        "gpt", "what to train", group=MODEL
    )
    turns: str | None = option(
        None, "folder of the FIFOs that carry the training requests", group=MODEL
    )


def build(config: LoopConfig) -> Training:
    """The model, optimizer and loop of the script `loop.py`."""
    import torch
    from clock import Clock
    from loop import build as build_loop

    from tui_trainer.tasks.definition import Training

    turns = Path(config.turns) if config.turns else None
    device = "cpu" if config.device == "auto" else config.device
    options = argparse.Namespace(
        **{"shape": config.shape, "threads": config.threads, "device": device, "turns": turns},
        **{"batch": None, "dtype": config.dtype, "rival": "", "compile": config.compile},
    )
    torch.manual_seed(config.seed)
    model, loop = build_loop(options)
    clock = Clock(turns, config.steps or 200, torch.device(device))
    return Training(
        model=model,
        loop=functools.partial(loop, clock),
        total_steps=10_000_000,
        steps_per_epoch=None,
        items_per_step=1,
        item_unit="batches",
    )


task = TaskDefinition(
    name="loop",
    summary="the loop of the benchmarks",
    config=LoopConfig,
    presets={"default": {"steps": 200}},
    build="loop_task:build",
)
