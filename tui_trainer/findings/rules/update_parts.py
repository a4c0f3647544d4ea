"""Parts of the model, such as one parameter group, whose updates differ from those of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import Found, RuleThreshold, Streak, evidence, median_of, named
from tui_trainer.findings.rules.update_ratio import HEALTHY_HIGH, HEALTHY_LOW, SOURCE, UpdateRatios

RISEN_STEPS = 10
"""Minimum number of steps in a row in which the loss is above its first values."""


class PartNotUpdated(UpdateRatios):
    """Weights that get a gradient and do not change, while others do."""

    name = "part-not-updated"
    title = "a part of the model does not change"
    needs = "five update ratios, and the gradient norms of their steps"
    explanation = (
        "These weights are in the optimizer and get a gradient, and a step leaves every one of "
        "them unchanged, while it changes the others. Usually the learning rate of their parameter "
        "group is zero or so small that the update is lost when it is added, or a schedule was "
        "written for one group only."
    )
    advice = (
        "print the lr of each of optimizer.param_groups; if the part is meant to stay fixed, "
        "requires_grad_(False) saves the time of its gradients"
    )
    source = "PyTorch's documentation of torch.optim (per-parameter options: each group has its lr)"
    thresholds = (
        RuleThreshold("steps", 5, "measured steps in a row"),
        RuleThreshold(
            "gradient", 0.01, "smallest gradient norm that counts, as a share of the median norm"
        ),
    )
    explained_by = ("updates-rounded", "no-gradients", "learning-rate-zero")

    reads = "updates"

    def start(self) -> None:
        super().start()
        self._streak = Streak()
        self._still: frozenset[str] = frozenset()
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        updates, gradients = seen.updates, seen.gradients
        if self._done or updates is None or gradients is None:
            return
        ratios, names = self.ratios(updates)
        norms = [gradients.get(name) or 0.0 for name in names]
        # `gradients-vanish` reports the smaller ones.
        least = self.limits["gradient"] * median_of(norms) if norms else 0.0
        still = frozenset(
            name
            for name, ratio, norm in zip(names, ratios.tolist(), norms, strict=True)
            if ratio == 0
            and norm > least
            and (info := self.facts.parameters.get(name)) is not None
            and info.optimizer
            and info.trainable
        )
        if not still or not (ratios > 0).any():
            self._still = frozenset()
            self._streak.add(False, seen.step)
            return
        self._still = still & self._still if self._streak.count and self._still & still else still
        if self._streak.add(True, seen.step) < self.limits["steps"]:
            return
        self._done = True
        listed = sorted(self._still, key=lambda name: self.facts.order.get(name, 0))
        yield Found(
            self._streak.onset,
            f"the optimizer does not change {named(listed)}, although each step has a gradient "
            f"for {'it' if len(listed) == 1 else 'them'}; it changes "
            f"{len(ratios) - len(still)} other weight matrices",
            confidence="certain",
            phase="step",
            parameters=tuple(listed[:16]),
            evidence=(
                evidence(f"‖Δw‖/‖w‖ of {listed[0]}", 0.0, HEALTHY_LOW, HEALTHY_HIGH,
                         table="update_ratio", column=listed[0]),
            ),
        )  # fmt: skip


class PartUpdatedTooMuch(UpdateRatios):
    """A part of the weights changes by much of its size in every step, while the rest does not."""

    name = "part-updated-too-much"
    title = "updates of a part of the model are too large"
    level = "info"
    needs = "three update ratios after the first 20 steps, and the losses"
    explanation = (
        "Each step changes these weights by a large part of their own size, the others by the "
        "usual amount, and the loss does not fall; it is a warning where the loss rises after an "
        "update of the first steps. Usually the learning rate of their parameter "
        "group is too high for them, or their gradients are far larger than the others'. With Adam "
        "this shows in the first steps only: the weights soon are as large as the updates."
    )
    advice = "give these parameters a group with a lower learning rate, or look at their gradients"
    source = SOURCE
    thresholds = (
        RuleThreshold("ratio", 0.2, "‖Δw‖/‖w‖, three times in a row"),
        RuleThreshold(
            "steps",
            20,
            "steps in which the loss should then have fallen; and number of first steps, to which "
            "`at_once` applies instead of `ratio`",
        ),
        RuleThreshold(
            "at_once", 0.7, "one ‖Δw‖/‖w‖ that is enough, of weights that do not start at zero"
        ),
    )
    explained_by = (
        "update-ratio-high",
        "learning-rate-jump",
        "gradients-explode",
        "non-finite",
    )

    def start(self) -> None:
        super().start()
        self._streak = Streak()
        self._fast: frozenset[str] = frozenset()
        self._loss_before = 0.0
        self._nonzero: frozenset[str] = frozenset()
        """Weights that do not start at zero."""
        self._first_step = 0
        self._varied = 0
        """Steps whose loss comes from another number of model calls than the loss before it."""
        self._risen = Streak()
        self._early: Found | None = None
        """The report of the first steps, held back until the loss has had time to fall."""
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if seen.initial:
            self._nonzero = frozenset(each.name for each in seen.initial if each.rms > 0)
        if self._done or len(self.facts.optimizers) > 1:
            return
        first = self._first_step = self._first_step or seen.step
        self._varied += "calls_vary" in seen.signs
        if self._early is not None and self._loss_rises(seen.step):
            self._done = True
            text = f"{self._early.text}, and the loss rises"
            yield replace(self._early, text=text, level="warning", confidence="likely")
            return
        if seen.updates is None or self.ignored(seen):
            return
        ratios, names = self.ratios(seen.updates)
        if seen.step == first:  # a weight that is zero before the first step has no ratio
            self._nonzero |= frozenset(names)
        if seen.step <= self.limits["steps"]:
            self._look_early(seen, ratios, names)
            return
        if self._early is not None and seen.step >= self._early.onset + 2 * self.limits["steps"]:
            early, self._early = self._early, None
            before = self.trend.start
            if self.trend.fast >= before - max(self.trend.noise, 0.02 * abs(before)):
                self._done = True
                yield replace(early, text=f"{early.text}, and the loss does not fall")
                return
        high = ratios > self.limits["ratio"]
        fast = frozenset(np.array(names)[high].tolist()) if len(ratios) else frozenset()
        both = fast & self._fast if self._streak.count else fast
        # `update-ratio-high` reports updates that are too large in most of the model.
        holds = bool(both) and len(both) < len(ratios) / 2
        self._fast = both if holds else frozenset()
        if self._streak.add(holds, seen.step) == 1:
            self._loss_before = self.trend.slow
        if self._streak.count < 3 or seen.step - self._streak.onset < self.limits["steps"]:
            return
        fall = max(self.trend.noise, 0.02 * abs(self._loss_before))
        if self.trend.slow < self._loss_before - fall:
            return
        self._done = True
        found = self._found(seen, ratios, high, both, self._streak.onset, "each step")
        yield replace(found, text=f"{found.text}, and the loss does not fall")

    def _loss_rises(self, step: int) -> bool:
        """Whether the loss has been well above its first values for some steps."""
        trend = self.trend
        if trend.lowest < 0 or not trend.start > 0 or self._varied > trend.count / 2:
            return False
        start = max(trend.first[:3])
        bar = start + max(2 * trend.noise, 0.5 * start)
        return self._risen.add(trend.fast > bar, step) >= RISEN_STEPS

    def _look_early(self, seen: Observation, ratios: NDArray[np.float32], names: list[str]) -> None:
        high = ratios > self.limits["at_once"]
        fast = frozenset(np.array(names)[high].tolist()) & self._nonzero if len(ratios) else None
        if self._early is None and fast and len(fast) < len(ratios) / 2:
            when = f"step {seen.step:,}"
            self._early = self._found(seen, ratios, high, fast, seen.step, when)

    def _found(
        self,
        seen: Observation,
        ratios: NDArray[np.float32],
        high: NDArray[np.bool_],
        fast: frozenset[str],
        onset: int,
        when: str,
    ) -> Found:
        assert seen.updates is not None
        listed = sorted(fast, key=lambda name: self.facts.order.get(name, 0))
        largest = max(seen.updates.get(name) or 0.0 for name in listed)
        # Weights that start at zero have no ratio, or a large one.
        rest = ratios[~high]
        others = f", the other weight matrices by {median_of(rest):.1e} (median)"
        others = others if len(rest) else ""
        tense = "changes" if when == "each step" else "changed"
        return Found(
            onset,
            f"{when} {tense} {named(listed)} by up to {largest:.2g} of their size{others}",
            confidence="possible",
            phase="step",
            parameters=tuple(listed[:16]),
            evidence=(
                evidence(f"‖Δw‖/‖w‖ of {listed[0]}", seen.updates.get(listed[0]) or largest,
                         HEALTHY_LOW, HEALTHY_HIGH, table="update_ratio", column=listed[0]),
            ),
        )  # fmt: skip
