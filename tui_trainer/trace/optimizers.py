"""The optimizers of a run: how they are found, what they are called, and who measures them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import torch

from tui_trainer.protocol.messages import Level
from tui_trainer.protocol.schema import ParameterInfo, Table
from tui_trainer.trace.governor import GovernedProbe
from tui_trainer.trace.measurement import StepMeasurer
from tui_trainer.trace.module_calls import RootModules
from tui_trainer.trace.optimizer_slot import OptimizerSlot, shapes_of
from tui_trainer.trace.parameters import Names, group_sizes, track_parameters
from tui_trainer.trace.probe import Options, Probe, RecorderLike
from tui_trainer.trace.schedule import ActiveProbe

Optimizer = torch.optim.Optimizer


class OptimizerRegistry:
    """Optimizers by identity. An optimizer that is freed takes its measurer with it."""

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
        self._measurers: dict[int, tuple[weakref.ref[Optimizer], StepMeasurer]] = {}
        self._pending: list[weakref.ref[Optimizer]] = []
        self._infos: list[ParameterInfo] = []
        self._positions: dict[str, int] = {}
        self._slots: list[OptimizerSlot] = []
        self._phases_unseen: dict[str, str] = {}

    @property
    def measurers(self) -> list[StepMeasurer]:
        """Of the optimizers that are alive, in order of registration."""
        # A copy first: an optimizer may be freed meanwhile, and another thread may ask.
        return [measurer for _, measurer in list(self._measurers.values())]

    # ------------------------------------------------------------ finding optimizers

    def add_pending(self, optimizer: Optimizer) -> None:
        """Register an optimizer later, once its model has been called and can give it names."""
        known = id(optimizer) in self._measurers
        if not known and not any(r() is optimizer for r in self._pending):
            self._pending.append(weakref.ref(optimizer))
            self._search_roots(id(p) for group in optimizer.param_groups for p in group["params"])

    def register_pending(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            for optimizer in (reference() for reference in pending):
                if optimizer is not None:
                    self.measurer_for(optimizer)

    def search(self, parameter: torch.Tensor | None) -> None:
        """Look among all objects for the optimizers that update `parameter` (None: any).

        Some 50 ms: for a script whose optimizer is not known before its first clipping.
        """
        self.register_pending()
        if parameter is not None and self._measurer_of(parameter) is not None:
            return
        for thing in gc.get_objects():
            if issubclass(type(thing), Optimizer) and hasattr(thing, "param_groups"):
                own = {id(p) for group in thing.param_groups for p in group["params"]}
                if own and (parameter is None or id(parameter) in own):
                    self.measurer_for(thing)

    def measurers_of(self, parameters: Any) -> list[StepMeasurer]:
        """The measurers of the optimizers that update any of these; they are searched if none is
        known."""
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for _ in range(2):
            found = [m for m in self.measurers if any(id(p) in m.tracked.ids for p in given)]
            if found or not given:
                return found
            self.search(given[0])
        return []

    def optimizer_of(self, measurer: StepMeasurer) -> Optimizer | None:
        return next((ref() for ref, m in self._measurers.values() if m is measurer), None)

    def measurer_for(self, optimizer: Optimizer) -> StepMeasurer:
        """The measurer of this optimizer. A new one is made on its first appearance and when it is
        given other parameters (under another name, since its tables have other columns)."""
        known = self._measurers.get(id(optimizer))
        if (
            known is not None
            and known[0]() is optimizer
            and known[1].tracked.group_sizes == group_sizes(optimizer)
        ):
            return known[1]
        return self._register(optimizer)

    def _measurer_of(self, parameter: torch.Tensor) -> StepMeasurer | None:
        return next((m for m in self.measurers if id(parameter) in m.tracked.ids), None)

    def _search_roots(self, trained: Iterable[int]) -> None:
        """Look for another model if no known one holds all of these parameters (identities)."""
        rooted = {id(p) for root in self._roots.modules for p in root.parameters()}
        if any(key not in rooted for key in trained):
            self._roots.search()

    # ------------------------------------------------------------ registering

    def _register(self, optimizer: Optimizer) -> StepMeasurer:
        slot = self._take_over(optimizer) or self._new_slot(optimizer)
        tracked = track_parameters(
            optimizer,
            slot.name,
            slot.key,
            self._roots.modules,
            self._names,
            lambda name, parameter: self._index(name, parameter, slot.name),
        )
        slot.set_models(tracked.models)
        for model in tracked.models:
            for name, parameter in self._names.parameters(model):
                if id(parameter) not in tracked.ids:
                    self._index(name, parameter, "")
        self._search_roots(tracked.ids)
        measurer = StepMeasurer(
            tracked, self._probes, self._recorder, self._options, slot, self._cadence_changed
        )
        for active in measurer.probes:
            active.probe.on_unseen_change = self._describe_unseen
            if active.probe.partly_unseen:
                self._recorder.notice("unseen", active.probe.partly_unseen, "warning")
        # A measurer keeps the parameters alive, and nothing else of the model.
        tracked.models.clear()
        tracked.modules.clear()
        key = id(optimizer)
        reference = weakref.ref(optimizer, lambda _: self._measurers.pop(key, None))
        self._measurers[key] = (reference, measurer)
        self._describe()
        return measurer

    def _new_slot(self, optimizer: Optimizer) -> OptimizerSlot:
        names = {slot.name for slot in self._slots}
        name = base = type(optimizer).__name__.lower()
        number = 2
        while name in names:
            name, number = f"{base}#{number}", number + 1
        key = name if names else ""
        reference = weakref.ref(optimizer)
        slot = OptimizerSlot(name, key, type(optimizer), shapes_of(optimizer), reference)
        self._slots.append(slot)
        return slot

    def _take_over(self, optimizer: Optimizer) -> OptimizerSlot | None:
        """The slot of an optimizer that is gone, where this one replaces it."""
        slot = next((s for s in self._slots if s.vacant and s.fits(optimizer)), None)
        if slot is not None:
            self._measurers.pop(id(slot.optimizer()), None)
            slot.occupy(optimizer)
            self._names.release()
            text = f"{slot.name} continues with a new model of the same shapes: the last was freed"
            self._recorder.notice("state", text)
        return slot

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

    # ------------------------------------------------------------ telling the recorder

    def set_phases_unseen(self, reasons: dict[str, str]) -> None:
        """The phases that this script does not seem to have, with the reasons."""
        if reasons != self._phases_unseen:
            self._phases_unseen = reasons
            self._describe_unseen()

    def _describe(self) -> None:
        measurers = self.measurers
        self._recorder.describe(
            parameters=tuple(self._infos),
            optimizers=tuple(slot.name for slot in self._slots),
            attention=tuple(a for m in measurers for p in m.probes for a in p.probe.attention),
            unseen=self._unseen(),
        )

    def _describe_unseen(self) -> None:
        self._recorder.describe(unseen=self._unseen())

    def _unseen(self) -> dict[str, str]:
        """Why a quantity is missing: for all optimizers under its name, for one of several under
        `name@optimizer`."""
        unseen = dict(self._phases_unseen)
        active = {probe.name for measurer in self.measurers for probe in measurer.probes}
        for measurer in self.measurers:
            unseen |= {n: why for n, why in measurer.unseen.items() if n not in active}
        reasons = [
            (probe.name, measurer.tracked.name, probe.probe.unseen)
            for measurer in self.measurers
            for probe in measurer.probes
        ]
        seen = {name for name, _, why in reasons if not why}
        for name, optimizer, why in reasons:
            if why:
                unseen.setdefault(name if name not in seen else f"{name}@{optimizer}", why)
        return unseen

    def _cadence_changed(self, changed: Sequence[GovernedProbe], text: str, level: Level) -> None:
        tables: list[Table] = []
        for probe in changed:
            assert isinstance(probe, ActiveProbe)
            probe.tables = [msgspec.structs.replace(t, every=probe.now) for t in probe.tables]
            tables += probe.tables
        if tables:
            self._recorder.declare(tables)
        self._recorder.notice("cadence", text, level)
