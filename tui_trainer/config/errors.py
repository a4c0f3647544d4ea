"""The error for a bad setting, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tui_trainer.protocol.errors import UserError


class ConfigurationError(UserError):
    """A setting, a file or a device that cannot be used."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint for a misspelled name: the most similar known name, and all of them if they are few
    or none is similar."""
    names = list(known)
    by_folded = {name.casefold(): name for name in names}
    similar = difflib.get_close_matches(given.casefold(), by_folded, n=1, cutoff=0.5)
    all_names = ("choose from " if len(names) > 1 else "there is only ") + ", ".join(names)
    if not similar:
        return all_names
    guess = f"did you mean {by_folded[similar[0]]}?"
    return f"{guess} ({all_names})" if 1 < len(names) <= 8 else guess
