"""Inputs and targets: their scale, whether they vary, and batches that stand out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from tui_trainer.findings.observation import LossTrend, Observation, RunFacts
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence
from tui_trainer.history.records import BadBatch, BatchRecord, BatchTensor
from tui_trainer.protocol.events import Level
from tui_trainer.protocol.formatting import percent


def _of_role(batch: BatchRecord, role: str) -> list[BatchTensor]:
    return [tensor for tensor in batch.tensors if tensor.role == role]


def _checksums(batch: BatchRecord) -> tuple[int, ...]:
    return tuple(each.checksum for each in _of_role(batch, "input"))


class _BatchRule(Rule):
    """Base class of rules on the batch that report once."""

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self.streak = Streak()
        self.done = False
        """Nothing more is looked at."""

    def step(self, seen: Observation) -> Iterable[Found]:
        return () if self.done or seen.batch is None else self.batch(seen, seen.batch)

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        """A step whose batch was looked at, until the rule is `done`."""
        raise NotImplementedError

    def held(self, wrong: bool, step: int) -> bool:
        """Whether `wrong` has now held at `thresholds["steps"]` measured steps in a row; the rule
        is done then."""
        self.done = self.streak.add(wrong, step) >= self.limits["steps"]
        return self.done


class InputScale(_BatchRule):
    """Inputs that are far from zero mean and unit variance."""

    name = "input-scale"
    title = "the inputs are not normalised"
    needs = "the inputs of three steps, and a first layer that is linear or a convolution"
    explanation = (
        "The first layer with weights is given numbers that are far larger, or far smaller, than "
        "about 1. Its outputs and gradients have that scale too: a learning rate that suits the "
        "other layers does not suit it, and the loss starts high or hardly moves. A first layer "
        "that normalises its input, or an embedding, is not checked, and neither is what the model "
        "itself divides before its first layer."
    )
    next = (
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
        RuleThreshold("steps", 3, "measured steps in a row"),
    )

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        given = _of_role(batch, "first layer")
        if not given:
            return
        first = given[0]
        scale = max(abs(first.mean), first.std)
        large, small = scale > self.limits["high"], 0 < scale < self.limits["low"]
        if not self.held(large or small, seen.step):
            return
        whole = any(each.kind != "float" for each in _of_role(batch, "input"))
        yield Found(
            self.streak.onset,
            f"the first layer is given numbers from {first.low:.4g} to {first.high:.4g} (mean "
            f"{first.mean:.3g}, standard deviation {first.std:.3g})"
            + (", converted from integers" if whole else ""),
            phase="data",
            evidence=(
                evidence("scale of the inputs", scale, self.limits["low"], self.limits["high"]),
            ),
        )


class ConstantInputs(_BatchRule):
    """Every example of a batch is the same."""

    name = "constant-inputs"
    title = "the inputs are constant"
    level = "error"
    needs = "the inputs of three steps"
    explanation = (
        "All examples of a batch are equal, or all numbers in it are: the model can learn nothing "
        "from its input but a constant. Usually the data was overwritten, cropped to nothing, "
        "divided as integers, or indexed by the same number."
    )
    next = "print a batch where it is made, and again just before the model is called"
    source = "unexpected constant data is a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    thresholds = (RuleThreshold("steps", 3, "measured steps in a row"),)

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        inputs = _of_role(batch, "input")
        constant = bool(inputs) and all(
            each.same_rows or (math.prod(each.shape) > 1 and each.low == each.high)
            for each in inputs
        )
        if not self.held(constant, seen.step):
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


class SameBatch(_BatchRule):
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
    next = "draw a new batch in every iteration: `for x, y in loader:`"
    source = (
        "Karpathy, A Recipe for Training Neural Networks (2019), overfit one batch on purpose only"
    )
    thresholds = (RuleThreshold("steps", 5, "measured steps with equal inputs"),)

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
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
        # Workers that yield the same data take turns: the batch changes once each had its own.
        if self._count < self.limits["steps"] or seen.step - self._onset < batch.workers:
            return
        several = (self.facts.steps_per_epoch or 1) > 1
        level: Level = "warning" if several else "info"
        if level == self._level:
            return
        self._level, self.done = level, level == "warning"
        yield Found(
            self._onset,
            f"the inputs of all {self._count} steps that were looked at are the same"
            + (
                f", although an epoch has {self.facts.steps_per_epoch:,} steps"
                if several
                else ": right for full-batch training"
            ),
            level=level,
            confidence="certain",
            phase="data",
            evidence=(evidence("steps with the same inputs", self._count, text=str(self._count)),),
        )


class BatchesRepeat(_BatchRule):
    """Several workers of a DataLoader yield the same batches."""

    name = "batches-repeat"
    title = "workers yield the same batches"
    needs = (
        "the inputs of the first steps, one more than there are workers, and a DataLoader with "
        "several of them"
    )
    explanation = (
        "Each batch comes as many times in a row as the DataLoader has worker processes, which "
        "deliver batches in turn. Each worker has its own copy of the dataset: an "
        "IterableDataset that is not divided among them yields every example once per worker, and "
        "a generator that is seeded alike in each makes the same random examples. An epoch is then "
        "several times the same data."
    )
    next = (
        "divide an IterableDataset by torch.utils.data.get_worker_info(), and seed random "
        "generators in worker_init_fn with torch.initial_seed(), which differs in each worker"
    )
    source = (
        "PyTorch's documentation of IterableDataset and of randomness in multi-process data "
        "loading (workers deliver batches in turn); the same seed in all workers is a silent "
        "error of TrainCheck (Jiang et al., OSDI 2025)"
    )

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._last: tuple[int, tuple[int, ...]] | None = None
        self._first = 0
        """The first step whose batch was that of the step before."""
        self._pairs = self._equal = 0
        self._run = 1
        """Steps in a row with the newest batch."""
        self._cut = 0
        """Steps in a row that may belong to the first such run and were not looked at."""

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
            self.done = True  # from here on too few steps are looked at
            # More workers than steps that were looked at one after the other.
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
        self.done = whole or self._equal > 0 or self._pairs >= max(4, workers)
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


class ConstantLabels(_BatchRule):
    """All labels are the same class."""

    name = "constant-labels"
    title = "all labels are the same"
    needs = "the targets of cross_entropy or nll_loss in six steps, eight labels each"
    explanation = (
        "Every target that the loss function has received is the same class. The loss falls fast "
        "and the model learns a constant. Usually the labels were not shuffled together with the "
        "examples, or were overwritten or cast to a type that cannot hold them; a data set sorted "
        "by class that is read without shuffling looks the same until the next class comes."
    )
    next = "print the labels of a batch; shuffle the training data (DataLoader(shuffle=True))"
    source = (
        "faulty labels and missing shuffling are faults of TheDeepChecker (Braiek & Khomh, TOSEM "
        "2023)"
    )
    thresholds = (RuleThreshold("steps", 6, "measured steps in a row"),)
    explained_by = ("not-shuffled",)

    MIN_LABELS = 8

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._label: float | None = None

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        targets = [each for each in _of_role(batch, "target") if each.classes > 1]
        if not targets:
            return
        labels = {value for each in targets for value in (each.low, each.high)}
        count = sum(math.prod(each.shape) - each.left_out for each in targets)
        one = len(labels) == 1 and count >= self.MIN_LABELS
        if not one or labels != {self._label}:
            self.streak.add(False, seen.step)
            self._label = next(iter(labels)) if one else None
        if not self.held(one, seen.step):
            return
        yield Found(
            self.streak.onset,
            f"every label since step {self.streak.onset:,} is {self._label:.0f}, of "
            f"{targets[0].classes:,} classes",
            phase="loss",
            evidence=(evidence("different labels", 1, low=2, text="1"),),
        )


class UnbalancedClasses(_BatchRule):
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
    next = (
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

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._first = 0

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        labels = batch.labels
        if labels is None or not labels.plain or not labels.per_example:
            return
        self._first = self._first or seen.step
        if labels.total < max(self.limits["labels"], 10 * labels.classes):
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
            + (f", and {missing} of {labels.classes:,} classes have not come up" if missing else "")
            + f": their entropy is {percent(evenness, 0, 0)} of that of an even distribution",
            confidence="certain",
            phase="data",
            evidence=(
                evidence("evenness of the labels", evenness, low=self.limits["evenness"],
                         text=percent(evenness, 0, 0)),
            ),
        )  # fmt: skip


class NotShuffled(_BatchRule):
    """Each batch has examples of one class only, or almost."""

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
    next = "shuffle the training data: DataLoader(shuffle=True), or a sampler that does"
    source = "missing shuffling is a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    thresholds = (
        RuleThreshold("share", 0.25, "entropy of a batch's labels over that of all labels"),
        RuleThreshold("batches", 8, "minimum number of batches"),
    )

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._first = 0

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        labels = batch.labels
        if labels is None or not labels.per_example or not labels.batches:
            return
        self._first = self._first or seen.step
        several = labels.different >= 4 and labels.entropy > math.log(3)
        if labels.total < 8 * labels.batches or labels.batches < self.limits["batches"]:
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


BOUNDS = {
    "sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "relu": (0.0, math.inf),
}
"""What the results of an activation lie between."""


class OutOfReach(_BatchRule):
    """The targets are outside of what the last activation can give."""

    name = "targets-out-of-reach"
    title = "the outputs cannot reach the targets"
    needs = "the targets of a regression loss of an activation's output, in three steps"
    explanation = (
        "The predictions come straight from an activation that bounds them: a sigmoid or softmax "
        "gives 0 to 1, tanh −1 to 1, a ReLU nothing below 0. The targets reach far beyond that, so "
        "the loss cannot fall below what is missing, and the units are driven into saturation. "
        "Often the inputs of an autoencoder were normalised and its output was not changed."
    )
    next = (
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
        bounded = [each for each in _of_role(batch, "target") if each.after in BOUNDS]
        if len(bounded) != 1:
            return
        target = bounded[0]
        low, high = BOUNDS[target.after]
        beyond = max(low - target.low, target.high - high)
        far = math.isfinite(beyond) and beyond > self.limits["beyond"] * target.std > 0
        if not self.held(far, seen.step):
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


class LabelRange(_BatchRule):
    """Targets that the loss function is not made for."""

    name = "label-range"
    title = "targets are out of range"
    needs = "the targets of a binary or class loss in three steps"
    explanation = (
        "binary_cross_entropy_with_logits expects targets from 0 to 1. With others (−1 and 1, or 0 "
        "and 255) it raises no error, has no minimum, and falls below zero. A class loss whose "
        "targets are almost all equal to `ignore_index` trains on nothing."
    )
    next = "map the targets to 0 and 1; check what ignore_index stands for"
    source = "PyTorch's documentation of BCEWithLogitsLoss and of CrossEntropyLoss"
    thresholds = (
        RuleThreshold("ignored", 0.99, "share of targets that are ignored"),
        RuleThreshold("steps", 3, "measured steps in a row"),
    )

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._streaks: dict[str, Streak] = {}
        """Loss function → of its targets."""

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        for target in _of_role(batch, "target"):
            if target.name.startswith("binary_cross_entropy"):
                wrong = target.low < 0 or target.high > 1
                text = f"from {target.low:.4g} to {target.high:.4g}, not from 0 to 1"
            elif target.classes:
                share = target.left_out / math.prod(target.shape)
                wrong = share > self.limits["ignored"]
                text = f"to {percent(share, 1, 1)} equal to ignore_index"
            else:
                continue
            self.streak = self._streaks.setdefault(target.name, Streak())
            if self.held(wrong, seen.step):
                yield Found(
                    self.streak.onset,
                    f"the targets of {target.name} are {text}",
                    confidence="certain",
                    phase="loss",
                    evidence=(evidence("highest target", target.high, text=f"{target.high:.4g}"),),
                )
                return


class LossBroadcasts(_BatchRule):
    """The loss compares an input and a target of different shapes."""

    name = "loss-broadcasts"
    title = "the loss broadcasts its inputs"
    needs = "a regression loss in three steps"
    explanation = (
        "Predictions and targets have different shapes, such as (32, 1) and (32,). PyTorch "
        "broadcasts both to (32, 32): every prediction is compared with every target, and the best "
        "that the model can do is to predict their mean. PyTorch itself warns once."
    )
    next = "give both the same shape: prediction.squeeze(-1), or target.unsqueeze(-1)"
    source = "PyTorch's documentation of broadcasting semantics, and the warning of mse_loss"
    thresholds = (RuleThreshold("steps", 3, "measured steps in a row"),)

    def batch(self, seen: Observation, batch: BatchRecord) -> Iterable[Found]:
        if not self.held(bool(batch.broadcast), seen.step):
            return
        yield Found(
            self.streak.onset,
            f"{batch.broadcast} is taken of every pair of elements, not of each with its own "
            "target",
            confidence="certain",
            phase="loss",
            evidence=(evidence("pairs of different shapes", 1, high=0, text=batch.broadcast),),
        )


class BadBatchRule(Rule):
    """One batch has a loss far above all before it."""

    name = "bad-batch"
    title = "one batch stands out"
    level = "info"
    needs = "the losses of 32 steps before it, on the CPU"
    explanation = (
        "The loss of this batch is several times the highest of the steps before. Its inputs were "
        "looked at while they were there: their range, rows with values that are not finite, and, "
        "where the loss function can be taken of each row, the rows with the largest shares of the "
        "loss. One such batch is often a wrong label or a broken example; many are divergence."
    )
    next = "look at these rows of the batch; clip the gradient norm if such batches are to be kept"
    source = (
        "Chowdhery et al., PaLM (2022), section 5.1: batches at loss spikes; Koh & Liang, "
        "Understanding Black-box Predictions via Influence Functions (ICML 2017)"
    )

    explained_by = ("non-finite",)
    slack = 0

    MAX_REPORTS = 3

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._reports = 0

    def step(self, seen: Observation) -> Iterable[Found]:
        bad = seen.bad_batch
        if bad is None or self._reports >= self.MAX_REPORTS:
            return
        if not math.isfinite(bad.loss) and not bad.broken_rows:
            return  # reported by `non-finite`, and nothing to add
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
        shares = ", ".join(f"{row} ({percent(share, 0, 0)})" for row, share in bad.shares[:3])
        text += f"; rows by their share of the loss: {shares}"
    return text
