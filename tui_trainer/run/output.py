"""The log file of a run, on a thread of its own: a disk that stalls holds up nobody who prints."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tui_trainer.protocol.messages import Stream

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


# ---- lines
# From the bytes that a program writes to lines that are safe to keep and to show.


LINE_CHARACTERS = 4_000
"""Longer lines are cut, and say by how much."""

_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles and links
    r"|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~])"
)
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
_CONTROLS[ord("\t")] = "    "


class LineSplitter:
    """Cuts one stream into lines. Memory is bounded whatever comes.

    A carriage return begins the line anew, so a progress bar becomes one line: its last state.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._cut = 0
        self._returned = False

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
        """What was begun and never ended with a newline."""
        self._add(self._decoder.decode(b"", final=True))
        if self._line or self._cut:
            yield self._take()

    def _add(self, text: str) -> None:
        if not text:
            return
        if self._returned or "\r" in text:
            text = self._begin_anew(text)
        room = LINE_CHARACTERS - len(self._line)
        self._line += text[:room]
        self._cut += max(0, len(text) - room)

    def _begin_anew(self, text: str) -> str:
        """What stays of `text`: after its last return, unless nothing has overwritten that yet."""
        stays = text.rstrip("\r")
        if not stays:
            self._returned = True
            return ""
        if self._returned or "\r" in stays:
            self._line, self._cut = "", 0
        self._returned = stays != text
        return stays.rpartition("\r")[2]

    def _take(self) -> str:
        line = clean(self._line)
        if self._cut:
            line += f" … ({self._cut:,} more characters)"
        self._line, self._cut, self._returned = "", 0, False
        return line


def clean(text: str) -> str:
    """Without escape sequences; other control characters are shown as replaced."""
    return _ESCAPES.sub("", text).translate(_CONTROLS).rstrip()


# ---- capture
# Everything this process prints goes to the recorder and to a log file, nothing to a terminal.
#
# File descriptors 1 and 2 themselves are replaced, so that what C code and child processes print
# is
# caught as well.


STREAMS: dict[int, Stream] = {1: "stdout", 2: "stderr"}
READ_BYTES = 1 << 16


class Capture:
    """Between `start` and `stop`, hands each printed line to `on_line(stream, text)`."""

    def __init__(
        self, on_line: Callable[[Stream, str], None], log_file: Path | None = None
    ) -> None:
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
