"""Gradients that vanish or explode, over the depth of the model or over time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tui_trainer.findings.observation import Observation, TableRow
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence
from tui_trainer.protocol.schema import EXPLODING_NORM, FIRST_NORMS

MIN_DEPTH = 4
"""Minimum number of weight matrices for a comparison over depth."""
STANDS_STILL = 60
"""Steps within which gradients that are huge from the start should have moved the loss."""
EVERY = 5
"""Every n-th measured row is examined."""


class _DepthRule(Rule):
    """Base class of rules that compare the gradients of the first and the last quarter of the
    weight matrices."""

    def start(self) -> None:
        self._names: tuple[str, ...] = ()
        self._matrices: NDArray[np.intp] = np.zeros(0, np.intp)
        self._rows = 0

    def matrices(self, row: TableRow) -> NDArray[np.intp]:
        """Positions in `row` of the weight matrices that an optimizer holds, in the model's
        order."""
        if row.names is not self._names:
            self._names = row.names
            chosen = [
                i
                for i, name in enumerate(row.names)
                if self.facts.is_matrix(name) and self.facts.parameters[name].optimizer
            ]
            self._matrices = np.array(chosen, np.intp)
        return self._matrices

    def quarters(self, seen: Observation) -> tuple[float, float, str, str] | None:
        """Geometric mean of the gradient norms of the first and of the last quarter, and the name
        of the first and of the last matrix; None where this step is not examined."""
        row = seen.gradients
        if row is None:
            return None
        self._rows += 1
        if self._rows % EVERY != 1:
            return None
        matrices = self.matrices(row)
        if len(matrices) < MIN_DEPTH:
            return None
        norms = row.values[matrices]
        there = np.isfinite(norms)
        if int(there.sum()) < MIN_DEPTH:
            return None
        norms, indices = norms[there], matrices[there]
        quarter = max(1, len(norms) // 4)
        logs = np.log(np.maximum(norms.astype(np.float64), 1e-38))
        first, last = math.exp(logs[:quarter].mean()), math.exp(logs[-quarter:].mean())
        return first, last, row.names[int(indices[0])], row.names[int(indices[-1])]


class GradientsVanish(_DepthRule):
    """The first layers get almost no gradient."""

    name = "gradients-vanish"
    title = "gradients vanish towards the input"
    needs = "gradient norms of five steps, and four weight matrices"
    explanation = (
        "The gradient shrinks from layer to layer on its way from the loss to the input, so the "
        "first layers hardly learn. Causes are saturated sigmoid or tanh units, a deep network "
        "without residual connections or normalisation, a poor initialisation, and dead ReLUs."
    )
    advice = (
        "use residual connections, normalisation and an initialisation that fits the activation "
        "(He for ReLU, Glorot for tanh)"
    )
    source = (
        "Glorot & Bengio, Understanding the difficulty of training deep feedforward neural "
        "networks (AISTATS 2010); He et al., Delving Deep into Rectifiers (ICCV 2015)"
    )
    thresholds = (
        RuleThreshold("ratio", 1e-4, "gradient norm of the first quarter over that of the last"),
    )

    explained_by = (
        "saturated-units",
        "dead-units",
        "initial-scale",
        "constant-inputs",
        "attention-logits",
        "attention-entropy",
    )

    def start(self) -> None:
        super().start()
        self._streak = Streak()
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or (quarters := self.quarters(seen)) is None:
            return
        first, last, first_name, last_name = quarters
        holds = last > 0 and first < self.limits["ratio"] * last
        if self._streak.add(holds, seen.step) < 5:
            return
        self._reported = True
        yield Found(
            self._streak.onset,
            f"the gradients of the first layers ({first_name}: about {first:.1e}) are "
            f"{first / last:.0e} of those of the last ({last_name}: about {last:.1e})",
            phase="backward",
            parameters=(first_name, last_name),
            evidence=(
                evidence("gradient norm, first quarter over last", first / last,
                         low=self.limits["ratio"], table="grad_norm", column=first_name),
            ),
        )  # fmt: skip


class GradientsExplode(_DepthRule):
    """Gradients grow without bound, towards the input or over time."""

    name = "gradients-explode"
    title = "gradients explode"
    needs = "gradient norms of twenty steps"
    explanation = (
        "Either the gradient grows from layer to layer on its way to the input (or from time step "
        "to time step: a matrix that is used again and again multiplies it each time), or the "
        "total gradient norm has risen to a hundred times its first values while the loss does not "
        "fall. "
        "The updates are then dominated by a few huge gradients, and nan usually follows."
    )
    advice = "clip the gradient norm (clip_grad_norm_ at about 1), lower the learning rate"
    source = (
        "Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural networks (ICML "
        "2013)"
    )
    thresholds = (
        RuleThreshold(
            "growth", EXPLODING_NORM, "total gradient norm over the median of its first values"
        ),
        RuleThreshold("depth", 1e4, "gradient norm of the first quarter over that of the last"),
        RuleThreshold(
            "inside",
            100,
            "total gradient norm, and the largest norm of a matrix over that of the last matrix, "
            "in sixty steps in which the loss does not fall",
        ),
    )
    explained_by = (
        "input-scale",
        "target-scale",
        "initial-scale",
        "gradients-kept",
        "update-ratio-high",
        "learning-rate-jump",
        "no-warm-up",
        "initial-loss",
        "loss-diverges",
        "overflow-ahead",
    )
    exact = True

    def start(self) -> None:
        super().start()
        self._first: list[float] = []
        self._reference = 0.0
        self._in_time = Streak()
        self._far = 0
        self._over_depth = Streak()
        self._huge = Streak()
        self._rate = self._highest_rate = 0.0
        self._learns = False
        """Whether the loss has fallen below its first values."""
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported:
            return
        if seen.gradient_norm is not None and math.isfinite(seen.gradient_norm):
            yield from self._time(seen, seen.gradient_norm)
            if not self._reported:
                yield from self._inside(seen, seen.gradient_norm)
        if not self._reported and (quarters := self.quarters(seen)) is not None:
            yield from self._depth(seen, quarters)

    def _time(self, seen: Observation, norm: float) -> Iterable[Found]:
        if len(self._first) < FIRST_NORMS:
            self._first.append(norm)
            self._reference = sorted(self._first)[len(self._first) // 2]
            return
        self._in_time.add(norm > self.limits["growth"] / 10 * self._reference, seen.step)
        self._far = self._far + 1 if norm > self.limits["growth"] * self._reference else 0
        worse = self.trend.fast > self.trend.best + 2 * self.trend.noise or not self.trend.count
        if self._far < 5 or not worse or self._reference <= 0:
            return
        self._reported = True
        yield Found(
            self._in_time.onset,
            f"the gradient norm has risen to {norm:.3g}, {norm / self._reference:,.0f} times its "
            f"first values ({self._reference:.3g}), and the loss does not fall",
            phase="backward",
            parameters=self._largest(seen),
            evidence=(
                evidence("gradient norm", norm, high=self.limits["growth"] * self._reference,
                         table="step", column="grad_norm_preclip"),
            ),
        )  # fmt: skip

    def _inside(self, seen: Observation, norm: float) -> Iterable[Found]:
        """Report gradients that are huge from the start, but not in the last layer, while the loss
        does not fall."""
        row, rate, trend = seen.gradients, seen.learning_rate or 0.0, self.trend
        warm_up = rate < 0.5 * self._highest_rate or rate > 1.001 * (self._rate or rate)
        self._rate, self._highest_rate = rate, max(self._highest_rate, rate)
        if trend.fast < trend.start - max(2 * trend.noise, 0.05 * abs(trend.start)):
            self._learns = True
        if row is None or warm_up or self._learns or len(self.facts.optimizers) > 1:
            return
        indices = self.matrices(row)
        limit = self.limits["inside"]
        norms = row.values[indices]
        last = float(norms[-1]) if len(norms) else 0.0
        holds = norm > limit and last > 0 and float(np.nanmax(norms)) > limit * last
        self._huge.add(holds, seen.step)
        if not holds or seen.step - self._huge.onset < STANDS_STILL:
            return
        self._reported = True
        clipped = seen.clip is not None
        yield Found(
            self._huge.onset,
            f"the gradient norm is {norm:.3g}, that of {row.names[int(indices[-1])]} alone "
            f"{last:.2g}, and the loss has not fallen in {STANDS_STILL} steps",
            advice="initialise the matrix of a recurrent layer orthogonally with a gain of about "
            "1, use an LSTM or a GRU, or go back fewer time steps; clipping only hides it"
            if clipped
            else "",
            phase="backward",
            parameters=self._largest(seen),
            evidence=(
                evidence("gradient norm", norm, high=limit, table="step",
                         column="grad_norm_preclip"),
            ),
        )  # fmt: skip

    def _depth(self, seen: Observation, quarters: tuple[float, float, str, str]) -> Iterable[Found]:
        first, last, first_name, last_name = quarters
        holds = last > 1e-20 and first > self.limits["depth"] * last
        if self._over_depth.add(holds, seen.step) < 5:
            return
        self._reported = True
        yield Found(
            self._over_depth.onset,
            f"the gradients of the first layers ({first_name}: about {first:.1e}) are "
            f"{first / last:.0e} times those of the last ({last_name}: about {last:.1e})",
            phase="backward",
            parameters=(first_name, last_name),
            evidence=(
                evidence("gradient norm, first quarter over last", first / last,
                         high=self.limits["depth"], table="grad_norm", column=first_name),
            ),
        )  # fmt: skip

    def _largest(self, seen: Observation) -> tuple[str, ...]:
        row = seen.gradients
        if row is None:
            return ()
        order = np.argsort(-np.where(row.finite, row.values, -1))[:3]
        return tuple(row.names[i] for i in order.tolist())
