"""What an optimizer is to its run, and a later optimizer that goes on in its place.

A script may train one model after another: the folds of a cross-validation, the trials of a search.
The model of the next fold is no further network beside the first, it comes instead of it; so its
figures go on in the same tables, under the same names.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from tui_trainer.protocol.describe import Column, Table
from tui_trainer.tracing.interface import RecorderLike
from tui_trainer.tracing.subject import parameters_of

Optimizer = torch.optim.Optimizer


@dataclass(eq=False)
class Role:
    """The name and the tables of an optimizer, and of those that take its place."""

    name: str
    key: str
    """See `Subject.key`."""
    kind: type[Optimizer]
    shapes: tuple[tuple[int, ...], ...]
    optimizer: weakref.ref[Optimizer]
    models: tuple[weakref.ref[torch.nn.Module], ...] = ()
    tables: dict[str, Table] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether what it trained is gone. The optimizer itself may be left behind in a cycle (a
        scheduler's) until the collector comes by."""
        if self.models:
            return all(model() is None for model in self.models)
        return self.optimizer() is None

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer is of the same kind, over parameters of the same shapes."""
        return type(optimizer) is self.kind and shapes_of(optimizer) == self.shapes

    def hand_over(self, optimizer: Optimizer) -> None:
        """It is this optimizer's from now on."""
        self.optimizer = weakref.ref(optimizer)

    def trains(self, models: Iterable[torch.nn.Module]) -> None:
        """The models whose parameters these are."""
        self.models = tuple(weakref.ref(model) for model in models)

    def table(
        self, recorder: RecorderLike, name: str, columns: Sequence[Column], every: int, natural: int
    ) -> Table:
        """The table of this name: declared anew, or the one that is there with these columns."""
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
    """The shapes of its parameters, in its order."""
    return tuple(tuple(parameter.shape) for parameter in parameters_of(optimizer))
