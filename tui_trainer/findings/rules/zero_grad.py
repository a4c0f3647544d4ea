"""Gradients that are never zeroed, or zeroed before the optimizer uses them."""

from __future__ import annotations

from collections.abc import Iterable

from tui_trainer.findings.observation import Observation, SkippedStep
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence
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
        "since the start, like a momentum of 1."
    )
    advice = "call optimizer.zero_grad() once per step, before backward (or after optimizer.step())"
    source = (
        "PyTorch's optimization tutorial; missing zero_grad is a silent error of TrainCheck "
        "(Jiang et al., OSDI 2025) and DeepDiagnosis (Wardat et al., ICSE 2022)"
    )
    thresholds = (RuleThreshold("steps", 2, "steps in a row that started with used gradients"),)

    def start(self) -> None:
        self._streak = Streak()
        self._norms: list[float] = []
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported:
            return
        if seen.gradient_norm is not None:
            self._norms = [*self._norms[-7:], seen.gradient_norm]
        count = self._streak.add("kept_gradients" in seen.signs, seen.step)
        if count < self.limits["steps"]:
            return
        self._reported = True
        grown = ""
        if len(self._norms) >= 3 and 0 < self._norms[0] < self._norms[-1]:
            grown = f"; the gradient norm went from {self._norms[0]:.3g} to {self._norms[-1]:.3g}"
        yield Found(
            self._streak.onset,
            f"since step {self._streak.onset:,} backward adds to the gradients that "
            f"the previous step has already used: they are never zeroed{grown}",
            confidence="certain",
            phase="zero_grad",
            evidence=(
                evidence(
                    "steps in a row that started with used gradients",
                    count,
                    high=0,
                    table="step",
                    column="grad_norm_preclip",
                    text=f"{count}",
                ),
            ),
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
            ),
        )  # fmt: skip
