"""What a task is: the shipped GPT and ViT, and any third party's, through one entry-point group.

A package registers `name = "package.module:task"` in the group `tui_trainer.tasks`. The module
that holds the `TaskDefinition` must import fast (no torch): the command line and the start screen
read it.
What trains is imported only in the training process, from `build`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from tui_trainer.config.training import TrainingConfig
from tui_trainer.protocol.messages import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.protocol.schema import Scalar

if TYPE_CHECKING:
    import torch

GROUP = "tui_trainer.tasks"


@dataclass(frozen=True)
class TaskDefinition:
    """A task as the command line and the start screen see it."""

    name: str
    summary: str
    config: type[TrainingConfig]
    presets: Mapping[str, Mapping[str, Scalar]]
    """Preset name to the fields it sets; the first is the default."""
    build: str
    """`module:function` with signature `(config) -> Training`, imported where torch is."""
    preset_for_data: str = ""
    """The default preset once `--data` is given, where it is another one."""


@dataclass(frozen=True)
class Evaluation:
    """Something measured on a cadence between steps, on the training thread, outside the loop.

    `run()` must leave the model's mode and every random generator of the training as it found
    them; it returns scalar metrics (columns of table `validation`, such as {"loss": 1.9,
    "accuracy": 0.97}) and artifacts to show. The recorder numbers the artifacts.
    """

    name: str
    every: int
    """Steps between two runs; it also runs before the first step if `at_start`, and at the end."""
    run: Callable[[], tuple[Mapping[str, float], list[TextSample | ImageSample | ConfusionMatrix]]]
    at_start: bool = False


@dataclass
class Training:
    """A task made ready to run: everything but the tracer."""

    model: torch.nn.Module
    loop: Callable[[], None]
    """The plain PyTorch loop; returns when all steps are made."""
    total_steps: int
    steps_per_epoch: int | None
    items_per_step: int
    item_unit: str
    evaluations: tuple[Evaluation, ...] = ()
    facts: dict[str, Scalar] = field(default_factory=dict)
    """What to say of the data: characters, vocabulary size, images, batches per epoch, …"""
    stateful: dict[str, Any] = field(default_factory=dict)
    """Name to object with `state_dict()` / `load_state_dict()` that a checkpoint holds beside the
    model: optimizer, scheduler, scaler, batches (their position and generator)."""


def find_task(name: str) -> TaskDefinition:
    """The task registered under `name`. Raises KeyError."""
    for entry in entry_points(group=GROUP, name=name):
        loaded = entry.load()
        if isinstance(loaded, TaskDefinition):
            return loaded
    raise KeyError(name)


def build(definition: TaskDefinition, config: TrainingConfig) -> Training:
    """Import the training part of a task (and with it torch) and make it ready to run."""
    module, _, function = definition.build.partition(":")
    made = getattr(importlib.import_module(module), function)(config)
    assert isinstance(made, Training)
    return made
