"""How a run ended, in words for people, with a hint where we know one."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from dataclasses import dataclass

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.protocol.messages import EndState
from tui_trainer.run.script import OUR_DIRECTORY, exit_status, print_exception
from tui_trainer.trace.gate import StopTraining

FAULT, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit statuses: it failed; it cannot be run as asked; 128 + SIGINT; 128 + SIGTERM."""
REASON_CHARACTERS = 500


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    state: EndState
    reason: str = ""
    hint: str = ""
    status: int = 0
    """Exit status of the process."""
    refused: bool = False
    """As `Status.refused`."""


def judge(fault: BaseException, script: bool = True) -> Outcome:
    """What an exception that ended the training means; `script`: of somebody's own program, which
    has not our options."""
    match fault:
        case StopTraining():
            return Outcome("stopped", "stopped on request")
        case KeyboardInterrupt():
            return Outcome("stopped", "interrupted", status=INTERRUPTED)
        case SystemExit():
            return _left(fault)
        case ConfigurationError():
            return Outcome("crashed", fault.message, fault.hint, USAGE)
        case SyntaxError():
            place = f"{os.path.basename(fault.filename or 'the script')}, line {fault.lineno}"
            return Outcome("crashed", f"{place}: {fault.msg}", "", FAULT)
        case ModuleNotFoundError():
            hint = f"install it for this Python: {sys.executable}"
            return Outcome("crashed", _said(fault), hint, FAULT)
    if out_of_memory(fault):
        hint = (
            "try a smaller batch, a smaller model or a lower precision"
            if script
            else "try a smaller --batch-size, a smaller model (--width, --layers) or --dtype bf16"
        )
        return Outcome("crashed", f"out of memory{_what_was_asked(fault)}", hint, FAULT)
    if no_compiler(fault):
        hint = "install one, such as g++, or " + (
            "train without" if script else "give --no-compile"
        )
        reason = "torch.compile found no working C++ compiler"
        return Outcome("crashed", reason, hint, FAULT if script else USAGE)
    return Outcome("crashed", _said(fault), _hint(fault), FAULT)


def _left(leaving: SystemExit) -> Outcome:
    if isinstance(leaving.code, str):
        return Outcome("crashed", leaving.code[:REASON_CHARACTERS], "", exit_status(leaving))
    status = exit_status(leaving)
    if status == 0:
        return Outcome("finished")
    return Outcome("crashed", f"it left with exit status {status}", "", status)


def told_in_full(fault: BaseException, script_runs: bool) -> bool:
    """Whether one message says all that there is to say of `fault`. A script that has begun may
    have printed anything, and its traceback is worth keeping."""
    if isinstance(fault, (ConfigurationError, SyntaxError)):
        return not script_runs
    return not script_runs and bool(out_of_memory(fault) or no_compiler(fault))


def out_of_memory(fault: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device."""
    if isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError":
        return True
    text = str(fault)
    words = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(fault, RuntimeError) and any(word in text for word in words)


def no_compiler(fault: BaseException) -> bool:
    """Whether torch.compile failed for want of a C++ compiler."""
    return "InvalidCxxCompiler" in str(fault) or type(fault).__name__ == "InvalidCxxCompiler"


def _what_was_asked(fault: BaseException) -> str:
    """Such as `: 4 TiB could not be had (train.py, line 3)`, in the allocator's own unit."""
    asked = re.search(r"tried to allocate ([\d.]+) ?([A-Za-z]+)", str(fault), re.IGNORECASE)
    said = f": {_amount(asked[1], asked[2])} could not be had" if asked else ""
    return said + _place(fault)


def _amount(number: str, unit: str) -> str:
    if unit != "bytes":
        return f"{number} {unit}"
    size = float(number)
    for name in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            return f"{size:.3g} {name}"
        size /= 1024
    return f"{size:,.0f} PiB"


def _hint(fault: BaseException) -> str:
    text = str(fault)
    if "CUDA error: device-side assert" in text:
        return "run it again with CUDA_LAUNCH_BLOCKING=1 to see where"
    if "DataLoader worker" in text and ("killed" in text or "exited" in text):
        return "a worker process died, often for want of memory: try fewer workers"
    return "the traceback is in the log"


def _said(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {_first_line(fault)}".rstrip(": ") + _place(fault)


def _place(fault: BaseException) -> str:
    """Such as ` (train.py, line 3)`: where in the user's own files it was raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(fault.__traceback__)
        if not frame.filename.startswith((OUR_DIRECTORY, "<"))
        and "site-packages" not in frame.filename
    ]
    if not frames:
        return ""
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"


def _first_line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0][:REASON_CHARACTERS] if lines else ""


# ---- telling
# Saying on stderr how a run ended, where that is where people look.


def report_outcome(fault: BaseException, outcome: Outcome, script: bool = True) -> None:
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
