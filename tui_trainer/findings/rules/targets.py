"""Labels and other targets of the loss: whether they vary, fit the loss, and can be reached."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import BatchRule, Found, RuleThreshold, Streak, evidence
from tui_trainer.history.records import BatchRecord
from tui_trainer.protocol.events import Evidence
from tui_trainer.protocol.formatting import percent

MIN_LABELS = 8
"""Minimum number of labels in a batch: eight labels drawn evenly from two classes are all equal
once in 128 batches."""
MIN_PER_CLASS = 10
"""Minimum number of labels per class for judging the distribution. At ten the estimated entropy is
too low by about 1/20 nat (Miller, 1955: (classes − 1) / (2 · labels))."""
MIN_CLASSES = 4
"""Minimum number of different labels for calling batches sorted; the entropy must also exceed that
of three equally frequent classes. Batches of two or three classes often have a single label."""
REGRESSION_LOSSES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
BOUNDS = {
    "sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "relu": (0.0, math.inf),
}
"""Activation → the limits of its output."""


class ConstantLabels(BatchRule):
    """All labels are the same class."""

    name = "constant-labels"
    title = "all labels are the same"
    needs = (
        "the targets of cross_entropy or nll_loss in six steps, eight labels each; or 1,000 "
        "examples of binary_cross_entropy with one target each, if it is the only loss"
    )
    explanation = (
        "Every target that the loss function has received is the same class. The loss falls fast "
        "and the model learns a constant. With two classes it is only a hint: if the first 1,000 "
        "examined examples are all of one class, less than 0.5 % of the data are of the other, "
        "with 99 % confidence. Usually the labels were not shuffled together with the "
        "examples, or were overwritten or cast to a type that cannot hold them; a data set sorted "
        "by class that is read without shuffling looks the same until the next class comes. Scores "
        "that are concatenated are not reported: contrastive losses have the positive pair first."
    )
    advice = "print the labels of a batch; shuffle the training data (DataLoader(shuffle=True))"
    source = (
        "faulty labels and missing shuffling are faults of TheDeepChecker (Braiek & Khomh, TOSEM "
        "2023)"
    )
    thresholds = (
        RuleThreshold("steps", 6, "measured steps in a row"),
        RuleThreshold(
            "examples", 1000, "examples of binary_cross_entropy, which often has a rare class"
        ),
    )
    explained_by = ("not-shuffled",)

    def start(self) -> None:
        super().start()
        self._label: float | None = None
        self._examples = 0
        """Number of examples in a row with the same binary target."""
        self._varied = False
        """Whether binary targets have differed, or are not one per example: they are then
        ignored."""

    def step(self, seen: Observation) -> Iterable[Found]:
        self.done = self.done or (seen.loss_graph is not None and seen.loss_graph.joined)
        return super().step(seen)

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        targets = [each for each in batch.with_role("target") if each.classes > 1]
        if not targets:
            yield from self._binary_targets(seen, batch)
            return
        labels = {value for each in targets for value in (each.low, each.high)}
        count = sum(math.prod(each.shape) - each.left_out for each in targets)
        one = len(labels) == 1 and count >= MIN_LABELS
        if not one or labels != {self._label}:
            self.streak.add(False, seen.step)
            self._label = next(iter(labels)) if one else None
        if not self.persists(one, seen.step):
            return
        yield Found(
            self.streak.onset,
            f"every label since step {self.streak.onset:,} is {self._label:.0f}, of "
            f"{targets[0].classes:,} classes",
            phase="loss",
            evidence=(evidence("different labels", 1, low=2, text="1"),),
        )

    def _binary_targets(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        targets, inputs = batch.with_role("target"), batch.with_role("input")
        if not targets or self._varied:
            return
        target = targets[0]
        one = target.name.startswith("binary_cross_entropy") and target.low == target.high
        same = self._label is None or target.low == self._label
        # A single loss with one target per example, unlike the losses of a GAN or of a mask.
        # Inputs of integers only may be pairs with negative samples.
        plain = (
            len(targets) == 1
            and len(self.facts.optimizers) == 1
            and all(info.trainable for info in self.facts.parameters.values())
            and bool(target.shape)
            and all(each.shape[:1] == target.shape[:1] for each in inputs)
            and any(each.kind == "float" for each in inputs)
            and math.prod(target.shape) == target.shape[0]
            and not (seen.loss_graph is not None and seen.loss_graph.joined)
        )
        if not one or not same or not plain:
            self._varied = True
            return
        self._label = target.low
        self._examples += target.shape[0]
        self.streak.add(True, seen.step)
        self.done = self._examples >= self.limits["examples"]
        if not self.done:
            return
        yield Found(
            self.streak.onset,
            f"every target of {target.name} since step {self.streak.onset:,} is {target.low:g}, in "
            f"{self._examples:,} examples",
            level="info",
            confidence="possible",
            phase="loss",
            evidence=(evidence("different targets", 1, low=2, text="1"),),
        )


class UnbalancedClasses(BatchRule):
    """Some classes have almost all of the labels."""

    name = "unbalanced-classes"
    title = "the classes are unbalanced"
    level = "info"
    needs = (
        "the targets of cross_entropy or nll_loss, one for each example and without weights: 200 "
        "labels, and ten for each class"
    )
    explanation = (
        "The labels of the batches so far are far from evenly distributed over the classes: a "
        "model that always predicts the most frequent one has a high accuracy already, the loss is "
        "dominated by it, and the rare classes are hardly learnt. Often the data are like that; "
        "accuracy is then not the number to look at. It is a mistake where the data were meant to "
        "be balanced: a filter, a join or a split has lost examples. Labels of every position of "
        "a text or a picture are not reported, nor losses with a weight for each class."
    )
    advice = (
        "count the labels of the training set; sample the rare classes more often "
        "(WeightedRandomSampler), or give cross_entropy a weight for each class; look at the "
        "accuracy of each class"
    )
    source = (
        "Buda, Maki & Mazurowski, A systematic study of the class imbalance problem in "
        "convolutional neural networks (2018); Pielou's evenness (1966): the entropy over ln K; "
        "unbalanced data is a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    )
    thresholds = (
        RuleThreshold("evenness", 0.5, "entropy of the labels over that of an even distribution"),
        RuleThreshold("labels", 200, "minimum number of labels"),
    )
    explained_by = ("not-shuffled",)

    def start(self) -> None:
        super().start()
        self._first = 0

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        labels = batch.labels
        if labels is None or not labels.plain or not labels.per_example:
            return
        self._first = self._first or seen.step
        if labels.total < max(self.limits["labels"], MIN_PER_CLASS * labels.classes):
            return
        self.done = True
        evenness = labels.entropy / math.log(labels.classes)
        if labels.different < 2 or evenness >= self.limits["evenness"]:
            return
        missing = labels.classes - labels.different
        yield Found(
            self._first,
            f"{percent(labels.largest, 0, 0)} of {labels.total:,} labels are class "
            f"{labels.largest_class}"
            + (f", and {missing} of {labels.classes:,} classes have no label" if missing else "")
            + f": their entropy is {percent(evenness, 0, 0)} of that of an even distribution",
            confidence="certain",
            phase="data",
            evidence=(
                evidence("evenness of the labels", evenness, low=self.limits["evenness"],
                         text=percent(evenness, 0, 0)),
            ),
        )  # fmt: skip


class NotShuffled(BatchRule):
    """Almost all examples of a batch are of one class."""

    name = "not-shuffled"
    title = "the batches are sorted by class"
    needs = (
        "the targets of cross_entropy or nll_loss, one for each example, eight in a batch, in "
        "eight batches that together have several classes"
    )
    explanation = (
        "The labels of one batch are almost all the same, while the batches together have many "
        "classes: the data set is sorted by class and read in that order. Each step then pulls the "
        "model towards one class, the loss jumps when the next one comes, and the statistics of "
        "batch normalisation are those of a single class. Training one class after the other on "
        "purpose (continual learning) looks the same."
    )
    advice = "shuffle the training data: DataLoader(shuffle=True), or a sampler that does"
    source = "missing shuffling is a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    thresholds = (
        RuleThreshold("share", 0.25, "entropy of a batch's labels over that of all labels"),
        RuleThreshold("batches", 8, "minimum number of batches"),
    )

    def start(self) -> None:
        super().start()
        self._first = 0

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        labels = batch.labels
        if labels is None or not labels.per_example or not labels.batches:
            return
        self._first = self._first or seen.step
        several = labels.different >= MIN_CLASSES and labels.entropy > math.log(MIN_CLASSES - 1)
        if labels.total < MIN_LABELS * labels.batches or labels.batches < self.limits["batches"]:
            return
        if not several:
            return
        self.done = True
        share = labels.within / labels.entropy
        if share >= self.limits["share"]:
            return
        yield Found(
            self._first,
            f"the labels of one batch are almost all of one class, those of {labels.batches} "
            f"batches of {labels.different}: their entropy is {labels.within:.2g} nats in a batch "
            f"and {labels.entropy:.2g} in all",
            phase="data",
            evidence=(
                evidence("entropy of a batch's labels over that of all", share,
                         low=self.limits["share"], text=percent(share, 0, 0)),
            ),
        )  # fmt: skip


class TargetsOutOfReach(BatchRule):
    """The targets lie outside the range of the last activation."""

    name = "targets-out-of-reach"
    title = "the outputs cannot reach the targets"
    needs = "the targets of a regression loss on the output of an activation, in three steps"
    explanation = (
        "The predictions come straight from an activation that bounds them: a sigmoid or softmax "
        "gives 0 to 1, tanh −1 to 1, a ReLU nothing below 0. The targets reach far beyond that, so "
        "the loss cannot fall below what is missing, and the units are driven into saturation. "
        "Often the inputs of an autoencoder were normalised and its output was not changed."
    )
    advice = (
        "leave out the last activation, or scale the targets to its range (images to 0…1 for a "
        "sigmoid, −1…1 for tanh)"
    )
    source = (
        "Goodfellow, Bengio & Courville, Deep Learning (2016), section 6.2.2 (output units); a "
        "wrong output activation is a fault of DeepDiagnosis (Wardat et al., ICSE 2022)"
    )
    thresholds = (
        RuleThreshold("beyond", 0.5, "standard deviations of the targets beyond the range"),
        RuleThreshold("steps", 3, "measured steps in a row"),
    )

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        bounded = [each for each in batch.with_role("target") if each.after in BOUNDS]
        if len(bounded) != 1:
            return
        target = bounded[0]
        low, high = BOUNDS[target.after]
        beyond = max(low - target.low, target.high - high)
        far = math.isfinite(beyond) and beyond > self.limits["beyond"] * target.std > 0
        if not self.persists(far, seen.step):
            return
        text = f"from {low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
        yield Found(
            self.streak.onset,
            f"the targets reach from {target.low:.3g} to {target.high:.3g}, but the predictions "
            f"come from a {target.after}, which gives {text}",
            confidence="certain",
            phase="loss",
            evidence=(
                evidence("lowest target", target.low, low=low),
                evidence("highest target", target.high, high=high if high < math.inf else None),
            ),
        )


class LabelRange(BatchRule):
    """Targets outside the range that the loss function expects."""

    name = "label-range"
    title = "targets are out of range"
    needs = "the targets of a binary or class loss in three steps"
    explanation = (
        "binary_cross_entropy_with_logits expects targets from 0 to 1. With others (−1 and 1, or 0 "
        "and 255) it raises no error, has no minimum, and falls below zero. A class loss whose "
        "targets are almost all equal to `ignore_index` trains on nothing."
    )
    advice = "map the targets to 0 and 1; check what ignore_index stands for"
    source = "PyTorch's documentation of BCEWithLogitsLoss and of CrossEntropyLoss"
    thresholds = (
        RuleThreshold("ignored", 0.99, "share of targets that are ignored"),
        RuleThreshold("steps", 3, "measured steps in a row"),
    )

    def start(self) -> None:
        super().start()
        self._streaks: dict[str, Streak] = {}
        """Loss function → streak of wrong targets."""

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        measured: tuple[Evidence, ...]
        for target in batch.with_role("target"):
            if target.name.startswith("binary_cross_entropy"):
                wrong = target.low < 0 or target.high > 1
                measured = (
                    evidence("lowest target", target.low, low=0),
                    evidence("highest target", target.high, high=1),
                )
                text = f"from {target.low:.4g} to {target.high:.4g}, not from 0 to 1"
            elif target.classes:
                share = target.left_out / math.prod(target.shape)
                wrong = share > self.limits["ignored"]
                ignored = percent(share, 1, 1)
                measured = (
                    evidence("ignored targets", share, high=self.limits["ignored"], text=ignored),
                )
                text = f"to {ignored} equal to ignore_index"
            else:
                continue
            self.streak = self._streaks.setdefault(target.name, Streak())
            if self.persists(wrong, seen.step):
                yield Found(
                    self.streak.onset,
                    f"the targets of {target.name} are {text}",
                    confidence="certain",
                    phase="loss",
                    evidence=measured,
                )
                return


class LossBroadcasts(BatchRule):
    """The loss compares an input and a target of different shapes."""

    name = "loss-broadcasts"
    title = "the loss broadcasts its inputs"
    needs = "a regression loss in three steps"
    explanation = (
        "Predictions and targets have different shapes, such as (32, 1) and (32,). PyTorch "
        "broadcasts both to (32, 32): every prediction is compared with every target, and the best "
        "that the model can do is to predict their mean. PyTorch itself warns once."
    )
    advice = "give both the same shape: prediction.squeeze(-1), or target.unsqueeze(-1)"
    source = "PyTorch's documentation of broadcasting semantics, and the warning of mse_loss"
    thresholds = (RuleThreshold("steps", 3, "measured steps in a row"),)

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        if not self.persists(bool(batch.broadcast), seen.step):
            return
        yield Found(
            self.streak.onset,
            f"{batch.broadcast} is taken of every pair of elements, not of each with its own "
            "target",
            confidence="certain",
            phase="loss",
            evidence=(evidence("pairs of different shapes", 1, high=0, text=batch.broadcast),),
        )


class TargetScale(BatchRule):
    """Targets of a regression that are far larger than 1."""

    name = "target-scale"
    title = "the targets are not normalised"
    level = "info"
    needs = "the targets of mse_loss, l1_loss, smooth_l1_loss or huber_loss in three steps"
    explanation = (
        "The outputs of an untrained model are of the order of 1, and the targets are far from "
        "that. The last layer first has to grow by that factor: with Adam its weights move by "
        "about the learning rate in a step, which takes many steps, and with SGD the first "
        "gradients are as large as the targets and the training may diverge. Returns in "
        "reinforcement learning are often of that size. Above a thousand it is a warning."
    )
    advice = (
        "subtract the mean of the training targets and divide by their standard deviation, and "
        "undo that on the predictions"
    )
    source = (
        "Bishop, Neural Networks for Pattern Recognition (1995), section 8.2; unscaled targets are "
        "a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    )
    thresholds = (
        RuleThreshold("high", 100, "larger of |mean| and standard deviation"),
        RuleThreshold("warning", 1000, "the same, from which it is a warning"),
        RuleThreshold("steps", 3, "measured steps in a row"),
    )

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        targets = [each for each in batch.with_role("target") if each.name in REGRESSION_LOSSES]
        if not targets:
            return
        target = max(targets, key=lambda each: max(abs(each.mean), each.std))
        scale = max(abs(target.mean), target.std)
        if not self.persists(scale > self.limits["high"], seen.step):
            return
        yield Found(
            self.streak.onset,
            f"the targets of {target.name} are from {target.low:.4g} to {target.high:.4g} (mean "
            f"{target.mean:.3g}, standard deviation {target.std:.3g})",
            level="warning" if scale > self.limits["warning"] else None,
            phase="data",
            evidence=(evidence("scale of the targets", scale, high=self.limits["high"]),),
        )
