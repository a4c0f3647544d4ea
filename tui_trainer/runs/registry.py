"""The runs that there are, and how each is: read from their directories, none of them asked."""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from tui_trainer.config.run_spec import (
    SPEC_FILE,
    STATE_FILE,
    RunState,
    find_socket,
    machine_identity,
    process_identity,
    read_spec,
    read_state,
    runs_directory,
)
from tui_trainer.protocol.messages import END_STATES, EndState, Status
from tui_trainer.protocol.schema import DeviceInfo, RunInfo
from tui_trainer.protocol.text import sanitize, sanitize_message
from tui_trainer.runs.security import RunError, answers, check_directory
from tui_trainer.store.reader import StoredHistory

# ---- boot
# What a run process prints before it takes its output over, and what kills it: `boot.log`.


BOOT_LOG = "boot.log"
_READ_BYTES = 64_000
_TAIL_CHARACTERS = 4_000
_FATAL = re.compile(r"^Fatal Python error: .+$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in ', re.MULTILINE)


def last_words(directory: str | os.PathLike[str]) -> str:
    """What killed the process, or the end of what it printed; "" when it printed nothing."""
    try:
        printed = _end_of(directory).strip()
    except OSError as fault:
        return f"cannot read {BOOT_LOG}: {fault.strerror}"
    return fatal(printed) or printed[-_TAIL_CHARACTERS:]


def fatal_words(directory: str | os.PathLike[str]) -> str:
    """What killed the process and where, in one line; "" where nothing says so."""
    try:
        return fatal(_end_of(directory))
    except OSError:
        return ""


def fatal_pages(directory: str | os.PathLike[str]) -> str:
    """All that was printed when the process was killed: the stack of each thread; "" for none."""
    try:
        printed = _end_of(directory)
    except OSError:
        return ""
    found = _FATAL.search(printed)
    return printed[found.start() :] if found else ""


def fatal(printed: str) -> str:
    """What killed the interpreter and where, of the pages that faulthandler prints; "" for none."""
    found = _FATAL.search(printed)
    if found is None:
        return ""
    # Of several threads it is the current one that died; its newest frame comes first.
    frame = _FRAME.search(printed, max(found.end(), printed.find("Current thread")))
    return found[0] + (f" ({os.path.basename(frame[1])}, line {frame[2]})" if frame else "")


def _end_of(directory: str | os.PathLike[str]) -> str:
    with open(Path(directory) / BOOT_LOG, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _READ_BYTES))
        return file.read().decode("utf-8", "replace")


STARTING_S = 30.0
"""A run that was made so recently may not have said anything yet."""
SILENT_S = 15.0
"""A run elsewhere, whose process cannot be looked up, is taken for dead after so long a silence."""
LONG_SILENT_S = 3600.0
"""Before its records may be removed from here, such a run must have been silent for so long."""
LIVE = ("live", "paused")


EntryState = Literal["live", "paused", "finished", "stopped", "crashed", "refused"]


@dataclass(frozen=True)
class RunEntry:
    """One run, as its directory tells it."""

    name: str
    directory: Path
    state: EntryState
    """`refused`: what its directory says cannot be trusted."""
    said: RunState
    """The last that it said of itself."""
    note: str = ""
    """Why it is said to be so, where that needs saying."""
    hint: str = ""
    """What to do about one that is refused."""

    @property
    def live(self) -> bool:
        """Whether its process is there."""
        return self.state in LIVE

    @property
    def end_state(self) -> EndState:
        """How a run without a process ended; `crashed` where its directory cannot be trusted."""
        return self.state if self.state in END_STATES else "crashed"

    @property
    def branched_from(self) -> str:
        """The checkpoint that it goes on from, as `--resume` takes it; "" for a new beginning."""
        if not self.said.parent:
            return ""
        name = Path(self.said.parent).name
        return name if self.said.branch_step is None else f"{name}@{self.said.branch_step}"

    @property
    def socket(self) -> Path | None:
        """Where it listens, or None."""
        return find_socket(self.directory) if self.live else None


def list_runs(runs_dir: str | os.PathLike[str] | None = None) -> list[RunEntry]:
    """All runs in the runs directory, newest first. Raises RunError when it is not safe to read."""
    parent = runs_directory(runs_dir)
    try:
        check_directory(parent)
        entries = [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as fault:
        raise RunError(f"cannot read the runs in {parent}: {fault.strerror or fault}") from fault
    found = [run for entry in entries if (run := _trusted(entry)) is not None]
    return sorted(found, key=lambda run: (run.said.started_at, run.name), reverse=True)


def _trusted(directory: Path) -> RunEntry | None:
    try:
        check_directory(directory)
        return inspect_run(directory)
    except RunError as fault:
        return _refused(directory, fault)
    except OSError:
        return None


def _refused(directory: Path, fault: RunError) -> RunEntry | None:
    """A run that must be listed, since it may be training, and of which nothing must be believed
    but that it is there."""
    try:
        made = (directory / SPEC_FILE).stat().st_mtime
    except OSError:
        return None
    said = RunState(name=directory.name, started_at=made)
    return RunEntry(directory.name, directory, "refused", said, sanitize(fault.message), fault.hint)


def inspect_run(directory: Path) -> RunEntry | None:
    """The run kept in `directory`; None when it holds none."""
    said = read_state(directory)
    if said is not None:
        state, note = judge(said)
        if state == "crashed" and not said.ended and (fatal := fatal_words(directory)):
            note = f"it died: {fatal}"
        return RunEntry(directory.name, directory, state, sanitize_message(said), sanitize(note))
    try:
        made = (directory / SPEC_FILE).stat().st_mtime
        spec = read_spec(directory)
    except (OSError, ValueError):
        return None
    said = RunState(
        name=spec.name,
        task=spec.task,
        title=spec.title,
        started_at=made,
        parent=spec.parent,
        branch_step=spec.branch_step,
    )
    if 0 <= time.time() - made < STARTING_S:
        return RunEntry(directory.name, directory, "live", said, "starting")
    fatal = fatal_words(directory)
    note = f"it died: {fatal}" if fatal else "it ended before its first word"
    return RunEntry(directory.name, directory, "crashed", said, sanitize(note))


def may_live(run: RunEntry) -> str:
    """Why this run is not surely over, though it may be said to be; "" when it is. For what cannot
    be undone: a status that is lost or late is no proof of an end."""
    if run.live:
        return f"it is {run.state}"
    if answers(find_socket(run.directory)):
        return "a process still answers on its socket"
    silence = time.time() - run.said.written_at
    if (
        not run.said.ended
        and run.said.place not in ("", machine_identity())
        and silence < LONG_SILENT_S
    ):
        host = run.said.host or "another machine"
        return f"{host} was heard of {silence:,.0f} s ago, and it cannot be seen from here"
    return ""


def judge(said: RunState) -> tuple[EntryState, str]:
    """(state, why) of a run that last said this of itself."""
    if said.state in END_STATES:
        return said.state, f"could not start: {said.reason}" if said.refused else said.reason
    alive: EntryState = "paused" if said.state == "paused" else "live"
    if said.place == machine_identity():
        if said.began and process_identity(said.pid) == said.began:
            return alive, said.reason
        return "crashed", "its process is gone without an end record"
    silence = time.time() - said.written_at
    if silence < SILENT_S:
        return alive, said.reason
    where = said.host or "another machine"
    return "crashed", f"no sign of life from {where} for {silence:,.0f} s"


# ---------------------------------------------------------------- finding one


def resolve(given: str, runs_dir: str | os.PathLike[str] | None = None) -> RunEntry:
    """The run that a person means: its name, the beginning of it, or its directory.

    Raises RunError, with the near ones as a hint, when there is none or more than one.
    """
    if os.sep in given or given in (".", "..") or given.startswith("~"):
        return _at(Path(given).expanduser().absolute())
    runs = list_runs(runs_dir)
    for run in runs:
        if run.name == given:
            return _believed(run)
    near = [run for run in runs if run.name.startswith(given)] if given else []
    if len(near) == 1:
        return _believed(near[0])
    if near:
        names = ", ".join(run.name for run in near[:8]) + (", …" if len(near) > 8 else "")
        raise RunError(f"{len(near)} runs begin with {given}", f"say which: {names}")
    if given and (Path(given) / SPEC_FILE).is_file():
        return _at(Path(given).absolute())
    raise RunError(f"there is no run {given}", _nearest(given, [run.name for run in runs]))


def _believed(run: RunEntry) -> RunEntry:
    if run.state == "refused":
        raise RunError(run.note, run.hint)
    return run


def _at(directory: Path) -> RunEntry:
    try:
        check_directory(directory)
    except OSError as fault:
        raise RunError(
            f"there is no run in {directory}", "tui-trainer ls lists the runs"
        ) from fault
    run = inspect_run(directory)
    if run is None:
        raise RunError(
            f"{directory} is not a run's directory",
            f"a run's directory holds {SPEC_FILE} and {STATE_FILE}",
        )
    return run


def newest(runs: Sequence[RunEntry], live: bool = True) -> RunEntry:
    """The newest run, of those that are live unless `live` is False. Raises RunError."""
    for run in runs:
        if run.live or (not live and run.state != "refused"):
            return run
    if not runs:
        raise RunError("there are no runs yet", "tui-trainer gpt starts one")
    for run in runs:
        _believed(run)  # it may be the one that is meant
    last = runs[0]
    raise RunError("no run is live", f"the newest, {last.name}, has {_ended_as(last.state)}")


def _ended_as(state: str) -> str:
    return {"finished": "finished", "stopped": "been stopped", "crashed": "crashed"}.get(
        state, state
    )


def live_socket(run: RunEntry) -> Path:
    """Where this run listens. Raises RunError when it has ended or does not listen yet."""
    if not run.live:
        raise RunError(
            f"{run.name} has {_ended_as(run.state)}" + (f": {run.note}" if run.note else ""),
            f"tui-trainer show {run.name} shows the last that is known of it",
        )
    path = find_socket(run.directory)
    if path is None:
        raise RunError(
            f"{run.name} does not listen yet"
            if run.said.state == "starting"
            else f"{run.name} is live but listens nowhere on this machine",
            "try again in a moment"
            if run.said.place in ("", machine_identity())
            else f"it runs on {run.said.host}: attach ssh://{run.said.host}/{run.name}",
        )
    return path


def _nearest(given: str, names: Sequence[str]) -> str:
    if not names:
        return "there are no runs yet: tui-trainer gpt starts one"
    # People misremember whole words of a name, so a part that agrees counts too.
    within = [name for name in names if given.casefold() in name.casefold()]
    near = within or difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(near[:3]) + "?"
    return "there are " + ", ".join(names) if len(names) <= 5 else "tui-trainer ls lists the runs"


# ---- recorded
# A run's store, and whether anybody still writes to it.


def open_history(directory: Path) -> StoredHistory:
    """What a run has recorded, opened so that reading leaves no trace. Raises StoreFault."""
    return StoredHistory(directory, ended=recorded_status(directory)[0])


def recorded_status(directory: Path) -> tuple[bool, Status | None]:
    """Whether nobody writes to a run's store any more, and how it ended if it could not say so."""
    run = inspect_run(directory)
    if run is None or run.live:
        return False, None
    said = run.said
    if said.place == machine_identity() and said.began and process_identity(said.pid) == said.began:
        return False, None  # it has ended, and is writing down the last of it
    return True, Status(state=run.end_state, step=said.step, reason=run.note or said.reason)


def recorded_info(directory: Path) -> RunInfo:
    """What there is to know of a run whose own description cannot be read: what was asked for, and
    what it last said of itself."""
    said = read_state(directory) or RunState(name=directory.name, task="script")
    said = sanitize_message(said)
    info = RunInfo(
        said.name,
        said.task,
        said.title,
        directory=str(directory),
        host=said.host,
        pid=said.pid,
        started_at=said.started_at,
        device=DeviceInfo("", said.device) if said.device else None,
        total_steps=said.total_steps,
        item_unit=said.item_unit,
        parent=said.parent,
        branch_step=said.branch_step,
    )
    try:
        spec = sanitize_message(read_spec(directory))
    except (OSError, ValueError):
        return info
    return msgspec.structs.replace(
        info,
        name=spec.name,
        task=spec.task,
        title=info.title or spec.title,
        command=spec.command,
        configuration=spec.configuration,
        working_directory=spec.working_directory,
        parent=spec.parent,
        branch_step=spec.branch_step,
    )


def last_events(directory: Path) -> Status:
    """How a run last said that it was, where its store does not."""
    said = read_state(directory)
    if said is None:
        return Status()
    return Status(
        state=said.state,
        step=said.step,
        epoch=said.epoch,
        steps_per_second=said.steps_per_second,
        items_per_second=said.items_per_second,
        elapsed_s=said.elapsed_s,
        reason=sanitize(said.reason),
        hint=sanitize(said.hint),
        refused=said.refused,
    )


def with_end(recorded: Status, end: Status | None) -> Status:
    """A killed run could not record how it ended."""
    if end is None or recorded.ended:
        return recorded
    return msgspec.structs.replace(recorded, state=end.state, reason=end.reason)
