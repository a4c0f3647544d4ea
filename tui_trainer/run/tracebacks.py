"""Tracebacks of the training code without frames of tui-trainer."""

from __future__ import annotations

import os
import sys
import traceback
import types

OUR_DIRECTORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def is_internal(filename: str) -> bool:
    """Whether a file belongs to tui-trainer. The shipped tasks do not: they are the program that
    runs, as a script is."""
    inside = filename.startswith(OUR_DIRECTORY)
    return inside and not filename.startswith(OUR_DIRECTORY + "tasks")


def place_of(error: BaseException) -> str:
    """Such as ` (train.py, line 3)`: where in the user's own files it was raised."""
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
