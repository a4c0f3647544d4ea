"""The log file of a run, on a thread of its own: a disk that stalls holds up nobody who prints."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

LOG_FILE_BYTES = 256 * 1024 * 1024
"""The log file ends there; what follows is still shown to viewers, and recorded."""
QUEUE_BYTES = 16 * 1024 * 1024
"""What may wait for the disk."""
CLOSE_WITHIN_S = 5.0


def _for_appending(path: Path) -> BinaryIO:
    return open(path, "ab", buffering=0)


class LogFile:
    """Appends what it is given. A disk that refuses, or takes nothing for long, is tried again with
    every output; the file then says how much of it is missing."""

    def __init__(
        self,
        path: Path,
        limit: int = LOG_FILE_BYTES,
        queue_bytes: int = QUEUE_BYTES,
        opened: Callable[[Path], BinaryIO] = _for_appending,
    ) -> None:
        self._path, self._limit, self._queue_bytes, self._opened = path, limit, queue_bytes, opened
        self._file: BinaryIO | None = None
        self._written = 0
        self._missing = Missing()
        """What the file lacks since it last took any."""
        self._cut = False
        self._changed = threading.Condition()
        self._waiting: deque[bytes | Missing] = deque()
        self._waiting_bytes = 0
        self._dropped = Missing()
        """What there was no room for since something last was queued."""
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="tui-trainer log", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Have `data` appended; returns at once."""
        with self._changed:
            if self._waiting_bytes + len(data) > self._queue_bytes:
                self._dropped.count(data)
                return
            if self._dropped:
                self._waiting.append(self._dropped)
                self._dropped = Missing()
            self._waiting.append(data)
            self._waiting_bytes += len(data)
            self._changed.notify()

    def close(self, timeout: float = CLOSE_WITHIN_S) -> bool:
        """Wait for what is queued, if the disk takes it in time; whether it did."""
        with self._changed:
            self._closing = True
            if self._dropped:
                self._waiting.append(self._dropped)
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ------------------------------------------------------------ on the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    break
                data = self._waiting[0]
            if isinstance(data, Missing):
                self._missing.add(data)
            else:
                self._append(data)
            with self._changed:
                self._waiting.popleft()
                self._waiting_bytes -= len(data) if isinstance(data, bytes) else 0
        self._append(b"")
        if self._file is not None:
            self._file.close()

    def _append(self, data: bytes) -> None:
        if self._cut:
            return
        written = 0
        try:
            file = self._open()
            if self._missing:
                file.write(self._missing.said())
                self._missing = Missing()
            if data:
                written = file.write(data)
            self._written += written
            if self._written >= self._limit:
                self._cut = True
                file.write(_last_line(self._limit))
        except OSError:
            pass
        if written < len(data):
            self._missing.count(data[written:])

    def _open(self) -> BinaryIO:
        """The file; another one where the first was removed, as with the directory of the run."""
        if self._file is not None and _is_removed(self._file):
            self._file.close()
            self._file = None
        if self._file is None:
            self._file = self._opened(self._path)
            self._written = self._file.seek(0, os.SEEK_END)
        return self._file


class Missing:
    """How much of the output is not in the file."""

    def __init__(self) -> None:
        self.lines = self.bytes = 0

    def __bool__(self) -> bool:
        return self.bytes > 0

    def count(self, data: bytes) -> None:
        """This is missing, too."""
        self.lines += data.count(b"\n")
        self.bytes += len(data)

    def add(self, other: Missing) -> None:
        """And so is that."""
        self.lines += other.lines
        self.bytes += other.bytes

    def said(self) -> bytes:
        """A line for the file."""
        lines = "1 line" if self.lines == 1 else f"{self.lines:,} lines"
        return f"\n… ({lines}, {self.bytes:,} bytes, could not be written)\n".encode()


def _is_removed(file: BinaryIO) -> bool:
    try:
        return os.fstat(file.fileno()).st_nlink == 0
    except OSError:  # no file at all, in a test
        return False


def _last_line(limit: int) -> bytes:
    size = f"{limit / 2**20:,.0f} MB" if limit >= 2**20 else f"{limit:,} bytes"
    return f"\n… (the log is cut here, at {size}; the screen shows what follows)\n".encode()
