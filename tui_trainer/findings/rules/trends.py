"""Where the loss and the gradient norm are heading: a plateau, or an overflow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, evidence
from tui_trainer.findings.rules.loss import NoProgress
from tui_trainer.protocol.formatting import counted

TrendQuantity = Literal["loss", "gradient norm"]


class LossPlateau(Rule):
    """The loss fell at first and stands still now."""

    name = "loss-plateau"
    title = "the loss stands still"
    level = "info"
    needs = (
        "400 losses above zero of a run with one optimizer, and a learning rate near its highest"
    )
    explanation = (
        "The loss has fallen since the start, but over the last few hundred steps it has not moved "
        "outside of its noise, at a learning rate that has not been lowered. The training may have "
        "converged; or the learning rate is too high for the steps that are left to make, and the "
        "loss falls again once it is lowered. A loss below a tenth of the first one is not "
        "reported."
    )
    advice = (
        "lower the learning rate (a decay, or ReduceLROnPlateau) and see if the loss falls; if "
        "not, the model, the data or the regularization limit it"
    )
    source = (
        "PyTorch's ReduceLROnPlateau, which lowers the rate in this case; Welch's t-test (1947) "
        "for the comparison"
    )
    thresholds = (
        RuleThreshold("steps", 400, "steps in which the loss stands still, and a quarter of all"),
        RuleThreshold("fall", 0.04, "fall in these steps that counts, as a share of all so far"),
        RuleThreshold(
            "rate", 0.5, "share of the highest learning rate, below which the loss is not judged"
        ),
    )
    explained_by = (*NoProgress.explained_by, "no-progress")
    slack = NoProgress.slack
    BLOCKS = 8
    """Number of mean losses that are compared, the older half with the newer half."""

    def start(self) -> None:
        self._means: deque[tuple[int, float]] = deque(maxlen=self.BLOCKS)
        """(first step, mean loss) of each block."""
        self._first = 0
        self._sum = 0.0
        self._count = 0
        self._highest_rate = 0.0
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done or seen.loss is None or not math.isfinite(seen.loss):
            return
        if len(self.facts.optimizers) > 1 or self.trend.lowest < 0:
            self._done = True
            return
        rate = seen.learning_rate or 0.0
        self._highest_rate = max(self._highest_rate, rate)
        if rate < self.limits["rate"] * self._highest_rate:
            self._means.clear()  # a warm-up, or a schedule that has lowered the rate already
            self._sum, self._count = 0.0, 0
            return
        self._first = self._first if self._count else seen.step
        self._sum += seen.loss
        self._count += 1
        # A long training falls more slowly, and is judged over a quarter of its steps.
        if self._count < max(self.limits["steps"], self.trend.count / 4) / self.BLOCKS:
            return
        self._means.append((self._first, self._sum / self._count))
        self._sum, self._count = 0.0, 0
        if len(self._means) == self.BLOCKS:
            yield from self._compare(seen)

    def _compare(self, seen: Observation) -> Iterable[Found]:
        values = np.array([mean for _, mean in self._means])
        older, newer = values[: self.BLOCKS // 2], values[self.BLOCKS // 2 :]
        start, now = self.trend.reference, float(newer.mean())
        gain = start - float(values.min())
        if gain < 0.1 * abs(start) or now < 0.1 * start:
            return  # `no-progress` reports the former
        fall = float(older.mean()) - now
        error = math.sqrt((float(older.var(ddof=1)) + float(newer.var(ddof=1))) / len(older))
        # The noise must not hide a fall of that size either.
        limit = self.limits["fall"] * gain
        if abs(fall) > limit or error > limit or fall > max(2 * error, limit / 4):
            return
        others = values[1:]
        if values[0] > 2 * others.max() - others.min():
            return  # the oldest block has the end of the fall: wait for the next block
        self._done = True
        onset = self._means[0][0]
        yield Found(
            onset,
            f"since step {onset:,} the loss has been {now:.4g} on average, within its noise: "
            f"{older.mean():.4g} in the first half of these steps, {now:.4g} in the second",
            confidence="possible",
            phase="loss",
            evidence=(
                evidence("fall of the loss in these steps", fall, low=limit,
                         table="step", column="loss"),
            ),
        )  # fmt: skip


class OverflowAhead(Rule):
    """The loss or the gradient norm grows exponentially towards infinity."""

    name = "overflow-ahead"
    title = "nan or inf is near"
    needs = "the loss or the gradient norm of ten steps in a row"
    explanation = (
        "The loss or the gradient norm multiplies from step to step, by about the same factor or "
        "more each time. If this continues, it exceeds the largest number within a few "
        "steps (in float32 a sum of squares does so beyond 1.8e19), and everything becomes inf "
        "and then nan. It is reported while the values are still finite and a checkpoint is still "
        "worth something."
    )
    advice = (
        "pause now, and go back to a checkpoint from before the growth; lower the learning rate or "
        "clip the gradient norm"
    )
    source = (
        "Pascanu, Mikolov & Bengio (ICML 2013), exponential growth of gradients; IEEE 754 for the "
        "largest numbers"
    )
    thresholds = (
        RuleThreshold("growth", 100, "growth over the last ten steps"),
        RuleThreshold("ahead", 100, "steps within which the trend exceeds the largest number"),
    )
    explained_by = (
        "input-scale",
        "target-scale",
        "initial-scale",
        "label-range",
        "gradients-kept",
        "update-ratio-high",
        "learning-rate-jump",
        "no-warm-up",
        "initial-loss",
        "gradients-explode",
        "loss-diverges",
    )
    exact = True
    STEPS = 10
    RISES = 8
    """Minimum number of rises among the nine changes between these steps."""
    LARGEST = math.log(2.0**128)
    """Logarithm of the largest float32 or bfloat16."""

    def start(self) -> None:
        self._series: dict[TrendQuantity, deque[tuple[int, float]]] = {
            "loss": deque(maxlen=self.STEPS),
            "gradient norm": deque(maxlen=self.STEPS),
        }
        """Quantity → (step, logarithm of the quantity) of the newest STEPS steps."""
        self._highest: dict[TrendQuantity, float] = {"loss": -math.inf, "gradient norm": -math.inf}
        """Quantity → the highest logarithm before these steps."""
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done:
            return
        if seen.nonfinite:
            self._done = True  # too late to announce it
            return
        values: dict[TrendQuantity, float | None] = {
            "loss": seen.loss,
            "gradient norm": seen.gradient_norm,
        }
        for quantity, value in values.items():
            series = self._series[quantity]
            if value is None or not math.isfinite(value) or value <= 0:
                self._highest[quantity] = max(
                    self._highest[quantity], *(x for _, x in series), -math.inf
                )
                series.clear()
                continue
            if len(series) == self.STEPS:
                self._highest[quantity] = max(self._highest[quantity], series[0][1])
            series.append((seen.step, math.log(value)))
            if series[-1][1] < self._highest[quantity]:
                continue  # small numbers, as those of a training that has converged
            if len(series) < self.STEPS or series[-1][1] - series[0][1] < math.log(
                self.limits["growth"]
            ):
                continue
            found = self._found(quantity, value, np.array(series))
            if found is not None:
                self._done = True
                yield found
                return

    def _found(
        self, quantity: TrendQuantity, value: float, series: NDArray[np.float64]
    ) -> Found | None:
        steps, logs = series[:, 0], series[:, 1]
        changes = np.diff(logs)
        if int((changes > 0).sum()) < self.RISES:
            return None
        recent = float(changes[-5:].mean())
        # One jump followed by values that stay there is no trend.
        if recent < 0.5 * float(changes.mean()) or recent <= 0:
            return None
        # Both are computed from squares, or their gradients are.
        ahead = (self.LARGEST / 2 - float(logs[-1])) / recent
        if not 0 < ahead <= self.limits["ahead"]:
            return None
        rising = self.STEPS - 1
        while rising > 1 and changes[rising - 2] > 0:
            rising -= 1
        onset = int(steps[rising])
        factor = math.exp(recent)
        column = "loss" if quantity == "loss" else "grad_norm_preclip"
        return Found(
            onset,
            f"the {quantity} is multiplied by about {factor:.3g} at each step and is {value:.3g} "
            f"now: on this trend it overflows in about {counted(math.ceil(ahead), 'step')}",
            phase="loss" if quantity == "loss" else "backward",
            evidence=(
                evidence(quantity, value, high=math.exp(float(logs[0])) * self.limits["growth"],
                         table="step", column=column),
                evidence("steps left on this trend", ahead, low=self.limits["ahead"],
                         text=f"{ahead:.0f}"),
            ),
        )  # fmt: skip
