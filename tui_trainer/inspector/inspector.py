"""Carries out requests to inspect tensors, on the training thread at its gate."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from msgspec import structs

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.rerun import StepCapture
from tui_trainer.inspector.tensor_catalog import TensorCatalog, info_of, readable
from tui_trainer.protocol import Phase
from tui_trainer.protocol.attention import ExamineAttention
from tui_trainer.protocol.autograd import CheckGradient, DescribeGraph
from tui_trainer.protocol.formatting import bytes_
from tui_trainer.protocol.inspection import (
    MAX_ENTRIES,
    MAX_NAMES,
    DescribeUse,
    ExplainUpdate,
    HeldBytes,
    InspectionRequest,
    InspectionResult,
    ListTensors,
    OfRank,
    ParameterUse,
    ReadTensor,
    Summarize,
    TensorInfo,
    TensorRef,
    TensorSummary,
    UpdateExplanation,
)
from tui_trainer.protocol.settings import ReadSettings
from tui_trainer.protocol.travel import (
    EstimateCost,
    FindLearningRate,
    MeasureLandscape,
    ReadTimeline,
    WhatIf,
)
from tui_trainer.trace.tracer import Tracer

if TYPE_CHECKING:
    from tui_trainer.inspector.optimizer_updates import UpdateCapture
    from tui_trainer.inspector.phase_readings import PhaseReadings

MAX_COPY_BYTES = 2 << 30
"""Largest tensor that is sent as a whole: it is copied to the host first."""
PART_BYTES = 4 << 20


class Inspector:
    """Answers requests about the tensors of a traced training. Only reads: draws no random number,
    records no graph, and writes no tensor."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = weakref.ref(tracer)
        self._watch: UpdateCapture | None = None
        self._phases: PhaseReadings | None = None
        tracer.gate.hooks.leaving = self._leaving
        self.capture = StepCapture(tracer)
        self.tokens: Sequence[str] = ()
        """Texts of the model's tokens, by number; empty if unknown."""
        self.classes: Sequence[str] = ()
        """Names of the classes that the model predicts, by number."""

    def answer(self, request: InspectionRequest) -> InspectionResult | TensorCopy:
        """Carry out a request. Raises InspectionError, or whatever PyTorch raises for an unusual
        tensor."""
        # Imported with the first request: most runs get none, and need not wait for the imports.
        from tui_trainer.inspector.activations import list_activations, with_activation
        from tui_trainer.inspector.attention.examine import examine_attention
        from tui_trainer.inspector.autograd_graph import describe_graph
        from tui_trainer.inspector.gradient_check import check_gradient

        tracer = self._tracer()
        if tracer is None:
            raise InspectionError("the training has ended")
        catalog = TensorCatalog(tracer)
        with torch.no_grad():
            match request:
                case ListTensors(modules=True):
                    return list_activations(tracer, self.capture)
                case ListTensors():
                    return catalog.list_tensors()
                case Summarize(tensor=TensorRef(kind="input" | "output") as ref):
                    use = partial(_summary, request)
                    summary, note = with_activation(tracer, self.capture, ref, use)
                    return structs.replace(summary, tensor=_noted(summary.tensor, note))
                case Summarize(tensor=ref):
                    summary = _summary(request, catalog.find(ref), catalog.note(ref))
                    if not request.statistics:
                        return summary
                    readings = self._phase_readings(tracer)
                    readings.inspected(ref)
                    return structs.replace(summary, before=readings.before(ref))
                case ReadTensor(tensor=TensorRef(kind="input" | "output") as ref):
                    return with_activation(
                        tracer, self.capture, ref, lambda tensor: TensorCopy(ref, tensor)
                    )[0]
                case ReadTensor(tensor=ref):
                    return TensorCopy(ref, catalog.find(ref), catalog.note(ref))
                case DescribeUse():
                    return self._use(tracer, catalog)
                case ExplainUpdate():
                    return self._explain(tracer, request)
                case ExamineAttention():
                    names = self.tokens, self.classes
                    return examine_attention(tracer, self.capture, request, *names)
                case DescribeGraph():
                    return describe_graph(tracer, catalog, self.capture)
                case CheckGradient():
                    return check_gradient(tracer, catalog, self.capture, request)
                case OfRank():
                    raise InspectionError("requests about other ranks go to rank 0")
                case ReadSettings() | ReadTimeline():
                    raise InspectionError("this run has no settings that can be changed")
                case WhatIf() | FindLearningRate() | MeasureLandscape() | EstimateCost():
                    raise InspectionError("this run does not support experiments")

    def _leaving(self, phase: Phase, step: int) -> None:
        """Called when the run continues from a boundary, to pause again within the step."""
        tracer = self._tracer()
        if tracer is not None and (self._phases is not None or tracer.gate.pauses_next):
            self._phase_readings(tracer).read()

    def _phase_readings(self, tracer: Tracer) -> PhaseReadings:
        if self._phases is None:
            from tui_trainer.inspector.phase_readings import PhaseReadings

            self._phases = PhaseReadings(tracer)
        return self._phases

    def _use(self, tracer: Tracer, catalog: TensorCatalog) -> ParameterUse:
        """The use of all parameters, with the tensors saved in the loss's graph and the parameters
        that the graph does not reach, if the graph can be computed."""
        from tui_trainer.inspector.autograd_graph import LIVE_NOTE, describe_graph
        from tui_trainer.inspector.parameter_groups import parameter_use

        use = parameter_use(tracer, catalog)
        try:
            graph = describe_graph(tracer, catalog, self.capture)
        except (InspectionError, RuntimeError) as error:  # such as too little memory
            why = error.message if isinstance(error, InspectionError) else str(error)
            return structs.replace(use, graph_missing=why)
        if graph.source == "live" or graph.saved_bytes is None:
            return structs.replace(
                use, graph_missing="; ".join(graph.notes).removeprefix(LIVE_NOTE)
            )
        reached = {node.leaf for node in graph.nodes if node.leaf}
        saved = (HeldBytes("saved", *held) for held in graph.saved_on)
        unused = [
            name for name, p in catalog.parameters() if p.requires_grad and name not in reached
        ]
        return structs.replace(use, memory=(*use.memory, *saved), unused=tuple(unused[:MAX_NAMES]))

    def _explain(self, tracer: Tracer, request: ExplainUpdate) -> UpdateExplanation:
        """Explain an update. From the first request on, the optimizer's steps are observed for the
        latest requested parameter."""
        if (
            self._watch is None
            or self._watch.request != request
            or tracer.observers.updates is None
        ):
            from tui_trainer.inspector.optimizer_updates import UpdateCapture

            self._watch = UpdateCapture(tracer, request)
            tracer.observers.updates = self._watch
        return self._watch.explain()


def _summary(request: Summarize, found: torch.Tensor, note: str = "") -> TensorSummary:
    from tui_trainer.inspector.heat_map import heat_map
    from tui_trainer.inspector.tensor_statistics import statistics_of

    tensor = readable(found)
    entries = min(max(request.entries, 0), MAX_ENTRIES)
    empty = not tensor.numel()
    with torch.autocast(tensor.device.type, enabled=False):
        return TensorSummary(
            info_of(request.tensor, found, note),
            statistics_of(tensor, entries) if request.statistics else None,
            heat_map(tensor, request.window) if request.window and not empty else None,
        )


def _noted(info: TensorInfo, note: str) -> TensorInfo:
    return structs.replace(info, note=", ".join(filter(None, (info.note, note))))


class TensorCopy:
    """The bytes of a tensor on the host, kept while a viewer fetches them."""

    def __init__(self, ref: TensorRef, found: torch.Tensor, note: str = "") -> None:
        tensor = readable(found)
        self.info = info_of(ref, found, note)
        if self.info.bytes > MAX_COPY_BYTES:
            size, limit = bytes_(self.info.bytes, 0), bytes_(MAX_COPY_BYTES, 0)
            raise InspectionError(f"it has {size}, and at most {limit} are copied to save it")
        copied = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1)
        self._data = copied.view(torch.uint8).numpy() if copied.numel() else b""

    def part(self, offset: int) -> bytes:
        return bytes(self._data[max(0, offset) : max(0, offset) + PART_BYTES])
