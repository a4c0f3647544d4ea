"""Writing to a file descriptor, whole lines, however long the reader takes."""

from __future__ import annotations

import contextlib
import os
import sys

NOBODY_READS = "tui-trainer: nobody reads the output any more; the training goes on without it"


class Output:
    """A descriptor of our own. `write` blocks while a pipe is full and raises OSError: a
    BrokenPipeError when the reader has gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> None:
        """Write all of `data`."""
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except BrokenPipeError:
            # A batch job is worth more than its pipe: `| head` ends the lines, not the training.
            with contextlib.suppress(OSError, ValueError):
                print(NOBODY_READS, file=sys.stderr, flush=True)
            raise

    def close(self) -> None:
        """Close the descriptor, unless it is one of the process's standard streams."""
        if self._descriptor > 2:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1


# ---- sinks
# Where a run's story goes when no app is looking: plain lines and JSON lines.
