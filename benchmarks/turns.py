"""Runs several processes with the same training in turns, one at a time.

Each process is started once (`loop.py --turns`), trains in its turns and reports the times of its
steps by its own clock. The order is A B A C A D …: each turn of a way of watching comes between two
turns of the same bare loop, and its ratio is to the mean of these two. Between turns a process is
stopped (SIGSTOP), and so is the app that shows it, so that neither runs in the turns of others.

Work that became due while a process was stopped is done in the first part of its next turn, the
warm-up, which is not counted. The counted part must be long enough to contain the work that recurs
every second.

No key is pressed in a counted part. A key that does nothing is sent to the screen at the end of its
turn, so that the screen is neither in use nor idle: in both states its rate of drawing and polling
differs from the default.

Mean times per step are compared, not medians, since work at every 32nd step counts too.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from started import PLAIN, Way
from trainee import Trainee, Turn

TURN_S, WARM_S = 2.0, 0.4
"""Default lengths of the counted part of a turn and of its warm-up: the state file is written every
second, the store every 0.4 s."""
SETTLE_S, WARM_UP_S = 8.0, 1.5
"""Lengths of the first turn, which is not counted: with a governor, whose cadences have to settle,
and without."""


@contextlib.contextmanager
def trainees(ways: Sequence[Way], loop: Sequence[str]) -> Iterator[list[Trainee]]:
    """Start a process for each way and yield them ready for their first turn. They are started one
    after another, because a run measures at its start whether other processes use the machine."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as name:
        started: list[Trainee] = []
        try:
            for way in ways:
                started.append(Trainee(way, loop, Path(name)))
                started[-1].wait_until_ready()
            yield started
        finally:
            for trainee in started:
                trainee.close()


@dataclass
class Compared:
    """One way compared with the bare loop."""

    name: str
    viewer: bool = False
    ratios: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    cpu_ratios: list[float] = field(default_factory=list)
    others_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    drawn_bytes: int = 0
    frames: int = 0
    every: dict[str, int] = field(default_factory=dict)
    """The final cadences by table, where tui-trainer watches."""

    def add(self, took: Turn, before: Turn, after: Turn) -> None:
        """Add a turn, with the bare turns before and after it."""
        self.ratios.append(2 * took.mean_ms / (before.mean_ms + after.mean_ms))
        self.cpu_ratios.append(2 * took.thread_ms / (before.thread_ms + after.thread_ms))
        self.others_ms.append(took.others_ms)
        self.step_ms.append(took.mean_ms)
        self.seconds += took.seconds
        self.drawn_bytes += took.drawn_bytes
        self.frames += took.frames

    def drawn(self) -> dict[str, float]:
        """Bytes and frames per second that the screen sent to its terminal in the counted parts.
        Raises RuntimeError when it sent nothing."""
        if not self.drawn_bytes or not self.frames:
            raise RuntimeError(f"{self.name}: the screen drew nothing in {self.seconds:.1f} s")
        return {
            "bytes_per_second": self.drawn_bytes / self.seconds,
            "frames_per_second": self.frames / self.seconds,
        }

    def figures(self) -> dict[str, Any]:
        """Median of the pairs, with quartiles. Raises RuntimeError as `drawn` does."""
        if not self.ratios:
            return {"step_ms": statistics.median(self.step_ms), "pairs": len(self.step_ms)}
        ratios = sorted(self.ratios)
        low, high = ratios[0], ratios[-1]
        if len(ratios) >= 4:
            low, _, high = statistics.quantiles(ratios, n=4)
        figures: dict[str, Any] = {
            "ratio": statistics.median(ratios),
            "low": low,
            "high": high,
            "step_ms": statistics.median(self.step_ms),
            "pairs": len(ratios),
            "cpu_ratio": statistics.median(self.cpu_ratios),
            "others_ms": statistics.median(self.others_ms),
        }
        if self.viewer:
            figures |= self.drawn()
        return figures | ({"every": self.every} if self.every else {})


def compare(
    bare: Trainee,
    others: Sequence[Trainee],
    rounds: int,
    seconds: float,
    warm: float,
    threads: int,
    settle: float = SETTLE_S,
    known: dict[str, Compared] | None = None,
) -> dict[str, Compared]:
    """Run the turns A B A C A D …, `rounds` times, after a first turn of each process that is not
    counted: with a governor it lasts `settle` seconds, some hundred steps, in which the cadences
    settle.

    The results are added by name to `known`, the results of earlier processes: two processes of the
    same program may differ by a few percent throughout their lives, depending on their memory
    layout.
    """
    for trainee in (bare, *others):
        trainee.turn(0.05, settle if trainee.way.governed else min(settle, WARM_UP_S), threads)
    found = known if known is not None else {}
    for each in (bare, *others):
        found.setdefault(each.way.name, Compared(each.way.name, each.way.viewer))
    before = bare.turn(seconds, warm, threads)
    for _ in range(rounds):
        for each in others:
            took = each.turn(seconds, warm, threads)
            after = bare.turn(seconds, warm, threads)
            found[each.way.name].add(took, before, after)
            found[bare.way.name].step_ms.append(after.mean_ms)
            before = after
    for each in others:
        if each.way.home != PLAIN:
            found[each.way.name].every = each.cadences()
    return found
