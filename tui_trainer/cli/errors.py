"""Errors of the command line: one message with a hint, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable

from tui_trainer.config.errors import did_you_mean
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.text import sanitize

FAULT, USAGE = 1, 2
"""Exit statuses: something failed; the command line is wrong."""
INTERRUPTED = 130
"""128 + SIGINT, as a shell reports Ctrl-C."""


class CommandError(UserError):
    """An error message and a hint; the command exits with `status`."""

    def __init__(self, message: str, hint: str = "", status: int = FAULT) -> None:
        super().__init__(message, hint)
        self.status = status


class UsageError(CommandError):
    """The command line itself is wrong."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, USAGE)


def unknown(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """The error for a `kind` (command, task, …) that does not exist, with the nearest as hint."""
    return UsageError(f"there is no {kind} {given}", did_you_mean(given, known))


def notify(message: str, hint: str = "") -> None:
    """Print `tui-trainer: message` and the hint to stderr."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        print(f"tui-trainer: {sanitize(message)}", file=sys.stderr)
        if hint:
            print(f"  hint: {sanitize(hint)}", file=sys.stderr)
        sys.stderr.flush()


def report_internal_error(error: Exception) -> None:
    """Print one line about an internal error and write its traceback to a file."""
    message = f"internal error: {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tui-trainer-fault-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        notify(message, "please report it")
    else:
        notify(message, f"please report it, with {file.name}")


def discard_stdout() -> None:
    """After a broken pipe, redirect stdout so that its last flush raises no second error."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
