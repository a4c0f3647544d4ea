"""The length of a script's run (total steps, steps per epoch, items per step), determined in its
first steps or reported by its framework, and the results of its evaluations.
`record/throughput.py` estimates the time left."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections import Counter
from fractions import Fraction
from types import FrameType
from typing import Any

import torch

from tui_trainer.protocol.schema import LOGGED, VALIDATION
from tui_trainer.run.context import RunContext
from tui_trainer.run.loop_length import (
    Loop,
    LoopNest,
    forget_sources,
    loop_nest,
    name_of_data,
)
from tui_trainer.run.outcome import OUR_DIRECTORY
from tui_trainer.run.scalars import ScalarLog
from tui_trainer.trace.tracer import Tracer

SAMPLED_STEPS = 6
"""First steps in which the loop is examined: enough to see two optimizers take turns."""
TORCH_DIRECTORY = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
TOTAL, EPOCHS, ITEMS = "total_steps", "epochs", "items_per_step"
"""Keys of `RunInfo.unseen`, whose values say why the quantity is unknown."""


class Progress:
    """Determines the length of a script's run and logs its evaluations. Used on the training
    thread."""

    def __init__(
        self, run: RunContext, tracer: Tracer, started_in: FrameType | None = None
    ) -> None:
        """`started_in`: the frame that called `watch`, perhaps within a running loop."""
        self._run = run
        self._tracer = tracer
        self._gate = run.gate
        self.validation = ScalarLog(run.recorder, run.gate, VALIDATION)
        self.scalars = ScalarLog(run.recorder, run.gate, LOGGED)
        self._started_in = _lines_of(started_in)
        self._samples: list[LoopNest] = []
        self._forwards: list[int] = []
        self._calls = 0
        self._batches: set[int] = set()
        self._may_be_sequences = False
        """Whether a batch may have the sequence as its first dimension (batch_first=False)."""
        self._framework = ""
        tracer.observers.loop = self
        tracer.evaluation.on_result = self._evaluated
        tracer.evaluation.on_ambiguous = self._ambiguous
        tracer.evaluation.label_of = name_of_data
        self._ambiguous_reported = False

    def close(self) -> None:
        self.validation.flush()
        self.scalars.flush()

    # ------------------------------------------------------------ evaluations

    def _evaluated(self, step: int, losses: dict[str, torch.Tensor | float]) -> None:
        self.validation.log(losses, step)

    def _ambiguous(self, step: int) -> None:
        if not self._ambiguous_reported:
            self._ambiguous_reported = True
            text = (
                "the evaluation computes several losses, so that none of them is shown: "
                'tui_trainer.log({"val/loss": …}) records the right one'
            )
            self._run.recorder.notice("evaluation", text, "info", step)

    # ------------------------------------------------------------ frameworks

    def framework_found(self, name: str) -> None:
        """Leave progress and evaluations to the framework `name`, which reports them itself."""
        self._framework = name
        self._tracer.evaluation.muted = True
        self._tracer.observers.loop = None

    def report(
        self,
        total_steps: int | None,
        steps_per_epoch: int | None,
        items_per_step: int | None = None,
        unseen: dict[str, str] | None = None,
        item_unit: str = "samples",
    ) -> None:
        """Report the run's length; `unseen` holds the reasons for quantities that are unknown."""
        self._gate.steps_per_epoch = steps_per_epoch
        reasons = unseen or {}
        self._gate.no_epochs = reasons.get(EPOCHS, "")
        self._run.recorder.describe(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            items_per_step=items_per_step,
            item_unit=item_unit if items_per_step else "items",
        )
        self._tracer.registry.set_loop_unseen(reasons)

    # ------------------------------------------------------------ the loop around the step

    def model_called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Part of `LoopObserver`."""
        self._calls += 1
        given = [*args, *kwargs.values()]
        first = next((v for v in given if isinstance(v, torch.Tensor) and v.dim() > 0), None)
        if first is not None:
            self._batches.add(first.shape[0])
            self._may_be_sequences |= first.dim() in (2, 3)

    def step_completed(self, step: int) -> None:
        """Part of `LoopObserver`."""
        self._samples.append(loop_nest(_frames()))
        self._forwards.append(self._calls)
        self._calls = 0
        if len(self._samples) == 2 or len(self._samples) == SAMPLED_STEPS:
            self._conclude()
        if len(self._samples) >= SAMPLED_STEPS:
            self._tracer.observers.loop = None
            self._samples.clear()
            forget_sources()

    def _conclude(self) -> None:
        found = length_of(self._samples, self._forwards, self._started_in)
        per_step = self._forwards[1:]
        items, unseen = None, dict(found.unseen)
        if len(self._tracer.roots) > 1:
            unseen[ITEMS] = "several models are called in each step"
        elif self._may_be_sequences and any(map(_is_sequence_first, self._tracer.roots)):
            unseen[ITEMS] = "the model takes sequences first (batch_first=False)"
        elif len(self._batches) == 1 and len(set(per_step)) == 1:
            items = next(iter(self._batches)) * per_step[0] or None
        self.report(found.total_steps, found.steps_per_epoch, items, unseen)


def _is_sequence_first(model: torch.nn.Module) -> bool:
    return any(getattr(module, "batch_first", None) is False for module in model.modules())


class LoopLength:
    """Steps of a loop; None where unknown, with the reason in `unseen`."""

    def __init__(self) -> None:
        self.total_steps: int | None = None
        self.steps_per_epoch: int | None = None
        self.unseen: dict[str, str] = {}


def length_of(
    samples: list[LoopNest],
    forwards: list[int],
    started_in: frozenset[tuple[str, int]] = frozenset(),
) -> LoopLength:
    """The length of the loops around the steps in `samples`; `forwards`: calls of the model before
    each. `started_in`: lines (file, number) that were being executed when tracing began."""
    found = LoopLength()
    loops = samples[-1].loops
    if not loops:
        why = "optimizer.step is not called in a loop whose source can be read"
        found.unseen = {TOTAL: why, EPOCHS: why}
        return found
    if any([each.place for each in s.loops] != [each.place for each in loops] for s in samples):
        why = "the steps are made in different loops"
        found.unseen = {TOTAL: why, EPOCHS: why}
        return found
    ratio, why = _steps_per_iteration(samples, forwards)
    if ratio is None:
        found.unseen = {TOTAL: why, EPOCHS: why}
        return found
    steps: Fraction | None = ratio
    why_total = why_epoch = ""
    for number, loop in enumerate(loops):
        if loop.length is None:
            why_total = f"{_where(loop)}: {loop.why}"
            steps = None
            break
        steps = steps * loop.length if steps is not None else None
        if steps is not None and _is_epoch(loops, number):
            if steps.denominator == 1:
                found.steps_per_epoch = int(steps)
            else:
                per_step = ratio.denominator // ratio.numerator or 1
                why_epoch = (
                    f"{_where(loop)}: {loop.length:,} batches are not a multiple of the "
                    f"{per_step} of each step"
                )
                why_total = why_total or why_epoch
                steps = None
                break
    if steps is not None:
        total = _steps_from_first(samples, ratio) or math.ceil(steps)
        inside = [each for each in loops if _was_inside(each, started_in)]
        if inside:
            why_total = f"{_where(inside[0])}: it was running when it began to be watched"
        else:
            found.total_steps = total
    if found.total_steps is None:
        found.unseen[TOTAL] = why_total
    if found.steps_per_epoch is None:
        outer = loops[-1]
        found.unseen[EPOCHS] = (
            why_epoch or why_total or f"{_where(outer)} counts steps: there are no epochs"
        )
    return found


def _steps_from_first(samples: list[LoopNest], ratio: Fraction) -> int | None:
    """The number of steps in a single loop whose first step comes late, for example after an agent
    has acted without learning; None for other loops."""
    loops, between = samples[0].loops, int(1 / ratio)
    loop = loops[0]
    if between < 1 or len(loops) > 1 or len({sample.site for sample in samples}) > 1:
        return None
    if loop.length is None or loop.position is None or loop.position < between:
        return None
    return 1 + (loop.length - 1 - loop.position) // between


def _is_epoch(loops: tuple[Loop, ...], number: int) -> bool:
    """Whether one pass of loop `number` (0: innermost) is an epoch."""
    loop = loops[number]
    further = loops[number + 1] if number + 1 < len(loops) else None
    if further is not None and "epoch" in further.target.lower():
        return True
    if any("epoch" in each.target.lower() for each in loops):
        return False
    return loop.over_data and not any(each.over_data for each in loops[number + 1 :])


def _steps_per_iteration(
    samples: list[LoopNest], forwards: list[int]
) -> tuple[Fraction | None, str]:
    """(optimizer steps per iteration of the innermost loop, ""), or (None, reason)."""
    by_site: dict[tuple[str, int], list[int | None]] = {}
    for sample in samples:
        by_site.setdefault(sample.site, []).append(sample.loops[0].position)
    total = Fraction(0)
    for positions in by_site.values():
        known = [p for p in positions if p is not None]
        steps = Counter(b - a for a, b in itertools.pairwise(known) if b > a)
        if len(known) == len(positions) and steps:
            total += Fraction(1, steps.most_common(1)[0][0])
        elif not any(sample.conditional for sample in samples):
            total += 1
        elif len(by_site) == 1 and len(set(forwards[1:])) == 1 and forwards[-1]:
            total += Fraction(1, forwards[-1])
        else:
            return None, "how many batches make a step is not known"
    return total, ""


def _where(loop: Loop) -> str:
    text = loop.text if len(loop.text) <= 60 else f"{loop.text[:59]}…"
    return f"{text} ({os.path.basename(loop.file)}, line {loop.line})"


def _was_inside(loop: Loop, lines: frozenset[tuple[str, int]]) -> bool:
    return any(file == loop.file and loop.line <= line <= loop.end for file, line in lines)


def _frames() -> list[FrameType]:
    """The script's and its libraries' frames, innermost first, up to the program's own."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((OUR_DIRECTORY, TORCH_DIRECTORY, "<frozen")):
            frames.append(frame)
            if frame.f_code.co_name == "<module>":
                break
        frame = frame.f_back
    return frames


def _lines_of(frame: FrameType | None) -> frozenset[tuple[str, int]]:
    lines = set()
    while frame is not None:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return frozenset(lines)
