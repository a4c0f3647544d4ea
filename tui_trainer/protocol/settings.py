"""The settings of a training that can be changed while it runs, and a change of one."""

from __future__ import annotations

from typing import Literal

import msgspec

SettingName = Literal[
    "lr",
    "weight_decay",
    "betas",
    "beta1",
    "beta2",
    "momentum",
    "eps",
    "clip",
    "batch_size",
    "seed",
    "freeze",
    "unfreeze",
]
SettingValue = float | str | tuple[float, ...]
"""A pattern for `freeze` and `unfreeze`, two numbers for `betas`, otherwise a number."""


def setting_text(value: SettingValue) -> str:
    """`0.0003`, `0.9,0.95`, `blocks.0.*`; an infinite clip threshold is `off`."""
    match value:
        case str():
            return value
        case tuple():
            return ",".join(f"{part:.6g}" for part in value)
        case _:
            return "off" if value == float("inf") else f"{value:.10g}"


class SettingChange(msgspec.Struct, frozen=True, array_like=True):
    """`lr=3e-4`, `lr[1]=3e-4`, `freeze=blocks.0.*`"""

    name: SettingName
    value: SettingValue
    group: int | None = None
    """Number of the parameter group, counted over all optimizers; None: all of them."""

    @property
    def target(self) -> str:
        """`lr`, `lr[1]`"""
        return self.name if self.group is None else f"{self.name}[{self.group}]"

    @property
    def text(self) -> str:
        return f"{self.target}={setting_text(self.value)}"


class Setting(msgspec.Struct, frozen=True, array_like=True):
    """The present value of a setting."""

    name: str
    """Name by which the setting is changed: `lr`, or `lr[1]` where the groups differ."""
    value: SettingValue
    note: str = ""
    """What the setting applies to, or what else changes it."""


class SettingList(msgspec.Struct, tag="settings", frozen=True, array_like=True):
    """The settings that can be changed now."""

    settings: tuple[Setting, ...]
    frozen: int = 0
    """Number of parameters that are not trained."""
    edits: int = 0
    """Number of changes that can be undone."""
    waiting: tuple[str, ...] = ()
    """Changes that are made at the end of the step in progress."""


class ReadSettings(msgspec.Struct, tag="read_settings", frozen=True):
    """Asks for the settings that can be changed, and their values."""
