"""Finds dropout layers that are in `eval()` mode while the model around them trains."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch

from tui_trainer.history.records import Floats
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, Values
from tui_trainer.trace.torch_private import DropoutLayer

LISTED_AGAIN = 100
"""Steps after which the layers of a model are listed again."""

_IS_TRAINING = itemgetter("training")

_Layer = tuple[weakref.ref[torch.nn.Module], weakref.ref[torch.nn.Module]]
"""(dropout layer, the module that has it)"""


class DropoutModes(Probe):
    """No table: sets `StepFacts.dropout_off`, at every step.

    The dropout layers of a model are listed every LISTED_AGAIN steps; a step only reads one
    attribute of each.
    """

    name = "modes"
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._own = {id(parameter) for parameter in tracked.parameters}
        self._paths: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary(
            {module: path for path, module in tracked.modules.items()}
        )
        self._root: weakref.ref[torch.nn.Module] | None = None
        """The model whose layers are listed."""
        self._layers: list[_Layer] = []
        self._attributes: list[dict[str, Any]] = []
        """`vars` of each layer, which do not keep the layer alive."""
        self._steps_left = 0
        self._found: tuple[str, ...] | None = None
        self._under_way: deque[tuple[str, ...] | None] = deque()

    def before_forward(self, root: torch.nn.Module) -> None:
        """Read the modes of the model's layers."""
        self._steps_left -= 1
        if self._root is None or self._root() is not root or self._steps_left < 0:
            if not any(id(parameter) in self._own for parameter in root.parameters()):
                return
            self._root, self._steps_left = weakref.ref(root), LISTED_AGAIN
            found = [
                (child, parent)
                for parent in root.modules()
                for child in parent.children()
                if isinstance(child, DropoutLayer)
            ]
            self._layers = [(weakref.ref(child), weakref.ref(parent)) for child, parent in found]
            self._attributes = [vars(child) for child, _ in found]
        usual = not root.training or all(map(_IS_TRAINING, self._attributes))
        self._found = () if usual else self._dropout_off()

    def _dropout_off(self) -> tuple[str, ...]:
        """Paths of the dropout layers in `eval()` mode whose parent has trainable weights."""
        found = []
        for layer, owner in self._layers:
            child, parent = layer(), owner()
            if child is None or child.training or not child.p:
                continue
            if parent is not None and any(p.requires_grad for p in parent.parameters()):
                found.append(self._paths.get(child, type(child).__name__))
        return tuple(dict.fromkeys(found))

    def after_update(self) -> Readings:
        found, self._found = self._found, None
        self._under_way.append(found)
        return ()

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Sets `facts.dropout_off`."""
        facts.dropout_off = self._under_way.popleft()
        return ()
