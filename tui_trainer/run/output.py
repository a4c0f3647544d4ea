"""Captures what a run process prints as lines for the recorder, and appends it to a log file.

File descriptors 1 and 2 are replaced by pipes, so that the output of C code and of child processes
is captured too. A separate thread writes the log file, so that a slow disk delays nothing else.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tui_trainer.protocol.events import Stream
from tui_trainer.protocol.formatting import bytes_, counted
from tui_trainer.protocol.text import remove_escapes, sanitize

STREAMS: dict[int, Stream] = {1: "stdout", 2: "stderr"}
READ_BYTES = 1 << 16


class Capture:
    """Passes each line printed between `start` and `stop` to `on_line(stream, text)`."""

    def __init__(
        self, on_line: Callable[[Stream, str], None], log_file: Path | None = None
    ) -> None:
        self._on_line = on_line
        self._log_path = log_file
        self._log: LogFile | None = None
        self._saved: dict[int, int] = {}
        self._pipes: dict[int, int] = {}
        """Read end of each pipe, and the descriptor that it replaces."""
        self._splitters = {number: LineSplitter() for number in STREAMS}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="tui-trainer capture", daemon=True)

    def start(self) -> None:
        """Replace the descriptors."""
        if self._log_path is not None:
            self._log = LogFile(self._log_path)
        # Before the descriptors change: a stream on a file would otherwise seek in a pipe.
        use_line_buffering()
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
        """Restore the descriptors and read what is left in the pipes."""
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
        # When both are readable, stdout goes first: a traceback follows what the program printed.
        open_ends = list(self._pipes)
        while open_ends:
            readable, _, _ = select.select(open_ends, [], [], 0.1)
            for end in readable:
                data = b""
                with contextlib.suppress(BlockingIOError):
                    data = os.read(end, READ_BYTES)
                    if not data:
                        open_ends.remove(end)
                self._add(self._pipes[end], data)
            # A child process may keep the write end open, so the end of file may never come.
            if self._stopping.is_set() and not readable:
                break
        for number, splitter in self._splitters.items():
            for line in splitter.finish():
                self._on_line(STREAMS[number], line)
        for end in self._pipes:
            os.close(end)

    def _add(self, number: int, data: bytes) -> None:
        if self._log is not None and data:
            self._log.write(data)
        for line in self._splitters[number].feed(data):
            self._on_line(STREAMS[number], line)


def use_line_buffering() -> None:
    """Let Python write its output line by line, so that lines of different writers do not mix."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False, errors="backslashreplace")


def redirect_stdout_to_stderr() -> int:
    """Send everything printed to stdout to stderr; returns a descriptor of the original stdout."""
    _flush()
    original = os.dup(1)
    os.dup2(2, 1)
    return original


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


# ---------------------------------------------------------------- lines

MAX_LINE_CHARACTERS = 4_000


class LineSplitter:
    """Splits the bytes of one stream into lines of text, in bounded memory.

    A carriage return starts the line over, so that a progress bar becomes one line, its last state.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._cut = 0
        self._returned = False
        """Whether the next character overwrites the line."""

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that `data` completes."""
        text = self._decoder.decode(data)
        start = 0
        while (end := text.find("\n", start)) >= 0:
            self._add(text[start:end])
            yield self._take()
            start = end + 1
        self._add(text[start:])

    def finish(self) -> Iterator[str]:
        """The last line, if it has no newline."""
        self._add(self._decoder.decode(b"", final=True))
        if self._line or self._cut:
            yield self._take()

    def _add(self, text: str) -> None:
        if not text:
            return
        if self._returned or "\r" in text:
            text = self._after_return(text)
        room = MAX_LINE_CHARACTERS - len(self._line)
        self._line += text[:room]
        self._cut += max(0, len(text) - room)

    def _after_return(self, text: str) -> str:
        """The text after the last carriage return that is not at the end of `text`."""
        written = text.rstrip("\r")
        if not written:
            self._returned = True
            return ""
        if self._returned or "\r" in written:
            self._line, self._cut = "", 0
        self._returned = written != text
        return written.rpartition("\r")[2]

    def _take(self) -> str:
        line = sanitize(remove_escapes(self._line)).replace("\t", "    ").rstrip()
        if self._cut:
            line += f" … ({self._cut:,} more characters)"
        self._line, self._cut, self._returned = "", 0, False
        return line


# ---------------------------------------------------------------- log file

LOG_FILE_BYTES = 256 * 1024 * 1024
"""Largest size of the log file; later output is still recorded and shown."""
QUEUE_BYTES = 16 * 1024 * 1024
"""Maximum number of bytes of output that wait for the disk."""
CLOSE_TIMEOUT_S = 5.0


def _open_for_appending(path: Path) -> BinaryIO:
    return open(path, "ab", buffering=0)


class LogFile:
    """Appends output to a file. After a failed or delayed write it tries again with the next
    output, and the file then says how much is missing."""

    def __init__(
        self,
        path: Path,
        limit: int = LOG_FILE_BYTES,
        queue_bytes: int = QUEUE_BYTES,
        open_file: Callable[[Path], BinaryIO] = _open_for_appending,
    ) -> None:
        self._path, self._limit, self._queue_limit = path, limit, queue_bytes
        self._open_file = open_file
        self._file: BinaryIO | None = None
        self._written = 0
        self._missing = MissingOutput()
        """Output lost since the last successful write."""
        self._full = False
        self._changed = threading.Condition()
        self._queue: deque[bytes | MissingOutput] = deque()
        self._queued_bytes = 0
        self._dropped = MissingOutput()
        """Output that did not fit into the queue since something was last queued."""
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="tui-trainer log", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queue `data`; returns at once."""
        with self._changed:
            if self._queued_bytes + len(data) > self._queue_limit:
                self._dropped.count(data)
                return
            if self._dropped:
                self._queue.append(self._dropped)
                self._dropped = MissingOutput()
            self._queue.append(data)
            self._queued_bytes += len(data)
            self._changed.notify()

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> bool:
        """Write what is queued and close the file; False if that takes too long."""
        with self._changed:
            self._closing = True
            if self._dropped:
                self._queue.append(self._dropped)
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                data = self._queue[0]
            if isinstance(data, MissingOutput):
                self._missing.add(data)
            else:
                self._append(data)
            with self._changed:
                self._queue.popleft()
                self._queued_bytes -= len(data) if isinstance(data, bytes) else 0
        self._append(b"")
        if self._file is not None:
            self._file.close()

    def _append(self, data: bytes) -> None:
        if self._full:
            return
        written = 0
        try:
            file = self._opened()
            if self._missing:
                file.write(self._missing.notice())
                self._missing = MissingOutput()
            if data:
                written = file.write(data)
            self._written += written
            if self._written >= self._limit:
                self._full = True
                file.write(_limit_notice(self._limit))
        except OSError:
            pass
        if written < len(data):
            self._missing.count(data[written:])

    def _opened(self) -> BinaryIO:
        """The open file; a new one if the file was removed, for example with the run's
        directory."""
        if self._file is not None and _is_removed(self._file):
            self._file.close()
            self._file = None
        if self._file is None:
            self._file = self._open_file(self._path)
            self._written = self._file.seek(0, os.SEEK_END)
        return self._file


class MissingOutput:
    """Counts output that is not in the file."""

    def __init__(self) -> None:
        self.lines = self.bytes = 0

    def __bool__(self) -> bool:
        return self.bytes > 0

    def count(self, data: bytes) -> None:
        self.lines += data.count(b"\n")
        self.bytes += len(data)

    def add(self, other: MissingOutput) -> None:
        self.lines += other.lines
        self.bytes += other.bytes

    def notice(self) -> bytes:
        """A line for the file."""
        lines = counted(self.lines, "line")
        return f"\n… ({lines}, {self.bytes:,} bytes, could not be written)\n".encode()


def _is_removed(file: BinaryIO) -> bool:
    try:
        return os.fstat(file.fileno()).st_nlink == 0
    except OSError:  # not a real file, in a test
        return False


def _limit_notice(limit: int) -> bytes:
    size = bytes_(limit, 0)
    return f"\n… (the log file ends here, at {size}; the app shows later output)\n".encode()
