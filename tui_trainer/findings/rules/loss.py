"""Rules on the curve of the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from tui_trainer.findings.observation import FIRST_LOSSES, Observation
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence, median_of
from tui_trainer.history.records import LabelCounts
from tui_trainer.protocol.formatting import percent


class InitialLoss(Rule):
    """The first loss is far from that of guessing."""

    name = "initial-loss"
    title = "the first loss is far from chance"
    needs = "the first loss, if it is recognised as a mean cross-entropy over classes"
    explanation = (
        "A classifier that predicts all K classes with equal probability has a cross-entropy of "
        "ln K. A first loss far above it means confident wrong predictions: the last layer is "
        "initialised with weights that are too large. A first loss far below it means that the "
        "model already knows the answers: a leak, or pretrained weights."
    )
    advice = "initialise the last layer with smaller weights (std 0.02 or zero), its bias with zero"
    source = 'Karpathy, A Recipe for Training Neural Networks (2019), "verify loss @ init"'
    reach = 20
    thresholds = (
        RuleThreshold("high", 1.5, "times ln K, plus 0.5"),
        RuleThreshold("low", 0.3, "times ln K"),
    )

    explained_by = ("input-scale", "initial-scale", "label-range")

    def start(self) -> None:
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done or seen.loss is None:
            return
        self._done = True
        # The classes of this very loss: a later training of the same run may have another loss.
        classes = self.facts.classes if self.facts.of_task else seen.classes
        if classes is None or self.facts.resumed or not math.isfinite(seen.loss):
            return
        chance = math.log(classes)
        high, low = self.limits["high"] * chance + 0.5, self.limits["low"] * chance
        if low <= seen.loss <= high or (seen.loss < low and not self.facts.of_task):
            return  # a pretrained model may start with a low loss
        above = seen.loss > high
        yield Found(
            seen.step,
            f"the first loss is {seen.loss:.4g}; guessing among {classes:,} classes has "
            f"ln {classes} = {chance:.3g}: "
            + (
                "the untrained model is confident in wrong predictions"
                if above
                else "the model already knows the answers"
            ),
            level="warning" if above else "info",
            phase="loss",
            evidence=(evidence("first loss", seen.loss, low, high, table="step", column="loss"),),
        )


class SoftmaxTwice(Rule):
    """Softmax is applied before cross-entropy."""

    reads = "signs"
    name = "softmax-before-cross-entropy"
    title = "softmax before cross-entropy"
    needs = "the autograd graph of the loss in two of the first five steps"
    explanation = (
        "cross_entropy expects logits and applies the softmax itself. Given probabilities, it "
        "takes the softmax of numbers between 0 and 1: the loss cannot approach 0 (with K classes "
        "it stays above about ln(1 + (K − 1)/e)), and the gradients are small."
    )
    advice = "pass the logits to cross_entropy without a softmax, or log_softmax to nll_loss"
    source = "PyTorch's documentation of CrossEntropyLoss; DeepDiagnosis (Wardat et al., ICSE 2022)"

    def start(self) -> None:
        self._first = 0
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or "softmax_twice" not in seen.signs:
            return
        if not self._first:
            self._first = seen.step
            return
        self._reported = True
        yield Found(
            self._first,
            "the loss is a cross-entropy of a softmax: cross_entropy expects logits and applies "
            "the softmax itself",
            confidence="certain",
            phase="loss",
            evidence=(
                evidence("softmax before cross_entropy", 1, high=0, text="yes", table="step",
                         column="loss"),
            ),
        )  # fmt: skip


class NoProgress(Rule):
    """The loss has not fallen since the start."""

    name = "no-progress"
    title = "the loss does not fall"
    needs = (
        "the loss of 300 steps of a run with one optimizer; for a warning also the number of "
        "classes"
    )
    explanation = (
        "After a few hundred steps the loss is where it started, within its noise. If the number "
        "of classes is known and the loss is not below ln K, the model is no better than guessing. "
        "Causes are labels that do not match the inputs (shuffled separately), inputs without "
        "information, a learning rate that is too low or far too high, and weights that are not "
        "updated. A model whose loss starts above ln K and falls no further than ln K has learnt "
        "nothing either: it is reported once the loss stands still at a learning rate that no "
        "longer rises."
    )
    advice = (
        "try to overfit a single batch: if that works, look at the data and the labels; if not, at "
        "the learning rate and at what the optimizer updates"
    )
    source = 'Karpathy, A Recipe for Training Neural Networks (2019), "overfit one batch"'
    thresholds = (
        RuleThreshold("steps", 300, "minimum number of steps"),
        RuleThreshold(
            "fall", 0.01, "smallest fall that counts, as a share of the first losses or of ln K"
        ),
    )
    explained_by = (
        "classes-mixed",
        "targets-out-of-reach",
        "updates-rounded",
        "updates-undone",
        "not-shuffled",
        "constant-inputs",
        "loss-broadcasts",
        "label-range",
        "constant-weights",
        "dead-units",
        "saturated-units",
        "input-scale",
        "target-scale",
        "schedule-ends-early",
        "non-finite",
        "gradients-kept",
        "zeroed-before-step",
        "no-gradients",
        "learning-rate-zero",
        "update-ratio-low",
        "update-ratio-high",
        "clipped-to-nothing",
        "gradients-vanish",
        "gradients-explode",
        "not-in-optimizer",
        "never-reached",
        "loss-scale",
        "softmax-before-cross-entropy",
        "loss-diverges",
    )
    slack = 1 << 62
    """Any finding may be the cause, however late its onset."""

    def start(self) -> None:
        self._highest_rate = 0.0
        self._rose_at = 0
        """Step at which the learning rate rose last."""
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        trend = self.trend
        rate = seen.learning_rate or 0.0
        if rate > 1.001 * self._highest_rate:
            self._highest_rate, self._rose_at = rate, seen.step
        if self._reported or trend.count < self.limits["steps"] or seen.step % 50:
            return
        if len(self.facts.optimizers) > 1 or self.facts.resumed:
            return
        first = np.array(trend.first[:FIRST_LOSSES])
        recent = np.array([loss for _, loss in trend.recent])
        fall = float(first.mean() - recent.mean())
        error = math.sqrt(float(first.var()) / len(first) + float(recent.var()) / len(recent))
        least = self.limits["fall"] * abs(float(first.mean()))
        highest = float(recent.max())
        classes = self.facts.classes
        chance = math.log(classes) if classes else None
        # The means hide a fall within the first steps.
        below = trend.start - highest >= least or trend.fell_at_once
        if below or (fall >= least and fall > 2 * error):
            if chance is None or float(recent.mean()) < (1 - self.limits["fall"]) * chance:
                self._reported = True  # the model has learnt something: not checked again
                return
            if seen.step - self._rose_at < len(recent) or _falls(recent):
                return  # an initial loss above that of guessing may take longer to come down
            if float(recent.mean()) > 1.2 * chance:
                self._reported = True  # a multiple of the cross-entropy, or another loss since
                return
        if abs(float(first.mean())) < 1e-12 or trend.fast > 2 * abs(trend.start):
            return
        self._reported = True
        guessing = chance is not None and float(recent.mean()) > 0.95 * chance
        text = (
            f"after {trend.count:,} steps the loss is {float(recent.mean()):.4g}; it started at "
            f"{float(first.mean()):.4g}"
        )
        if guessing:
            text += f": no better than guessing among {classes:,} classes ({chance:.3g})"
        yield Found(
            seen.step - trend.count + 1,
            text,
            level="warning" if guessing else "info",
            confidence="likely" if guessing else "possible",
            phase="loss",
            evidence=(
                evidence("loss, mean of the last 64 steps", float(recent.mean()),
                         high=0.95 * chance if chance else float(first.mean()),
                         table="step", column="loss"),
            ),
        )  # fmt: skip


def _falls(losses: NDArray[np.float64]) -> bool:
    """Whether the second half of the losses is lower than the first, beyond their noise."""
    before, after = np.array_split(losses, 2)
    error = math.sqrt(float(before.var()) / len(before) + float(after.var()) / len(after))
    return float(before.mean() - after.mean()) > 2 * error


class NoBetterThanPrior(Rule):
    """The loss is that of a model that ignores its inputs."""

    name = "no-better-than-prior"
    title = "the loss is no lower than without the inputs"
    level = "info"
    needs = (
        "100 losses that are a mean cross-entropy over classes, ten labels for each class, and a "
        "learning rate that no longer rises"
    )
    explanation = (
        "A model that ignores its inputs can reach the entropy of the labels' distribution, which "
        "is counted over the batches. This model is updated at the usual rate, and its loss is not "
        "below that entropy: so far it has learnt nothing from its inputs. Either inputs and "
        "labels do not belong together (shuffled separately, joined by the wrong key, off by one), "
        "or the inputs have lost what the labels depend on (by an augmentation, a crop or a "
        "normalisation), or learning is slow to begin. This is an early hint; if the loss has not "
        "fallen at all after 300 steps, `no-progress` warns."
    )
    advice = (
        "look at a few inputs with their labels just before the model is called; train on the "
        "inputs without augmentation; try to overfit a single batch"
    )
    source = (
        'Karpathy, A Recipe for Training Neural Networks (2019), "input-independent baseline"; '
        "Miller (1955) for the bias of the entropy"
    )
    thresholds = (
        RuleThreshold("steps", 90, "minimum number of losses"),
        RuleThreshold("share", 0.97, "of the labels' entropy, below which something is learnt"),
        RuleThreshold(
            "ratio", 2e-4, "median ‖Δw‖/‖w‖ below which updates are too small for the rule"
        ),
    )
    explained_by = NoProgress.explained_by
    slack = NoProgress.slack

    RECENT = 32
    """Number of newest losses whose mean is compared."""

    def start(self) -> None:
        self._labels: LabelCounts | None = None
        self._ratio = math.inf
        self._highest_rate = 0.0
        self._rose_at = 0
        """Step at which the learning rate rose last."""
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done:
            return
        rate = seen.learning_rate or 0.0
        if rate > 1.001 * self._highest_rate:
            self._highest_rate, self._rose_at = rate, seen.step
        if seen.updates is not None and seen.updates.finite.any():
            self._ratio = median_of(seen.updates.values[seen.updates.finite])
        if seen.batch is not None and seen.batch.labels is not None:
            self._labels = seen.batch.labels
        labels, trend = self._labels, self.trend
        if labels is None or trend.count < self.limits["steps"]:
            return
        self._done = (
            not labels.plain
            or self.facts.classes != labels.classes
            or len(self.facts.optimizers) > 1
            or self.facts.resumed
        )
        still = seen.step - self._rose_at >= self.RECENT and self._ratio >= self.limits["ratio"]
        if self._done or not still or labels.total < 10 * labels.classes:
            return
        recent = [loss for _, loss in trend.recent][-self.RECENT :]
        mean = float(np.mean(recent))
        self._done = True
        if mean < self.limits["share"] * labels.entropy or trend.fast > 1.5 * trend.start:
            return
        yield Found(
            seen.step - trend.count + 1,
            f"after {trend.count:,} steps the loss is {mean:.4g}: a model that ignores its inputs "
            f"can reach {labels.entropy:.4g}, the entropy of the labels so far",
            confidence="possible",
            phase="loss",
            evidence=(
                evidence(f"loss, mean of the last {len(recent)} steps", mean,
                         high=self.limits["share"] * labels.entropy, table="step", column="loss"),
            ),
        )  # fmt: skip


class LossDiverges(Rule):
    """The loss rises and stays high."""

    name = "loss-diverges"
    title = "the loss diverges"
    needs = "the loss of twenty steps of a run with one optimizer; losses above zero"
    explanation = (
        "The smoothed loss is twice as high as at the start, or more than half of its improvement "
        "is lost again, well outside its noise, and it stays there. Usually the learning rate is "
        "too high for this stage of the training. A loss over a number of model calls that varies "
        "from step to step (episodes in reinforcement learning) is not judged: it grows with that "
        "number."
    )
    advice = "lower the learning rate, clip gradients; look at what happened at the onset"
    source = (
        "training problems of DeepDiagnosis (Wardat et al., ICSE 2022) and TheDeepChecker (Ben "
        "Braiek & Khomh, ESEM 2022)"
    )
    thresholds = (
        RuleThreshold("rise", 2, "times the loss at the start"),
        RuleThreshold("loss_of_gain", 0.5, "share of the improvement that is lost again"),
        RuleThreshold("steps", 30, "steps in a row for the latter; a third of them for the former"),
    )
    explained_by = (
        "gradients-kept",
        "update-ratio-high",
        "part-updated-too-much",
        "learning-rate-jump",
        "no-warm-up",
        "gradients-explode",
        "attention-logits",
        "attention-entropy",
        "initial-loss",
        "overflow-ahead",
    )
    exact = True

    def start(self) -> None:
        self._above_start = Streak()
        self._above_best = Streak()
        self._varied = 0
        """Steps whose loss comes from another number of model calls than the loss before it."""
        self._noise = 0.0
        """Noise of the loss before it began to rise."""
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        trend = self.trend
        self._varied += "calls_vary" in seen.signs
        if self._reported or trend.count < FIRST_LOSSES or seen.loss is None:
            return
        if len(self.facts.optimizers) > 1 or trend.lowest < 0 or not trend.start > 0:
            return
        if self._varied > trend.count / 2:
            return
        start = trend.reference
        gain = start - trend.best
        lost = self.limits["loss_of_gain"] * max(gain, 0.0)
        if not self._above_best.count:
            self._noise = trend.noise
        bar = trend.best + lost + 4 * self._noise
        enough_gain = gain > 0.1 * start and gain > 3 * self._noise
        lost_gain = self._above_best.add(enough_gain and trend.fast > bar, seen.step)
        above = self._above_start.add(trend.fast > self.limits["rise"] * start, seen.step)
        if above < self.limits["steps"] / 3 and lost_gain < self.limits["steps"]:
            return
        self._reported = True
        over_start = above >= self.limits["steps"] / 3
        limit = self.limits["rise"] * start if over_start else bar
        onset = self._onset(min(limit, trend.best + max(gain, 0.0) / 2 + 2 * self._noise)
                            if gain > 0 else limit)  # fmt: skip
        onset = min(onset, (self._above_start if over_start else self._above_best).onset)
        yield Found(
            onset,
            f"the loss has been rising since step {onset:,}: {trend.fast:.4g} now, "
            f"{trend.best:.4g} at best (step {trend.best_step:,}), {trend.start:.4g} at the start",
            level="error" if trend.fast > 10 * start else None,
            phase="loss",
            evidence=(
                evidence("loss, smoothed", trend.fast, high=limit, table="step", column="loss"),
            ),
        )

    def _onset(self, bar: float) -> int:
        """The first of the newest steps in a row whose loss is above `bar`."""
        onset = self.trend.recent[-1][0]
        for step, loss in reversed(self.trend.recent):
            if loss <= bar:
                break
            onset = step
        return onset


class LossOscillates(Rule):
    """The loss goes up and down at every step."""

    name = "loss-oscillates"
    title = "the loss goes up and down at every step"
    level = "info"
    needs = "the loss of 64 steps of a run with one optimizer"
    explanation = (
        "The loss alternately rises and falls by a large part of its value. Pure noise changes "
        "direction at two steps in three; a change at almost every step means that each update "
        "overshoots the minimum in the opposite direction, or that two kinds of batches alternate."
    )
    advice = "lower the learning rate or the momentum; check whether batches come from two sources"
    source = "Cohen et al., Gradient Descent Typically Occurs at the Edge of Stability (ICLR 2021)"
    thresholds = (
        RuleThreshold("turns", 0.95, "share of the steps at which the loss changes direction"),
        RuleThreshold("size", 0.3, "mean change from step to step, as a share of the loss"),
    )
    explained_by = ("gradients-kept", "update-ratio-high", "learning-rate-jump")

    def start(self) -> None:
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        trend = self.trend
        if self._reported or seen.step % 32 or len(trend.recent) < 64:
            return
        if len(self.facts.optimizers) > 1:
            return
        losses = np.array([loss for _, loss in trend.recent])
        changes = np.diff(losses)
        turns = float(np.mean(changes[1:] * changes[:-1] < 0))
        size = float(np.mean(np.abs(changes)) / max(float(np.mean(np.abs(losses))), 1e-30))
        if turns < self.limits["turns"] or size < self.limits["size"]:
            return
        self._reported = True
        yield Found(
            trend.recent[0][0],
            f"the loss changed direction at {percent(turns, 0, 0)} of the last 64 steps, and "
            f"changes by {percent(size, 0, 0)} of its value from one to the next",
            confidence="possible",
            phase="loss",
            evidence=(
                evidence(
                    "steps at which the loss changes direction",
                    turns,
                    high=0.8,
                    text=percent(turns, 0, 0),
                    table="step",
                    column="loss",
                ),
            ),
        )  # fmt: skip


class OverFitting(Rule):
    """The validation loss rises while the training loss falls."""

    name = "over-fitting"
    title = "over-fitting"
    needs = "six evaluations with a loss"
    explanation = (
        "Since its best value, the validation loss has risen at several evaluations in a row while "
        "the training loss kept falling: the model is memorising the training data."
    )
    advice = "use the checkpoint of the best evaluation; add data, dropout or weight decay"
    source = "Prechelt, Early Stopping – But When? (1998)"
    thresholds = (
        RuleThreshold("rise", 0.1, "rise over the best validation loss, as a share of it"),
        RuleThreshold("evaluations", 3, "evaluations in a row above half of that rise"),
    )

    def start(self) -> None:
        self._best = math.inf
        self._best_step = 0
        self._training_loss = math.inf
        """Smoothed, at the best evaluation."""
        self._streak = Streak()
        self._count = 0
        self._reported = False

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> Iterable[Found]:
        loss = metrics.get("loss")
        if self._reported or loss is None or not math.isfinite(loss) or not self.trend.count:
            return
        self._count += 1
        if loss < self._best:
            self._best, self._best_step = loss, step
            self._training_loss = self.trend.slow
        half = self._best * (1 + self.limits["rise"] / 2)
        count = self._streak.add(self._best > 0 and loss > half, step)
        learns = self.trend.slow < self._training_loss - 0.5 * self.trend.noise
        if self._count < 6 or count < self.limits["evaluations"] or not learns:
            return
        if loss <= self._best * (1 + self.limits["rise"]):
            return
        self._reported = True
        yield Found(
            self._best_step,
            f"the validation loss has risen from {self._best:.4g} (step {self._best_step:,}) to "
            f"{loss:.4g}, while the training loss fell from {self._training_loss:.4g} to "
            f"{self.trend.slow:.4g}",
            evidence=(
                evidence("validation loss", loss, high=self._best * (1 + self.limits["rise"]),
                         table="validation", column="loss"),
            ),
        )  # fmt: skip
