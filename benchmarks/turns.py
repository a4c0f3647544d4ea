"""Taking turns: several processes that hold the same training, of which one runs at a time.

Each is started once (`loop.py --turns`), trains when its turn comes and says by its own clock how
long its steps took. Turns go A B A C A D …: each way of watching stands between two turns of the
same bare loop, and its ratio is to the mean of these two. Between turns a process is stopped
(SIGSTOP), so that whatever it does in the background falls into its own turn; only the app of the
in-app home, which shares its process with a screen that must not be stopped, goes on.

Compared are mean times per step, not medians: what is done every 32nd step costs too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pexpect
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from processes import processes_of

HERE = Path(__file__).resolve().parent
PLAIN, RUN, IN_APP = "plain python", "own process", "thread in the app"
COLUMNS, ROWS = 120, 40
START_TIMEOUT_S = 300.0
"""Until the first step: torch.compile takes its time."""


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
        self.drawn_bytes = 0
        script = [str(HERE / "loop.py"), *loop, *way.script, "--turns", str(self.folder)]
        self._start(script)

    def _start(self, script: list[str]) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", **self.way.env}
        log = open(self.folder / "output.txt", "wb")  # noqa: SIM115
        if self.way.home == PLAIN:
            command = [sys.executable, *script]
        else:
            flags = ["--runs-dir", str(self.folder / "runs"), "--name", "benchmark"]
            flags += ["--detach"] * (not self.way.viewer) + list(self.way.flags)
            command = [sys.executable, "-m", "tui_trainer", "run", *flags, *script]
            if self.way.home == IN_APP:  # which trains tasks alone: a script needs the main thread
                environment["PYTHONPATH"] = register_loop_as_task(self.folder)
                command[3:] = ["loop", "--in-app", *flags, *script[1:]]
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
                self.drawn_bytes += len(received)
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
        said = self.ask(do="train", seconds=seconds, warm=warm, threads=threads)
        if not said["steps"]:
            return self.turn(4 * seconds, warm, threads)
        mean = 1e3 * said["seconds"] / said["steps"]
        thread = 1e3 * said["thread_s"] / said["steps"]
        others = 1e3 * said["process_s"] / said["steps"] - thread
        return Turn(mean, said["median_ms"], said["longest_ms"], said["steps"], thread, others)

    # ------------------------------------------------------------ stopping

    def _tree(self) -> list[psutil.Process]:
        if self._processes is None and self.pid:
            with contextlib.suppress(psutil.Error):
                top = psutil.Process(self.pid)
                self._processes = [top, *top.children(recursive=True)]
        return self._processes or []

    def _stop(self) -> None:
        if self.way.home != IN_APP:
            for process in self._tree():
                with contextlib.suppress(psutil.Error):
                    process.suspend()

    def _go_on(self) -> None:
        if self.way.home != IN_APP:
            for process in self._tree():
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
    ratios: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    cpu_ratios: list[float] = field(default_factory=list)
    others_ms: list[float] = field(default_factory=list)

    def add(self, took: Turn, before: Turn, after: Turn) -> None:
        """A turn, and the bare ones before and after it."""
        self.ratios.append(2 * took.mean_ms / (before.mean_ms + after.mean_ms))
        self.cpu_ratios.append(2 * took.thread_ms / (before.thread_ms + after.thread_ms))
        self.others_ms.append(took.others_ms)
        self.step_ms.append(took.mean_ms)

    def figures(self) -> dict[str, float]:
        """Median of the pairs, with quartiles."""
        if not self.ratios:
            return {"step_ms": statistics.median(self.step_ms), "pairs": len(self.step_ms)}
        ratios = sorted(self.ratios)
        low, high = ratios[0], ratios[-1]
        if len(ratios) >= 4:
            low, _, high = statistics.quantiles(ratios, n=4)
        return {
            "ratio": statistics.median(ratios),
            "low": low,
            "high": high,
            "step_ms": statistics.median(self.step_ms),
            "pairs": len(ratios),
            "cpu_ratio": statistics.median(self.cpu_ratios),
            "others_ms": statistics.median(self.others_ms),
        }


def compare(
    bare: Trainee,
    others: Sequence[Trainee],
    rounds: int,
    seconds: float,
    warm: float,
    threads: int,
    settle: float = 8.0,
    known: dict[str, Compared] | None = None,
) -> dict[str, Compared]:
    """Turns A B A C A D …, `rounds` times over, after a first one each that does not count:
    `settle` seconds, some hundred steps, in which the governor finds the cadences it then keeps.

    Added to what is `known` from other processes, by name: two processes of the same program may
    differ by some percent for as long as they live, by where their memory lies.
    """
    for trainee in (bare, *others):
        trainee.turn(0.05, settle, threads)
    found = known if known is not None else {}
    for each in (bare, *others):
        found.setdefault(each.way.name, Compared(each.way.name))
    before = bare.turn(seconds, warm, threads)
    for _ in range(rounds):
        for each in others:
            took = each.turn(seconds, warm, threads)
            after = bare.turn(seconds, warm, threads)
            found[each.way.name].add(took, before, after)
            found[bare.way.name].step_ms.append(after.mean_ms)
            before = after
    return found
