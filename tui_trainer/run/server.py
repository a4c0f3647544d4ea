"""One viewer's connection: greeting, polls and commands, on a thread of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from tui_trainer import __version__
from tui_trainer.config.run_spec import SOCKET_DIRECTORY_PREFIX
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
from tui_trainer.protocol.text import single_line
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.control import CommandHandler, Viewer
from tui_trainer.runs.security import peer_user

GREETING_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
FRAME_TIMEOUT_S = 10.0
"""A message that has begun must have come whole by then."""
SILENT_S = 300.0
"""A viewer that has asked nothing for so long is frozen or forgotten; the app polls at least once
a minute, and one that wakes up later connects again."""
VIEWER_NAME_CHARACTERS = 80


class StuckViewer(Exception):
    """The viewer does not read what it asked for, or says nothing more."""


class ViewerConnection:
    """Speaks the protocol over one connected socket. Only `run` touches the stream."""

    def __init__(
        self,
        stream: socket.socket,
        identity: int,
        run: str,
        recorder: Recorder,
        control: CommandHandler,
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
        except (ProtocolError, StuckViewer) as fault:
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
        if peer_user(self._stream) not in (None, os.getuid(), 0):
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
            theirs = f"protocol {hello.protocol} (tui-trainer {single_line(hello.product, 40)})"
            self._send(
                Refused(
                    f"the run speaks protocol {PROTOCOL_VERSION} (tui-trainer {__version__}), "
                    f"this viewer {theirs}",
                    "use the same version of tui-trainer on both sides",
                )
            )
            raise ProtocolError(f"a viewer speaks {theirs}")
        name = single_line(hello.viewer, VIEWER_NAME_CHARACTERS) or f"viewer {self._identity}"
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
                raise StuckViewer("it stopped in the middle of a message") from None
            raise StuckViewer(f"it asked nothing for {self._silent_s:.0f} s") from None
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
                status = self._recorder.status
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
            raise StuckViewer(f"it took nothing for {SEND_TIMEOUT_S:.0f} s") from None
        self._stream.settimeout(None)


# ---- server
# Serving viewers: a Unix socket that only its owner can reach, one thread a connection.


MAX_CONNECTIONS = 64
LOOK_EVERY_S = 1.0
"""How often the server looks whether its socket is still there."""
DROPS_SAID, DROPS_SAID_EVERY_S = 20, 600.0
"""So many dropped connections get a line in the log within so many seconds; of a flood of them the
rest is counted in one line."""


class Server:
    """Accepts viewers until closed. Nothing that a viewer does can stop or slow the training."""

    def __init__(self, run: str, recorder: Recorder, control: CommandHandler) -> None:
        self._run = run
        self._recorder = recorder
        self._control = control
        self._lock = threading.Lock()
        self._connections: dict[int, ViewerConnection] = {}
        self._identities = itertools.count(1)
        self._listening: socket.socket | None = None
        self._path: Path | None = None
        self._drops: deque[float] = deque()
        self._drops_unsaid = 0
        self._served_any = threading.Event()
        self._closed = False
        _after_fork(self)

    def listen(self, path: Path) -> None:
        """Listen on a Unix socket at `path` (mode 0600); if somebody removes it, again as soon as
        its directory is there. Raises OSError."""
        self._listening, self._path = _listen(path), path
        threading.Thread(target=self._accept, name="tui-trainer accept", daemon=True).start()

    def serve(self, stream: socket.socket) -> threading.Thread:
        """Serve one viewer over a connected socket, on a new thread."""
        return self._serve(stream, None)

    def _serve(self, stream: socket.socket, silent_s: float | None) -> threading.Thread:
        identity = next(self._identities)
        connection = ViewerConnection(
            stream, identity, self._run, self._recorder, self._control, silent_s
        )
        with self._lock:
            self._connections[identity] = connection
        thread = threading.Thread(
            target=self._work,
            args=(identity, connection),
            name=f"tui-trainer viewer {identity}",
            daemon=True,
        )
        thread.start()
        return thread

    def wait_until_seen(self, timeout: float, first_within: float = 0.0) -> bool:
        """After the end: wait until every viewer was sent all of it, at most `timeout` seconds.

        When no viewer has ever come, wait `first_within` seconds for one: an app that has just
        started this process is still connecting.
        """
        deadline = time.monotonic() + timeout
        self._served_any.wait(min(timeout, first_within))
        with self._lock:
            waiting = list(self._connections.values())
        return all(c.seen_end.wait(max(0.0, deadline - time.monotonic())) for c in waiting)

    def close(self) -> None:
        """Stop listening, end all connections and remove the socket."""
        with self._lock:
            self._closed = True
            listening, self._listening = self._listening, None
        if listening is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            if self._path.parent.name.startswith("tui-trainer-"):
                with contextlib.suppress(OSError):
                    self._path.parent.rmdir()  # made for nothing but a short socket path
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while (listening := self._listening) is not None:
            try:
                stream, _ = listening.accept()
            except TimeoutError:
                self._look_after_socket(listening)
                continue
            except OSError as fault:
                if self._closed:
                    return
                self._recorder.fault("accepting viewers", fault)
                time.sleep(0.5)  # such as: too many open files; it may pass
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                with contextlib.suppress(OSError), stream:
                    stream.settimeout(0.1)
                    stream.send(encode(Refused(f"{MAX_CONNECTIONS} viewers look at this run")))
                continue
            self._serve(stream, SILENT_S)

    def _look_after_socket(self, listening: socket.socket) -> None:
        """What listens at a path that is gone is reached by nobody."""
        path = self._path
        if path is None or path.exists():
            return
        try:
            if path.parent.name.startswith(
                SOCKET_DIRECTORY_PREFIX
            ):  # some tidy temporary files away
                path.parent.mkdir(mode=0o700, exist_ok=True)
            again = _listen(path)
        except OSError:
            return  # its directory is not there yet
        with self._lock:
            if self._closed:
                again.close()
                path.unlink(missing_ok=True)
                return
            self._listening = again
        listening.close()
        text = "the run's directory was removed: it was made again, so that the run can be found"
        self._recorder.notice("state", text, "warning")

    def _work(self, identity: int, connection: ViewerConnection) -> None:
        self._served_any.set()
        try:
            connection.serve(self._drop)
        except Exception as fault:
            self._recorder.fault("serving a viewer", fault)
        finally:
            with self._lock:
                self._connections.pop(identity, None)

    def _drop(self, why: str) -> None:
        with self._lock:
            now = time.monotonic()
            while self._drops and self._drops[0] < now - DROPS_SAID_EVERY_S:
                self._drops.popleft()
            if len(self._drops) >= DROPS_SAID:
                self._drops_unsaid += 1
                return
            self._drops.append(now)
            unsaid, self._drops_unsaid = self._drops_unsaid, 0
        more = f" (and {unsaid:,} before it)" if unsaid else ""
        text = f"a viewer was dropped: {single_line(why, 300)}{more}"
        self._recorder.notice("viewer", text, "warning")

    def _let_go(self) -> None:
        """In a forked child (a data-loader worker): our sockets are the parent's alone."""
        listening, self._listening = self._listening, None
        self._path = None
        if listening is not None:
            with contextlib.suppress(OSError):
                os.close(listening.detach())
        for connection in self._connections.values():
            connection.close_descriptor()
        self._connections = {}
        self._lock = threading.Lock()


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(os.fspath(path))
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
    listening.listen(16)
    listening.settimeout(LOOK_EVERY_S)
    return listening


def _after_fork(server: Server) -> None:
    reference = weakref.ref(server)

    def let_go() -> None:
        found = reference()
        if found is not None:
            found._let_go()

    os.register_at_fork(after_in_child=let_go)
