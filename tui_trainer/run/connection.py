"""One viewer's connection: greeting, polls and commands, on a thread of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from tui_trainer import __version__
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.framing import ConnectionClosed, ProtocolError, encode, read_to_run
from tui_trainer.protocol.messages import (
    Ack,
    Command,
    Hello,
    Poll,
    Refused,
    ToViewer,
    Update,
    Welcome,
)
from tui_trainer.protocol.text import printable
from tui_trainer.recording.recorder import Recorder
from tui_trainer.run.control import Control, Viewer

GREETING_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
FRAME_TIMEOUT_S = 10.0
"""A message that has begun must have come whole by then."""
SILENT_S = 300.0
"""A viewer that has asked nothing for so long is frozen or forgotten; the app polls at least once
a minute, and one that wakes up later connects again."""
VIEWER_NAME_CHARACTERS = 80


class Stuck(Exception):
    """The viewer does not read what it asked for, or says nothing more."""


class Connection:
    """Speaks the protocol over one connected socket. Only `run` touches the stream."""

    def __init__(
        self,
        stream: socket.socket,
        identity: int,
        run: str,
        recorder: Recorder,
        control: Control,
        silent_s: float | None = None,
    ) -> None:
        self._stream = stream
        self._silent_s = silent_s
        self._identity = identity
        self._run = run
        self._recorder = recorder
        self._control = control
        self._too_large: set[str] = set()
        """What was said to be."""
        self.viewer: Viewer | None = None
        self.seen_end = threading.Event()
        """Set once this viewer was sent all there is of a run that has ended."""

    def serve(self, drop: Callable[[str], None]) -> None:
        """Answer until the stream ends. `drop(why)` is called when it is we who end it."""
        try:
            self._greet()
            while self.viewer is not None:
                self._answer(self._next())
        except ConnectionClosed as closed:
            if closed.left:
                drop(f"it left in the middle of a message, after {closed.left:,} bytes of it")
        except ConnectionError:
            pass
        except (ProtocolError, Stuck) as fault:
            drop(str(fault))
        except TimeoutError:
            drop(f"it did not greet within {GREETING_TIMEOUT_S:.0f} s")
        except OSError as fault:
            if self._stream.fileno() >= 0:
                drop(str(fault))
        finally:
            self.seen_end.set()
            if self.viewer is not None:
                self._control.left(self.viewer)
            self.close()

    def close(self) -> None:
        """End the stream, also where a forked child still holds a copy of it."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()

    def close_descriptor(self) -> None:
        """In a forked child: let go of our copy without ending the parent's stream."""
        with contextlib.suppress(OSError):
            os.close(self._stream.detach())

    def _greet(self) -> None:
        if not owner_is_us(self._stream):
            self._send(Refused("this run belongs to another user"))
            raise ProtocolError("a connection from another user was refused")
        deadline = time.monotonic() + GREETING_TIMEOUT_S

        def read(size: int) -> bytes:
            self._stream.settimeout(max(0.001, deadline - time.monotonic()))
            return self._stream.recv(size)

        hello = read_to_run(read)
        self._stream.settimeout(None)
        if not isinstance(hello, Hello):
            self._send(Refused("a greeting must come first"))
            raise ProtocolError(f"a {type(hello).__name__} came before the greeting")
        if hello.protocol != PROTOCOL_VERSION:
            theirs = f"protocol {hello.protocol} (tui-trainer {printable(hello.product, 40)})"
            self._send(
                Refused(
                    f"the run speaks protocol {PROTOCOL_VERSION} (tui-trainer {__version__}), "
                    f"this viewer {theirs}",
                    "use the same version of tui-trainer on both sides",
                )
            )
            raise ProtocolError(f"a viewer speaks {theirs}")
        name = printable(hello.viewer, VIEWER_NAME_CHARACTERS) or f"viewer {self._identity}"
        self.viewer = Viewer(self._identity, name, hello.read_only)
        self._control.joined(self.viewer)
        self._send(Welcome(PROTOCOL_VERSION, __version__, self._run, self._identity))

    def _next(self) -> Hello | Poll | Command:
        """What the viewer says next; it may think, but not stop in the middle of a message."""
        deadline: float | None = None

        def read(size: int) -> bytes:
            nonlocal deadline
            left = self._silent_s if deadline is None else deadline - time.monotonic()
            self._stream.settimeout(left if left is None else max(0.001, left))
            part = self._stream.recv(size)
            deadline = deadline or time.monotonic() + FRAME_TIMEOUT_S
            return part

        try:
            return read_to_run(read)
        except TimeoutError:
            if deadline is not None:
                raise Stuck("it stopped in the middle of a message") from None
            raise Stuck(f"it asked nothing for {self._silent_s:.0f} s") from None
        finally:
            self._stream.settimeout(None)

    def _answer(self, message: Hello | Poll | Command) -> None:
        assert self.viewer is not None
        match message:
            case Poll():
                update = self._recorder.update_for(message, self._identity)
                self._send(update)
                if update.status.ended and not update.more:
                    self.seen_end.set()
            case Command():
                verdict = self._control.perform(self.viewer, message.action)
                status = self._recorder.state
                self._send(Ack(message.id, verdict.ok, status, verdict.message, verdict.hint))
            case Hello():
                raise ProtocolError("a second greeting")

    def _without_bulk(self, update: Update) -> bytes:
        """What can be said of an answer that would be over the size of a frame, and a line in the
        log that the rest cannot."""
        reduced = msgspec.structs.replace(update, artifacts=(), report=None, more=False)
        what = "samples and the report of the phase"
        try:
            data = encode(reduced)
        except ProtocolError:  # there may be hundreds of thousands of parameters to describe
            reduced = msgspec.structs.replace(reduced, info=None, rows=(), cadences=())
            data, what = encode(reduced), "the description of the run and all that is measured"
        if what not in self._too_large:
            self._too_large.add(what)
            name = self.viewer.name if self.viewer else ""
            text = f"too large to be sent to {name}, and left out: {what}"
            self._recorder.notice("viewer", text, "error")
        return data

    def _send(self, message: ToViewer) -> None:
        try:
            data = memoryview(encode(message))
        except ProtocolError:
            if not isinstance(message, Update):
                raise
            data = memoryview(self._without_bulk(message))
        deadline = time.monotonic() + SEND_TIMEOUT_S
        try:
            while data:
                self._stream.settimeout(max(0.001, deadline - time.monotonic()))
                data = data[self._stream.send(data) :]
        except TimeoutError:
            raise Stuck(f"it took nothing for {SEND_TIMEOUT_S:.0f} s") from None
        self._stream.settimeout(None)


def owner_is_us(stream: socket.socket) -> bool:
    """Whether the peer is of our user (or root), where the system can say; a socketpair is."""
    if stream.family != socket.AF_UNIX or not sys.platform.startswith("linux"):
        return True  # the directory's mode is what protects it there
    credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user in (os.getuid(), 0)
