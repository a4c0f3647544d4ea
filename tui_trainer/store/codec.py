"""How arrays and messages are encoded in the store.

Arrays are split into byte planes and compressed. The bytes of a float32 series differ in kind: sign
and exponent hardly change, the low bits of the mantissa are noise. Separate planes compress better
than mixed bytes.

Events and the status are JSON objects with named fields. On the wire they are arrays, which saves
bytes; in a file that outlives its program, and that people read with `sqlite3`, names are better.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Buckets, Flags, RawRows, Steps
from tui_trainer.history.records import Floats
from tui_trainer.history.sync import decode_rows, encode_rows, level_of
from tui_trainer.protocol.events import (
    Artifact,
    Clip,
    ConfusionMatrix,
    Event,
    Finding,
    ImageSample,
    LogLine,
    NonFinite,
    NonFiniteValue,
    Notice,
    Skipped,
)
from tui_trainer.protocol.formatting import nonfinite
from tui_trainer.protocol.messages import Rows, Status
from tui_trainer.protocol.text import sanitize_message

CHUNK = 512
"""Entries of a chunk: a power of 8, so that a full chunk of rows ends in full buckets."""
GROUP = 16
"""Columns of a part: to draw one series, only its neighbours are unpacked with it."""
DECODE_ERRORS = (ValueError, TypeError, IndexError, OverflowError)
"""What decoding damaged data raises: SQLite allows a value of any type in any column."""
_LEVEL = 1
_rows_decoder = msgspec.msgpack.Decoder(Rows)
_pair_decoder = msgspec.msgpack.Decoder(tuple[bytes, bytes])

# ---------------------------------------------------------------- arrays


def pack(array: NDArray[Any]) -> bytes:
    """Split an array into byte planes and compress them."""
    raw = np.ascontiguousarray(array)
    planes = raw.view(np.uint8).reshape(-1, raw.itemsize).T
    return zlib.compress(planes.tobytes(), _LEVEL)


def unpack(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Reverse `pack`. Raises ValueError for damaged data."""
    try:
        raw = np.frombuffer(zlib.decompress(data), np.uint8)
    except zlib.error as error:
        raise ValueError(f"damaged values: {error}") from error
    planes = raw.reshape(np.dtype(dtype).itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)


def pack_integers(*columns: Steps) -> bytes:
    """Pack columns of equal length as differences, which are nearly constant."""
    return pack(np.stack([np.diff(column, prepend=0) for column in columns]).astype("<i8"))


def unpack_integers(data: bytes, columns: int, count: int = -1) -> NDArray[np.int64]:
    """Reverse `pack_integers`; shape (columns, count). Raises ValueError for damaged data."""
    return unpack(data, "<i8", (columns, count)).cumsum(axis=1, dtype=np.int64)


def pack_values(entries: RawRows | Buckets, columns: slice) -> bytes:
    """Pack the values of some columns of CHUNK entries, column after column."""
    if isinstance(entries, RawRows):
        return pack(entries.value[:, columns].T.astype("<f4"))
    fields = (entries.low, entries.high, entries.value)
    values = np.stack([field[:, columns].T for field in fields]).astype("<f4")
    flags = entries.flags[:, columns]
    packed_flags = pack(flags.T) if flags.any() else b""
    return len(packed_flags).to_bytes(4, "little") + packed_flags + pack(values)


class Part(NamedTuple):
    """Some columns of a chunk, (CHUNK, columns) each; rows have a `value` alone."""

    value: Floats
    low: Floats
    high: Floats
    flags: Flags


def unpack_values(data: bytes, level: int, columns: int) -> Part:
    """Reverse `pack_values`. Raises ValueError for damaged data."""
    if level == 0:
        value = unpack(data, "<f4", (columns, CHUNK)).T.astype(np.float32)
        return Part(value, value, value, np.zeros((0, columns), np.uint8))
    size = int.from_bytes(data[:4], "little")
    low, high, value = unpack(data[4 + size :], "<f4", (3, columns, CHUNK)).astype(np.float32)
    if size:
        flags = unpack(data[4 : 4 + size], "u1", (columns, CHUNK)).T.astype(np.uint8)
    else:
        flags = np.zeros((CHUNK, columns), np.uint8)
    return Part(value.T, low.T, high.T, flags)


def encode_tail(table: int, first: int, entries: RawRows | Buckets, size: int) -> bytes:
    """Entries as the protocol's message `Rows`; `first` is the index of the first one."""
    return msgspec.msgpack.encode(encode_rows(table, first * size, entries, size))


def decode_raw_tail(data: bytes, columns: int) -> RawRows:
    """Entries of level 0. Raises ValueError for damaged data."""
    rows = _rows_decoder.decode(data)
    entries = decode_rows(rows, columns)
    if not isinstance(entries, RawRows):
        raise ValueError("buckets are not rows")
    return entries


def decode_bucket_tail(data: bytes, level: int, columns: int) -> Buckets:
    """Entries of a level above 0. Raises ValueError for damaged data."""
    rows = _rows_decoder.decode(data)
    entries = decode_rows(rows, columns)
    if not isinstance(entries, Buckets) or level_of(rows, len(entries.last)) != level:
        raise ValueError("entries are of another level")
    return entries


class StepTimes(NamedTuple):
    """n steps, or rows measured outside a step, in the order of `seq`."""

    seq: NDArray[np.int64]
    step: Steps
    time: NDArray[np.float64]
    """Seconds since the epoch, to a microsecond."""
    own_ms: Floats
    """Overhead of tracing the step; nan for a row measured outside a step."""


def pack_step_times(times: StepTimes) -> bytes:
    microseconds = np.rint(times.time * 1e6).astype(np.int64)
    integers = pack_integers(times.seq, times.step, microseconds)
    return msgspec.msgpack.encode((integers, pack(times.own_ms.astype("<f4"))))


def unpack_step_times(data: bytes) -> StepTimes:
    """Raises ValueError for damaged data."""
    integers, floats = _pair_decoder.decode(data)
    seq, step, microseconds = unpack_integers(integers, 3)
    own_ms = unpack(floats, "<f4", (len(seq),)).astype(np.float32)
    return StepTimes(seq, step, microseconds / 1e6, own_ms)


# ---------------------------------------------------------------- messages


_JSON_TYPES: dict[Any, Any] = {
    float: float | NonFiniteValue,
    float | None: float | None | NonFiniteValue,
    tuple[float, ...]: tuple[float | NonFiniteValue, ...],
}
"""Type of a field that may hold nan or inf → its type in JSON, where these are texts."""


def _with_names(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """A struct with the same fields, encoded as an object."""
    fields = [
        (each.name, _JSON_TYPES.get(each.type, each.type))
        if each.required
        else (
            each.name,
            _JSON_TYPES.get(each.type, each.type),
            msgspec.field(default=each.default),
        )
        for each in msgspec.structs.fields(kind)
    ]
    tag = kind.__struct_config__.tag
    return msgspec.defstruct(kind.__name__, fields, tag=tag, frozen=True)


_CLIP, _NONFINITE = _with_names(Clip), _with_names(NonFinite)
_FINDING = _with_names(Finding)  # its evidence stays an array
_SKIPPED, _NOTICE, _STATUS = _with_names(Skipped), _with_names(Notice), _with_names(Status)
_NAMED: dict[type[msgspec.Struct], type[msgspec.Struct]] = {
    Clip: _CLIP,
    NonFinite: _NONFINITE,
    Skipped: _SKIPPED,
    Finding: _FINDING,
    Notice: _NOTICE,
    Status: _STATUS,
}
_MESSAGES = {named: kind for kind, named in _NAMED.items()}
_SUSPICIOUS = re.compile(rb"\\u|\\b|\\f|\\r|\x7f|\xc2")
"""Control characters in JSON: escaped, DEL, or the first byte of those above it in UTF-8."""
_event_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    _CLIP | _NONFINITE | _SKIPPED | _FINDING | _NOTICE
)
_status_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_STATUS)
_artifact_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Artifact)
assert set(get_args(Event)) | {Status} == set(_NAMED)


_FLOATS = {
    kind: [each.name for each in msgspec.structs.fields(kind) if each.type in _JSON_TYPES]
    for kind in _NAMED
}
"""Message → names of its fields that have a type of _JSON_TYPES."""


def encode(message: Event | Status) -> bytes:
    """A JSON object."""
    fields = msgspec.structs.asdict(message)
    for name in _FLOATS[type(message)]:
        fields[name] = _as_json(fields[name])
    return msgspec.json.encode(_NAMED[type(message)](**fields))


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_json, value))
    if isinstance(value, float) and not math.isfinite(value):
        return nonfinite(value)
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_from_json, value))
    return float(value) if isinstance(value, str) else value


def decode_event(data: bytes) -> Event:
    """Raises one of DECODE_ERRORS."""
    event: Event = _message(_event_decoder.decode(data))
    if isinstance(event, Clip) and len(event.parameters) != len(event.shares):
        raise ValueError("a clip has another number of parameters than of shares")
    # A store may come from anywhere. Sanitise only events that may hold a control character.
    return sanitize_message(event) if _SUSPICIOUS.search(data) else event


def decode_status(data: bytes) -> Status:
    """Raises one of DECODE_ERRORS."""
    status: Status = _message(_status_decoder.decode(data))
    return sanitize_message(status)


def _message(named: msgspec.Struct) -> Any:
    kind = _MESSAGES[type(named)]
    fields = msgspec.structs.asdict(named)
    for name in _FLOATS[kind]:
        fields[name] = _from_json(fields[name])
    return kind(**fields)


def decode_artifact(data: bytes) -> Artifact:
    """Raises one of DECODE_ERRORS, also where sizes do not agree."""
    artifact: Artifact = _artifact_decoder.decode(data)
    if isinstance(artifact, ImageSample):
        image_bytes = 3 * artifact.width * artifact.height
        if min(artifact.width, artifact.height) <= 0 or len(artifact.pixels) % image_bytes:
            raise ValueError("the pixels do not fill the images")
    if isinstance(artifact, ConfusionMatrix):
        sides = {len(artifact.labels), len(artifact.counts), *map(len, artifact.counts)}
        if len(sides) > 1:
            raise ValueError("the confusion matrix is not square")
    return sanitize_message(artifact)


def decode_line(*row: Any) -> LogLine:
    """id, time, step, stream and text of a row of table `log`. Raises one of DECODE_ERRORS."""
    return sanitize_message(msgspec.convert(row, LogLine))
