"""Measures weights before the first step: their scale, and whether units or layers are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tui_trainer.history.records import Floats, InitialWeight
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, Values
from tui_trainer.trace.torch_private import is_sharded

MAPS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, slots=True)
class _Weight:
    position: int
    name: str
    fan_in: int
    units: int


class InitialWeights(Probe):
    """No table: sets `StepFacts.initial` at the optimizer's first step."""

    name = "initial_weights"
    every = 1 << 40
    importance = 100
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._weights: list[_Weight] = []
        embeddings: list[int] = []
        linears: list[int] = []
        for position, name in enumerate(tracked.names[: tracked.own]):
            path, _, attribute = name.rpartition(".")
            parameter, module = tracked.parameters[position], tracked.modules.get(path)
            if attribute != "weight" or is_sharded(parameter) or not parameter.requires_grad:
                continue
            if isinstance(module, nn.Embedding):
                embeddings.append(position)
            elif isinstance(module, MAPS) and parameter.dim() > 1 and parameter.numel():
                units, fan_in = parameter.shape[0], parameter[0].numel()
                if isinstance(module, nn.Linear):
                    linears.append(position)
                self._weights.append(_Weight(position, name, fan_in, units))
        self._pairs = [
            (a, b)
            for a in embeddings
            for b in linears
            if tracked.parameters[a].shape == tracked.parameters[b].shape
            and tracked.parameters[a].shape[0] > 1
        ]
        """(position of an embedding, position of a layer that could share its weight)."""
        self._readings: list[torch.Tensor] = []
        if not self._weights and not self._pairs:
            self.unseen = "no layers with weight matrices"

    def before_update(self) -> None:
        self._readings = [_facts_of(self.tracked.weight(each.position)) for each in self._weights]
        for a, b in self._pairs:
            same = (self.tracked.weight(a) == self.tracked.weight(b)).all()
            self._readings.append(same.double())

    def after_update(self) -> Readings:
        readings, self._readings = self._readings, []
        return readings

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Sets `facts.initial`."""
        found = []
        for number, each in enumerate(self._weights):
            rms, constant, same_rows = values[3 * number : 3 * number + 3].tolist()
            found.append(
                InitialWeight(
                    each.name, each.fan_in, each.units, rms, bool(constant), bool(same_rows), ""
                )
            )
        names = self.tracked.names
        for (a, b), same in zip(self._pairs, values[3 * len(self._weights) :], strict=False):
            if same:
                found.append(InitialWeight(names[b], 0, 0, 0.0, False, False, names[a]))
        facts.initial = tuple(found)
        return ()


def _facts_of(weight: torch.Tensor) -> torch.Tensor:
    """float64 (3,): root mean square, whether all elements are equal, whether all rows are."""
    rows = weight.flatten(1)
    constant = (rows == rows[0, 0]).all()
    same_rows = (rows == rows[:1]).all()
    return torch.stack(
        [rows.double().square().mean().sqrt(), constant.double(), same_rows.double()]
    )
