"""Clipping that scales every gradient, or almost to nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, SignRule, evidence
from tui_trainer.protocol.formatting import percent
from tui_trainer.protocol.schema import SMALLEST_CLIP_SCALE

WINDOW = 100


class ClippedAfterStep(SignRule):
    """Gradients are clipped after they were used."""

    name = "clipped-after-step"
    title = "gradients are clipped after the step"
    needs = "three optimizer steps"
    explanation = (
        "clip_grad_norm_ or clip_grad_value_ is called after optimizer.step(), and the gradients "
        "are zeroed before the next one: clipping changes no update."
    )
    advice = "clip between backward() and optimizer.step()"
    source = "PyTorch's examples of clip_grad_norm_ (between backward and step)"
    thresholds = (RuleThreshold("steps", 2, "steps in a row"),)
    sign = "clipped_late"
    problem = "the gradients are clipped after optimizer.step() has used them"
    counted = "steps after which gradients were clipped"
    phase = "clip"


class ClippedToNothing(Rule):
    """Clipping leaves almost nothing of the gradients."""

    reads = "clip"
    name = "clipped-to-nothing"
    title = "clipping leaves almost nothing"
    needs = "100 steps with clipping"
    explanation = (
        "Clipping multiplies the gradients by less than a hundredth, step after step. With SGD the "
        "effective learning rate is a hundred times smaller than the one that is set; with Adam "
        "the scale cancels out, but the batches with the largest gradients lose their weight. The "
        "limit does not suit the model: it is meant for rare peaks."
    )
    advice = "set max_norm near the usual gradient norm, or look for the cause of large gradients"
    source = (
        "Pascanu, Mikolov & Bengio (ICML 2013): a limit near the average gradient norm of the "
        "training"
    )
    thresholds = (
        RuleThreshold("scale", SMALLEST_CLIP_SCALE, "median factor applied to the gradients"),
    )
    explained_by = ("gradients-kept", "gradients-explode", "loss-diverges")

    def start(self) -> None:
        self._scales: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)
        """(step, scale, norm before clipping)"""
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or seen.clip is None:
            return
        limit, before, scale = map(seen.clip.get, ("max_norm", "norm_before", "scale"))
        if limit is None or before is None or scale is None:
            return
        self._scales.append((seen.step, scale, before))
        if len(self._scales) < WINDOW or seen.step % 20:
            return
        scales = sorted(scale for _, scale, _ in self._scales if scale == scale)
        if not scales or scales[len(scales) // 2] >= self.limits["scale"]:
            return
        self._reported = True
        median = scales[len(scales) // 2]
        low = self.limits["scale"]
        onset = next(step for step, scale, _ in self._scales if scale < low)
        norms = sorted(norm for _, _, norm in self._scales if norm == norm)
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
    """The gradient is clipped at every step."""

    reads = "clip"
    name = "always-clipped"
    title = "every step is clipped"
    level = "info"
    needs = "500 steps with clipping"
    explanation = (
        "The gradient norm is above the limit at every step, so clipping has become a "
        "normalisation: the gradient always has the same norm. That is not an error in itself, "
        "but the limit now scales the learning rate."
    )
    advice = "if clipping is meant for peaks only, raise max_norm above the usual gradient norm"
    source = "Zhang et al., Why Gradient Clipping Accelerates Training (ICLR 2020)"
    thresholds = (RuleThreshold("share", 0.995, "share of the last 500 steps that were clipped"),)
    explained_by = ("clipped-to-nothing", "gradients-kept", "gradients-explode")

    def start(self) -> None:
        self._clipped: deque[bool] = deque(maxlen=500)
        self._first = 0
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or seen.clip is None:
            return
        limit, before, scale = map(seen.clip.get, ("max_norm", "norm_before", "scale"))
        self._first = self._first or seen.step
        self._clipped.append(scale is not None and scale < 1)
        if len(self._clipped) < 500 or seen.step % 50 or limit is None or before is None:
            return
        share = sum(self._clipped) / 500
        if share < self.limits["share"]:
            return
        self._reported = True
        yield Found(
            max(self._first, seen.step - 499),
            f"{percent(share, 0)} of the last 500 steps were clipped: gradient norms are about "
            f"{before:.3g}, the limit is {limit:.3g}",
            confidence="certain",
            phase="clip",
            evidence=(
                evidence("share of clipped steps", share, high=0.95, text=percent(share, 0),
                         table="clip", column="scale"),
            ),
        )  # fmt: skip
