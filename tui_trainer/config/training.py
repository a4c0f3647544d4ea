"""Everything that can be set in both of the shipped tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from tui_trainer.config.errors import ConfigurationError, near_miss
from tui_trainer.config.options import option, options_of, parse
from tui_trainer.protocol.schema import Scalar

DATA = "Data"
LENGTH = "Length"
RATE = "Learning rate"
OPTIMIZER = "Optimizer"
CLIP = "Clipping"
MACHINE = "Machine"
EVALUATION = "Evaluation"
MODEL = "Model"
GROUPS = (DATA, MODEL, LENGTH, RATE, OPTIMIZER, CLIP, EVALUATION, MACHINE)
"""The order in which people see the groups."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What is common to every task. A task extends it with its model and its data."""

    preset: str = ""
    """Name of the preset that it came from; not an option itself."""

    data: str | None = option(None, "where the training data is", group=DATA)
    validation_share: float = option(
        0.1, "share of the data held out for validation", group=DATA, minimum=0, below=1
    )

    steps: int | None = option(None, "optimizer steps to make", group=LENGTH, minimum=1)
    epochs: int | None = option(
        None, "passes over the data, instead of steps", group=LENGTH, minimum=1
    )
    batch_size: int = option(32, "examples per step", group=LENGTH, minimum=1)

    learning_rate: float = option(1e-3, "the peak learning rate", group=RATE, minimum=0)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "cosine", "how the learning rate falls after the warm-up", group=RATE
    )
    warmup_steps: int = option(
        100, "steps of linear warm-up at the start", group=RATE, unit="steps", minimum=0
    )
    min_learning_rate: float = option(
        1e-4, "where linear and cosine schedules end", group=RATE, minimum=0
    )

    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = option(
        "adamw", "the update rule", group=OPTIMIZER
    )
    implementation: Literal["auto", "fused", "foreach", "loop"] = option(
        "auto", "which of PyTorch's implementations of it", group=OPTIMIZER
    )
    weight_decay: float = option(0.1, "weight decay, of matrices only", group=OPTIMIZER, minimum=0)
    beta1: float = option(0.9, "decay of Adam's first moment", group=OPTIMIZER, minimum=0, below=1)
    beta2: float = option(
        0.99, "decay of Adam's second moment", group=OPTIMIZER, minimum=0, below=1
    )
    momentum: float = option(
        0.9, "momentum of SGD and RMSprop", group=OPTIMIZER, minimum=0, below=1
    )

    clip: Literal["norm", "value", "off"] = option("norm", "how gradients are clipped", group=CLIP)
    max_norm: float = option(1.0, "the largest total gradient norm", group=CLIP, above=0)
    clip_value: float = option(
        1.0, "the largest gradient element, for --clip value", group=CLIP, above=0
    )

    eval_every: int = option(
        250, "steps between two evaluations", group=EVALUATION, unit="steps", minimum=1
    )
    eval_batches: int = option(
        20, "batches per evaluation at most", group=EVALUATION, unit="batches", minimum=1
    )

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps or xpu", group=MACHINE)
    dtype: Literal["float32", "bf16", "fp16"] = option(
        "float32", "precision: float32, or autocast to bf16 or fp16", group=MACHINE
    )
    compile: bool = option(False, "compile the model with torch.compile", group=MACHINE)
    deterministic: bool = option(
        True, "the same seed gives the same run bit for bit, on a GPU too", group=MACHINE
    )
    threads: int = option(
        0, "CPU threads of PyTorch; 0: chosen, one core stays free", group=MACHINE, minimum=0,
        maximum=4096,
    )  # fmt: skip
    seed: int = option(
        1337, "seed of everything random", group=MACHINE, minimum=0, maximum=2**31 - 1
    )

    def check(self) -> None:
        """Refuse what no single field can see. Raises ConfigurationError."""
        if self.steps is not None and self.epochs is not None:
            raise ConfigurationError(
                "both --steps and --epochs are given", "give one of them: it says how long to train"
            )
        if self.steps is None and self.epochs is None:
            raise ConfigurationError("neither --steps nor --epochs is given", "try --steps 1000")
        decays = self.schedule != "constant"
        if decays and self.min_learning_rate > self.learning_rate:
            raise ConfigurationError(
                f"--min-learning-rate {self.min_learning_rate:g} is above "
                f"--learning-rate {self.learning_rate:g}",
                f"try --min-learning-rate {self.learning_rate / 10:g} or --schedule constant",
            )
        if self.implementation == "fused" and self.optimizer == "rmsprop":
            raise ConfigurationError(
                "PyTorch has no fused RMSprop", "try --implementation foreach or auto"
            )


def check_heads(width: int, heads: int) -> None:
    """Heads must divide the width. Raises ConfigurationError that suggests near valid ones."""
    if width % heads == 0:
        return
    down, up = width // heads * heads, (width // heads + 1) * heads
    divisors = [count for count in range(1, min(width, 256) + 1) if width % count == 0]
    near = sorted(sorted(divisors, key=lambda count: abs(count - heads))[:2])
    widths = " or ".join(str(value) for value in (down, up) if value)
    raise ConfigurationError(
        f"a width of {width} cannot be divided among {heads} heads",
        f"try --width {widths}, or --heads {' or '.join(map(str, near))}",
    )


# ---- resolve
# From a preset and a person's changes to one checked configuration; to plain values and back.


class ConfigSource(Protocol):
    """What is needed of a task's definition."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def config(self) -> type[TrainingConfig]:
        """Its configuration class."""

    @property
    def presets(self) -> Mapping[str, Mapping[str, Scalar]]:
        """Preset name to the fields it sets; the first is the default."""

    @property
    def preset_for_data(self) -> str:
        """The default preset once `--data` is given, or ""."""


def default_preset(definition: ConfigSource, data: str | None = None) -> str:
    """The preset used when none is named; "" when the task has none."""
    if data and definition.preset_for_data:
        return definition.preset_for_data
    return next(iter(definition.presets), "")


def resolve(
    definition: ConfigSource,
    preset: str | None = None,
    overrides: Mapping[str, Scalar] | None = None,
) -> TrainingConfig:
    """The configuration of `preset` with `overrides` (field name to value) on top, checked.

    `--epochs` replaces a preset's steps and the other way round. Raises ConfigurationError.
    """
    changed = dict(overrides or {})
    given = changed.pop("preset", None)
    data = changed.get("data")
    default = default_preset(definition, str(data) if data else None)
    name = preset or (str(given) if given else default)
    if name and name not in definition.presets:
        raise ConfigurationError(
            f"{definition.name} has no preset {name!r}", near_miss(name, definition.presets)
        )
    values = dict(definition.presets[name]) if name else {}
    if changed.get("steps") is not None or changed.get("epochs") is not None:
        values.pop("steps", None)
        values.pop("epochs", None)
    return from_flat(definition.config, {**values, **changed, "preset": name})


def from_flat(config: type[TrainingConfig], values: Mapping[str, Scalar]) -> TrainingConfig:
    """A checked configuration from plain values, as `to_flat` gave. Raises ConfigurationError."""
    known = {option.name: option for option in options_of(config)}
    checked: dict[str, Any] = {"preset": str(values.get("preset") or "")}
    for name, value in values.items():
        if name == "preset":
            continue
        if name not in known:
            raise ConfigurationError(
                f"there is no option --{name.replace('_', '-')}",
                near_miss(name.replace("_", "-"), (item.flag[2:] for item in known.values())),
            )
        checked[name] = parse(known[name], value)
    made = config(**checked)
    made.check()
    return made


def to_flat(config: TrainingConfig) -> dict[str, Scalar]:
    """Every field as a plain value, in order of declaration."""
    return {item.name: getattr(config, item.name) for item in fields(config)}
