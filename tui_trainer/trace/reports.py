"""Makes phase reports: the results of the phase that has just ended, while the run is paused there.

A report only reads: it draws no random numbers, records no graph and keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tui_trainer.protocol import PHASES, Phase, schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.formatting import counted, shape_text
from tui_trainer.protocol.messages import PhaseReport, Quantity, Rows
from tui_trainer.trace.live_values import TracedStep
from tui_trainer.trace.script_frames import forget_variables, script_frames
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.torch_private import base_of, is_sharded

LARGEST = 5
"""Number of parameters that a report lists."""
MAX_TENSORS = 6


Report = tuple[str, list[Quantity], list[Rows]]


class PhaseReporter:
    """Makes the phase reports of one tracer."""

    def __init__(self, run: TracedStep) -> None:
        self._run = run
        self._arguments: list[tuple[str, torch.Tensor]] = []
        self._outputs: list[tuple[str, torch.Tensor]] = []
        self._before_clip: list[tuple[StepMeasurer, list[float]]] = []
        self._reported = False
        self.holds_tensors = False

    # ------------------------------------------------------------ tensors kept for a report

    def keep_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of the model, which is about to be called, until the boundary is
        passed."""
        named = [*((f"input {i + 1}", a) for i, a in enumerate(args)), *kwargs.items()]
        self._arguments = list(tensors_in(named))[:MAX_TENSORS]
        self.holds_tensors = True

    def keep_output(self, result: Any) -> None:
        """Keep the output of the model until the boundary is passed."""
        self._outputs = list(tensors_in([("output", result)]))[:MAX_TENSORS]
        self.holds_tensors = True

    def keep_norms(self, measurers: Sequence[StepMeasurer], stops_soon: bool) -> None:
        """Keep the norms of gradients that are about to be clipped, if the run `stops_soon`."""
        self._before_clip = [(m, _norms(m)) for m in measurers] if stops_soon else []

    def release(self) -> None:
        """The boundary was passed."""
        self.holds_tensors = False
        self._arguments, self._outputs = [], []
        if self._reported:
            self._reported = False
            self._run.recorder.report(None)

    # ------------------------------------------------------------ reports

    def report(self, phase: Phase, step: int) -> None:
        """Report on `phase`; the training thread is about to wait."""
        self._run.flush()
        try:
            with torch.no_grad():
                summary, quantities, rows = getattr(self, f"_{phase}")()
        except Exception as fault:
            summary, quantities, rows = f"cannot be shown: {fault}", [], []
        self._reported = self.holds_tensors = True
        self._run.recorder.report(
            PhaseReport(
                step=step,
                phase=phase,
                duration_ms=self._run.duration_ms(PHASES.index(phase)),
                summary=summary,
                quantities=tuple(quantities),
                rows=tuple(rows),
            )
        )

    def _data(self) -> Report:
        found = loop_batch(self._arguments)
        if not found:
            return "the batch is not visible: no call of the model was seen", [], []
        shapes = ", ".join(f"{name} {dtype_and_shape(t)}" for name, t in found)
        return f"the batch: {shapes}", [q for n, t in found for q in summary_of(n, t)], []

    def _zero_grad(self) -> Report:
        gradients = [g for m in self._run.registry.measurers for g in m.tracked.gradients()]
        absent = sum(g is None for g in gradients)
        present = [g for g in gradients if g is not None]
        nonzero = int(sum(torch.count_nonzero(g).item() > 0 for g in present))
        text = f"{absent} gradients are released, {len(present) - nonzero} are zero"
        if nonzero:
            text += f", {nonzero} are still there"
        return (
            text,
            [
                Quantity("gradients released (None)", float(absent)),
                Quantity("gradients all zero", float(len(present) - nonzero)),
                Quantity("gradients not zero", float(nonzero)),
            ],
            [],
        )

    def _forward(self) -> Report:
        if not self._outputs:
            return "the model returned no tensor", [], []
        shapes = ", ".join(f"{name} {dtype_and_shape(t)}" for name, t in self._outputs)
        quantities = [q for name, t in self._outputs for q in summary_of(name, t)]
        return f"the model returned {shapes}", quantities, []

    def _loss(self) -> Report:
        values = [float(loss) for loss in self._run.losses]
        if not values:
            return "backward was called on something that is not a scalar", [], []
        quantities = [Quantity("loss", values[-1])]
        text = f"the loss is {values[-1]:.4g}"
        if len(values) > 1:
            quantities.append(Quantity("sum of the step so far", sum(values)))
            text += f", {sum(values):.4g} with the {len(values) - 1} before it in this step"
        return text, quantities, []

    def _backward(self) -> Report:
        registry = self._run.registry
        quantities: list[Quantity] = []
        rows: list[Rows] = []
        count, total = 0, 0.0
        for measurer in registry.measurers:
            scale = self._run.gradient_scale(measurer)
            norms = [norm / scale for norm in _norms(measurer)]
            rows += _provisional_row(measurer, schema.GRAD_NORM, self._run.step, norms)
            own = _total(norms)
            count += sum(g is not None for g in measurer.tracked.gradients())
            total = math.hypot(total, own)
            quantities.append(Quantity(_qualified(measurer, "total norm"), own))
            quantities += _largest(measurer, norms)
        return f"gradients of {count} parameters, total norm {total:.4g}", quantities, rows

    def _clip(self) -> Report:
        clipped, self._before_clip = self._before_clip, []
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

    def _step(self) -> Report:
        step = self._run.step
        quantities: list[Quantity] = []
        why, lost = "", 0
        for measurer in self._run.registry.measurers:
            probe = measurer.probes.named(schema.UPDATE_RATIO)
            latest = getattr(probe, "latest", None)
            if latest is None or latest[0] != step:
                missing_at, missing = getattr(probe, "missing", (0, ""))
                why = missing if missing_at == step else why
                continue
            _, updates, ratios = latest
            finite = [math.isfinite(ratio) for ratio in ratios]
            there = [i for i, ratio in enumerate(ratios) if why_absent(ratio) is None]
            lost += sum(not finite[i] for i in there)
            order = sorted(there, key=lambda i: (finite[i], -ratios[i]))[:LARGEST]
            quantities.append(Quantity(_qualified(measurer, "norm of the update"), _total(updates)))
            for i in order:
                name = measurer.tracked.names[i]
                quantities.append(Quantity(f"update ratio of {name}", float(ratios[i])))
        text = f"step {step:,} is complete"
        if lost:
            text += f"; the updates of {counted(lost, 'parameter')} are not finite"
        if not quantities:
            missing = f"its update is not shown: {why}" if why else "its update was not measured"
            text = f"{text}; {missing}"
        return text, quantities, []


def _qualified(measurer: StepMeasurer, text: str) -> str:
    return f"{text} ({measurer.tracked.name})" if measurer.tracked.key else text


def _total(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm * norm for norm in norms))


def _norms(measurer: StepMeasurer) -> list[float]:
    """The present ‖g‖ of each parameter, 0 without a gradient. Waits for the device."""
    return [
        0.0 if g is None else float(torch.linalg.vector_norm(g.detach().float()))
        for g in measurer.tracked.gradients()
    ]


def _largest(measurer: StepMeasurer, norms: Sequence[float]) -> list[Quantity]:
    order = sorted(range(len(norms)), key=lambda i: -norms[i])[:LARGEST]
    return [Quantity(f"‖grad‖ of {measurer.tracked.names[i]}", norms[i]) for i in order]


def _provisional_row(
    measurer: StepMeasurer, name: str, step: int, values: Sequence[float]
) -> list[Rows]:
    """A row of the current step, before it is complete."""
    table = measurer.probes.table(name)
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


# ---------------------------------------------------------------- tensors


def dtype_and_shape(tensor: torch.Tensor) -> str:
    """`float32 12×64`"""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_nested:
        return f"{dtype} nested, of {tensor.size(0)}"
    return f"{dtype} {shape_text(tensor.shape)}"


def summary_of(name: str, tensor: torch.Tensor) -> Iterator[Quantity]:
    """Dtype and shape of `tensor`; mean, standard deviation and range of its elements."""
    yield Quantity(name, dtype_and_shape(tensor))
    if not tensor.numel() or tensor.is_complex() or tensor.layout != torch.strided:
        return
    if is_sharded(tensor) or tensor.is_nested or tensor.is_quantized:
        return
    values = tensor.detach().to(torch.float32)
    yield Quantity(f"{name} mean", float(values.mean()))
    if tensor.is_floating_point() and tensor.numel() > 1:
        yield Quantity(f"{name} std", float(values.std()))
    yield Quantity(f"{name} min", float(values.min()))
    yield Quantity(f"{name} max", float(values.max()))


def tensors_in(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in arguments and results, also inside dictionaries, lists and tuples."""
    for name, value in named:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from tensors_in((str(key), each) for key, each in value.items())
        elif isinstance(value, (list, tuple)):
            yield from tensors_in((f"{name}[{i}]", each) for i, each in enumerate(value))


def loop_batch(arguments: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """The batch by the names of the loop's variables (inputs and targets), where the model's
    `arguments` are among them or views of them; else the arguments themselves."""
    sizes = {argument.size(0) for _, argument in arguments if argument.dim()}
    batch = [
        (name, tensor)
        for name, tensor in loop_variables()
        if tensor.dim() and tensor.size(0) in sizes
    ]
    shown = {id(tensor) for _, tensor in batch}
    if any(id(a) in shown or id(base_of(a)) in shown for _, a in arguments):
        return batch[:MAX_TENSORS]
    return arguments


def loop_variables() -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the local variables of the training loop that are neither weights nor
    computed from them."""
    frame = next(script_frames(), None)
    if frame is not None:
        variables = list(frame.f_locals.items())
        forget_variables(frame)
        for name, value in variables:
            if isinstance(value, torch.Tensor) and not value.requires_grad and name[0] != "_":
                yield name, value
