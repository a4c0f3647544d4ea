"""Messages that the store keeps as JSON objects with named fields.

On the wire they go by place, which saves bytes; in a file that outlives its program, and that
people look into with `sqlite3`, names are worth theirs.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_args

import msgspec

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
from tui_trainer.protocol.text import harmless_all

T = TypeVar("T", bound=msgspec.Struct)


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
    return harmless_all(event) if _SUSPICIOUS.search(data) else event


def decode_status(data: bytes) -> Status:
    """What `encode` made. Raises ValueError (msgspec.DecodeError) or TypeError."""
    status: Status = _by_place(_status.decode(data))
    return harmless_all(status)


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
    return harmless_all(found)


def read_line(row: tuple[Any, ...]) -> LogLine:
    """A row of table `log`. Raises ValueError (msgspec.ValidationError)."""
    return harmless_all(msgspec.convert(row, LogLine))


def _by_place(named: msgspec.Struct) -> Any:
    return _BY_PLACE[type(named)](**msgspec.structs.asdict(named))
