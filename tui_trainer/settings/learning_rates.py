"""Changes the learning rate of a script, also where a scheduler or the script itself sets it.

* A scheduler of PyTorch: its base rates are scaled by the same factor, so that its curve continues
  from the new value.
* The script itself, in every step: its values are multiplied by the factor for the duration of the
  optimizer's step. This case is detected one step after the change.
* Neither: the new value stays.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from tui_trainer.protocol.settings import setting_text
from tui_trainer.record.recorder import Recorder
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.optimizer_registry import unwrapped_optimizer
from tui_trainer.trace.script_frames import objects_of_script
from tui_trainer.trace.torch_private import inner_schedulers
from tui_trainer.trace.tracer import Tracer

Group = dict[str, Any]
Undo = Callable[[], None]
BASE_RATES = ("base_lrs", "max_lrs")
"""Attributes of schedulers: lists with a rate for each group, from which they compute."""
SEARCH_EVERY = 64
"""Snapshots after which all objects are searched for schedulers again."""
GROUP_RATES = ("initial_lr", "max_lr", "min_lr")
"""Keys of such rates in the parameter groups (OneCycleLR)."""


class LearningRates:
    """Changes the learning rates of a script's optimizers."""

    def __init__(self, tracer: Tracer, gate: Gate, recorder: Recorder) -> None:
        self._tracer = tracer
        self._gate = gate
        self._recorder = recorder
        self._factors: dict[int, tuple[weakref.ref[Optimizer], int, float]] = {}
        """id(group) → (optimizer, number of the group, factor on the values that the script
        sets)."""
        self._held: list[tuple[Group, Any]] = []

    def change(self, targets: Sequence[tuple[Optimizer, Group]], value: float) -> Undo:
        """Set the rate of these groups; returns a function that undoes it. Called on the training
        thread."""
        undos = [self._change(optimizer, group, value) for optimizer, group in targets]
        if any(schedulers_of(optimizer) for optimizer, _ in targets):
            check = None
        else:
            check = self._check_next_step(targets, value, undos)

        def undo() -> None:
            if check in self._gate.after_step:
                self._gate.after_step.remove(check)
            for _, each in reversed(undos):
                each()

        return undo

    def _change(self, optimizer: Optimizer, group: Group, value: float) -> tuple[float, Undo]:
        old = float(group["lr"])
        factor = value / old if old else None
        known = self._factors.get(id(group))
        if known is not None:  # the group holds the script's value times the factor now
            return old, self._scale_script(optimizer, group, (known[2] * factor) if factor else 0.0)
        restored = [
            _scale(holder, key, factor, value)
            for scheduler in schedulers_of(optimizer)
            for holder, key in _rates_of(scheduler, optimizer, group)
        ]
        set_rate(group, value)

        def undo() -> None:
            for restore in restored:
                restore()
            # A scheduler may have changed the rate since.
            set_rate(group, float(group["lr"]) / factor if restored and factor else old)

        return old, undo

    def note(self, optimizers: Sequence[Optimizer]) -> str:
        """Text that says what else sets the rate; "" for nothing."""
        if any(ref() in optimizers for ref, _, _ in self._factors.values()):
            return "the script sets it; its values are scaled"
        return ", ".join(self.schedulers(optimizers))

    @staticmethod
    def schedulers(optimizers: Sequence[Optimizer]) -> list[str]:
        """Class names of the schedulers that set the rate, without those inside other
        schedulers."""
        found = [each for optimizer in optimizers for each in schedulers_of(optimizer)]
        inner = {id(part) for each in found for part in inner_schedulers(each)}
        return list(dict.fromkeys(type(each).__name__ for each in found if id(each) not in inner))

    # ------------------------------------------------------------ a script that sets it itself

    def _check_next_step(
        self,
        targets: Sequence[tuple[Optimizer, Group]],
        value: float,
        undos: list[tuple[float, Undo]],
    ) -> Callable[[int], None]:
        """Install a check after the next step of whether the script has set another rate, and
        return it. `undos`: (previous rate, function that restores it) of each target."""
        old = [before for before, _ in undos]
        first = self._gate.completed

        def check(step: int) -> None:
            if step <= first:
                return
            self._gate.after_step.remove(check)
            replaced = [
                (optimizer, group, before)
                for (optimizer, group), before in zip(targets, old, strict=True)
                if float(group["lr"]) != value and before and id(group) not in self._factors
            ]
            if not replaced:
                return
            for optimizer, group, before in replaced:
                undos.append((before, self._scale_script(optimizer, group, value / before)))
            group, before = replaced[0][1:]
            text = (
                f"the script itself set the learning rate of step {step:,} to "
                f"{setting_text(float(group['lr']))}; from step {step + 1:,} on its values are "
                f"multiplied by {value / before:.4g}"
            )
            self._recorder.notice("edit", text, "warning", step)

        self._gate.after_step.append(check)
        return check

    def _scale_script(self, optimizer: Optimizer, group: Group, factor: float) -> Undo:
        before = self._factors.get(id(group))
        number = next((n for n, g in enumerate(optimizer.param_groups) if g is group), 0)
        self._set_factor(id(group), (weakref.ref(optimizer), number, factor))
        return lambda: self._set_factor(id(group), before)

    def _set_factor(
        self, key: int, entry: tuple[weakref.ref[Optimizer], int, float] | None
    ) -> None:
        if entry is None:
            self._factors.pop(key, None)
        else:
            self._factors[key] = entry
        if self._factors:
            self._tracer.observers.rates = self

    def step_began(self, optimizer: Optimizer) -> None:
        """See `trace.tracer.UpdateObserver`."""
        for group in optimizer.param_groups:
            entry = self._factors.get(id(group))
            if entry is not None and entry[0]() is optimizer:
                self._held.append((group, group["lr"]))
                group["lr"] = group["lr"] * entry[2]

    def step_ended(self, optimizer: Optimizer) -> None:
        """Restore the learning rate after a step."""
        held, self._held = self._held, []
        for group, rate in held:
            group["lr"] = rate
        if not self._factors:
            self._tracer.observers.rates = None

    # ------------------------------------------------------------ snapshots

    def snapshot(self) -> Any:
        return dict(self._factors)

    def restore(self, snapshot: Any) -> None:
        for key in {*self._factors, *snapshot}:
            self._set_factor(key, snapshot.get(key))


def set_rate(group: Group, value: float) -> None:
    rate = group["lr"]
    if isinstance(rate, torch.Tensor):  # which a compiled optimizer reads
        rate.fill_(value)
    else:
        group["lr"] = value


class KnownSchedulers:
    """Finds the schedulers of a script's optimizers, for snapshots.

    A search through all objects of the process takes tens of milliseconds. It happens at the first
    snapshot, the second, the fourth, the eighth and so on, at every SEARCH_EVERY-th, and when the
    optimizers have changed. Schedulers in variables of the script are always found.
    """

    def __init__(self) -> None:
        self._found: list[weakref.ref[Any]] = []
        self._optimizers: frozenset[int] = frozenset()
        self._count = 0

    def of(self, optimizers: Sequence[Optimizer]) -> list[Any]:
        self._count += 1
        wanted = frozenset(map(id, optimizers))
        power_of_two = not self._count & (self._count - 1)
        if wanted != self._optimizers or power_of_two or not self._count % SEARCH_EVERY:
            self._optimizers = wanted
            searched = [each for optimizer in optimizers for each in schedulers_of(optimizer)]
            self._found = [weakref.ref(each) for each in searched]
        known = [each for ref in self._found if (each := ref()) is not None]
        held = [*known, *objects_of_script(LRScheduler)]
        found = {id(s): s for optimizer in optimizers for s in _belonging(held, optimizer)}
        return list(found.values())


def schedulers_of(optimizer: Optimizer) -> list[Any]:
    """The schedulers that set this optimizer's rate, found as objects that refer to it."""
    return _belonging(list(_referring(optimizer)), optimizer)


def _belonging(schedulers: Sequence[Any], optimizer: Optimizer) -> list[Any]:
    """The members of `schedulers`, and schedulers inside them, that set this optimizer's rate."""
    found: dict[int, Any] = {}
    for scheduler in _with_inner(schedulers):
        owner = getattr(scheduler, "optimizer", None)
        if isinstance(owner, Optimizer) and unwrapped_optimizer(owner) is optimizer:
            found.setdefault(id(scheduler), scheduler)
    return list(found.values())


def _referring(optimizer: Optimizer) -> Iterator[Any]:
    for referrer in gc.get_referrers(optimizer):
        # The types, not isinstance(), which would run the code of lazy objects.
        if issubclass(type(referrer), LRScheduler):
            yield referrer
        elif type(referrer) is dict:
            for owner in gc.get_referrers(referrer):
                if issubclass(type(owner), LRScheduler) and vars(owner) is referrer:
                    yield owner


def _with_inner(schedulers: Sequence[Any]) -> Iterator[Any]:
    """`schedulers`, and those inside SequentialLR and ChainedScheduler."""
    for scheduler in schedulers:
        yield scheduler
        yield from _with_inner(inner_schedulers(scheduler))


def _rates_of(scheduler: Any, optimizer: Optimizer, group: Group) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every rate from which the scheduler computes the group's rate."""
    owner = scheduler.optimizer
    number = next((n for n, g in enumerate(owner.param_groups) if g is group), None)
    for name in BASE_RATES:
        rates = getattr(scheduler, name, None)
        if isinstance(rates, list) and number is not None and number < len(rates):
            yield rates, number
    if type(scheduler).__name__ == "OneCycleLR":
        for key in GROUP_RATES:
            if key in group:
                yield group, key


def _scale(holder: Any, key: Any, factor: float | None, value: float) -> Undo:
    """Scale a rate; without a factor, since the present rate is 0, set it to `value`."""
    before = holder[key]
    holder[key] = before * factor if factor is not None else value

    def restore() -> None:
        holder[key] = before

    return restore
