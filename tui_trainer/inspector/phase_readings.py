"""Keeps statistics of tensors before a phase, to show them next to those after it."""

from __future__ import annotations

import weakref
from collections import deque

import torch
from msgspec import structs

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.tensor_catalog import TensorCatalog, readable
from tui_trainer.inspector.tensor_statistics import moments_of
from tui_trainer.protocol.inspection import BeforePhase, TensorMoments, TensorRef
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.tracer import Tracer

MAX_ENTRIES = 1 << 25
"""Maximum number of entries that are read when a paused run continues by one phase, which takes
about 0.1 s on one core. Tensors that were inspected come first."""
INSPECTED = 8
"""Number of last inspected tensors that are always read."""


class PhaseReadings:
    """Reads tensors whenever a paused run continues and will pause again within the step.

    If the run continues by single phases, all tensors are read, up to `MAX_ENTRIES`; otherwise only
    the last inspected ones. Used on the training thread.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = weakref.ref(tracer)
        self._inspected: deque[TensorRef] = deque(maxlen=INSPECTED)
        self._read: dict[TensorRef, TensorMoments] = {}
        self._whole = False
        """Whether all tensors were read, so that a missing one did not exist."""
        self._at: tuple[int, int, int] | None = None
        """Boundary of the reading, and number of rewinds of the training before it."""
        self._before = BeforePhase(0, "", None)
        """Step and phase of the reading."""

    def inspected(self, ref: TensorRef) -> None:
        """Note that `ref` was inspected and will probably be inspected again."""
        if ref in self._inspected:
            self._inspected.remove(ref)
        self._inspected.append(ref)

    def read(self) -> None:
        """Read the tensors at the present boundary."""
        tracer = self._tracer()
        if tracer is None:
            return
        gate = tracer.gate
        self._read, self._whole, self._at = {}, False, None
        if not self._inspected and not gate.pauses_next:
            return
        catalog = TensorCatalog(tracer)
        with torch.no_grad():
            found = self._found(catalog, gate.pauses_next)
            self._read = dict(zip(found, moments_of([*found.values()]), strict=True))
        self._at = (*gate.boundary, gate.rewinds)
        self._before = BeforePhase(gate.current_step, gate.phase, None)

    def _found(self, catalog: TensorCatalog, all_of_them: bool) -> dict[TensorRef, torch.Tensor]:
        found: dict[TensorRef, torch.Tensor] = {}
        for ref in self._inspected:
            try:
                found[ref] = readable(catalog.find(ref))
            except InspectionError:
                continue
        left = MAX_ENTRIES - sum(each.numel() for each in found.values())
        self._whole = all_of_them
        for ref, tensor in catalog.all_tensors() if all_of_them else ():
            if ref in found:
                continue
            left -= tensor.numel()
            if left < 0:
                self._whole = False
                break
            try:
                found[ref] = readable(tensor)
            except InspectionError:
                continue
        return found

    def before(self, ref: TensorRef) -> BeforePhase | None:
        """Statistics of a tensor before the phase that has just ended; None if it was not read."""
        tracer = self._tracer()
        if tracer is None or self._at is None or not _is_next(tracer.gate, self._at, self._before):
            return None
        moments = self._read.get(ref)
        if moments is None and ref.kind != "buffer":
            first = TensorCatalog(tracer).first_name(ref.name)
            moments = self._read.get(structs.replace(ref, name=first))
        if moments is None and not self._whole:
            return None
        return structs.replace(self._before, moments=moments)


def _is_next(gate: Gate, read_at: tuple[int, int, int], before: BeforePhase) -> bool:
    """Whether exactly one phase has ended since the reading."""
    (step, number), (read_in, read_number, rewinds) = gate.boundary, read_at
    if rewinds != gate.rewinds:
        return False
    if number == 1:
        return before.phase == "step" and read_in == step - 1
    return (read_in, read_number) == (step, number - 1)
