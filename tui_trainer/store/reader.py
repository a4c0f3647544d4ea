"""One open store, for reading: its questions, and the chunks that were unpacked of late."""

from __future__ import annotations

import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import FACTOR, Buckets, Level, Steps, extremes, flags_of
from tui_trainer.history.history import History
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol.messages import (
    Artifact,
    Clip,
    ConfusionMatrix,
    Event,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    Status,
)
from tui_trainer.protocol.schema import RunInfo, Table
from tui_trainer.protocol.text import sanitize_message
from tui_trainer.store import codec, told
from tui_trainer.store.codec import CHUNK, GROUP
from tui_trainer.store.schema import REFUSALS, open_for_reading, reason_of

# ---- objects
# Messages that the store keeps as JSON objects with named fields.
#
# On the wire they go by place, which saves bytes; in a file that outlives its program, and that
# people look into with `sqlite3`, names are worth theirs.


Decoded = TypeVar("Decoded", bound=msgspec.Struct)


def _named(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """The same fields, under their names."""
    fields = [
        (each.name, each.type)
        if each.required
        else (each.name, each.type, msgspec.field(default=each.default))
        for each in msgspec.structs.fields(kind)
    ]
    tag = kind.__struct_config__.tag
    return msgspec.defstruct(kind.__name__, fields, tag=tag, frozen=True)


_CLIP, _NONFINITE, _NOTICE, _STATUS = (
    _named(Clip),
    _named(NonFinite),
    _named(Notice),
    _named(Status),
)
_NAMED: dict[type[msgspec.Struct], type[msgspec.Struct]] = {
    Clip: _CLIP,
    NonFinite: _NONFINITE,
    Notice: _NOTICE,
    Status: _STATUS,
}
_BY_PLACE = {named: kind for kind, named in _NAMED.items()}
_SUSPICIOUS = re.compile(rb"\\u|\\b|\\f|\\r|\x7f|\xc2")
"""As JSON has control characters: escaped, DEL, and the first byte of those above it in UTF-8."""
_events: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_CLIP | _NONFINITE | _NOTICE)
_status: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_STATUS)
_artifacts: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Artifact)
assert set(get_args(Event)) | {Status} == set(_NAMED)


def encode(message: Event | Status) -> bytes:
    """A JSON object."""
    return msgspec.json.encode(_NAMED[type(message)](**msgspec.structs.asdict(message)))


def decode_event(data: bytes) -> Event:
    """What `encode` made. Raises ValueError (msgspec.DecodeError) or TypeError."""
    event: Event = _by_place(_events.decode(data))
    if isinstance(event, Clip) and len(event.parameters) != len(event.shares):
        raise ValueError("a clip names other parameters than it has shares of")
    # A store may come from anywhere; only what can hold a control character is looked through.
    return sanitize_message(event) if _SUSPICIOUS.search(data) else event


def decode_status(data: bytes) -> Status:
    """What `encode` made. Raises ValueError (msgspec.DecodeError) or TypeError."""
    status: Status = _by_place(_status.decode(data))
    return sanitize_message(status)


def decode_artifact(data: bytes) -> Artifact:
    """A sample, all its parts of one size. Raises ValueError (msgspec.DecodeError) or TypeError."""
    found: Artifact = _artifacts.decode(data)
    if isinstance(found, ImageSample):
        one = 3 * found.width * found.height
        if min(found.width, found.height) <= 0 or len(found.pixels) % one:
            raise ValueError("pictures of another size than is said")
    if isinstance(found, ConfusionMatrix):
        sides = {len(found.labels), len(found.counts), *map(len, found.counts)}
        if len(sides) > 1:
            raise ValueError("a confusion matrix that is no square")
    return sanitize_message(found)


def read_line(row: tuple[Any, ...]) -> LogLine:
    """A row of table `log`. Raises ValueError (msgspec.ValidationError)."""
    return sanitize_message(msgspec.convert(row, LogLine))


def _by_place(named: msgspec.Struct) -> Any:
    return _BY_PLACE[type(named)](**msgspec.structs.asdict(named))


# ---- damage
# What of a store could not be read: gathered while it is read, said in one sentence.


MOST_REMEMBERED = 10_000
"""Damaged things told apart; of more, the rest is not counted."""
INFO, STATE = "the run's description", "its last state"
EVENT, SAMPLE, LINE = "event", "sample", "line of output"
TABLE, STRETCH, STORY = "table", "stretch of measurements", "piece of the story"
_COUNTED = (TABLE, STRETCH, STORY, EVENT, SAMPLE, LINE)


class ReadErrors:
    """Each damaged thing counts once, however often it is come upon."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, object]] = set()
        self._reasons: dict[str, None] = {}

    def note(self, what: str, which: object = None) -> None:
        """That `what` (INFO, EVENT, …) cannot be read; `which` of them."""
        if len(self._seen) < MOST_REMEMBERED:
            self._seen.add((what, which))

    def refused(self, reason: str) -> None:
        """That the database itself refused a question, and why."""
        if len(self._reasons) < 3:
            self._reasons[reason] = None

    def __str__(self) -> str:
        """One sentence for people; "" while nothing was found to be damaged."""
        if not self._seen and not self._reasons:
            return ""
        kinds = [what for what, _ in self._seen]
        parts = [what for what in (INFO, STATE) if what in kinds]
        parts += [_so_many(kinds.count(what), what) for what in _COUNTED if what in kinds]
        what = ", ".join(parts)
        why = "; ".join(self._reasons)
        if what and why:
            what += f" ({why})"
        return f"part of the recording cannot be read: {what or why}"


def _so_many(count: int, what: str) -> str:
    if count == 1:
        return f"1 {what}"
    first, *rest = what.split(" ", 1)
    plural = f"{first}es" if first.endswith("ch") else f"{first}s"
    return " ".join([f"{count:,}", plural, *rest])


CACHE_BYTES = 64 * 2**20
"""What unpacked chunks may take, so that moving a window is cheap."""
LEAST_CHUNK_BYTES = 64
"""What a chunk takes at the least: its key alone is there three times."""
PIECES_AT_ONCE = 16
"""Pieces of the story read in one question."""
UNREADABLE = (ValueError, TypeError, IndexError, OverflowError)
"""What decoding damaged data raises: SQLite puts a value of any type into any column."""


class StoreBlock(NamedTuple):
    """Some columns of a chunk, (entries, columns) each; low, high and flags may be empty."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    value: NDArray[np.float32]
    flags: NDArray[np.uint8]


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and math.isfinite(cell)


class Store:
    """One open database. Not safe for use from several threads."""

    def __init__(self, directory: str | os.PathLike[str], ended: bool = False) -> None:
        """`ended`: nobody writes to it any more. Raises StoreFault."""
        self.connection = open_for_reading(directory, ended)
        self.damage = ReadErrors()
        self._most_chunks = 0
        self._steps: OrderedDict[tuple[int, int, int], tuple[Steps, Steps]] = OrderedDict()
        self._parts: OrderedDict[tuple[int, int, int, int], StoreBlock] = OrderedDict()
        self._cached_bytes = 0

    @property
    def fault(self) -> str:
        """What could not be read, for people; the rest is shown all the same."""
        return str(self.damage)

    def ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of an SQL question; where the database is damaged, with `fault` set, those before
        the damage."""
        rows: list[tuple[Any, ...]] = []
        try:
            rows.extend(self.connection.execute(question, values))
        except REFUSALS as fault:
            self.damage.refused(reason_of(fault))
        return rows

    def numbers(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """The same, of rows that hold finite numbers alone; others are damaged, and left out."""
        rows = self.ask(question, *values)
        sound = [row for row in rows if all(map(_is_number, row))]
        if len(sound) < len(rows):
            self.damage.note(STRETCH, question)
        return sound

    def info(self) -> RunInfo | None:
        """The description of the run; where that cannot be read, the newest of the story's that
        can."""
        for question in (
            "SELECT 'info', value FROM meta WHERE key = 'info'",
            "SELECT id, data FROM description ORDER BY id DESC",
        ):
            for number, value in self.ask(question):
                if (info := self.description(number, value)) is not None:
                    return info
            if not self.fault:
                return None  # nothing was described yet
        return None

    def description(self, number: object, data: bytes) -> RunInfo | None:
        """One description, with every text harmless; None where it cannot be read."""
        try:
            info: RunInfo = msgspec.json.decode(data, type=RunInfo)
        except UNREADABLE:
            self.damage.note(INFO)
            return None
        return sanitize_message(info)

    def status(self) -> Status | None:
        """The last state that was recorded."""
        for (value,) in self.ask("SELECT value FROM meta WHERE key = 'status'"):
            try:
                return decode_status(value)
            except UNREADABLE:
                self.damage.note(STATE)
        return None

    def declared(self, known: Collection[int] = ()) -> list[Table]:
        """The measured tables that are not `known`, by number; one whose own description cannot be
        read as the run's description has it."""
        found: dict[int, Table] = {}
        numbers = [number for (number,) in self.ask("SELECT id FROM series ORDER BY id")]
        fresh = [number for number in numbers if number not in known]
        for number in fresh:
            if (table := self._table(number)) is not None:
                found[number] = table
        if len(found) < len(fresh) or (self.fault and not known):
            info = self.info()
            for table in info.tables if info is not None else ():
                if table.id not in known:
                    found.setdefault(table.id, table)
        return [found[number] for number in sorted(found)]

    def _table(self, number: int) -> Table | None:
        for (description,) in self.ask("SELECT description FROM series WHERE id = ?", number):
            try:
                table = msgspec.json.decode(description, type=Table)
            except UNREADABLE:
                break
            if table.id == number:
                return sanitize_message(table)
        self.damage.note(TABLE, number)
        return None

    def pieces(self, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(id, data) of the story's pieces before `stop`, or of all, in order; past those that
        cannot be read."""
        newest = self.numbers("SELECT max(id) FROM told") if stop is None else [(stop - 1,)]
        last = min(int(newest[0][0]), self.most_chunks()) if newest else 0
        question = "SELECT id, data FROM told WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
        done = 0
        while done < last:
            found = self.ask(question, done, last, PIECES_AT_ONCE)
            for number, data in found:
                done = max(done + 1, number)
                yield number, data
            if not found:
                if not self.fault:
                    return
                done += 1

    def first_moment(self) -> tuple[int, float] | None:
        """The first step recorded, and when it was made; None where that was not kept."""
        for number, data in self.ask("SELECT id, data FROM told ORDER BY id LIMIT 8"):
            for entry, _ in self.story(number, data):
                if entry.kind == told.STEPPED:
                    return entry.step, entry.time
        return None

    def story(self, number: object, data: bytes) -> list[tuple[told.Entry, told.Shape | None]]:
        """The entries of one piece of the story; none where it cannot be read."""
        try:
            return told.entries(data)
        except UNREADABLE:
            self.damage.note(STORY, number)
            return []

    def most_chunks(self, wanted: int = sys.maxsize) -> int:
        """More chunks than a database of this size can hold; asked anew where `wanted` is more than
        it could hold when it was last asked."""
        if wanted >= self._most_chunks:
            pages, size = (self.ask(f"PRAGMA {what}") for what in ("page_count", "page_size"))
            known = bool(pages and size)
            self._most_chunks = pages[0][0] * size[0][0] // LEAST_CHUNK_BYTES if known else 0
        return self._most_chunks

    def forget(self) -> None:
        """Let unpacked chunks go: who reads once from front to back comes to none of them again."""
        self._steps.clear()
        self._parts.clear()
        self._cached_bytes = 0

    def close(self) -> None:
        """Give the file back."""
        self.connection.close()

    # ------------------------------------------------------------ chunks

    def steps(self, series: int, level: int, number: int) -> tuple[Steps, Steps] | None:
        """(first, last) steps of a chunk's entries; None where they cannot be read."""
        key = (series, level, number)
        if key not in self._steps:
            question = "SELECT steps FROM chunk WHERE series = ? AND level = ? AND number = ?"
            for (data,) in self.ask(question, *key):
                try:
                    self._steps[key] = codec.unpack_steps(data, level)
                except UNREADABLE:
                    self.damage.note(STRETCH, key)
            if len(self._steps) > 4096:
                self._steps.popitem(last=False)
        return self._steps.get(key)

    def part(
        self, series: int, level: int, number: int, group: int, width: int
    ) -> StoreBlock | None:
        """Some columns of a chunk; None where they cannot be read."""
        key = (series, level, number, group)
        found = self._parts.get(key)
        if found is not None:
            self._parts.move_to_end(key)
            return found
        question = (
            "SELECT data FROM part JOIN chunk ON chunk.id = part.chunk "
            "WHERE series = ? AND level = ? AND number = ? AND columns = ?"
        )
        for (data,) in self.ask(question, *key):
            try:
                found = StoreBlock(*codec.unpack_values(data, level, width))
            except UNREADABLE:
                self.damage.note(STRETCH, key[:3])
                return None
            self._parts[key] = found
            self._cached_bytes += found.value.nbytes * 3
            while self._cached_bytes > CACHE_BYTES and len(self._parts) > 1:
                _, old = self._parts.popitem(last=False)
                self._cached_bytes -= old.value.nbytes * 3
        return found


# ---- level
# One level of one measured table, as the store holds it.


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
                piece = codec.unpack_tail(data, self._level, count, self._columns)
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
        found: list[StoreBlock] = []
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


# ---- moments
# What happened when in a recorded run: events, output, samples, and where to jump to.


Item = TypeVar("Item")
EVENTS_PLACED = 200_000
"""Events of a kind that are looked at to mark where there are some: the first so many."""


class StoredEvents:
    """Answers about the time line of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def events(self, step: int, count: int) -> tuple[Event, ...]:
        """The last `count` clips up to a step and as many of the other events, oldest first: what
        somebody did is not lost among thousands of clips."""
        rows = [
            row
            for which in ("kind = 'clip'", "kind <> 'clip'")
            for row in self._store.ask(
                f"SELECT id, data FROM event WHERE {which} AND step <= ? "
                "ORDER BY step DESC, id DESC LIMIT ?",
                step,
                count,
            )
        ]
        return self._decoded(EVENT, sorted(rows, key=_by_id), decode_event)

    def log(self, step: int, count: int) -> tuple[LogLine, ...]:
        """The last `count` lines printed up to a step, oldest first."""
        question = (
            "SELECT id, time, step, stream, text FROM log WHERE step <= ? ORDER BY id DESC LIMIT ?"
        )
        rows = [(row[0], row) for row in reversed(self._store.ask(question, step, count))]
        return self._decoded(LINE, rows, read_line)

    def artifacts(self, step: int, count: int) -> tuple[Artifact, ...]:
        """The last `count` artifacts of each kind up to a step, oldest first."""
        question = (
            "SELECT id, data FROM artifact WHERE kind = ? AND step <= ? "
            "ORDER BY step DESC, id DESC LIMIT ?"
        )
        rows = [
            row
            for (kind,) in self._store.ask("SELECT DISTINCT kind FROM artifact")
            for row in self._store.ask(question, kind, step, count)
        ]
        return self._decoded(SAMPLE, sorted(rows, key=_by_id), decode_artifact)

    def event(self, number: int) -> Event | None:
        """One event; None where it cannot be read."""
        rows = self._store.ask("SELECT id, data FROM event WHERE id = ?", number)
        return next(iter(self._decoded(EVENT, rows, decode_event)), None)

    def line(self, number: int) -> LogLine | None:
        """One line of output; None where it cannot be read."""
        question = "SELECT id, time, step, stream, text FROM log WHERE id = ?"
        rows = [(row[0], row) for row in self._store.ask(question, number)]
        return next(iter(self._decoded(LINE, rows, read_line)), None)

    def artifact(self, number: int) -> Artifact | None:
        """One sample; None where it cannot be read."""
        rows = self._store.ask("SELECT id, data FROM artifact WHERE id = ?", number)
        return next(iter(self._decoded(SAMPLE, rows, decode_artifact)), None)

    def first_events(self, count: int) -> tuple[Event, ...]:
        """The first events that are no clips."""
        question = "SELECT id, data FROM event WHERE kind <> 'clip' ORDER BY id LIMIT ?"
        return self._decoded(EVENT, self._store.ask(question, count), decode_event)

    def _decoded(
        self, what: str, rows: Sequence[tuple[Any, ...]], decode: Callable[[Any], Item]
    ) -> tuple[Item, ...]:
        """Those of (id, data) that can be decoded."""
        found = []
        for number, data in rows:
            try:
                found.append(decode(data))
            except UNREADABLE:
                self._store.damage.note(what, number)
        return tuple(found)

    # ------------------------------------------------------------ jumping

    def next_event(self, kind: str, step: int, backwards: bool = False) -> int | None:
        """Step of the next event of a kind (`clip`, `nonfinite`, `mark`, …) after a step, or of the
        one before it; None when there is none."""
        question = (
            "SELECT step FROM event WHERE kind = ? AND step < ? ORDER BY step DESC LIMIT 1"
            if backwards
            else "SELECT step FROM event WHERE kind = ? AND step > ? ORDER BY step LIMIT 1"
        )
        found = self._store.numbers(question, kind, step)
        return int(found[0][0]) if found else None

    def places(self, kind: str, last_step: int, cells: int) -> list[int]:
        """Which of `cells` equal stretches of steps 0..last_step hold an event of a kind."""
        question = (
            "SELECT DISTINCT min(step * ?1 / (?2 + 1), ?1 - 1) FROM "
            "(SELECT step FROM event WHERE kind = ?3 AND step <= ?2 LIMIT ?4)"
        )
        found = self._store.numbers(question, cells, max(0, last_step), kind, EVENTS_PLACED)
        return sorted(int(cell) for (cell,) in found)

    # ------------------------------------------------------------ time

    def elapsed_s(self, step: int) -> float:
        """Seconds from the first recorded moment to when a step was made, pauses included."""
        began = self._store.numbers("SELECT time FROM clock ORDER BY step LIMIT 1")
        before = self._store.numbers(
            "SELECT step, time FROM clock WHERE step <= ? ORDER BY step DESC LIMIT 1", step
        )
        if not began or not before:
            return 0.0
        after = self._store.numbers(
            "SELECT step, time FROM clock WHERE step > ? ORDER BY step LIMIT 1", step
        )
        known = [*before, *after]
        when = np.interp(step, [row[0] for row in known], [row[1] for row in known])
        return float(when) - float(began[0][0])

    def steps_per_second(self) -> float | None:
        """Over the whole run, pauses included."""
        ends = self._store.numbers(
            "SELECT step, time FROM clock WHERE step IN "
            "((SELECT min(step) FROM clock), (SELECT max(step) FROM clock)) ORDER BY step"
        )
        if len(ends) < 2 or ends[1][1] <= ends[0][1]:
            return None
        return float((ends[1][0] - ends[0][0]) / (ends[1][1] - ends[0][1]))


def _by_id(row: tuple[Any, ...]) -> int:
    return row[0] if isinstance(row[0], int) else 0


# ---- reader
# The history of a recorded run, read from its store as it was at any step.


class StoredSeries(SeriesReader):
    """A table of a recorded run, as it was at a step: rows after `cursor` are not seen."""

    def __init__(self, store: Store, table: Table) -> None:
        self.table, self.columns = table, len(table.columns)
        self.store = store
        self._stored: list[StoredLevel] = []
        self.all_rows = 0
        self.all_last_step: int | None = None
        self.refresh()

    def refresh(self) -> None:
        """See what is stored now, all of it."""
        levels: list[StoredLevel] = []
        while not levels or levels[-1].stop:
            level = StoredLevel(self.store, self.table.id, len(levels), self.columns)
            level.refresh()
            levels.append(level)
        self._stored = levels[:-1] if len(levels) > 1 else levels
        self.all_rows = self.rows = levels[0].stop
        # Where the rows themselves cannot be read, summaries of them may.
        firsts = (level.bounds(0, min(1, level.stop))[0] for level in self._stored)
        self.first_step = next((int(found[0]) for found in firsts if len(found)), None)
        self.all_last_step = self.last_step = self._last_of(self.rows)

    def seek(self, step: int) -> None:
        """Show the table as it was when `step` had been made."""
        self.rows = min(self.all_rows, self._stored[0].find(step + 1))
        self.last_step = self._last_of(self.rows)

    def _last_of(self, rows: int) -> int | None:
        """The newest step among the first so many rows that can be read, or is summed up."""
        for level in self._stored:
            stop = min(level.stop, rows // level.size)
            found = level.bounds(max(0, stop - 1), stop)[1]
            if len(found):
                return int(found[-1])
        return None

    def levels(self) -> Sequence[Level]:
        return [_Cut(level, self.rows) for level in self._stored]


class _Cut:
    """The entries of a level that were whole when so many rows had been measured."""

    def __init__(self, level: StoredLevel, rows: int) -> None:
        self._level = level
        self.start, self.size = 0, level.size
        self.stop = min(level.stop, rows // level.size)

    def find(self, step: int) -> int:
        """See `Entries.find`."""
        return min(self.stop, self._level.find(step))

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        return self._level.bounds(start, stop)

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        return self._level.buckets(start, stop, columns)


class StoredHistory(History):
    """The history of a recorded run. Raises StoreFault when it cannot be opened.

    `ended`: nobody writes to it any more, and reading shall leave no trace in its directory.
    """

    tables: dict[int, StoredSeries]

    def __init__(self, directory: str | os.PathLike[str], ended: bool = False) -> None:
        self.tables = {}
        self.version = 0
        self.store = Store(directory, ended)
        self.refresh()

    def refresh(self) -> None:
        """See what is stored now."""
        store = self.store
        store.ask("BEGIN")  # one moment's picture, while the run goes on writing
        try:
            for known in self.tables.values():
                known.refresh()
            for table in store.declared(self.tables):
                self.tables[table.id] = StoredSeries(store, table)
        finally:
            if store.connection.in_transaction:
                store.ask("COMMIT")
        self.version += 1

    def seek(self, step: int) -> None:
        """Show every table as it was when `step` had been made."""
        for table in self.tables.values():
            table.seek(step)
        self.version += 1

    @property
    def last_step(self) -> int:
        """The newest step of any table; 0 when nothing was measured."""
        return max((series.all_last_step or 0 for series in self.tables.values()), default=0)

    def close(self) -> None:
        """Give the file back."""
        self.store.close()
