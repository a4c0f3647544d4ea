"""How a run ended: the outcome of the exception that ended its training, and what is printed.

The run process decides here whether it finished, was stopped or crashed, with a reason, a hint and
an exit status. For a run whose process was killed, `runs/liveness.py` decides, and
`rank_server.py` for its other ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
import types
from dataclasses import dataclass

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.protocol.formatting import bytes_
from tui_trainer.protocol.messages import EndState
from tui_trainer.trace.gate import StopTraining

FAILURE, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit statuses: it failed; it cannot run as configured; 128 + SIGINT; 128 + SIGTERM."""
REASON_CHARACTERS = 500
TRACEBACK_HINT = "the traceback is in the log"


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    state: EndState
    reason: str = ""
    hint: str = ""
    status: int = 0
    """Exit status of the process."""
    refused: bool = False
    """See `Status.refused`."""


STOPPED = Outcome("stopped", "stopped on request")


def outcome_of(error: BaseException, script: bool = True) -> Outcome:
    """The outcome of a run whose training raised `error`. `script`: a user's program, for which
    hints that name our options make no sense."""
    match error:
        case StopTraining():
            return STOPPED
        case KeyboardInterrupt():
            return Outcome("stopped", "interrupted", status=INTERRUPTED)
        case SystemExit():
            return _outcome_of_exit(error)
        case ConfigurationError():
            return Outcome("crashed", error.message, error.hint, USAGE)
        case SyntaxError():
            place = f"{os.path.basename(error.filename or 'the script')}, line {error.lineno}"
            return Outcome("crashed", f"{place}: {error.msg}", "", FAILURE)
        case ModuleNotFoundError():
            hint = f"install it for this Python: {sys.executable}"
            return Outcome("crashed", _summary(error), hint, FAILURE)
    if is_out_of_memory(error):
        hint = (
            "try a smaller batch, a smaller model or a lower precision"
            if script
            else "try a smaller --batch-size, a smaller model (--width, --layers) or --dtype bf16"
        )
        return Outcome("crashed", f"out of memory{_allocation(error)}", hint, FAILURE)
    if is_missing_compiler(error):
        hint = "install one, such as g++, or " + (
            "train without torch.compile" if script else "give --no-compile"
        )
        reason = "torch.compile found no working C++ compiler"
        return Outcome("crashed", reason, hint, FAILURE if script else USAGE)
    return Outcome("crashed", _summary(error), _hint(error), FAILURE)


def _outcome_of_exit(error: SystemExit) -> Outcome:
    status = exit_status(error)
    if isinstance(error.code, str):
        return Outcome("crashed", error.code[:REASON_CHARACTERS], "", status)
    if status == 0:
        return Outcome("finished")
    return Outcome("crashed", f"exited with status {status}", "", status)


def is_fully_explained(error: BaseException, script_started: bool) -> bool:
    """Whether the outcome's message says everything. A script that has started may have printed
    anything, and its traceback is worth keeping."""
    if isinstance(error, (ConfigurationError, SyntaxError)):
        return not script_started
    return not script_started and (is_out_of_memory(error) or is_missing_compiler(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    words = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def is_missing_compiler(error: BaseException) -> bool:
    """Whether torch.compile failed because there is no C++ compiler."""
    return "InvalidCxxCompiler" in str(error) or type(error).__name__ == "InvalidCxxCompiler"


def _allocation(error: BaseException) -> str:
    """Such as `: 4.0 TB could not be allocated (train.py, line 3)`."""
    found = re.search(r"tried to allocate ([\d.]+) ?([A-Za-z]+)", str(error), re.IGNORECASE)
    amount = f": {bytes_(_bytes_of(found[1], found[2]), 0)} could not be allocated" if found else ""
    return amount + place_of(error)


def _bytes_of(number: str, unit: str) -> float:
    """PyTorch writes bytes on the CPU, and KiB to GiB on a GPU."""
    powers = {"kib": 1, "mib": 2, "gib": 3, "tib": 4}
    return float(number) * 1024.0 ** powers.get(unit.lower(), 0)


def _hint(error: BaseException) -> str:
    text = str(error)
    if "CUDA error: device-side assert" in text:
        return "run it again with CUDA_LAUNCH_BLOCKING=1 to see where"
    if "DataLoader worker" in text and ("killed" in text or "exited" in text):
        return "a worker process died, often because it ran out of memory: try fewer workers"
    return TRACEBACK_HINT


def _summary(error: BaseException) -> str:
    """Such as `ValueError: no data (train.py, line 3)`."""
    lines = str(error).strip().splitlines()
    message = lines[0][:REASON_CHARACTERS] if lines else ""
    return f"{type(error).__name__}: {message}".rstrip(": ") + place_of(error)


def exit_status(error: SystemExit) -> int:
    """The exit status that python would use."""
    code = error.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    return 1


# ---------------------------------------------------------------- printing


def print_outcome(outcome: Outcome) -> None:
    """Print the reason and the hint to stderr."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        print(f"tui-trainer: {outcome.reason}", file=sys.stderr)
        if outcome.hint:
            print(f"  hint: {outcome.hint}", file=sys.stderr)
        sys.stderr.flush()


def print_failure(error: BaseException, outcome: Outcome, script: bool = True) -> None:
    """Print to stderr what ended the training: a message where that is enough, otherwise a
    traceback. A script's exception always has its traceback, as under python itself."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        if isinstance(error, StopTraining):
            return
        if isinstance(error, SystemExit):
            if error.code is not None and not isinstance(error.code, int):
                print(error.code, file=sys.stderr, flush=True)
            return
        explained = is_out_of_memory(error) or is_missing_compiler(error)
        if isinstance(error, ConfigurationError) or (explained and not script):
            print_outcome(outcome)
            return
        print_exception(error)
        if outcome.hint and outcome.hint != TRACEBACK_HINT:
            print(f"  hint: {outcome.hint}", file=sys.stderr)
        sys.stderr.flush()


OUR_DIRECTORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def is_internal(filename: str) -> bool:
    """Whether a file belongs to tui-trainer. The shipped tasks do not: they are the program that
    runs, as a script is."""
    inside = filename.startswith(OUR_DIRECTORY)
    return inside and not filename.startswith(OUR_DIRECTORY + "tasks")


def place_of(error: BaseException) -> str:
    """The place in the user's own files where `error` was raised: ` (train.py, line 3)`."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((OUR_DIRECTORY, "<"))
        and "site-packages" not in frame.filename
    ]
    if not frames:
        return ""
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"


def print_exception(error: BaseException) -> None:
    """Print the traceback as python would, without frames of this program."""
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error, _without_our_first_frames(error.__traceback__))
        return
    print(format_exception(error), end="", file=sys.stderr, flush=True)


def format_exception(error: BaseException) -> str:
    """The traceback without frames of this program."""
    formatted = traceback.TracebackException.from_exception(error, compact=True)
    _remove_our_frames(formatted)
    return "".join(formatted.format())


def _remove_our_frames(formatted: traceback.TracebackException | None) -> None:
    if formatted is None:
        return
    kept = [frame for frame in formatted.stack if not is_internal(frame.filename)]
    formatted.stack = traceback.StackSummary.from_list(kept)
    _remove_our_frames(formatted.__cause__)
    _remove_our_frames(formatted.__context__)
    for part in formatted.exceptions or ():
        _remove_our_frames(part)


def _without_our_first_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    while trace is not None and is_internal(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace
