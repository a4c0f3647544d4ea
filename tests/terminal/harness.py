"""A real pseudo-terminal: the command runs in it, an emulator (pyte) draws its bytes.

with Terminal(["tui-trainer", "gpt"], columns=120, rows=40) as terminal:
    terminal.wait_for("step")
    terminal.press("space")
    ...
    terminal.press("q"); terminal.wait_for_exit()
    terminal.assert_restored()
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyte

from tests import processes
from tests.fork_server import STACKS

COMMAND = [sys.executable, "-m", "tui_trainer"]
KEYS = {
    "space": " ",
    "enter": "\r",
    "escape": "\x1b",
    "tab": "\t",
    "ctrl+c": "\x03",
    "ctrl+o": "\x0f",
    "ctrl+p": "\x10",
    "up": "\x1b[A",
    "down": "\x1b[B",
    "right": "\x1b[C",
    "left": "\x1b[D",
}
MODE = re.compile(rb"\x1b\[\?([\d;]+)([hl])")
LEFT_OFF = {
    1049: "the alternate screen",
    1000: "mouse clicks",
    1002: "mouse drags",
    1003: "mouse movement",
    1006: "mouse coordinates",
    1015: "mouse coordinates",
    1004: "focus reports",
    2004: "bracketed paste",
    2026: "synchronised output",
}
"""Private modes that must be off once the program has left; mode 25, the cursor, must be on."""
QUIET_S, WHOLE_FRAME_S = 0.02, 0.3
"""A frame is complete after this long without output, or this long after its first byte."""


class Terminal:
    """One command in one pseudo-terminal of `columns` × `rows`."""

    def __init__(
        self,
        command: Sequence[str],
        columns: int = 120,
        rows: int = 40,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        timeout: float = 240.0,
        cold: bool = False,
    ) -> None:
        """`cold` starts the app and its run as a shell does; without it they are forked from an
        interpreter that has PyTorch (`tests/processes.py`)."""
        self.timeout = timeout
        self._directory = tempfile.TemporaryDirectory()
        self._stacks = Path(self._directory.name, "stacks")
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.output = b""
        # COLUMNS and LINES would stand above the size that the terminal itself reports.
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        environment = {
            **inherited,
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "PYTHONUNBUFFERED": "1",
            STACKS: str(self._stacks),
            **(env or {}),
        }
        self.fd, other = os.openpty()
        self._set_size(columns, rows)
        self.before = termios.tcgetattr(self.fd)
        try:
            self.process: subprocess.Popen[bytes] = processes.Popen(
                command,
                stdin=other,
                stdout=other,
                stderr=other,
                env=environment,
                cwd=cwd,
                start_new_session=True,
                terminal=True,
                cold=cold,
            )
        finally:
            os.close(other)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *details: object) -> None:
        """Close the terminal, and end what still runs in it."""
        os.close(self.fd)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self.process.kill()
        self.process.wait()
        self._directory.cleanup()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self.process.pid

    @property
    def runs(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self, seconds: float) -> bytes | None:
        """What arrives within `seconds`; None once the terminal's other side is closed."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return b""
        try:
            return os.read(self.fd, 1 << 16) or None
        except OSError:  # EIO: nobody has the other side open
            return None

    # ------------------------------------------------------------ looking

    def pump(self, seconds: float = 0.05) -> bool:
        """Draw what arrives within `seconds`, to the end of a frame, which may come in pieces;
        False once the terminal's other side is closed."""
        received, last = b"", time.monotonic() + WHOLE_FRAME_S
        piece = self._read(seconds)
        if piece is None:
            return False
        while piece:
            received += piece
            piece = self._read(QUIET_S) if time.monotonic() < last else b""
        self.output += received
        # pyte draws the private parameters of some sequences ("\x1b[>1u", "\x1b[=5;1u") as text.
        self.stream.feed(re.sub(rb"\x1b\[[>=<][\d;]*[a-zA-Z]", b"", received))
        return True

    def text(self) -> str:
        """What is on the screen now, one line a row."""
        return "\n".join(self.screen.display)

    def wait_until(
        self, holds: Callable[[str], Any], what: str, timeout: float | None = None
    ) -> Any:
        """Wait until `holds(text on the screen)` is true and return what it returned."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while True:
            open_still = self.pump()
            if found := holds(self.text()):
                return found
            if not open_still or time.monotonic() > deadline:
                ended = "" if open_still else " (the program ended)"
                raise AssertionError(
                    f"never saw {what}{ended}; on the screen was:\n{self.text()}\n{self.stacks()}"
                )

    def wait_for(self, text: str, timeout: float | None = None) -> None:
        """Wait until `text` is on the screen."""
        self.wait_until(lambda screen: text in screen, repr(text), timeout)

    def find(self, pattern: str | re.Pattern[str], timeout: float | None = None) -> re.Match[str]:
        """Wait until the regular expression matches what is on the screen."""
        found: re.Match[str] = self.wait_until(
            lambda screen: re.search(pattern, screen), str(pattern), timeout
        )
        return found

    def settle(self, seconds: float = 0.5) -> str:
        """Draw for `seconds` more and return the screen: to show that something stays."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.pump():
            pass
        return self.text()

    def stacks(self) -> str:
        """Where all threads of the program are; "" where it does not say."""
        if not self._stacks.exists() or not self.runs:
            return ""
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 60
        text, since = "", time.monotonic()
        while time.monotonic() < deadline and not (text and time.monotonic() > since + 1.0):
            time.sleep(0.05)
            if (more := self._stacks.read_text()) != text:  # it comes in pieces
                text, since = more, time.monotonic()
        return text

    # ------------------------------------------------------------ acting

    def press(self, *keys: str) -> None:
        """Type keys, by name (`space`, `ctrl+c`, `up`) or as they are (`s`, `?`)."""
        for key in keys:
            os.write(self.fd, KEYS.get(key, key).encode())

    def resize(self, columns: int, rows: int) -> None:
        """Resize the terminal."""
        self.screen.resize(rows, columns)
        self._set_size(columns, rows)

    def hang_up(self) -> None:
        """What a terminal emulator does when its window is closed."""
        self.process.send_signal(signal.SIGHUP)

    def wait_for_exit(self, timeout: float | None = None) -> int:
        """Draw until the program has ended; its exit status, negative for a signal."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while self.pump():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"did not end; on the screen is:\n{self.text()}\n{self.stacks()}"
                )
        self.after = termios.tcgetattr(self.fd)
        return self.process.wait(max(deadline - time.monotonic(), 1))

    # ------------------------------------------------------------ judging

    def modes(self) -> dict[int, bool]:
        """The last state of every private mode: on or off."""
        modes: dict[int, bool] = {}
        for numbers, action in MODE.findall(self.output):
            modes.update({int(number): action == b"h" for number in numbers.split(b";")})
        return modes

    def assert_restored(self) -> None:
        """After the end: every mode that was set is unset, and the line discipline is as it was."""
        modes = self.modes()
        left_on = [name for mode, name in LEFT_OFF.items() if modes.get(mode, False)]
        assert not left_on, f"left on: {left_on}"
        assert modes.get(25, True), "the cursor is still hidden"
        assert self.after == self.before, "the terminal's settings are not what they were"
