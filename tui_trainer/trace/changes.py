"""Finding out what a script changes by itself: its gradients, and weights without an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch

from tui_trainer.trace.step import Returned
from tui_trainer.trace.torch_private import version_of

MAX_WATCHED = 256
"""Parameters whose gradients are checked for changes; of larger models evenly spaced ones."""
SAMPLED = 64
"""Elements sampled per weight to detect an update by hand."""

Marks = list[tuple[int, int] | None]
"""(identity, version) of gradients; None where there is none."""


class GradientMarks:
    """Finds out by their identities and versions whether the gradients of `parameters` change.

    In-place operations raise the version of a gradient, but for those on `grad.data`.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._watched = parameters[:: -(-len(parameters) // MAX_WATCHED)] if parameters else []
        self._all_watched = len(self._watched) == len(parameters)
        self._known: Marks | None = [None] * len(self._watched)
        """Since the last change that is known; None: they may have changed."""
        self._before_backward: Marks = []
        self._used: Marks = []
        """Of the gradients that the last step used."""

    def before_backward(self) -> None:
        self._before_backward = self._current()

    def any_kept(self) -> bool:
        """Whether the open backward found gradients that the last step used, judged by three."""
        now, used = self._before_backward, self._used
        if len(now) != len(used) or not now:
            return False
        places = (0, len(now) // 2, len(now) - 1)
        return any(now[place] is not None and now[place] == used[place] for place in places)

    def reached_by_backward(self) -> bool:
        """Whether the backward that has just ended changed any gradient."""
        marks = self._current()
        reached = marks != self._before_backward
        if reached:
            self._known = marks
        return reached

    def changed(self) -> bool:
        """Whether the script has changed gradients since the last change that is known."""
        return self._known is not None and self._current() != self._known

    def first_changed(self) -> bool:
        """`changed`, judged by the first parameter that had a gradient."""
        for position, mark in enumerate(self._known or ()):
            if mark is not None:
                gradient = self._watched[position].grad
                return gradient is None or (id(gradient), version_of(gradient)) != mark
        return False

    def changed_positions(self) -> list[int] | None:
        """Positions of the parameters whose gradients changed; None: unknown."""
        marks, before = self._current(), self._known
        if before is None or not self._all_watched:
            return None
        return [i for i, (a, b) in enumerate(zip(marks, before, strict=True)) if a != b]

    def remember(self) -> None:
        """The gradients are now as they should be."""
        self._known = self._current()

    def forget(self) -> None:
        """The gradients have changed in a way that is known; the next backward marks them."""
        self._known = None

    def assigned(self, returned: Returned) -> None:
        """The script has assigned gradients that `torch.autograd.grad` returned: what it did to
        them since is its own change."""
        versions = {
            id(g): version for ref, version in returned.values() if (g := ref()) is not None
        }
        self._known = [
            mark and (mark[0], versions.get(mark[0], mark[1])) for mark in self._current()
        ]

    def use(self) -> None:
        """The optimizer has used the gradients."""
        self._used = self._known or []

    def _current(self) -> Marks:
        return [
            None if (gradient := p.grad) is None else (id(gradient), version_of(gradient))
            for p in self._watched
        ]


class WeightWatch:
    """Finds out whether a script that has no optimizer has updated its weights."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._versions: list[int] = []
        self._samples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        """Parameters and copies of their first elements and gradients: an update through `.data`
        leaves no other trace."""
        self._largest_ratio = 0.0

    def remember(self) -> None:
        """A backward has ended: an update may follow."""
        self._versions = list(map(version_of, self._parameters))
        self._samples = [
            (p, _first_elements(p).clone(), _first_gradients(p))
            for p in self._parameters
            if p.numel()
        ]

    def changed(self) -> bool:
        """Whether weights have changed since. May wait for the device."""
        if list(map(version_of, self._parameters)) != self._versions:
            return True
        if any(not torch.equal(_first_elements(p), copy) for p, copy, _ in self._samples):
            self._largest_ratio = max(self._largest_ratio, self._ratio())
            return True
        return False

    def too_small(self) -> bool:
        """Whether an update would have been too small for the precision of the weights to change
        them, judged by the largest ratio of an update to its gradient so far."""
        return bool(self._samples) and all(
            gradient is not None and self._too_small(copy, gradient)
            for _, copy, gradient in self._samples
        )

    def _ratio(self) -> float:
        """The ratio of the update to the gradient, by the largest element of each."""
        updates = [float((_first_elements(p) - copy).abs().max()) for p, copy, _ in self._samples]
        gradients = [float(g.abs().max()) for _, _, g in self._samples if g is not None]
        largest = max(gradients, default=0.0)
        ratio = max(updates) / largest if largest else 0.0
        return ratio if isfinite(ratio) else 0.0

    def _too_small(self, weights: torch.Tensor, gradient: torch.Tensor) -> bool:
        update = gradient.abs() * self._largest_ratio
        return bool(torch.all(update <= weights.abs() * torch.finfo(weights.dtype).eps))


def _first_elements(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().reshape(-1)[:SAMPLED]


def _first_gradients(parameter: torch.Tensor) -> torch.Tensor | None:
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        return None
    return _first_elements(gradient).clone()
