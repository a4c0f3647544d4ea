"""Parameters that no optimizer updates, that have no gradients, or that are frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tui_trainer.findings.observation import Observation, RunFacts, TableRow
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, SignRule, Streak, evidence, named
from tui_trainer.protocol.absent import Absent
from tui_trainer.protocol.formatting import counted, percent

NO_MODEL = re.compile(r"param_\d+|.* \(replaced\)")
"""Names of an optimizer's parameters that no model has."""
MAX_CHANGES = 4
"""Changes of a report of `never-reached` from which only the last one is reported."""


def _replaced(facts: RunFacts, row: TableRow, outside: Iterable[str]) -> frozenset[str]:
    """Parameters of an optimizer that the model has replaced with the parameters `outside`.

    Such a parameter is in no model, has no gradient, and has the shape of a parameter in `outside`.
    Empty unless every matrix in `outside` has a counterpart: biases have equal shapes by chance.
    """
    orphans = {
        name: info.shape
        for name, absent in zip(row.names, row.absent.tolist(), strict=True)
        if absent
        and NO_MODEL.fullmatch(name)
        and (info := facts.parameters.get(name)) is not None
        and info.optimizer
    }
    shapes = {facts.parameters[name].shape for name in outside}
    matrices = {shape for shape in shapes if len(shape) >= 2} or shapes
    if not matrices <= set(orphans.values()):
        return frozenset()
    return frozenset(name for name, shape in orphans.items() if shape in shapes)


class NotInOptimizer(Rule):
    """Parameters with a gradient that no optimizer holds."""

    reads = "gradients"
    name = "not-in-optimizer"
    title = "parameters that no optimizer updates"
    needs = "the gradient norms of two steps"
    explanation = (
        "These parameters require a gradient, backward computes one, and no optimizer holds them: "
        "they keep their initial values, unless the script itself changes them. It happens when a "
        "layer is added or replaced after the optimizer was created, or when the optimizer is "
        "given the parameters of only a part of the model. If they are meant to stay fixed, "
        "requires_grad_(False) also saves computing their gradients."
    )
    advice = (
        "give all parameters to the optimizer (model.parameters(), or add_param_group for a layer "
        "that was added), or freeze them with requires_grad_(False)"
    )
    source = "TrainCheck (Jiang et al., OSDI 2025), a part of the model missing in the optimizer"
    # Optimizers are first seen at their first step: another one may hold these parameters.
    thresholds = (RuleThreshold("steps", 2, "measured steps with a gradient"),)
    explained_by = ("no-gradients",)

    def start(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}
        """Name → (first step, number of steps) with a gradient."""
        self._reported: set[str] = set()
        self._names: tuple[str, ...] = ()
        self._outside: list[int] = []
        self._known: Mapping[str, object] = {}

    def step(self, seen: Observation) -> Iterable[Found]:
        row = seen.gradients
        if row is None or not self._positions(row):
            return
        fresh = False
        for index in self._outside:
            value = float(row.values[index])
            if value > 0 or (value != value and not row.absent[index]):
                first, count = self._seen.get(row.names[index], (seen.step, 0))
                self._seen[row.names[index]] = first, count + 1
                if count + 1 == int(self.limits["steps"]):
                    fresh = True
        if not fresh:
            return
        outside = {row.names[index] for index in self._outside}
        names = [
            name
            for name, (_, count) in self._seen.items()
            if count >= self.limits["steps"] and name in outside
        ]
        if set(names) <= self._reported:
            return
        self._reported |= set(names)
        names.sort(key=lambda name: self.facts.order.get(name, 0))
        first = min(self._seen[name][0] for name in names)
        numel = sum(self.facts.parameters[name].numel for name in names)
        advice = ""
        why = "they keep their initial values, unless the script itself changes them"
        replaced = _replaced(self.facts, row, names)
        if replaced:
            self.facts.replaced |= replaced
            why = (
                "the optimizer holds others of the same shape, which the model no longer has: it "
                "was created before they were replaced"
            )
            advice = "create the optimizer once the model has its final layers"
        yield Found(
            first,
            f"{named(names)} ({counted(numel, 'number')}) got a gradient at every step, but no "
            f"optimizer updates them: {why}",
            advice=advice,
            confidence="certain",
            phase="step",
            parameters=tuple(names[:16]),
            evidence=(
                evidence(
                    "parameters with a gradient and no optimizer",
                    len(names),
                    high=0,
                    table="grad_norm",
                    column=names[0],
                    text=str(len(names)),
                ),
            ),
        )

    def _positions(self, row: TableRow) -> bool:
        """Find the columns of parameters outside of all optimizers."""
        if row.names is not self._names or self._known is not self.facts.parameters:
            self._names, self._known = row.names, self.facts.parameters
            self._outside = [
                index
                for index, name in enumerate(row.names)
                if (info := self.facts.parameters.get(name)) is not None
                and not info.optimizer
                and info.trainable
            ]
        return bool(self._outside)


class NeverReached(Rule):
    """Parameters of an optimizer that never get a gradient."""

    reads = "gradients"
    name = "never-reached"
    title = "parameters that backward never reaches"
    needs = "the gradients of ten steps"
    explanation = (
        "An optimizer holds these parameters and they are not frozen, but backward has not "
        "reached them in the first steps: the loss does not depend on them. Layers that take "
        "turns (heads of several tasks) are reached later, and the finding then says so. "
        "Otherwise forward does not use the layer, its output is detached (`.detach()`, `.item()`, "
        "numpy, torch.no_grad), or the optimizer was given the parameters of a different model."
    )
    advice = (
        "check that forward uses these layers and that nothing detaches their output; remove them, "
        "or freeze them, if they are not needed"
    )
    source = "DistributedDataParallel's find_unused_parameters reports the same"
    thresholds = (RuleThreshold("steps", 10, "measured steps without a gradient"),)
    explained_by = ("no-gradients",)

    def start(self) -> None:
        self._names: tuple[str, ...] = ()
        self._counts = np.zeros(0, np.int64)
        self._first = 0
        self._rows = 0
        self._done = False
        self._waiting: list[int] = []
        """Positions of reported parameters that backward has not reached since."""
        self._changes = 0

    def step(self, seen: Observation) -> Iterable[Found]:
        row = seen.gradients
        if row is None:
            return
        if self._done:
            if self._waiting and row.names is self._names:
                yield from self._reached(seen.step, row)
            return
        if row.names is not self._names:
            self._names, self._rows, self._first = row.names, 0, seen.step
            self._counts = np.zeros(len(row.names), np.int64)
        self._rows += 1
        if row.any_absent:
            self._counts += row.reasons() == Absent.NOT_REACHED
        if self._rows < self.limits["steps"]:
            return
        self._done = True
        never = np.flatnonzero(self._counts == self._rows).tolist()
        names = [
            self._names[index]
            for index in never
            if (info := self.facts.parameters.get(self._names[index])) is not None
            and info.optimizer
            and info.trainable
            and info.numel
            and info.name not in self.facts.replaced  # reported by `not-in-optimizer`
        ]
        own = [
            name
            for name in self._names
            if (info := self.facts.parameters.get(name)) is not None and info.optimizer
        ]
        if not names or len(names) == len(own):
            return  # none has a gradient: reported by `no-gradients`
        chosen = set(names)
        self._waiting = [index for index in never if self._names[index] in chosen]
        self._total = len(own)
        yield self._found(names, "")

    def _found(self, names: Sequence[str], later: str) -> Found:
        numel = sum(self.facts.parameters[name].numel for name in names)
        return Found(
            self._first,
            f"{named(names)} ({counted(numel, 'number')}) are in the optimizer, but backward has "
            f"not reached them{later or f' in {self._rows} steps'}: the loss does not depend on "
            "them",
            confidence="certain",
            phase="backward",
            parameters=tuple(names[:16]),
            evidence=(
                evidence("parameters without a gradient", len(names), high=0, table="grad_norm",
                         column=names[0], text=f"{len(names)} of {self._total}"),
            ),
        )  # fmt: skip

    def _reached(self, step: int, row: TableRow) -> Iterable[Found]:
        """Update the report once backward reaches reported parameters, as of heads that take
        turns."""
        reached = row.finite[self._waiting] | ~row.absent[self._waiting]
        if not reached.any():
            return
        before = [self._names[index] for index in self._waiting]
        self._waiting = [i for i, used in zip(self._waiting, reached, strict=True) if not used]
        if self._waiting:
            self._changes += 1
            if self._changes < MAX_CHANGES:  # leave room for the last change
                names = [self._names[index] for index in self._waiting]
                yield self._found(names, f" until step {step:,}")
            return
        yield Found(
            self._first,
            f"backward did not reach {named(before)} before step {step:,}, and does now, as with "
            "layers that take turns",
            level="info",
            advice="if these layers are not meant to take turns, find out what used them first",
            confidence="certain",
            phase="backward",
            parameters=tuple(before[:16]),
            evidence=(
                evidence("step at which backward reached them", step, high=self._first,
                         text=f"{step:,}", table="grad_norm", column=before[0]),
            ),
        )  # fmt: skip


class ZeroGradients(Rule):
    """Parameters whose gradient is exactly zero."""

    reads = "gradients"
    name = "zero-gradients"
    title = "gradients are exactly zero"
    needs = "the gradients of twenty steps"
    explanation = (
        "Backward reaches these parameters, and their gradient is exactly 0 at every step: their "
        "output is multiplied by zero, or passes a unit whose slope is zero. Usual causes "
        "are dead ReLUs, weights that start at zero on both sides of a layer, a mask that hides "
        "everything, and rounding or comparisons, which have no slope. Biases alone are not "
        "reported: in a difference of two outputs they cancel."
    )
    advice = "follow the output of this layer in forward to where its gradient ends"
    source = "zero gradients are a symptom of DeepDiagnosis (Wardat et al., ICSE 2022)"
    thresholds = (RuleThreshold("steps", 20, "measured steps in a row"),)
    explained_by = (
        "dead-units",
        "constant-weights",
        "saturated-units",
        "label-range",
        "constant-labels",
        "constant-inputs",
    )

    def start(self) -> None:
        self._names: tuple[str, ...] = ()
        self._counts = np.zeros(0, np.int64)
        self._first = 0
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        row = seen.gradients
        if row is None or self._done:
            return
        if row.names is not self._names:
            self._names, self._first = row.names, seen.step
            self._counts = np.zeros(len(row.names), np.int64)
        zero = row.values == 0
        if not self._counts.any() and self._first != seen.step and not zero.any():
            self._done = True  # only gradients that are zero from the start are reported
            return
        self._counts = np.where(zero, self._counts + 1, -(1 << 60))
        if self._counts.max(initial=0) < self.limits["steps"]:
            return
        self._done = True
        names = [
            name
            for name, count in zip(row.names, self._counts.tolist(), strict=True)
            if count >= self.limits["steps"]
            and (info := self.facts.parameters.get(name)) is not None
            and info.optimizer
            and info.trainable
            and info.numel
        ]
        if not any(map(self.facts.is_matrix, names)) or not (row.finite & ~zero).any():
            return  # a bias may cancel, as in a Wasserstein loss or a ranking loss
        yield Found(
            self._first,
            f"the gradient of {named(names)} is exactly 0 at every step",
            confidence="certain",
            phase="backward",
            parameters=tuple(names[:16]),
            evidence=(
                evidence("parameters with a gradient of exactly 0", len(names), high=0,
                         table="grad_norm", column=names[0], text=str(len(names))),
            ),
        )  # fmt: skip


class NoGradients(Rule):
    """The optimizer steps, and none of its parameters has a gradient."""

    reads = "gradients"
    name = "no-gradients"
    title = "the optimizer has no gradients"
    level = "error"
    needs = "two steps"
    explanation = (
        "The optimizer steps, but none of its parameters has a gradient. Either it holds tensors "
        "that are no longer those of the trained model, because it was created before the model "
        "was replaced, reloaded, copied or wrapped; or backward is never called; or everything is "
        "detached or frozen."
    )
    advice = (
        "create the optimizer once the model has its final form (after .to(), loading, wrapping), "
        "and check that backward() is called on a loss that depends on the model"
    )
    source = "PyTorch's documentation of torch.optim (construct optimizers after moving a model)"
    thresholds = (RuleThreshold("steps", 2, "steps in a row without any gradient"),)
    explained_by = ("zeroed-before-step", "constant-labels")

    def start(self) -> None:
        self._streak = Streak()
        self._reported = False
        self._had_any = False

    def step(self, seen: Observation) -> Iterable[Found]:
        row = seen.gradients
        if self._reported or row is None or row.any_unknown:
            return
        if not row.any_absent:
            self._had_any = True
            self._streak.add(False, seen.step)
            return
        own = [
            index
            for index, name in enumerate(row.names)
            if (info := self.facts.parameters.get(name)) is None or info.optimizer
        ]
        missing = bool(own) and bool(row.absent[own].all())
        self._had_any = self._had_any or not missing
        if self._streak.add(missing, seen.step) < self.limits["steps"]:
            return
        self._reported = True
        before = ", as they had before" if self._had_any else ""
        yield Found(
            self._streak.onset,
            f"{self.facts.optimizer_name(seen.optimizer)} steps, but since step "
            f"{self._streak.onset:,} none of its {len(own)} parameters has a gradient{before}: it "
            "trains nothing",
            confidence="certain",
            phase="step",
            parameters=tuple(row.names[index] for index in own[:8]),
            evidence=(
                evidence("parameters with a gradient", 0.0, low=1, table="grad_norm",
                         column=row.names[own[0]], text=f"0 of {len(own)}"),
            ),
        )  # fmt: skip


class MostlyFrozen(Rule):
    """Almost all of the model is frozen."""

    name = "mostly-frozen"
    title = "almost all of the model is frozen"
    level = "info"
    needs = "one step"
    explanation = (
        "Only a small part of the model's weights is trained. That is intended when fine-tuning a "
        "head or adapters, and a mistake if requires_grad_(False) is left over from another stage."
    )
    advice = "if the whole model should train: requires_grad_(True), and give it to the optimizer"
    source = "TrainCheck (Jiang et al., OSDI 2025), frozen stages"
    thresholds = (RuleThreshold("share", 0.05, "share of the weights that are trained"),)

    def start(self) -> None:
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done or not self.facts.parameters:
            return
        self._done = True
        infos = self.facts.parameters.values()
        total = sum(info.numel for info in infos)
        trained = [info for info in infos if info.trainable]
        numel = sum(info.numel for info in trained)
        if not total or len(trained) == len(infos) or numel / total >= self.limits["share"]:
            return
        frozen = [info.name for info in infos if not info.trainable]
        trained_share = percent(numel / total, 0, 2)
        yield Found(
            seen.step,
            f"only {numel:,} of {total:,} weights are trained ({trained_share}): "
            f"{named([info.name for info in trained])}; frozen are {named(frozen)}",
            confidence="certain",
            parameters=tuple(frozen[:8]),
            evidence=(
                evidence("share of the model that is trained", numel / total,
                         low=self.limits["share"], text=trained_share),
            ),
        )  # fmt: skip


class FrozenLate(Rule):
    """Parameters that were trained at first and frozen later."""

    reads = "gradients"
    name = "frozen-late"
    title = "parameters are frozen after they were trained"
    level = "info"
    needs = "the gradients of a step, and then of two without those of some parameters"
    explanation = (
        "These parameters were updated from the first step on, and later requires_grad was set to "
        "False for them, although none had been frozen before. A model that freezes its stages in "
        "its own train() method does that when train() is called: without that call before the "
        "first step, the pretrained stages are changed until the first evaluation is over. "
        "Freezing one layer after another on purpose looks the same. Parameters that are trained "
        "again later were not meant to stay fixed and are not reported."
    )
    advice = (
        "if they were to keep their pretrained values: freeze them, or call model.train(), before "
        "the first step, and load the pretrained weights again"
    )
    source = "TrainCheck (Jiang et al., OSDI 2025), frozen stages that are not applied"
    thresholds = (RuleThreshold("steps", 2, "measured steps in a row in which they are frozen"),)

    def start(self) -> None:
        self._names: tuple[str, ...] = ()
        self._trained = np.zeros(0, np.int64)
        """Measured steps with a gradient."""
        self._streak = Streak()
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        row = seen.gradients
        if row is None or self._done:
            return
        if row.names is not self._names:
            self._names, self._trained = row.names, np.zeros(len(row.names), np.int64)
            self._streak = Streak()
        if not row.any_absent:
            self._trained += 1
            self._streak.add(False, seen.step)
            return
        frozen = row.reasons() == Absent.FROZEN
        if not self._trained.any() and frozen.any():
            self._done = True  # a part was frozen from the start: what follows is a schedule
            return
        late = frozen & (self._trained > 0)
        self._trained += ~row.absent
        if self._streak.add(bool(late.any()), seen.step) < self.limits["steps"]:
            return
        self._done = True
        names = [
            name
            for name, is_late in zip(row.names, late.tolist(), strict=True)
            if is_late and (info := self.facts.parameters.get(name)) is not None and info.optimizer
        ]
        if not names:
            return
        numel = sum(self.facts.parameters[name].numel for name in names)
        trained = int(self._trained[late].max())
        yield Found(
            self._streak.onset,
            f"{named(names)} ({counted(numel, 'number')}) were trained until step "
            f"{self._streak.onset - 1:,} and are frozen since: they no longer have the values that "
            "they started with",
            confidence="possible",
            phase="step",
            parameters=tuple(names[:16]),
            evidence=(
                evidence("measured steps before they were frozen", trained, high=0,
                         table="grad_norm", column=names[0], text=f"{trained:,}"),
            ),
        )  # fmt: skip


class EvaluationMode(SignRule):
    """The model trains in `eval()` mode."""

    name = "eval-mode"
    title = "the model trains in eval() mode"
    needs = "three steps"
    explanation = (
        "The model is called for training while it is in eval() mode, and it has dropout or batch "
        "normalisation, which behave differently in that mode: dropout does nothing, and running "
        "statistics are used instead of updated. Usually model.train() is missing after an "
        "evaluation."
    )
    advice = "call model.train() before the training steps, and again after every evaluation"
    source = "PyTorch's documentation of Module.eval; TrainCheck's missing dropout in training"
    thresholds = (RuleThreshold("steps", 3, "steps in a row"),)
    sign = "eval_mode"
    problem = (
        "the model has been trained in eval() mode: dropout is off and batch normalisation does "
        "not update its statistics"
    )
    counted = "steps in eval() mode"
    phase = "forward"
