"""Rules about how the loss is computed from the outputs, read from its autograd graph."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, evidence, named
from tui_trainer.history.records import LossGraph

NEEDS = "the autograd graph of the first loss, which a compiled model does not show"


class _LossGraphRule(Rule):
    """Base class of rules that examine the autograd graph of the first loss."""

    reads = "loss_graph"
    needs = NEEDS

    def start(self) -> None:
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done or seen.loss_graph is None:
            return ()
        self._done = True
        return self.graph(seen, seen.loss_graph)

    def graph(self, seen: Observation, graph: LossGraph) -> Iterable[Found]:
        raise NotImplementedError


class SoftmaxOverBatch(_LossGraphRule):
    """The softmax of the loss is taken over the examples."""

    name = "softmax-over-batch"
    title = "the softmax is taken over the batch"
    explanation = (
        "The softmax of the loss runs over the first dimension of a matrix of outputs, which is "
        "that of the examples: the probabilities of one class add up to 1 over the batch, instead "
        "of those of one example over the classes. The model is rewarded for ranking examples, "
        "and what it predicts for one depends on the others in its batch."
    )
    advice = "take softmax or log_softmax over the last dimension: dim=-1"
    source = "a fault of TheDeepChecker's catalogue (Braiek & Khomh, TOSEM 2023)"

    def graph(self, seen: Observation, graph: LossGraph) -> Iterable[Found]:
        if graph.over_rows:
            yield Found(
                seen.step,
                f"the softmax of the loss is taken over the {graph.rows:,} examples of a batch, "
                f"not over the {graph.classes:,} outputs of each",
                phase="loss",
                evidence=(evidence("dimension of the softmax", 0, low=1, text="0"),),
            )


class ClassesMixed(_LossGraphRule):
    """A view makes rows of classes out of a dimension other than that of the classes."""

    name = "classes-mixed"
    title = "a view mixes classes and positions"
    explanation = (
        "The model returns the scores of all classes for every pixel or position, with the classes "
        "in dimension 1: (N, classes, …). A view or reshape turns the scores into rows of classes "
        "without moving that dimension to the end first, so that each row holds neighbouring "
        "numbers of one class. Each row is then compared with the label of another position; the "
        "shapes fit, and the loss stays near what the frequencies of the labels alone allow."
    )
    advice = (
        "give cross_entropy the scores as they are, (N, classes, …) with targets (N, …); or call "
        "permute(0, 2, 3, 1) before reshape(-1, classes)"
    )
    source = "PyTorch's documentation of CrossEntropyLoss (shapes), and of Tensor.view"

    def graph(self, seen: Observation, graph: LossGraph) -> Iterable[Found]:
        if graph.mixed_view:
            shape = ", ".join(map(str, graph.mixed_view))
            yield Found(
                seen.step,
                f"scores of the shape ({shape}) are viewed as rows of {graph.classes:,}, although "
                "their classes are in dimension 1",
                confidence="certain",
                phase="loss",
                evidence=(evidence("rows that mix positions", 1, high=0, text="all"),),
            )


class LogOfLogits(_LossGraphRule):
    """The loss takes logits for probabilities or log-probabilities."""

    name = "log-of-logits"
    title = "the loss is given logits where it expects probabilities"
    explanation = (
        "The loss takes the logarithm of the output of the last layer, or nll_loss is given that "
        "output directly. Nothing turns the output into probabilities (softmax, sigmoid) or "
        "log-probabilities (log_softmax): the logarithm of a negative number is nan, or constant "
        "where the number was clamped, and nll_loss has no minimum."
    )
    advice = "use cross_entropy, which takes logits; or apply log_softmax before nll_loss"
    source = (
        "a missing softmax is a fault of TheDeepChecker's catalogue (Braiek & Khomh, TOSEM 2023); "
        "PyTorch's documentation of NLLLoss"
    )

    def graph(self, seen: Observation, graph: LossGraph) -> Iterable[Found]:
        if graph.log_of_outputs:
            what = "the logarithm" if graph.log_of_outputs == "log" else "nll_loss"
            yield Found(
                seen.step,
                f"the loss takes {what} of the output of the last layer, without a softmax",
                phase="loss",
                evidence=(evidence("softmax before the loss", 0, low=1, text="none"),),
            )


class SoftmaxInside(_LossGraphRule):
    """Softmax as the activation of a hidden layer."""

    name = "softmax-inside"
    title = "softmax as a hidden activation"
    explanation = (
        "The output of a softmax is the input of another layer. A softmax over n units makes them "
        "compete and scales them to 1/n on average: the signal and its gradients shrink at every "
        "such layer, and the layers before it hardly learn. Attention over positions is not "
        "reported, nor a softmax of scores with noise or a temperature, which draws samples "
        "(Gumbel-softmax)."
    )
    advice = "use ReLU, GELU or tanh inside the network, and a softmax only in the loss"
    source = "a fault of TheDeepChecker's catalogue (Braiek & Khomh, TOSEM 2023)"

    def graph(self, seen: Observation, graph: LossGraph) -> Iterable[Found]:
        count = graph.hidden_softmaxes
        if count:
            layers = "1 layer is" if count == 1 else f"{count} layers are"
            names = graph.softmax_layers
            yield Found(
                seen.step,
                f"{layers} given the output of a softmax" + (f": {named(names)}" if names else ""),
                phase="forward",
                parameters=names[:8],
                evidence=(evidence("layers behind a softmax", count, high=0, text=str(count)),),
            )


class SquaredSoftmax(_LossGraphRule):
    """Squared error of class probabilities."""

    name = "squared-error-of-softmax"
    title = "squared error of class probabilities"
    level = "info"
    explanation = (
        "The loss is the mean squared error of a softmax. It is a proper score (Brier's), but its "
        "gradient vanishes where the model is sure and wrong, so it learns more slowly than with "
        "cross-entropy."
    )
    advice = "for classification use cross_entropy on the logits"
    source = "a fault of TheDeepChecker's catalogue (Braiek & Khomh, TOSEM 2023)"

    def graph(self, seen: Observation, graph: LossGraph) -> Iterable[Found]:
        if graph.squared_softmax:
            yield Found(
                seen.step,
                f"the loss is the squared error of a softmax over {graph.classes:,} classes",
                phase="loss",
                evidence=(evidence("softmax before the squared error", 1, high=0, text="yes"),),
            )


class LossScaled(_LossGraphRule):
    """The loss is a sum where a mean is expected."""

    name = "loss-scaled"
    title = "the loss is not a mean"
    level = "info"
    needs = NEEDS + ", and its value"
    explanation = (
        "The first loss is that of guessing, ln K for K classes, times the number of examples, or "
        "times that number over K: it is a sum over the examples, or a mean over the wrong "
        "dimension. Gradients and the step of plain SGD are larger by that factor, and it changes "
        "with the size of the batch."
    )
    advice = "reduce the loss by a mean over examples: reduction='mean', or .sum(dim=1).mean()"
    source = "two faults of TheDeepChecker's catalogue (Braiek & Khomh, TOSEM 2023)"
    thresholds = (RuleThreshold("tolerance", 0.15, "relative difference from such a multiple"),)

    def graph(self, seen: Observation, graph: LossGraph) -> Iterable[Found]:
        rows, classes = graph.rows, graph.classes
        if rows < 2 or classes < 2 or graph.over_rows or seen.loss is None:
            return
        times = seen.loss / math.log(classes)
        for factor, what in (
            (rows, f"the {rows:,} examples of a batch"),
            (rows / classes, f"{rows:,} examples / {classes:,} classes"),
            (1 / classes, f"1 / {classes:,} classes"),
        ):
            far = not 0.4 < factor < 2.5
            if far and abs(times / factor - 1) <= self.limits["tolerance"]:
                yield Found(
                    seen.step,
                    f"the first loss, {seen.loss:.4g}, is {times:.3g} times that of guessing among "
                    f"{classes:,} classes: {what}",
                    phase="loss",
                    evidence=(evidence("first loss / ln K", times, 0.4, 2.5),),
                )
                return


class LossSign(_LossGraphRule):
    """The loss is a mean log-likelihood that is minimised."""

    name = "loss-sign"
    title = "the loss has the wrong sign"
    needs = NEEDS + ", and its value"
    explanation = (
        "The first loss is minus that of guessing, -ln K for K classes: it is the mean log of the "
        "probability of the right class, and minimising it makes the right classes less and less "
        "likely. A cross-entropy is never negative; this one falls without a lower bound, "
        "which looks like progress."
    )
    advice = "put a minus before the mean of the log-probabilities, or use cross_entropy"
    source = "flipped signs are a fault of TheDeepChecker's catalogue (Braiek & Khomh, TOSEM 2023)"
    thresholds = (RuleThreshold("tolerance", 0.25, "relative difference from -ln K"),)

    def graph(self, seen: Observation, graph: LossGraph) -> Iterable[Found]:
        if graph.rows < 2 or graph.classes < 2 or graph.over_rows or seen.loss is None:
            return
        times = seen.loss / math.log(graph.classes)
        if abs(times + 1) > self.limits["tolerance"]:
            return
        yield Found(
            seen.step,
            f"the first loss, {seen.loss:.4g}, is minus that of guessing among {graph.classes:,} "
            "classes: it is lowest where the right classes are the least likely",
            phase="loss",
            evidence=(evidence("first loss / ln K", times, low=0, table="step", column="loss"),),
        )
