"""Weights that start equal, at the wrong scale, or untied."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, evidence, named


class ConstantWeights(Rule):
    """All units of a layer start with the same weights."""

    reads = "initial"
    name = "constant-weights"
    title = "all units of a layer start equal"
    needs = "the weights before the first step"
    explanation = (
        "The rows of this weight matrix are equal, and not zero. Units with equal weights compute "
        "the same output and get the same gradient: they stay equal, and the layer has the power "
        "of a single unit. Weights that start at zero are reported only if all weight matrices do: "
        "the last layer of a branch often starts at zero."
    )
    advice = "initialise with random numbers (nn.init.kaiming_normal_, nn.init.xavier_uniform_)"
    source = (
        "Goodfellow, Bengio & Courville, Deep Learning (2016), section 8.4: break symmetry; "
        "TheDeepChecker's constant weights (Braiek & Khomh, TOSEM 2023)"
    )

    def step(self, seen: Observation) -> Iterable[Found]:
        zero = len(seen.initial) > 1 and not any(each.rms for each in seen.initial)
        wrong = [
            each
            for each in seen.initial
            if not each.equal_to and each.units > 1 and each.same_rows and (each.rms > 0 or zero)
        ]
        if wrong:
            names = [each.name for each in wrong]
            value = f": every weight is {wrong[0].rms:.3g} in size" if wrong[0].constant else ""
            value = ": every weight is zero" if zero else value
            yield Found(
                seen.step,
                f"all {wrong[0].units:,} units of {named(names)} start with equal weights{value}",
                confidence="certain",
                phase="step",
                parameters=tuple(names[:8]),
                evidence=(evidence("different units", 1, low=2, text="1"),),
            )


class InitialScale(Rule):
    """Initial weights whose scale does not fit their number of inputs."""

    reads = "initial"
    name = "initial-scale"
    title = "initial weights have the wrong scale"
    needs = "the weights before the first step"
    explanation = (
        "A layer keeps the scale of its input if the root mean square of its weights is about "
        "1/√(number of inputs): times a factor of 0.58 for PyTorch's default, 1 for Glorot's "
        "initialisation of square layers and 1.41 for He's. Far above, activations and gradients "
        "grow from layer to layer; far below, they vanish. Weights that are all zero, and frozen "
        "ones, are not reported."
    )
    advice = "initialise with nn.init.kaiming_normal_ (ReLU) or xavier_normal_ (tanh, none)"
    source = (
        "Glorot & Bengio (AISTATS 2010) and He et al., Delving Deep into Rectifiers (ICCV 2015); "
        "the limits leave a factor of 7 above He's and of 10 below the gain of 0.01 that policy "
        "heads start with (Andrychowicz et al., ICLR 2021)"
    )
    thresholds = (
        RuleThreshold("high", 10, "root mean square of the weights times √inputs"),
        RuleThreshold("low", 0.001, "the same, of weights that are too small"),
    )

    def start(self) -> None:
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done or not seen.initial:
            return
        self._done = True
        if self.facts.resumed:
            return
        found = []
        for each in seen.initial:
            gain = each.rms * math.sqrt(each.fan_in)
            if gain <= 0 or each.same_rows or self.limits["low"] <= gain <= self.limits["high"]:
                continue
            found.append((abs(math.log(gain)), gain, each))
        if not found:
            return
        found.sort(key=lambda entry: -entry[0])
        names = [each.name for _, _, each in found]
        _, gain, worst = found[0]
        yield Found(
            seen.step,
            f"the weights of {worst.name} start at {gain:.3g} times the usual scale of "
            f"1/√{worst.fan_in:,}"
            + (f"; those of {named(names[1:])} are off as well" if names[1:] else ""),
            phase="step",
            parameters=tuple(names[:8]),
            evidence=(
                evidence(f"initial scale of {worst.name}", gain, self.limits["low"],
                         self.limits["high"], text=f"{gain:.3g}"),
            ),
        )  # fmt: skip


class UntiedWeights(Rule):
    """An embedding and an output layer that start equal but are two parameters."""

    reads = "initial"
    name = "untied-weights"
    title = "tied weights have become two parameters"
    needs = "the weights before the first step"
    explanation = (
        "An embedding and a linear layer start with exactly the same weights, but are two "
        "parameters: they were tied, and have been copied since (by deepcopy, by loading a state "
        "into a model that does not tie them, or by a move to another device that made new "
        "parameters). From the first step on they diverge, and the model has more parameters than "
        "intended."
    )
    advice = "tie them again before the optimizer is created: head.weight = embedding.weight"
    source = (
        "Press & Wolf, Using the Output Embedding to Improve Language Models (EACL 2017); "
        "parameters lost by .to() are a silent error of TrainCheck (Jiang et al., OSDI 2025)"
    )

    def step(self, seen: Observation) -> Iterable[Found]:
        for each in seen.initial:
            if each.equal_to:
                yield Found(
                    seen.step,
                    f"{each.name} starts equal to {each.equal_to}, but does not share its memory: "
                    "they will diverge",
                    phase="step",
                    parameters=(each.name, each.equal_to),
                    key=each.name,
                    evidence=(
                        evidence(
                            "parameters with these weights",
                            2,
                            high=1,
                            table="weight_norm",
                            column=each.name,
                            text="2",
                        ),
                    ),
                )
