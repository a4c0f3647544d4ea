"""A learning rate that is zero, jumps, or starts without a warm-up."""

from __future__ import annotations

from collections.abc import Iterable

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence
from tui_trainer.protocol.events import Level

ADAM_LIKE = ("adam", "nadam", "adamax", "lion", "lamb")
"""Prefixes of optimizer names. RAdam has a built-in warm-up."""


class LearningRateZero(Rule):
    """The learning rate is zero."""

    name = "learning-rate-zero"
    title = "the learning rate is zero"
    needs = "the learning rate of twenty steps"
    explanation = (
        "The optimizer steps with a learning rate of exactly 0, so nothing is learnt. Either a "
        "schedule that starts at 0 is advanced once per epoch instead of once per step, or the "
        "schedule ended before the training did. The rate is that of the first parameter group; "
        "where weights change nevertheless, other groups have another rate, and nothing is "
        "reported."
    )
    advice = (
        "print optimizer.param_groups[0]['lr']; check where scheduler.step() is called and how "
        "many steps the schedule was made for"
    )
    source = "PyTorch's documentation of lr_scheduler (how to adjust the learning rate)"
    thresholds = (RuleThreshold("steps", 20, "steps in a row"),)

    def start(self) -> None:
        self._streak = Streak()
        self._highest = 0.0
        self._moves = False
        """Whether weights changed although the rate was 0."""
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        rate = seen.learning_rate
        if self._reported or rate is None:
            return
        if rate != 0.0:
            self._moves = False
        elif seen.updates is not None:
            self._moves = bool((seen.updates.values > 0).any())
        count = self._streak.add(rate == 0.0 and not self._moves, seen.step)
        self._highest = max(self._highest, rate)
        if count < self.limits["steps"]:
            return
        self._reported = True
        before = f"; it was up to {self._highest:.3g} before" if self._highest else ""
        yield Found(
            self._streak.onset,
            f"the learning rate has been 0 since step {self._streak.onset:,}: the weights do not "
            f"change{before}",
            confidence="certain",
            phase="step",
            evidence=(
                evidence("learning rate", 0.0, low=self._highest or None, table="step",
                         column="learning_rate",
                         text="" if self._highest else "0, healthy: above 0"),
            ),
        )  # fmt: skip


class LearningRateJump(Rule):
    """The learning rate jumps up, and the loss with it."""

    name = "learning-rate-jump"
    title = "the learning rate jumps"
    needs = "the learning rate of two steps; for a warning, the loss of the fifty steps after"
    explanation = (
        "The learning rate is many times higher than one step before. Schedules with warm restarts "
        "do so on purpose; a resumed run whose scheduler was not restored, or a scheduler that is "
        "created again, does so by mistake. It is a warning only if the loss rises afterwards."
    )
    advice = "restore the scheduler's state with the checkpoint, or warm up again after the jump"
    source = (
        "Loshchilov & Hutter, SGDR (ICLR 2017), for restarts on purpose; PyTorch's documentation "
        "of lr_scheduler on saving its state"
    )
    thresholds = (
        RuleThreshold("factor", 10, "times the learning rate of the step before"),
        RuleThreshold("first_steps", 5, "steps at the start that are ignored"),
    )

    reach = 200
    WATCHED = 50

    def start(self) -> None:
        self._last: float | None = None
        self._steps = 0
        self._jump: tuple[int, float, float] | None = None
        """(step, rate before, rate after) of the last jump, while the loss is watched."""
        self._reported = False
        self._loss_before = 0.0
        self._bar = 0.0
        self._streak = Streak()

    def step(self, seen: Observation) -> Iterable[Found]:
        rate = seen.learning_rate
        if rate is None:
            return
        last, self._last = self._last, rate
        self._steps += 1
        jumped = last is not None and last > 0 and rate >= self.limits["factor"] * last
        if jumped and last is not None and self._steps > self.limits["first_steps"]:
            self._jump = seen.step, last, rate
            # The loss of this step was computed before its update.
            self._loss_before = self.trend.fast
            self._bar = self.trend.fast + max(6 * self.trend.noise, 0.1 * abs(self.trend.fast))
            self._streak = Streak()
            if not self._reported:
                self._reported = True
                yield self._found("info", "")
        elif self._jump is not None:
            yield from self._watch(seen)

    def _watch(self, seen: Observation) -> Iterable[Found]:
        assert self._jump is not None
        if self._streak.add(self.trend.fast > self._bar, seen.step) >= 5:
            rose = f", and the loss rose from {self._loss_before:.4g} to {self.trend.fast:.4g}"
            yield self._found("warning", rose)
            self._jump = None
        elif seen.step > self._jump[0] + self.WATCHED:
            self._jump = None

    def _found(self, level: Level, rose: str) -> Found:
        assert self._jump is not None
        step, before, after = self._jump
        return Found(
            step,
            f"the learning rate jumped from {before:.3g} to {after:.3g} at step {step:,}{rose}",
            level=level,
            confidence="certain",
            phase="step",
            key=str(step),
            evidence=(
                evidence("learning rate after the jump", after, high=before * self.limits["factor"],
                         table="step", column="learning_rate"),
            ),
        )  # fmt: skip


class NoWarmUp(Rule):
    """Adam starts at its full learning rate on a transformer, and the loss rises."""

    name = "no-warm-up"
    title = "no warm-up"
    needs = "the loss of the first steps, an Adam-like optimizer and attention layers"
    explanation = (
        "An Adam-like optimizer trains attention layers at its full learning rate from the first "
        "step on. Its estimate of the second moment is then based on a handful of gradients, and "
        "its updates are as large as they can be. The rule reports it only if the loss rises well "
        "above its first value. Where updates are too large as well, the learning rate itself is "
        "too high: with noisy gradients, Adam's later updates are about four times smaller than "
        "its first ones, and even a quarter of 20 % of a weight is too much."
    )
    advice = "raise the learning rate linearly over the first 100 to 2,000 steps, or lower it"
    source = (
        "Liu et al., On the Variance of the Adaptive Learning Rate and Beyond (ICLR 2020); Ma & "
        "Yarats, On the Adequacy of Untuned Warmup (AAAI 2021)"
    )
    thresholds = (
        RuleThreshold("rise", 0.2, "rise of the loss over its first value, as a share of it"),
        RuleThreshold("steps", 200, "number of first steps that are checked"),
    )
    explained_by = ("update-ratio-high",)
    slack = 200
    """The default of `steps`: a cause may begin anywhere in the checked steps."""

    def start(self) -> None:
        self._first_rate: float | None = None
        self._first_loss: float | None = None
        self._steps = 0
        self._streak = Streak()
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done:
            return
        self._steps += 1
        if self._steps == 1:
            self._first_rate, self._first_loss = seen.learning_rate, seen.loss
        name = self.facts.optimizer_name(seen.optimizer)
        if (
            not self._first_rate
            or self._first_loss is None
            or self._steps > self.limits["steps"]
            or self.facts.resumed
            or len(self.facts.optimizers) > 1
            or not self.facts.attention
            or not name.startswith(ADAM_LIKE)
            or (seen.learning_rate or 0.0) > 1.01 * self._first_rate  # a warm-up
        ):
            self._done = self._done or self._steps > 1
            return
        bar = self._first_loss * (1 + self.limits["rise"])
        if self._first_loss <= 0 or self._streak.add(self.trend.fast > bar, seen.step) < 5:
            return
        self._done = True
        yield Found(
            1 if self._streak.onset <= self._steps else seen.step - self._steps + 1,
            f"{name} starts at its full learning rate of {self._first_rate:.3g}, and in the first "
            f"{self._steps} steps the loss rose from {self._first_loss:.4g} to "
            f"{self.trend.fast:.4g}",
            phase="step",
            evidence=(
                evidence("loss", self.trend.fast, high=bar, table="step", column="loss"),
                evidence("learning rate of the first step", self._first_rate, table="step",
                         column="learning_rate"),
            ),
        )  # fmt: skip


class AdamEpsilon(Rule):
    """`eps` of Adam is too small or too large for the numbers that it is added to."""

    reads = "epsilon"
    name = "adam-epsilon"
    title = "Adam's eps is unusual"
    level = "info"
    needs = "the settings of an optimizer of Adam's family, and one step"
    explanation = (
        "Adam divides each update by the root of the mean square of the gradients, plus eps. Where "
        "gradients are tiny (units that hardly ever react, a loss near zero, their rounding "
        "errors), eps alone keeps the update small; with a very small eps these weights move by "
        "the whole learning rate at every step, in a random direction. Usual values are 1e-10 to "
        "1e-3, and 1e-15 where tiny gradients are meant to count (hash grids of neural fields). A "
        "larger eps outweighs the gradients, so that the updates are about those of SGD with "
        "momentum and a small learning rate, which is right only if the rate was chosen for it. "
        "In float16 the usual 1e-8 is rounded to zero: where the mean square is "
        "zero as well, the update is a division by zero, which is a warning."
    )
    advice = "use the default eps=1e-8, or 1e-4 for weights in float16; or keep weights in float32"
    source = (
        "Kingma & Ba, Adam (ICLR 2015), 1e-8; Liu et al., RoBERTa (2019), section 3.1, on its "
        "effect on stability; Müller et al., Instant Neural Graphics Primitives (SIGGRAPH 2022), "
        "1e-15; a low eps is a fault of TheDeepChecker (Braiek & Khomh, TOSEM 2023)"
    )
    thresholds = (
        RuleThreshold("low", 1e-10, "smallest eps that is not reported"),
        RuleThreshold("high", 1e-2, "largest eps that is not reported"),
        RuleThreshold("float16", 3e-8, "half of the smallest float16, for weights in float16"),
    )

    def step(self, seen: Observation) -> Iterable[Found]:
        epsilon = seen.epsilon
        if epsilon is None:
            return
        optimizer = self.facts.optimizer_name(seen.optimizer)
        half = [
            info.name
            for info in self.facts.parameters.values()
            if info.dtype == "float16" and info.optimizer == optimizer and info.trainable
        ]
        vanishes = bool(half) and epsilon < self.limits["float16"]
        low, high = self.limits["float16" if vanishes else "low"], self.limits["high"]
        if not vanishes and low <= epsilon <= high:
            return
        yield Found(
            seen.step,
            f"{optimizer} has eps={epsilon:.3g}"
            + (", which outweighs gradients below it" if epsilon > high else "")
            + (f", which is zero in the float16 of its {len(half)} parameters" if vanishes else ""),
            level="warning" if vanishes else None,
            confidence="certain" if vanishes else "possible",
            phase="step",
            parameters=tuple(half[:8]) if vanishes else (),
            evidence=(evidence("eps", epsilon, low=low, high=high),),
        )


class MomentumHigh(Rule):
    """The momentum averages many more gradients than is usual."""

    reads = "momentum"
    name = "momentum-high"
    title = "the momentum is very high"
    level = "info"
    needs = "the settings of an optimizer with momentum, and one step"
    explanation = (
        "A momentum of m lets every gradient act for about 1 / (1 - m) steps. With SGD the updates "
        "become as many times larger than the learning rate alone would make them, and the weights "
        "swing about a minimum with a period of many steps before they come to rest. Published "
        "trainings use 0.5 to 0.99; higher values were reached by a schedule that raises them."
    )
    advice = "use momentum=0.9 (Adam: betas=(0.9, 0.999)), or lower the learning rate accordingly"
    source = (
        "Sutskever et al., On the importance of initialization and momentum in deep learning (ICML "
        "2013); Goodfellow, Bengio & Courville, Deep Learning (2016), section 8.3.2: 0.5, 0.9, 0.99"
    )
    thresholds = (RuleThreshold("high", 0.99, "largest momentum that is not reported"),)

    def step(self, seen: Observation) -> Iterable[Found]:
        momentum = seen.momentum
        if momentum is None or momentum <= self.limits["high"]:
            return
        lasting = f"{1 / (1 - momentum):,.0f} steps" if momentum < 1 else "all later steps"
        yield Found(
            seen.step,
            f"{self.facts.optimizer_name(seen.optimizer)} has a momentum of {momentum:g}: every "
            f"gradient acts for about {lasting}",
            confidence="possible",
            phase="step",
            evidence=(evidence("momentum", momentum, high=self.limits["high"]),),
        )
