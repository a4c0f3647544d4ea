"""Taking turns: several processes that hold the same training, of which one runs at a time.

Each is started once (`loop.py --turns`), trains when its turn comes and says by its own clock how
long its steps took. Turns go A B A C A D …: each way of watching stands between two turns of the
same bare loop, and its ratio is to the mean of these two. Between turns a process is stopped
(SIGSTOP), and so is the app that shows it, so that nothing of either runs in the turns of others.

What fell due while a process was stopped is done at once when it goes on: that is in the first part
of a turn, which is warm-up and not counted. The counted part must then be long enough for what
recurs every second to recur within it.

Nobody presses a key in a counted part. A key that does nothing is sent to the screen when its turn
is over: it is then neither that of somebody who is pressing keys nor one that has been left alone,
both of which would be drawn and polled at another rate than the default one.

Compared are mean times per step, not medians: what is done every 32nd step costs too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pexpect
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from processes import processes_of
from report import environment as terminal_environment

from tui_trainer.session.live import LiveSession
from tui_trainer.session.local import connector
from tui_trainer.ui.pace import EAGER_S, IDLE

HERE = Path(__file__).resolve().parent
PLAIN, RUN, IN_APP = "plain python", "own process", "thread in the app"
COLUMNS, ROWS = 120, 40
NOTHING_STRETCHED = ("--budget", "0")
START_TIMEOUT_S = 300.0
"""Until the first step: torch.compile takes its time."""
TURN_S, WARM_S = 2.0, 0.4
"""Of a turn by default: the state file is written every second, the store every 0.4 s."""
SETTLE_S, WARM_UP_S = 8.0, 1.5
"""Of a first turn that does not count: of what a governor has to settle in, and of all others."""
HARMLESS = "\x1b[24~"
"""F12: bound to nothing."""
BURST_S = 0.05
"""Bytes that come closer together than this are one frame."""
ANSWERED_S = 0.05
"""Within which an idle run answers whoever asks, and an idle screen takes in a key."""
LEFT_ALONE_S = min(seconds for seconds, _ in IDLE)
RUN_NAME = "benchmark"


@dataclass(frozen=True)
class Way:
    """One way of running the loop."""

    name: str
    home: str = PLAIN
    viewer: bool = False
    script: tuple[str, ...] = ()
    """More options of loop.py."""
    flags: tuple[str, ...] = ()
    """Options of `tui-trainer run`."""
    env: dict[str, str] = field(default_factory=dict)

    @property
    def governed(self) -> bool:
        """Whether it measures at cadences that have to settle first."""
        return self.home != PLAIN and self.flags[:2] != NOTHING_STRETCHED


@dataclass
class Turn:
    """What one turn took."""

    mean_ms: float
    median_ms: float
    longest_ms: float
    steps: int
    thread_ms: float
    """CPU of the training thread alone, per step: what other load does to it is not in it."""
    others_ms: float
    """CPU of all other threads of the process, per step: OpenMP's, and ours."""
    seconds: float = 0.0
    drawn_bytes: int = 0
    frames: int = 0
    """Bursts of output to the terminal in the counted part."""


class Trainee:
    """One process that trains when told to, and the app over it where there is one."""

    def __init__(self, way: Way, loop: Sequence[str], folder: Path) -> None:
        self.way = way
        self.folder = folder / way.name.replace(" ", "-").replace("/", "-").replace(",", "")
        self.folder.mkdir()
        for name in ("to", "from"):
            os.mkfifo(self.folder / name)
        # Opened for both directions, so that opening waits for nobody.
        self._to = os.open(self.folder / "to", os.O_RDWR)
        self._from = os.open(self.folder / "from", os.O_RDWR | os.O_NONBLOCK)
        self._received = b""
        self._began = time.monotonic()
        self._screen: pexpect.spawn | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._processes: list[psutil.Process] | None = None
        self.pid = 0
        self._drawn: list[tuple[float, int]] = []
        """(when, bytes) of what the screen has sent since the turn began."""
        self._touched = time.monotonic()
        """When the screen was last sent a key, or started."""
        script = [str(HERE / "loop.py"), *loop, *way.script, "--turns", str(self.folder)]
        self._start(script)

    def _start(self, script: list[str]) -> None:
        environment = terminal_environment() | self.way.env
        log = open(self.folder / "output.txt", "wb")  # noqa: SIM115
        if self.way.home == PLAIN:
            command = [sys.executable, *script]
        else:
            flags = ["--runs-dir", str(self.folder / "runs"), "--name", RUN_NAME]
            flags += ["--detach"] * (not self.way.viewer) + list(self.way.flags)
            command = [sys.executable, str(HERE / "stoppable.py")]
            if self.way.home == IN_APP:  # which trains tasks alone: a script needs the main thread
                environment["PYTHONPATH"] = register_loop_as_task(self.folder)
                command += ["loop", "--in-app", *flags, *script[1:]]
            else:
                command += ["run", *flags, *script]
        if self.way.viewer:
            self._screen = pexpect.spawn(
                command[0],
                command[1:],
                dimensions=(ROWS, COLUMNS),
                env=environment,
                cwd=str(self.folder),
            )
            threading.Thread(target=self._read_screen, daemon=True).start()
        else:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        log.close()

    def _read_screen(self) -> None:
        """A terminal that takes everything at once."""
        assert self._screen is not None
        with contextlib.suppress(OSError):
            while received := os.read(self._screen.child_fd, 1 << 16):
                self._drawn.append((time.monotonic(), len(received)))
                with open(self.folder / "output.txt", "ab") as file:
                    file.write(received)

    def wait_until_ready(self) -> None:
        """Until the first step is made."""
        self.pid = int(self._receive(START_TIMEOUT_S)["pid"])
        self._stop()

    # ------------------------------------------------------------ speaking

    def _send(self, order: dict[str, Any]) -> None:
        os.write(self._to, json.dumps(order).encode() + b"\n")

    def _receive(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            readable, _, _ = select.select([self._from], [], [], 0.2)
            if readable:
                self._received += os.read(self._from, 1 << 16)
            elif time.monotonic() > deadline or self._gone():
                said = (self.folder / "output.txt").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.way.name}: no answer; it said:\n{said}")
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _gone(self) -> bool:
        if self.pid:
            return not psutil.pid_exists(self.pid)
        return time.monotonic() - self._began > 5.0 and not processes_of(str(self.folder))

    def ask(self, timeout: float = 120.0, **order: Any) -> dict[str, Any]:
        """Give an order, and its answer; the process runs for so long and no longer."""
        self._go_on()
        self._send(order)
        answer = self._receive(timeout)
        self._stop()
        return answer

    def turn(self, seconds: float, warm: float, threads: int) -> Turn:
        """Train for so long; at least one step is timed."""
        if self.way.viewer and time.monotonic() + warm + seconds > self._touched + LEFT_ALONE_S:
            self._touch()
            warm = max(warm, EAGER_S + 0.5)
        self._go_on()
        self._drawn.clear()
        self._send({"do": "train", "seconds": seconds, "warm": warm, "threads": threads})
        said = self._receive(120.0)
        drawn, end = list(self._drawn), time.monotonic()
        self._touch()
        self._stop()
        if not said["steps"]:
            return self.turn(4 * seconds, warm, threads)
        mean = 1e3 * said["seconds"] / said["steps"]
        thread = 1e3 * said["thread_s"] / said["steps"]
        others = 1e3 * said["process_s"] / said["steps"] - thread
        counted = [(when, size) for when, size in drawn if when > end - said["seconds"]]
        return Turn(
            mean,
            said["median_ms"],
            said["longest_ms"],
            said["steps"],
            thread,
            others,
            said["seconds"],
            drawn_bytes=sum(size for _, size in counted),
            frames=bursts(when for when, _ in counted),
        )

    def _touch(self) -> None:
        """Let somebody be there who presses a key."""
        if self._screen is not None:
            os.write(self._screen.child_fd, HARMLESS.encode())
            self._touched = time.monotonic()

    def cadences(self) -> dict[str, int]:
        """Every so many steps each table is measured at present, by its name."""
        self._go_on()
        session = LiveSession(connector(self.folder / "runs" / RUN_NAME), read_only=True)
        try:
            deadline = time.monotonic() + 20.0
            while (info := session.poll().info) is None or not info.tables:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.way.name} told nothing of its tables")
                time.sleep(0.02)
            return {table.name: table.every for table in info.tables}
        finally:
            session.close()
            self._stop()

    # ------------------------------------------------------------ stopping

    def _tree(self) -> list[psutil.Process]:
        if self._processes is None and self.pid:
            with contextlib.suppress(psutil.Error):
                top = psutil.Process(self.pid)
                self._processes = [top, *top.children(recursive=True)]
        return self._processes or []

    def _viewer(self) -> list[psutil.Process]:
        """The process of the screen, where it has one of its own."""
        if self._screen is None or self._screen.pid == self.pid:
            return []
        return [psutil.Process(self._screen.pid)]

    def _stop(self) -> None:
        """The screen first, and only once what it has asked for was answered: an answer that it is
        owed for 10 s would be a lost link when it goes on."""
        for processes in (self._viewer(), self._tree()):
            if self._screen is not None:
                time.sleep(ANSWERED_S)
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.suspend()

    def _go_on(self) -> None:
        for process in [*self._tree(), *self._viewer()]:
            with contextlib.suppress(psutil.Error):
                process.resume()

    def close(self) -> None:
        """End it at once: what it has made goes with its folder."""
        for process in [*self._tree(), *processes_of(str(self.folder))]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._screen is not None:
            self._screen.close(force=True)
        if self._process is not None:
            self._process.wait(10)
        os.close(self._to)
        os.close(self._from)


def bursts(moments: Iterable[float]) -> int:
    """How many there are of them."""
    count, last = 0, -math.inf
    for moment in moments:
        count += moment - last > BURST_S
        last = moment
    return count


def register_loop_as_task(folder: Path) -> str:
    """What to put on PYTHONPATH for `tui-trainer loop`: a package that offers it as any would."""
    about = folder / "packages" / "benchmark_loop-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: benchmark-loop\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[tui_trainer.tasks]\nloop = loop_task:task\n")
    return os.pathsep.join((str(about.parent), str(HERE)))


@contextlib.contextmanager
def trainees(ways: Sequence[Way], loop: Sequence[str]) -> Iterator[list[Trainee]]:
    """Start all of them, ready for their first turn."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as name:
        started: list[Trainee] = []
        try:
            for way in ways:
                started.append(Trainee(way, loop, Path(name)))  # noqa: PERF401
            for trainee in started:
                trainee.wait_until_ready()
            yield started
        finally:
            for trainee in started:
                trainee.close()


@dataclass
class Compared:
    """One way beside the bare loop."""

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
    """The cadences in force at the end, by table; of what we watch alone."""

    def add(self, took: Turn, before: Turn, after: Turn) -> None:
        """A turn, and the bare ones before and after it."""
        self.ratios.append(2 * took.mean_ms / (before.mean_ms + after.mean_ms))
        self.cpu_ratios.append(2 * took.thread_ms / (before.thread_ms + after.thread_ms))
        self.others_ms.append(took.others_ms)
        self.step_ms.append(took.mean_ms)
        self.seconds += took.seconds
        self.drawn_bytes += took.drawn_bytes
        self.frames += took.frames

    def drawn(self) -> dict[str, float]:
        """What the screen has sent to its terminal in the counted parts, per second. Raises
        RuntimeError when that was nothing."""
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
    """Turns A B A C A D …, `rounds` times over, after a first one each that does not count: where
    there is a governor `settle` seconds, some hundred steps, in which it finds the cadences that it
    then keeps.

    Added to what is `known` from other processes, by name: two processes of the same program may
    differ by some percent for as long as they live, by where their memory lies.
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
