"""What goes wrong before or around a run, said in one message with a hint, never as a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable

from tui_trainer.config.errors import near_miss
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.text import sanitize

FAULT, USAGE = 1, 2
"""Exit statuses: something failed; the command line was not understood."""
INTERRUPTED = 130
"""As a shell reports Ctrl-C: 128 + SIGINT."""


class CommandError(UserError):
    """A message for the person at the terminal; the command ends with `status`."""

    def __init__(self, message: str, hint: str = "", status: int = FAULT) -> None:
        super().__init__(message, hint)
        self.status = status


class UsageError(CommandError):
    """The command line itself is wrong."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, USAGE)


def unknown(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """There is no `kind` (command, task, …) called `given`; the hint is the near one."""
    return UsageError(f"there is no {kind} {given}", near_miss(given, known))


def say(message: str, hint: str = "") -> None:
    """Print `tui-trainer: message` and the hint on its own line, to stderr."""
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
        print(f"tui-trainer: {sanitize(message)}", file=sys.stderr)
        if hint:
            print(f"  hint: {sanitize(hint)}", file=sys.stderr)
        sys.stderr.flush()


def say_our_fault(fault: Exception) -> None:
    """One line for a fault of ours that nothing else has caught; its traceback goes to a file."""
    message = f"this is a fault of tui-trainer itself: {type(fault).__name__}: {fault}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tui-trainer-fault-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("".join(traceback.format_exception(fault)))
    except OSError:
        say(message, "please report it")
    else:
        say(message, f"please report it, with {file.name}")


def leave_pipe_quietly() -> None:
    """After a broken pipe: point stdout elsewhere, so that its last flush does not complain too."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
