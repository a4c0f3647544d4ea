"""The files that describe a run in its directory: how it was started (`RunSpec`, `run.json`), and
the last state that it reported (`RunState`, `status.json`).

The command line or the app writes `run.json` and the run process reads it. The run process writes
`status.json` at its start and about once a second. This module also creates and removes run
directories and decides where a run's socket is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

import msgspec
import platformdirs

from tui_trainer.config.atomic_file import replacing
from tui_trainer.protocol.messages import END_STATES, Breakpoint, State
from tui_trainer.protocol.schema import SCRIPT, Scalar, SourceInfo

SPEC_FILE = "run.json"
LOG_FILE = "log.txt"
BREAKPOINTS_FILE = "breakpoints.json"
SOCKET_FILE = "run.sock"
SOCKET_POINTER_FILE = "socket"
"""File with the path of a socket that is not in the run's directory."""
SOCKET_DIRECTORY_PREFIX = "tui-trainer-"
"""Prefix of the temporary directory of such a socket."""
MAX_SOCKET_PATH_BYTES = 100
"""sun_path holds 108 bytes on Linux and 104 on macOS, including the final NUL."""
RUNS_DIR_VARIABLE = "TUI_TRAINER_RUNS_DIR"


RUN_NAME = re.compile(r"[\w][\w.+-]{0,99}")
"""A valid name of a run."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the run process needs to know to train."""

    name: str
    directory: str
    """The run's directory, absolute."""
    task: str
    """`gpt`, `vit`, a third party's task, or SCRIPT."""
    title: str = ""
    """One line for the header; "": derived from the task and preset, or from the script."""
    configuration: dict[str, Scalar] = {}
    """The resolved fields of the task's typed configuration; empty for a script."""
    script: str | None = None
    """Path of the script, or the dotted name of a module when `module` is set."""
    module: bool = False
    """Run `script` as `python -m` would."""
    arguments: tuple[str, ...] = ()
    """The script's own arguments, without its name."""
    launcher: tuple[str, ...] = ()
    """The command that starts the training processes, up to the program: `torchrun
    --nproc-per-node=2 --no-python`; (): the run process trains by itself."""
    local_rank_option: str = ""
    """The option by which the launcher passes each process's local rank to the script."""
    working_directory: str = ""
    """"": the process's own."""
    command: tuple[str, ...] = ()
    """The command line as typed, for the record."""
    source: SourceInfo | None = None
    """The git commit of the working directory before the run began."""
    start_paused: bool = False
    steps_per_second: float | None = None
    """The limit that the run begins with; None: full speed."""
    budget: float = 0.01
    """Largest share of step time that measuring may take; 0: every quantity at its natural
    cadence."""
    watch_nonfinite: bool = False
    """Watch the outputs of all modules for nan and inf at every step."""
    attention_pattern: str | None = None
    """Regular expression for the query, key and value parameters where their names are unusual."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: at the end, on request, and at the best validation loss."""
    rules: str = ""
    """Changes to the rules of the findings (see `findings.rule.RuleSettings`)."""
    breakpoints: tuple[Breakpoint, ...] = ()
    """Breakpoints that the run begins with."""
    alerts: tuple[str, ...] = ()
    """Commands and webhooks to call at warnings, errors and the end."""
    changes: tuple[str, ...] = ()
    """Changes of settings before the first step, such as `lr=3e-4`."""
    snapshots: int = 0
    """Bytes of host memory for snapshots of the training, to go back to; 0: none are taken."""
    snapshots_every: int | None = None
    """Steps between snapshots; None: as many as keep their cost small."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints that are kept, in addition to the best one."""
    resume: str | None = None
    """Directory of the checkpoint to resume from."""
    parent: str = ""
    """Directory of the run that wrote that checkpoint."""
    branch_step: int | None = None
    """The step of that checkpoint."""

    @property
    def is_script(self) -> bool:
        """Whether the run trains a user's own script."""
        return self.task == SCRIPT


def write_spec(spec: RunSpec) -> Path:
    """Write `run.json` atomically into the run's directory; returns its path."""
    directory = Path(spec.directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / SPEC_FILE
    with replacing(path) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=2) + b"\n")
    return path


def read_spec(directory: str | os.PathLike[str]) -> RunSpec:
    """The spec in a run's directory.

    Raises FileNotFoundError, or ValueError (msgspec.DecodeError) where it is not a spec.
    """
    return msgspec.json.decode((Path(directory) / SPEC_FILE).read_bytes(), type=RunSpec)


def saved_breakpoints(directory: str | os.PathLike[str]) -> tuple[Breakpoint, ...]:
    """The last breakpoints of a run; none if they cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        data = (Path(directory) / BREAKPOINTS_FILE).read_bytes()
        return msgspec.json.decode(data, type=tuple[Breakpoint, ...])
    return ()


def save_breakpoints(
    directory: str | os.PathLike[str], breakpoints: tuple[Breakpoint, ...]
) -> None:
    """Write the breakpoints atomically; a run that never had any gets no file. Raises OSError."""
    path = Path(directory) / BREAKPOINTS_FILE
    if breakpoints or path.exists():
        with replacing(path) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(breakpoints), indent=2))


# ---------------------------------------------------------------- directories


def runs_directory(override: str | os.PathLike[str] | None = None) -> Path:
    """Where runs are kept: `override`, $TUI_TRAINER_RUNS_DIR, or the user's data directory."""
    if override:
        return Path(override).expanduser().absolute()
    if chosen := os.environ.get(RUNS_DIR_VARIABLE):
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_data_dir("tui-trainer", appauthor=False)) / "runs"


def create_run_directory(task: str, runs: str | os.PathLike[str] | None = None) -> tuple[str, Path]:
    """Create the private directory (0700) of a new run; returns the run's name and the path.

    The name is readable, such as `gpt-quiet-otter`, and unique in its runs directory, because the
    directory is created exclusively. Raises OSError.
    """
    parent = runs_directory(runs)
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for attempt in range(100):
        name = f"{task}-{random_name()}"
        if attempt >= 20:
            name += f"-{secrets.token_hex(2)}"
        try:
            (parent / name).mkdir(mode=0o700)
        except FileExistsError:
            continue
        return name, parent / name
    raise FileExistsError(f"no free run name in {parent}")


def remove_run(directory: Path) -> None:
    """Remove a run's directory, and its socket if that is elsewhere. Raises OSError."""
    with contextlib.suppress(OSError):
        pointed = Path((directory / SOCKET_POINTER_FILE).read_text(encoding="utf-8"))
        if pointed.parent.name.startswith(SOCKET_DIRECTORY_PREFIX):
            pointed.unlink(missing_ok=True)
            pointed.parent.rmdir()
    shutil.rmtree(directory)


# ---------------------------------------------------------------- sockets


def new_socket_path(directory: str | os.PathLike[str]) -> Path:
    """Where the run in `directory` listens; the run process calls this once, before binding.

    The socket is in the run's directory if its path fits into a socket address. Otherwise it is in
    a new private directory (0700) under $XDG_RUNTIME_DIR or the temporary directory, and a pointer
    file holds its path.
    """
    path = Path(directory).absolute() / SOCKET_FILE
    pointer = Path(directory) / SOCKET_POINTER_FILE
    if len(os.fsencode(path)) < MAX_SOCKET_PATH_BYTES:
        pointer.unlink(missing_ok=True)
        return path
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not (base and os.path.isdir(base) and len(os.fsencode(base)) < MAX_SOCKET_PATH_BYTES - 40):
        base = tempfile.gettempdir()
    elsewhere = Path(tempfile.mkdtemp(prefix=SOCKET_DIRECTORY_PREFIX, dir=base)) / SOCKET_FILE
    pointer.write_text(str(elsewhere), encoding="utf-8", errors="surrogateescape")
    return elsewhere


def find_socket(directory: str | os.PathLike[str]) -> Path | None:
    """The socket of the run in `directory`; None when it is not listening."""
    with contextlib.suppress(OSError):
        named = (Path(directory) / SOCKET_POINTER_FILE).read_text(
            encoding="utf-8", errors="surrogateescape"
        )
        return Path(named) if Path(named).exists() else None
    path = Path(directory) / SOCKET_FILE
    return path if path.exists() else None


# ---------------------------------------------------------------- names

ADJECTIVES = """
    able agile amber ample bold brave brisk bright calm clear clever crisp deft eager early easy
    fair fast fine firm fleet fresh gentle glad golden good grand green happy hardy honest jolly
    keen kind light lively lucky mellow merry mild neat nimble noble open patient plain proud quick
    quiet rapid ready rosy royal sharp silent silver smart smooth snug solid steady still sunny sure
    swift tidy true vivid warm wise witty
"""

NOUNS = """
    badger beaver bison crane cricket curlew dolphin dove eagle egret falcon ferret finch fox gecko
    gibbon goose grouse hare hawk heron ibex ibis jackal jay kestrel kite koala lark lemur linnet
    lizard llama lynx magpie marlin marmot marten merlin mole moose newt ocelot octopus orca oriole
    osprey otter owl panda parrot pelican perch pigeon plover puffin quail rabbit raven robin salmon
    seal shrew sparrow squid stork swallow swan tern thrush toad trout turtle viper walrus weasel
    whale wombat wren zebra
"""


def random_name() -> str:
    """An adjective and an animal, such as `quiet-otter`; leaves seeded generators alone."""
    return f"{secrets.choice(ADJECTIVES.split())}-{secrets.choice(NOUNS.split())}"


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
    with replacing(path) as partial:
        partial.write_bytes(msgspec.json.encode(state) + b"\n")


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
    """The name of the machine and, on Linux, its namespace of process numbers: hosts and containers
    may share a runs directory, but cannot look up each other's processes."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()
