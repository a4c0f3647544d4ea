"""From a key to what it does on the screen, while training at full speed.

    python -m benchmarks.keys [--presses 160] [--json FILE]

The real command in a real pseudo-terminal of 120×40 over nanoGPT's CPU shape, an emulator (pyte)
behind it. Keys come at random moments. Timed is from writing the key to the arrival of the bytes
that change what the key is about: the caption of the selected parameter, the column sorted by, the
screen in front, `paused` in the header. Drawing by the emulator is not in it.
"""

from __future__ import annotations

import argparse
import contextlib
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
from report import loaded, machine, write_json

from tui_trainer.protocol import PHASES, tables
from tui_trainer.session.live import LiveSession
from tui_trainer.session.local import connector

GIVE_UP_S = 5.0
PRIVATE = re.compile(rb"\x1b\[[>=<][\d;]*[a-zA-Z]")


class Screen:
    """A pseudo-terminal whose bytes are stamped with the time of their arrival."""

    def __init__(self, command: list[str]) -> None:
        self.pyte = pyte.Screen(120, 40)
        self._stream = pyte.ByteStream(self.pyte)
        self._arrived: queue.Queue[tuple[float, bytes]] = queue.Queue()
        self.child = pexpect.spawn(command[0], command[1:], dimensions=(40, 120))
        self.child.delaybeforesend = None  # or every key would be 50 ms late
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while received := os.read(self.child.child_fd, 1 << 16):
                self._arrived.put((time.perf_counter(), received))

    def take(self, timeout: float) -> float | None:
        """Draw the next bytes; when they arrived, or None when none came in time."""
        try:
            when, received = self._arrived.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return None
        self._stream.feed(PRIVATE.sub(b"", received))
        return when

    def rest(self, seconds: float) -> None:
        """Draw what comes for so long."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            self.take(left)

    def lines(self) -> list[str]:
        """What is on the screen."""
        return list(self.pyte.display)

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Until it is on the screen. Raises TimeoutError."""
        end = time.perf_counter() + timeout
        while not any(text in line for line in self.lines()):
            if time.perf_counter() > end:
                raise TimeoutError(f"never saw {text!r}:\n" + "\n".join(self.lines()))
            self.take(0.2)

    def react(self, key: str, about: Callable[[list[str]], str]) -> float:
        """Milliseconds from the key until what it is about changes; NaN when it never did."""
        self.rest(0.0)
        before = about(self.lines())
        pressed = time.perf_counter()
        self.child.send(key)
        while time.perf_counter() < pressed + GIVE_UP_S:
            when = self.take(0.2)
            if when is not None and about(self.lines()) != before:
                return 1e3 * (when - pressed)
        return float("nan")


def selected(lines: list[str]) -> str:
    """The caption of the selected parameter."""
    return next((line for line in lines if "updated by" in line), "")


def sorted_by(lines: list[str]) -> str:
    """The column that the table is sorted by."""
    return next((line.partition("sorted by")[2] for line in lines if "sorted by" in line), "")


def in_front(lines: list[str]) -> str:
    """Whether the parameters' screen is in front."""
    return str(bool(selected(lines)))


def paused(lines: list[str]) -> str:
    """Whether the header says `paused`."""
    return str(any("paused" in line for line in lines[:2]))


DOWN, UP = "\x1b[B", "\x1b[A"


def measure(screen: Screen, presses: int) -> dict[str, list[float]]:
    """Milliseconds of every key, by kind."""
    randomly = random.Random(0)
    found: dict[str, list[float]] = {}

    def press(kind: str, key: str, about: Callable[[list[str]], str]) -> None:
        screen.rest(0.1 + 0.3 * randomly.random())
        found.setdefault(kind, []).append(screen.react(key, about))

    screen.child.send("3")
    screen.wait_for("sorted by")
    for number in range(presses // 4):
        press("cursor (up, down)", DOWN if number % 20 < 10 else UP, selected)
    for _ in range(presses // 4):
        press("sort (o)", "o", sorted_by)
    for number in range(presses // 4):
        press("screen (1, 3)", "13"[number % 2], in_front)
    screen.child.send("1")
    screen.rest(0.5)
    for number in range(presses // 4):
        press("pause (space)" if number % 2 == 0 else "resume (space)", " ", paused)
    return found


def longest_phase_ms(run: Path) -> tuple[str, float]:
    """The phase that takes longest, and its median milliseconds."""
    session = LiveSession(connector(run), read_only=True)
    session.set_rate(20)
    end = time.monotonic() + 30.0
    while time.monotonic() < end:
        table = session.poll().history.table(tables.PHASE_MS)
        if table is not None and table.rows > 5:
            break
        time.sleep(0.05)
    else:
        raise TimeoutError("the run told nothing of its phases")
    time.sleep(0.5)
    session.poll()
    _, values = table.tail(200)
    session.close()
    medians = np.nanmedian(values, axis=0)[: len(PHASES)]
    return PHASES[int(medians.argmax())], float(medians.max())


def main() -> None:
    """Print the table; write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presses", type=int, default=160)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)  # the reader's time stamps must not wait for the emulator
    print(machine(), loaded(), sep="\n")
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "tui_trainer", "gpt", "--preset", "nanogpt-cpu"]
        command += ["--steps", "1000000", "--eval-every", "1000000", "--sample-every", "0"]
        screen = Screen([*command, "--runs-dir", folder, "--name", "benchmark"])
        try:
            screen.wait_for("running")
            screen.rest(3.0)
            found = measure(screen, options.presses)
            phase, phase_ms = longest_phase_ms(Path(folder) / "benchmark")
        finally:
            kill_all_of(folder)
    figures = {kind: quantiles(times) for kind, times in found.items()}
    reactions = [t for kind, times in found.items() if "pause" not in kind for t in times]
    figures["all but pause"] = quantiles(reactions)
    print(f"{'ms':24}{'median':>9}{'p99':>9}{'longest':>9}{'keys':>6}{'unseen':>8}")
    for kind, one in figures.items():
        print(
            f"{kind:24}" + "".join(f"{one[k]:9.1f}" for k in ("median", "p99", "longest")), end=""
        )
        print(f"{one['keys']:6}{one['unseen']:8}")
    print(f"the longest phase is {phase}: {phase_ms:.1f} ms (a pause waits for the running one)")
    phases = {"longest_phase": phase, "longest_phase_ms": phase_ms}
    write_json(options.json, {"machine": machine(), "load": loaded(), "ms": figures, **phases})


def quantiles(times: list[float]) -> dict[str, float]:
    """Of those that had an effect."""
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
