"""Finds and names the optimizers of a run, and creates a measurer for each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import torch

from tui_trainer.protocol.events import Level
from tui_trainer.protocol.schema import ParameterInfo, Table
from tui_trainer.trace.governor import ActiveProbe
from tui_trainer.trace.module_calls import RootModules
from tui_trainer.trace.optimizer_slot import OptimizerSlot, shapes_of
from tui_trainer.trace.parameters import Names, TrackedParameters, parameters_of, track_parameters
from tui_trainer.trace.probe import Probe, ProbeOptions, RecorderLike
from tui_trainer.trace.script_changes import WeightWatch
from tui_trainer.trace.script_frames import may_be_stepped, objects_of_script, variable_of
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.torch_private import is_sharded

Optimizer = torch.optim.Optimizer
RECOUNT_EVERY = 200
"""Steps between two counts of a model's parameters: some ways to add a layer call no hook."""
NEVER_STEPPED = (
    "the script never calls step() of its optimizer ({}): each update of the weights that it makes "
    "by itself counts as a step"
)
WATCHED_UNSTEPPED = 16
"""Number of parameters that are compared until an optimizer first steps, to see whether the script
updates them by itself."""
INNER_ATTRIBUTES = ("optimizer", "_optimizer", "optim", "base_optimizer", "_base_optimizer")
"""Attributes in which a wrapper keeps its inner optimizer (Accelerate, Lightning, SAM, …)."""


def inner_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer that `optimizer` wraps; None without one."""
    held = vars(optimizer)
    found = (held.get(name) for name in INNER_ATTRIBUTES)
    return next((inner for inner in found if isinstance(inner, Optimizer)), None)


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps, inside wrappers that are optimizers themselves.

    A wrapper with more parameters than its inner optimizer (ZeRO, which gives each rank a part of
    the parameters) is not unwrapped.
    """
    while (inner := inner_optimizer(optimizer)) is not None:
        own = {id(p) for p in parameters_of(optimizer)}
        if not own <= {id(p) for p in parameters_of(inner)}:
            break
        optimizer = inner
    return optimizer


def class_name(optimizer: Optimizer) -> str:
    """Name of the class of the innermost optimizer, in lower case."""
    if isinstance(optimizer, HandUpdates):
        return "by hand"
    while (inner := inner_optimizer(optimizer)) is not None:
        optimizer = inner
    return type(optimizer).__name__.lower()


class HandUpdates:
    """Stands in for the optimizer of a script that updates its weights by hand."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters)}]


class _Entry:
    """An optimizer that is measured."""

    def __init__(self, optimizer: Optimizer, measurer: StepMeasurer, structure: int) -> None:
        self.measurer = measurer
        self.group_sizes = group_sizes(optimizer)
        self.structure = structure
        """`OptimizerRegistry._structure` when it was registered."""
        self.recount_in = RECOUNT_EVERY


def group_sizes(optimizer: Optimizer) -> tuple[int, ...]:
    """Number of parameters in each group; differs after a group is added."""
    return tuple([len(group["params"]) for group in optimizer.param_groups])


class OptimizerRegistry:
    """The optimizers of a run by identity. The measurer of a freed optimizer is dropped."""

    def __init__(
        self,
        recorder: RecorderLike,
        roots: RootModules,
        probes: Sequence[type[Probe]],
        options: ProbeOptions,
    ) -> None:
        self._recorder = recorder
        self._roots = roots
        self._probes = probes
        self.options = options
        self._names = Names(self._is_one_of_several)
        self._entries: dict[int, tuple[weakref.ref[Optimizer], _Entry]] = {}
        self.measurers: tuple[StepMeasurer, ...] = ()
        """Measurers of the optimizers that are alive, in order of registration."""
        self._created: list[weakref.ref[Optimizer]] = []
        """Optimizers that exist and are not registered, since they may never be used."""
        self._pending: list[weakref.ref[Optimizer]] = []
        """Optimizers that are used and not registered yet."""
        self._searched = False
        """Whether optimizers that are older than the tracer were searched for."""
        self._structure = 0
        """Raised when a module of a model, or the set of optimizers, has changed."""
        self._modules: set[int] = set()
        """Identities of the modules of all models."""
        self._built: dict[int, weakref.ref[torch.nn.Module]] = {}
        """Modules that were given a parameter or a sub-module while the tracer was attached."""
        self._infos: list[ParameterInfo] = []
        self._positions: dict[str, int] = {}
        self._slots: list[OptimizerSlot] = []
        self._phases_unseen: dict[str, str] = {}
        self._loop_unseen: dict[str, str] = {}
        self._steppable: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        """Optimizer → whether the script may ever call its `step`, where that was determined."""
        self._set_aside: OptimizerSlot | None = None
        """The slot of an optimizer that has turned out never to step."""
        self._by_hand: HandUpdates | None = None
        self.by_hand: StepMeasurer | None = None
        """The measurer of a script that updates its weights by hand."""

    @property
    def names(self) -> Names:
        """Names of parameters and modules over all models."""
        return self._names

    def existing(self) -> list[tuple[str, Optimizer]]:
        """(name, optimizer) of all live optimizers, registered or not, without their wrappers."""
        slots = {id(ref()): entry.measurer.slot.name for ref, entry in self._entries.values()}
        optimizers = [each for each in self._optimizers() if isinstance(each, Optimizer)]
        found = {id(each): each for each in map(unwrapped_optimizer, optimizers)}
        return [(slots.get(key, class_name(each)), each) for key, each in found.items()]

    # ------------------------------------------------------------ finding optimizers

    def add_created(self, optimizer: Optimizer) -> None:
        """An optimizer was constructed."""
        self._created = [r for r in self._created if r() is not None]
        self._created.append(weakref.ref(optimizer))

    def add_pending(self, optimizer: Optimizer) -> None:
        """An optimizer is used: register it once its model has been called and can name it."""
        if id(optimizer) in self._entries:
            return
        optimizer = unwrapped_optimizer(optimizer)
        known = id(optimizer) in self._entries
        if not known and not any(r() is optimizer for r in self._pending):
            self._pending.append(weakref.ref(optimizer))
            self._search_roots(id(p) for group in optimizer.param_groups for p in group["params"])

    def refresh(self) -> None:
        """Before a forward, register pending optimizers, and register again those that were given
        parameters or whose models were given layers."""
        if not self._entries and not self._pending:
            self._register_only_one()
        if self._pending:
            pending, self._pending = self._pending, []
            for optimizer in (reference() for reference in pending):
                if optimizer is None:
                    continue
                if self._is_used(optimizer):
                    self.measurer_for(optimizer)
                elif not any(reference() is optimizer for reference in self._created):
                    self.add_created(optimizer)
        for reference, entry in list(self._entries.values()):
            entry.recount_in -= 1
            optimizer = reference()
            if optimizer is not None and self._outdated(optimizer, entry):
                self._register(optimizer, entry)

    def _register_only_one(self) -> None:
        """Register the only optimizer before the first forward of a loop that does not begin with
        `zero_grad`. Several optimizers have to wait: they are numbered in the order of their use.
        """
        created = {id(each): each for each in map(unwrapped_optimizer, self._optimizers())}
        if len(created) != 1:
            return
        (optimizer,) = created.values()
        if not self._is_used(optimizer):
            return
        own = {id(parameter) for parameter in parameters_of(optimizer)}
        if any(id(p) in own for model in self._roots.modules for p in model.parameters()):
            self.measurer_for(optimizer)

    def register_reached(self) -> list[StepMeasurer]:
        """After a backward, register the existing optimizers whose parameters have a gradient."""
        found = []
        if not (self._searched or self._created or self._entries):
            self._searched = True
            self._created = [weakref.ref(each) for each in objects_of_script(Optimizer)]
        if not self._created:
            return []
        created = [o for o in (reference() for reference in self._created) if o is not None]
        wrapped = {id(inner_optimizer(optimizer)) for optimizer in self._optimizers()}
        for optimizer in created:
            whole = unwrapped_optimizer(optimizer)
            if id(whole) in self._entries or (whole is optimizer and id(whole) in wrapped):
                continue
            if any(p.grad is not None for p in parameters_of(whole)) and self._is_used(whole):
                found.append(self.measurer_for(whole))
        return found

    def _is_used(self, optimizer: Optimizer) -> bool:
        """Whether the script may call the `step` of `optimizer`. A script may construct one, call
        its `zero_grad`, and yet update the weights by itself."""
        known = self._steppable.get(optimizer)
        if known is None:
            known = self._steppable[optimizer] = may_be_stepped(optimizer)
        return known

    def set_aside(self, measurer: StepMeasurer) -> None:
        """Drop the optimizer of `measurer`, which never steps although its weights change."""
        optimizer = self.optimizer_of(measurer)
        if optimizer is not None and not any(each.has_stepped for each in self.measurers):
            self._steppable[optimizer] = False
            self._set_aside = measurer.slot
            self._forget(id(optimizer))
            self.add_created(optimizer)

    def measurers_of(self, parameters: Any) -> list[StepMeasurer]:
        """The measurers of the optimizers that update any of `parameters`."""
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        return [m for m in self.measurers if not m.tracked.ids.keys().isdisjoint(map(id, given))]

    def optimizer_of(self, measurer: StepMeasurer) -> Optimizer | None:
        """The optimizer of `measurer`; None if it was freed, and for updates by hand."""
        for reference, entry in self._entries.values():
            if entry.measurer is measurer:
                found = reference()
                return found if isinstance(found, Optimizer) else None
        return None

    def measure_hand_updates(self, wanted: Sequence[torch.Tensor] = ()) -> StepMeasurer | None:
        """For a script without an optimizer that steps, measure the parameters of the models that
        it calls. None where no parameter has a gradient or is `wanted`."""
        if self._any_unregistered():
            return None
        ids = {id(p) for p in wanted}
        models = self._roots.modules
        parameters = [p for model in models for p in model.parameters() if p.requires_grad]
        if not any(p.grad is not None or id(p) in ids for p in parameters):
            return None
        for _, optimizer in self.existing():
            self._recorder.notice("state", NEVER_STEPPED.format(class_name(optimizer)))
        self._by_hand = HandUpdates(dict.fromkeys(parameters))
        measurer = self.measurer_for(self._by_hand)  # type: ignore[arg-type] # has `param_groups`
        measurer.weights = WeightWatch(measurer.tracked.parameters)
        return measurer

    def register_holders(self, parameters: Sequence[torch.Tensor]) -> None:
        """Register the existing optimizers that hold any of these parameters."""
        if not self._created or not parameters:
            return
        ids = {id(p) for p in parameters}
        for optimizer in [reference() for reference in self._created]:
            if optimizer is not None and any(id(p) in ids for p in parameters_of(optimizer)):
                whole = unwrapped_optimizer(optimizer)
                if self._is_used(whole):
                    self.measurer_for(whole)

    def stepping(self, optimizer: Optimizer, replacing: Callable[[], None]) -> StepMeasurer:
        """The measurer of `optimizer`, or of the one that it wraps, whose step begins. `replacing`
        is called before a new measurer takes the place of a former one."""
        known = self._entries.get(id(optimizer))
        if known is None or known[0]() is not optimizer:
            optimizer = unwrapped_optimizer(optimizer)
            known = self._entries.get(id(optimizer))
            if known is None or known[0]() is not optimizer:
                return self._register(optimizer, None)
        entry = known[1]
        if not self._outdated(optimizer, entry):
            return entry.measurer
        replacing()
        return self._register(optimizer, entry)

    def measurer_for(self, optimizer: Optimizer) -> StepMeasurer:
        """The measurer of `optimizer`. A new one is created when the optimizer is first seen, and
        when the set of parameters that are measured with it has changed."""
        known = self._entries.get(id(optimizer))
        if known is None or known[0]() is not optimizer:
            return self._register(optimizer, None)
        entry = known[1]
        return (
            self._register(optimizer, entry)
            if self._outdated(optimizer, entry)
            else (entry.measurer)
        )

    def _outdated(self, optimizer: Optimizer, entry: _Entry) -> bool:
        groups = optimizer.param_groups
        if entry.structure != self._structure or len(groups) != len(entry.group_sizes):
            return True
        for group, size in zip(groups, entry.group_sizes, strict=True):
            if len(group["params"]) != size:
                return True
        if entry.recount_in <= 0:
            entry.recount_in = RECOUNT_EVERY
            return self._count(entry.measurer.slot) != entry.measurer.slot.count
        return False

    def _measurer_of(self, parameter: torch.Tensor) -> StepMeasurer | None:
        return next((m for m in self.measurers if id(parameter) in m.tracked.ids), None)

    def search_further_roots(self) -> None:
        """Search for further models if no optimizer may step: a script without one may call
        several."""
        if not self._entries and not self._any_unregistered():
            self._roots.search()

    def _any_unregistered(self) -> bool:
        """Whether an optimizer exists that may step and is not registered yet."""
        optimizers = [reference() for reference in (*self._created, *self._pending)]
        return any(o is not None and self._is_used(unwrapped_optimizer(o)) for o in optimizers)

    def _search_roots(self, trained: Iterable[int]) -> None:
        """Search for another model if no known one has all parameters with the ids `trained`."""
        rooted = {id(p) for root in self._roots.modules for p in root.parameters()}
        if any(key not in rooted for key in trained):
            self._roots.search()

    # ------------------------------------------------------------ registering

    def module_changed(self, module: torch.nn.Module) -> None:
        """A sub-module or a parameter is assigned to `module`."""
        key = id(module)
        if key in self._modules:
            self._structure += 1
        if key not in self._built:
            self._built[key] = weakref.ref(module, lambda _: self._built.pop(key, None))

    def _register(self, optimizer: Optimizer, entry: _Entry | None) -> StepMeasurer:
        before = self._waiting_by_hand(optimizer) if entry is None else entry.measurer
        slot = before.slot if before else self._take_over(optimizer) or self._new_slot(optimizer)
        tracked = track_parameters(
            optimizer,
            slot.name,
            slot.key,
            self._roots.modules,
            self._other_modules,
            self._names,
            self._held(optimizer, slot),
            self._measured_names(),
            [model for model in (reference() for reference in slot.models) if model is not None]
            if entry is not None
            else [],
        )
        if entry is not None and _same(entry.measurer.tracked, tracked):
            entry.structure, entry.group_sizes = self._structure, group_sizes(optimizer)
            slot.set_models(tracked.models)
            slot.count = self._count(slot)
            return entry.measurer
        tracked.indices = [
            self._index(name, parameter, slot.name if position < tracked.own else "")
            for position, (name, parameter) in enumerate(
                zip(tracked.names, tracked.parameters, strict=True)
            )
        ]
        slot.set_models(tracked.models)
        slot.count = self._count(slot)
        for model in tracked.models:
            self._modules |= {id(module) for module in model.modules()}
            for name, parameter in self._names.parameters(model):
                if name not in self._positions:
                    self._index(name, parameter, "")
        self._search_roots(tracked.ids)
        measurer = StepMeasurer(
            tracked, self._probes, self._recorder, self.options, slot, self._cadence_changed
        )
        if before is not None:
            measurer.take_over(before)
        for active in measurer.probes.active:
            active.probe.on_unseen_change = self._describe_unseen
            if active.probe.partly_unseen:
                self._recorder.notice("unseen", active.probe.partly_unseen, "warning")
        # A measurer keeps the parameters alive, and nothing else of the model.
        tracked.models.clear()
        tracked.modules.clear()
        key = id(optimizer)
        if entry is not None and before is not None:
            measurer.weights = before.weights and WeightWatch(tracked.parameters)
        elif isinstance(optimizer, Optimizer) and self._by_hand is not None:
            self._forget(id(self._by_hand))  # the script has an optimizer after all
            self._by_hand = None
        if entry is None and isinstance(optimizer, Optimizer):
            own = tracked.parameters[: tracked.own]
            measurer.unstepped = WeightWatch(own[:: -(-len(own) // WATCHED_UNSTEPPED) or 1])
            measurer.unstepped.remember()
        if entry is None:
            self._structure += bool(self._entries)  # other measurers must drop its parameters
            self._created = [r for r in self._created if r() is not optimizer]
        reference = weakref.ref(optimizer, lambda _: self._forget(key))
        self._entries[key] = (reference, _Entry(optimizer, measurer, self._structure))
        self._list_measurers()
        self._describe()
        return measurer

    def _waiting_by_hand(self, optimizer: Optimizer) -> StepMeasurer | None:
        """The measurer of updates by hand, whose slot is handed over to `optimizer`; None if it has
        measured a step already, or does not exist."""
        before = self.by_hand
        if before is None or before.has_stepped or not isinstance(optimizer, Optimizer):
            return None
        self._hand_over(before.slot, optimizer)
        return before

    def _hand_over(self, slot: OptimizerSlot, optimizer: Optimizer) -> None:
        """Give `slot`, in which nothing has stepped yet, to `optimizer`."""
        others = {each.name for each in self._slots if each is not slot}
        for position, info in enumerate(self._infos):
            if info.optimizer == slot.name:
                self._infos[position] = msgspec.structs.replace(info, optimizer="")
        slot.name = self._new_name(optimizer, others)
        slot.kind, slot.shapes = type(optimizer), shapes_of(optimizer)
        slot.occupy(optimizer)

    def _forget(self, key: int) -> None:
        """Drop the measurer of the optimizer with the id `key`."""
        self._entries.pop(key, None)
        self._list_measurers()

    def _list_measurers(self) -> None:
        while True:
            # Copied, since another optimizer may be freed meanwhile, on any thread.
            entries = list(self._entries.values())
            self.measurers = tuple(entry.measurer for _, entry in entries)
            if len(entries) == len(self._entries):
                break
        known = self._entries.get(id(self._by_hand)) if self._by_hand is not None else None
        self.by_hand = None if known is None else known[1].measurer

    def _other_modules(self) -> list[torch.nn.Module]:
        """Modules that may own parameters that no called model has."""
        built = [
            module for module in (r() for r in list(self._built.values())) if module is not None
        ]
        return built + objects_of_script(torch.nn.Module)

    def _held(self, optimizer: Optimizer, slot: OptimizerSlot) -> set[int]:
        """Identities of the parameters that other optimizers have, or that are already measured
        with another optimizer."""
        held = {id(p) for other in self._optimizers() for p in parameters_of(other)}
        for measurer in self.measurers:
            if measurer.slot is not slot:
                held |= {id(p) for p in measurer.tracked.parameters[measurer.tracked.own :]}
        return held - {id(p) for p in parameters_of(optimizer)}

    def _measured_names(self) -> dict[int, str]:
        """id(parameter) → name of every measured parameter."""
        tracked = [measurer.tracked for measurer in self.measurers]
        return {id(p): name for t in tracked for name, p in zip(t.names, t.parameters, strict=True)}

    def _optimizers(self) -> Iterator[Optimizer]:
        references = [*self._created, *self._pending, *(r for r, _ in self._entries.values())]
        return (o for o in (reference() for reference in references) if o is not None)

    def _is_one_of_several(self, root: torch.nn.Module) -> bool:
        """Whether an optimizer exists that trains another model alone, as in a GAN."""
        own = {id(p) for p in root.parameters()}
        held = [{id(p) for p in parameters_of(optimizer)} for optimizer in self._optimizers()]
        return any(each and own.isdisjoint(each) for each in held)

    def _count(self, slot: OptimizerSlot) -> int:
        """Number of parameters in the models of an optimizer."""
        models = [
            model for model in (reference() for reference in slot.models) if model is not None
        ]
        return sum(1 for model in models for _ in model.parameters())

    def _new_slot(self, optimizer: Optimizer) -> OptimizerSlot:
        names = {slot.name for slot in self._slots}
        name = self._new_name(optimizer, names)
        key = name if names else ""
        reference = weakref.ref(optimizer)
        slot = OptimizerSlot(name, key, type(optimizer), shapes_of(optimizer), reference)
        self._slots.append(slot)
        return slot

    def _new_name(self, optimizer: Optimizer, names: Container[str]) -> str:
        """A name for `optimizer` that is not among `names`."""
        base = class_name(optimizer)
        real = [each for each in self._optimizers() if isinstance(each, Optimizer)]
        others = {id(unwrapped_optimizer(each)) for each in real} - {id(optimizer)}
        name = variable_of(optimizer) if others else ""
        if not name or name in names:
            name = base
        number = 2
        while name in names:
            name, number = f"{base}#{number}", number + 1
        return name

    def _take_over(self, optimizer: Optimizer) -> OptimizerSlot | None:
        """The slot of a freed optimizer that `optimizer` replaces, or for updates by hand the slot
        of the optimizer that was set aside; None without one."""
        if self._set_aside is not None and isinstance(optimizer, HandUpdates):
            aside, self._set_aside = self._set_aside, None
            self._hand_over(aside, optimizer)
            return aside
        slot = next((s for s in self._slots if s.vacant and s.fits(optimizer)), None)
        if slot is not None:
            self._forget(id(slot.optimizer()))
            slot.occupy(optimizer)
            self._names.release()
            text = (
                f"{slot.name} continues with a new model of the same shapes: "
                "the previous one was freed"
            )
            self._recorder.notice("state", text)
        return slot

    def _index(self, name: str, parameter: torch.Tensor, optimizer: str) -> int:
        """The position of a parameter in `RunInfo.parameters`; positions never change."""
        info = ParameterInfo(
            name=name,
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            numel=parameter.numel(),
            optimizer=optimizer,
            trainable=parameter.requires_grad,
            sharded=is_sharded(parameter),
        )
        position = self._positions.get(name)
        if position is None:
            position = self._positions[name] = len(self._infos)
            self._infos.append(info)
        else:
            self._infos[position] = info
        return position

    # ------------------------------------------------------------ for the recorder

    def update_trainable(self, measurer: StepMeasurer) -> None:
        """Parameters were frozen or unfrozen."""
        tracked = measurer.tracked
        for position, parameter in zip(tracked.indices, tracked.parameters, strict=True):
            info = self._infos[position]
            if info.trainable != parameter.requires_grad:
                self._infos[position] = msgspec.structs.replace(
                    info, trainable=parameter.requires_grad
                )
        self._recorder.describe(parameters=tuple(self._infos))

    def set_phases_unseen(self, reasons: dict[str, str]) -> None:
        """Set the reasons for the phases that this script does not seem to have."""
        if reasons != self._phases_unseen:
            self._phases_unseen = reasons
            self._describe_unseen()

    def set_loop_unseen(self, reasons: dict[str, str]) -> None:
        """Set the reasons for what is unknown about the loop (total steps, epochs)."""
        self._loop_unseen = reasons
        self._describe_unseen()

    def _describe(self) -> None:
        measurers = self.measurers
        self._recorder.describe(
            parameters=tuple(self._infos),
            optimizers=tuple(slot.name for slot in self._slots),
            attention=tuple(
                a for m in measurers for p in m.probes.active for a in p.probe.attention
            ),
            unseen=self._unseen(),
        )

    def _describe_unseen(self) -> None:
        self._recorder.describe(unseen=self._unseen())

    def _unseen(self) -> dict[str, str]:
        """Quantity → why it is missing: by its name if for all optimizers, by `name@optimizer` if
        for one of several."""
        unseen = {**self._loop_unseen, **self._phases_unseen}
        active = {probe.name for measurer in self.measurers for probe in measurer.probes.active}
        for measurer in self.measurers:
            unseen |= {n: why for n, why in measurer.probes.unseen.items() if n not in active}
        reasons = [
            (probe.name, measurer.tracked.name, probe.probe.unseen)
            for measurer in self.measurers
            for probe in measurer.probes.active
        ]
        seen = {name for name, _, why in reasons if not why}
        for name, optimizer, why in reasons:
            if why:
                unseen.setdefault(name if name not in seen else f"{name}@{optimizer}", why)
        return unseen

    def _cadence_changed(self, changed: Sequence[ActiveProbe], text: str, level: Level) -> None:
        tables: list[Table] = []
        for probe in changed:
            probe.tables = [msgspec.structs.replace(t, every=probe.now) for t in probe.tables]
            tables += probe.tables
        if tables:
            self._recorder.declare(tables)
        self._recorder.notice("cadence", text, level)


def _same(before: TrackedParameters, now: TrackedParameters) -> bool:
    """Whether the same parameters are measured under the same names."""
    return (
        before.names == now.names
        and before.own == now.own
        and all(a is b for a, b in zip(before.parameters, now.parameters, strict=True))
    )
