"""Everything this process prints goes to the recorder and to a log file, nothing to a terminal.

File descriptors 1 and 2 themselves are replaced, so that what C code and child processes print is
caught as well.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tui_trainer.run.lines import LineSplitter
from tui_trainer.run.log_file import LogFile

STREAMS = {1: "stdout", 2: "stderr"}
READ_BYTES = 1 << 16


class Capture:
    """Between `start` and `stop`, hands each printed line to `on_line(stream, text)`."""

    def __init__(self, on_line: Callable[[str, str], None], log_file: Path | None = None) -> None:
        self._on_line = on_line
        self._log_path = log_file
        self._log: LogFile | None = None
        self._saved: dict[int, int] = {}
        self._pipes: dict[int, int] = {}
        """Read end to the descriptor that it stands for."""
        self._splitters = {number: LineSplitter() for number in STREAMS}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="tui-trainer capture", daemon=True)

    def start(self) -> None:
        """Replace the descriptors."""
        if self._log_path is not None:
            self._log = LogFile(self._log_path)
        # Before the exchange: a stream opened on a file would seek in what is a pipe then.
        whole_lines()
        _flush()
        for number in STREAMS:
            self._saved[number] = os.dup(number)
            read_end, write_end = os.pipe()
            os.set_blocking(read_end, False)
            os.dup2(write_end, number)
            os.close(write_end)
            self._pipes[read_end] = number
        self._thread.start()

    def stop(self) -> None:
        """Give the descriptors back and take in what is still in the pipes."""
        if not self._saved:
            return
        _flush()
        for number, saved in self._saved.items():
            os.dup2(saved, number)
            os.close(saved)
        self._saved.clear()
        self._stopping.set()
        self._thread.join(5)
        if self._log is not None:
            self._log.close()

    def _read(self) -> None:
        # Where both have something, stdout goes first: a traceback follows what the program said.
        open_ends = list(self._pipes)
        while open_ends:
            readable, _, _ = select.select(open_ends, [], [], 0.1)
            for end in readable:
                data = b""
                with contextlib.suppress(BlockingIOError):
                    data = os.read(end, READ_BYTES)
                    if not data:
                        open_ends.remove(end)
                self._take(self._pipes[end], data)
            # A child process may hold the write end for ever, so the end of file may never come.
            if self._stopping.is_set() and not readable:
                break
        for number, splitter in self._splitters.items():
            for line in splitter.finish():
                self._on_line(STREAMS[number], line)
        for end in self._pipes:
            os.close(end)

    def _take(self, number: int, data: bytes) -> None:
        if self._log is not None and data:
            self._log.write(data)
        for line in self._splitters[number].feed(data):
            self._on_line(STREAMS[number], line)


def whole_lines() -> None:
    """Let Python print line by line, each in one piece: somebody is reading along, and our own
    lines come in between."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False, errors="backslashreplace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def stdout_to_stderr() -> int:
    """Send whatever anybody prints to stdout to stderr; returns a descriptor of the real stdout."""
    _flush()
    real = os.dup(1)
    os.dup2(2, 1)
    return real
