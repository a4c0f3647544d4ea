"""Sinks that print a run while no app shows it: plain lines and JSON lines."""

from __future__ import annotations

import contextlib
import os


class Output:
    """A file descriptor that lines are written to, usually a pipe.

    `write` blocks while the pipe is full. It raises OSError; BrokenPipeError once the reader has
    closed the pipe.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> None:
        """Write all of `data`."""
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def close(self) -> None:
        """Close the descriptor, unless it is a standard stream of the process."""
        if self._descriptor > 2:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1
