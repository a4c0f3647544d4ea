"""The time from a key to its effect on the screen, while training at full speed.

    python -m benchmarks.keys [--presses 100] [--json FILE]

The real command trains nanoGPT's CPU shape in a pseudo-terminal of 120×40, read by an emulator
(pyte). Keys are sent at random moments, `--presses` of each kind. The time is measured from writing
the key to the arrival of the bytes that show its effect: the row under the cursor, the caption of
the selected parameter (whose charts arrive in the same piece of output), the column sorted by, the
screen in front, `paused` in the header. It does not include drawing by the emulator. A pause waits
for the end of the running phase, so the time of the longest phase is printed too. Takes about four
minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import queue
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pexpect
import pyte

sys.path.insert(0, str(Path(__file__).parent))

from processes import kill_all_of
from report import begin, environment, finish

from tui_trainer.client.connection import connector
from tui_trainer.client.live import LiveSession
from tui_trainer.protocol import PHASES, schema
from tui_trainer.runs.registry import connect_run

GIVE_UP_S = 5.0
PRIVATE = re.compile(rb"\x1b\[[>=<][\d;]*[a-zA-Z]")


class Screen:
    """A pseudo-terminal whose bytes are stamped with the time of their arrival."""

    def __init__(self, command: list[str]) -> None:
        self.pyte = pyte.Screen(120, 40)
        self._stream = pyte.ByteStream(self.pyte)
        self._arrived: queue.Queue[tuple[float, bytes]] = queue.Queue()
        self.child = pexpect.spawn(command[0], command[1:], dimensions=(40, 120), env=environment())
        self.child.delaybeforesend = None  # or every key would be 50 ms late
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while received := os.read(self.child.child_fd, 1 << 16):
                self._arrived.put((time.perf_counter(), received))

    def take(self, timeout: float) -> float | None:
        """Draw the next bytes and return the time of their arrival; None if none came in time."""
        try:
            when, received = self._arrived.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return None
        self._stream.feed(PRIVATE.sub(b"", received))
        return when

    def rest(self, seconds: float) -> None:
        """Draw everything that arrives within so many seconds."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            self.take(left)

    def lines(self) -> list[str]:
        """The text on the screen, by lines."""
        return list(self.pyte.display)

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Wait until `text` is on the screen. Raises TimeoutError."""
        end = time.perf_counter() + timeout
        while not any(text in line for line in self.lines()):
            if time.perf_counter() > end:
                raise TimeoutError(f"never saw {text!r}:\n" + "\n".join(self.lines()))
            self.take(0.2)

    def react(self, key: str, abouts: dict[str, About]) -> dict[str, float]:
        """Press a key; returns the milliseconds until each value of `abouts` has changed, nan for
        those that never did."""
        self.rest(0.0)
        before = {name: about(self) for name, about in abouts.items()}
        found: dict[str, float] = {}
        pressed = time.perf_counter()
        self.child.send(key)
        while len(found) < len(abouts) and time.perf_counter() < pressed + GIVE_UP_S:
            when = self.take(0.2)
            if when is not None:
                for name, about in abouts.items():
                    if name not in found and about(self) != before[name]:
                        found[name] = 1e3 * (when - pressed)
        return {name: found.get(name, math.nan) for name in abouts}


About = Callable[[Screen], object]


def under_cursor(screen: Screen) -> object:
    """The style of one cell of each line: the row under the cursor has another background."""
    cells = (screen.pyte.buffer[line][CURSOR_COLUMN] for line in range(screen.pyte.lines))
    return tuple((cell.bg, cell.reverse) for cell in cells)


def selected(screen: Screen) -> str:
    """The caption of the selected parameter."""
    return next((line for line in screen.lines() if "updated by" in line), "")


def sorted_by(screen: Screen) -> str:
    """The column that the table is sorted by."""
    matches = (SORTED_BY.search(line) for line in screen.lines())
    return next((found[1] for found in matches if found), "")


def in_front(screen: Screen) -> bool:
    """Whether the parameters' screen is in front."""
    return bool(selected(screen))


def paused(screen: Screen) -> bool:
    """Whether the header shows `paused`."""
    return any("paused" in line for line in screen.lines()[:2])


DOWN, UP = "\x1b[B", "\x1b[A"
SORTED_BY = re.compile(r"elements  (\S+(?: \S+)*)")
"""The piece of the table's caption after the number of elements."""
CURSOR_COLUMN = 10
"""A column of the screen within the table."""
PAUSE = "pause, to `paused` (space)"


def measure(screen: Screen, presses: int) -> dict[str, list[float]]:
    """Kind of key → milliseconds of each of its `presses`."""
    randomly = random.Random(0)
    found: dict[str, list[float]] = {}

    def press(key: str, abouts: dict[str, About]) -> None:
        screen.rest(0.1 + 0.3 * randomly.random())
        for kind, took in screen.react(key, abouts).items():
            found.setdefault(kind, []).append(took)

    screen.child.send("3")
    screen.wait_for("elements")
    cursor: dict[str, About] = {
        "cursor, to its row (up, down)": under_cursor,
        "cursor, to caption and charts": selected,
    }
    for number in range(presses):
        press(DOWN if number % 20 < 10 else UP, cursor)
    for _ in range(presses):
        press("o", {"sort (o)": sorted_by})
    for number in range(presses):
        press("13"[number % 2], {"screen (1, 3)": in_front})
    screen.child.send("1")
    screen.rest(0.5)
    for _ in range(presses):
        press(" ", {PAUSE: paused})
        press(" ", {"resume (space)": paused})
    return found


def longest_phase(run: Path) -> dict[str, str | float]:
    """The phase that takes longest, with the median and the 99th percentile of its milliseconds."""
    session = LiveSession(connector(lambda: connect_run(run)), read_only=True)
    session.set_rate(20)
    end = time.monotonic() + 30.0
    while time.monotonic() < end:
        table = session.poll().history.table(schema.PHASE_MS)
        if table is not None and table.rows > 5:
            break
        time.sleep(0.05)
    else:
        raise TimeoutError("the run sent no phases")
    time.sleep(1.0)
    session.poll()
    _, values = table.tail(2000)
    session.close()
    quantiles = np.nanquantile(values, (0.5, 0.99), axis=0)[:, : len(PHASES)]
    longest = int(quantiles[1].argmax())
    median, high = (float(value) for value in quantiles[:, longest])
    return {"name": PHASES[longest], "median_ms": median, "p99_ms": high, "steps": len(values)}


def main() -> None:
    """Print the table; write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presses", type=int, default=100, help="of each kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)  # the reader's time stamps must not wait for the emulator
    begin()
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "tui_trainer", "gpt", "--preset", "nanogpt-cpu"]
        command += ["--steps", "1000000", "--eval-every", "1000000", "--sample-every", "0"]
        screen = Screen([*command, "--runs-dir", folder, "--name", "benchmark"])
        try:
            screen.wait_for("running")
            screen.rest(3.0)
            found = measure(screen, options.presses)
            phase = longest_phase(Path(folder) / "benchmark")
        finally:
            kill_all_of(folder)
    figures = {kind: quantiles(times) for kind, times in found.items()}
    reactions = [t for kind, times in found.items() if kind != PAUSE for t in times]
    figures["all but pause"] = quantiles(reactions)
    print(f"{'ms':32}{'median':>9}{'p99':>9}{'longest':>9}{'keys':>6}{'unseen':>8}")
    for kind, one in figures.items():
        times = "".join(f"{one[k]:9.1f}" for k in ("median", "p99", "longest"))
        note = ""
        if kind == PAUSE:
            note = (
                f"   the longest phase, {phase['name']}: {phase['median_ms']:.1f} in the median, "
                f"{phase['p99_ms']:.1f} at the 99th percentile"
            )
        print(f"{kind:32}{times}{one['keys']:6}{one['unseen']:8}{note}")
    finish(options.json, {"ms": figures, "longest_phase": phase})


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and longest time of the keys that had an effect."""
    seen = [t for t in times if t == t]
    return {
        "median": statistics.median(seen) if seen else float("nan"),
        "p99": float(np.quantile(seen, 0.99)) if seen else float("nan"),
        "longest": max(seen, default=float("nan")),
        "keys": len(times),
        "unseen": len(times) - len(seen),
    }


if __name__ == "__main__":
    main()
