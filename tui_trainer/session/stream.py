"""Duplex byte streams that a session speaks over, and why one could not be had.

A stream is a pair of file descriptors: the two ends of one socket, or the pipes of a child process.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable


class NotYet(Exception):
    """There will be a run to connect to: try again in a moment. The text says what is awaited."""


class Unreachable(Exception):
    """The run may be there but cannot be reached now: try again with patience."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RunGone(Exception):
    """There is no such run to connect to, and there will be none.

    `state`: how it is known to have ended (`crashed`, `finished`, `stopped`), "" when that is not
    the reason.
    """

    def __init__(self, message: str, hint: str = "", state: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.state = state


class Stream:
    """Bytes both ways, without waiting: `receive` and `send` do what can be done at once."""

    def __init__(
        self, read_fd: int, write_fd: int, on_close: Callable[[], None] | None = None
    ) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self._on_close = on_close
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    @classmethod
    def of_socket(cls, connected: socket.socket) -> Stream:
        """A stream over a connected socket, which it then owns."""
        connected.setblocking(False)
        return cls(connected.fileno(), connected.fileno(), connected.close)

    def receive(self, size: int = 1 << 16) -> bytes | None:
        """What is there, at most `size` bytes; b"" at the end, None when nothing is there now.
        Raises OSError."""
        try:
            return os.read(self.read_fd, size)
        except BlockingIOError:
            return None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes were taken. Raises OSError."""
        try:
            return os.write(self.write_fd, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Give the descriptors back."""
        if self._on_close is not None:
            with contextlib.suppress(OSError):
                self._on_close()
            return
        for descriptor in {self.read_fd, self.write_fd}:
            with contextlib.suppress(OSError):
                os.close(descriptor)


Connect = Callable[[], Stream]
"""One attempt to connect, which takes at most a few seconds; called from the session's thread.
Raises NotYet, Unreachable or RunGone."""
