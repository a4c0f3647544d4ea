"""Batches: the scale of the inputs, inputs that do not vary, and batches that stand out.

Labels and other targets of the loss are in `targets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import BatchRule, Found, Rule, RuleThreshold, evidence
from tui_trainer.history.records import BadBatch, BatchRecord
from tui_trainer.protocol.events import Level
from tui_trainer.protocol.formatting import percent

MIN_PAIRS = 4
"""Pairs of successive batches after which `batches-repeat` gives up; with more workers than that,
as many pairs as there are workers."""
MAX_BAD_BATCHES = 3
"""Maximum number of reports of `bad-batch` in a run."""
SPARSE = 10.0
"""Times the lower limit of `input-scale` from which the largest number of an input makes it sparse
rather than small."""
SAME_RISE = 20
"""Steps after a bad batch within which another one belongs to the same rise of the loss."""
MAX_ROWS = 3
"""Maximum number of rows of a bad batch that are listed with their shares of the loss."""


def _checksums(batch: BatchRecord) -> tuple[int, ...]:
    return tuple(each.checksum for each in batch.with_role("input"))


class InputScale(BatchRule):
    """Inputs that are far from zero mean and unit variance."""

    name = "input-scale"
    title = "the inputs are not normalised"
    needs = "the inputs of three steps, and a first layer that is linear or a convolution"
    explanation = (
        "The inputs of the first layer with weights are far larger or far smaller than 1. The "
        "outputs and gradients of the layer have the same scale: a learning rate that suits the "
        "other layers does not suit this one, and the loss starts high or hardly moves. Inputs "
        "that vary by much less than their mean (normalised twice, for example) reach the layer "
        "as a constant. A first layer that normalises its input, an embedding, and inputs that "
        "the model itself scales before its first layer are not checked. The rule finds integers "
        "that were cast to float without being divided, such as pixels from 0 to 255; integers of "
        "a scale of about 1, such as features that were rounded to 0 and 1, look like intended "
        "features."
    )
    advice = (
        "subtract the mean and divide by the standard deviation of the training data (for images: "
        "divide by 255 first)"
    )
    source = (
        "LeCun, Bottou, Orr & Müller, Efficient BackProp (1998), normalizing the inputs; "
        "unnormalised data is a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    )
    thresholds = (
        RuleThreshold("high", 20, "larger of |mean| and standard deviation"),
        RuleThreshold("low", 0.004, "the same; images divided by 255 twice are below it"),
        RuleThreshold("variation", 0.02, "standard deviation over |mean|"),
        RuleThreshold("steps", 3, "measured steps in a row"),
    )

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        given = batch.with_role("first layer")
        if not given:
            return
        first = given[0]
        scale = max(abs(first.mean), first.std)
        large, small = scale > self.limits["high"], 0 < scale < self.limits["low"]
        # Sparse features (TF-IDF) are nearly all zero, and have a few larger numbers.
        small = small and max(abs(first.low), abs(first.high)) < SPARSE * self.limits["low"]
        flat = 0 < first.std < self.limits["variation"] * abs(first.mean)
        if not self.persists(large or small or flat, seen.step):
            return
        whole = any(each.kind != "float" for each in batch.with_role("input"))
        pixels = first.low == 0 and 128 <= first.high <= 255 and first.high == int(first.high)
        yield Found(
            self.streak.onset,
            f"the first layer is given numbers from {first.low:.4g} to {first.high:.4g} (mean "
            f"{first.mean:.3g}, standard deviation {first.std:.3g})"
            + (", converted from integers" if whole else "")
            + (": bytes, such as pixels, that nothing has divided by 255" if pixels else ""),
            advice="divide by 255 where the bytes become floats, before the mean is subtracted"
            if pixels
            else "",
            phase="data",
            evidence=(
                evidence("scale of the inputs", scale, self.limits["low"], self.limits["high"])
                if large or small
                else evidence(
                    "standard deviation over |mean|",
                    first.std / abs(first.mean),
                    low=self.limits["variation"],
                ),
            ),
        )


class ConstantInputs(BatchRule):
    """Every example of a batch is the same."""

    name = "constant-inputs"
    title = "the inputs are constant"
    level = "error"
    needs = "the inputs of three steps"
    explanation = (
        "All examples of a batch are equal, or all numbers in it are: the model can learn nothing "
        "from its input but a constant. Usually the data was overwritten, cropped to nothing, "
        "rounded to zero by an integer division, or always indexed with the same number."
    )
    advice = "print a batch where it is made, and again just before the model is called"
    source = "unexpected constant data is a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    thresholds = (RuleThreshold("steps", 3, "measured steps in a row"),)

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        inputs = batch.with_role("input")
        constant = bool(inputs) and all(
            each.same_rows or (math.prod(each.shape) > 1 and each.low == each.high)
            for each in inputs
        )
        if not self.persists(constant, seen.step):
            return
        count = self.streak.count
        first = inputs[0]
        what = (
            f"all its numbers are {first.low:.4g}"
            if first.low == first.high
            else f"its {first.shape[0]} examples are equal"
        )
        yield Found(
            self.streak.onset,
            f"the input of the model is constant since step {self.streak.onset:,}: {what}",
            confidence="certain",
            phase="data",
            evidence=(evidence("steps with a constant input", count, high=0, text=str(count)),),
        )


class SameBatch(BatchRule):
    """The model is given the same batch at every step."""

    name = "same-batch"
    title = "every step has the same batch"
    needs = "the inputs of the first steps"
    explanation = (
        "The inputs of every step have the same bits. That is right for full-batch training and "
        "when over-fitting one batch on purpose, and a mistake where `next(iter(loader))` is "
        "called in the loop or the batch is drawn outside of it. It is a warning where the loop "
        "is known to go over more than one batch."
    )
    advice = "draw a new batch in every iteration: `for x, y in loader:`"
    source = (
        "Karpathy, A Recipe for Training Neural Networks (2019), overfit one batch on purpose only"
    )
    explained_by = ("constant-inputs",)
    thresholds = (RuleThreshold("steps", 5, "measured steps with equal inputs"),)

    def start(self) -> None:
        super().start()
        self._first: tuple[int, ...] | None = None
        self._onset = self._count = 0
        self._level: Level | None = None

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        inputs = _checksums(batch)
        if not inputs:
            return
        if self._first is None:
            self._first, self._onset = inputs, seen.step
        if inputs != self._first:
            self.done = True
            return
        self._count += 1
        # Workers that yield the same data deliver each batch in turn before the batch changes.
        if self._count < self.limits["steps"] or seen.step - self._onset < batch.workers:
            return
        several = (self.facts.steps_per_epoch or 1) > 1
        level: Level = "warning" if several else "info"
        if level == self._level:
            return
        self._level, self.done = level, level == "warning"
        yield Found(
            self._onset,
            f"the inputs of all {self._count} examined steps are the same"
            + (
                f", although an epoch has {self.facts.steps_per_epoch:,} steps"
                if several
                else ": right for full-batch training"
            ),
            level=level,
            confidence="certain",
            phase="data",
            evidence=(
                evidence("steps with the same inputs", self._count, high=1, text=str(self._count)),
            ),
        )


class BatchesRepeat(BatchRule):
    """Several workers of a DataLoader yield the same batches."""

    name = "batches-repeat"
    title = "workers yield the same batches"
    needs = (
        "a DataLoader with several workers, and the inputs of the first steps, one more than there "
        "are workers"
    )
    explanation = (
        "Each batch repeats as many times in a row as the DataLoader has worker processes, which "
        "deliver batches in turn. Each worker has its own copy of the dataset: an "
        "IterableDataset that is not divided among the workers yields every example once per "
        "worker, and a random generator with the same seed in every worker makes the same "
        "examples. An epoch then contains the same data several times."
    )
    advice = (
        "divide an IterableDataset by torch.utils.data.get_worker_info(), and seed random "
        "generators in worker_init_fn with torch.initial_seed(), which differs in each worker"
    )
    source = (
        "PyTorch's documentation of IterableDataset and of randomness in multi-process data "
        "loading (workers deliver batches in turn); the same seed in all workers is a silent "
        "error of TrainCheck (Jiang et al., OSDI 2025)"
    )

    def start(self) -> None:
        super().start()
        self._last: tuple[int, tuple[int, ...]] | None = None
        self._first = 0
        """The first step whose batch equals that of the step before."""
        self._pairs = self._equal = 0
        self._run = 1
        """Length of the run of equal batches that ends with the newest one."""
        self._cut = 0
        """Steps before the first examined one that may belong to the first run."""

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        inputs, workers = _checksums(batch), batch.workers
        last, self._last = self._last, (seen.step, inputs)
        if last is None:
            self._cut = min(seen.step - 1, 1)
            self.done = workers < 2
            return
        equal = inputs == last[1]
        run, self._run = self._run, self._run + 1 if equal else 1
        if seen.step != last[0] + 1:
            self.done = True  # from here on, only some steps are examined
            # All batches so far were equal, and there are at least as many workers.
            if 1 < run == self._pairs + 1 <= workers and not equal:
                yield self._found(workers)
            return
        self._pairs += 1
        if equal:
            self._equal += 1
            self._first = self._first or seen.step
            self.done = self._run > workers
            return
        whole = run == workers or (run > 1 and run + self._cut == workers)
        self.done = whole or self._equal > 0 or self._pairs >= max(MIN_PAIRS, workers)
        self._cut = 0
        if whole:
            yield self._found(workers)

    def _found(self, workers: int) -> Found:
        return Found(
            self._first,
            f"{self._equal} of {self._pairs} batches are equal to the one before them: the "
            f"{workers} workers of the DataLoader yield the same data",
            phase="data",
            evidence=(
                evidence(
                    "share of repeated batches",
                    self._equal / self._pairs,
                    high=0.0,
                    text=percent(self._equal / self._pairs, 0, 0),
                ),
            ),
        )


class BadBatchRule(Rule):
    """One batch has a loss far above all before it."""

    reads = "bad_batch"
    name = "bad-batch"
    title = "one batch stands out"
    level = "info"
    needs = "the losses of 32 steps before it, on the CPU"
    explanation = (
        "The loss of this batch is several times the highest loss of the steps before. Its inputs "
        "were examined in that step: their range, rows with values that are not finite and, where "
        "the loss function can be applied to single rows, the rows with the largest shares of the "
        "loss. One such batch often means a wrong label or a broken example, many mean divergence."
    )
    advice = (
        "look at these rows of the batch; clip the gradient norm if such batches are to be kept"
    )
    source = (
        "Chowdhery et al., PaLM (2022), section 5.1: batches at loss spikes; Koh & Liang, "
        "Understanding Black-box Predictions via Influence Functions (ICML 2017)"
    )
    thresholds = (
        RuleThreshold("factor", 4, "times the highest loss of the 32 steps before, at least 4"),
    )
    explained_by = ("non-finite", "learning-rate-jump", "update-ratio-high")
    slack = 0

    def start(self) -> None:
        self._reports = 0
        self._last = -SAME_RISE

    def step(self, seen: Observation) -> Iterable[Found]:
        bad = seen.bad_batch
        if bad is None or self._reports >= MAX_BAD_BATCHES:
            return
        last, self._last = self._last, seen.step
        if seen.step - last < SAME_RISE:
            return  # the loss continues to rise: not one batch
        if not math.isfinite(bad.loss) and not bad.broken_rows:
            return  # reported by `non-finite`, and nothing to add
        if bad.loss < self.limits["factor"] * bad.usual:
            return
        self._reports += 1
        yield Found(
            seen.step,
            f"the loss of step {seen.step:,} is {bad.loss:.4g}"
            + (f", the highest before was {bad.usual:.4g}" if bad.usual else "")
            + _rows(bad),
            confidence="certain",
            phase="data",
            key=str(seen.step),
            evidence=(
                evidence("loss", bad.loss, high=bad.usual or None, table="step", column="loss",
                         text=f"{bad.loss:.4g}"),
            ),
        )  # fmt: skip


def _rows(bad: BadBatch) -> str:
    text = ""
    if bad.broken_rows:
        rows = ", ".join(str(row) for row in bad.broken_rows)
        text += f"; rows with inputs that are not finite: {rows}"
    elif math.isfinite(bad.low):
        text += f"; its inputs are from {bad.low:.4g} to {bad.high:.4g}"
    if bad.shares:
        shares = ", ".join(
            f"{row} ({percent(share, 0, 0)})" for row, share in bad.shares[:MAX_ROWS]
        )
        text += f"; rows by their share of the loss: {shares}"
    return text
