"""What a run says of itself on disk, `status.json`: enough to list runs without asking any of them.

The run process writes it at its start, about once a second and at its end; whoever lists runs
compares the process named in it with those that there are, so that a run killed without a word is
known to have crashed. A process is told from a later one with the same number by when it began.
"""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

import msgspec

STATE_FILE = "status.json"
ENDED = ("finished", "stopped", "crashed")


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """The last that a run said of itself."""

    name: str
    task: str = ""
    title: str = ""
    state: str = "starting"
    """As `Status.state`."""
    pid: int = 0
    began: str = ""
    """When the process began, as `process_identity` says it."""
    place: str = ""
    """Where `pid` has a meaning, as `this_place` says it."""
    host: str = ""
    started_at: float = 0.0
    """Seconds since the epoch."""
    written_at: float = 0.0
    ended_at: float | None = None
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    loss: float | None = None
    """Of the newest step; None before the first one and where it is not finite."""
    loss_text: str = ""
    """`nan`, `inf` or `-inf` where the newest loss is that."""
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
    """Directory of the run whose checkpoint this one goes on from; "" for a new beginning."""
    branch_step: int | None = None
    """The step of that checkpoint."""

    @property
    def ended(self) -> bool:
        """Whether the run itself said that it has ended."""
        return self.state in ENDED


def write_state(directory: str | os.PathLike[str], state: RunState) -> None:
    """Write `status.json`, whole or not at all. Raises OSError."""
    path = Path(directory) / STATE_FILE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(msgspec.json.encode(state) + b"\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_state(directory: str | os.PathLike[str]) -> RunState | None:
    """What the run in `directory` last said of itself; None when it has said nothing readable."""
    try:
        return msgspec.json.decode((Path(directory) / STATE_FILE).read_bytes(), type=RunState)
    except (OSError, msgspec.DecodeError):
        return None


# ---------------------------------------------------------------- processes


def process_identity(pid: int) -> str:
    """When process `pid` began, the same however often it is asked; "" when there is none.

    On Linux in clock ticks since a named boot, which no correction of the clock moves. A process
    that has ended and only waits for its parent to notice is none.
    """
    if pid <= 0:
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _identity_elsewhere(pid)
    if fields[0] in ("Z", "X", "x"):
        return ""
    return f"{_boot()}:{fields[19]}"


def _identity_elsewhere(pid: int) -> str:
    """Where there is no /proc: macOS."""
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
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@functools.cache
def this_place() -> str:
    """Names the machine and, on Linux, the set of process numbers that this process sees: with a
    runs directory shared between hosts or containers, elsewhere's processes cannot be looked up."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()
