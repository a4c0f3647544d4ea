"""nan or inf in the loss, gradients or weights, and the place closest to its origin."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from tui_trainer.findings.observation import Observation, SkippedStep
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, evidence
from tui_trainer.history.records import BadBatch, NonFiniteRecord, Producer
from tui_trainer.protocol import Phase
from tui_trainer.protocol.events import Evidence
from tui_trainer.protocol.formatting import nonfinite

PHASES: dict[str, Phase] = {
    "operation": "loss",
    "module": "forward",
    "weight": "step",
    "input": "data",
}
"""Kind of origin → the phase that it belongs to."""
DOMAINS = {
    **dict.fromkeys(
        ("log", "log2", "log10"), ": it needs numbers above zero (clamp them, or add a small one)"
    ),
    "sqrt": ": it needs numbers that are not negative",
    "div": ": its divisor must not be zero, nor too small (add a small number to it)",
    "exp": ": in float32 it overflows beyond 88 (subtract the maximum first)",
    "pow": ": negative numbers have no fractional power, and large ones overflow",
}
"""Operation → the condition for a finite result, as the end of a sentence."""
SLOPES = {
    **dict.fromkeys(
        ("sqrt", "log", "log2", "log10"),
        ": its slope is infinite at zero (add a small number to what it is given)",
    ),
    **dict.fromkeys(
        ("linalgvectornorm", "norm", "cdist"),
        ": it has no slope at zero (add a small number to what it is given)",
    ),
    "pow": ": a power below 1 has an infinite slope at zero (add a small number to its base)",
    "rsqrt": ": it and its slope are infinite at zero (add a small number to what it is given)",
    "div": ": its divisor must not be zero, nor too small (add a small number to it)",
    **dict.fromkeys(
        ("acos", "asin"), ": its slope is infinite at −1 and 1 (clamp what it is given)"
    ),
}
"""Operation → the condition for a finite backward, as the end of a sentence."""
HEALTHY = ", healthy: finite"
"""The healthy range, which has no limits that could be drawn."""


class NonFiniteRule(Rule):
    """Reports the first quantity that is not finite, and where it came from."""

    name = "non-finite"
    title = "nan or inf"
    level = "error"
    needs = "the loss of every step; gradient and weight norms at the steps that measure them"
    explanation = (
        "nan and inf do not go away: they spread from the loss to every gradient, and with the "
        "next update to the weights. Backward runs from the loss to the input, so of the "
        "parameters whose gradients are not finite, the last one in the model's order was the "
        "first to be affected: the operation that produced the value comes right after it. If the "
        "loss itself is not finite, the forward pass or the loss function produced it: on the CPU "
        "the operation is read from the graph of the loss, and while the outputs of all modules "
        "are summed (in the first steps, after a first value that is not finite, while the loss or "
        "the gradient norm is ten times its usual value, in `tui-trainer check`, and at every step "
        "with `--watch-nonfinite`) the first module is named whose output is not finite although "
        "its inputs are. On the CPU the forward pass is then run again, with the same batch, "
        "weights and random numbers and with every operation checked, which names the operation "
        "and the line of the source that calls it; where only gradients are not finite, so is "
        "backward, before the optimizer uses them. What the loss computes outside of the model, "
        "such as a penalty, is not run again: the finding names the operation of its first "
        "gradient that is not finite, and the line, if only one line of the loop computes that "
        "operation."
    )
    advice = (
        "look for log, sqrt, exp and divisions at zero near this place, and for a learning rate "
        "that is too high; torch.autograd.set_detect_anomaly(True) names the operation"
    )
    source = "IEEE 754; order of backward as in PyTorch's autograd mechanics notes"
    thresholds = (
        RuleThreshold(
            "reruns", 3, "maximum number of steps that are run again with every operation checked"
        ),
        RuleThreshold(
            "skips",
            10,
            "iterations in a row that a GradScaler skips for such a loss, from which the finding "
            "remains an error even if later losses are finite",
        ),
    )
    exact = True
    explained_by = (
        "input-scale",
        "target-scale",
        "initial-scale",
        "label-range",
        "gradients-kept",
        "update-ratio-high",
        "learning-rate-jump",
        "no-warm-up",
        "initial-loss",
        "gradients-explode",
        "loss-diverges",
        "overflow-ahead",
        "attention-logits",
    )

    def start(self) -> None:
        self._found = False
        self._finite_loss: tuple[int, float] | None = None
        self._unplaced: Found | None = None
        """The report of a loss without an origin, until a later step shows one."""
        self._skips = 0
        """Iterations in a row that a GradScaler skipped because of a non-finite loss."""
        self._skipped: Found | None = None
        """The report of the first of these iterations."""
        self._lasting = False
        """Whether `thresholds["skips"]` was reached: the report then remains an error."""
        self._recovering = False
        """Whether no step with a finite loss has followed these iterations yet."""

    def skipped(self, skipped: SkippedStep) -> Iterable[Found]:
        if skipped.reason != "scaler" or self._found:
            return  # a script that discards gradients itself knows why
        loss = skipped.loss
        if loss is None or math.isfinite(loss):
            self._skips = 0
            return
        self._skips += 1
        self._recovering = True
        if self._skipped is None:
            value, producer = nonfinite(loss), skipped.producer
            origin, advice, phase = _origin_of_loss(value, producer, skipped.bad_batch)
            self._skipped = Found(
                skipped.step,
                f"the loss became {value}: {origin}{self._before()}. The GradScaler skipped the "
                "iteration",
                advice=advice,
                confidence="certain",
                phase=phase,
                parameters=(producer and _named_place(producer)) or (),
                evidence=(_of_loss(value), *_rerun(producer)),
            )
            yield self._skipped
        elif self._skips == self.limits["skips"] and not self._lasting:
            self._lasting = True
            later = skipped.step != self._skipped.onset
            where = f" before step {skipped.step:,}" if later else ""
            self._skipped = replace(
                self._skipped,
                text=f"{self._skipped.text}, and {self._skips} in a row like it{where}: nothing "
                "was trained",
            )
            yield self._skipped

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._recovering and seen.loss is not None and math.isfinite(seen.loss):
            self._recovering = False
            yield from self._recovered(seen.step)
        self._skips = 0
        if seen.nonfinite and not self._found:
            self._found = True
            found = self._report(seen)
            yield found
            if seen.producer is None and found.phase == "loss":
                self._unplaced = found
        elif self._unplaced is not None and seen.producer is not None:
            # In a later step, non-finite weights are an effect of this loss.
            if seen.producer.source in ("operation", "module"):
                text = f"{self._unplaced.text}; at step {seen.step:,} {origin_text(seen.producer)}"
                yield replace(self._unplaced, text=text, parameters=_named_place(seen.producer))
            self._unplaced = None
        if seen.loss is not None and abs(seen.loss) < float("inf"):
            self._finite_loss = seen.step, seen.loss

    def _recovered(self, step: int) -> Iterable[Found]:
        """Report the first step after iterations that a GradScaler has skipped."""
        if self._skipped is not None and not self._lasting:
            text = f"{self._skipped.text}; step {step:,} was made with a finite loss"
            yield replace(self._skipped, text=text, level="warning")

    def _report(self, seen: Observation) -> Found:
        events = {event.quantity: event for event in seen.nonfinite}
        if "loss" in events:
            return self._loss(seen, events["loss"])
        if "gradient" in events:
            return self._gradient(seen, events["gradient"])
        return self._weight(seen, events["weight"])

    def _before(self) -> str:
        if self._finite_loss is None:
            return ""
        return f"; it was {self._finite_loss[1]:.4g} at step {self._finite_loss[0]:,}"

    def _loss(self, seen: Observation, event: NonFiniteRecord) -> Found:
        origin, advice, phase = _origin_of_loss(event.value, seen.producer, seen.bad_batch)
        parameters = self._culprits(seen)[:1] if self._partial(seen) else ()
        return Found(
            seen.step,
            f"the loss became {event.value}: {origin}{self._before()}",
            advice=advice,
            confidence="certain",
            phase=phase,
            parameters=(seen.producer and _named_place(seen.producer)) or parameters,
            evidence=(_of_loss(event.value), *_rerun(seen.producer)),
        )

    def _gradient(self, seen: Observation, event: NonFiniteRecord) -> Found:
        culprits = self._culprits(seen) or (event.parameter,)
        value = event.value
        if seen.gradients is not None and culprits[0] in seen.gradients.names:
            found = float(seen.gradients.values[seen.gradients.names.index(culprits[0])])
            if not abs(found) < float("inf"):
                value = nonfinite(found)
        total = len(seen.gradients.names) if seen.gradients is not None else len(culprits)
        loss = f" ({seen.loss:.4g})" if seen.loss is not None else ""
        origin = (
            f"{_origin_of_gradient(seen.producer)}"
            if seen.producer is not None and seen.producer.backward
            else "backward produced it at or just after this parameter"
        )
        others = (
            f"; {len(culprits)} of {total} gradients are not finite"
            if len(culprits) > 1
            else f"; the other {total - 1} gradients are finite"
        )
        return Found(
            _onset(seen.step, event.finite_at),
            f"the gradient of {culprits[0]} is {value} at step {seen.step:,} although the loss is "
            f"finite{loss}: {origin}{others}",
            advice=_advice(seen.producer) if seen.producer and seen.producer.backward else "",
            confidence="certain",
            phase="backward",
            parameters=culprits[:8],
            evidence=(
                evidence(
                    f"gradient norm of {culprits[0]}",
                    math.nan,
                    table="grad_norm",
                    column=culprits[0],
                    text=value + HEALTHY,
                ),
                *_rerun(seen.producer),
            ),
        )

    def _weight(self, seen: Observation, event: NonFiniteRecord) -> Found:
        when = (
            f"between steps {event.finite_at:,} and {seen.step:,}"
            if event.finite_at is not None and event.finite_at < seen.step - 1
            else f"at step {seen.step:,}"
        )
        return Found(
            _onset(seen.step, event.finite_at),
            f"{event.parameter} became {event.value} {when} although its gradient was finite: the "
            "optimizer's update, or the script, produced it",
            confidence="certain",
            phase="step",
            parameters=(event.parameter,),
            evidence=(
                evidence(f"norm of {event.parameter}", math.nan, table="weight_norm",
                         column=event.parameter, text=event.value + HEALTHY),
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


def _origin_of_loss(
    value: str, producer: Producer | None, bad: BadBatch | None
) -> tuple[str, str, Phase]:
    """(origin, advice, phase) of a non-finite loss; an advice of "" stands for that of the rule.
    `bad`: the batch, if it was examined."""
    if producer is None:
        what = "log of zero, a division or an overflow" if value != "nan" else "0/0, inf − inf"
        unknown = (
            f"the forward pass or the loss function produced it ({what}), or the weights were "
            "already too large"
        )
        return unknown, "", "loss"
    origin, advice, phase = origin_text(producer), _advice(producer), PHASES[producer.source]
    if producer.source != "input":
        return origin, advice, phase
    rows = bad.broken_rows if bad is not None else ()
    if rows:
        batch = origin_text(Producer("input", ""))
        where = f"in {'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows))}"
        advice = advice.replace("the values of this batch", "these rows of the batch")
        return f"{batch}, {where}", advice, phase
    if bad is not None and math.isfinite(bad.low):
        return (
            "a constant or a detached tensor that is not finite enters it",
            "look at what the loss is multiplied by, and at tensors in it that were detached or "
            "computed without gradients",
            "loss",
        )
    return origin, advice, phase


def origin_text(producer: Producer) -> str:
    """The origin of a non-finite value, as a part of a sentence."""
    place = f" ({producer.place})" if producer.place else ""
    match producer.source:
        case "input" if producer.operation:  # as in the graph of the loss
            return (
                f"`{producer.operation}` gets values that are not finite from the batch, a "
                "constant or a detached tensor"
            )
        case "input":
            return "the batch has values that are not finite before the model computes anything"
        case "weight":
            return f"{producer.name} already has values that are not finite"
        case "module":
            module = producer.name or "the model"
            kind = f" ({producer.kind})" if producer.kind else ""
            operation = f", in `{producer.operation}`" if producer.operation else ""
            return (
                f"the output of {module}{kind} is not finite although its inputs and weights "
                f"are{operation}{place}"
            )
    # The place comes first: lines of a narrow screen are cut at their end.
    after = f" after {producer.name}" if producer.name else ""
    return f"`{producer.operation}`{place}{after} produced it from finite numbers"


def _advice(producer: Producer | None) -> str:
    """The advice for a known origin; "" stands for the advice of the rule."""
    if producer is None:
        return ""
    match producer.source:
        case "input":
            return (
                "look at the values of this batch and where they come from: missing values, a "
                "division by a standard deviation of zero"
            )
        case "weight":
            return f"look at what has changed {producer.name}: the last update, or the script"
        case "module" if not producer.operation:
            return "step into this module: print the largest values of its inputs and its weights"
    needs = SLOPES if producer.backward else DOMAINS
    domain = needs.get(producer.operation.lower(), "")
    where = f"`{producer.operation}`" + (f" at {producer.place}" if producer.place else "")
    return f"look at what {where} is given{domain}"


def _of_loss(value: str) -> Evidence:
    return evidence("loss", math.nan, table="step", column="loss", text=value + HEALTHY)


def _origin_of_gradient(producer: Producer) -> str:
    module = f" in {producer.name} ({producer.kind})" if producer.name else ""
    place = f" ({producer.place})" if producer.place else ""
    return f"the backward of `{producer.operation}`{module}{place} made it from finite gradients"


def _rerun(producer: Producer | None) -> tuple[Evidence, ...]:
    """The result of a re-run, in one line."""
    if producer is None or not producer.rerun:
        return ()
    where = f" in {producer.name}" if producer.name else ""
    text = f"`{producer.operation}`{where}" + (f", {producer.place}" if producer.place else "")
    return (evidence("operation, found by running the step again", math.nan, text=text),)


def _named_place(producer: Producer) -> tuple[str, ...]:
    return (producer.name,) if producer.name else ()


def _onset(step: int, finite_at: int | None) -> int:
    """The first step at which the value may have appeared."""
    return step if finite_at is None else min(step, finite_at + 1)
