"""Defines tasks: the shipped GPT and ViT, or a third party's, registered as an entry point.

A package registers `name = "package.module:task"` in the group `tui_trainer.tasks`, where `task` is
a `TaskDefinition`. Its module must import fast and without torch, since the command line and the
start screen read it; `build` is imported in the training process.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from tui_trainer.config.training import TrainingConfig
from tui_trainer.protocol.events import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.protocol.schema import Scalar

if TYPE_CHECKING:
    import torch

GROUP = "tui_trainer.tasks"

EvaluationResult = tuple[Mapping[str, float], list[TextSample | ImageSample | ConfusionMatrix]]
"""Metrics such as {"loss": 1.9, "accuracy": 0.97}, which become columns of the table `validation`,
and artifacts to show; the recorder sets the ids of these."""


@dataclass(frozen=True)
class TaskDefinition:
    """A task as the command line and the start screen see it."""

    name: str
    summary: str
    config: type[TrainingConfig]
    presets: Mapping[str, Mapping[str, Scalar]]
    """The fields that each preset sets; the first preset is the default."""
    build: str
    """`module:function` of a function `(config) -> Training`."""
    preset_for_data: str = ""
    """The default preset when `--data` is given, if it differs from the first one."""


@dataclass(frozen=True)
class Evaluation:
    """A measurement on a cadence, on the training thread between steps and outside the loop.

    `run()` must restore the model's mode and every random generator of the training.
    """

    name: str
    every: int
    """Cadence in steps. It also runs after the last step, and before the first if `at_start`."""
    run: Callable[[], EvaluationResult]
    at_start: bool = False


class Schedule(Protocol):
    """A learning-rate schedule that a user may change while training."""

    @property
    def schedule(self) -> str:
        """Name of the schedule; `constant` if the rate never changes by itself."""

    def change(self, step: int, value: float, group: int | None) -> None:
        """Set the learning rate of step `step`, counted from 0, to `value`, for one parameter group
        or (None) for all, and continue the schedule from there."""

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate of step `step`, counted from 0."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Batches(Protocol):
    """Data whose batch size and order a user may change while training."""

    seed: int

    @property
    def batch_size(self) -> int: ...

    @property
    def batches_per_epoch(self) -> int: ...

    def change(self, batch_size: int, seed: int) -> None:
        """Change batch size and seed from the next batch on."""

    def check(self, batch_size: int) -> None:
        """Raises ConfigurationError if there are fewer than `batch_size` examples."""


@dataclass
class Training:
    """A task that is ready to run."""

    model: torch.nn.Module
    loop: Callable[[], None]
    """The plain PyTorch loop; returns after the last step."""
    total_steps: int
    steps_per_epoch: int | None
    items_per_step: int
    item_unit: str
    evaluations: tuple[Evaluation, ...] = ()
    facts: dict[str, Scalar] = field(default_factory=dict)
    """About the data: characters, vocabulary size, images, batches per epoch, …"""
    tokens: Sequence[str] = ()
    """Texts of the model's tokens, by number, for a model that reads tokens."""
    classes: Sequence[str] = ()
    """Names of the classes that the model predicts, by number."""
    stateful: dict[str, Any] = field(default_factory=dict)
    """Objects with `state_dict()` and `load_state_dict()` that a checkpoint holds in addition to
    the model: optimizer, scheduler, scaler, batches (their position and generator)."""
    schedule: Schedule | None = None
    """The learning-rate schedule, if it may be changed while training."""
    batches: Batches | None = None
    """The batches, if they may be changed while training."""


@functools.cache
def find_task(name: str) -> TaskDefinition:
    """The task registered under `name`. Raises KeyError."""
    for entry in entry_points(group=GROUP, name=name):
        task = entry.load()
        if isinstance(task, TaskDefinition):
            return task
    raise KeyError(name)


def build(definition: TaskDefinition, config: TrainingConfig) -> Training:
    """Import the training part of a task, and torch with it, and build the training."""
    module, _, function = definition.build.partition(":")
    training = getattr(importlib.import_module(module), function)(config)
    assert isinstance(training, Training)
    return training
