"""Whether this is a terminal to open the screen on, or one for plain lines."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal, TextIO

from tui_trainer.cli.options import RunOptions


@dataclass(frozen=True)
class Showing:
    """How a run is shown."""

    kind: Literal["screen", "plain", "json"]
    note: str = ""
    """Why it is not the screen, where a person at a terminal would have expected it."""


def showing_for(options: RunOptions) -> Showing:
    """What was asked for, or else what the terminal can do."""
    if options.json:
        return Showing("json")
    if options.plain or not _is_terminal(sys.stdout):
        return Showing("plain")
    if reason := why_no_screen():
        return Showing("plain", f"{reason}: plain progress lines instead of the screen")
    return Showing("screen")


def why_no_screen() -> str:
    """Why the screen cannot be opened here, for people; "" when it can."""
    if not _is_terminal(sys.stdout):
        return "the output is not a terminal"
    if not _is_terminal(sys.stdin):
        return "the input is not a terminal, so no key would arrive"
    term = os.environ.get("TERM", "")
    if term in ("", "dumb", "unknown"):
        return f"this terminal cannot move its cursor (TERM={term or 'is not set'})"
    return ""


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
