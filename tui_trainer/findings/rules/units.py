"""Units that no longer react to their input, and dropout that is off."""

from __future__ import annotations

from collections.abc import Iterable

from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence, named
from tui_trainer.history.records import UnitsShare
from tui_trainer.protocol.events import Level
from tui_trainer.protocol.formatting import percent

STEPS_OF_WINDOW = 50
"""Steps from the first to the last measurement of a window (see `probes.units`)."""


class _StuckUnits(Rule):
    """Reports the layers with the largest shares of units that did not change."""

    reads = "units"
    kinds: tuple[str, ...] = ()
    thresholds = (
        RuleThreshold("share", 0.9, "share of a layer's units, for a warning"),
        RuleThreshold("info", 0.5, "the same, for the level `info`"),
    )
    explained_by = (
        "constant-inputs",
        "constant-labels",
        "constant-weights",
        "input-scale",
        "initial-scale",
        "update-ratio-high",
        "learning-rate-jump",
    )

    def start(self) -> None:
        self._level: Level | None = None

    def what(self, worst: UnitsShare) -> str:
        raise NotImplementedError

    def step(self, seen: Observation) -> Iterable[Found]:
        if seen.units is None or self._level == "warning":
            return
        layers = sorted(
            (each for each in seen.units.layers if each.kind in self.kinds),
            key=lambda each: -each.share,
        )
        stuck = [each for each in layers if each.share >= self.limits["info"]]
        if not stuck:
            return
        level: Level = "warning" if stuck[0].share >= self.limits["share"] else "info"
        if level == self._level:
            return
        self._level = level
        yield Found(
            max(1, seen.step - STEPS_OF_WINDOW),
            f"{self.what(stuck[0])}"
            + (f"; {len(stuck)} of {len(layers)} layers are like that" if len(stuck) > 1 else ""),
            level=level,
            phase="forward",
            parameters=tuple(each.path for each in stuck[:8] if each.path),
            evidence=(
                evidence("share of units that do not change", stuck[0].share,
                         high=self.limits["info"], text=percent(stuck[0].share, 0, 0)),
            ),
        )  # fmt: skip


class DeadUnits(_StuckUnits):
    """ReLU units that are zero for every example."""

    name = "dead-units"
    title = "dead ReLU units"
    kinds = ("relu",)
    needs = "the activations of three steps, each with 16 examples or positions"
    explanation = (
        "These units were zero for every example of three batches within 50 steps. The gradient of "
        "a ReLU is zero there, so the weights before it do not change and the units stay dead. The "
        "usual cause is one large update (a learning rate that is too high, unnormalised inputs), "
        "or a bias that starts far below zero."
    )
    advice = (
        "lower the learning rate, normalise the inputs, use He's initialisation, or an activation "
        "with a gradient below zero (LeakyReLU, GELU)"
    )
    source = (
        "Lu et al., Dying ReLU and Initialization (2019); half of a layer is the limit of Amazon "
        "SageMaker Debugger's rule DeadRelu"
    )

    def what(self, worst: UnitsShare) -> str:
        where = f" of {worst.path}" if worst.path else ""
        return (
            f"{percent(worst.share, 0, 0)} of the {worst.units:,} ReLU units{where} were zero for "
            "every example of three batches"
        )


class SaturatedUnits(_StuckUnits):
    """Sigmoid and tanh units that are at their limits for every example."""

    name = "saturated-units"
    title = "saturated units"
    kinds = ("sigmoid", "tanh")
    needs = "the activations of three steps, each with 16 examples or positions"
    explanation = (
        "These units were within 1 % of a limit of their range for every example of three batches "
        "within 50 steps. The gradient of a sigmoid or tanh is almost zero there, so hardly any of "
        "it passes to the layers before. The usual causes are initial weights or inputs that are "
        "too large, and a learning rate that is too high. The activation of the model's output is "
        "not checked."
    )
    advice = "normalise the inputs, use Glorot's initialisation, lower the learning rate"
    source = (
        "Glorot & Bengio, Understanding the difficulty of training deep feedforward neural "
        "networks (AISTATS 2010); half of a layer is the limit of Amazon SageMaker Debugger's rule "
        "SaturatedActivation"
    )

    def what(self, worst: UnitsShare) -> str:
        where = f" of {worst.path}" if worst.path else ""
        return (
            f"{percent(worst.share, 0, 0)} of the {worst.units:,} {worst.kind} units{where} were "
            "at a limit of their range for every example of three batches"
        )


class SignalVanishes(Rule):
    """The input of the last layer hardly depends on the example."""

    reads = "units"
    name = "signal-vanishes"
    title = "the signal vanishes on its way forward"
    needs = "the inputs of the first and the last layer in two steps, 25 apart, and the losses"
    explanation = (
        "The last layer gets almost the same features for all examples of a batch, although the "
        "model's inputs differ, and the loss has not fallen: in each layer the biases, or a mean "
        "that all examples share, outweigh the differences between them. The gradients of the "
        "first layers say almost nothing about the examples either. Deep networks without "
        "normalisation or residual connections, and with PyTorch's default initialisation (which "
        "is smaller than He's), are the usual cause; a sigmoid in each layer is another."
    )
    advice = (
        "add normalisation layers (BatchNorm, LayerNorm) or residual connections, or initialise "
        "with kaiming_normal_(weight, nonlinearity='relu') and zero biases"
    )
    source = (
        "Schoenholz et al., Deep Information Propagation (ICLR 2017): beyond a depth, correlations "
        "between inputs converge to 1 and a network cannot be trained; Ioffe & Szegedy, Batch "
        "Normalization (ICML 2015)"
    )
    thresholds = (
        RuleThreshold("share", 0.01, "difference between the examples, as a share of the values"),
        RuleThreshold("measurements", 2, "measured steps in a row"),
        RuleThreshold("fall", 0.05, "fall of the loss from which nothing is reported"),
    )
    explained_by = (
        "constant-inputs",
        "same-batch",
        "constant-weights",
        "dead-units",
        "saturated-units",
        "softmax-inside",
        "gradients-vanish",
        "input-scale",
        "update-ratio-high",
        "learning-rate-jump",
        "loss-diverges",
    )

    def start(self) -> None:
        self._streak = Streak()
        self._done = False

    def step(self, seen: Observation) -> Iterable[Found]:
        if self._done or seen.units is None:
            return
        spread, first = seen.units.spread, seen.units.first_spread
        if spread is None or first is None:
            return
        low = self.limits["share"] * min(1.0, first)
        if self._streak.add(spread < low, seen.step) < self.limits["measurements"]:
            return
        start = self.trend.start
        if self.trend.count and self.trend.fast < start - self.limits["fall"] * abs(start):
            return
        self._done = True
        path = seen.units.last_layer
        share = percent(max(spread, 1e-5), 0, 3)
        yield Found(
            self._streak.onset,
            f"the input of {path or 'the last layer'} differs between the examples of a batch by "
            f"{f'only {share}' if spread >= 1e-5 else f'less than {share}'} of its values "
            f"({percent(first, 0, 0)} at the first layer): its output hardly depends on the input",
            phase="forward",
            parameters=(path,) if path else (),
            evidence=(
                evidence("difference between examples", spread, low=low,
                         text=share if spread >= 1e-5 else f"< {share}"),
            ),
        )  # fmt: skip


class DropoutOff(Rule):
    """A part of the model trains with its dropout off."""

    name = "dropout-off"
    title = "dropout is off in a part of the model"
    needs = "two steps"
    explanation = (
        "The model is in train() mode, but dropout layers inside it are in eval() mode, next to "
        "weights that are trained: a part of the model was set to eval() and never set back. A "
        "part whose weights are all frozen is not reported."
    )
    advice = "call train() on the whole model after the last eval() of any of its parts"
    source = (
        "PyTorch's documentation of Module.train; dropout that is off in training is a silent "
        "error of TrainCheck (Jiang et al., OSDI 2025)"
    )
    thresholds = (RuleThreshold("steps", 2, "steps in a row"),)

    def start(self) -> None:
        self._streak = Streak()
        self._reported = False

    def step(self, seen: Observation) -> Iterable[Found]:
        off = seen.dropout_off
        if self._reported or off is None:
            return
        if self._streak.add(bool(off), seen.step) < self.limits["steps"]:
            return
        self._reported = True
        yield Found(
            self._streak.onset,
            f"dropout is in eval() mode in {named(off)} while the rest of the model trains",
            confidence="certain",
            phase="forward",
            parameters=off[:8],
            evidence=(evidence("dropout layers that are off", len(off), high=0,
                               text=str(len(off))),),
        )  # fmt: skip
