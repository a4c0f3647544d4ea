"""Measuring the steps of one optimizer with its probes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol.schema import Table
from tui_trainer.trace.governor import Governor, OnChange
from tui_trainer.trace.optimizer_slot import OptimizerSlot
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import (
    Gradient,
    Options,
    Probe,
    RecorderLike,
    StepFacts,
    describe_exception,
    skipped_text,
)
from tui_trainer.trace.schedule import ActiveProbe, ProbeSchedule
from tui_trainer.trace.step import CompletedStep, StepOutcome, make_header
from tui_trainer.trace.torch_private import NormCapture
from tui_trainer.trace.transfer import HostTransfer, TransferPart

NO_READINGS: Floats = np.empty(0, dtype=np.float32)


class StepMeasurer:
    """Calls the probes of one optimizer in the course of its steps, and records their rows."""

    def __init__(
        self,
        tracked: TrackedParameters,
        kinds: Sequence[type[Probe]],
        recorder: RecorderLike,
        options: Options,
        slot: OptimizerSlot,
        on_cadence_change: OnChange,
    ) -> None:
        self.tracked = tracked
        self.probes: list[ActiveProbe] = []
        self.unseen: dict[str, str] = {}
        """Why probes that have nothing to measure were left out."""
        self.gradients_read = False
        """Whether the gradients were read since the last backward."""
        self.skip: tuple[torch.Tensor, torch.Tensor] | None = None
        """For an optimizer that skips a step by itself when gradients are not finite: whether it
        does (above 0), and the loss scale (0-d each). Set when its step begins."""
        self._recorder = recorder
        self._governor = Governor(options.budget, on_cadence_change)
        self._prepared_step = -1
        self._scale: torch.Tensor | None = None
        self._with_gradient = 0
        self._awaiting_norms = False
        """Whether norms are expected from the clipping in progress."""
        self._clip_norms_complete = False
        """Whether the last clipping gave the norm of every gradient."""
        self._zero = torch.zeros((), device=tracked.device)
        self._on_host = all(parameter.is_cpu for parameter in tracked.parameters)
        for kind in kinds:
            if kind.name not in options.switched_off:
                self._add_probe(kind, options, slot)
        self._schedule = ProbeSchedule(self.probes)
        self._schedule_outdated = False
        """Cadences changed or a probe failed, perhaps on another thread."""

    def _add_probe(self, kind: type[Probe], options: Options, slot: OptimizerSlot) -> None:
        try:
            with torch.no_grad():
                probe = kind(self.tracked, options)
            if probe.unseen:
                self.unseen[kind.name] = probe.unseen
            else:
                self.probes.append(self._activate(probe, options, slot))
        except Exception as fault:
            text = f"probe {kind.name}: {describe_exception(fault)}"
            self._recorder.notice("fault", text, "error")

    def _activate(self, probe: Probe, options: Options, slot: OptimizerSlot) -> ActiveProbe:
        natural = max(0, options.cadences.get(probe.name, probe.every))
        watched = min(probe.watched_every, natural or probe.watched_every) if probe.topic else 0
        tables: list[Table] = []
        for spec in probe.tables:
            every = natural if spec.every is None else spec.every
            unstretched = natural or watched if spec.every is None else spec.every
            tables.append(slot.table(self._recorder, spec.name, spec.columns, every, unstretched))
        return ActiveProbe(
            name=probe.name,
            natural=natural,
            every=natural,
            importance=probe.importance,
            max_stretch=probe.max_stretch,
            watched_natural=watched,
            watched_every=watched,
            probe=probe,
            tables=tables,
        )

    def table(self, name: str) -> Table | None:
        """The table of this name that one of the probes fills."""
        return next((t for p in self.probes for t in p.tables if t.name == name), None)

    def probe(self, name: str) -> Probe | None:
        """The working probe of this name."""
        return next((p.probe for p in self.probes if p.name == name and not p.failed), None)

    # ------------------------------------------------------------ in the course of a step

    def prepare(self, step: int, stops_soon: bool) -> None:
        """Decide, once per step, which probes measure it."""
        # Gradients may have been read when they were clipped, before another optimizer's step.
        if self._prepared_step == step or self.gradients_read:
            if stops_soon:
                self._schedule.add_requested(step)
            return
        self._prepared_step = step
        if self._schedule_outdated:
            self._schedule_outdated = False
            self._schedule.update()
        self._schedule.begin_step(step, self._recorder.watched(), stops_soon)

    def before_forward(self, root: torch.nn.Module) -> bool:
        """The first forward of the step begins; returns whether `after_forward` must be called."""
        plan = self._schedule.plan
        if plan.before_forward:
            with probe_context(self.tracked.device):
                for probe in plan.before_forward:
                    self._call(probe, probe.probe.before_forward, root)
        return bool(plan.after_forward)

    def after_forward(self) -> None:
        with probe_context(self.tracked.device):
            for probe in self._schedule.plan.after_forward:
                self._call(probe, probe.probe.after_forward)

    def read_gradients(self, scale: torch.Tensor | None, clipping: str = "") -> None:
        """Gradients are complete and not clipped yet. `scale`: a factor still on them.

        `clipping`: the kind of clipping that follows; by norm, `use_clip_norms` is called then.
        """
        if clipping:
            self._schedule.add_clipping()
        self._scale = scale
        self._awaiting_norms = clipping == "norm" and self._clip_norms_complete
        plan = self._schedule.plan
        reading = plan.gradients_only if self._awaiting_norms else plan.gradients
        if reading:
            gradients: list[Gradient] = self.tracked.gradients()
            with probe_context(self.tracked.device):
                for probe in reading:
                    probe.readings = [self._call(probe, probe.probe.gradients, gradients) or ()]
        self.gradients_read = True

    def use_clip_norms(self, captured: NormCapture, clipped: Any, limit: Any, total: Any) -> None:
        """The clipping of the parameters `clipped` computed norms of gradients and their `total`.

        The norms replace our own reading once a clipping has given every one of them.
        """
        norms = captured.norms_of(clipped, self.tracked.parameters)
        self._with_gradient = len(self.tracked.parameters)
        awaited, self._awaiting_norms = self._awaiting_norms, False
        if norms is not None:
            self._clip_norms_complete = True
        else:
            gradients = self.tracked.gradients()
            by_gradient = captured.by_gradient()
            self._with_gradient = sum(gradient is not None for gradient in gradients)
            self._clip_norms_complete = all(g is None or id(g) in by_gradient for g in gradients)
            if not awaited:
                return
            with probe_context(self.tracked.device):
                norms = norms_before(gradients, by_gradient, clipped, limit, total, self._zero)
        if awaited:
            for probe in self._schedule.plan.clip_norms:
                probe.readings = [self._call(probe, probe.probe.clip_norms, norms) or ()]

    def before_update(self) -> None:
        """The optimizer is about to change the weights."""
        plan = self._schedule.plan
        if plan.before_update:
            with probe_context(self.tracked.device):
                for probe in plan.before_update:
                    self._call(probe, probe.probe.before_update)

    def after_update(self, outcome: StepOutcome) -> CompletedStep:
        """The optimizer has changed the weights: read them and start the transfer to the host."""
        plan = self._schedule.plan
        self._schedule.end_step()
        if plan.after_update:
            with probe_context(self.tracked.device):
                for probe in plan.after_update:
                    probe.readings.append(self._call(probe, probe.probe.after_update) or ())
        parts = [TransferPart(make_header(outcome, self._scale, self.skip), False)]
        own_ms: dict[str, float] = {}
        for probe in plan.reading:
            readings = probe.readings
            flat = readings[0] if len(readings) == 1 else [r for some in readings for r in some]
            parts.append(TransferPart(flat, probe.probe.owns_readings))
            own_ms[probe.name] = probe.spent_s * 1e3
        self.gradients_read = False
        return CompletedStep(
            optimizer=self.tracked.key,
            outcome=outcome,
            transfer=HostTransfer(parts, self._on_host),
            probes=plan.probes,
            time=time.time(),
            own_ms=own_ms,
            scaled=self._scale is not None,
            with_gradient=self._with_gradient,
        )

    # ------------------------------------------------------------ on the host

    def record(self, step: CompletedStep) -> float:
        """Record a step whose values have arrived; returns the seconds spent in probes.

        Called on the training thread, or on the recorder's where no further step follows.
        """
        header, *parts = step.transfer.values()
        facts = step.facts(header)
        if facts.skipped_at_scale is not None:
            text = skipped_text(facts.skipped_at_scale)
            self._recorder.notice("skipped_step", text, "warning", facts.step)
        began = perf_counter()
        rows = self._rows(step.probes, parts, facts)
        spent = perf_counter() - began
        self._recorder.record(
            StepRecord(
                step=facts.step,
                time=facts.time,
                optimizer=step.optimizer,
                rows=rows,
                clip=facts.clip,
                nonfinite=tuple(facts.nonfinite),
                own_ms=sum(facts.own_ms.values()),
            )
        )
        for probe in self._schedule.clip_readers:
            probe.with_clipping = bool(facts.clips)
        if self._governor.step(step.probes, self._schedule.working, facts.own_ms, facts.step_ms):
            self._schedule_outdated = True
        return spent

    def _rows(
        self, probes: Sequence[ActiveProbe], parts: Sequence[Floats], facts: StepFacts
    ) -> tuple[tuple[int, Floats], ...]:
        """(table id, row) of everything that the probes make of a step."""
        rows: list[tuple[int, Floats]] = []
        own_ms = facts.own_ms
        remaining = iter(parts)
        began = perf_counter()
        for probe in probes:
            values = next(remaining) if probe.hooks else NO_READINGS
            if probe.failed:
                continue
            try:
                found = probe.probe.rows(values, facts)
            except Exception as fault:
                self._switch_off(probe, fault)
                continue
            if found:
                for table, row in zip(probe.tables, found, strict=False):
                    if row is not None:
                        rows.append((table.id, row))
            ended = perf_counter()
            own_ms[probe.name] = own_ms.get(probe.name, 0.0) + (ended - began) * 1e3
            began = ended
        return tuple(rows)

    def _call(self, probe: ActiveProbe, hook: Callable[..., Any], *args: Any) -> Any:
        """Call a hook on the probe's own account; switch the probe off if it raises."""
        if probe.failed:
            return None
        began = perf_counter()
        try:
            return hook(*args)
        except Exception as fault:
            self._switch_off(probe, fault)
            return None
        finally:
            probe.spent_s += perf_counter() - began

    def _switch_off(self, probe: ActiveProbe, fault: Exception) -> None:
        probe.failed = True
        self._schedule_outdated = True
        text = f"probe {probe.name} is switched off: {describe_exception(fault)}"
        self._recorder.notice("fault", text, "error")


@contextmanager
def probe_context(device: torch.device) -> Iterator[None]:
    """No gradients, and the tensors' own precision also where a script steps under autocast."""
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
    """Norms before a clipping that, unexpectedly, did not compute all of them: the norm of what it
    clipped is divided by the factor of PyTorch's own formula."""
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
