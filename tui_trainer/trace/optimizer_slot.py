"""The name and the tables of an optimizer, which a later optimizer may take over.

A script may train one model after another: the folds of a cross-validation, the trials of a search.
The next fold's model replaces the previous one instead of joining it, so its measurements continue
in the same tables under the same names.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from tui_trainer.history.records import WeightDecay
from tui_trainer.protocol.schema import Column, Table
from tui_trainer.trace.parameters import parameters_of
from tui_trainer.trace.probe import RecorderLike

Optimizer = torch.optim.Optimizer
ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
DIVIDING = (
    *(torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax),
    *(torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop),
)
"""Optimizers that divide the gradient, weight decay included, by its root mean square, unless a
group has `decoupled_weight_decay`."""


@dataclass(eq=False)
class OptimizerSlot:
    """The name of an optimizer in a run, and the tables in which it is measured."""

    name: str
    key: str
    """See `TrackedParameters.key`."""
    kind: type[Optimizer]
    shapes: tuple[tuple[int, ...], ...]
    optimizer: weakref.ref[Optimizer]
    models: tuple[weakref.ref[torch.nn.Module], ...] = ()
    count: int = 0
    """Number of parameters in `models`."""
    tables: dict[str, Table] = field(default_factory=dict)

    @property
    def vacant(self) -> bool:
        """Whether the models that the optimizer trained are freed; without models, whether the
        optimizer is. An optimizer may be left in a reference cycle (a scheduler's) until the
        garbage collector runs."""
        if self.models:
            return all(model() is None for model in self.models)
        return self.optimizer() is None

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer is of the same class, with parameters of the same shapes."""
        return type(optimizer) is self.kind and shapes_of(optimizer) == self.shapes

    @property
    def epsilon(self) -> float | None:
        """The smallest `eps` among the groups of an optimizer of Adam's family; None for others."""
        optimizer = self.optimizer()
        if optimizer is None or not issubclass(self.kind, ADAMS):
            return None
        values = [group.get("eps") for group in optimizer.param_groups]
        # Reading a tensor could wait for the device.
        return min((float(eps) for eps in values if isinstance(eps, int | float)), default=None)

    @property
    def momentum(self) -> float | None:
        """The largest momentum of the groups, Adam's first beta included; None without any."""
        optimizer = self.optimizer()
        found = []
        for group in () if optimizer is None else optimizer.param_groups:
            betas = group.get("betas")
            value = group.get("momentum", betas[0] if isinstance(betas, tuple | list) and betas
                              else None)  # fmt: skip
            # Reading a tensor could wait for the device.
            if isinstance(value, int | float) and value > 0:
                found.append(float(value))
        return max(found, default=None)

    @property
    def weight_decay(self) -> WeightDecay | None:
        """The largest weight decay of the groups that have matrices; None without any."""
        optimizer = self.optimizer()
        found = []
        for group in () if optimizer is None else optimizer.param_groups:
            factor = group.get("weight_decay", 0)
            # Reading a tensor could wait for the device.
            if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
                continue
            if all(parameter.dim() < 2 for parameter in group["params"]):
                continue
            divided = issubclass(self.kind, DIVIDING) and not group.get("decoupled_weight_decay")
            momentum = group.get("momentum", 0)
            if issubclass(self.kind, torch.optim.SGD) and 0 < momentum < 1:
                factor /= 1 - momentum
            found.append(WeightDecay(float(factor), divided))
        return max(found, default=None)

    def occupy(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)

    def set_models(self, models: Iterable[torch.nn.Module]) -> None:
        """The models that own the parameters."""
        self.models = tuple(weakref.ref(model) for model in models)

    def table(
        self, recorder: RecorderLike, name: str, columns: Sequence[Column], every: int, natural: int
    ) -> Table:
        """The table of this name: the existing one if it has these columns, else a new one."""
        known = self.tables.get(name)
        if known is not None and known.columns == tuple(columns):
            table = msgspec.structs.replace(known, every=every, natural=natural)
            if table != known:
                recorder.declare((table,))
        else:
            number = recorder.new_table(name, columns, every, self.key, natural)
            table = Table(number, name, tuple(columns), every, self.key, natural)
        self.tables[name] = table
        return table


def shapes_of(optimizer: Optimizer) -> tuple[tuple[int, ...], ...]:
    """The shapes of the optimizer's parameters, in its order."""
    return tuple(tuple(parameter.shape) for parameter in parameters_of(optimizer))
