"""What the phase that has just ended produced, made only while the run is stopped at its boundary.

A report only reads: no random number is drawn, no gradient is recorded, nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from tui_trainer.protocol import PHASES, Phase, schema
from tui_trainer.protocol.messages import PhaseReport, Quantity, Rows
from tui_trainer.trace.measurement import StepMeasurer
from tui_trainer.trace.optimizers import OptimizerRegistry
from tui_trainer.trace.phases import MAX_TENSORS, locals_of_the_loop, shape, summary, tensors_in
from tui_trainer.trace.probe import RecorderLike

LARGEST = 5


class Stopped(Protocol):
    """What is reported on: a tracer whose training thread is about to wait."""

    recorder: RecorderLike
    registry: OptimizerRegistry

    @property
    def step(self) -> int:
        """The optimizer step in the making."""

    @property
    def losses(self) -> list[torch.Tensor]:
        """Its losses so far, 0-d each."""

    def flush(self) -> None:
        """Record every step already made."""

    def duration_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far."""

    def gradient_scale(self, measurer: StepMeasurer) -> float:
        """The factor that a GradScaler still has on this optimizer's gradients."""


class Reporter:
    """Makes the phase reports of one tracer, given as a weak reference."""

    def __init__(self, tracer: Callable[[], Stopped | None]) -> None:
        self._tracer = tracer
        self._arguments: list[tuple[str, torch.Tensor]] = []
        self._outputs: list[tuple[str, torch.Tensor]] = []
        self._before: list[tuple[StepMeasurer, list[float]]] = []
        self._shown = False
        self._holds = False
        """Whether there is something to let go of once the run goes on."""

    # ------------------------------------------------------------ what is kept while stepping

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to be called with these; kept until the boundary is passed."""
        named = [*((f"input {i + 1}", a) for i, a in enumerate(args)), *kwargs.items()]
        self._arguments = list(tensors_in(named))[:MAX_TENSORS]
        self._holds = True

    def output(self, result: Any) -> None:
        """The model returned this."""
        self._outputs = list(tensors_in([("output", result)]))[:MAX_TENSORS]
        self._holds = True

    def before_clip(self, measurers: Sequence[StepMeasurer], stops_soon: bool) -> None:
        """Gradients are about to be clipped; somebody may look at that."""
        self._before = (
            [(measurer, _norms(measurer)) for measurer in measurers] if stops_soon else []
        )

    def passed(self) -> None:
        """The run goes on."""
        if not self._holds:
            return
        self._holds = False
        self._arguments, self._outputs = [], []
        if self._shown:
            self._shown = False
            tracer = self._tracer()
            if tracer is not None:
                tracer.recorder.report(None)

    # ------------------------------------------------------------ reports

    def make(self, phase: Phase, step: int) -> None:
        """Report on `phase`; the training thread is about to wait."""
        tracer = self._tracer()
        if tracer is None:
            return
        tracer.flush()
        try:
            with torch.no_grad():
                summary, quantities, rows = getattr(self, f"_{phase}")(tracer)
        except Exception as fault:
            summary, quantities, rows = f"cannot be shown: {fault}", [], []
        self._shown = self._holds = True
        tracer.recorder.report(
            PhaseReport(
                step=step,
                phase=phase,
                duration_ms=tracer.duration_ms(PHASES.index(phase)),
                summary=summary,
                quantities=tuple(quantities),
                rows=tuple(rows),
            )
        )

    def _data(self, tracer: Stopped) -> Report:
        found = self._arguments or list(locals_of_the_loop())
        if not found:
            return "the next batch is not in sight before the model is called", [], []
        shapes = ", ".join(f"{name} {shape(t)}" for name, t in found)
        return f"the batch: {shapes}", [q for n, t in found for q in summary(n, t)], []

    def _zero_grad(self, tracer: Stopped) -> Report:
        gradients = [g for m in tracer.registry.measurers for g in m.tracked.gradients()]
        absent = sum(g is None for g in gradients)
        present = [g for g in gradients if g is not None]
        nonzero = int(sum(torch.count_nonzero(g).item() > 0 for g in present))
        text = f"{absent} gradients are released, {len(present) - nonzero} are zero"
        if nonzero:
            text += f", {nonzero} are left from before"
        return (
            text,
            [
                Quantity("gradients released (None)", float(absent)),
                Quantity("gradients all zero", float(len(present) - nonzero)),
                Quantity("gradients not zero", float(nonzero)),
            ],
            [],
        )

    def _forward(self, tracer: Stopped) -> Report:
        if not self._outputs:
            return "the model returned no tensor", [], []
        shapes = ", ".join(f"{name} {shape(t)}" for name, t in self._outputs)
        return (
            f"the model gave {shapes}",
            [q for name, t in self._outputs for q in summary(name, t)],
            [],
        )

    def _loss(self, tracer: Stopped) -> Report:
        values = [float(loss) for loss in tracer.losses]
        if not values:
            return "backward was called on something that is no scalar", [], []
        quantities = [Quantity("loss", values[-1])]
        text = f"the loss is {values[-1]:.4g}"
        if len(values) > 1:
            quantities.append(Quantity("sum of the step so far", sum(values)))
            text += f", {sum(values):.4g} with the {len(values) - 1} before it in this step"
        return text, quantities, []

    def _backward(self, tracer: Stopped) -> Report:
        if not tracer.registry.measurers:
            tracer.registry.search(None)
        quantities: list[Quantity] = []
        rows: list[Rows] = []
        count, total = 0, 0.0
        for measurer in tracer.registry.measurers:
            scale = tracer.gradient_scale(measurer)
            norms = [norm / scale for norm in _norms(measurer)]
            rows += _provisional(measurer, schema.GRAD_NORM, tracer.step, norms)
            own = float(np.sqrt(np.sum(np.square(norms))))
            count += sum(g is not None for g in measurer.tracked.gradients())
            total = float(np.hypot(total, own))
            quantities.append(Quantity(_of(measurer, "total norm"), own))
            quantities += _largest(measurer, norms)
        return f"gradients of {count} parameters, total norm {total:.4g}", quantities, rows

    def _clip(self, tracer: Stopped) -> Report:
        clipped, self._before = self._before, []
        if not clipped:
            return "gradients are clipped", [], []
        before = _total(norm for _, norms in clipped for norm in norms)
        after = [_norms(measurer) for measurer, _ in clipped]
        now = _total(norm for norms in after for norm in norms)
        scale = now / before if before else 1.0
        quantities = [
            Quantity("norm before", before),
            Quantity("norm after", now),
            Quantity("scale", scale),
        ]
        shares: list[tuple[float, str]] = []
        for (measurer, norms), own_after in zip(clipped, after, strict=True):
            if len(clipped) > 1:
                name = measurer.tracked.name
                quantities.append(Quantity(f"norm before ({name})", _total(norms)))
                quantities.append(Quantity(f"norm after ({name})", _total(own_after)))
            for name, norm in zip(measurer.tracked.names, norms, strict=True):
                shares.append(((norm / before) ** 2 if before else 0.0, name))
        for share, name in sorted(shares, key=lambda pair: -pair[0])[:LARGEST]:
            quantities.append(Quantity(f"share of {name}", share))
        text = (
            f"clipped from {before:.4g} to {now:.4g}, to {scale:.1%}"
            if scale < 1 - 1e-6
            else f"not clipped: the norm is {before:.4g}"
        )
        return text, quantities, []

    def _step(self, tracer: Stopped) -> Report:
        quantities: list[Quantity] = []
        why = "it was not measured in this step"
        for measurer in tracer.registry.measurers:
            probe = measurer.probe(schema.UPDATE_RATIO)
            latest = getattr(probe, "latest", None)
            if latest is None or latest[0] != tracer.step:
                step, missing = getattr(probe, "missing", (0, ""))
                why = missing if step == tracer.step else why
                continue
            _, updates, ratios = latest
            order = sorted(range(len(ratios)), key=lambda i: -ratios[i])[:LARGEST]
            quantities.append(Quantity(_of(measurer, "norm of the update"), _total(updates)))
            for i in order:
                name = measurer.tracked.names[i]
                quantities.append(Quantity(f"update ratio of {name}", float(ratios[i])))
        text = f"step {tracer.step} is made"
        return text if quantities else f"{text}; its update is not shown: {why}", quantities, []


Report = tuple[str, list[Quantity], list[Rows]]


def _of(measurer: StepMeasurer, text: str) -> str:
    return f"{text} ({measurer.tracked.name})" if measurer.tracked.key else text


def _total(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm * norm for norm in norms))


def _norms(measurer: StepMeasurer) -> list[float]:
    """‖g‖ of each parameter now, 0 where there is none. Waits for the device."""
    return [
        0.0 if g is None else float(torch.linalg.vector_norm(g.detach().float()))
        for g in measurer.tracked.gradients()
    ]


def _largest(measurer: StepMeasurer, norms: Sequence[float]) -> list[Quantity]:
    order = sorted(range(len(norms)), key=lambda i: -norms[i])[:LARGEST]
    return [Quantity(f"‖grad‖ of {measurer.tracked.names[i]}", norms[i]) for i in order]


def _provisional(
    measurer: StepMeasurer, name: str, step: int, values: Sequence[float]
) -> list[Rows]:
    """One row of the step in the making."""
    table = measurer.table(name)
    if table is None:
        return []
    return [
        Rows(
            table=table.id,
            first=0,
            count=1,
            steps=np.array([step], dtype="<i8").tobytes(),
            values=np.array(values, dtype="<f4").tobytes(),
        )
    ]
