"""Loss scaling, time and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from statistics import median

from tui_trainer.findings.observation import Observation, SkippedStep
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, evidence
from tui_trainer.protocol import formatting


class LossScale(Rule):
    """A GradScaler keeps skipping steps."""

    name = "loss-scale"
    title = "the GradScaler keeps skipping steps"
    needs = "skipped iterations of a GradScaler"
    explanation = (
        "A GradScaler skips an iteration when gradients overflow in float16, and halves its scale; "
        "a few skips at the start are normal. If it keeps skipping although the loss is finite, or "
        "its scale has fallen to 1, values overflow float16 (65,504) on their way back. If the "
        "loss itself is nan or inf, so are the gradients, and no scale helps."
    )
    advice = "train in bfloat16, or look for the layer whose output exceeds 65,504"
    source = "Micikevicius et al., Mixed Precision Training (ICLR 2018); PyTorch's AMP examples"
    thresholds = (
        RuleThreshold("skips", 10, "skipped iterations in a row"),
        RuleThreshold("floor", 1, "loss scale at which one skip is enough"),
    )

    explained_by = ("non-finite",)

    def start(self) -> None:
        self._count = 0
        self._broken = 0
        """Number of these iterations whose loss was not finite."""
        self._first_scale: float | None = None
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        self._count = self._broken = 0
        return ()

    def skipped(self, skipped: SkippedStep) -> Iterable[Found]:
        if skipped.reason != "scaler" or self._reported:
            return
        self._count += 1
        scale = skipped.loss_scale
        if self._count == 1:
            self._first_scale = scale
        self._broken += skipped.loss is not None and not math.isfinite(skipped.loss)
        at_floor = scale is not None and scale <= self.limits["floor"]
        if self._count < self.limits["skips"] and not at_floor:
            return
        self._reported = True
        iterations = "iteration was" if self._count == 1 else "iterations in a row were"
        text = f"{self._count} {iterations} skipped before step {skipped.step:,}"
        if self._broken == self._count:
            text += ": the loss itself is not finite, which no loss scale changes"
            advice = "find where the loss becomes nan or inf; the loss scale is not the cause"
        else:
            text += ": the gradients were not finite"
            if scale is not None and scale == self._first_scale:
                text += f" at a loss scale of {scale:g}"
            elif scale is not None:
                text += f" at any loss scale from {self._first_scale:g} to {scale:g}"
            if self._broken:
                text += f", in {self._broken} of them because the loss was not"
            advice = ""
            if at_floor:
                advice = (
                    "look for the layer whose output or gradient exceeds 65,504, or is not finite "
                    "in float32 either; train in bfloat16"
                )
        yield Found(
            skipped.step,
            text,
            parameters=tuple(each.parameter for each in skipped.nonfinite if each.parameter),
            level="error" if at_floor and self._broken < self._count else None,
            advice=advice,
            confidence="certain",
            phase="step",
            evidence=(
                evidence("iterations skipped in a row", self._count, high=self.limits["skips"],
                         text=str(self._count)),
            ),
        )  # fmt: skip


class InputBound(Rule):
    """The training waits for its data."""

    name = "input-bound"
    title = "the training waits for its data"
    needs = "the phases of 60 steps of at least 20 ms"
    explanation = (
        "More than half of each step passes before forward begins: the training waits for the next "
        "batch, or the script does other work between two steps. A training whose number of model "
        "calls varies from step to step (episodes in reinforcement learning) is not judged: the "
        "model produces the data."
    )
    advice = (
        "use a DataLoader with num_workers > 0, pin_memory and persistent_workers; decode and "
        "augment ahead of time; move other work out of the loop"
    )
    source = "PyTorch's performance tuning guide (asynchronous data loading)"
    thresholds = (
        RuleThreshold("share", 0.5, "share of the duration of a step"),
        RuleThreshold("step_ms", 20, "shortest step that is checked"),
    )

    FIRST = 10

    def start(self) -> None:
        self._count = self._varied = 0
        self._data = self._total = 0.0
        self._since = 0
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or seen.phases is None or not seen.step_ms:
            return
        data = seen.phases.get("data")
        if data is None or data != data:
            return
        self._count += 1
        self._varied += "calls_vary" in seen.signs
        if self._count <= self.FIRST:  # workers are starting
            return
        weight = 1 / min(self._count - self.FIRST, 50)
        self._data += (data - self._data) * weight
        self._total += (seen.step_ms - self._total) * weight
        share = self._data / self._total if self._total else 0.0
        if share <= self.limits["share"]:
            self._since = 0
            return
        self._since = self._since or seen.step
        if (
            self._count < self.FIRST + 50
            or seen.step - self._since < 30
            or self._total < self.limits["step_ms"]
            or self._varied > self._count / 2
        ):
            return
        self._reported = True
        yield Found(
            self._since,
            f"{formatting.percent(share, 0, 0)} of each step's "
            f"{formatting.milliseconds(self._total, 0)} pass before forward begins "
            f"({formatting.milliseconds(self._data, 0)}): the training waits for its data",
            phase="data",
            evidence=(
                evidence("share of `data` in the step", share, high=self.limits["share"],
                         text=formatting.percent(share, 0, 0), table="phase_ms", column="data"),
            ),
        )  # fmt: skip


class EvaluationExpensive(Rule):
    """Evaluations take a large part of the time."""

    name = "evaluation-expensive"
    title = "evaluation takes a large part of the time"
    level = "info"
    needs = "the times of three evaluations, at least five steps apart, and of the steps between"
    explanation = (
        "Of the time from one evaluation to the next, the evaluation itself takes more than a "
        "third. Evaluations are the calls of the model without gradients between two steps, from "
        "the first to the end of the last; where such calls make the training data (reinforcement "
        "learning), there is nothing to save."
    )
    advice = (
        "evaluate less often or on a fixed part of the validation set; use torch.inference_mode(), "
        "larger batches and as many workers as for training"
    )
    source = (
        "the limit is ours: PyTorch's MNIST and ImageNet examples evaluate 10,000 after 60,000 and "
        "50,000 after 1.28 million images, about 5 % and 1 % of the time where a step of training "
        "costs three forward passes"
    )
    thresholds = (
        RuleThreshold("share", 0.33, "share of the time from one evaluation to the next"),
        RuleThreshold("seconds", 30, "time of whole cycles before anything is reported"),
    )

    CYCLES = 2
    """Minimum number of cycles, each from the end of one evaluation to the end of the next."""
    DISTANCE = 5
    """Minimum mean number of steps between evaluations: calls at almost every step are none."""

    def start(self) -> None:
        self._first = 0
        """The step after the first evaluation."""
        self._cycles = 0
        self._evaluating = self._total = 0.0
        """Milliseconds since that step: in evaluations, and in all."""
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done or seen.phases is None or not seen.step_ms:
            return
        evaluating = seen.phases.get("eval") or 0.0
        if not self._first:
            self._first = seen.step if evaluating > 0 else 0
            return
        self._total += seen.step_ms
        if not evaluating > 0:
            return
        self._evaluating += evaluating
        self._cycles += 1
        steps = seen.step - self._first
        share = self._evaluating / self._total
        if self._cycles < self.CYCLES or self._total < 1e3 * self.limits["seconds"]:
            return
        if share <= self.limits["share"] or steps < self.DISTANCE * self._cycles:
            return
        self._done = True
        yield Found(
            self._first,
            f"evaluations took {formatting.percent(share, 0, 0)} of the "
            f"{formatting.rough_duration(self._total / 1e3)} since step {self._first:,}: "
            f"{formatting.milliseconds(self._evaluating / self._cycles, 0)} each, one every "
            f"{steps / self._cycles:.3g} steps",
            evidence=(
                evidence("share of evaluations in the time", share, high=self.limits["share"],
                         text=formatting.percent(share, 0, 0), table="phase_ms", column="eval"),
            ),
        )  # fmt: skip


class MemoryGrowth(Rule):
    """Memory grows steadily."""

    reads = "memory"
    name = "memory-growth"
    title = "memory grows"
    needs = "memory over two minutes and 100 steps"
    explanation = (
        "The memory in use keeps growing long after the first steps, in which allocators warm up. "
        "Often a list or sum keeps losses with their graphs (`total += loss` instead of "
        "`total += loss.item()`), or results are kept for every step. Host memory also grows while "
        "a memory-mapped file is read for the first time, so there it is not a warning."
    )
    advice = (
        "keep numbers instead of tensors (loss.item(), .detach()); see what grows with each step"
    )
    source = "PyTorch's FAQ, My model reports CUDA out of memory (history across the training loop)"
    thresholds = (
        RuleThreshold("share", 0.2, "growth, as a share of the memory after the start"),
        RuleThreshold("megabytes", 256, "minimum growth"),
    )

    BLOCK = 10
    MIN_BLOCKS = 10

    def start(self) -> None:
        self._block: list[float] = []
        self._blocks: list[tuple[int, float]] = []
        """(step, median bytes) of BLOCK measurements each; the first block is left out."""
        self._skipped = False
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or seen.memory is None:
            return
        device, host = seen.memory.get("device_bytes"), seen.memory.get("host_bytes")
        on_device = device is not None and device > 0
        value = device if on_device else host
        if value is None or value != value:
            return
        self._block.append(value)
        if len(self._block) < self.BLOCK:
            return
        block, self._block = self._block, []
        if not self._skipped:
            self._skipped = True
            return
        self._blocks.append((seen.step, median(block)))
        if len(self._blocks) > 60:
            del self._blocks[1:31:2]
        yield from self._judge(seen, on_device)

    def _judge(self, seen: Observation, on_device: bool) -> Iterable[Found]:
        values = [value for _, value in self._blocks]
        if len(values) < self.MIN_BLOCKS or seen.step - self._blocks[0][0] < 100:
            return
        growth = values[-1] - values[0]
        rises = sum(b > a for a, b in pairwise(values)) / (len(values) - 1)
        enough = max(self.limits["share"] * values[0], self.limits["megabytes"] * 2**20)
        if growth < enough or rises < 0.8:
            return
        self._reported = True
        where = "on the device" if on_device else "of the process"
        first, last = (formatting.bytes_(value, 0) for value in (values[0], values[-1]))
        per_step = growth / max(1, seen.step - self._blocks[0][0])
        yield Found(
            self._blocks[0][0],
            f"the memory {where} has grown from {first} to {last} since step "
            f"{self._blocks[0][0]:,}, by {formatting.bytes_(per_step, 0)} a step",
            level=None if on_device else "info",
            evidence=(
                evidence(f"memory {where}", values[-1], high=values[0] + enough, text=last,
                         table="memory", column="device_bytes" if on_device else "host_bytes"),
            ),
        )  # fmt: skip
