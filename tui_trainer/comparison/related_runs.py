"""The recordings of the runs of one tree: the one that a run continues, its branches, and those of
the same run. All of this reads files: the app does it on a thread of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tui_trainer.config.run_state import machine_identity, read_state
from tui_trainer.history.window import Window
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run
from tui_trainer.runs.recording import open_history
from tui_trainer.runs.registry import list_runs
from tui_trainer.store.schema import StoreError

MAX_RELATED = 4
"""Other runs on the charts of one: more cannot be distinguished."""


@dataclass(frozen=True)
class RelatedCurve:
    """A column of a related run."""

    window: Window | None
    """In equal buckets of steps; None where the run does not have the column."""
    newest: float | None


class RelatedRecording:
    """The recording of a run of the same tree. Raises StoreError where it cannot be opened."""

    def __init__(self, run: RunEntry) -> None:
        self.run = run
        self._history = open_history(run.directory)

    def curve(self, table: str, column: str, steps: tuple[int, int], buckets: int) -> RelatedCurve:
        found = self._history.find(table, column)
        if found is None:
            return RelatedCurve(None, None)
        series, index = found
        return RelatedCurve(series.window([index], *steps, buckets), series.newest(column))

    def refresh(self) -> bool:
        """Read what has been recorded since; returns whether that is anything."""
        before = self._history.last_step
        self.run = inspect_run(self.run.directory) or self.run
        self._history.refresh()
        return self._history.last_step != before

    def close(self) -> None:
        self._history.close()


def find_related(info: RunInfo) -> list[RunEntry]:
    """The run that this one continues, then its branches and those of the same run, the newest
    first; none where its directory is on another machine."""
    directory = Path(info.directory) if info.directory else None
    reported = read_state(directory) if directory is not None else None
    if directory is None or reported is None or reported.started_at != info.started_at:
        return []
    if reported.machine not in ("", machine_identity()):
        return []
    parent = Path(info.parent) if info.parent else None
    try:
        runs = list_runs(directory.parent)
        parents = [] if parent is None else [inspect_run(parent)]
    except (RunError, OSError):
        return []
    origins = {str(directory), *([str(parent)] if parent is not None else [])}
    branches = [
        run for run in runs
        if run.reported.parent in origins and run.directory != directory
    ]  # fmt: skip
    return [*filter(None, parents), *branches][:MAX_RELATED]


def open_related(
    entries: Sequence[RunEntry], known: Sequence[RelatedRecording]
) -> tuple[RelatedRecording, ...]:
    """Open the recordings of these runs, reusing `known` ones, and close all others."""
    by_directory = {each.run.directory: each for each in known}
    opened = []
    for entry in entries:
        run = by_directory.pop(entry.directory, None)
        try:
            opened.append(run or RelatedRecording(entry))
        except (StoreError, OSError):
            continue
    for left in by_directory.values():
        left.close()
    return tuple(opened)
