"""When each step of a recorded run ended (table `step_time`)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Steps
from tui_trainer.store import codec
from tui_trainer.store.codec import CHUNK, StepTimes
from tui_trainer.store.database import TIMES, Store

# ---------------------------------------------------------------- writing


class StepTimesWriter:
    """Writes when each step ended. Each commit rewrites the newest piece until it is full."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, float, float]] = []
        """(seq, step, time, own_ms) of the newest piece, then of entries that wait."""
        self._committed = 0
        """Number of entries that are in the database, in row `_row`."""
        self._row: int | None = None
        self._row_after: int | None = None

    def add(self, seq: int, step: int, time: float, own_ms: float) -> None:
        """Take a step, or with an `own_ms` of nan a row measured outside a step."""
        self._entries.append((seq, step, time, own_ms))

    def reopened(self) -> None:
        """Start a new piece with the entries that are not written yet."""
        del self._entries[: self._committed]
        self._committed, self._row = 0, None

    def write(self, connection: sqlite3.Connection, first_seq: int) -> None:
        self._row_after = self._row
        if len(self._entries) == self._committed:
            return
        for start in range(0, len(self._entries), CHUNK):
            seq, step, time, own_ms = zip(*self._entries[start : start + CHUNK], strict=True)
            piece = StepTimes(
                np.array(seq, np.int64) + first_seq,
                np.array(step, np.int64),
                np.array(time, np.float64),
                np.array(own_ms, np.float32),
            )
            row = self._row if start == 0 else None
            self._row_after = connection.execute(
                "INSERT OR REPLACE INTO step_time VALUES (?, ?, ?, ?, ?)",
                (row, int(piece.seq[-1]), *_last_step(piece), codec.pack_step_times(piece)),
            ).lastrowid

    def written(self) -> None:
        del self._entries[: len(self._entries) // CHUNK * CHUNK]
        self._committed = len(self._entries)
        self._row = self._row_after if self._entries else None


def _last_step(piece: StepTimes) -> tuple[int, float]:
    """The last step of a piece, and when it ended. Rows measured outside a step count only in a
    piece without steps: they overtake steps whose values are still on their way to the host."""
    steps = np.flatnonzero(~np.isnan(piece.own_ms))
    at = steps[-1] if len(steps) else -1
    return int(piece.step[at]), float(piece.time[at])


# ---------------------------------------------------------------- reading

MAX_PIECES = 512
"""Maximum number of pieces that `StepTimesReader.times` reads at once."""


class StepTimesReader:
    """Reads when the steps of a recorded run ended."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ids = self._last_steps = np.zeros(0, np.int64)
        self._last_times = np.zeros(0)
        self._first: tuple[int, float] | None = None

    def refresh(self) -> None:
        """Read what is stored now."""
        keep = max(0, len(self._ids) - 1)  # the newest piece may have grown
        after_step = int(self._last_steps[keep - 1]) if keep else -1
        after_id = int(self._ids[keep - 1]) if keep else 0
        sql = (
            "SELECT id, last_step, last_time FROM step_time WHERE last_step >= ? "
            "ORDER BY last_step, id"
        )
        found = self._store.numbers(TIMES, sql, after_step)
        fresh = np.array([row for row in found if row[0] > after_id], np.float64).reshape(-1, 3)
        self._ids = np.append(self._ids[:keep], fresh[:, 0].astype(np.int64))
        self._last_steps = np.append(self._last_steps[:keep], fresh[:, 1].astype(np.int64))
        self._last_times = np.append(self._last_times[:keep], fresh[:, 2])

    def pieces(self) -> Iterator[StepTimes]:
        """All times, in the order of seq."""
        rows = self._store.stream("SELECT data FROM step_time ORDER BY id")
        return self._store.decoded(TIMES, codec.unpack_step_times, rows)

    @property
    def first_step(self) -> tuple[int, float] | None:
        """The first step recorded, and when it ended."""
        if self._first is None:
            for piece in self.pieces():
                steps = np.flatnonzero(~np.isnan(piece.own_ms))
                if len(steps):
                    self._first = int(piece.step[steps[0]]), float(piece.time[steps[0]])
                    break
        return self._first

    def time_of(self, step: int) -> float:
        """When a step ended, in seconds since the epoch; nan if that is not known."""
        place = int(np.searchsorted(self._last_steps, step))
        if place < len(self._ids):
            steps, times = self._piece(place)
            at = int(np.searchsorted(steps, step))
            if at < len(steps) and steps[at] == step:
                return float(times[at])
        return float("nan")

    def times(self, steps: Steps) -> NDArray[np.float64]:
        """When steps ended, interpolated where they were not recorded; nan before the first.

        Where they are spread over more than MAX_PIECES pieces, one time every 512 steps is enough.
        """
        if not len(self._ids):
            return np.full(len(steps), np.nan)
        places = np.unique(np.searchsorted(self._last_steps, steps).clip(0, len(self._ids) - 1))
        known = [(self._last_steps, self._last_times)]
        if self.first_step is not None:
            first, time = self.first_step
            known.append((np.array([first]), np.array([time])))
        if len(places) <= MAX_PIECES:
            known += [self._piece(place) for place in places.tolist()]
        known_steps, at = np.unique(np.concatenate([each for each, _ in known]), return_index=True)
        known_times = np.concatenate([each for _, each in known])[at]
        times: NDArray[np.float64] = np.interp(steps, known_steps, known_times)
        return times

    def elapsed_s(self, step: int) -> float:
        """Seconds from the end of the first step to the end of `step`, pauses included."""
        if self.first_step is None:
            return 0.0
        return max(0.0, float(self.times(np.array([step]))[0]) - self.first_step[1])

    def steps_per_second(self) -> float | None:
        """Over the whole run, pauses included."""
        if self.first_step is None or not len(self._ids):
            return None
        step, time = self.first_step
        steps, seconds = self._last_steps[-1] - step, self._last_times[-1] - time
        return float(steps / seconds) if steps > 0 and seconds > 0 else None

    def _piece(self, place: int) -> tuple[Steps, NDArray[np.float64]]:
        """Steps, without duplicates, and times of a piece; empty where it cannot be read."""
        number, last_step = int(self._ids[place]), int(self._last_steps[place])

        def read() -> tuple[Steps, NDArray[np.float64]] | None:
            rows = self._store.stream("SELECT data FROM step_time WHERE id = ?", number)
            piece = next(self._store.decoded(TIMES, codec.unpack_step_times, rows), None)
            if piece is None:
                return None
            # A step precedes a row measured outside a step with the same number.
            order = np.lexsort((np.isnan(piece.own_ms), piece.step))
            steps, at = np.unique(piece.step[order], return_index=True)
            return steps, piece.time[order][at]

        key = ("step_times", number, last_step)  # the newest piece grows
        found = self._store.cached(key, CHUNK * 16, read)
        return (np.zeros(0, np.int64), np.zeros(0)) if found is None else found
