"""A real pseudo-terminal: the command runs in it, an emulator (pyte) draws its bytes.

with Terminal(["tui-trainer", "gpt"], columns=120, rows=40) as terminal:
    terminal.wait_for("step")
    terminal.press("space")
    ...
    terminal.press("q"); terminal.wait_for_exit()
    terminal.assert_restored()
"""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pexpect
import pyte

COMMAND = [sys.executable, "-m", "tui_trainer"]
KEYS = {
    "space": " ",
    "enter": "\r",
    "escape": "\x1b",
    "tab": "\t",
    "ctrl+c": "\x03",
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
        timeout: float = 60.0,
    ) -> None:
        self.timeout = timeout
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
            **(env or {}),
        }
        self.child = pexpect.spawn(
            command[0],
            list(command[1:]),
            dimensions=(rows, columns),
            env=environment,
            cwd=str(cwd) if cwd else None,
            timeout=timeout,
        )
        self.before = termios.tcgetattr(self.child.child_fd)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *details: object) -> None:
        self.child.close(force=True)

    # ------------------------------------------------------------ looking

    def pump(self, seconds: float = 0.05) -> bool:
        """Draw what arrives within `seconds`, to the end of a frame, which may come in pieces;
        False once the terminal's other side is closed."""
        received, last = b"", time.monotonic() + WHOLE_FRAME_S
        try:
            received = self.child.read_nonblocking(65536, timeout=seconds)
            while time.monotonic() < last:
                received += self.child.read_nonblocking(65536, timeout=QUIET_S)
        except pexpect.TIMEOUT:
            pass
        except pexpect.EOF:
            if not received:
                return False
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
                raise AssertionError(f"never saw {what}{ended}; on the screen was:\n{self.text()}")

    def wait_for(self, text: str, timeout: float | None = None) -> None:
        """Wait until `text` is on the screen."""
        self.wait_until(lambda screen: text in screen, repr(text), timeout)

    def find(self, pattern: str, timeout: float | None = None) -> re.Match[str]:
        """Wait until the regular expression matches what is on the screen."""
        found: re.Match[str] = self.wait_until(
            lambda screen: re.search(pattern, screen), pattern, timeout
        )
        return found

    def settle(self, seconds: float = 0.5) -> str:
        """Draw for `seconds` more and return the screen: to show that something stays."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.pump():
            pass
        return self.text()

    # ------------------------------------------------------------ acting

    def press(self, *keys: str) -> None:
        """Type keys, by name (`space`, `ctrl+c`, `up`) or as they are (`s`, `?`)."""
        for key in keys:
            self.child.send(KEYS.get(key, key))

    def resize(self, columns: int, rows: int) -> None:
        """Resize the terminal."""
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def hang_up(self) -> None:
        """What a terminal emulator does when its window is closed."""
        self.child.kill(signal.SIGHUP)

    def wait_for_exit(self, timeout: float | None = None) -> int:
        """Draw until the program has ended; its exit status, negative for a signal."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while self.pump():
            if time.monotonic() > deadline:
                raise AssertionError(f"did not end; on the screen is:\n{self.text()}")
        self.after = termios.tcgetattr(self.child.child_fd)
        self.child.wait()
        if self.child.signalstatus is not None:
            return -int(self.child.signalstatus)
        return int(self.child.exitstatus)

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
