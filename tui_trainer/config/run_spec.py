"""What the command line tells the run process: a `RunSpec`, kept as `run.json` beside the run.

Torch-free and quick to import: the app reads and writes it before anything is painted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

import msgspec
import platformdirs

from tui_trainer.protocol.messages import State
from tui_trainer.protocol.schema import Scalar

# ---- state
# What a run says of itself on disk, `status.json`: enough to list runs without asking any of them.
#
# The run process writes it at its start, about once a second and at its end; whoever lists runs
# compares the process named in it with those that there are, so that a run killed without a word
# is
# known to have crashed. A process is told from a later one with the same number by when it began.


STATE_FILE = "status.json"
ENDED = ("finished", "stopped", "crashed")


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """The last that a run said of itself."""

    name: str
    task: str = ""
    title: str = ""
    state: State = "starting"
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
def machine_identity() -> str:
    """Names the machine and, on Linux, the set of process numbers that this process sees: with a
    runs directory shared between hosts or containers, elsewhere's processes cannot be looked up."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


# ---- names
# Names for runs that people can read, say and type.


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
    """Such as `quiet-otter`; drawn from the system's randomness, never from a seeded generator."""
    return f"{secrets.choice(ADJECTIVES.split())}-{secrets.choice(NOUNS.split())}"


SPEC_FILE = "run.json"
SOCKET_FILE = "run.sock"
SOCKET_POINTER_FILE = "socket"
LOG_FILE = "log.txt"
ELSEWHERE = "tui-trainer-"
"""How the directory of a socket begins that is not in its run's."""
RUNS_DIR_VARIABLE = "TUI_TRAINER_RUNS_DIR"
MAX_SOCKET_PATH_BYTES = 100
"""sun_path holds 108 bytes on Linux and 104 on macOS, the final NUL included."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the run process needs to know to train."""

    name: str
    directory: str
    """The run's directory, absolute."""
    task: str
    """`gpt`, `vit`, a third party's task, or `script`."""
    title: str = ""
    """One line for the header; "" lets the run make one up from task and preset or script."""
    configuration: dict[str, Scalar] = {}
    """The resolved fields of the task's typed configuration; empty for a script."""
    script: str | None = None
    """Path of the script, or the module's dotted name when `module` is set."""
    module: bool = False
    """Run `script` as `python -m` would."""
    arguments: tuple[str, ...] = ()
    """The script's own arguments, without its name."""
    working_directory: str = ""
    """Where the command was given; "" is the process's own."""
    command: tuple[str, ...] = ()
    """The command line as given, for people and for the record."""
    start_paused: bool = False
    budget: float = 0.01
    """Share of step time that measuring may cost; 0: each quantity at its natural cadence."""
    attention_pattern: str | None = None
    """Regular expression that names the query, key and value parameters where names mislead."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: at the end, when asked, and at the best validation loss."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept, the best one besides."""
    resume: str | None = None
    """Directory of the checkpoint to go on from."""
    parent: str = ""
    """Directory of the run whose checkpoint that is."""
    branch_step: int | None = None
    """The step of that checkpoint."""


def runs_directory(override: str | os.PathLike[str] | None = None) -> Path:
    """Where runs are kept: `override`, $TUI_TRAINER_RUNS_DIR, or the user's data directory."""
    if override:
        return Path(override).expanduser().absolute()
    if chosen := os.environ.get(RUNS_DIR_VARIABLE):
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_data_dir("tui-trainer", appauthor=False)) / "runs"


def create_run_directory(task: str, runs: str | os.PathLike[str] | None = None) -> tuple[str, Path]:
    """Make the private directory (0700) of a new run; returns its name and its path.

    The name is readable, such as `gpt-quiet-otter`, and unique among the runs kept there, because
    the directory itself is made exclusively. Raises OSError when it cannot be made.
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


def write_spec(spec: RunSpec) -> Path:
    """Write `run.json` into the run's directory, whole or not at all; returns its path."""
    directory = Path(spec.directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / SPEC_FILE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=2) + b"\n")
    temporary.replace(path)
    return path


def read_spec(directory: str | os.PathLike[str]) -> RunSpec:
    """The spec kept in a run's directory.

    Raises FileNotFoundError, or ValueError (msgspec.DecodeError) when it is not such a file.
    """
    return msgspec.json.decode((Path(directory) / SPEC_FILE).read_bytes(), type=RunSpec)


def remove_run(directory: Path) -> None:
    """Remove a run's directory with all that is in it, and its socket elsewhere. Raises OSError."""
    with contextlib.suppress(OSError):
        pointed = Path((directory / SOCKET_POINTER_FILE).read_text(encoding="utf-8"))
        if pointed.parent.name.startswith(ELSEWHERE):
            pointed.unlink(missing_ok=True)
            pointed.parent.rmdir()
    shutil.rmtree(directory)


def new_socket_path(directory: str | os.PathLike[str]) -> Path:
    """Where the run in `directory` shall listen: the run process calls this once, before binding.

    It is in the run's directory when the path fits a socket address; otherwise in a new private
    (0700) directory under $XDG_RUNTIME_DIR or the temporary directory, noted in a pointer file.
    """
    path = Path(directory).absolute() / SOCKET_FILE
    pointer = Path(directory) / SOCKET_POINTER_FILE
    if len(os.fsencode(path)) < MAX_SOCKET_PATH_BYTES:
        pointer.unlink(missing_ok=True)
        return path
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not (base and os.path.isdir(base) and len(os.fsencode(base)) < MAX_SOCKET_PATH_BYTES - 40):
        base = tempfile.gettempdir()
    elsewhere = Path(tempfile.mkdtemp(prefix=ELSEWHERE, dir=base)) / SOCKET_FILE
    pointer.write_text(str(elsewhere), encoding="utf-8", errors="surrogateescape")
    return elsewhere


def find_socket(directory: str | os.PathLike[str]) -> Path | None:
    """The socket of the run in `directory`, or None when it listens on none (yet, or any more)."""
    with contextlib.suppress(OSError):
        named = (Path(directory) / SOCKET_POINTER_FILE).read_text(
            encoding="utf-8", errors="surrogateescape"
        )
        return Path(named) if Path(named).exists() else None
    path = Path(directory) / SOCKET_FILE
    return path if path.exists() else None
