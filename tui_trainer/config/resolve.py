"""From a preset and a person's changes to one checked configuration; to plain values and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol

from tui_trainer.config.errors import ConfigurationError, near_miss
from tui_trainer.config.options import options_of, parse
from tui_trainer.config.training import TrainingConfig
from tui_trainer.protocol.describe import Scalar


class Definition(Protocol):
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


def default_preset(definition: Definition, data: str | None = None) -> str:
    """The preset used when none is named; "" when the task has none."""
    if data and definition.preset_for_data:
        return definition.preset_for_data
    return next(iter(definition.presets), "")


def resolve(
    definition: Definition, preset: str | None = None, overrides: Mapping[str, Scalar] | None = None
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
