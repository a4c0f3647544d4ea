"""The last state that a run reported: a `RunState`, kept as `status.json` in the run's directory.

The run process writes it at its start, about once a second and at its end, so that runs can be
listed without connecting to any of them. It identifies the process that wrote it: a run that was
killed has a state that never ended and a process that no longer exists.
"""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

import msgspec

from tui_trainer.protocol.messages import END_STATES, State

STATE_FILE = "status.json"


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """The last state that a run reported."""

    name: str
    task: str = ""
    title: str = ""
    state: State = "starting"
    pid: int = 0
    process: str = ""
    """`process_identity(pid)`: distinguishes the process from a later one with the same number."""
    machine: str = ""
    """`machine_identity()`: where `pid` has a meaning."""
    host: str = ""
    started_at: float = 0.0
    """Seconds since the epoch, as the other times."""
    written_at: float = 0.0
    ended_at: float | None = None
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    loss: float | None = None
    """Loss of the newest step; None before the first step and where it is not finite."""
    loss_text: str = ""
    """`nan`, `inf` or `-inf` where the newest loss is not finite."""
    steps_per_second: float | None = None
    items_per_second: float | None = None
    item_unit: str = "items"
    elapsed_s: float = 0.0
    remaining_s: float | None = None
    device: str = ""
    waiting_for: str = ""
    reason: str = ""
    hint: str = ""
    refused: bool = False
    """As `Status.refused`."""
    parent: str = ""
    """Directory of the run whose checkpoint this run was resumed from; "" if it was not."""
    branch_step: int | None = None
    """The step of that checkpoint."""

    @property
    def ended(self) -> bool:
        """Whether the run itself reported its end."""
        return self.state in END_STATES


def write_state(directory: str | os.PathLike[str], state: RunState) -> None:
    """Write `status.json` atomically. Raises OSError."""
    path = Path(directory) / STATE_FILE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(msgspec.json.encode(state) + b"\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_state(directory: str | os.PathLike[str]) -> RunState | None:
    """The state in a run's directory; None when there is none or it is not readable."""
    try:
        return msgspec.json.decode((Path(directory) / STATE_FILE).read_bytes(), type=RunState)
    except (OSError, msgspec.DecodeError):
        return None


def process_identity(pid: int) -> str:
    """When process `pid` started, as a text that is equal on every call; "" if there is none.

    On Linux it is in clock ticks since a named boot, which no adjustment of the clock changes. A
    zombie counts as no process.
    """
    if pid <= 0:
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _identity_without_proc(pid)
    if fields[0] in ("Z", "X", "x"):
        return ""
    return f"{_boot_id()}:{fields[19]}"


def _identity_without_proc(pid: int) -> str:
    if os.path.isdir("/proc/self"):
        return ""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return f"{process.create_time():.0f}"
    except psutil.Error:
        return ""


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@functools.cache
def machine_identity() -> str:
    """Names the machine and, on Linux, the namespace of process numbers: hosts and containers may
    share a runs directory, and processes of another one cannot be looked up."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()
