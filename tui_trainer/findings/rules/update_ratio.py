"""The size of updates relative to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tui_trainer.findings.observation import Observation, TableRow
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence, median_of
from tui_trainer.history.records import WeightDecay
from tui_trainer.protocol.formatting import percent
from tui_trainer.protocol.schema import HEALTHY_UPDATE_RATIO

HEALTHY_LOW, HEALTHY_HIGH = HEALTHY_UPDATE_RATIO
SOURCE = (
    "‖Δw‖/‖w‖ near 1e-3 is the rule of thumb of Stanford's CS231n (neural networks part 3); the "
    "limits leave two orders of magnitude on both sides, since Adam with a warm-up reaches 4e-2 in "
    "healthy small transformers"
)


class UpdateRatios(Rule):
    """Base class of rules on the update ratios ‖Δw‖/‖w‖ of the weight matrices."""

    def start(self) -> None:
        self._names: tuple[str, ...] = ()
        self._matrices: NDArray[np.intp] = np.zeros(0, np.intp)

    def ignored(self, seen: Observation) -> bool:
        """Whether a line search determines the size of this step."""
        name = self.facts.optimizer_name(seen.optimizer)
        return name.startswith("lbfgs") or seen.evaluations > 1

    def ratios(self, row: TableRow) -> tuple[NDArray[np.float32], list[str]]:
        """Ratios and names of the weight matrices that an optimizer holds, or of all its parameters
        if there are none."""
        if row.names is not self._names:
            self._names = row.names
            held = [
                i
                for i, name in enumerate(row.names)
                if (info := self.facts.parameters.get(name)) is None or info.optimizer
            ]
            chosen = [i for i in held if self.facts.is_matrix(row.names[i])]
            self._matrices = np.array(chosen or held, np.intp)
        indices = self._matrices[np.isfinite(row.values[self._matrices])]
        return row.values[indices], [row.names[i] for i in indices.tolist()]


class UpdateRatioHigh(UpdateRatios):
    """Updates are too large."""

    name = "update-ratio-high"
    title = "updates are too large"
    needs = (
        "update ratios, measured in the first five steps and then every ten steps: three that are "
        "too high, or one that is far too high; and the losses that follow"
    )
    explanation = (
        "Each step changes the weights by a large part of their own size, and the loss rises or "
        "does not fall: the updates overshoot. The usual cause is a learning rate that is too "
        "high, or a loss with the wrong scale (a sum instead of a mean). Weights that start at "
        "zero have a high ratio too, which is not reported as long as the loss falls."
    )
    advice = "divide the learning rate by 10, or add a warm-up; check that the loss is a mean"
    source = SOURCE
    thresholds = (
        RuleThreshold("ratio", 0.2, "median of ‖Δw‖/‖w‖ over the matrices, three times in a row"),
        RuleThreshold(
            "at_once", 0.7, "median at which one measurement is enough if the loss rises"
        ),
    )
    explained_by = (
        "label-range",
        "input-scale",
        "target-scale",
        "initial-scale",
        "gradients-kept",
        "learning-rate-jump",
        "initial-loss",
    )

    WATCHED = 50
    """Steps after a high ratio in which the loss is watched."""
    JUDGED_AFTER = 20
    """Steps after the onset by which the loss should have fallen."""

    def start(self) -> None:
        super().start()
        self._streak = Streak()
        self._loss_before = self._noise = 0.0
        """The smoothed loss and its noise at the onset."""
        self._suspect: Found | None = None
        self._suspect_since = 0
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported:
            return
        if seen.updates is not None and not self.ignored(seen):
            self._look(seen, *self.ratios(seen.updates))
        if self._suspect is None:
            return
        if self._harmful(seen):
            self._reported = True
            yield self._suspect
        elif seen.step > self._suspect_since + self.WATCHED:
            self._suspect = None

    def _look(self, seen: Observation, ratios: NDArray[np.float32], names: list[str]) -> None:
        if not len(ratios):
            return
        median = median_of(ratios)
        count = self._streak.add(median > self.limits["ratio"], seen.step)
        if count == 1:
            self._loss_before, self._noise = self.trend.fast, self.trend.noise
        at_once = median > self.limits["at_once"]
        if count >= 3 or (at_once and self._suspect is None):
            self._suspect = self._found(seen, median, ratios, names)
            self._suspect_since = seen.step

    def _harmful(self, seen: Observation) -> bool:
        """Whether the loss has risen since the onset or, after three high ratios, not fallen."""
        if seen.loss is not None and not np.isfinite(seen.loss):
            # A loss that falls below zero without a bound is no effect of large updates.
            trend = self.trend
            return trend.count < 10 or trend.best >= 0 or trend.fast > trend.best
        before = self._loss_before
        passed = seen.step - self._streak.onset
        if passed > 0 and self.trend.fast > before + max(2 * self._noise, 0.1 * abs(before)):
            return True
        lasts = self._streak.count >= 3 and passed >= self.JUDGED_AFTER
        return lasts and self.trend.fast > before - 0.02 * abs(before)

    def _found(
        self, seen: Observation, median: float, ratios: NDArray[np.float32], names: list[str]
    ) -> Found:
        worst = [names[i] for i in np.argsort(-ratios)[:8].tolist()]
        rate = f" at a learning rate of {seen.learning_rate:.3g}" if seen.learning_rate else ""
        return Found(
            self._streak.onset,
            f"one step changes the weights by {median:.2g} of their size (median over "
            f"{len(ratios)} weight matrices){rate}, and the loss does not fall; about 0.001 is "
            "usual",
            level="error" if median > self.limits["at_once"] else None,
            phase="step",
            parameters=tuple(worst),
            evidence=(
                evidence("median ‖Δw‖/‖w‖", median, HEALTHY_LOW, HEALTHY_HIGH),
                evidence(f"‖Δw‖/‖w‖ of {worst[0]}", float(ratios.max()), HEALTHY_LOW, HEALTHY_HIGH,
                         table="update_ratio", column=worst[0]),
            ),
        )  # fmt: skip


class UpdateRatioLow(UpdateRatios):
    """Updates are too small to learn."""

    name = "update-ratio-low"
    title = "updates are too small"
    needs = "update ratios of at least 100 steps in which the loss does not fall"
    explanation = (
        "Each step changes the weights so little that even thousands of steps hardly move them, "
        "while the learning rate is near its highest value so far and the loss does not fall. The "
        "learning rate is too low, the gradients vanish, or clipping cuts them to almost nothing. "
        "Where the loss has fallen before and stays at its lowest, updates are small because the "
        "training has converged, which is not reported."
    )
    advice = "raise the learning rate tenfold or more; check the gradient norms and the clipping"
    source = SOURCE
    thresholds = (
        RuleThreshold("ratio", 1e-6, "median of ‖Δw‖/‖w‖ over the weight matrices"),
        RuleThreshold("steps", 100, "minimum number of steps"),
    )
    explained_by = (
        "dead-units",
        "saturated-units",
        "zero-gradients",
        "schedule-ends-early",
        "constant-labels",
        "learning-rate-zero",
        "zeroed-before-step",
        "no-gradients",
        "clipped-to-nothing",
        "gradients-vanish",
        "update-ratio-high",
        "loss-diverges",
        "gradients-explode",
        "non-finite",
    )

    def start(self) -> None:
        super().start()
        self._streak = Streak()
        self._highest_rate = 0.0
        self._loss_at_onset = 0.0
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if seen.learning_rate is not None:
            self._highest_rate = max(self._highest_rate, seen.learning_rate)
        if seen.updates is None or self._reported or self.ignored(seen):
            return
        ratios, names = self.ratios(seen.updates)
        if not len(ratios):
            return
        median = median_of(ratios)
        full_rate = (seen.learning_rate or 0.0) >= 0.3 * self._highest_rate
        count = self._streak.add(median < self.limits["ratio"] and full_rate, seen.step)
        if count == 1:
            self._loss_at_onset = self.trend.slow
        if count < 3 or seen.step - self._streak.onset < self.limits["steps"]:
            return
        fall = max(2 * self.trend.noise, 0.005 * abs(self._loss_at_onset))
        if self.trend.slow < self._loss_at_onset - fall or self._converged():
            return  # the loss falls nevertheless, or has nowhere to fall to
        self._reported = True
        yield Found(
            self._streak.onset,
            f"one step changes the weights by {_share(median)} of their size (median over "
            f"{len(ratios)} weight matrices), and the loss does not fall; about 1e-3 is usual",
            phase="step",
            parameters=tuple(names[:8]),
            evidence=(
                evidence("median ‖Δw‖/‖w‖", median, HEALTHY_LOW, HEALTHY_HIGH,
                         table="update_ratio", column=names[0]),
            ),
        )  # fmt: skip

    def _converged(self) -> bool:
        """Whether the loss has fallen, and is as low as it ever was."""
        trend = self.trend
        gain = trend.start - trend.best
        near = trend.fast - trend.best < 0.05 * gain + 2 * trend.noise
        fallen = gain > max(0.1 * abs(trend.start), 4 * trend.noise)
        return (near and fallen) or trend.fell_at_once


class UpdatesSmall(UpdateRatios):
    """Updates are small from the start, and the loss stands still."""

    reads = "updates"
    name = "updates-small"
    title = "updates are small, and the loss stands still"
    level = "info"
    needs = "update ratios of the first 60 steps at a rate that does not rise, and their losses"
    explanation = (
        "From the start the updates are well below the usual 1e-3 of the weights, and the loss "
        "has not moved outside of its noise. The learning rate may be too low. It is only a hint: "
        "a large model, or one that was trained before, may need that many steps."
    )
    advice = "try a rate ten times higher for a hundred steps, and compare"
    source = SOURCE
    thresholds = (
        RuleThreshold("ratio", 2e-4, "median of ‖Δw‖/‖w‖ over the weight matrices"),
        RuleThreshold("steps", 60, "number of first steps in which the loss stands still"),
    )
    explained_by = (*UpdateRatioLow.explained_by, UpdateRatioLow.name, "signal-vanishes")
    LAST = 300
    """Last step that is checked: later a loss stands still for other reasons."""

    def start(self) -> None:
        super().start()
        self._streak = Streak()
        self._rate = math.inf
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if seen.updates is None or self._done or self.ignored(seen):
            return
        rate, before = seen.learning_rate or 0.0, self._rate
        self._rate = rate
        ratios, names = self.ratios(seen.updates)
        if not len(ratios) or seen.step > self.LAST:
            self._done = self._done or seen.step > self.LAST
            return
        median = median_of(ratios)
        slow = 0 < median < self.limits["ratio"] and rate <= 1.001 * before
        if not slow:
            self._streak.add(False, seen.step)
            return
        self._streak.add(True, seen.step)
        trend = self.trend
        if seen.step - self._streak.onset < self.limits["steps"] or not trend.first:
            return
        start = sum(trend.first) / len(trend.first)
        if trend.fast < start - max(2 * trend.noise, 0.01 * abs(start)):
            return  # the loss falls nevertheless
        if trend.fell_at_once:
            return
        self._done = True
        yield Found(
            self._streak.onset,
            f"one step changes the weights by {_share(median)} of their size (median over "
            f"{len(ratios)} weight matrices), and after {trend.count} steps the loss is where it "
            "started; about 1e-3 is usual",
            confidence="possible",
            phase="step",
            parameters=tuple(names[:8]),
            evidence=(
                evidence("median ‖Δw‖/‖w‖", median, HEALTHY_LOW, HEALTHY_HIGH,
                         table="update_ratio", column=names[0]),
            ),
        )  # fmt: skip


SPACING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""dtype → smallest distance between neighbouring numbers, relative to them."""


class UpdatesRounded(UpdateRatios):
    """Updates are smaller than what the type of the weights can represent."""

    reads = "updates"
    name = "updates-rounded"
    title = "updates are lost when they are rounded"
    needs = "three update ratios, and weights in bfloat16 or float16"
    explanation = (
        "The weights themselves are bfloat16 or float16, whose neighbouring numbers are 0.4 to 0.8 "
        "% or 0.05 to 0.1 % apart. An element changes only if its update is more than half of that "
        "distance; a smaller one is lost when it is rounded, at every step again. Here the mean "
        "update is smaller, so that most elements stay as they are and the others move too far."
    )
    advice = (
        "keep the weights in float32 and compute in autocast; or use an optimizer with stochastic "
        "rounding or a compensated sum"
    )
    source = (
        "Micikevicius et al., Mixed Precision Training (ICLR 2018), section 3.1: a float32 copy of "
        "the weights; Zamirai et al., Revisiting BFloat16 Training (2020)"
    )
    thresholds = (
        RuleThreshold("share", 0.5, "of the distance between neighbouring numbers"),
        RuleThreshold("steps", 3, "measured steps in a row"),
    )

    def start(self) -> None:
        super().start()
        self._streak = Streak()
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done or seen.updates is None or not seen.learning_rate:
            return
        ratios, names = self.ratios(seen.updates)
        infos = [self.facts.parameters.get(name) for name in names]
        spacings = [SPACING.get(info.dtype, 0.0) if info is not None else 0.0 for info in infos]
        if not spacings or not all(spacings):
            self._done = True
            return
        share = median_of(ratios / np.array(spacings))
        if self._streak.add(share < self.limits["share"], seen.step) < self.limits["steps"]:
            return
        self._done = True
        kind = infos[0].dtype if infos[0] is not None else ""
        median = median_of(ratios)
        yield Found(
            self._streak.onset,
            f"the weights are {kind}, whose neighbouring numbers are {percent(spacings[0], 0, 1)} "
            f"apart or more, and one step changes them by {_share(median)} of their size: most "
            "elements are rounded back to what they were",
            phase="step",
            parameters=tuple(names[:8]),
            evidence=(
                evidence("median ‖Δw‖/‖w‖", median, self.limits["share"] * spacings[0],
                         table="update_ratio", column=names[0]),
            ),
        )  # fmt: skip


class UpdatesUndone(Rule):
    """Something writes the old weights back after the step."""

    reads = "kept_update"
    name = "updates-undone"
    title = "updates are undone"
    needs = "the first six steps"
    explanation = (
        "When the model is called again, almost nothing is left of the optimizer's last update: in "
        "between, the script writes to the weights. Usual causes are a moving average of the "
        "weights that is copied into the model instead of the other way round, and a checkpoint "
        "that is loaded in every iteration. The model then hardly trains."
    )
    advice = (
        "look for copy_, lerp_, load_state_dict or .data = on the model's parameters in the loop; "
        "an average belongs in a copy of the model"
    )
    source = "PyTorch's torch.optim.swa_utils.AveragedModel, which keeps an average in a copy"
    thresholds = (
        RuleThreshold("share", 0.2, "of an update that is left at the next step"),
        RuleThreshold("steps", 3, "steps in a row"),
    )

    def start(self) -> None:
        self._streak = Streak()
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        share = seen.kept_update
        if self._done or share is None:
            return
        before = seen.step - 1  # the step that made the update
        if self._streak.add(share < self.limits["share"], before) < self.limits["steps"]:
            return
        self._done = True
        yield Found(
            self._streak.onset,
            f"when the model is called again, {percent(share, 0, 0)} of the step's update is left: "
            "something else writes to the weights",
            phase="step",
            evidence=(
                evidence("share of the update that is left", share, self.limits["share"],
                         text=percent(share, 0, 0)),
            ),
        )  # fmt: skip


class WeightsShrink(Rule):
    """Weight decay or a penalty shrinks the weights faster than they learn."""

    name = "weights-shrink"
    title = "the weights shrink"
    needs = (
        "the weight norms of the first 200 steps, and weight decay of an optimizer or a penalty in "
        "the autograd graph of the first loss"
    )
    explanation = (
        "The norm of all weight matrices has fallen by a quarter within the first steps, at one "
        "measurement after the other, and the loss has a penalty on the weights, or weight decay "
        "alone explains half of that. Usual weight decay takes a few percent in that time. A decay "
        "or penalty this strong decides what the weights become, not the data. Without either, "
        "the data make the weights smaller, for example because the targets are small, and "
        "nothing is reported."
    )
    advice = "divide weight_decay, or the factor of the penalty in the loss, by 10 or more"
    source = "over-regularization is a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    thresholds = (
        RuleThreshold("share", 0.75, "of the first norm"),
        RuleThreshold("steps", 200, "number of first steps that are checked"),
        RuleThreshold("decay", 0.5, "smallest share of the fall that weight decay explains"),
    )

    def start(self) -> None:
        self._decay: WeightDecay | None = None
        self._penalty = False
        self._decayed = 0.0
        """Logarithm of the factor by which weight decay alone would have divided the weights."""
        self._before = 0
        """The last step at which the weights were measured."""
        self._names: tuple[str, ...] = ()
        self._matrices: list[int] = []
        self._first = 0.0
        self._last = 0.0
        self._falls = 0
        self._onset = 0
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done:
            return
        self._decay = seen.weight_decay or self._decay
        self._penalty |= seen.loss_graph is not None and seen.loss_graph.penalty
        row = seen.weights
        if row is None:
            return
        if (~row.finite & ~row.absent).any() or (self._decay is None and not self._penalty):
            self._done = True
            return
        if row.names is not self._names:
            self._names = row.names
            self._decayed = 0.0
            self._matrices = [i for i, name in enumerate(row.names) if self.facts.is_matrix(name)]
            self._first, self._onset = 0.0, seen.step
        values = row.values[self._matrices]
        norm = float(np.sqrt(np.square(values[np.isfinite(values)], dtype=np.float64).sum()))
        if not self._first:
            self._first = self._last = norm
            self._before = seen.step
            return
        self._decayed += (seen.step - self._before) * self._rate(seen, norm)
        self._before = seen.step
        if seen.step > self.limits["steps"]:
            self._done = True
            return
        self._falls += norm < 0.99 * self._last
        self._last = norm
        # A script that clamps its weights makes them shrink once.
        if norm > self.limits["share"] * self._first or self._falls < 3:
            return
        by_decay = self._decayed >= self.limits["decay"] * math.log(self._first / max(norm, 1e-30))
        if not by_decay and not self._penalty:
            return
        self._done = True
        names = [row.names[index] for index in self._matrices]
        if by_decay:
            taken = -math.expm1(-self._decayed)
            why = f"weight decay alone takes {percent(taken, 0, 0)} in that time"
            advice = "divide weight_decay by 10 or more"
        else:
            why = "the loss has a penalty on them"
            advice = "divide the factor of the penalty in the loss by 10 or more"
        yield Found(
            self._onset,
            f"the norm of all weight matrices has fallen from {self._first:.3g} to {norm:.3g} in "
            f"{seen.step - self._onset} steps: {why}",
            advice=advice,
            phase="step",
            parameters=tuple(names[:8]),
            evidence=(
                evidence("‖W‖ relative to its first value", norm / self._first, 0.9, None,
                         table="weight_norm", column=names[0]),
            ),
        )  # fmt: skip

    def _rate(self, seen: Observation, norm: float) -> float:
        """Share of the weights that weight decay removes in a step like this one."""
        if self._decay is None or seen.learning_rate is None:
            return 0.0
        rate = seen.learning_rate * self._decay.factor
        if not self._decay.divided:
            return rate
        if seen.gradient_norm is None:
            return 0.0
        sizes = [info.numel for name in self._names if (info := self.facts.parameters.get(name))]
        matrices = [self.facts.parameters[self._names[index]].numel for index in self._matrices]
        gradient = seen.gradient_norm / math.sqrt(max(1, sum(sizes)))
        decay = self._decay.factor * norm / math.sqrt(max(1, sum(matrices)))
        return rate / max(math.hypot(gradient, decay), 1e-30)


def _share(ratio: float) -> str:
    return f"{ratio:.1e}" if ratio else "nothing"
