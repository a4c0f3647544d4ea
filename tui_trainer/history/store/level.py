"""One level of one measured table, as the store holds it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import FACTOR, Buckets, Steps, extremes, flags_of
from tui_trainer.history.store import packing
from tui_trainer.history.store.damage import STRETCH
from tui_trainer.history.store.database import UNREADABLE, Part, Store
from tui_trainer.history.store.packing import CHUNK, GROUP

T = TypeVar("T", bound=np.generic)


class StoredLevel:
    """One level of one measured table: whole chunks on disk, the tail in memory."""

    def __init__(self, store: Store, series: int, level: int, columns: int) -> None:
        self.start, self.stop = 0, 0
        self.size: int = FACTOR**level
        self._store, self._series, self._level, self._columns = store, series, level, columns
        self._chunks = 0
        self._tail: Buckets | None = None

    def refresh(self) -> int:
        """See what is stored now; how many entries there are."""
        which = (self._series, self._level)
        self._chunks = self._count_chunks()
        question = (
            "SELECT first, count, data FROM tail WHERE series = ? AND level = ? AND first >= ? "
            "ORDER BY first"
        )
        pieces: list[Buckets] = []
        for first, count, data in self._store.ask(question, *which, self._chunks * CHUNK):
            try:
                piece = packing.unpack_tail(data, self._level, count, self._columns)
                if pieces and len(piece.last) and piece.last[0] < pieces[-1].last[-1]:
                    raise ValueError("steps run backwards")
            except UNREADABLE:
                self._store.damage.note(STRETCH, (*which, "tail", first))
                continue
            if len(piece.last):
                pieces.append(piece)
        self._tail = Buckets.join(pieces) if pieces else None
        self.stop = self._chunks * CHUNK + (len(self._tail.last) if self._tail else 0)
        return self.stop

    def _count_chunks(self) -> int:
        which = (self._series, self._level)
        question = "SELECT max(number) FROM chunk WHERE series = ? AND level = ?"
        found = self._store.ask(question, *which)
        newest = found[0][0] if found else None
        if newest is None:
            return 0
        if isinstance(newest, int) and 0 <= newest < self._store.most_chunks(newest):
            return int(newest) + 1
        # A damaged number, by which a reader would look for chunks until the end of days.
        self._store.damage.note(STRETCH, (*which, "number"))
        question = (
            "SELECT number FROM chunk WHERE series = ? AND level = ? AND number >= 0 "
            "AND number < ? ORDER BY number DESC LIMIT 1"
        )
        found = self._store.numbers(question, *which, self._store.most_chunks())
        return int(found[0][0]) + 1 if found else 0

    def find(self, step: int) -> int:
        """See `Entries.find`."""
        question = (
            "SELECT number FROM chunk WHERE series = ? AND level = ? AND last_step >= ? "
            "ORDER BY last_step LIMIT 1"
        )
        for (number,) in self._store.numbers(question, self._series, self._level, step):
            chunk = int(number)
            if not 0 <= chunk < self._chunks:
                break  # written since this was refreshed
            steps = self._store.steps(self._series, self._level, chunk)
            # In a damaged one no entry can be told from the others.
            inside = 0 if steps is None else int(np.searchsorted(steps[1], step))
            return min(self.stop, chunk * CHUNK + inside)
        if self._tail is None:
            return self.stop
        found = self._chunks * CHUNK + int(np.searchsorted(self._tail.last, step))
        return min(self.stop, found)

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """See `Entries.bounds`."""
        found = self.buckets(start, stop, np.zeros(0, np.intp))
        return found.first, found.last

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """See `Entries.buckets`; a damaged chunk gives none."""
        chosen = np.arange(self._columns) if columns is None else columns
        parts = []
        for number in range(start // CHUNK, -(-min(stop, self._chunks * CHUNK) // CHUNK)):
            low = max(start, number * CHUNK) - number * CHUNK
            high = min(stop, (number + 1) * CHUNK) - number * CHUNK
            if low < high and (part := self._chunk(number, slice(low, high), chosen)) is not None:
                parts.append(part)
        begin = self._chunks * CHUNK
        if self._tail is not None and stop > begin:
            tail = self._tail.part(slice(max(0, start - begin), stop - begin))
            parts.append(self._finish(tail, chosen))
        if not parts:
            none = np.zeros(0, np.int64)
            empty = np.zeros((0, len(chosen)), np.float32)
            return Buckets(none, none, empty, empty, empty, empty.astype(np.uint8))
        return Buckets.join(parts)

    def _chunk(self, number: int, inside: slice, chosen: NDArray[np.intp]) -> Buckets | None:
        steps = self._store.steps(self._series, self._level, number)
        if steps is None:
            return None
        groups = np.unique(chosen // GROUP)
        found: list[Part] = []
        for group in groups.tolist():
            width = min(GROUP, self._columns - group * GROUP)
            part = self._store.part(self._series, self._level, number, group, width)
            if part is None:
                return None
            found.append(part)
        count = inside.stop - inside.start
        if not found:
            empty = np.zeros((count, 0), np.float32)
            flags = np.zeros((count, 0), np.uint8)
            return Buckets(steps[0][inside], steps[1][inside], empty, empty, empty, flags)
        places = np.searchsorted(groups, chosen // GROUP) * GROUP + chosen % GROUP
        value = _pick([p.value[inside] for p in found], places)
        if self._level == 0:
            rows = Buckets(steps[0][inside], steps[1][inside], value, value, value, NO_FLAGS)
            return self._rows(rows)
        return Buckets(
            steps[0][inside],
            steps[1][inside],
            _pick([p.low[inside] for p in found], places),
            _pick([p.high[inside] for p in found], places),
            value,
            _pick([p.flags[inside] for p in found], places),
        )

    def _finish(self, tail: Buckets, chosen: NDArray[np.intp]) -> Buckets:
        if self._level:
            return tail.of_columns(chosen)
        return self._rows(tail._replace(value=tail.value.take(chosen, axis=1)))

    def _rows(self, rows: Buckets) -> Buckets:
        low, high, last = extremes(rows.value[:, None])
        return Buckets(rows.first, rows.last, low, high, last, flags_of(rows.value))


NO_FLAGS = np.zeros((0, 0), np.uint8)


def _pick(groups: list[NDArray[T]], places: NDArray[np.intp]) -> NDArray[T]:
    joined = groups[0] if len(groups) == 1 else np.concatenate(groups, axis=1)
    return joined.take(places, axis=1)
