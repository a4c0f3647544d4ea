"""How a run ended, in words for people, with a hint where we know one."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.run.script import OUR_DIRECTORY, exit_status
from tui_trainer.tracing.gate import StopTraining

FAULT, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit statuses: it failed; it cannot be run as asked; 128 + SIGINT; 128 + SIGTERM."""
REASON_CHARACTERS = 500


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    state: str
    """`finished`, `stopped` or `crashed`."""
    reason: str = ""
    hint: str = ""
    status: int = 0
    """Exit status of the process."""


def judge(fault: BaseException) -> Outcome:
    """What an exception that ended the training means."""
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
        hint = "try a smaller batch (--batch-size), a smaller model or --dtype bf16"
        return Outcome("crashed", f"out of memory: {_first_line(fault)}", hint, FAULT)
    return Outcome("crashed", _said(fault), _hint(fault), FAULT)


def _left(leaving: SystemExit) -> Outcome:
    if isinstance(leaving.code, str):
        return Outcome("crashed", leaving.code[:REASON_CHARACTERS], "", exit_status(leaving))
    status = exit_status(leaving)
    if status == 0:
        return Outcome("finished")
    return Outcome("crashed", f"it left with exit status {status}", "", status)


def out_of_memory(fault: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device."""
    if isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError":
        return True
    text = str(fault)
    words = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(fault, RuntimeError) and any(word in text for word in words)


def _hint(fault: BaseException) -> str:
    text = str(fault)
    if "CUDA error: device-side assert" in text:
        return "run it again with CUDA_LAUNCH_BLOCKING=1 to see where"
    if "DataLoader worker" in text and ("killed" in text or "exited" in text):
        return "a worker process died, often for want of memory: try fewer workers"
    return "the traceback is in the log"


def _said(fault: BaseException) -> str:
    said = f"{type(fault).__name__}: {_first_line(fault)}".rstrip(": ")
    frames = [
        frame
        for frame in traceback.extract_tb(fault.__traceback__)
        if not frame.filename.startswith((OUR_DIRECTORY, "<"))
        and "site-packages" not in frame.filename
    ]
    if frames:
        said += f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
    return said


def _first_line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0][:REASON_CHARACTERS] if lines else ""
