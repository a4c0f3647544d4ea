"""Measuring the steps of one optimizer: its probes, what they read, and the records they give."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol.describe import Table
from tui_trainer.tracing.governor import Governed, Governor
from tui_trainer.tracing.interface import RecorderLike
from tui_trainer.tracing.outbox import Outbox
from tui_trainer.tracing.probe import ClipSeen, Facts, Gradient, Options, Probe, Readings
from tui_trainer.tracing.readout import Arrival
from tui_trainer.tracing.subject import Subject
from tui_trainer.tracing.timing import Times

HOOKS = (
    "before_forward",
    "after_forward",
    "gradients",
    "borrowed",
    "before_update",
    "after_update",
    "rows",
)


@dataclass(eq=False, kw_only=True)
class Slot(Governed):
    """A probe at work, with its tables, its cadence and its cost."""

    probe: Probe
    tables: list[Table]
    off: bool = False
    due: bool = False
    readings: list[Readings] = field(default_factory=list)
    spent: float = 0.0
    """Seconds on the training thread in this step."""

    def __post_init__(self) -> None:
        self.does = frozenset(
            name for name in HOOKS if getattr(type(self.probe), name) is not getattr(Probe, name)
        )
        """Which of the hooks it has: the others need not be called."""


@dataclass
class ClipCall:
    """A call of a clipping function, its figures still where they were computed."""

    kind: str
    meters: list[Meter]
    """Of the optimizers whose gradients it clipped and that have not stepped since."""
    max_norm: float
    readings: tuple[torch.Tensor, ...]
    """Norm before; for clipping by value also the norm after."""
    parameters: int
    two_norm: bool


@dataclass
class Finished:
    """What the tracer knows of a step that has just been made."""

    step: int
    losses: Sequence[torch.Tensor]
    learning_rate: float | torch.Tensor
    step_ms: float
    times: Times
    clips: Sequence[ClipCall]


@dataclass
class _Made:
    """A step that is made."""

    meter: Meter
    arrival: Arrival
    slots: list[Slot]
    finished: Finished
    time: float
    own_ms: dict[str, float]
    scaled: bool
    with_gradient: int

    def record(self) -> float:
        """See `outbox.Step`."""
        return self.meter.record(self)


class Meter:
    """The probes of one optimizer."""

    def __init__(
        self,
        subject: Subject,
        probes: Sequence[type[Probe]],
        recorder: RecorderLike,
        options: Options,
        governor: Governor,
        outbox: Outbox,
    ) -> None:
        self.subject = subject
        self._recorder = recorder
        self._governor = governor
        self._outbox = outbox
        self.slots: list[Slot] = []
        self.unseen: dict[str, str] = {}
        self._prepared = -1
        self.fresh = False
        """Whether the gradients of this step have been read since the last backward."""
        self._scale: torch.Tensor | None = None
        self._found_inf: torch.Tensor | None = None
        self._with_gradient = 0
        self._gradients: list[Gradient] | None = None
        self._lending = False
        self._trusted = False
        for kind in probes:
            if kind.name not in options.switched_off:
                self._install(kind, options)

    def _install(self, kind: type[Probe], options: Options) -> None:
        try:
            with torch.no_grad():
                probe = kind(self.subject, options)
            if probe.unseen:
                self.unseen[kind.name] = probe.unseen
                return
            natural = max(0, options.cadences.get(kind.name, kind.every))
            shown = {
                spec.name: natural if spec.every is None else spec.every for spec in probe.tables
            }
            key = self.subject.key
            tables = [
                Table(
                    self._recorder.new_table(spec.name, spec.columns, shown[spec.name], key),
                    spec.name,
                    spec.columns,
                    shown[spec.name],
                    key,
                )
                for spec in probe.tables
            ]
        except Exception as fault:
            self._recorder.notice("fault", f"probe {kind.name}: {describe(fault)}", "error")
            return
        self.slots.append(
            Slot(
                name=kind.name,
                natural=natural,
                every=natural,
                importance=kind.importance,
                probe=probe,
                tables=tables,
            )
        )

    def table(self, name: str) -> Table | None:
        """The table of this name that one of the probes fills."""
        return next((t for s in self.slots for t in s.tables if t.name == name), None)

    def probe(self, name: str) -> Probe | None:
        """The probe of this name, where it is at work."""
        return next((s.probe for s in self.slots if s.name == name and not s.off), None)

    # ------------------------------------------------------------ the course of a step

    def prepare(self, step: int, wanted: bool) -> None:
        """Decide once per step which probes measure it. `wanted`: somebody is about to look."""
        if self._prepared == step or self.fresh:  # read at the clipping, before another's step
            if wanted:
                self._add_wanted(step)
            return
        self._prepared = step
        watched = self._recorder.watched()
        for slot in self.slots:
            every = slot.every
            if slot.probe.topic and slot.probe.topic in watched:
                fastest = slot.probe.watched_every
                every = min(every, fastest) if every else fastest
            slot.due = not slot.off and (
                (every > 0 and (step - 1) % every == 0) or (wanted and slot.probe.wants(step))
            )
            slot.spent = 0.0
            slot.readings = []

    def _add_wanted(self, step: int) -> None:
        """Somebody is about to look after all: what needs no gradients can still be measured."""
        for slot in self.slots:
            if not (slot.due or slot.off or "gradients" in slot.does) and slot.probe.wants(step):
                slot.due, slot.spent, slot.readings = True, 0.0, []

    def forward_begins(self, root: torch.nn.Module) -> None:
        """The first forward of the step begins."""
        for slot in self.slots:
            if slot.due and "before_forward" in slot.does:
                self._guard(slot, slot.probe.before_forward, root)

    def forward_ends(self) -> None:
        """It has ended."""
        for slot in self.slots:
            if slot.due and "after_forward" in slot.does:
                self._guard(slot, slot.probe.after_forward)

    def read_gradients(
        self,
        scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        at_clipping: bool = False,
    ) -> None:
        """Gradients are complete and not yet clipped. `scale`: a factor still on them.

        `at_clipping`: they are about to be clipped by norm, and `lend` follows.
        """
        self._lending = at_clipping and self._trusted
        gradients: list[Gradient] = self.subject.gradients()
        self._scale, self._found_inf = scale, found_inf
        self._with_gradient = sum(gradient is not None for gradient in gradients)
        with plain_arithmetic(self.subject.device):
            for slot in self.slots:
                if not slot.due or "gradients" not in slot.does:
                    continue
                if self._lending and "borrowed" in slot.does:
                    self._gradients = gradients
                else:
                    slot.readings = [self._guard(slot, slot.probe.gradients, gradients) or ()]
        self.fresh = True

    def lend(self, norms: Mapping[int, torch.Tensor], clipped: Any, limit: Any, total: Any) -> None:
        """The clipping of the parameters `clipped` has computed `norms` (by id of the gradient),
        and a `total` of all.

        They are relied on once a clipping has shown that it gives every one of them.
        """
        gradients, self._gradients = self._gradients or self.subject.gradients(), None
        complete = all(g is None or id(g) in norms for g in gradients)
        lending, self._lending = self._lending, False
        self._trusted = complete
        if not lending:
            return
        found: list[torch.Tensor | None]
        if complete:
            found = [None if g is None else norms[id(g)] for g in gradients]
        else:
            found = self._norms_before(gradients, norms, clipped, limit, total)
        for slot in self.slots:
            if slot.due and "borrowed" in slot.does:
                slot.readings = [self._guard(slot, slot.probe.borrowed, found) or ()]

    def _norms_before(
        self,
        gradients: list[Gradient],
        norms: Mapping[int, torch.Tensor],
        clipped: Any,
        limit: Any,
        total: Any,
    ) -> list[torch.Tensor | None]:
        """Norms before a clipping that, against expectation, did not give them all: what it has
        clipped is divided again by the factor of PyTorch's own formula."""
        given = [clipped] if isinstance(clipped, torch.Tensor) else clipped
        scaled = {id(p.grad) for p in given}
        factor = torch.clamp(float(limit) / (total + 1e-6), max=1.0)
        found: list[torch.Tensor | None] = []
        for gradient in gradients:
            if gradient is None or id(gradient) in norms:
                found.append(None if gradient is None else norms[id(gradient)])
                continue
            norm = torch.linalg.vector_norm(gradient.float())
            found.append(norm / factor if id(gradient) in scaled else norm)
        return found

    def before_update(self) -> None:
        """The optimizer is about to change the weights."""
        for slot in self.slots:
            if slot.due and "before_update" in slot.does:
                self._guard(slot, slot.probe.before_update)

    def after_update(
        self, finished: Finished, own_s: Callable[[], float], at_once: bool = False
    ) -> None:
        """The optimizer has changed the weights: read them, and send everything to the host.

        `own_s()`: what all of ours, probes included, has cost in this step until now. `at_once`:
        record what has arrived, since somebody may look.
        """
        slots = [slot for slot in self.slots if slot.due and not slot.off]
        with plain_arithmetic(self.subject.device):
            for slot in slots:
                if "after_update" in slot.does:
                    slot.readings.append(self._guard(slot, slot.probe.after_update) or ())
        slots = [slot for slot in slots if not slot.off]
        for slot in slots:
            slot.due = False
        header: list[torch.Tensor] = [*finished.losses]
        if isinstance(finished.learning_rate, torch.Tensor):
            header.append(finished.learning_rate.detach().reshape(()))
        header += [reading for call in finished.clips for reading in call.readings]
        header += [t.detach().reshape(()) for t in (self._scale, self._found_inf) if t is not None]
        parts = [header, *([r for readings in s.readings for r in readings] for s in slots)]
        arrival = Arrival(parts)
        own = {slot.name: slot.spent * 1e3 for slot in slots}
        own["tracer"] = max(0.0, own_s() * 1e3 - sum(own.values()))
        self.fresh = False
        made = _Made(
            meter=self,
            arrival=arrival,
            slots=slots,
            finished=finished,
            time=time.time(),
            own_ms=own,
            scaled=self._scale is not None,
            with_gradient=self._with_gradient,
        )
        self._outbox.put(made, at_once)

    # ------------------------------------------------------------ on the host

    def record(self, arrived: _Made) -> float:
        """Make the rows of a step whose values have arrived, and record them.

        Returns the seconds that the probes took.
        """
        accounted = 0.0
        header, *parts = arrived.arrival.values()
        facts = self._facts(header, arrived)
        rows: list[tuple[int, Floats]] = []
        for slot, values in zip(arrived.slots, parts, strict=True):
            began = perf_counter()
            made = self._guard(slot, slot.probe.rows, values, facts) or ()
            rows += [
                (table.id, row)
                for table, row in zip(slot.tables, made, strict=False)
                if row is not None
            ]
            spent = perf_counter() - began
            accounted += spent
            facts.own_ms[slot.name] += spent * 1e3
        self._recorder.record(
            StepRecord(
                step=facts.step,
                time=facts.time,
                optimizer=self.subject.key,
                rows=tuple(rows),
                clip=facts.clip,
                nonfinite=tuple(facts.nonfinite),
                own_ms=sum(arrived.own_ms.values()),
            )
        )
        self._governor.step(self.slots, arrived.own_ms, facts.step_ms)
        return accounted

    def _facts(self, header: Floats, arrived: _Made) -> Facts:
        finished = arrived.finished
        values = iter(header.tolist())
        losses = [next(values) for _ in finished.losses]
        rate = finished.learning_rate
        learning_rate = next(values) if isinstance(rate, torch.Tensor) else rate
        clips = [_clip_seen(call, values, arrived.with_gradient) for call in finished.clips]
        scale = next(values) if arrived.scaled else 1.0
        if next(values, 0.0) > 0:
            self._recorder.notice("skipped_step", skipped_text(scale), "warning", finished.step)
        return Facts(
            step=finished.step,
            time=arrived.time,
            loss=float(sum(losses)) if losses else float("nan"),
            loss_known=bool(losses),
            learning_rate=learning_rate,
            step_ms=finished.step_ms,
            phase_ms=finished.times(),
            clips=clips,
            gradient_scale=scale or 1.0,
            own_ms=arrived.own_ms,
        )

    def _guard(self, slot: Slot, work: Callable[..., Any], *args: Any) -> Any:
        """Call a probe, at its own cost; switch it off when it fails."""
        if slot.off:
            return None
        began = perf_counter()
        try:
            return work(*args)
        except Exception as fault:
            slot.off = True
            self._recorder.notice(
                "fault", f"probe {slot.name} is switched off: {describe(fault)}", "error"
            )
            return None
        finally:
            slot.spent += perf_counter() - began


def _clip_seen(call: ClipCall, values: Any, with_gradient: int) -> ClipSeen:
    before, *after = (next(values) for _ in call.readings)
    return ClipSeen(
        kind=call.kind,
        max_norm=call.max_norm,
        norm_before=before,
        norm_after=after[0] if after else float("nan"),
        complete=call.two_norm and call.parameters == with_gradient,
    )


def plain_arithmetic(device: torch.device) -> AbstractContextManager[Any]:
    """Arithmetic in the tensors' own precision, also for a script that steps under autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def skipped_text(scale: float) -> str:
    """What to say of a step that a GradScaler skipped."""
    return f"GradScaler skipped the step: gradients are not finite at loss scale {scale:g}"


def describe(fault: BaseException) -> str:
    """An exception in one line, with the place of ours where it happened."""
    text = str(fault).strip().splitlines()
    trace = fault.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        file = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
        where = f" ({file}:{trace.tb_lineno})"
    return f"{type(fault).__name__}: {text[0] if text else ''}{where}"


def row_of(values: Sequence[float]) -> Floats:
    """A row as the recorder takes it."""
    return np.array(values, dtype=np.float32)
