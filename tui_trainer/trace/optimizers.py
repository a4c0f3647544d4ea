"""The optimizers of a run: their names, the parameters they train and their measurers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import torch

from tui_trainer.protocol.messages import Level
from tui_trainer.protocol.schema import ParameterInfo, Table
from tui_trainer.trace.measurement import StepMeasurer
from tui_trainer.trace.module_calls import RootModules
from tui_trainer.trace.parameters import Names, group_sizes, track_parameters
from tui_trainer.trace.probe import Options, Probe, RecorderLike
from tui_trainer.trace.schedule import (
    ActiveProbe,
    GovernedProbe,
    Governor,
    OptimizerSlot,
    shapes_of,
)
from tui_trainer.trace.transfer import StepQueue

Optimizer = torch.optim.Optimizer


class OptimizerRegistry:
    """Optimizers by identity. An optimizer that dies takes its measurer with it."""

    def __init__(
        self,
        recorder: RecorderLike,
        roots: RootModules,
        probes: Sequence[type[Probe]],
        options: Options,
    ) -> None:
        self._recorder = recorder
        self._roots = roots
        self._probes = probes
        self._options = options
        self._names = Names()
        self._meters: dict[int, tuple[weakref.ref[Optimizer], StepMeasurer]] = {}
        self.outbox = StepQueue()
        self._pending: list[weakref.ref[Optimizer]] = []
        self._infos: list[ParameterInfo] = []
        self._positions: dict[str, int] = {}
        self._roles: list[OptimizerSlot] = []
        self._phases_unseen: dict[str, str] = {}

    @property
    def measurers(self) -> list[StepMeasurer]:
        """Of the optimizers that are alive, in order of their appearance."""
        # A list first: an optimizer may die meanwhile, and a probe's rows ask from another thread.
        return [measurer for _, measurer in list(self._meters.values())]

    # ------------------------------------------------------------ finding

    def seen(self, optimizer: Optimizer) -> None:
        """An optimizer showed itself; it is registered once its model can be named."""
        if id(optimizer) not in self._meters and not any(r() is optimizer for r in self._pending):
            self._pending.append(weakref.ref(optimizer))
            self._look_for_roots(id(p) for group in optimizer.param_groups for p in group["params"])

    def register_pending(self) -> None:
        """Register those that were seen."""
        if self._pending:
            pending, self._pending = self._pending, []
            for optimizer in (reference() for reference in pending):
                if optimizer is not None:
                    self.meter_for(optimizer)

    def search(self, parameter: torch.Tensor | None) -> None:
        """Look among all objects for the optimizers that update `parameter` (None: any).

        Some 50 ms: for a script whose optimizer has not shown itself before its first clipping.
        """
        self.register_pending()
        if parameter is not None and self.meter_of(parameter) is not None:
            return
        for thing in gc.get_objects():
            if issubclass(type(thing), Optimizer) and hasattr(thing, "param_groups"):
                own = {id(p) for group in thing.param_groups for p in group["params"]}
                if own and (parameter is None or id(parameter) in own):
                    self.meter_for(thing)

    def meter_of(self, parameter: torch.Tensor) -> StepMeasurer | None:
        """The measurer of the optimizer that updates this parameter, if it is known."""
        return next((m for m in self.measurers if id(parameter) in m.tracked.ids), None)

    def meters_of(self, parameters: Any) -> list[StepMeasurer]:
        """The measurers of the optimizers that update any of these, looked for if none is known."""
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for _ in range(2):
            found = [m for m in self.measurers if any(id(p) in m.tracked.ids for p in given)]
            if found or not given:
                return found
            self.search(given[0])
        return []

    def optimizer_of(self, measurer: StepMeasurer) -> Optimizer | None:
        """The optimizer that this measurer measures."""
        return next((ref() for ref, m in self._meters.values() if m is measurer), None)

    def meter_for(self, optimizer: Optimizer) -> StepMeasurer:
        """The measurer of this optimizer: made on its first appearance, and anew when it is given
        other parameters (then under a further name, since its tables have other columns)."""
        known = self._meters.get(id(optimizer))
        if (
            known is not None
            and known[0]() is optimizer
            and known[1].tracked.group_sizes == group_sizes(optimizer)
        ):
            return known[1]
        return self._register(optimizer)

    def _look_for_roots(self, trained: Iterable[int]) -> None:
        """Look for a further model if none that is known holds all of these (identities)."""
        rooted = {id(p) for root in self._roots.modules for p in root.parameters()}
        if any(key not in rooted for key in trained):
            self._roots.discover()

    # ------------------------------------------------------------ registering

    def _register(self, optimizer: Optimizer) -> StepMeasurer:
        role = self._take_over(optimizer) or self._new_role(optimizer)
        name, roots = role.name, self._roots.modules
        tracked = track_parameters(
            optimizer, name, role.key, roots, self._names, lambda n, p: self._index(n, p, name)
        )
        role.trains(tracked.models)
        for model in tracked.models:
            for other, parameter in self._names.parameters(model):
                if id(parameter) not in tracked.ids:
                    self._index(other, parameter, "")
        self._look_for_roots(tracked.ids)
        measurer = StepMeasurer(
            tracked,
            self._probes,
            self._recorder,
            self._options,
            Governor(self._options.budget, self._cadence_changed),
            role,
        )
        for slot in measurer.slots:
            slot.probe.on_unseen_change = self._probe_unseen
            if slot.probe.partly_unseen:
                self._recorder.notice("unseen", slot.probe.partly_unseen, "warning")
        tracked.models.clear()  # a measurer keeps parameters alive, not the models around them
        tracked.modules.clear()
        key_of = id(optimizer)
        reference = weakref.ref(optimizer, lambda _: self._meters.pop(key_of, None))
        self._meters[key_of] = (reference, measurer)
        self._describe()
        return measurer

    def _new_role(self, optimizer: Optimizer) -> OptimizerSlot:
        names = {role.name for role in self._roles}
        name = base = type(optimizer).__name__.lower()
        number = 2
        while name in names:
            name, number = f"{base}#{number}", number + 1
        key = name if names else ""
        reference = weakref.ref(optimizer)
        role = OptimizerSlot(name, key, type(optimizer), shapes_of(optimizer), reference)
        self._roles.append(role)
        return role

    def _take_over(self, optimizer: Optimizer) -> OptimizerSlot | None:
        """The role of an optimizer that is gone, where this one comes in its place."""
        role = next((r for r in self._roles if r.over and r.fits(optimizer)), None)
        if role is not None:
            self._meters.pop(id(role.optimizer()), None)
            role.hand_over(optimizer)
            self._names.let_go()
            text = f"{role.name} goes on with another model of the same shapes: the last is gone"
            self._recorder.notice("state", text)
        return role

    def _index(self, name: str, parameter: torch.Tensor, optimizer: str) -> int:
        """The position of a parameter in `RunInfo.parameters`; positions never change."""
        position = self._positions.get(name)
        if position is None:
            position = self._positions[name] = len(self._infos)
            self._infos.append(
                ParameterInfo(
                    name=name,
                    shape=tuple(parameter.shape),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    numel=parameter.numel(),
                    optimizer=optimizer,
                    trainable=parameter.requires_grad,
                )
            )
        elif optimizer:
            self._infos[position] = msgspec.structs.replace(
                self._infos[position], optimizer=optimizer
            )
        return position

    def _describe(self) -> None:
        measurers = self.measurers
        self._recorder.describe(
            parameters=tuple(self._infos),
            optimizers=tuple(role.name for role in self._roles),
            attention=tuple(a for m in measurers for s in m.slots for a in s.probe.attention),
            unseen=self._unseen(),
        )

    def _unseen(self) -> dict[str, str]:
        """What no optimizer's probes can see, or one's alone, and the phases that never come."""
        unseen = dict(self._phases_unseen)
        at_work = {slot.name for measurer in self.measurers for slot in measurer.slots}
        for measurer in self.measurers:
            unseen |= {n: why for n, why in measurer.unseen.items() if n not in at_work}
        reasons = [
            (slot.name, measurer.tracked.name, slot.probe.unseen)
            for measurer in self.measurers
            for slot in measurer.slots
        ]
        seen = {name for name, _, why in reasons if not why}
        for name, optimizer, why in reasons:
            if why:
                unseen.setdefault(name if name not in seen else f"{name}@{optimizer}", why)
        return unseen

    def phases_unseen(self, reasons: dict[str, str]) -> None:
        """The phases that this script does not seem to have, and why they cannot be shown."""
        if reasons != self._phases_unseen:
            self._phases_unseen = reasons
            self._recorder.describe(unseen=self._unseen())

    def _probe_unseen(self) -> None:
        """A probe found out while running that there is nothing for it to see; or that there is."""
        self._recorder.describe(unseen=self._unseen())

    def _cadence_changed(self, governed: Sequence[GovernedProbe], text: str, level: Level) -> None:
        tables: list[Table] = []
        for slot in governed:
            assert isinstance(slot, ActiveProbe)
            slot.tables = [msgspec.structs.replace(t, every=slot.now) for t in slot.tables]
            tables += slot.tables
        if tables:
            self._recorder.declare(tables)
        self._recorder.notice("cadence", text, level)
