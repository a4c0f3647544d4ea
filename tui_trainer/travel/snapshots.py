"""Snapshots of a training: copies of its state in host memory, kept within a budget, dense near the
present and sparser further back.

A copy holds parameters and buffers of the models, the state of the optimizers, schedulers, scalers
and other objects with a `state_dict`, and the random generators. Restored values are written into
the existing tensors, so that what refers to them (a compiled step, a fused optimizer) stays valid.

A copy shares with an earlier one the tensors that are still equal bit for bit: frozen parameters,
buffers, and the optimizer's state of parameters without a gradient.
"""

from __future__ import annotations

import copy
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim.optimizer import Optimizer

from tui_trainer.trace.random_state import random_state, restore_random_state
from tui_trainer.trace.torch_private import local, version_of

MAX_SHARE = 0.02
"""Largest share of the step time that snapshots may take; determines their cadence."""
MAX_INTERVAL = 1000
"""Maximum number of steps between two snapshots."""
MAX_KEPT = 1000
"""Maximum number of snapshots that are kept. The budget alone would allow more, since snapshots
that share most of their tensors take little memory."""


class Stateful(Protocol):
    """An object with a `state_dict`: an optimizer, a scheduler, a scaler, batches."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(eq=False)
class TrainingParts:
    """The objects that make up a training."""

    models: Sequence[torch.nn.Module]
    optimizers: Sequence[Optimizer]
    others: Sequence[Stateful] = ()
    """Schedulers, scalers, batches."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """Parameters and buffers, each once, including non-persistent buffers."""
        seen: set[int] = set()
        for model in self.models:
            for tensor in (*model.parameters(), *model.buffers()):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    def nbytes(self) -> int:
        """The bytes of a copy, without making one. `others` are left out: their `state_dict` may
        read from the device, which only the training thread may do."""
        return sum(map(_nbytes, self.tensors())) + self._nbytes_of_the_rest()

    def changing_nbytes(self) -> int:
        """The bytes of a copy that probably differ from an earlier one."""
        trained = (each for model in self.models for each in model.parameters())
        frozen = {id(each) for each in trained if not each.requires_grad}
        own = sum(_nbytes(each) for each in self.tensors() if id(each) not in frozen)
        return own + self._nbytes_of_the_rest()

    def _nbytes_of_the_rest(self) -> int:
        states = [list(optimizer.state.values()) for optimizer in self.optimizers]
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        return _nbytes([states, groups]) + _random_nbytes()


@dataclass(eq=False)
class TrainingState:
    """A copy of the state of a training."""

    parts: TrainingParts
    tensors: list[torch.Tensor]
    optimizers: list[tuple[list[dict[str, Any]], list[Any]]]
    """(settings of the groups, state of each parameter) of every optimizer."""
    others: list[dict[str, Any]]
    random: dict[str, Any]
    versions: list[int] = field(default_factory=list)
    """`_version` of each of the original `tensors`."""
    devices: dict[int, torch.device] = field(default_factory=dict)
    """id of a copy in `optimizers` → device of the original. The step counts (0-d) of fused and
    capturable optimizers are on the device, those of others on the host."""
    nbytes: int = 0

    @classmethod
    def take(cls, parts: TrainingParts, earlier: TrainingState | None = None) -> TrainingState:
        """Copy the present state to the host; tensors equal to those of `earlier` are shared."""
        if earlier is not None and len(earlier.optimizers) != len(parts.optimizers):
            earlier = None
        with torch.no_grad():
            live = [local(tensor.detach()) for tensor in parts.tensors()]
            versions = list(map(version_of, live))
            state = cls(
                parts,
                _tensors(live, versions, earlier),
                [
                    _optimizer_state(optimizer, earlier.optimizers[number] if earlier else None)
                    for number, optimizer in enumerate(parts.optimizers)
                ],
                [_copied(copy.copy(each.state_dict())) for each in parts.others],
                random_state(),
                versions,
            )
        for optimizer, saved in zip(parts.optimizers, state.optimizers, strict=True):
            state.devices |= _devices(optimizer, saved)
        state.nbytes = _nbytes([state.tensors, state.optimizers]) + state.unshared_nbytes
        return state

    @property
    def unshared_nbytes(self) -> int:
        """The bytes that no other copy shares."""
        return _nbytes(self.others) + _random_nbytes()

    def held(self) -> Iterator[torch.Tensor]:
        """The tensors of the copy, some of which other copies may share."""
        yield from self.tensors
        yield from _tensors_in(self.optimizers)

    def restore(self) -> None:
        """Write the state back into the training. Gradients are dropped, as before the first
        backward of a step."""
        parts = self.parts
        with torch.no_grad():
            for tensor, saved in zip(parts.tensors(), self.tensors, strict=True):
                local(tensor).copy_(saved)
                tensor.grad = None
            for optimizer, (groups, states) in zip(parts.optimizers, self.optimizers, strict=True):
                _restore_optimizer(optimizer, groups, states, self.devices)
        for each, saved_dict in zip(parts.others, self.others, strict=True):
            each.load_state_dict(_copied(saved_dict))
        restore_random_state(self.random)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _tensors(
    live: Sequence[torch.Tensor], versions: Sequence[int], earlier: TrainingState | None
) -> list[torch.Tensor]:
    """Copies of parameters and buffers. A tensor whose version has changed is copied at once. An
    equal version does not prove that nothing was written, since writes through `.data` do not
    change it; then the values are compared."""
    if earlier is None or len(earlier.tensors) != len(live):
        return [_copied(tensor) for tensor in live]
    return [
        _copied(tensor, before if version == old else None)
        for tensor, version, before, old in zip(
            live, versions, earlier.tensors, earlier.versions, strict=True
        )
    ]


def _optimizer_state(
    optimizer: Optimizer, earlier: tuple[list[dict[str, Any]], list[Any]] | None
) -> tuple[list[dict[str, Any]], list[Any]]:
    groups = [
        {key: _copied(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    parameters = _parameters(optimizer)
    before = earlier[1] if earlier and len(earlier[1]) == len(parameters) else None
    states = [
        _copied(optimizer.state[p], before[number] if before else None)
        if p in optimizer.state
        else None
        for number, p in enumerate(parameters)
    ]
    return groups, states


def _devices(
    optimizer: Optimizer, saved: tuple[list[dict[str, Any]], list[Any]]
) -> dict[int, torch.device]:
    groups, states = saved
    live = [
        [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        [optimizer.state.get(p) for p in _parameters(optimizer)],
    ]
    pairs = zip(_tensors_in([groups, states]), _tensors_in(live), strict=True)
    return {id(copied): original.device for copied, original in pairs}


def _restore_optimizer(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    states: list[Any],
    devices: Mapping[int, torch.device],
) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in [key for key in group if key != "params" and key not in saved]:
            del group[key]
        for key, value in saved.items():
            group[key] = _restored(group.get(key), value, devices)
    for parameter, state in zip(_parameters(optimizer), states, strict=True):
        if state is None:
            optimizer.state.pop(parameter, None)
        else:
            present = optimizer.state.get(parameter)
            optimizer.state[parameter] = _restored(present, state, devices)


def _restored(present: Any, saved: Any, devices: Mapping[int, torch.device]) -> Any:
    """A copy of `saved`: written into the tensor `present` if shape and dtype match, otherwise on
    the device of the original."""
    match saved:
        case torch.Tensor():
            if (
                isinstance(present, torch.Tensor)
                and local(present).shape == saved.shape
                and present.dtype == saved.dtype
            ):
                local(present).copy_(saved)
                return present
            return saved.to(devices.get(id(saved), saved.device), copy=True)
        case dict():
            held = present if isinstance(present, dict) else {}
            return {k: _restored(held.get(k), v, devices) for k, v in saved.items()}
        case list() | tuple():
            same = isinstance(present, (list, tuple)) and len(present) == len(saved)
            old = present if same else [None] * len(saved)
            parts = [_restored(o, v, devices) for o, v in zip(old, saved, strict=True)]
            return parts if isinstance(saved, list) else tuple(parts)
        case _:
            return copy.deepcopy(saved)


def _copied(value: Any, earlier: Any = None) -> Any:
    """A copy on the host that shares no memory with `value`. Tensors that have not changed are
    shared with an `earlier` copy."""
    match value:
        case torch.Tensor():
            present = local(value.detach())
            if not isinstance(earlier, torch.Tensor):
                return present.to("cpu", copy=True)
            on_host = present if present.device.type == "cpu" else present.to("cpu")
            if _same_bits(on_host, earlier):
                return earlier
            return on_host.clone() if on_host is present else on_host
        case dict():
            before = earlier if isinstance(earlier, dict) else {}
            return {key: _copied(part, before.get(key)) for key, part in value.items()}
        case list():
            return [_copied(part) for part in value]
        case tuple() if type(value) is tuple:
            return tuple(_copied(part) for part in value)
        case _:
            return copy.deepcopy(value)


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype of each element size, to compare bits: nan equals itself, and 0 differs from
-0."""


def _same_bits(some: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors on the host are equal bit for bit; ends at the first difference."""
    bits = BITS.get(some.element_size())
    if bits is None or some.is_quantized or some.layout is not torch.strided:
        return False
    if some.dtype != other.dtype or some.shape != other.shape or some.stride() != other.stride():
        return False
    return torch.equal(some.view(bits), other.view(bits))


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    match value:
        case torch.Tensor():
            yield value
        case dict():
            for part in value.values():
                yield from _tensors_in(part)
        case list() | tuple():
            for part in value:
                yield from _tensors_in(part)


def _nbytes(value: Any) -> int:
    match value:
        case torch.Tensor():
            held = local(value)
            return held.numel() * held.element_size()
        case np.ndarray():
            return value.nbytes
        case dict():
            return sum(_nbytes(part) for part in value.values())
        case list() | tuple():
            return sum(_nbytes(part) for part in value)
        case _:
            return 0


@cache
def _random_nbytes() -> int:
    """The bytes of a copy of the generators' states; Python's is a tuple of integers."""
    state = random_state()
    _, words, _ = state["python"]
    return _nbytes([state["torch"], state["numpy"]]) + sum(map(sys.getsizeof, (words, *words)))


@dataclass(frozen=True, eq=False)
class TrainingSnapshot:
    """The state of a training at the end of a step."""

    step: int
    state: TrainingState
    edits: Any
    """The changes of settings, from `LiveEdits.snapshot`."""


class SnapshotStore:
    """The snapshots of one training, by step."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        """Bytes of all snapshots; a tensor that several of them share counts once."""
        self._kept: list[TrainingSnapshot] = []
        self._holders: Counter[int] = Counter()
        """id of a tensor → number of snapshots that hold it."""

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(each.step for each in self._kept)

    def add(self, snapshot: TrainingSnapshot) -> None:
        """Keep a snapshot, and drop those that their neighbours replace best until the rest fits
        the budget."""
        steps = self.steps
        if snapshot.step in steps:
            self._drop(steps.index(snapshot.step))
        self._kept.insert(bisect_right(self.steps, snapshot.step), snapshot)
        self.nbytes += snapshot.state.unshared_nbytes
        for tensor in snapshot.state.held():
            self._holders[id(tensor)] += 1
            if self._holders[id(tensor)] == 1:
                self.nbytes += tensor.nbytes
        while len(self._kept) > 2 and (
            self.nbytes > self.budget_bytes or len(self._kept) > MAX_KEPT
        ):
            self._drop(self._least_needed(snapshot.step))

    def _drop(self, index: int) -> None:
        state = self._kept.pop(index).state
        self.nbytes -= state.unshared_nbytes
        for tensor in state.held():
            self._holders[id(tensor)] -= 1
            if not self._holders[id(tensor)]:
                del self._holders[id(tensor)]
                self.nbytes -= tensor.nbytes

    def _least_needed(self, now: int) -> int:
        """Index of the snapshot without which the fewest steps are repeated, in proportion to its
        distance from `now`. The first one, from which every step can be reached, stays."""

        def cost(index: int) -> float:
            gap = self._kept[index + 1].step - self._kept[index - 1].step
            return gap / (1 + abs(now - self._kept[index].step))

        return min(range(1, len(self._kept) - 1), key=cost)

    def before(self, step: int) -> TrainingSnapshot | None:
        """The nearest snapshot at or before `step`."""
        kept = tuple(self._kept)  # the training thread may add a snapshot meanwhile
        position = bisect_right(kept, step, key=lambda each: each.step)
        return kept[position - 1] if position else None

    def forget_after(self, step: int) -> None:
        """Drop the snapshots of later steps, which this training will not repeat."""
        while self._kept and self._kept[-1].step > step:
            self._drop(-1)


def interval(copy_s: float, step_s: float) -> int:
    """Steps between two snapshots if each takes `copy_s` seconds and a step `step_s`."""
    if step_s <= 0:
        return 1
    return min(MAX_INTERVAL, max(1, math.ceil(copy_s / (MAX_SHARE * step_s))))
