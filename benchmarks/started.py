"""Start, stop and end a training process and the app that shows it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pexpect
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from processes import processes_of
from report import environment as terminal_environment

HERE = Path(__file__).resolve().parent
PLAIN, RUN, IN_APP = "plain python", "own process", "thread in the app"
COLUMNS, ROWS = 120, 40
NATURAL_CADENCES = ("--budget", "0")
HARMLESS = "\x1b[24~"
"""F12: bound to nothing."""
ANSWERED_S = 0.05
"""An idle run answers a viewer, and an idle screen handles a key, within this time."""
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
        """Whether a governor determines the cadences, which have to settle first."""
        return self.home != PLAIN and self.flags[:2] != NATURAL_CADENCES


class Started:
    """The process that trains one way, and its screen."""

    def __init__(self, way: Way, loop: Sequence[str], folder: Path) -> None:
        self.way = way
        self.folder = folder
        self.pid = 0
        """Pid of the process that trains, once reported; 0 before."""
        self.drawn: list[tuple[float, int]] = []
        """(time, bytes) of each piece of output from the screen."""
        self.touched = time.monotonic()
        """When the screen was last sent a key, or started."""
        self._began = time.monotonic()
        self._screen: pexpect.spawn | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._processes: list[psutil.Process] | None = None
        self._start([str(HERE / "loop.py"), *loop, *way.script, "--turns", str(folder)])

    def _start(self, script: list[str]) -> None:
        environment = terminal_environment() | self.way.env
        log = open(self.folder / "output.txt", "wb")  # noqa: SIM115
        if self.way.home == PLAIN:
            command = [sys.executable, *script]
        else:
            flags = ["--runs-dir", str(self.folder / "runs"), "--name", RUN_NAME]
            flags += ["--detach"] * (not self.way.viewer) + list(self.way.flags)
            command = [sys.executable, str(HERE / "stoppable.py")]
            if self.way.home == IN_APP:  # only tasks: a script needs the main thread
                found = (register_loop_as_task(self.folder), environment.get("PYTHONPATH", ""))
                environment["PYTHONPATH"] = os.pathsep.join(filter(None, found))
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
        """Read the screen's output as fast as it arrives."""
        assert self._screen is not None
        with contextlib.suppress(OSError):
            while received := os.read(self._screen.child_fd, 1 << 16):
                self.drawn.append((time.monotonic(), len(received)))
                with open(self.folder / "output.txt", "ab") as file:
                    file.write(received)

    def touch(self) -> None:
        """Press a key that does nothing, so that the screen does not count as idle."""
        if self._screen is not None:
            os.write(self._screen.child_fd, HARMLESS.encode())
            self.touched = time.monotonic()

    def output(self) -> str:
        """The end of the process's output."""
        return (self.folder / "output.txt").read_text(errors="replace")[-2000:]

    def gone(self) -> bool:
        """Whether the process has ended."""
        if self.pid:
            return not psutil.pid_exists(self.pid)
        return time.monotonic() - self._began > 5.0 and not processes_of(str(self.folder))

    # ------------------------------------------------------------ stopping

    def _tree(self) -> list[psutil.Process]:
        if self._processes is None and self.pid:
            with contextlib.suppress(psutil.Error):
                top = psutil.Process(self.pid)
                self._processes = [top, *top.children(recursive=True)]
        return self._processes or []

    def _viewer(self) -> list[psutil.Process]:
        """The process of the screen, if it is not the one that trains."""
        if self._screen is None or self._screen.pid == self.pid:
            return []
        return [psutil.Process(self._screen.pid)]

    def stop(self) -> None:
        """Suspend the screen, then the training. The screen's last request is answered first: one
        that is unanswered for 10 s would count as a lost connection once the screen continues."""
        for processes in (self._viewer(), self._tree()):
            if self._screen is not None:
                time.sleep(ANSWERED_S)
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.suspend()

    def resume(self) -> None:
        """Continue the training and its screen."""
        for process in [*self._tree(), *self._viewer()]:
            with contextlib.suppress(psutil.Error):
                process.resume()

    def close(self) -> None:
        """Kill all processes; their files are removed with the folder."""
        for process in [*self._tree(), *processes_of(str(self.folder))]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._screen is not None:
            self._screen.close(force=True)
        if self._process is not None:
            self._process.wait(10)


def register_loop_as_task(folder: Path) -> str:
    """Create a package that offers the loop as a task; return the PYTHONPATH it needs."""
    about = folder / "packages" / "benchmark_loop-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: benchmark-loop\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[tui_trainer.tasks]\nloop = loop_task:task\n")
    return os.pathsep.join((str(about.parent), str(HERE)))
