"""Measuring the steps of one optimizer: its probes, and what they are called for when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from tui_trainer.protocol.schema import Table
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Gradient, Options, Probe, RecorderLike, describe, skipped_text
from tui_trainer.trace.schedule import (
    ActiveProbe,
    Governor,
    OptimizerSlot,
    ProbeSchedule,
    install_probes,
)
from tui_trainer.trace.step import Captured, CompletedStep, FinishedStep, record_of, scalar
from tui_trainer.trace.transfer import HostTransfer, TransferPart


class StepMeasurer:
    """The probes of one optimizer."""

    def __init__(
        self,
        tracked: TrackedParameters,
        probes: Sequence[type[Probe]],
        recorder: RecorderLike,
        options: Options,
        governor: Governor,
        role: OptimizerSlot,
    ) -> None:
        self.tracked = tracked
        self._recorder = recorder
        self._governor = governor
        self.slots: list[ActiveProbe] = []
        self.unseen: dict[str, str] = {}
        self._prepared = -1
        self.fresh = False
        """Whether the gradients of this step have been read since the last backward."""
        self.skip: tuple[torch.Tensor, torch.Tensor] | None = None
        """Where the optimizer itself skips a step whose gradients are not finite: whether it does
        (above 0) and the loss scale (0-d each). Set when its step begins."""
        self._scale: torch.Tensor | None = None
        self._with_gradient = 0
        self._lending = False
        self._trusted = False
        self._zero = torch.zeros((), device=tracked.device)
        self._on_host = all(parameter.is_cpu for parameter in tracked.parameters)
        for kind in probes:
            if kind.name not in options.switched_off:
                self._install(kind, options, role)
        self._schedule = ProbeSchedule(self.slots)
        self._outdated = False
        """Cadences have changed, or a probe was switched off, perhaps on another thread: to be
        arranged before the next step."""

    def _install(self, kind: type[Probe], options: Options, role: OptimizerSlot) -> None:
        try:
            slot = install_probes(kind, self.tracked, options, self._recorder, role)
        except Exception as fault:
            self._recorder.notice("fault", f"probe {kind.name}: {describe(fault)}", "error")
            return
        if isinstance(slot, str):
            self.unseen[kind.name] = slot
        else:
            self.slots.append(slot)

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
                self._schedule.add_wanted(step)
            return
        self._prepared = step
        if self._outdated:
            self._outdated = False
            self._schedule.arrange()
        self._schedule.decide(step, self._recorder.watched(), wanted)

    def forward_begins(self, root: torch.nn.Module) -> bool:
        """The first forward of the step begins; whether its end is of interest."""
        plan = self._schedule.plan
        if plan.before_forward:
            with arithmetic(self.tracked.device):
                for slot in plan.before_forward:
                    self._call(slot, slot.probe.before_forward, root)
        return bool(plan.after_forward)

    def forward_ends(self) -> None:
        """It has ended."""
        with arithmetic(self.tracked.device):
            for slot in self._schedule.plan.after_forward:
                self._call(slot, slot.probe.after_forward)

    def read_gradients(self, scale: torch.Tensor | None, clipping: str = "") -> None:
        """Gradients are complete and not yet clipped. `scale`: a factor still on them.

        `clipping`: the kind of clipping that is about to come; by norm, `lend` follows.
        """
        if clipping:
            self._schedule.add_clipping()
        self._scale = scale
        self._lending = clipping == "norm" and self._trusted
        plan = self._schedule.plan
        reading = plan.own_gradients if self._lending else plan.gradients
        if reading:
            gradients: list[Gradient] = self.tracked.gradients()
            with arithmetic(self.tracked.device):
                for slot in reading:
                    slot.readings = [self._call(slot, slot.probe.gradients, gradients) or ()]
        self.fresh = True

    def lend(self, captured: Captured, clipped: Any, limit: Any, total: Any) -> None:
        """The clipping of the parameters `clipped` has computed norms of gradients, and a `total`.

        They are relied on once a clipping has shown that it gives every one of them.
        """
        found = captured.norms_of(clipped, self.tracked.parameters)
        self._with_gradient = len(self.tracked.parameters)
        lending, self._lending = self._lending, False
        if found is not None:
            self._trusted = True
        else:
            gradients = self.tracked.gradients()
            norms = captured.by_gradient()
            self._with_gradient = sum(gradient is not None for gradient in gradients)
            self._trusted = all(g is None or id(g) in norms for g in gradients)
            if not lending:
                return
            with arithmetic(self.tracked.device):
                found = norms_before(gradients, norms, clipped, limit, total, self._zero)
        if lending:
            for slot in self._schedule.plan.clip_norms:
                slot.readings = [self._call(slot, slot.probe.clip_norms, found) or ()]

    def before_update(self) -> None:
        """The optimizer is about to change the weights."""
        plan = self._schedule.plan
        if plan.before_update:
            with arithmetic(self.tracked.device):
                for slot in plan.before_update:
                    self._call(slot, slot.probe.before_update)

    def after_update(self, finished: FinishedStep) -> CompletedStep:
        """The optimizer has changed the weights: read them, and send everything to the host."""
        plan = self._schedule.plan
        self._schedule.over()
        if plan.after_update:
            with arithmetic(self.tracked.device):
                for slot in plan.after_update:
                    slot.readings.append(self._call(slot, slot.probe.after_update) or ())
        header: list[torch.Tensor] = [*finished.losses]
        if isinstance(finished.learning_rate, torch.Tensor):
            header.append(scalar(finished.learning_rate))
        for call in finished.clips:
            header += call.readings
        if self._scale is not None:
            header.append(scalar(self._scale))
        if self.skip is not None:
            header += [scalar(value) for value in self.skip]
        parts = [TransferPart(header, False)]
        own: dict[str, float] = {}
        for slot in plan.reading:
            readings = slot.readings
            flat = readings[0] if len(readings) == 1 else [r for some in readings for r in some]
            parts.append(TransferPart(flat, slot.probe.owns_readings))
            own[slot.name] = slot.spent * 1e3
        self.fresh = False
        return CompletedStep(
            optimizer=self.tracked.key,
            recorded_by=self.record,
            arrival=HostTransfer(parts, self._on_host),
            slots=plan.slots,
            finished=finished,
            time=time.time(),
            own_ms=own,
            scaled=self._scale is not None,
            with_gradient=self._with_gradient,
        )

    # ------------------------------------------------------------ on the host

    def record(self, made: CompletedStep) -> float:
        """Make the rows of a step whose values have arrived, and record them; on the training
        thread, or on the recorder's where no further step comes.

        Returns the seconds that the probes took.
        """
        values = made.arrival.values()
        facts = made.facts(values[0], lambda scale: self._skipped(scale, made.finished.step))
        record, spent = record_of(made, facts, values[1:], self._switch_off)
        self._recorder.record(record)
        for slot in self._schedule.borrowers:
            slot.held = bool(facts.clips)
        if self._governor.step(made.slots, self._schedule.at_work, facts.own_ms, facts.step_ms):
            self._outdated = True
        return spent

    def _skipped(self, scale: float, step: int) -> None:
        self._recorder.notice("skipped_step", skipped_text(scale), "warning", step)

    def _call(self, slot: ActiveProbe, work: Callable[..., Any], *args: Any) -> Any:
        """Call a probe, at its own cost; switch it off when it fails."""
        if slot.off:
            return None
        began = perf_counter()
        try:
            return work(*args)
        except Exception as fault:
            self._switch_off(slot, fault)
            return None
        finally:
            slot.spent += perf_counter() - began

    def _switch_off(self, slot: ActiveProbe, fault: Exception) -> None:
        slot.off = True
        self._outdated = True
        text = f"probe {slot.name} is switched off: {describe(fault)}"
        self._recorder.notice("fault", text, "error")


@contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """Without gradients, and in the tensors' own precision, also for a script that steps under
    autocast."""
    with torch.no_grad():
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


def norms_before(
    gradients: Sequence[Gradient],
    norms: dict[int, torch.Tensor],
    clipped: Any,
    limit: Any,
    total: Any,
    zero: torch.Tensor,
) -> list[torch.Tensor]:
    """Norms before a clipping that, against expectation, did not give them all in one go: what it
    has clipped is divided again by the factor of PyTorch's own formula."""
    given = [clipped] if isinstance(clipped, torch.Tensor) else clipped
    scaled = {id(p.grad) for p in given}
    factor: torch.Tensor | None = None
    found: list[torch.Tensor] = []
    for gradient in gradients:
        if gradient is None or id(gradient) in norms:
            found.append(zero if gradient is None else norms[id(gradient)])
            continue
        norm = torch.linalg.vector_norm(gradient.float())
        if id(gradient) in scaled:
            if factor is None:
                factor = torch.clamp(float(limit) / (total + 1e-6), max=1.0)
            norm = norm / factor
        found.append(norm)
    return found
