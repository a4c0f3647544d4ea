"""What goes wrong before or around a run, said in one message with a hint, never as a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

FAULT, USAGE = 1, 2
"""Exit statuses: something failed; the command line was not understood."""
INTERRUPTED = 130
"""As a shell reports Ctrl-C: 128 + SIGINT."""


class CommandError(Exception):
    """A message for the person at the terminal; the command ends with `status`."""

    def __init__(self, message: str, hint: str = "", status: int = FAULT) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = status


class UsageError(CommandError):
    """The command line itself is wrong."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, USAGE)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint that names the nearest of `known`, or lists them all when none is near."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there is: {', '.join(names)}"


def say(message: str, hint: str = "") -> None:
    """Print `tui-trainer: message` and the hint on its own line, to stderr."""
    print(f"tui-trainer: {message}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)
