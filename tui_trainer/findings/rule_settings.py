"""Settings of a user that switch rules and change thresholds, such as
`over-fitting=off,loss-diverges.rise=3`. The defaults are the `thresholds` of each rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tui_trainer.findings.rule import Rule

OFF_WORDS = ("off", "no", "false", "0")
ON_WORDS = ("on", "yes", "true", "1")


class SettingsError(ValueError):
    """A setting that cannot be parsed. `known`: the valid names."""

    def __init__(self, message: str, given: str = "", known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.given = given
        self.known = tuple(known)


@dataclass(frozen=True)
class RuleSettings:
    """Changes to the rules' defaults."""

    enabled: bool = True
    switches: Mapping[str, bool] = field(default_factory=dict)
    """Rule name → whether it runs, where that differs from `enabled`."""
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Rule name → threshold name → value."""

    def runs(self, rule: type[Rule]) -> bool:
        return self.switches.get(rule.name, self.enabled or rule.unconditional)

    def limits_of(self, rule: type[Rule]) -> dict[str, float]:
        changed = self.limits.get(rule.name, {})
        return {each.name: changed.get(each.name, each.default) for each in rule.thresholds}


def known_settings(text: str, rules: Iterable[type[Rule]]) -> RuleSettings:
    """Like `parse_settings`, with the defaults where another version has written the text."""
    try:
        return parse_settings(text, rules)
    except SettingsError:
        return RuleSettings()


def parse_settings(text: str, rules: Iterable[type[Rule]]) -> RuleSettings:
    """Settings from comma-separated `off`, `RULE=off`, `RULE=on` and `RULE.THRESHOLD=NUMBER`.

    Raises SettingsError.
    """
    known = {rule.name: rule for rule in rules}
    enabled = True
    switches: dict[str, bool] = {}
    limits: dict[str, dict[str, float]] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        left, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and left in (*OFF_WORDS, "none", *ON_WORDS, "all"):
            enabled = left in (*ON_WORDS, "all")
            continue
        name, dot, threshold = left.partition(".")
        if name not in known:
            raise SettingsError(f"there is no rule {name}", name, known)
        if not dot:
            if not equals or value.lower() not in (*OFF_WORDS, *ON_WORDS):
                raise SettingsError(f"{name} can be on or off, not {value or 'nothing'}")
            switches[name] = value.lower() in ON_WORDS
            continue
        names = [each.name for each in known[name].thresholds]
        if threshold not in names:
            raise SettingsError(f"{name} has no threshold {threshold}", threshold, names)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise SettingsError(f"{left} needs a number, not {value or 'nothing'}")
        limits.setdefault(name, {})[threshold] = number
    return RuleSettings(enabled, switches, limits)
