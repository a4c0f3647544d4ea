"""The runs of one tree: the one that a run continues, its branches, and those of the same run."""

from __future__ import annotations

from collections.abc import Sequence
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
"""Other runs on the charts of one: more cannot be told apart."""
MAX_CACHED = 64


class RelatedRun:
    """The recording of a run of the same tree, with the windows of it that were drawn last. Raises
    StoreError where it cannot be read."""

    def __init__(self, run: RunEntry) -> None:
        self.run = run
        self._history = open_history(run.directory)
        self._windows: dict[tuple[str, str, int, int, int], Window | None] = {}

    @property
    def name(self) -> str:
        return self.run.name

    def window(
        self, table: str, column: str, steps: tuple[int, int], buckets: int
    ) -> Window | None:
        """A column in equal buckets of steps; None where the run does not have it."""
        key = (table, column, *steps, buckets)
        if key not in self._windows:
            if len(self._windows) >= MAX_CACHED:
                self._windows.clear()
            found = self._history.find(table, column)
            window = found[0].window([found[1]], *steps, buckets) if found is not None else None
            self._windows[key] = window
        return self._windows[key]

    def newest(self, table: str, column: str) -> float | None:
        """The newest value of a column."""
        found = self._history.find(table, column)
        return found[0].newest(column) if found is not None else None

    def refresh(self) -> bool:
        """Read what has been recorded since; returns whether that is anything."""
        before = self._history.last_step
        self.run = inspect_run(self.run.directory) or self.run
        self._history.refresh()
        changed = self._history.last_step != before
        if changed:
            self._windows.clear()
        return changed

    def close(self) -> None:
        self._history.close()


def find_related(info: RunInfo) -> list[RunEntry]:
    """The run that this one continues, then its branches and those of the same run, the newest
    first; none where its directory is on another machine. For any thread."""
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
    entries: Sequence[RunEntry], known: Sequence[RelatedRun]
) -> tuple[RelatedRun, ...]:
    """Those runs, of which some are open already; the others that are open are closed."""
    by_directory = {each.run.directory: each for each in known}
    opened = []
    for entry in entries:
        run = by_directory.pop(entry.directory, None)
        try:
            opened.append(run or RelatedRun(entry))
        except (StoreError, OSError):
            continue
    for left in by_directory.values():
        left.close()
    return tuple(opened)
