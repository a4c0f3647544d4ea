"""Starts fake runs in processes of their own, and runs `tui-trainer` commands on them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests import processes
from tui_trainer.client.connection import RunClient
from tui_trainer.config.run_spec import (
    LOG_FILE,
    RunSpec,
    RunState,
    find_socket,
    read_state,
    write_spec,
)
from tui_trainer.protocol.actions import Throttle
from tui_trainer.runs.liveness import inspect_run
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import StoreError

T = TypeVar("T")
TRAINS = ("gpt", "vit", "run", "check", "doctor", "graph")
"""Commands that import PyTorch, or start a process that does."""


def until(found: Callable[[], T], what: str, seconds: float = 240.0) -> T:
    """Wait until `found()` returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return value


def last_step(done: subprocess.CompletedProcess[str]) -> int:
    """The step that a successful command printed."""
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("step ")[1].split(",")[0].split()[0].replace(",", ""))


def stored_step(directory: Path) -> int:
    """The newest step in the store of a run; 0 while there is none."""
    try:
        history = StoredHistory(directory)
    except StoreError:
        return 0
    with contextlib.closing(history):
        return history.last_step


def slow_down(directory: Path, steps_per_second: float = 20.0) -> None:
    """Make a run that is only to be alive leave the processor to others."""
    run = inspect_run(directory)
    assert run is not None
    with RunClient.connect(run, "test", read_only=False) as client:
        assert client.command_in_control(Throttle(steps_per_second)).ok


class Runs:
    """A runs directory with fake runs in it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True)
        self.directory = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "TUI_TRAINER_RUNS_DIR": str(directory),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def create(self, name: str, **fields: Any) -> Path:
        """Create the directory of a run without starting it."""
        path = self.directory / name
        write_spec(RunSpec(name=name, directory=str(path), task="gpt", title="fake", **fields))
        return path

    def start(
        self,
        name: str,
        steps: int = 1_000_000,
        seconds: float = 0.01,
        log_file: str | None = None,
        **fields: Any,
    ) -> subprocess.Popen[bytes]:
        """Start a run and wait until it has made a step, or listens where it starts paused. Its
        output goes to its log, or to `log_file`."""
        path = self.create(name, **fields)
        with open(log_file or path / LOG_FILE, "wb") as log:
            process = processes.Popen(
                [sys.executable, "-m", "tests.runs.fake_host", path, str(steps), str(seconds)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                torch=False,
            )
        self.processes[name] = process
        until(
            lambda: (
                process.poll() is not None
                or self.reported(name).step > 0
                or (find_socket(path) and fields.get("start_paused"))
            ),
            f"{name} runs",
        )
        return process

    def reported(self, name: str) -> RunState:
        return read_state(self.directory / name) or RunState(name=name)

    def kill(self, name: str) -> None:
        """Kill a run with SIGKILL, so that it reports no end."""
        self.processes[name].kill()
        self.processes[name].wait()

    def call(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `tui-trainer arguments…` with this runs directory."""
        return processes.run(
            [sys.executable, "-m", "tui_trainer", *arguments],
            env={**self.environment, "COLUMNS": "160"},
            capture_output=True,
            text=True,
            timeout=options.pop("timeout", 240),
            stdin=subprocess.DEVNULL,
            torch=arguments[0] in TRAINS,
            **options,
        )

    def ls(self) -> dict[str, dict[str, Any]]:
        """`ls --json`, by name."""
        done = self.call("ls", "--json")
        assert done.returncode == 0, done.stderr
        return {each["name"]: each for each in json.loads(done.stdout)}

    def end(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
