"""The one exception for everything a person can set wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigurationError(Exception):
    """A setting, a file or a device that cannot work: one message, and a hint at what would."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def near_miss(given: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the near one if there is one, else all there are."""
    names = list(known)
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(given.casefold(), folded, n=1, cutoff=0.5)
    everything = ("there are " if len(names) > 1 else "there is only ") + ", ".join(names)
    if not near:
        return everything
    guess = f"did you mean {folded[near[0]]}?"
    return f"{guess} {everything}" if 1 < len(names) <= 8 else guess
