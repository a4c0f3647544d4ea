"""Finds dead and saturated units, and measures how much the features of the examples differ."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from tui_trainer.history.records import Floats, UnitKind, UnitsRecord, UnitsShare
from tui_trainer.probes.batch import CONVOLUTIONS
from tui_trainer.trace.module_calls import SubmoduleCalls
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, Values
from tui_trainer.trace.torch_private import has_parameters, is_dense

FUNCTIONS: tuple[tuple[Any, str, UnitKind], ...] = (
    (functional, "relu", "relu"),
    (functional, "relu6", "relu"),
    (torch, "relu", "relu"),
    (functional, "sigmoid", "sigmoid"),
    (torch, "sigmoid", "sigmoid"),
    (functional, "tanh", "tanh"),
    (torch, "tanh", "tanh"),
)
"""(namespace, name, kind)"""
LAYERS = (torch.nn.Linear, *CONVOLUTIONS)
WINDOW = 3
"""Number of measurements in which a unit must be stuck to count as dead or saturated."""
MIN_POSITIONS = 16
"""Minimum number of examples (or positions in them) of a batch for a measurement of units."""
SATURATED = 0.01
"""Distance from a limit of sigmoid or tanh within which an output counts as saturated."""
MAX_CALLS = 256
MIN_EXAMPLES = 4
"""Minimum number of rows of a batch for a measurement of their spread."""


@dataclass(slots=True)
class _Layer:
    """One call of an activation function in the forward."""

    key: tuple[str, UnitKind, int]
    """(path, kind, units)"""
    stuck: torch.Tensor
    """bool (units,): whether all outputs of a unit in this window were dead or saturated."""
    count: int = 0


class UnitsProbe(Probe):
    """No table: sets `StepFacts.units`, over windows of WINDOW measurements.

    Also measures how much the inputs of the first and the last linear layer or convolution differ
    between the examples. The activation functions of torch and torch.nn.functional are replaced
    during one forward. A unit is an index of the last dimension of an output, or a channel of an
    image. An activation that no layer with weights follows is left out: it is the model's output.
    """

    name = "units"
    every = 25
    importance = 8
    max_stretch = 16
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._own = {id(parameter) for parameter in tracked.parameters}
        self._paths: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary(
            {module: path for path, module in tracked.modules.items()}
        )
        self._calls = SubmoduleCalls(self._called, self._returned)
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self._stack: list[torch.nn.Module] = []
        self._inside = False
        """Whether an activation function is being called: one may call another."""
        self._layers: list[_Layer] = []
        self._next = 0
        self._followed = 0
        """Activations of this forward after which a layer with weights was called."""
        self._measured = False
        self._first_input: torch.Tensor | None = None
        self._last_input: torch.Tensor | None = None
        """Input of the last linear layer or convolution of this forward so far."""
        self._last_layer = ""
        self._spreads: list[torch.Tensor] = []
        self._under_way: deque[tuple[list[tuple[str, UnitKind, int]], bool, str]] = deque()

    def before_forward(self, root: torch.nn.Module) -> None:
        self._measured = False
        if not any(id(parameter) in self._own for parameter in root.parameters()):
            return
        self._stack, self._next, self._followed, self._inside = [], 0, 0, False
        self._spreads, self._last_layer = [], ""
        if not self._calls.begin(root, under_way=True):
            return
        self._measured = True
        for owner, name, kind in FUNCTIONS:
            original = getattr(owner, name)
            ours = self._observing(original, kind)
            setattr(owner, name, ours)
            self._replaced.append((owner, name, original, ours))

    def after_forward(self) -> None:
        for owner, name, original, ours in reversed(self._replaced):
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        self._replaced = []
        self._calls.end()
        self._stack = []
        del self._layers[self._next :]
        first, last = self._first_input, self._last_input
        self._first_input = self._last_input = None
        if first is not None and last is not None and first is not last:
            self._spreads = [spread(first), spread(last)]

    # ------------------------------------------------------------ in the forward

    def _called(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._stack.append(module)
        if has_parameters(module):
            self._followed = self._next
        if isinstance(module, LAYERS) and args:
            given = args[0]
            if (
                is_dense(given)
                and given.is_floating_point()
                and given.dim() > 1
                and len(given) >= MIN_EXAMPLES
            ):
                self._last_input = given.detach()
                self._last_layer = self._paths.get(module, "")
                if self._first_input is None:
                    self._first_input = self._last_input

    def _returned(self, module: torch.nn.Module, result: Any) -> None:
        stack = self._stack
        while stack and stack.pop() is not module:
            pass

    def _observing(self, original: Callable[..., Any], kind: UnitKind) -> Callable[..., Any]:
        def activation(*args: Any, **kwargs: Any) -> Any:
            if self._inside or not self._replaced or torch.compiler.is_compiling():
                return original(*args, **kwargs)
            self._inside = True
            try:
                result = original(*args, **kwargs)
            finally:
                self._inside = False
            if self._next < MAX_CALLS and is_dense(result):
                try:
                    with torch.no_grad():
                        self._observe(result.detach(), kind)
                except Exception as fault:
                    self._calls.fault = fault
            return result

        return activation

    def _observe(self, output: torch.Tensor, kind: UnitKind) -> None:
        if output.dim() < 2 or not output.is_floating_point():
            return
        dimension = 1 if output.dim() > 3 else output.dim() - 1
        units = output.shape[dimension]
        if units < 2 or output.numel() // units < MIN_POSITIONS:
            return
        if kind == "relu":
            stuck_now = output <= 0
        elif kind == "tanh":
            stuck_now = output.abs() > 1 - SATURATED
        else:
            stuck_now = (output < SATURATED) | (output > 1 - SATURATED)
        stuck = stuck_now.transpose(0, dimension).flatten(1).all(dim=1)
        path = self._paths.get(self._stack[-1], "") if self._stack else ""
        key = path, kind, units
        if self._next < len(self._layers) and self._layers[self._next].key == key:
            layer = self._layers[self._next]
            if layer.count >= WINDOW:
                layer.stuck, layer.count = stuck, 0
            else:
                layer.stuck = layer.stuck & stuck
        else:
            del self._layers[self._next :]
            layer = _Layer(key, stuck)
            self._layers.append(layer)
        layer.count += 1
        self._next += 1

    # ------------------------------------------------------------ the end of the step

    def after_update(self) -> Readings:
        """The share of stuck units of each layer whose window is complete."""
        layers = self._layers[: self._followed] if self._measured else []
        complete = [layer for layer in layers if layer.count == WINDOW]
        measured, self._measured = self._measured, False
        spreads, self._spreads = self._spreads if measured else [], []
        path = self._last_layer if spreads else ""
        self._under_way.append(([layer.key for layer in complete], measured, path))
        return [*(layer.stuck.double().mean() for layer in complete), *spreads]

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Sets `facts.units`."""
        keys, measured, path = self._under_way.popleft()
        if measured:
            known = values.tolist()
            shares = tuple(UnitsShare(*key, share) for key, share in zip(keys, known, strict=False))
            first, last = known[len(keys) :] or (None, None)
            facts.units = UnitsRecord(shares, path, last, first)
        return ()


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """√(mean of the squared differences from the mean row / mean of the squares), 0-d."""
    rows = tensor.flatten(1).float()
    return ((rows - rows.mean(0)).square().mean() / rows.square().mean()).sqrt()
