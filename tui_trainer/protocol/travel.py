"""Requests and answers of time travel and experiments: the steps that a training can go back to,
and experiments that do not change it."""

from __future__ import annotations

from typing import Literal

import msgspec

from tui_trainer.protocol.settings import SettingChange

PlaceKind = Literal["snapshot", "checkpoint", "edit"]
Direction = Literal["gradient", "random", "snapshots"]
MAX_STEPS = 1000
"""Maximum number of steps of a what-if or a learning-rate finder."""
MAX_POINTS = 201
"""Maximum number of points of a loss landscape."""
LONG_S = 60.0
"""Experiments that take longer than this must be confirmed."""
LARGE_SHARE = 0.5
"""Experiments that take a larger share of the free memory must be confirmed."""


class TravelPlace(msgspec.Struct, frozen=True, array_like=True):
    """A step with a snapshot, a checkpoint or a change of settings."""

    step: int
    kind: PlaceKind
    text: str = ""
    """What an edit changed."""


class Timeline(msgspec.Struct, tag="timeline", frozen=True, array_like=True):
    """The steps of a training that are kept, and the changes of its settings, by step."""

    places: tuple[TravelPlace, ...]
    now: int
    newest: int
    exact: bool
    """Whether any step can be reached; a script can only get the state of a snapshot."""
    bytes: int = 0
    """Host memory of all snapshots."""
    budget: int = 0
    """Host memory that snapshots may take."""
    step_s: float | None = None
    """Seconds that a step takes; None before one was measured."""
    snapshot_bytes: int = 0
    """Host memory of one snapshot."""


class ReadTimeline(msgspec.Struct, tag="read_timeline", frozen=True):
    """Asks for the timeline."""


class WhatIf(msgspec.Struct, tag="what_if", frozen=True):
    """Asks for the losses of the next steps with the present settings, and with changed ones."""

    changes: tuple[SettingChange, ...]
    steps: int = 50


class FindLearningRate(msgspec.Struct, tag="find_learning_rate", frozen=True):
    """Asks for the loss while the learning rate grows exponentially (Smith 2017)."""

    low: float = 1e-7
    high: float = 1.0
    steps: int = 100


class MeasureLandscape(msgspec.Struct, tag="measure_landscape", frozen=True):
    """Asks for the loss along a direction from the present weights, on the next batch (in a script
    on the present batch)."""

    direction: Direction = "gradient"
    points: int = 25
    reach: float = 1.0
    """How far to go to either side: for a `random` direction in units of the norm of each
    parameter, for the `gradient` in learning rates. For `snapshots`, where the first is at 0 and
    the second at 1: from -reach to 2 * reach."""
    first: int = 0
    """Step of a snapshot."""
    second: int = 0


class Curve(msgspec.Struct, frozen=True, array_like=True):
    """Losses over some quantity."""

    name: str
    x: tuple[float, ...]
    loss: tuple[float, ...]


class ExperimentResult(msgspec.Struct, tag="experiment", frozen=True, array_like=True):
    """The curves of an experiment."""

    x_name: str
    curves: tuple[Curve, ...]
    text: str = ""
    """The result in a sentence."""


Experiment = WhatIf | FindLearningRate | MeasureLandscape


class EstimateCost(msgspec.Struct, tag="estimate_cost", frozen=True):
    """Asks for the cost of an experiment without running it."""

    experiment: Experiment


class ExperimentCost(msgspec.Struct, tag="experiment_cost", frozen=True, array_like=True):
    """The cost of an experiment."""

    steps: int
    """Steps of the training, or evaluations of the loss."""
    seconds: float | None
    """None before a step was measured."""
    bytes: int
    """Host memory during the experiment."""
    free: int
    """Host memory that is free now."""
    device: str = ""
    """The accelerator on which copies are made, such as `cuda:0`; of several, the fullest."""
    device_bytes: int = 0
    device_free: int | None = None
    """None if the free memory of the device is not known."""
    unit: Literal["step", "evaluation"] = "step"

    @property
    def large(self) -> bool:
        """Whether the experiment must be confirmed."""
        return (
            (self.seconds or 0.0) > LONG_S
            or self.bytes > LARGE_SHARE * self.free
            or (self.device_free is not None and self.device_bytes > LARGE_SHARE * self.device_free)
        )

    @property
    def possible(self) -> bool:
        """Whether the memory suffices."""
        on_device = self.device_free is None or self.device_bytes <= self.device_free
        return self.bytes <= self.free and on_device
