"""Which process of a distributed training this is, and how its processes find each other.

A launcher (torchrun, `accelerate launch`, …) describes each process by environment variables. Rank
0 creates the run and leaves a note of it in the runs directory, under a name that only the
processes of the same launch know. Used before torch is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tui_trainer.config.atomic_file import replacing
from tui_trainer.config.run_spec import process_identity, runs_directory

LAUNCHES = ".launches"
"""Directory of the notes, in the runs directory."""
_IDENTIFYING = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
)


@dataclass(frozen=True)
class Rank:
    """A process of a distributed training."""

    rank: int
    world_size: int
    restart: int = 0
    """How often the launcher has restarted the processes."""
    launch: str = ""
    """Identifies a launch: equal in all processes of the launch, different in any other."""
    with_rank_zero: bool = True
    """Whether rank 0 runs on this machine."""
    master: str = ""
    """The address of rank 0's machine, as the launcher knows it."""


def rank_here(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """This process's rank; None where it trains alone."""
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        restart = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    except (KeyError, ValueError):
        return None
    if world_size < 2 or not 0 <= rank < world_size:
        return None
    text = "\n".join(environment.get(name, "") for name in _IDENTIFYING)
    return Rank(
        rank,
        world_size,
        restart,
        hashlib.sha256(text.encode()).hexdigest()[:24],
        # Ranks are numbered machine by machine, beginning with that of rank 0.
        with_rank_zero=environment.get("LOCAL_RANK", str(rank)) == str(rank),
        master=environment.get("MASTER_ADDR", ""),
    )


class LaunchNote(msgspec.Struct, frozen=True):
    """The note that rank 0 of a launch leaves for the other ranks: where the run is recorded."""

    directory: str
    pid: int
    process: str
    """See `process_identity`: a note of a process that no longer exists is not valid."""


def _note_path(launch: str, runs_dir: str | os.PathLike[str] | None) -> Path:
    return runs_directory(runs_dir) / LAUNCHES / f"{launch}.json"


def leave_note(
    rank: Rank, directory: str | os.PathLike[str], runs_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Write the note for the other ranks of the launch; returns its path. Raises OSError."""
    path = _note_path(rank.launch, runs_dir)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    note = LaunchNote(os.fspath(directory), os.getpid(), process_identity(os.getpid()))
    with replacing(path) as partial:
        partial.write_bytes(msgspec.json.encode(note))
        os.chmod(partial, 0o600)
    return path


def find_run(launch: str, runs_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The directory of the run that rank 0 of a launch records; None while there is none."""
    path = _note_path(launch, runs_dir)
    with contextlib.suppress(OSError, msgspec.DecodeError):
        for checked in (path.parent, path):
            found = checked.stat()
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
        note = msgspec.json.decode(path.read_bytes(), type=LaunchNote)
        if note.process == process_identity(note.pid):
            return Path(note.directory)
    return None
