"""Measures ‖w_after − w_before‖ / ‖w_before‖ of every parameter, healthy near 1e-3, and whether the
weights still have the update of a step at the next one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import torch

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent, to_float32
from tui_trainer.protocol.formatting import bytes_
from tui_trainer.protocol.schema import Column
from tui_trainer.trace.norms import Norms
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, TableSpec, Values
from tui_trainer.trace.torch_private import copy_each, is_sharded, local, subtract_each

SHARE_OF_DEVICE = 0.03
SHARE_OF_FREE = 0.25
"""Share of the free memory that measuring a whole step before a pause may use."""
MAX_HOST_BYTES = 1 << 30
HALF_PRECISION = (torch.float16, torch.bfloat16)
KEPT_SAMPLE = 256
"""Number of elements of the largest weight that are sampled."""
NEVER = 1 << 30


class UpdateRatio(Probe):
    """Table `update_ratio`: one column per parameter, absent for a parameter that was zero before
    or that no optimizer holds.

    It needs copies of the weights, whose size is bounded: if they would take more than
    `ProbeOptions.copy_budget_bytes`, or 3 % of the device's memory, the parameters are measured in
    turns, and there is a row once all of them have been measured. A step before a pause is measured
    whole if memory allows a copy of all weights for its duration.
    """

    name = schema.UPDATE_RATIO
    every = 10
    first_steps = 5
    importance = 20
    max_stretch = 32
    often_in_short_runs = True
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.UPDATE_RATIO, tuple(Column(n) for n in tracked.names)),)
        self.latest: tuple[int, list[float], list[float]] | None = None
        """(step, ‖Δw‖, ratios) of the last row, for the phase report."""
        self.missing: tuple[int, str] = (0, "")
        """(step, why it was not measured completely), for the phase report."""
        self._whole = list(range(len(tracked.parameters)))
        self._whole_step = 0
        """The step that is measured whole."""
        self._now: list[int] = []
        """Indices of the parameters measured in this step."""
        self._turns = in_turns(tracked.parameters, copy_budget(tracked.device, options))
        if len(self._turns) > 1:
            self.first_steps = 0
        self._turn = 0
        self._copies: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        """Copies of all parameters, if they fit into one turn. The memory is reused: allocating it
        for each measurement would take as long as the measurement."""
        self._layout: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        """(shape, dtype, device) of the weights for which `_kept` was allocated."""
        self._under_way: deque[list[int]] = deque()
        self._norms = Norms(tracked.parameters, tracked.device)
        self._updates = np.full(len(tracked.names), np.nan)
        self._ratios = np.full(len(tracked.names), np.nan)

    def wants(self, step: int) -> bool:
        """A step before a pause is measured whole."""
        if len(self._turns) == 1 or self._whole_step == step:
            return True
        if self.missing[0] != step:
            size = sum(p.numel() * _wide(p).itemsize for p in self.tracked.parameters)
            room = room_before_pause(self.tracked.device, self.options)
            if size <= room:
                self._whole_step = step
            else:
                needed, free = bytes_(size, 0), bytes_(room, 0)
                text = f"a copy of the weights takes {needed}, but only {free} are available"
                self.missing = step, text
        return self._whole_step == step

    def before_update(self) -> None:
        """Copy the weights of this turn, or all of them."""
        step, self._whole_step = self._whole_step, 0
        self._now = self._turns[self._turn]
        if step:
            try:
                self._copies = [_copy(local(p).detach()) for p in self.tracked.parameters]
                self._now = self._whole
                return
            except (MemoryError, RuntimeError) as fault:
                self.missing = step, f"the copy could not be allocated: {fault}"
        weights = self._weights(self._now)
        if len(self._turns) > 1:
            self._copies = [_copy(weight) for weight in weights]
            return
        layout = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        if layout != self._layout:
            self._layout = layout
            self._kept = [torch.empty_like(weight, dtype=_wide(weight)) for weight in weights]
        copy_each(self._kept, weights)
        self._copies = self._kept

    def _weights(self, positions: Sequence[int]) -> list[torch.Tensor]:
        parameters = self.tracked.parameters
        if self.tracked.sharded:
            return [local(parameters[i]).detach() for i in positions]
        return [parameters[i].detach() for i in positions]

    def after_update(self) -> Readings:
        """Norms before, then norms of the update."""
        turn = self._now
        if turn is not self._whole:
            self._turn = (self._turn + 1) % len(self._turns)
        copies, self._copies = self._copies, []
        before = self._norms.read(copies)
        subtract_each(copies, self._weights(turn))
        self._under_way.append(turn)
        return [*before, *self._norms.read(copies)]

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """A row once all parameters have been measured."""
        turn = self._under_way.popleft()
        before, update = np.split(values, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(before == 0, absent(Absent.ZERO_WEIGHTS), update / before)
        for position, index in enumerate(turn):
            if index in self.tracked.empty:
                ratios[position] = absent(Absent.EMPTY)
            elif index >= self.tracked.own:  # the script may update it outside of the step
                ratios[position] = absent(Absent.NO_OPTIMIZER)
        self._updates[turn], self._ratios[turn] = update, ratios
        if turn is not self._turns[-1] and turn is not self._whole:
            return (None,)
        self.latest = facts.step, self._updates.tolist(), self._ratios.tolist()
        return (to_float32(self._ratios),)


def _wide(weight: torch.Tensor) -> torch.dtype:
    """The dtype of a copy of `weight`: float32 for half precision, which would round updates."""
    return torch.float32 if weight.dtype in HALF_PRECISION else weight.dtype


def _copy(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(_wide(weight), copy=True)


def copy_budget(device: torch.device, options: ProbeOptions) -> int:
    """Maximum bytes of the copies of weights on `device`."""
    if device.type != "cuda":
        return options.copy_budget_bytes
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1 << 20, min(options.copy_budget_bytes, int(SHARE_OF_DEVICE * memory)))


def room_before_pause(device: torch.device, options: ProbeOptions) -> int:
    """Maximum bytes of a copy of all weights on `device` during a step before a pause."""
    if device.type == "cpu":
        return min(MAX_HOST_BYTES, int(SHARE_OF_FREE * psutil.virtual_memory().available))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE_OF_FREE * (free + held))
    return options.copy_budget_bytes


def in_turns(parameters: Sequence[torch.Tensor], budget: int) -> list[list[int]]:
    """Indices of `parameters` in runs of at most `budget` bytes each (or one single parameter)."""
    turns: list[list[int]] = [[]]
    used = 0
    for index, parameter in enumerate(parameters):
        size = parameter.numel() * _wide(parameter).itemsize
        if turns[-1] and used + size > budget:
            turns.append([])
            used = 0
        turns[-1].append(index)
        used += size
    return turns


class KeptUpdates(Probe):
    """No table: sets `StepFacts.kept_update`, in the first steps, which are consecutive.

    It is ‖w₂ − w₀‖ / ‖w₁ − w₀‖, with a sample of the largest weight before the step (w₀), after it
    (w₁), and when the model is called for the next one (w₂): near 1, unless something writes to the
    weights in between.
    """

    name = "kept_updates"
    every = NEVER
    first_steps = 6
    importance = 12
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        own = tracked.parameters[: tracked.own]
        plain = [p for p in own if p.is_floating_point() and not is_sharded(p)]
        self._weight = max(plain, key=torch.Tensor.numel, default=None)
        self._before: torch.Tensor | None = None
        self._after: torch.Tensor | None = None
        self._share: torch.Tensor | None = None
        """Share of the previous step's update that is left."""
        self._under_way: deque[bool] = deque()

    def _sample(self) -> torch.Tensor | None:
        if self._weight is None:
            return None
        flat = self._weight.detach().flatten()
        return flat[:: -(-flat.numel() // KEPT_SAMPLE)].to(torch.float32, copy=True)

    def model_called(
        self, root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._before is not None and self._after is not None and self._share is None:
            now = self._sample()
            if now is not None:
                self._share = (now - self._before).norm() / (self._after - self._before).norm()

    def before_update(self) -> None:
        self._before, self._after = self._sample(), None

    def after_update(self) -> Readings:
        self._after = self._sample()
        share, self._share = self._share, None
        self._under_way.append(share is not None)
        return [share] if share is not None else ()

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Sets `facts.kept_update`."""
        if self._under_way.popleft() and len(values) == 1 and math.isfinite(values[0]):
            facts.kept_update = float(values[0])
        return ()
