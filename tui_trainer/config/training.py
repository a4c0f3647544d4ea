"""The configuration that both shipped tasks share, and how presets and changes resolve to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from tui_trainer.config.errors import ConfigurationError, did_you_mean
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
"""Groups of options, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options of every task; a task's own configuration adds its model and its data."""

    preset: str = ""
    """Name of the preset that the values come from; not an option itself."""

    data: str | None = option(None, "path of the training data", group=DATA)
    validation_share: float = option(
        0.1, "share of the data held out for validation", group=DATA, minimum=0, below=1
    )

    steps: int | None = option(None, "number of optimizer steps", group=LENGTH, minimum=1)
    epochs: int | None = option(
        None, "passes over the data, instead of steps", group=LENGTH, minimum=1
    )
    batch_size: int = option(32, "examples per step", group=LENGTH, minimum=1)

    learning_rate: float = option(1e-3, "peak learning rate", group=RATE, minimum=0)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "cosine", "how the learning rate falls after the warm-up", group=RATE
    )
    warmup_steps: int = option(
        100, "steps of linear warm-up at the start", group=RATE, unit="steps", minimum=0
    )
    min_learning_rate: float = option(
        1e-4, "final learning rate of linear and cosine schedules", group=RATE, minimum=0
    )

    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = option(
        "adamw", "which optimizer", group=OPTIMIZER
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
    max_norm: float = option(1.0, "maximum total gradient norm", group=CLIP, above=0)
    clip_value: float = option(
        1.0, "maximum absolute gradient element, for --clip value", group=CLIP, above=0
    )

    eval_every: int = option(
        250, "steps between evaluations", group=EVALUATION, unit="steps", minimum=1
    )
    eval_batches: int = option(
        20, "maximum batches per evaluation", group=EVALUATION, unit="batches", minimum=1
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
        0, "CPU threads of PyTorch; 0: automatic, leaving a core free", group=MACHINE, minimum=0,
        maximum=4096,
    )  # fmt: skip
    seed: int = option(
        1337, "seed of all random generators", group=MACHINE, minimum=0, maximum=2**31 - 1
    )

    def check(self) -> None:
        """Check combinations of fields. Raises ConfigurationError."""
        if self.steps is not None and self.epochs is not None:
            raise ConfigurationError("both --steps and --epochs are given", "give one of them")
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
    """The heads must divide the width. Raises ConfigurationError with the nearest valid values."""
    if width % heads == 0:
        return
    down, up = width // heads * heads, (width // heads + 1) * heads
    divisors = [count for count in range(1, min(width, 256) + 1) if width % count == 0]
    nearest = sorted(sorted(divisors, key=lambda count: abs(count - heads))[:2])
    widths = " or ".join(str(value) for value in (down, up) if value)
    raise ConfigurationError(
        f"a width of {width} cannot be divided among {heads} heads",
        f"try --width {widths}, or --heads {' or '.join(map(str, nearest))}",
    )


# ---------------------------------------------------------------- resolving


class ConfigurableTask(Protocol):
    """The part of a task's definition that resolving needs."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> type[TrainingConfig]: ...

    @property
    def presets(self) -> Mapping[str, Mapping[str, Scalar]]:
        """The fields that each preset sets; the first preset is the default."""

    @property
    def preset_for_data(self) -> str:
        """The default preset when `--data` is given, or ""."""


def default_preset(task: ConfigurableTask, data: str | None = None) -> str:
    """The preset that is used when none is named; "" when the task has none."""
    if data and task.preset_for_data:
        return task.preset_for_data
    return next(iter(task.presets), "")


def resolve(
    task: ConfigurableTask,
    preset: str | None = None,
    overrides: Mapping[str, Scalar] | None = None,
) -> TrainingConfig:
    """The checked configuration of `preset` with `overrides` (field name to value) applied.

    `--epochs` replaces a preset's steps and vice versa. Raises ConfigurationError.
    """
    changed = dict(overrides or {})
    given = changed.pop("preset", None)
    data = changed.get("data")
    default = default_preset(task, str(data) if data else None)
    name = preset or (str(given) if given else default)
    if name and name not in task.presets:
        raise ConfigurationError(
            f"{task.name} has no preset {name!r}", did_you_mean(name, task.presets)
        )
    values = dict(task.presets[name]) if name else {}
    if changed.get("steps") is not None or changed.get("epochs") is not None:
        values.pop("steps", None)
        values.pop("epochs", None)
    return from_flat(task.config, {**values, **changed, "preset": name})


def from_flat(config: type[TrainingConfig], values: Mapping[str, Scalar]) -> TrainingConfig:
    """A checked configuration from field values, as `to_flat` returns them.

    Raises ConfigurationError.
    """
    known = {option.name: option for option in options_of(config)}
    parsed: dict[str, Any] = {"preset": str(values.get("preset") or "")}
    for name, value in values.items():
        if name == "preset":
            continue
        if name not in known:
            raise ConfigurationError(
                f"there is no option --{name.replace('_', '-')}",
                did_you_mean(name.replace("_", "-"), (item.flag[2:] for item in known.values())),
            )
        parsed[name] = parse(known[name], value)
    configuration = config(**parsed)
    configuration.check()
    return configuration


def to_flat(config: TrainingConfig) -> dict[str, Scalar]:
    """The value of every field, in the order of declaration."""
    return {item.name: getattr(config, item.name) for item in fields(config)}
