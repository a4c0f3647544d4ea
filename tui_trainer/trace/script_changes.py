"""Detects a script's own changes: of gradients, and of weights without an optimizer."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import repeat
from math import isfinite
from operator import attrgetter, is_
from typing import NamedTuple

import torch

from tui_trainer.trace.step import Returned
from tui_trainer.trace.torch_private import local, version_of

SAMPLED_GRADIENTS = 8
"""Number of gradients that are compared before and after a backward to see if it reached them."""
MAX_WATCHED = 256
"""Maximum number of parameters whose gradients are checked for changes; evenly spaced in larger
models."""
SAMPLED = 64
"""Number of elements of a weight that are compared to detect an update by hand."""

NO_GRADIENT = id(None)
NO_VERSION = -1


class Marks(NamedTuple):
    """Identities and versions of gradients; NO_GRADIENT and NO_VERSION where there is none."""

    ids: list[int]
    versions: list[int]

    def differ_where_present(self, others: Marks) -> bool:
        """Whether any gradient present here differs from `others` in identity or version."""
        both = zip(*self, *others, strict=True)
        return any(a != NO_GRADIENT and (a != b or n != m) for a, n, b, m in both)


class GradientMarks:
    """Detects changes of the gradients of `parameters` by their identities and versions.

    In-place operations raise the version of a gradient, except for those on `grad.data`.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], further: Sequence[torch.Tensor] = ()
    ) -> None:
        """`further`: parameters that are checked only where the gradient of one of `parameters` has
        changed."""
        self._every = -(-len(parameters) // MAX_WATCHED) or 1
        self._watched = parameters[:: self._every]
        self._all_watched = len(self._watched) == len(parameters)
        self._further = [(i, p) for i, p in enumerate(further, len(parameters)) if p.requires_grad]
        self._further_known: list[tuple[int, int]] = []
        count = len(self._watched)
        self._nothing = Marks([NO_GRADIENT] * count, [NO_VERSION] * count)
        self._known: Marks | None = self._nothing
        """Marks after the last change that the tracer knows of; None: gradients may have changed
        since."""
        self._places: list[int] = []
        """Positions of a sample of the gradients that a backward usually computes."""
        self._choose_sample(range(count))
        self._before_backward: Marks | None = None
        """Marks before the open backward; None where the sample had no gradient."""
        self._last = self._nothing
        """Marks at the last check."""
        self._used = self._nothing
        """Marks of the gradients that the last step used."""
        self._raised_by_clipping = 0
        """Number by which a clipping by norm raises the version of each gradient; 0: not known."""

    def before_backward(self) -> bool:
        """Remember the gradients; return whether the sample has any."""
        nothing = all(map(is_, map(_gradient_of, self._sample), repeat(None)))
        self._before_backward = None if nothing else self._current()
        return not nothing

    def _choose_sample(self, places: Sequence[int]) -> None:
        self._places = list(places[:: -(-len(places) // SAMPLED_GRADIENTS) or 1])
        self._sample = [self._watched[place] for place in self._places]

    def any_kept(self) -> bool:
        """Whether the open backward found gradients that the last step used, checked on three of
        them."""
        now, used = self._before_backward, self._used
        if now is None or not now.ids:
            return False
        last = len(now.ids) - 1
        return any(
            now.ids[place] != NO_GRADIENT
            and now.ids[place] == used.ids[place]
            and now.versions[place] == used.versions[place]
            for place in (0, last // 2, last)
        )

    def reached_by_backward(self) -> bool:
        """Whether the backward that has just ended changed any gradient."""
        before, last = self._before_backward, self._last
        marks = self._current()
        if before is not None:
            reached = marks != before
        elif marks is self._nothing:
            reached = False
        else:
            reached = True
            found = list(map(marks.ids.__getitem__, self._places))
            if NO_GRADIENT in found:
                self._choose_sample([i for i, each in enumerate(marks.ids) if each != NO_GRADIENT])
                if found.count(NO_GRADIENT) == len(found):
                    # Only gradients outside the sample are present; they may be older.
                    reached = marks.differ_where_present(last)
        if reached:
            self._set_known(marks)
        return reached

    def _set_known(self, marks: Marks) -> None:
        self._known = marks
        if self._further:
            self._further_known = self._further_marks()

    def _further_marks(self) -> list[tuple[int, int]]:
        gradients = [parameter.grad for _, parameter in self._further]
        return [(id(g), NO_VERSION if g is None else version_of(g)) for g in gradients]

    def changed(self) -> bool:
        """Whether the script has changed gradients since the last known change."""
        if self._known is None:
            return False
        marks = self._current()
        if marks != self._known:
            return True
        self._known = marks
        return False

    def any_replaced(self) -> bool:
        """Whether any gradient is another tensor than after the last known change."""
        return self._known is not None and self._current().ids != self._known.ids

    def first_changed(self) -> bool:
        """`changed`, checked on the first parameter that had a gradient."""
        known = self._known
        if known is None or known is self._nothing:
            return False
        for position, identity in enumerate(known.ids):
            if identity != NO_GRADIENT:
                gradient = self._watched[position].grad
                if gradient is None or id(gradient) != identity:
                    return True
                return version_of(gradient) != known.versions[position]
        return False

    def changed_positions(self) -> list[int] | None:
        """Positions of the parameters whose gradients changed; None: unknown."""
        if self._known is None or not self._all_watched:
            return None
        found = self.changed_watched()
        if self._further and self._further_known:
            pairs = zip(self._further, self._further_marks(), self._further_known, strict=True)
            found += [place for (place, _), now, known in pairs if now != known]
        return found

    def changed_watched(self) -> list[int]:
        """Positions of the watched parameters whose gradients changed; in larger models not every
        parameter is watched."""
        if self._known is None:
            return []
        both = zip(*self._current(), *self._known, strict=True)
        changed = [i for i, (a, n, b, m) in enumerate(both) if a != b or n != m]
        return [i * self._every for i in changed]

    def remember(self) -> None:
        """Take the present gradients as the known state."""
        self._set_known(self._current())

    def clipped(self) -> None:
        """Like `remember`, after a clipping by norm of all these gradients, before which `changed`
        was called. Clipping multiplies every gradient in place and so raises each version by the
        same number, which is learned once and then predicted."""
        before, raised = self._known, self._raised_by_clipping
        if before is not None and raised and self._last is before:
            self._known = self._last = Marks(before.ids, list(map(raised.__add__, before.versions)))
            if self._further:
                self._further_known = self._further_marks()
            return
        self.remember()
        after = self._known
        if before is not None and after is not None and before.ids == after.ids:
            by = {b - a for a, b in zip(before.versions, after.versions, strict=True)}
            whole = len(by) == 1 and NO_GRADIENT not in after.ids
            self._raised_by_clipping = by.pop() if whole else 0

    def forget(self) -> None:
        """Forget the marks after a change that the tracer knows of; the next backward sets them
        again."""
        self._known = None

    def assigned(self, returned: Returned) -> None:
        """The script has assigned gradients that `torch.autograd.grad` returned. Its changes to
        them since then, and to the gradients that were there before, count as its own."""
        versions = {
            id(g): version for ref, version in returned.values() if (g := ref()) is not None
        }
        marks = self._current()
        found = [versions.get(*mark) for mark in zip(*marks, strict=True)]
        before = self._before_backward
        if before is not None:
            kept = zip(marks.ids, *before, found, strict=True)
            found = [
                then if now == old and now not in versions else version
                for now, old, then, version in kept
            ]
        self._known = Marks(marks.ids, found)

    def use(self) -> None:
        """The optimizer has used the gradients."""
        self._used = self._known or self._nothing

    def _current(self) -> Marks:
        """Marks of the present gradients. Called several times in every step, so it avoids Python
        loops in the usual cases."""
        gradients = list(map(_gradient_of, self._watched))
        ids = list(map(id, gradients))
        if NO_GRADIENT not in ids:
            marks = Marks(ids, list(map(version_of, gradients)))
        elif ids == self._nothing.ids:
            marks = self._nothing
        else:
            marks = Marks(ids, [NO_VERSION if g is None else version_of(g) for g in gradients])
        self._last = marks
        return marks


_gradient_of = attrgetter("grad")


class WeightWatch:
    """Detects updates of the weights by a script without an optimizer."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._versions: list[int] = []
        self._samples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        """(parameter, copy of its first elements, copy of their gradients): an update through
        `.data` leaves no other trace."""
        self._largest_ratio = 0.0

    def remember(self) -> None:
        """Remember the weights after a backward, which an update may follow."""
        self._versions = list(map(version_of, self._parameters))
        self._samples = [
            (p, _first_elements(p).clone(), _first_gradients(p))
            for p in self._parameters
            if local(p).numel()
        ]

    def changed(self) -> bool:
        """Whether weights have changed since `remember`. May wait for the device."""
        by_version = list(map(version_of, self._parameters)) != self._versions
        if any(not _same(_first_elements(p), copy) for p, copy, _ in self._samples):
            self._largest_ratio = max(self._largest_ratio, self._ratio())
            return True
        return by_version

    def left_alone(self) -> frozenset[int]:
        """Positions of the parameters that the update has not changed although their gradients are
        large enough: the script updates other parameters. May wait for the device."""
        samples = {id(p): (copy, gradient) for p, copy, gradient in self._samples}
        found: list[int] = []
        for place, (parameter, version) in enumerate(
            zip(self._parameters, self._versions, strict=True)
        ):
            copy, gradient = samples.get(id(parameter), (None, None))
            if version_of(parameter) == version and copy is not None and gradient is not None:
                same = _same(_first_elements(parameter), copy)
                if same and not self._too_small(copy, gradient):
                    found.append(place)
        return frozenset(found)

    def too_small(self, updated: Container[int]) -> bool:
        """Whether an update of the parameters at these positions would have been too small for the
        precision of their weights to change them, judged by the largest ratio of an update to its
        gradient so far."""
        ids = {id(p) for place, p in enumerate(self._parameters) if place in updated}
        samples = [(copy, g) for p, copy, g in self._samples if id(p) in ids]
        return bool(samples) and all(
            gradient is not None and self._too_small(copy, gradient) for copy, gradient in samples
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
        hidden = update <= weights.abs() * torch.finfo(weights.dtype).eps
        return bool(torch.all(hidden | weights.isnan()))  # a nan hides its update


def _same(values: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two tensors are equal, where nan equals nan."""
    return torch.equal(values, others) or bool(
        ((values == others) | (values.isnan() & others.isnan())).all()
    )


def _first_elements(parameter: torch.Tensor) -> torch.Tensor:
    """The first elements of a parameter; if it is sharded, of this process's shard."""
    return local(parameter.detach()).reshape(-1)[:SAMPLED]


def _first_gradients(parameter: torch.Tensor) -> torch.Tensor | None:
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        return None
    return _first_elements(gradient).clone()
