"""NaN or infinity in loss, gradients or weights, with the place nearest to its origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tui_trainer.findings.observation import LossTrend, Observation, RunFacts
from tui_trainer.findings.rule import Found, Rule, evidence
from tui_trainer.protocol.formatting import nonfinite
from tui_trainer.protocol.messages import NonFiniteQuantity, NonFiniteValue

Event = tuple[NonFiniteQuantity, str, NonFiniteValue, int | None]


class NonFiniteRule(Rule):
    """Reports the first quantity that is not finite, and where it came from."""

    name = "non-finite"
    title = "nan or inf"
    level = "error"
    needs = "the loss of every step; gradient norms and weight norms where they are measured"
    explanation = (
        "A NaN or an infinity never goes away: it passes from the loss to every gradient, and with "
        "the next update into the weights. Backward runs from the loss to the input, so the first "
        "parameter whose gradient is not finite is the last one of them in the model's order: the "
        "operation that produced the value lies just after it. If the loss itself is not finite, "
        "the forward pass or the loss function produced it."
    )
    next = (
        "look for log, sqrt, exp and divisions at zero near this place, and for a learning rate "
        "that is too high; torch.autograd.set_detect_anomaly(True) names the operation"
    )
    source = "IEEE 754; order of backward as in PyTorch's autograd mechanics notes"
    explained_by = (
        "gradients-kept",
        "update-ratio-high",
        "learning-rate-jump",
        "no-warm-up",
        "initial-loss",
        "gradients-explode",
        "loss-diverges",
        "attention-logits",
    )

    def __init__(self, facts: RunFacts, trend: LossTrend, limits: Mapping[str, float]) -> None:
        super().__init__(facts, trend, limits)
        self._found = False
        self._finite_loss: tuple[int, float] | None = None

    def step(self, seen: Observation) -> Iterable[Found]:
        if seen.nonfinite and not self._found:
            self._found = True
            yield self._report(seen)
        if seen.loss is not None and abs(seen.loss) < float("inf"):
            self._finite_loss = seen.step, seen.loss

    def _report(self, seen: Observation) -> Found:
        events = {quantity: event for event in seen.nonfinite for quantity in (event[0],)}
        if "loss" in events:
            return self._loss(seen, events["loss"])
        if "gradient" in events:
            return self._gradient(seen, events["gradient"])
        return self._weight(seen, events["weight"])

    def _loss(self, seen: Observation, event: Event) -> Found:
        before = (
            f"; it was {self._finite_loss[1]:.4g} at step {self._finite_loss[0]:,}"
            if self._finite_loss
            else ""
        )
        what = "log of zero, a division or an overflow" if event[2] != "nan" else "0/0, inf − inf"
        return Found(
            seen.step,
            f"the loss became {event[2]} at step {seen.step:,}{before}: the forward pass or the "
            f"loss function produced it ({what}), or the weights were too large already",
            confidence="certain",
            phase="loss",
            parameters=self._culprits(seen)[:1] if self._partial(seen) else (),
            evidence=(evidence("loss", seen.loss or 0.0, table="step", column="loss",
                               text=event[2]),),
        )  # fmt: skip

    def _gradient(self, seen: Observation, event: Event) -> Found:
        culprits = self._culprits(seen) or (event[1],)
        value = event[2]
        if seen.gradients is not None and culprits[0] in seen.gradients.names:
            found = float(seen.gradients.values[seen.gradients.names.index(culprits[0])])
            if not abs(found) < float("inf"):
                value = nonfinite(found)
        total = len(seen.gradients.names) if seen.gradients is not None else len(culprits)
        loss = f" ({seen.loss:.4g})" if seen.loss is not None else ""
        others = (
            f"; {len(culprits)} of {total} gradients are not finite"
            if len(culprits) > 1
            else f"; the other {total - 1} gradients are finite"
        )
        return Found(
            _onset(seen.step, event[3]),
            f"the gradient of {culprits[0]} is {value} at step {seen.step:,} although the loss is "
            f"finite{loss}: backward produced it at or just after this parameter{others}",
            confidence="certain",
            phase="backward",
            parameters=culprits[:8],
            evidence=(
                evidence(
                    f"gradient norm of {culprits[0]}",
                    0.0,
                    table="grad_norm",
                    column=culprits[0],
                    text=value,
                ),
            ),
        )

    def _weight(self, seen: Observation, event: Event) -> Found:
        when = (
            f"between steps {event[3]:,} and {seen.step:,}"
            if event[3] is not None and event[3] < seen.step - 1
            else f"at step {seen.step:,}"
        )
        return Found(
            _onset(seen.step, event[3]),
            f"{event[1]} became {event[2]} {when} although its gradient was finite: the "
            "optimizer's update, or the script, produced it",
            confidence="certain",
            phase="step",
            parameters=(event[1],),
            evidence=(
                evidence(f"norm of {event[1]}", 0.0, table="weight_norm", column=event[1],
                         text=event[2]),
            ),
        )  # fmt: skip

    def _culprits(self, seen: Observation) -> tuple[str, ...]:
        """Parameters whose gradients are not finite, in the order of backward."""
        row = seen.gradients
        if row is None:
            return ()
        bad = ~row.finite & ~row.absent
        names = [name for name, is_bad in zip(row.names, bad.tolist(), strict=False) if is_bad]
        return tuple(sorted(names, key=lambda name: -self.facts.order.get(name, -1)))

    def _partial(self, seen: Observation) -> bool:
        """Whether only some of the gradients are not finite."""
        row = seen.gradients
        return row is not None and len(self._culprits(seen)) < int((~row.absent).sum())


def _onset(step: int, finite_at: int | None) -> int:
    """The first step at which it may have been so, if it is known to within one."""
    return step if finite_at is None else min(step, finite_at + 1)
