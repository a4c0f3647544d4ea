"""Frames on a byte stream: a four-byte big-endian length, then one MessagePack message.

The length is limited in both directions; a peer that announces more is not read further.
`tui-trainer relay` prints a greeting before its first frame, since a login shell may print anything
first, and the host may lack tui-trainer, have another version or lack the run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from tui_trainer import __version__
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.messages import EndState, EntryState, ToRun, ToViewer
from tui_trainer.protocol.text import sanitize_message

MAX_TO_RUN_BYTES = 64 * 1024
"""Viewers send small messages only."""
MAX_TO_VIEWER_BYTES = 16 * 1024 * 1024

_HEADER = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_to_run: msgspec.msgpack.Decoder[ToRun] = msgspec.msgpack.Decoder(ToRun)
_to_viewer: msgspec.msgpack.Decoder[ToViewer] = msgspec.msgpack.Decoder(ToViewer)

M = TypeVar("M")


class ProtocolError(Exception):
    """The peer sent something that is not a message of this protocol."""


class ConnectionClosed(Exception):
    """The stream has ended, between two frames or inside one."""

    def __init__(self, left: int = 0) -> None:
        super().__init__()
        self.left = left
        """Bytes of an incomplete frame."""


def encode(message: msgspec.Struct, limit: int = MAX_TO_VIEWER_BYTES) -> bytes:
    """Encode one frame. Raises ProtocolError when the message is over `limit` bytes."""
    payload = _encoder.encode(message)
    if len(payload) > limit:
        raise ProtocolError(f"a message of {len(payload):,} bytes is over the limit of {limit:,}")
    return _HEADER.pack(len(payload)) + payload


def read_to_run(read: Callable[[int], bytes]) -> ToRun:
    """The next message for the run. `read(n)` returns 1 to n bytes, or b"" at the end."""
    return _decode(_read_payload(read, MAX_TO_RUN_BYTES), _to_run)


def read_to_viewer(read: Callable[[int], bytes]) -> ToViewer:
    """The next message for a viewer."""
    return _decode(_read_payload(read, MAX_TO_VIEWER_BYTES), _to_viewer)


def read_as(read: Callable[[int], bytes], decoder: msgspec.msgpack.Decoder[M], limit: int) -> M:
    """The next message of another kind, of at most `limit` bytes."""
    return _decode(_read_payload(read, limit), decoder)


class FrameBuffer:
    """Decodes messages for a viewer from a stream that arrives in pieces, without blocking."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._wanted: int | None = None

    @property
    def inside(self) -> bool:
        """Whether the buffer holds an incomplete frame."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[ToViewer]:
        """Return the messages that `data` completes. Raises ProtocolError."""
        self._held += data
        messages: list[ToViewer] = []
        while (payload := self._next()) is not None:
            messages.append(_decode(payload, _to_viewer))
        return messages

    def _next(self) -> bytes | None:
        if self._wanted is None and len(self._held) >= _HEADER.size:
            (self._wanted,) = _HEADER.unpack_from(self._held)
            _check_length(self._wanted, MAX_TO_VIEWER_BYTES)
        if self._wanted is None or len(self._held) < _HEADER.size + self._wanted:
            return None
        payload = bytes(self._held[_HEADER.size : _HEADER.size + self._wanted])
        del self._held[: _HEADER.size + self._wanted]
        self._wanted = None
        return payload


def _decode(payload: bytes, decoder: msgspec.msgpack.Decoder[M]) -> M:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from error


def _read_payload(read: Callable[[int], bytes], limit: int) -> bytes:
    (length,) = _HEADER.unpack(_read_exactly(read, _HEADER.size))
    _check_length(length, limit)
    return _read_exactly(read, length, _HEADER.size)


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise ProtocolError(f"a frame of {length:,} bytes is over the limit of {limit:,}")


def _read_exactly(read: Callable[[int], bytes], length: int, before: int = 0) -> bytes:
    parts: list[bytes] = []
    while length:
        part = read(min(length, 1 << 16))
        if not part:
            raise ConnectionClosed(before + sum(map(len, parts)))
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


MARK = b"TUI-TRAINER-RELAY "
"""Distinguishes the greeting from what a login shell prints before it."""
MISSING = b"missing"
"""Printed by the shell in place of the greeting where tui-trainer is not installed."""
MAX_NOISE_BYTES = 256 * 1024
"""Maximum bytes that shells may print before the greeting."""


class RemoteRun(msgspec.Struct, frozen=True):
    """A live run on the other machine."""

    name: str
    state: EntryState
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    title: str = ""
    started_at: float = 0.0


class RelayGreeting(msgspec.Struct, frozen=True):
    """The first line that a relay prints."""

    kind: Literal["connected", "choose", "error", "missing"]
    """`connected`: the protocol follows; `choose`: the relay waits for a line with one of the names
    in `runs`, and greets again; `error`: `message` says why there is no run to connect to."""
    protocol: int = PROTOCOL_VERSION
    product: str = __version__
    run: str = ""
    message: str = ""
    hint: str = ""
    state: EndState | Literal[""] = ""
    """How the run ended, if it has."""
    runs: tuple[RemoteRun, ...] = ()


class NoGreeting(Exception):
    """The data received is not a greeting."""


def encode_greeting(greeting: RelayGreeting) -> bytes:
    """The greeting on a line of its own, even after an unfinished line."""
    return b"\n" + MARK + msgspec.json.encode(greeting) + b"\n"


def find_greeting(received: bytes) -> RelayGreeting | None:
    """The greeting in the bytes received from the other machine; None while it is incomplete.

    Raises NoGreeting if too many other bytes come first, or if the greeting cannot be read.
    """
    start = received.find(MARK)
    if start < 0:
        if len(received) > MAX_NOISE_BYTES:
            raise NoGreeting("it keeps printing and sends no greeting")
        return None
    line, newline, _ = received[start + len(MARK) :].partition(b"\n")
    if not newline:
        if len(line) > MAX_NOISE_BYTES:
            raise NoGreeting("its greeting has no end")
        return None
    if line.strip() == MISSING:
        return RelayGreeting("missing")
    try:
        return sanitize_message(msgspec.json.decode(line, type=RelayGreeting))
    except msgspec.DecodeError as error:
        raise NoGreeting(f"its greeting cannot be read: {error}") from error
