"""Clipping that cuts everything."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from tui_trainer.findings.observation import LossTrend, Observation, RunFacts
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, evidence

SCALE = 3
"""Position of `scale` in a row of table `clip`."""
WINDOW = 100


class ClippedToNothing(Rule):
    """Clipping leaves almost nothing of the gradients."""

    name = "clipped-to-nothing"
    title = "clipping leaves almost nothing"
    needs = "a hundred steps with clipping"
    explanation = (
        "Clipping multiplies the gradients by less than a hundredth, step after step. With SGD the "
        "learning rate is in effect a hundred times smaller than it says; with Adam the size does "
        "not matter, but a few batches decide alone. The limit does not fit the model: it is meant "
        "to cut rare peaks."
    )
    next = "set max_norm near the usual gradient norm, or look for the cause of large gradients"
    source = (
        "Pascanu, Mikolov & Bengio (ICML 2013): a limit near the average gradient norm of the "
        "training"
    )
    thresholds = (RuleThreshold("scale", 0.01, "median of what the gradients are multiplied by"),)
    explained_by = ("gradients-kept", "gradients-explode", "loss-diverges")

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._scales: deque[tuple[int, float, float, float]] = deque(maxlen=WINDOW)
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or seen.clip is None:
            return
        limit, before, _, scale = seen.clip.values[: SCALE + 1].tolist()
        self._scales.append((seen.step, scale, before, limit))
        if len(self._scales) < WINDOW or seen.step % 20:
            return
        scales = sorted(scale for _, scale, _, _ in self._scales if scale == scale)
        if not scales or scales[len(scales) // 2] >= self.limits["scale"]:
            return
        self._reported = True
        median = scales[len(scales) // 2]
        low = self.limits["scale"]
        onset = next(step for step, scale, _, _ in self._scales if scale < low)
        norms = sorted(norm for _, _, norm, _ in self._scales if norm == norm)
        yield Found(
            onset,
            f"clipping multiplies the gradients by {median:.1e} (median of {WINDOW} steps): their "
            f"norm is about {norms[len(norms) // 2]:.3g}, the limit {limit:.3g}",
            confidence="certain",
            phase="clip",
            evidence=(
                evidence("scale of clipping", median, low=low, high=1, table="clip",
                         column="scale"),
            ),
        )  # fmt: skip


class AlwaysClipped(Rule):
    """Clipping cuts every step."""

    name = "always-clipped"
    title = "every step is clipped"
    level = "info"
    needs = "five hundred steps with clipping"
    explanation = (
        "Every step's gradient is above the limit, so that clipping has become a normalisation: "
        "each update has the same length whatever the gradient. That is no fault by itself, but "
        "the learning rate alone no longer says how far a step goes."
    )
    next = "raise max_norm if clipping is meant for peaks only; see the gradient norm's usual size"
    source = "Zhang et al., Why Gradient Clipping Accelerates Training (ICLR 2020)"
    thresholds = (RuleThreshold("share", 0.995, "share of the last 500 steps that were clipped"),)
    explained_by = ("clipped-to-nothing", "gradients-kept", "gradients-explode")

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._clipped: deque[bool] = deque(maxlen=500)
        self._first = 0
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or seen.clip is None:
            return
        self._first = self._first or seen.step
        self._clipped.append(float(seen.clip.values[SCALE]) < 1)
        if len(self._clipped) < 500 or seen.step % 50:
            return
        share = sum(self._clipped) / 500
        if share < self.limits["share"]:
            return
        self._reported = True
        limit, before = seen.clip.values[:2].tolist()
        yield Found(
            max(self._first, seen.step - 499),
            f"{share:.0%} of the last 500 steps were clipped: gradient norms are about "
            f"{before:.3g}, the limit is {limit:.3g}",
            confidence="certain",
            phase="clip",
            evidence=(
                evidence("share of steps that are clipped", share, high=0.95, text=f"{share:.1%}",
                         table="clip", column="scale"),
            ),
        )  # fmt: skip
