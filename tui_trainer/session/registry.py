"""The runs that there are, and how each is: read from their directories, none of them asked."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tui_trainer.config.spec import SPEC_FILE, find_socket, read_spec, runs_directory
from tui_trainer.config.state import (
    STATE_FILE,
    RunState,
    process_identity,
    read_state,
    this_place,
)
from tui_trainer.protocol.text import harmless, harmless_all
from tui_trainer.session.boot import fatal_words
from tui_trainer.session.trust import RunError, answers, check_directory

STARTING_S = 30.0
"""A run that was made so recently may not have said anything yet."""
SILENT_S = 15.0
"""A run elsewhere, whose process cannot be looked up, is taken for dead after so long a silence."""
LONG_SILENT_S = 3600.0
"""Before its records may be removed from here, such a run must have been silent for so long."""
LIVE = ("live", "paused")


@dataclass(frozen=True)
class Run:
    """One run, as its directory tells it."""

    name: str
    directory: Path
    state: str
    """`live`, `paused`, `finished`, `stopped`, `crashed`, or `refused`: what its directory says
    must not be believed."""
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


def list_runs(runs_dir: str | os.PathLike[str] | None = None) -> list[Run]:
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


def _trusted(directory: Path) -> Run | None:
    try:
        check_directory(directory)
        return look_at(directory)
    except RunError as fault:
        return _refused(directory, fault)
    except OSError:
        return None


def _refused(directory: Path, fault: RunError) -> Run | None:
    """A run that must be listed, since it may be training, and of which nothing must be believed
    but that it is there."""
    try:
        made = (directory / SPEC_FILE).stat().st_mtime
    except OSError:
        return None
    said = RunState(name=directory.name, started_at=made)
    return Run(directory.name, directory, "refused", said, harmless(fault.message), fault.hint)


def look_at(directory: Path) -> Run | None:
    """The run kept in `directory`; None when it holds none."""
    said = read_state(directory)
    if said is not None:
        state, note = judge(said)
        if state == "crashed" and not said.ended and (fatal := fatal_words(directory)):
            note = f"it died: {fatal}"
        return Run(directory.name, directory, state, harmless_all(said), harmless(note))
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
        return Run(directory.name, directory, "live", said, "starting")
    fatal = fatal_words(directory)
    note = f"it died: {fatal}" if fatal else "it ended before its first word"
    return Run(directory.name, directory, "crashed", said, harmless(note))


def may_live(run: Run) -> str:
    """Why this run is not surely over, though it may be said to be; "" when it is. For what cannot
    be undone: a status that is lost or late is no proof of an end."""
    if run.live:
        return f"it is {run.state}"
    if answers(find_socket(run.directory)):
        return "a process still answers on its socket"
    silence = time.time() - run.said.written_at
    if not run.said.ended and run.said.place not in ("", this_place()) and silence < LONG_SILENT_S:
        host = run.said.host or "another machine"
        return f"{host} was heard of {silence:,.0f} s ago, and it cannot be seen from here"
    return ""


def judge(said: RunState) -> tuple[str, str]:
    """(state, why) of a run that last said this of itself."""
    if said.ended:
        return said.state, f"could not start: {said.reason}" if said.refused else said.reason
    alive = "paused" if said.state == "paused" else "live"
    if said.place == this_place():
        if said.began and process_identity(said.pid) == said.began:
            return alive, said.reason
        return "crashed", "its process is gone without an end record"
    silence = time.time() - said.written_at
    if silence < SILENT_S:
        return alive, said.reason
    where = said.host or "another machine"
    return "crashed", f"no sign of life from {where} for {silence:,.0f} s"


# ---------------------------------------------------------------- finding one


def resolve(given: str, runs_dir: str | os.PathLike[str] | None = None) -> Run:
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


def _believed(run: Run) -> Run:
    if run.state == "refused":
        raise RunError(run.note, run.hint)
    return run


def _at(directory: Path) -> Run:
    try:
        check_directory(directory)
    except OSError as fault:
        raise RunError(
            f"there is no run in {directory}", "tui-trainer ls lists the runs"
        ) from fault
    run = look_at(directory)
    if run is None:
        raise RunError(
            f"{directory} is not a run's directory",
            f"a run's directory holds {SPEC_FILE} and {STATE_FILE}",
        )
    return run


def newest(runs: Sequence[Run], live: bool = True) -> Run:
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


def live_socket(run: Run) -> Path:
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
            if run.said.place in ("", this_place())
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
