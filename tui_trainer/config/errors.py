"""The error for a bad setting, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tui_trainer.protocol.errors import UserError


class ConfigurationError(UserError):
    """A setting, a file or a device that cannot be used."""


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
