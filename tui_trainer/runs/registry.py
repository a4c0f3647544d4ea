"""The runs directory: lists its runs, and finds the run that a command line names."""

from __future__ import annotations

import contextlib
import difflib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from tui_trainer.config.run_spec import (
    SPEC_FILE,
    STATE_FILE,
    RunState,
    find_socket,
    machine_identity,
    runs_directory,
)
from tui_trainer.protocol.messages import EntryState
from tui_trainer.protocol.text import sanitize
from tui_trainer.runs.errors import NotListening, RunError, RunGone
from tui_trainer.runs.liveness import RunEntry, inspect_run
from tui_trainer.runs.security import check_directory, connect_unix


def list_runs(runs_dir: str | os.PathLike[str] | None = None) -> list[RunEntry]:
    """All runs in the runs directory, newest first. Raises RunError when it cannot be trusted or
    read."""
    parent = runs_directory(runs_dir)
    try:
        check_directory(parent)
        folders = [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read the runs in {parent}: {error.strerror or error}") from error
    found = [run for folder in folders if (run := _checked(folder)) is not None]
    return sorted(found, key=lambda run: (run.reported.started_at, run.name), reverse=True)


def _checked(directory: Path) -> RunEntry | None:
    try:
        check_directory(directory)
        return inspect_run(directory)
    except RunError as error:
        return _refused(directory, error)
    except OSError:
        return None


def _refused(directory: Path, error: RunError) -> RunEntry | None:
    """The entry of a run whose directory cannot be trusted. The run is listed, since it may be
    training, but nothing from its directory is shown."""
    try:
        created_at = (directory / SPEC_FILE).stat().st_mtime
    except OSError:
        return None
    reported = RunState(name=directory.name, started_at=created_at)
    note = sanitize(error.message)
    return RunEntry(directory.name, directory, "refused", reported, note, error.hint)


def resolve(given: str, runs_dir: str | os.PathLike[str] | None = None) -> RunEntry:
    """The run that `given` names: by name, by the beginning of a name, or by directory.

    Raises RunError when there is none or more than one, with similar names as a hint.
    """
    if os.sep in given or given in (".", "..") or given.startswith("~"):
        return _at(Path(given).expanduser().absolute())
    runs = list_runs(runs_dir)
    for run in runs:
        if run.name == given:
            return _trusted(run)
    matches = [run for run in runs if run.name.startswith(given)] if given else []
    if len(matches) == 1:
        return _trusted(matches[0])
    if matches:
        names = ", ".join(run.name for run in matches[:8]) + (", …" if len(matches) > 8 else "")
        raise RunError(f"{len(matches)} runs begin with {given}", f"name one: {names}")
    if given and (Path(given) / SPEC_FILE).is_file():
        return _at(Path(given).absolute())
    raise RunError(f"there is no run {given}", _similar(given, [run.name for run in runs]))


def _trusted(run: RunEntry) -> RunEntry:
    if run.state == "refused":
        raise RunError(run.note, run.hint)
    return run


def _at(directory: Path) -> RunEntry:
    try:
        check_directory(directory)
    except OSError as error:
        raise RunError(
            f"there is no run in {directory}", "tui-trainer ls lists the runs"
        ) from error
    run = inspect_run(directory)
    if run is None:
        raise RunError(
            f"{directory} is not a run's directory",
            f"a run's directory holds {SPEC_FILE} and {STATE_FILE}",
        )
    return run


def newest(runs: Sequence[RunEntry], live: bool = True) -> RunEntry:
    """The newest live run, or the newest run if `live` is False, of `runs` sorted newest first.
    Raises RunError."""
    for run in runs:
        if run.live or (not live and run.state != "refused"):
            return run
    if not runs:
        raise RunError("there are no runs yet", "tui-trainer gpt starts one")
    for run in runs:
        _trusted(run)  # a refused run may be the live one that is meant
    last = runs[0]
    raise RunError("no run is live", f"the newest, {last.name}, has {_ended_as(last.state)}")


def one_of_each_process(runs: Sequence[RunEntry]) -> list[RunEntry]:
    """`runs` without live branches of a script, which the process of an older run records."""
    oldest: dict[tuple[str, int, str], RunEntry] = {}
    for run in sorted(runs, key=lambda run: run.reported.started_at):
        if run.live:
            oldest.setdefault(_process(run), run)
    return [run for run in runs if not run.live or oldest[_process(run)] is run]


def _process(run: RunEntry) -> tuple[str, int, str]:
    """A key that identifies the process of a run."""
    reported = run.reported
    if not reported.process:
        return str(run.directory), 0, ""
    return reported.machine, reported.pid, reported.process


def live_socket(run: RunEntry) -> Path:
    """The socket a live run listens on. Raises RunGone when it has ended and NotListening when it
    has no socket."""
    if not run.live:
        raise RunGone(
            f"{run.name} has {_ended_as(run.state)}" + (f": {run.note}" if run.note else ""),
            f"tui-trainer show {run.name} shows what was recorded of it",
            run.end_state,
        )
    path = find_socket(run.directory)
    if path is not None:
        return path
    reported = run.reported
    if reported.state == "starting":
        message = f"{run.name} does not listen yet"
    else:
        message = f"{run.name} is live but does not listen on this machine"
    if reported.machine in ("", machine_identity()):
        raise NotListening(message, "try again in a moment")
    address = f"ssh://{reported.host}/{run.name}"
    raise NotListening(message, f"it runs on {reported.host}: tui-trainer attach {address}")


def connect_run(directory: str | os.PathLike[str]) -> socket.socket:
    """Connect to the run in `directory`, regardless of its status.

    Raises NotListening and Unreachable while the run is live, RunGone when it is not.
    """
    directory = Path(directory).absolute()
    try:
        check_directory(directory)
        path = find_socket(directory)
        if path is not None:
            with contextlib.suppress(NotListening):
                return connect_unix(path)
    except OSError as error:
        raise RunGone(f"there is no run in {directory}: {error.strerror}") from error
    run = inspect_run(directory)
    if run is None:
        raise RunGone(f"there is no run in {directory}")
    live_socket(run)
    raise NotListening("waiting for the run to listen")


def _ended_as(state: EntryState) -> str:
    return "been stopped" if state == "stopped" else state


def _similar(given: str, names: Sequence[str]) -> str:
    if not names:
        return "there are no runs yet: tui-trainer gpt starts one"
    # Users often remember only part of a name, so a part that matches counts as well.
    within = [name for name in names if given.casefold() in name.casefold()]
    near = within or difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(near[:3]) + "?"
    return "there are " + ", ".join(names) if len(names) <= 5 else "tui-trainer ls lists the runs"
