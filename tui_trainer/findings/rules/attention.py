"""Attention whose logits grow, or whose entropy collapses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tui_trainer.findings.observation import Observation, TableRow
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence

EVERY = 10
"""Every n-th row of table `attention` is examined."""


class _AttentionRule(Rule):
    """Base class of rules that read one statistic of every attention layer."""

    def start(self) -> None:
        self._columns: dict[tuple[str, str], tuple[tuple[str, ...], list[tuple[int, str]]]] = {}
        self._streak = Streak()
        self._reported = False

    def values(self, row: TableRow, statistic: str) -> dict[str, float]:
        """Layer → finite value of `statistic`."""
        known = self._columns.get((row.table, statistic))
        if known is None or known[0] is not row.names:
            places = [
                (index, name.rpartition(".")[0])
                for index, name in enumerate(row.names)
                if name.rpartition(".")[2] == statistic
            ]
            known = self._columns[row.table, statistic] = (row.names, places)
        found = {layer: float(row.values[index]) for index, layer in known[1]}
        return {layer: value for layer, value in found.items() if abs(value) < float("inf")}


class AttentionLogits(_AttentionRule):
    """Attention logits grow."""

    name = "attention-logits"
    title = "attention logits grow"
    needs = "attention layers; their weight norms, or sampled logits"
    explanation = (
        "The logits of attention grow with the norms of Wq and Wk. Once they are in the hundreds, "
        "each softmax puts all its weight on one position, its gradient vanishes, and large models "
        "diverge soon after. The product of the norms grows long before the loss reacts."
    )
    advice = (
        "normalise queries and keys (QK-norm), lower the learning rate, add weight decay to Wq, Wk"
    )
    source = (
        "Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters (2023); Wortsman et "
        "al., Small-scale proxies for large-scale Transformer training instabilities (ICLR 2024); "
        "Kimi K2 (2025), which clips above 100"
    )
    thresholds = (
        RuleThreshold("logit", 100, "largest logit, if it is also ten times the first measured"),
        RuleThreshold("growth", 40, "‖Wq‖‖Wk‖/‖Wv‖ relative to its first value"),
    )
    explained_by = ("update-ratio-high", "learning-rate-jump", "no-warm-up", "gradients-kept")

    def start(self) -> None:
        super().start()
        self._first: dict[str, float] = {}
        self._rows = 0

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported:
            return
        if seen.health is not None:
            values = self.values(seen.health, "max_logit")
            for layer, value in values.items():
                self._first.setdefault(layer, max(abs(value), 1.0))
            over = {
                layer: value
                for layer, value in values.items()
                if value > self.limits["logit"] and value > 10 * self._first[layer]
            }
            if over:
                yield self._found(seen, over, "max_logit", "largest attention logit", "logit")
        if seen.attention is not None and not self._reported:
            self._rows += 1
            if self._rows % EVERY:
                return
            grown = self.values(seen.attention, "growth")
            over = {layer: v for layer, v in grown.items() if v > self.limits["growth"]}
            if self._streak.add(bool(over), seen.step) >= 3:
                yield self._found(seen, over, "growth", "growth of ‖Wq‖‖Wk‖/‖Wv‖", "growth")

    def _found(
        self,
        seen: Observation,
        over: dict[str, float],
        statistic: str,
        words: str,
        limit: Literal["logit", "growth"],
    ) -> Found:
        self._reported = True
        layers = sorted(over, key=lambda layer: -over[layer])
        worst = layers[0]
        onset = self._streak.onset if limit == "growth" else seen.step
        table = "attention" if limit == "growth" else "attention_health"
        return Found(
            onset,
            f"in {worst or 'the model'} the {words} is {over[worst]:,.3g} ({len(layers)} "
            f"{'layers are' if len(layers) > 1 else 'layer is'} above {self.limits[limit]:g})",
            phase="forward",
            parameters=tuple(filter(None, layers[:8])),
            evidence=(
                evidence(words, over[worst], high=self.limits[limit], table=table,
                         column=f"{worst}.{statistic}"),
            ),
        )  # fmt: skip


class AttentionEntropy(_AttentionRule):
    """The entropy of attention collapses."""

    reads = "health"
    name = "attention-entropy"
    title = "attention collapses to one position"
    needs = "two samples of the attention's entropy"
    explanation = (
        "The attention distributions have lost almost all of their entropy: each position attends "
        "to a single other position, although it attended to many at the start. Entropy collapse "
        "is associated with instability and with vanishing gradients of Wq and Wk."
    )
    advice = "lower the learning rate or warm up longer; normalise queries and keys"
    source = (
        "Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse "
        "(ICML 2023)"
    )
    thresholds = (RuleThreshold("entropy", 0.1, "nats, for layers that started above 0.5"),)
    explained_by = (
        "attention-logits",
        "update-ratio-high",
        "learning-rate-jump",
        "no-warm-up",
        "gradients-kept",
    )

    def start(self) -> None:
        super().start()
        self._first: dict[str, float] = {}

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._reported or seen.health is None:
            return
        values = self.values(seen.health, "entropy")
        for layer, value in values.items():
            self._first.setdefault(layer, value)
        low = {
            layer: value
            for layer, value in values.items()
            if value < self.limits["entropy"] and self._first[layer] > 0.5
        }
        if self._streak.add(bool(low), seen.step) < 2:
            return
        self._reported = True
        layers = sorted(low, key=lambda layer: low[layer])
        worst = layers[0]
        yield Found(
            self._streak.onset,
            f"the attention of {worst or 'the model'} has an entropy of {low[worst]:.2g} nats; it "
            f"started at {self._first[worst]:.2g}",
            phase="forward",
            parameters=tuple(filter(None, layers[:8])),
            evidence=(
                evidence("entropy of attention", low[worst], low=self.limits["entropy"],
                         unit=" nats", table="attention_health", column=f"{worst}.entropy"),
            ),
        )  # fmt: skip
