"""Values of the step in progress, for breakpoints within a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from tui_trainer.protocol.absent import Absent, absent, why_absent
from tui_trainer.trace.norms import clip_scale
from tui_trainer.trace.optimizer_registry import OptimizerRegistry
from tui_trainer.trace.probe import Readings, RecorderLike
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.transfer import HostTransfer


class TracedStep(Protocol):
    """The step in progress as breakpoints and phase reports read it, on the training thread at a
    phase boundary. The tracer implements it."""

    recorder: RecorderLike
    registry: OptimizerRegistry

    @property
    def step(self) -> int:
        """The current optimizer step."""

    @property
    def losses(self) -> list[torch.Tensor]:
        """Losses of the current step, 0-d each."""

    def flush(self) -> None:
        """Record every completed step."""

    def duration_ms(self, phase: int) -> float:
        """Time of a phase in this step so far."""

    def gradient_scale(self, measurer: StepMeasurer) -> float:
        """The factor that a GradScaler still has on this optimizer's gradients."""


class LiveValues:
    """Reads values of the step in progress. Waits for the device."""

    def __init__(self, run: TracedStep) -> None:
        self._run = run

    def finish(self) -> None:
        """Record the completed steps."""
        self._run.flush()

    def loss(self) -> float | None:
        """The sum of the losses so far."""
        losses = self._run.losses
        return sum(on_host(losses)) if losses else None

    def gradient_norms(self) -> tuple[tuple[str, ...], list[float | None]]:
        """(names, norms) of all parameters; None where there is no gradient or its norm before
        clipping is no longer known."""
        names: list[str] = []
        norms: list[float | None] = []
        for measurer in self._run.registry.measurers:
            tracked = measurer.tracked
            gradients = tracked.gradients()
            reading = measurer.reading
            if measurer.clips:
                known = reading.norms if reading is not None else None
            else:
                known = measurer.norms_now()
            scale = self._run.gradient_scale(measurer)
            found = on_host(known) if known is not None else [None] * len(gradients)
            names += tracked.names
            norms += [
                None if gradient is None or norm is None else norm / scale
                for gradient, norm in zip(gradients, found, strict=True)
            ]
        return tuple(names), norms

    def clip(self) -> Mapping[str, float]:
        """Columns of table `clip` for the clipping with the smallest scale, without absent ones."""
        found: dict[str, float] = {}
        clips = [clip for m in self._run.registry.measurers for clip in m.clips]
        for clip in clips:
            before = float(clip.norm_before)
            after = clip.norm_after
            after = absent(Absent.NOT_MEASURED) if after is None else float(after)
            scale = clip_scale(clip.kind, clip.max_norm, before, after)
            if clip.kind == "norm":
                after = before * scale
            if not scale >= found.get("scale", float("inf")):
                found = {
                    "max_norm": clip.max_norm,
                    "norm_before": before,
                    "norm_after": after,
                    "scale": scale,
                }
        return {name: value for name, value in found.items() if why_absent(value) is None}


def on_host(readings: Readings | Sequence[torch.Tensor]) -> list[float]:
    """Readings as numbers, in one copy per device."""
    with torch.no_grad():
        transfer = HostTransfer([(list(readings), False)], on_host=False)
        transfer.arrived(wait=True)
        return [float(value) for value in transfer.values()[0]]
