"""One `ssh` process that runs a relay at the far end, and what it said when it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

from tui_trainer.session.greeting import RelayGreeting, find_greeting
from tui_trainer.session.stream import Stream

STDERR_LINES_KEPT = 40
SHOW_AFTER_S = 1.0
_CLOSING_S = 0.3


class SshEnded(Exception):
    """ssh ended, or gave nothing in time, before the far end greeted."""

    def __init__(self, status: int | None, said: str, noise: str) -> None:
        super().__init__(said)
        self.status = status
        """Its exit status: 255 when ssh itself failed; None when the time was up."""
        self.said = said
        """The end of its stderr, one line."""
        self.noise = noise
        """What the far end printed instead of a greeting."""


class SshProcess:
    """Runs `command`; its standard streams are the way to the far end.

    An `interactive` one may ask questions on the terminal, and what it says is passed on there; any
    other is cut off from the terminal, so that it cannot disturb what is on the screen.
    """

    def __init__(self, command: Sequence[str], interactive: bool) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=not interactive,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._received = b""
        self._lines: deque[str] = deque(maxlen=STDERR_LINES_KEPT)
        self._interactive = interactive
        self._unshown: deque[str] = deque()
        self._reader = threading.Thread(
            target=self._read_stderr, name="tui-trainer ssh stderr", daemon=True
        )
        self._reader.start()

    def greeting(self, deadline: float | None = None) -> RelayGreeting:
        """Wait for the next greeting, until `deadline` (time.monotonic). Raises SshEnded and
        NoGreeting."""
        self._received = b""
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._ended(None)
            patience = SHOW_AFTER_S if left is None else min(left, SHOW_AFTER_S)
            ready, _, _ = select.select([self._stdout], [], [], patience)
            if not ready:
                self._show()
                continue
            part = os.read(self._stdout.fileno(), 1 << 16)
            if not part:
                raise self._ended(self._wait())
            self._received += part
            found = find_greeting(self._received)
            if found is not None:
                return found

    def answer(self, line: str) -> None:
        """Send one line to the relay. Raises SshEnded."""
        try:
            os.write(self._stdin.fileno(), line.encode() + b"\n")
        except OSError:
            raise self._ended(self._wait()) from None

    def stream(self) -> Stream:
        """Its streams from now on; closing the stream ends the process."""
        self._interactive = False
        return _SshStream(self)

    def descriptors(self) -> tuple[int, int]:
        """What to read from and what to write to."""
        return self._stdout.fileno(), self._stdin.fileno()

    def last_words(self, wait: bool = False) -> str:
        """The end of its stderr, one line; "" when it said nothing. `wait`: for a moment, for the
        rest of it."""
        if wait:
            self._reader.join(_CLOSING_S)
        kept = [line for line in self._lines if not line.startswith("Warning: Permanently added")]
        return " · ".join(kept[-3:])

    def close(self) -> None:
        """End it. Returns at once; also ends one that is stopped."""
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process dies on going on
            with contextlib.suppress(OSError):
                self._process.send_signal(number)
        threading.Thread(target=self._reap, name="tui-trainer ssh end", daemon=True).start()

    def _reap(self) -> None:
        try:
            self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> int | None:
        try:
            return self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return None

    def _ended(self, status: int | None) -> SshEnded:
        noise = self._received.decode("utf-8", "replace").strip()
        return SshEnded(status, self.last_words(wait=True), noise)

    def _show(self) -> None:
        """Pass on what ssh says while it waits, such as to touch a key; what it says on ending goes
        into our own message."""
        while self._interactive and self._unshown:
            with contextlib.suppress(OSError, ValueError):
                print(self._unshown.popleft(), file=sys.stderr, flush=True)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                text = "".join(c if c.isprintable() else " " for c in text)[:500]
                self._lines.append(text)
                self._unshown.append(text)


class _SshStream(Stream):
    """Says what ssh said when the link ends."""

    def __init__(self, process: SshProcess) -> None:
        super().__init__(*process.descriptors(), process.close)
        self._ssh = process

    def receive(self, size: int = 1 << 16) -> bytes | None:
        """See `Stream.receive`; at an end that ssh explains, OSError with its words."""
        data = super().receive(size)
        if data == b"" and (said := self._ssh.last_words(wait=True)):
            raise OSError(errno.ECONNRESET, f"ssh: {said}")
        return data
