"""Saying on stderr how a run ended, where that is where people look."""

from __future__ import annotations

import contextlib
import sys

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.run.outcome import Outcome, no_compiler, out_of_memory
from tui_trainer.run.script import print_exception
from tui_trainer.tracing.gate import StopTraining


def tell(fault: BaseException, outcome: Outcome, script: bool = True) -> None:
    """Say on stderr what ended the training: one message where that is enough, else a traceback,
    which a script always has."""
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
        if isinstance(fault, (StopTraining, SystemExit)):
            return
        enough = out_of_memory(fault) or no_compiler(fault)
        if isinstance(fault, ConfigurationError) or (enough and not script):
            say(outcome)
            return
        print_exception(fault)
        if outcome.hint and outcome.hint != "the traceback is in the log":
            print(f"  hint: {outcome.hint}", file=sys.stderr)
        sys.stderr.flush()


def say(outcome: Outcome) -> None:
    """Print one message and its hint to stderr."""
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
        print(f"tui-trainer: {outcome.reason}", file=sys.stderr)
        if outcome.hint:
            print(f"  hint: {outcome.hint}", file=sys.stderr)
        sys.stderr.flush()
