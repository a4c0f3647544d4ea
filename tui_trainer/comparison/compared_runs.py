"""Comparing runs: their series on one axis, their outcomes, and how their settings differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tui_trainer.comparison.divergence import RunsCompared, first_difference
from tui_trainer.history.columns import logged_series
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.schema import RunInfo, Scalar
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run
from tui_trainer.runs.recording import open_history, reported_info
from tui_trainer.store.events import StoredEvents
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import StoreError

MAX_RUNS = 8
"""Runs that can be distinguished on one chart."""
SeriesName = Literal["loss", "validation", "norm"]
SERIES: dict[SeriesName, tuple[str, str, str]] = {
    "loss": (schema.STEP, "loss", "Training loss"),
    "validation": (schema.VALIDATION, "loss", "Validation loss"),
    "norm": (schema.STEP, "grad_norm_preclip", "Gradient norm"),
}
"""The series that can be overlaid: table, column and title."""
MAX_LOGGED = 50
"""Number of series logged with `tui_trainer.log` that are compared."""
MAX_SKIPPED = 1000
STEP_BUCKETS = 4
"""Buckets of steps read for each bucket of time, when series are aligned by time."""


@dataclass(frozen=True)
class ComparedCurve:
    """A series in equal buckets of steps or of seconds; nan where nothing was measured."""

    low: NDArray[np.float32]
    """(buckets,)"""
    high: NDArray[np.float32]
    last: NDArray[np.float32]
    filled: NDArray[np.bool_]
    nonfinite: NDArray[np.bool_]


class ComparedRun:
    """A recorded run that is compared. Raises RunError when its recording cannot be read."""

    def __init__(self, run: RunEntry) -> None:
        self.run = run
        try:
            self.history: StoredHistory = open_history(run.directory)
        except (StoreError, OSError) as error:
            raise RunError(f"{run.name} cannot be compared: {error}") from error
        self.info: RunInfo = self.history.store.info() or reported_info(run.directory)
        self.skipped = self._read_skipped()
        """Steps before which iterations were skipped."""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def fault(self) -> str:
        """Description of the part of the recording that cannot be read, or ""."""
        return self.history.store.fault

    def refresh(self) -> None:
        """Read what the run has recorded since the last read."""
        self.run = inspect_run(self.run.directory) or self.run
        self.history.refresh()
        self.info = self.history.store.info() or self.info
        self.skipped = self._read_skipped()

    def _read_skipped(self) -> list[int]:
        events = StoredEvents(self.history.store)
        return [event.step for event in events.of_kind("skipped", MAX_SKIPPED)]

    def seconds_at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds from the end of the run's first step to the end of each of `steps`, which ascend.
        Pauses count; the time before the first step (imports, compilation) does not."""
        first = self.history.step_times.first_step
        if first is None:
            return np.zeros(len(steps))
        seconds = self.history.step_times.times(steps) - first[1]
        return np.maximum.accumulate(np.maximum(seconds, 0.0))

    @property
    def length(self) -> tuple[int, float]:
        """Recorded steps and seconds."""
        last = self.history.last_step
        return last, float(self.seconds_at(np.array([last]))[0])

    def curve(
        self, series: SeriesName, stop: float, buckets: int, by_time: bool = False
    ) -> ComparedCurve | None:
        """A series of SERIES up to `stop`, a step or, with `by_time`, a time in seconds; None when
        the run has not measured the series."""
        found = self.series(series)
        if found is None:
            return None
        table, column = found
        if not by_time:
            window = table.window([column], 1, int(stop) + 1, buckets)
            return ComparedCurve(
                window.low[:, 0],
                window.high[:, 0],
                window.last[:, 0],
                window.filled,
                window.nonfinite[:, 0],
            )
        last = (table.last_step or 0) + 1
        window = table.window([column], 1, last, min(buckets * STEP_BUCKETS, max(1, last - 1)))
        kept = np.flatnonzero(window.filled)
        seconds = self.seconds_at(np.maximum(window.edges[1:][kept] - 1, 0))
        place = np.minimum((seconds / max(stop, 1e-9) * buckets).astype(np.int64), buckets - 1)
        return _into_buckets(
            place,
            buckets,
            window.low[kept, 0],
            window.high[kept, 0],
            window.last[kept, 0],
            window.nonfinite[kept, 0],
        )

    def series(self, series: SeriesName) -> tuple[SeriesReader, int] | None:
        """Table and column of a series of SERIES; None when it has no rows."""
        name, column, _ = SERIES[series]
        return self.history.find(name, column)

    def newest(self, series: SeriesName) -> float | None:
        """The newest value of a series of SERIES that was measured; None when there is none."""
        found = self.series(series)
        if found is None:
            return None
        table, column = found
        return table.newest_measured(table.table.columns[column].name)


def _into_buckets(
    place: NDArray[np.int64],
    buckets: int,
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    last: NDArray[np.float32],
    bad: NDArray[np.bool_],
) -> ComparedCurve:
    """Lowest, highest and last value of each bucket; `place` is the bucket of each value."""
    lows = np.full(buckets, np.inf, np.float32)
    highs = np.full(buckets, -np.inf, np.float32)
    np.fmin.at(lows, place, low)
    np.fmax.at(highs, place, high)
    lasts = np.full(buckets, np.nan, np.float32)
    lasts[place] = last
    filled = np.zeros(buckets, np.bool_)
    filled[place] = True
    nonfinite = np.zeros(buckets, np.bool_)
    nonfinite[place[bad]] = True
    empty = lows > highs
    lows[empty] = highs[empty] = np.nan
    return ComparedCurve(lows, highs, lasts, filled, nonfinite)


@dataclass(frozen=True)
class ComparedSeries:
    """One series of all runs, in the buckets of a chart."""

    buckets: int
    by_time: bool
    stop: float
    """The last step, or second, of the longest run."""
    curves: tuple[ComparedCurve | None, ...]
    newest: tuple[float | None, ...]


def read_series(
    runs: Sequence[ComparedRun], series: SeriesName, buckets: int, by_time: bool
) -> ComparedSeries:
    stop = max(1.0, *(run.length[1 if by_time else 0] for run in runs))
    curves = tuple(run.curve(series, stop, buckets, by_time) for run in runs)
    return ComparedSeries(buckets, by_time, stop, curves, tuple(run.newest(series) for run in runs))


# ---------------------------------------------------------------- tables of runs


@dataclass(frozen=True)
class ComparedValue:
    """One row of a table with a column per run."""

    name: str
    values: tuple[Scalar, ...]
    """One value per run; None where a run has none."""


def outcome(runs: Sequence[ComparedRun]) -> list[ComparedValue]:
    """State, length, and last and best values of each run."""
    found = [_outcome_of(run) for run in runs]
    names = dict.fromkeys(name for each in found for name in each)
    return [ComparedValue(name, tuple(each.get(name) for each in found)) for name in names]


def _outcome_of(run: ComparedRun) -> dict[str, Scalar]:
    steps, seconds = run.length
    values: dict[str, Scalar] = {
        "state": run.run.state,
        "steps": steps,
        "seconds": round(seconds, 1),
    }
    if run.skipped:
        values["skipped iterations"] = len(run.skipped)
    names: dict[SeriesName, str] = {
        "loss": "loss",
        "validation": "validation loss",
        "norm": "gradient norm",
    }
    for series, name in names.items():
        lowest = series != "norm"
        found = run.series(series)
        if found is None:
            continue
        table, column = found
        values[f"{name}, last"] = run.newest(series)
        first, last = table.first_step or 0, (table.last_step or 0) + 1
        seen = table.window([column], first, last, 1)
        best = float(seen.low[0, 0] if lowest else seen.high[0, 0])
        values[f"{name}, {'best' if lowest else 'highest'}"] = None if math.isnan(best) else best
    accuracy = run.history.find(schema.VALIDATION, "accuracy")
    if accuracy is not None:
        values["accuracy, last"] = accuracy[0].newest("accuracy")
    for each in logged_series(run.history)[:MAX_LOGGED]:
        newest, highest = each.newest(), each.best()
        if newest is not None and why_absent(newest[1]) is None:
            values[f"{each.name} (logged), last"] = newest[1]
        if highest is not None:
            which = "lowest" if each.better == "lower" else "highest"
            values[f"{each.name} (logged), {which}"] = highest
    return values


@dataclass(frozen=True)
class ComparedValues:
    """Rows of the table of differences, and the series that have a chart."""

    measured: frozenset[SeriesName]
    """Series that at least one run has measured."""
    settings: Sequence[ComparedValue]
    outcomes: Sequence[ComparedValue]


def read_values(runs: Sequence[ComparedRun]) -> ComparedValues:
    measured = {name for name in SERIES if any(run.series(name) is not None for run in runs)}
    return ComparedValues(frozenset(measured), differences(runs), outcome(runs))


def differences(runs: Sequence[ComparedRun]) -> list[ComparedValue]:
    """The settings that differ: options, data, device, versions, the user's own code."""
    found = [_settings(run.info) for run in runs]
    names = dict.fromkeys(name for each in found for name in each)
    lines = [ComparedValue(name, tuple(each.get(name) for each in found)) for name in names]
    return [line for line in lines if len({_distinct(value) for value in line.values}) > 1]


def _distinct(value: Scalar) -> tuple[str, Scalar]:
    return type(value).__name__, value  # 1 == True, but they are different settings


def _settings(info: RunInfo) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {"task": info.task, **info.configuration}
    if info.is_script:
        values["command"] = " ".join(info.command)
    values |= {f"data: {name}": value for name, value in info.facts.items()}
    values["parameters"] = sum(each.numel for each in info.parameters if each.trainable) or None
    if info.device is not None:
        values["device"] = info.device.name
        values["torch threads"] = info.device.threads
    values["host"] = info.host
    values |= {f"version of {name}": value for name, value in info.versions.items()}
    if info.source is not None:
        values["commit"] = info.source.commit[:12] + (" + changes" if info.source.dirty else "")
    if info.parent:
        values["resumed from"] = (
            f"{info.parent.rpartition('/')[2]} at step {info.branch_step or 0:,}"
        )
    return values


# ---------------------------------------------------------------- where runs diverge


@dataclass(frozen=True)
class Divergence:
    """The first difference of a run from the first of the compared runs."""

    number: int
    """Index of the run."""
    found: RunsCompared


def find_divergences(runs: Sequence[RunEntry], tolerance: float) -> list[Divergence]:
    """Compare every run with the first one. May run on any thread, since it opens the recordings
    itself. Runs that cannot be read are left out."""
    divergences: list[Divergence] = []
    with ExitStack() as stack:
        histories: list[StoredHistory | None] = []
        for run in runs:
            try:
                histories.append(stack.enter_context(closing(open_history(run.directory))))
            except (StoreError, OSError):
                histories.append(None)
        first = histories[0] if histories else None
        for number, history in enumerate(histories[1:], 1):
            if first is not None and history is not None:
                found = first_difference(first, history, tolerance)
                divergences.append(Divergence(number, found))
    return divergences
