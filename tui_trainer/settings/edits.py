"""Changes of the settings of a live training: learning rate, weight decay, clipping, freezing, …

Everything happens on the training thread, at the end of a step; a training without changes runs as
if this module did not exist. Each change is recorded as an event, and can be undone.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.live_settings import parse_change
from tui_trainer.inspector.tensor_catalog import TensorCatalog
from tui_trainer.protocol.events import ClipKind
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.settings import (
    Setting,
    SettingChange,
    SettingList,
    SettingValue,
    setting_text,
)
from tui_trainer.record.recorder import Recorder
from tui_trainer.settings.learning_rates import LearningRates, Undo
from tui_trainer.tasks.definition import Batches, Schedule
from tui_trainer.trace.gate import Gate, Refusal
from tui_trainer.trace.tracer import Tracer

WAIT_S, PAUSED_WAIT_S = 0.3, 5.0
"""How long a viewer's command waits for the change at the end of the current step before it is
answered: `PAUSED_WAIT_S` while the training is paused between steps, where the change is made at
once; otherwise `WAIT_S`."""
MAX_LISTED_GROUPS = 8
"""Parameter groups whose settings are listed one by one."""
CLIP_FUNCTIONS = {"norm": "clip_grad_norm_", "value": "clip_grad_value_"}
HYPERPARAMETERS = ("lr", "weight_decay", "betas", "momentum", "eps")
"""Settings of parameter groups, as the optimizers of torch call them."""

DataSetting = Literal["batch_size", "seed"]


@dataclass
class EditableTask:
    """The parts of a shipped task that can be changed."""

    schedule: Schedule
    batches: Batches
    items_per_step: int


@dataclass(frozen=True)
class PlannedEdit:
    """A valid change that has not been made yet."""

    text: str
    """`lr 0.001 → 0.0003`"""
    apply: Callable[[], Undo]
    """Makes the change and returns the function that undoes it."""


@dataclass(frozen=True)
class AppliedEdit:
    """A change that can be undone."""

    text: str
    undo: Undo


@dataclass(frozen=True)
class SettingEdit:
    """Changes made at the end of step `step`; `changes` is None if the latest ones were undone."""

    step: int
    changes: tuple[SettingChange, ...] | None
    who: str = ""
    undoable: AppliedEdit | None = None
    """The change as it was made, to be undone; None before it is made, and for an undo."""

    @property
    def text(self) -> str:
        if self.changes is None:
            return "undone"
        return " ".join(change.text for change in self.changes)


@dataclass
class EditState:
    """The log of all changes, and those that can be undone."""

    log: list[SettingEdit] = field(default_factory=list)
    undoable: list[AppliedEdit] = field(default_factory=list)


class LiveEdits:
    """The changes of one training."""

    def __init__(self, tracer: Tracer, gate: Gate, recorder: Recorder) -> None:
        self._tracer = tracer
        self._gate = gate
        self._recorder = recorder
        self.task: EditableTask | None = None
        """None for a script."""
        self.state = EditState()
        self._rates = LearningRates(tracer, gate, recorder)
        self.check: Callable[[], None] | None = None
        """Set to a function that raises Refusal where no setting may be changed now."""
        self._edited_before = False
        """Whether the run that this one continues had changes of settings."""
        self._waiting: list[tuple[str, Future[Any]]] = []
        """(text, future) of the changes to be made at the end of the step in progress. Replaced,
        never modified."""

    # ------------------------------------------------------------ any thread

    def change(self, changes: Sequence[SettingChange], who: str = "") -> str:
        """Make changes at the end of the current step; returns a message. Raises Refusal."""
        if self.check is not None:
            self.check()
        self.require_possible(changes)
        text = " ".join(change.text for change in changes)
        return self._at_boundary(lambda: self.apply(SettingEdit(0, tuple(changes), who)), text)

    def require_possible(self, changes: Sequence[SettingChange]) -> None:
        """Raises Refusal where one of these changes is not possible."""
        for change in changes:
            _require_valid(change)
            self.plan(change)

    def undo(self, who: str = "") -> str:
        """Undo the latest change, or withdraw it if it has not been made yet. Raises Refusal."""
        if self.check is not None:
            self.check()
        for text, future in reversed(self._waiting):
            if future.cancel():
                return f"withdrawn: {text}"
        if not self.state.undoable:
            raise Refusal("no change of a setting is left to undo")
        return self._at_boundary(lambda: self.apply(SettingEdit(0, None, who)), "undo")

    def _at_boundary(self, work: Callable[[], str], text: str) -> str:
        """Call `work` at the end of the current step; returns its message if it ends soon. Raises
        Refusal, also when `work` does so in time."""
        gate = self._gate
        between = gate.mode == "paused" and gate.phase == "step"
        future = gate.call_soon(work)
        try:
            return str(future.result(PAUSED_WAIT_S if between else WAIT_S))
        except NotYet:
            self._waiting = [*self._waiting, (text, future)]
            future.add_done_callback(self._waited)
            return f"at the end of step {gate.step_in_progress:,}"
        except CancelledError:
            raise Refusal("the training has ended") from None

    def _waited(self, future: Future[Any]) -> None:
        """Called once a change that was announced to the viewer was made, refused or withdrawn."""
        self._waiting = [each for each in self._waiting if each[1] is not future]
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, (Refusal, ConfigurationError)):
            text = f"nothing was changed: {error.message}"
            self._recorder.notice("edit", text, "error", self._gate.completed)
        elif error is not None:
            self._recorder.fault("changing a setting", error)

    # ------------------------------------------------------------ training thread

    def apply(self, entry: SettingEdit, silent: bool = False) -> str:
        """Make a change, or undo one, after the last completed step. Raises Refusal, and then
        changes nothing. `silent`: the change is repeated and already recorded."""
        step = self._gate.completed
        if self.check is not None and not silent:
            self.check()
        made = None
        if entry.changes is None:
            if not self.state.undoable:
                raise Refusal("no change of a setting is left to undo")
            last = self.state.undoable.pop()
            last.undo()
            text = f"undone: {last.text}"
        else:
            made = self._apply_all(entry.changes)
            text = made.text
        self.state.log.append(SettingEdit(step, entry.changes, entry.who, made))
        if not silent:
            self._recorder.notice("edit", text, step=step, who=entry.who)
        return f"{text}, from step {step + 1:,} on"

    def _apply_all(self, changes: Sequence[SettingChange]) -> AppliedEdit:
        done: list[Undo] = []
        texts = []
        try:
            for change in changes:  # one by one: `beta1` and `beta2` change the same pair
                plan = self.plan(change)
                done.append(plan.apply())
                texts.append(plan.text)
        except BaseException:
            _undo_all(done)
            raise
        made = AppliedEdit("; ".join(texts), lambda: _undo_all(done))
        self.state.undoable.append(made)
        return made

    def plan(self, change: SettingChange) -> PlannedEdit:
        """Prepare a change without making it. Raises Refusal where it is not possible."""
        match change.name:
            case "freeze" | "unfreeze":
                return self._plan_trainable(str(change.value), change.name == "unfreeze")
            case "clip":
                return self._plan_clip(_number(change.value))
            case "batch_size" | "seed":
                return self._plan_data(change.name, int(_number(change.value)))
            case _:
                return self._plan_group(change)

    def settings(self) -> SettingList:
        """The present settings."""
        found = [*self._group_settings(), *self._clip_settings(), *self._data_settings()]
        frozen = sum(not each.requires_grad for _, each in self._parameters())
        waiting = tuple(text for text, _ in self._waiting)
        return SettingList(tuple(found), frozen, len(self.state.undoable), waiting)

    # ------------------------------------------------------------ parameter groups

    def _groups(self) -> list[tuple[str, torch.optim.Optimizer, dict[str, Any]]]:
        """(name of the optimizer, the optimizer, group) over all optimizers."""
        return [
            (name, optimizer, group)
            for name, optimizer in self._tracer.registry.existing()
            for group in optimizer.param_groups
        ]

    def _plan_group(self, change: SettingChange) -> PlannedEdit:
        key = "betas" if change.name in ("beta1", "beta2") else change.name
        chosen = self._chosen(change, key)
        groups = self._groups()
        values = {number: _changed(groups[number][2][key], change) for number in chosen}
        before = ", ".join(
            dict.fromkeys(setting_text(_plain(groups[number][2][key])) for number in chosen)
        )
        after = ", ".join(dict.fromkeys(setting_text(_plain(value)) for value in values.values()))
        name = key if change.group is None else f"{key}[{change.group}]"
        text = f"{name} {before} → {after}"
        if key == "lr":
            return self._plan_rate(text, change, chosen)
        targets = [(groups[number][2], values[number]) for number in chosen]

        def apply() -> Undo:
            old = [(group, _kept(group[key])) for group, _ in targets]
            for group, value in targets:
                _assign(group, key, value)

            def undo() -> None:
                for group, value in old:
                    _assign(group, key, value)

            return undo

        return PlannedEdit(text, apply)

    def _plan_rate(self, text: str, change: SettingChange, chosen: Sequence[int]) -> PlannedEdit:
        value, task = _number(change.value), self.task
        groups = [(optimizer, group) for _, optimizer, group in self._groups()]
        if task is None:
            targets = [groups[number] for number in chosen]
            setting = self._rates.schedulers([optimizer for optimizer, _ in targets])
            if setting:
                text += f" (the schedule of {', '.join(setting)} continues from it)"
            return PlannedEdit(text, lambda: self._rates.change(targets, value))
        schedule = task.schedule
        if schedule.schedule != "constant":
            text += f" (the {schedule.schedule} schedule continues from it)"

        def apply() -> Undo:
            old = schedule.state_dict()
            schedule.change(self._gate.completed, value, change.group)
            self._set_scheduled(schedule)

            def undo() -> None:
                schedule.load_state_dict(old)
                self._set_scheduled(schedule)

            return undo

        return PlannedEdit(text, apply)

    def _set_scheduled(self, schedule: Schedule) -> None:
        """Set the rate of the next step now, to show it; the loop sets it when the step begins."""
        for _, optimizer in self._tracer.registry.existing():
            schedule.set(optimizer, self._gate.completed)

    def _chosen(self, change: SettingChange, key: str) -> list[int]:
        """Numbers of the groups that a change applies to. Raises Refusal."""
        groups = self._groups()
        if not groups:
            raise Refusal("no optimizer is known yet", "once the first step is made")
        if change.group is not None:
            if change.group >= len(groups):
                numbers = f"0 to {len(groups) - 1}" if len(groups) > 1 else "only 0"
                raise Refusal(f"there is no parameter group {change.group}", f"there is {numbers}")
            chosen = [change.group]
        else:
            chosen = list(range(len(groups)))
        having = [number for number in chosen if groups[number][2].get(key) is not None]
        if not having:
            names = ", ".join(dict.fromkeys(groups[number][0] for number in chosen))
            known = [each for each in HYPERPARAMETERS if each in groups[chosen[0]][2]]
            raise Refusal(f"{names} has no {key}", f"it has {', '.join(known)}")
        if key == "weight_decay" and change.group is None:
            # Groups without decay (biases, norms) stay without.
            having = [n for n in having if _plain(groups[n][2][key]) != 0] or having
        return having

    def _group_settings(self) -> Iterator[Setting]:
        groups = self._groups()
        for key in HYPERPARAMETERS:
            having = [n for n, (_, _, group) in enumerate(groups) if group.get(key) is not None]
            values = [_plain(groups[number][2][key]) for number in having]
            if not values:
                continue
            note = self._rate_note([groups[n][1] for n in having]) if key == "lr" else ""
            if len(set(values)) == 1:
                yield Setting(key, values[0], note)
                continue
            for number, value in list(zip(having, values, strict=True))[:MAX_LISTED_GROUPS]:
                count = counted(len(groups[number][2]["params"]), "parameter")
                about = f"{groups[number][0]}, {count}"
                yield Setting(f"{key}[{number}]", value, f"{about}; {note}" if note else about)

    def _rate_note(self, optimizers: Sequence[torch.optim.Optimizer]) -> str:
        if self.task is not None:
            name = self.task.schedule.schedule
            return "" if name == "constant" else f"{name} schedule"
        return self._rates.note(optimizers)

    # ------------------------------------------------------------ clipping

    def _plan_clip(self, limit: float) -> PlannedEdit:
        tracer = self._tracer
        kind = self._clip_kind()
        if kind is None:
            raise Refusal(
                "no call of torch.nn.utils.clip_grad_norm_ was seen",
                "clip changes the threshold of a training that clips with it",
            )
        before = tracer.clip_limits.get(kind)
        now = tracer.clip_calls[kind] if before is None else before
        text = f"clip {setting_text(now)} → {setting_text(limit)} ({CLIP_FUNCTIONS[kind]})"

        def apply() -> Undo:
            tracer.clip_limits[kind] = limit

            def undo() -> None:
                if before is None:
                    tracer.clip_limits.pop(kind, None)
                else:
                    tracer.clip_limits[kind] = before

            return undo

        return PlannedEdit(text, apply)

    def _clip_kind(self) -> ClipKind | None:
        kinds: tuple[ClipKind, ...] = ("norm", "value")
        return next((kind for kind in kinds if kind in self._tracer.clip_calls), None)

    def _clip_settings(self) -> Iterator[Setting]:
        if (kind := self._clip_kind()) is not None:
            limit = self._tracer.clip_limits.get(kind, self._tracer.clip_calls[kind])
            yield Setting("clip", limit, CLIP_FUNCTIONS[kind])

    # ------------------------------------------------------------ data

    def _plan_data(self, name: DataSetting, value: int) -> PlannedEdit:
        task = self.task
        if task is None:
            raise Refusal(
                f"{name} can be changed in the shipped tasks only", "a script draws its own batches"
            )
        batches = task.batches
        before = (batches.batch_size, batches.seed)
        after = (value, before[1]) if name == "batch_size" else (before[0], value)
        try:
            batches.check(after[0])
        except ConfigurationError as error:
            raise Refusal(error.message, error.hint) from error
        old = before[0] if name == "batch_size" else before[1]

        def apply() -> Undo:
            self._change_data(task, *after)
            return lambda: self._change_data(task, *before)

        return PlannedEdit(
            f"{name} {old:,} → {value:,}{self._epoch_change(task, name, value)}", apply
        )

    @staticmethod
    def _epoch_change(task: EditableTask, name: DataSetting, value: int) -> str:
        """Text about the effect of another batch size on the epochs."""
        before = task.batches.batches_per_epoch
        if name != "batch_size" or not before:
            return ""
        after = max(1, before * task.batches.batch_size // value)
        return f" (an epoch has about {after:,} steps instead of {before:,})"

    def _change_data(self, task: EditableTask, batch_size: int, seed: int) -> None:
        batches = task.batches
        per_example = task.items_per_step // max(1, batches.batch_size)
        batches.change(batch_size, seed)
        task.items_per_step = per_example * batch_size
        self._gate.steps_per_epoch = batches.batches_per_epoch
        self._recorder.describe(
            steps_per_epoch=batches.batches_per_epoch, items_per_step=task.items_per_step
        )

    def _data_settings(self) -> Iterator[Setting]:
        if self.task is not None:
            yield Setting("batch_size", float(self.task.batches.batch_size))
            yield Setting("seed", float(self.task.batches.seed), "order of the data")

    # ------------------------------------------------------------ freezing

    def _parameters(self) -> list[tuple[str, torch.Tensor]]:
        return list(TensorCatalog(self._tracer).parameters())

    def _plan_trainable(self, pattern: str, trainable: bool) -> PlannedEdit:
        verb = "unfreeze" if trainable else "freeze"
        known = self._parameters()
        matching = [(name, p) for name, p in known if fnmatchcase(name, pattern)]
        if not matching:
            close = difflib.get_close_matches(pattern, [name for name, _ in known], n=1)
            hint = f"did you mean {close[0]}?" if close else "such as blocks.0.* or *.bias"
            raise Refusal(f"no parameter matches {pattern}", hint)
        changing = [p for _, p in matching if p.requires_grad != trainable]
        if not changing:
            state = "trained" if trainable else "frozen"
            raise Refusal(f"all {counted(len(matching), 'parameter')} of {pattern} are {state}")
        held = {id(p) for _, _, group in self._groups() for p in group["params"]}
        text = f"{verb} {pattern}: {counted(len(changing), 'parameter')}"
        if trainable:
            outside = sum(id(p) not in held for p in changing)
            text += f", {outside} of them in no optimizer" if outside else ""
            if not all(p.is_floating_point() or p.is_complex() for p in changing):
                raise Refusal(f"{pattern} matches parameters that have no gradient")
        else:
            self._check_some_are_left({id(p) for p in changing})

        def apply() -> Undo:
            _set_trainable(changing, trainable)
            return lambda: _set_trainable(changing, not trainable)

        return PlannedEdit(text, apply)

    def _check_some_are_left(self, frozen: set[int]) -> None:
        """Raises Refusal if no parameter of an optimizer would be left to train: the loss would
        have no gradient, and `backward` would fail."""
        for name, optimizer in self._tracer.registry.existing():
            trained = [
                id(p) for group in optimizer.param_groups for p in group["params"]
                if p.requires_grad
            ]  # fmt: skip
            if trained and frozen.issuperset(trained):
                raise Refusal(
                    f"that would leave {name} nothing to train: backward would fail",
                    "leave at least one parameter trained, or set lr=0",
                )

    # ------------------------------------------------------------ checkpoints and snapshots

    def state_dict(self) -> dict[str, Any]:
        """The state that optimizers do not hold, as plain data."""
        state: dict[str, Any] = {"clip": dict(self._tracer.clip_limits)}
        state["frozen"] = [name for name, p in self._parameters() if not p.requires_grad]
        if self.task is not None:
            state["schedule"] = self.task.schedule.state_dict()
            state["data"] = [self.task.batches.batch_size, self.task.batches.seed]
        state["edited"] = self._edited_before or bool(self.state.log)
        state["edits"] = len(self.state.log)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the changes from a checkpoint, if its training had any."""
        if not state.get("edited"):
            return
        self._load(state)
        self._edited_before = True

    def _load(self, state: dict[str, Any]) -> None:
        self._tracer.clip_limits.clear()
        self._tracer.clip_limits.update(state["clip"])
        frozen = set(state["frozen"])
        for name, parameter in self._parameters():
            if parameter.requires_grad == (name in frozen):
                _set_trainable([parameter], name not in frozen)
        if self.task is not None:
            self.task.schedule.load_state_dict(state["schedule"])
            data = tuple(state["data"])
            if data != (self.task.batches.batch_size, self.task.batches.seed):
                self._change_data(self.task, *data)

    def snapshot(self) -> tuple[dict[str, Any], EditState, Any]:
        """The state of all changes, to be passed to `restore`."""
        state = EditState(list(self.state.log), list(self.state.undoable))
        return self.state_dict(), state, self._rates.snapshot()

    def restore_saved(self, state: dict[str, Any], history: Sequence[SettingEdit]) -> None:
        """Restore the state of a checkpoint of this run; `history`: the changes of the run."""
        self._load(state)
        self._rates.restore({})
        self.state = EditState(list(history[: state["edits"]]))
        for entry in self.state.log:
            if entry.undoable is not None:
                self.state.undoable.append(entry.undoable)
            elif self.state.undoable:
                self.state.undoable.pop()

    def restore(self, snapshot: tuple[dict[str, Any], EditState, Any]) -> None:
        data, state, rates = snapshot
        self._load(data)
        self._rates.restore(rates)
        self.state = EditState(list(state.log), list(state.undoable))


def _set_trainable(parameters: Sequence[torch.Tensor], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None  # with a gradient, the optimizer would still apply its momentum


def _require_valid(change: SettingChange) -> None:
    """Raises Refusal for a change that cannot be parsed: a viewer may send any value."""
    try:
        parse_change(change.text)
    except ConfigurationError as error:
        raise Refusal(error.message, error.hint) from error


def _undo_all(done: Sequence[Undo]) -> None:
    for undo in reversed(done):
        undo()


def _number(value: SettingValue) -> float:
    """The value as a number. Raises Refusal: a viewer of another version may send anything."""
    if not isinstance(value, (int, float)) or value != value or value < 0:
        raise Refusal(
            f"{setting_text(value)} is not a valid value", "expected a number, at least 0"
        )
    return float(value)


def _changed(before: Any, change: SettingChange) -> Any:
    """The new value of a hyper-parameter whose value was `before`."""
    match change.name:
        case "betas":
            value = change.value
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise Refusal("betas needs two numbers", "betas=0.9,0.95")
            return tuple(_number(part) for part in value)
        case "beta1":
            return (_number(change.value), before[1])
        case "beta2":
            return (before[0], _number(change.value))
        case _:
            return _number(change.value)


def _plain(value: Any) -> SettingValue:
    """A hyper-parameter as plain numbers; it may be a tensor."""
    if isinstance(value, (tuple, list)):
        return tuple(float(part) for part in value)
    return float(value)


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _assign(group: dict[str, Any], key: str, value: Any) -> None:
    """Assign a hyper-parameter; a tensor, which a compiled optimizer reads, in place."""
    present = group[key]
    if isinstance(present, torch.Tensor):
        with torch.no_grad(), contextlib.suppress(TypeError):
            present.fill_(float(value))
            return
    group[key] = value
