"""The other runs of the tree of the run on the screen: the run that it continues, and the branches
of both. They are found and read on a separate thread, so that the event loop never waits for a
disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from tui_trainer.client.api import Snapshot
from tui_trainer.config.run_spec import machine_identity, read_state
from tui_trainer.history.window import Window, equal_edges
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run
from tui_trainer.runs.registry import list_runs
from tui_trainer.ui.reader_thread import ReaderThread

MAX_RELATED = 4
"""Maximum number of other runs in a chart: more cannot be distinguished."""


@dataclass(frozen=True)
class RelatedCurve:
    """A column of a related run."""

    window: Window | None
    """In equal buckets of steps; None where the run does not have the column."""
    newest: float | None


class RelatedRecording:
    """The recording of a run of the same tree. Raises StoreError where it cannot be opened."""

    def __init__(self, run: RunEntry) -> None:
        # Imported here, since few runs have relatives: the first paint does not wait for SQLite.
        from tui_trainer.runs.recording import open_history

        self.run = run
        self._history = open_history(run.directory)

    def curve(self, table: str, column: str, steps: tuple[int, int], buckets: int) -> RelatedCurve:
        found = self._history.find(table, column)
        if found is None:
            return RelatedCurve(None, None)
        series, index = found
        return RelatedCurve(series.window([index], *steps, buckets), series.newest(column))

    def refresh(self) -> bool:
        """Read what the run has recorded since the last read; returns whether it has new steps."""
        before = self._history.last_step
        self.run = inspect_run(self.run.directory) or self.run
        self._history.refresh()
        return self._history.last_step != before

    def close(self) -> None:
        self._history.close()


def find_related(info: RunInfo) -> list[RunEntry]:
    """The run that this one continues, then the branches of both, newest first; none when the
    directory is on another machine."""
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
        except read_errors():
            continue
    for left in by_directory.values():
        left.close()
    return tuple(opened)


def read_errors() -> tuple[type[Exception], ...]:
    """The exceptions that reading a recording raises."""
    from tui_trainer.store.schema import READ_ERRORS, StoreError

    return (StoreError, OSError, *READ_ERRORS)


CurveKey = tuple[str, str, int]
"""(table, column, buckets)"""
MAX_CURVES = 512
"""Curves that are kept of a run: more than any screen shows."""


@dataclass
class CachedCurve:
    """A curve of a related run, as it was read last."""

    curve: RelatedCurve
    steps: tuple[int, int]
    """(first step, end) that the curve was read for."""
    outdated: bool = False
    """Whether the run has recorded more since."""


class CachedRun:
    """Implements `client.api.RelatedRun` with the curves read so far. Missing and outdated curves
    are read on the thread and drawn later."""

    def __init__(self, run: RunEntry, read: Callable[[], None]) -> None:
        """`read` is called when `wanted` has grown."""
        self.run = run
        self.wanted: dict[CurveKey, tuple[int, int]] = {}
        """Curves to read, with their steps."""
        self._read = read
        self._curves: dict[CurveKey, CachedCurve] = {}

    @property
    def name(self) -> str:
        return self.run.name

    def window(
        self, table: str, column: str, steps: tuple[int, int], buckets: int
    ) -> Window | None:
        """A column in equal buckets of steps; None when the run has no such column, or has not been
        read yet. A window that was read for other steps is moved to `steps` until these are
        read."""
        key = (table, column, buckets)
        known = self._curves.get(key)
        if known is None or known.outdated or known.steps != steps:
            self.wanted[key] = steps
            self._read()
        if known is None or known.curve.window is None:
            return None
        return known.curve.window if known.steps == steps else moved(known.curve.window, steps)

    def newest(self, table: str, column: str) -> float | None:
        """The newest value of a column that has been read."""
        # From the end: curves of an earlier width are not refreshed any more.
        curves = reversed(self._curves.items())
        return next((c.curve.newest for key, c in curves if key[:2] == (table, column)), None)

    def keep(self, curves: Mapping[CurveKey, CachedCurve]) -> None:
        """Cache these curves in place of earlier ones with the same keys."""
        for key, curve in curves.items():
            self._curves.pop(key, None)  # to the end
            self._curves[key] = curve
        for key in list(self._curves)[:-MAX_CURVES]:
            del self._curves[key]

    def invalidate(self) -> None:
        """Read the curves again when they are drawn next, since the run has recorded more."""
        for curve in self._curves.values():
            curve.outdated = True


def moved(window: Window, steps: tuple[int, int]) -> Window:
    """A window over other steps, to the nearest of its buckets."""
    buckets = len(window.filled)
    edges = equal_edges(*steps, buckets)
    middles = (edges[:-1] + edges[1:] - 1) // 2
    at = np.searchsorted(window.edges, middles, "right") - 1
    inside = (at >= 0) & (at < buckets)
    at = at.clip(0, buckets - 1)
    covered = inside[:, None]
    return Window(
        edges,
        np.where(covered, window.low[at], np.nan),
        np.where(covered, window.high[at], np.nan),
        np.where(covered, window.last[at], np.nan),
        inside & window.filled[at],
        covered & window.nonfinite[at],
        np.where(covered, window.flags[at], 0).astype(window.flags.dtype),
    )


class CallOnLoop(Protocol):
    """Calls a function on the event loop, from any thread."""

    def __call__(self, callback: Callable[..., object], *arguments: object) -> None: ...


class RelatedRuns:
    """Finds the other runs of the tree of the run on the screen, and reads them. Used on the event
    loop; the methods whose names begin with `_load` run on a thread, one after another."""

    def __init__(self, schedule: CallOnLoop, changed: Callable[[], None]) -> None:
        """`changed` is called on the event loop when the charts would show something else."""
        self.runs: tuple[CachedRun, ...] = ()
        self._schedule, self._changed = schedule, changed
        self._info: RunInfo | None = None
        """Description of the run on the screen."""
        self._reading = False
        self._refreshing = False
        self._thread = ReaderThread(
            "tui-trainer related runs", lambda: self._schedule(self._failed)
        )
        self._recordings: tuple[RelatedRecording, ...] = ()
        """Used by the thread alone."""

    def follow(self, before: Snapshot, new: Snapshot) -> None:
        """Look for the other runs of the tree when the run is known and when a branch is made."""
        info = new.info
        if info is None:
            return
        fresh = new.events[-3:] if new.events is not before.events else ()
        made = any(isinstance(each, Notice) and each.kind == "branch" for each in fresh)
        another = self._info is None or self._info.directory != info.directory
        if another:
            self.runs = ()
        self._info = info
        if another or made:
            self.find()

    def find(self) -> None:
        """Look for other runs of the tree."""
        if self._info is not None:
            self._thread.put(partial(self._load_runs, self._info))

    def refresh(self) -> None:
        """Read the new steps of the runs that still train."""
        if not self._refreshing and any(each.run.live for each in self.runs):
            self._refreshing = True
            self._thread.put(self._load_live_runs)

    def close(self) -> None:
        """Close the recordings, and end the thread."""
        self.runs = ()
        self._thread.close(self._load_nothing)

    # ------------------------------------------------------------ on the event loop

    def _read(self) -> None:
        """Read the curves that the charts want, once all charts have been drawn."""
        if not self._reading:
            self._reading = True
            self._schedule(self._read_wanted)

    def _read_wanted(self) -> None:
        wanted = [(each, each.wanted) for each in self.runs if each.wanted]
        for run, _ in wanted:
            run.wanted = {}
        self._thread.put(partial(self._load_curves, wanted))

    def _found(self, info: RunInfo, entries: Sequence[RunEntry]) -> None:
        if self._info is None or info.directory != self._info.directory:
            return
        known = {each.run.directory: each for each in self.runs}
        before = self.runs
        self.runs = tuple(
            known.get(entry.directory) or CachedRun(entry, self._read) for entry in entries
        )
        for run, entry in zip(self.runs, entries, strict=True):
            run.run = entry
        if self.runs != before:
            self._changed()

    def _failed(self) -> None:
        """Called after an error in a job; drawn curves and live runs are requested again later."""
        self._reading = self._refreshing = False

    def _refreshed(self, entries: Mapping[Path, RunEntry]) -> None:
        self._refreshing = False
        for each in self.runs:
            if each.run.directory in entries:
                each.run = entries[each.run.directory]
                each.invalidate()
        if entries:
            self._changed()

    def _curves_read(self, found: Sequence[tuple[CachedRun, dict[CurveKey, CachedCurve]]]) -> None:
        self._reading = False
        for run, curves in found:
            run.keep(curves)
        self._changed()

    # ------------------------------------------------------------ on the thread

    def _load_runs(self, info: RunInfo) -> None:
        self._recordings = open_related(find_related(info), self._recordings)
        self._schedule(self._found, info, [each.run for each in self._recordings])

    def _load_live_runs(self) -> None:
        changed = {}
        for each in self._recordings:
            try:
                if each.run.live and each.refresh():
                    changed[each.run.directory] = each.run
            except read_errors():
                continue
        self._schedule(self._refreshed, changed)

    def _load_curves(
        self, wanted: Sequence[tuple[CachedRun, Mapping[CurveKey, tuple[int, int]]]]
    ) -> None:
        recordings = {each.run.directory: each for each in self._recordings}
        found = []
        for run, keys in wanted:
            recording = recordings.get(run.run.directory)
            curves = {}
            for (table, column, buckets), steps in keys.items():
                curve = RelatedCurve(None, None)
                if recording is not None:
                    with suppress(*read_errors()):
                        curve = recording.curve(table, column, steps, buckets)
                curves[table, column, buckets] = CachedCurve(curve, steps)
            found.append((run, curves))
        self._schedule(self._curves_read, found)

    def _load_nothing(self) -> None:
        self._recordings = open_related((), self._recordings)
