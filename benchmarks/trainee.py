"""One training process that trains on request and reports the times of its steps."""

from __future__ import annotations

import json
import math
import os
import select
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from started import RUN_NAME, Started, Way

from tui_trainer.client.connection import connector
from tui_trainer.client.live import LiveSession
from tui_trainer.runs.registry import connect_run
from tui_trainer.ui.frames import ACTIVE_S, IDLE_INTERVALS

START_TIMEOUT_S = 300.0
"""Limit until the first step; torch.compile is slow."""
BURST_S = 0.05
"""Bytes that come closer together than this are one frame."""
IDLE_AFTER_S = min(seconds for seconds, _ in IDLE_INTERVALS)


@dataclass
class Turn:
    """The times of one turn."""

    mean_ms: float
    median_ms: float
    longest_ms: float
    steps: int
    thread_ms: float
    """CPU of the training thread alone, per step; it does not include other load."""
    others_ms: float
    """CPU of all other threads of the process, per step: OpenMP's, and ours."""
    seconds: float = 0.0
    drawn_bytes: int = 0
    frames: int = 0
    """Bursts of output to the terminal in the counted part."""


class Trainee:
    """A training process (`loop.py --turns`) that is controlled over two FIFOs in its folder."""

    def __init__(self, way: Way, loop: Sequence[str], folder: Path) -> None:
        self.way = way
        own = folder / way.name.replace(" ", "-").replace("/", "-").replace(",", "")
        own.mkdir()
        for name in ("to", "from"):
            os.mkfifo(own / name)
        # Opened for both directions, so that opening does not block.
        self._to = os.open(own / "to", os.O_RDWR)
        self._from = os.open(own / "from", os.O_RDWR | os.O_NONBLOCK)
        self._received = b""
        self._started = Started(way, loop, own)

    @property
    def folder(self) -> Path:
        """The folder of the process."""
        return self._started.folder

    @property
    def pid(self) -> int:
        """Pid of the process that trains."""
        return self._started.pid

    def wait_until_ready(self) -> None:
        """Return after the first step."""
        self._started.pid = int(self._receive(START_TIMEOUT_S)["pid"])
        self._started.stop()

    def close(self) -> None:
        """Kill the process; its files are removed with the folder."""
        self._started.close()
        os.close(self._to)
        os.close(self._from)

    def _send(self, order: dict[str, Any]) -> None:
        os.write(self._to, json.dumps(order).encode() + b"\n")

    def _receive(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            readable, _, _ = select.select([self._from], [], [], 0.2)
            if readable:
                self._received += os.read(self._from, 1 << 16)
            elif time.monotonic() > deadline or self._started.gone():
                output = self._started.output()
                raise RuntimeError(f"{self.way.name}: no answer; its output:\n{output}")
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, timeout: float = 120.0, **order: Any) -> dict[str, Any]:
        """Send an order and return its answer; the process runs only until then."""
        self._started.resume()
        self._send(order)
        answer = self._receive(timeout)
        self._started.stop()
        return answer

    def turn(self, seconds: float, warm: float, threads: int) -> Turn:
        """Train for `seconds`; at least one step is timed."""
        idle_at = self._started.touched + IDLE_AFTER_S
        if self.way.viewer and time.monotonic() + warm + seconds > idle_at:
            self._started.touch()
            warm = max(warm, ACTIVE_S + 0.5)
        self._started.resume()
        self._started.drawn.clear()
        self._send({"do": "train", "seconds": seconds, "warm": warm, "threads": threads})
        answer = self._receive(120.0)
        drawn, end = list(self._started.drawn), time.monotonic()
        self._started.touch()
        self._started.stop()
        if not answer["steps"]:
            return self.turn(4 * seconds, warm, threads)
        mean = 1e3 * answer["seconds"] / answer["steps"]
        thread = 1e3 * answer["thread_s"] / answer["steps"]
        others = 1e3 * answer["process_s"] / answer["steps"] - thread
        counted = [(when, size) for when, size in drawn if when > end - answer["seconds"]]
        return Turn(
            mean,
            answer["median_ms"],
            answer["longest_ms"],
            answer["steps"],
            thread,
            others,
            answer["seconds"],
            drawn_bytes=sum(size for _, size in counted),
            frames=bursts(when for when, _ in counted),
        )

    def cadences(self) -> dict[str, int]:
        """The current cadence of each table in steps, by name."""
        self._started.resume()
        run = self._started.folder / "runs" / RUN_NAME
        session = LiveSession(connector(lambda: connect_run(run)), read_only=True)
        try:
            deadline = time.monotonic() + 20.0
            while (info := session.poll().info) is None or not info.tables:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.way.name} sent no description of its tables")
                time.sleep(0.02)
            return {table.name: table.every for table in info.tables}
        finally:
            session.close()
            self._started.stop()


def bursts(moments: Iterable[float]) -> int:
    """Number of groups of moments less than BURST_S apart."""
    count, last = 0, -math.inf
    for moment in moments:
        count += moment - last > BURST_S
        last = moment
    return count
