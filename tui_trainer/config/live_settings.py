"""Parses changes of the settings of a live run: `lr=3e-4`, `lr[1]=1e-3`, `freeze=blocks.0.*`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import cast, get_args

from tui_trainer.config.errors import ConfigurationError, did_you_mean
from tui_trainer.protocol.settings import SettingChange, SettingName, SettingValue

NAMES: tuple[str, ...] = get_args(SettingName)
ALIASES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "max_norm": "clip",
    "clip_value": "clip",
    "batch": "batch_size",
}
PER_GROUP = ("lr", "weight_decay", "betas", "beta1", "beta2", "momentum", "eps")
"""Settings of a parameter group."""
PATTERNS = ("freeze", "unfreeze")
WHOLE = {"batch_size": (1, 2**31 - 1), "seed": (0, 2**31 - 1)}
SHARES = ("betas", "beta1", "beta2", "momentum")
_TARGET = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\[\s*(\d{1,6})\s*\])?\s*\Z")


def parse_changes(texts: Iterable[str]) -> tuple[SettingChange, ...]:
    """Parse several changes. Raises ConfigurationError for the first invalid one."""
    changes = tuple(parse_change(text) for text in texts)
    if not changes:
        raise ConfigurationError("no change is given", "for example lr=3e-4")
    targets = [change.target for change in changes if change.name not in PATTERNS]
    twice = next((target for target in targets if targets.count(target) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"{twice} is given twice", "give each setting once")
    return changes


def parse_change(text: str) -> SettingChange:
    """Parse one change. Raises ConfigurationError."""
    target, sign, value = text.partition("=")
    if not sign:
        raise ConfigurationError(f"{text!r} is not a change of a setting", "for example lr=3e-4")
    match = _TARGET.match(target)
    if match is None:
        raise ConfigurationError(
            f"{target.strip()!r} is not the name of a setting", "for example lr=3e-4 or lr[1]=3e-4"
        )
    given = match[1].replace("-", "_").casefold()
    name = ALIASES.get(given, given)
    if name not in NAMES:
        hint = did_you_mean(given, (*NAMES, *ALIASES))
        if not hint.startswith("did you mean"):
            hint = "choose from " + ", ".join(NAMES)
        raise ConfigurationError(f"there is no setting {match[1]!r}", hint)
    if match[2] is not None and name not in PER_GROUP:
        raise ConfigurationError(f"{name} belongs to no parameter group", f"leave out [{match[2]}]")
    group = None if match[2] is None else int(match[2])
    known = cast(SettingName, name)
    return SettingChange(known, _value(known, value.strip()), group)


def _value(name: SettingName, text: str) -> SettingValue:
    if not text:
        raise ConfigurationError(f"{name} needs a value", f"for example {_example(name)}")
    if name in PATTERNS:
        return text
    if name == "clip" and text.casefold() in ("off", "none", "inf"):
        return math.inf
    if name == "betas":
        parts = [part for part in text.strip("()[] ").split(",") if part.strip()]
        if len(parts) != 2:
            raise ConfigurationError(f"betas needs two numbers, not {text!r}", _example(name))
        return tuple(_number(name, part) for part in parts)
    return _number(name, text)


def _number(name: SettingName, text: str) -> float:
    error = ConfigurationError(f"{name} cannot be {text!r}", _expected(name))
    try:
        value = float(text)
    except ValueError:
        raise error from None
    if not math.isfinite(value) or value < 0:
        raise error
    if name in WHOLE:
        low, high = WHOLE[name]
        if value != int(value) or not low <= value <= high:
            raise error
    if (name in SHARES and value >= 1) or (name == "clip" and value == 0):
        raise error
    return value


def _expected(name: SettingName) -> str:
    if name in WHOLE:
        return f"expected a whole number, at least {WHOLE[name][0]}"
    if name in SHARES:
        return "expected a number, at least 0 and less than 1"
    if name == "clip":
        return "expected a number greater than 0, or off"
    return "expected a number, at least 0"


def _example(name: SettingName) -> str:
    examples = {"betas": "betas=0.9,0.95", "freeze": "freeze=blocks.0.*", "clip": "clip=1.0"}
    if name in WHOLE:
        return f"{name}=64"
    return examples.get(name, f"{name}=0.01" if name not in PATTERNS else f"{name}=blocks.0.*")
