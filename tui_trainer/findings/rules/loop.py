"""The order and the modes of the loop: zero_grad, backward, the schedule, evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tui_trainer.findings.observation import Observation, SkippedStep
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, SignRule, Streak, evidence
from tui_trainer.protocol.absent import Absent


class GradientsKept(Rule):
    """`zero_grad` is missing."""

    name = "gradients-kept"
    title = "zero_grad is missing"
    level = "error"
    needs = "three optimizer steps"
    explanation = (
        "backward() adds to the gradients that are already there. Here the first backward of a "
        "step found the gradients that the previous step had used, unchanged: nothing zeroed, "
        "scaled or replaced them in between. Every update then follows the sum of all gradients "
        "since they were last zeroed, like a momentum of 1. Where only every second step starts "
        "with used gradients, the level is `info`: one batch of two counts twice, which is no "
        "accumulation of gradients."
    )
    advice = "call optimizer.zero_grad() once per step, before backward (or after optimizer.step())"
    source = (
        "PyTorch's optimization tutorial; missing zero_grad is a silent error of TrainCheck "
        "(Jiang et al., OSDI 2025) and DeepDiagnosis (Wardat et al., ICSE 2022)"
    )
    thresholds = (
        RuleThreshold("steps", 2, "steps in a row that started with used gradients"),
        RuleThreshold("alternations", 5, "times that every second step did, for the level `info`"),
    )

    def start(self) -> None:
        self._streak = Streak()
        self._isolated: list[int] = []
        """Steps that started with used gradients, two steps apart."""
        self._norms: list[float] = []
        self._first = 0
        self._report: Found | None = None
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done:
            return
        kept = "kept_gradients" in seen.signs
        if self._report is not None:
            if not kept and seen.loss_absent is not Absent.NO_LOSS:
                self._done = True
                yield self._not_always(self._report, seen.step)
            return
        self._first = self._first or seen.step
        if seen.gradient_norm is not None:
            self._norms = [*self._norms[-7:], seen.gradient_norm]
        count = self._streak.add(kept, seen.step)
        if count < self.limits["steps"]:
            if kept:
                yield from self._alternating(seen.step)
            return
        grown = ""
        if len(self._norms) >= 3 and 0 < self._norms[0] < self._norms[-1]:
            grown = f"; the gradient norm went from {self._norms[0]:.3g} to {self._norms[-1]:.3g}"
        before = ""
        if self._streak.onset > self._first + 1:
            before = f", as they were before step {self._streak.onset:,}"
        self._report = Found(
            self._streak.onset,
            f"since step {self._streak.onset:,} backward adds to the gradients that "
            f"the previous step has already used: they are not zeroed{before}{grown}",
            confidence="certain",
            phase="zero_grad",
            evidence=(
                evidence(
                    "steps in a row that started with used gradients",
                    count,
                    high=0,
                    text=f"{count}",
                ),
                *(
                    evidence("gradient norm", norm, table="step", column="grad_norm_preclip")
                    for norm in self._norms[-1:]
                ),
            ),
        )
        yield self._report

    def _alternating(self, step: int) -> Iterable[Found]:
        """`step` started with used gradients; the one before did not."""
        if self._isolated and step != self._isolated[-1] + 2:
            self._isolated.clear()
        self._isolated.append(step)
        if len(self._isolated) != self.limits["alternations"]:
            return
        yield Found(
            self._isolated[0],
            f"since step {self._isolated[0]:,} every second step adds to the gradients that the "
            "step before has already used: zero_grad is called in every second step only, and the "
            "gradients of one batch are used twice",
            level="info",
            advice="call zero_grad() in every step, or, to accumulate gradients over two batches, "
            "call step() in every second iteration as well",
            confidence="certain",
            phase="zero_grad",
            evidence=(
                evidence("alternating steps with used gradients", len(self._isolated), high=0,
                         text=f"{len(self._isolated)}"),
            ),
        )  # fmt: skip

    def _not_always(self, report: Found, step: int) -> Found:
        """`step` began without used gradients."""
        return replace(
            report,
            text=f"from step {report.onset:,} to {step - 1:,} backward added to the gradients that "
            f"the previous step had already used; before step {step:,} they were zeroed or "
            "replaced: zero_grad is not called in every step",
            level="warning",
        )


class ZeroedBeforeStep(Rule):
    """`zero_grad` is called between `backward` and `step`."""

    name = "zeroed-before-step"
    title = "gradients are zeroed before the step"
    level = "error"
    needs = "two optimizer steps"
    explanation = (
        "The gradients of each iteration are discarded after backward, and the optimizer then "
        "steps without any: the weights do not change, except by weight decay and momentum."
    )
    advice = "move zero_grad() before backward(), or after optimizer.step()"
    source = "the order of the loop in PyTorch's optimization tutorial"
    thresholds = (
        RuleThreshold("steps", 2, "steps in a row without the gradients of their iteration"),
    )

    def start(self) -> None:
        self._discarded_before = -1
        self._streak = Streak()
        self._reported = False

    def skipped(self, skipped: SkippedStep) -> Iterable[Found]:
        if skipped.reason == "hand":
            self._discarded_before = skipped.step
        return ()

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported:
            return
        empty = seen.loss_absent is Absent.NO_LOSS and not seen.gradient_norm
        holds = empty and self._discarded_before == seen.step
        count = self._streak.add(holds, seen.step)
        if count < self.limits["steps"]:
            return
        self._reported = True
        yield Found(
            self._streak.onset,
            f"since step {self._streak.onset:,} zero_grad() is called between backward and step: "
            "the optimizer has no gradients, and nothing is learnt",
            confidence="certain",
            phase="zero_grad",
            evidence=(
                evidence("gradient norm at the step", 0.0, table="step", column="grad_norm_preclip",
                         text="no gradients"),
                evidence("steps in a row without gradients", count, high=0, text=str(count)),
            ),
        )  # fmt: skip


class BackwardTwice(SignRule):
    """The same loss is backpropagated twice."""

    name = "backward-twice"
    title = "backward is called twice on one loss"
    needs = "two optimizer steps"
    explanation = (
        "backward() was called twice on the same loss before the optimizer's step "
        "(retain_graph=True lets it pass). The gradients are added up, so the update is that of a "
        "loss twice as large, and the time of a backward is spent for nothing. Several losses of "
        "one graph are not reported."
    )
    advice = "call backward() once for each loss; to use several losses, add them up"
    source = "PyTorch's documentation of Tensor.backward (gradients accumulate in the leaves)"
    thresholds = (RuleThreshold("steps", 2, "steps in a row"),)
    sign = "backward_twice"
    problem = (
        "backward is called more than once on the same loss before the optimizer steps: its "
        "gradients are added up"
    )
    counted = "steps with a repeated backward"
    phase = "backward"


class ScheduleFirst(SignRule):
    """The schedule is advanced between backward and the optimizer's step."""

    name = "schedule-before-step"
    title = "the schedule is stepped in the wrong place"
    needs = "three optimizer steps"
    explanation = (
        "scheduler.step() is called between backward and optimizer.step(). The first learning rate "
        "of the schedule is skipped, and with gradient accumulation the schedule runs through once "
        "per micro-batch instead of once per step. PyTorch expects it after optimizer.step()."
    )
    advice = "call scheduler.step() after optimizer.step(), once for each step (or each epoch)"
    source = "PyTorch's documentation of torch.optim (order of scheduler.step since 1.1)"
    thresholds = (RuleThreshold("steps", 3, "steps in a row"),)
    sign = "schedule_first"
    problem = "the scheduler is stepped between backward and optimizer.step()"
    counted = "steps with a scheduler before the update"
    phase = "step"


class IdleSchedule(SignRule):
    """The scheduler belongs to an optimizer that makes no steps."""

    name = "schedule-idle"
    title = "the schedule belongs to another optimizer"
    needs = "ten optimizer steps"
    explanation = (
        "A scheduler is stepped whose optimizer has the parameters of the one that trains, but is "
        "another object: the optimizer was created again (after the model was changed, or a "
        "checkpoint loaded) and the scheduler was not. It changes the learning rate of an "
        "optimizer that makes no steps; the one that does keeps its first learning rate, without "
        "warm-up or decay."
    )
    advice = (
        "create the scheduler after the optimizer, and again whenever the optimizer is replaced"
    )
    source = "PyTorch's documentation of lr_scheduler (a scheduler holds its optimizer)"
    thresholds = (RuleThreshold("steps", 10, "steps in a row"),)
    sign = "idle_schedule"
    problem = (
        "the scheduler that is stepped belongs to another optimizer of the same parameters, which "
        "makes no steps"
    )
    counted = "steps with the scheduler of another optimizer"
    phase = "step"


class LossesMixed(SignRule):
    """An update uses the gradients of a loss that was meant for another optimizer."""

    name = "losses-mixed"
    title = "the gradients of two losses are mixed"
    needs = "three optimizer steps of a training with several optimizers"
    explanation = (
        "Two losses reach the parameters of two optimizers. One of them steps after the first "
        "loss; the other steps after the second, with the gradients of both, since nothing zeroed "
        "or detached those of the first. In a GAN the generator is then also updated to help the "
        "discriminator: the two losses are opposed. Optimizers that step after the same losses, "
        "and a second loss that only one of them can use, are not reported."
    )
    advice = (
        "detach what the first loss gets from the other network (fake.detach()), or call "
        "zero_grad() of that optimizer just before the backward of its own loss"
    )
    source = "PyTorch's DCGAN tutorial, which detaches the generated images for the discriminator"
    thresholds = (RuleThreshold("steps", 3, "steps of the optimizer in a row"),)
    sign = "mixed_losses"
    problem = (
        "this optimizer steps with the gradients of two losses, the first of which another "
        "optimizer has used for its own step"
    )
    counted = "steps with the gradients of both losses"
    phase = "backward"


class ScheduleEnds(Rule):
    """The learning rate has almost vanished long before the end."""

    name = "schedule-ends-early"
    title = "the schedule ends before the training"
    needs = "the learning rate of every step, and the total number of steps or twice as many steps"
    explanation = (
        "The learning rate has fallen below a thousandth of its highest value although most of the "
        "training is still to come. Where the number of steps is not known, the rule reports once "
        "half of the steps so far have been made at such a rate and the rate has fallen to a "
        "ten-thousandth. A schedule that counts epochs and is stepped once per batch (StepLR, "
        "ExponentialLR, a cosine over the number of epochs) ends within a few hundred steps; the "
        "steps after it train almost nothing."
    )
    advice = "step the scheduler once per epoch, or give it the number of steps instead of epochs"
    source = "PyTorch's documentation of lr_scheduler (how to adjust the learning rate)"
    thresholds = (
        RuleThreshold("share", 0.001, "of the highest learning rate so far"),
        RuleThreshold(
            "progress", 0.5, "share of all steps, or of those so far, within which it has to fall"
        ),
        RuleThreshold("steps", 10, "steps in a row"),
        RuleThreshold("unknown", 1e-4, "as `share`, where the number of steps is not known"),
        RuleThreshold("jump", 0.01, "share to which one step lowers it where a new stage begins"),
    )

    def start(self) -> None:
        self._streak = Streak()
        self._highest = self._last = 0.0
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        rate, total = seen.learning_rate, max(self.facts.total_steps or 0, seen.step)
        if self._reported or rate is None:
            return
        if not self.facts.total_steps and rate < self.limits["jump"] * self._last:
            self._highest = rate  # another stage, or the end of a range test
        self._last = rate
        self._highest = max(self._highest, rate)
        low = 0 < rate <= self.limits["share"] * self._highest * (1 + 1e-6)
        count = self._streak.add(low, seen.step)
        onset = self._streak.onset
        if count < self.limits["steps"] or onset > self.limits["progress"] * total:
            return
        if not self.facts.total_steps and rate > self.limits["unknown"] * self._highest:
            return
        self._reported = True
        limit = self.limits["share"] * self._highest
        of = f" of {total:,}" if self.facts.total_steps else ""
        yield Found(
            onset,
            f"the learning rate has been at most {limit:.3g} since step {onset:,}{of}, and is "
            f"{rate:.3g} now; its highest value was {self._highest:.3g}",
            phase="step",
            evidence=(
                evidence("learning rate", rate, low=limit, table="step", column="learning_rate"),
            ),
        )  # fmt: skip


class TrainModeEvaluation(Rule):
    """The model is evaluated in `train()` mode."""

    reads = "signs"
    name = "train-mode-evaluation"
    title = "the model is evaluated in train() mode"
    needs = "an evaluation between two steps"
    explanation = (
        "The model is called without gradients while it is in train() mode, and it has dropout or "
        "batch normalisation: dropout drops activations of the evaluation, and batch normalisation "
        "uses the statistics of each batch and updates its running ones from the evaluation's "
        "data. Single calls, calls at almost every step (a GAN's), and four or more calls with the "
        "same batch, which sample from dropout on purpose, are not reported."
    )
    advice = (
        "call model.eval() before an evaluation, and model.train() after it, unless dropout is to "
        "stay on (Monte Carlo dropout)"
    )
    source = "PyTorch's documentation of Module.eval, and its note on autograd mechanics"

    def start(self) -> None:
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or "evaluated_in_train_mode" not in seen.signs:
            return
        self._reported = True
        yield Found(
            seen.step,
            f"before step {seen.step:,} the model was evaluated in train() mode: with dropout, or "
            "with batch statistics",
            phase="forward",
            evidence=(evidence("evaluations in train() mode", 1, high=0, text="1"),),
        )
