"""Serves viewers over a Unix socket that only the user can connect to, with a thread for each.

Nothing that a viewer does can stop or slow down the training. `record/viewer_updates.py` decides
what a viewer is sent, and how much.
"""

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
from tui_trainer.protocol.formatting import rough_duration
from tui_trainer.protocol.framing import ConnectionClosed, ProtocolError, encode, read_to_run
from tui_trainer.protocol.inspection import Inspect, Inspected
from tui_trainer.protocol.messages import (
    Ack,
    Command,
    Hello,
    Join,
    Poll,
    Refused,
    ToRun,
    ToViewer,
    Update,
    Welcome,
)
from tui_trainer.protocol.text import single_line
from tui_trainer.protocol.travel import Experiment
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.control import CommandHandler, Viewer
from tui_trainer.run.inspection import Inspections
from tui_trainer.runs.security import peer_user

GREETING_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
FRAME_TIMEOUT_S = 10.0
"""Limit for the rest of a message once its first byte has arrived."""
IDLE_TIMEOUT_S = 300.0
"""A viewer that sends nothing for this long is disconnected. The app polls at least once a minute,
and reconnects when it has been suspended for longer."""
VIEWER_NAME_CHARACTERS = 80
MAX_CONNECTIONS = 64
"""Viewers and training processes."""
CHECK_SOCKET_EVERY_S = 1.0
"""How often the server checks that its socket still exists."""
MAX_REPORTED_DROPS, REPORTED_DROPS_PERIOD_S = 20, 600.0
"""How many dropped viewers are reported within a period; further ones are only counted."""


class ViewerTimeout(Exception):
    """The viewer does not read its answers, or sends nothing."""


class ViewerConnection:
    """The protocol with one viewer over a connected socket. `serve` alone uses the stream."""

    def __init__(
        self,
        stream: socket.socket,
        viewer_id: int,
        run_name: str,
        recorder: Recorder,
        control: CommandHandler,
        *,
        idle_timeout_s: float | None = None,
        serve_rank: Callable[[socket.socket, Join], None] | None = None,
        inspections: Inspections | None = None,
    ) -> None:
        self._stream = stream
        self._inspections = inspections
        self._serve_rank = serve_rank
        self._viewer_id = viewer_id
        self._run_name = run_name
        self._recorder = recorder
        self._control = control
        self._idle_timeout_s = idle_timeout_s
        self._reported_too_large: set[str] = set()
        self.viewer: Viewer | None = None
        self.seen_end = threading.Event()
        """Set once the viewer has received everything of an ended run, or is gone."""

    def serve(self, on_drop: Callable[[str], None]) -> None:
        """Answer until the connection ends; `on_drop(reason)` if the viewer is at fault."""
        try:
            self._greet()
            while self.viewer is not None:
                self._answer(self._receive())
        except ConnectionClosed as closed:
            if closed.left:
                on_drop(f"it disconnected {closed.left:,} bytes into a message")
        except ConnectionError:
            pass
        except (ProtocolError, ViewerTimeout) as error:
            on_drop(str(error))
        except TimeoutError:
            on_drop(f"it sent no greeting within {rough_duration(GREETING_TIMEOUT_S)}")
        except OSError as error:
            if self._stream.fileno() >= 0:
                on_drop(str(error))
        finally:
            self.seen_end.set()
            if self.viewer is not None:
                self._control.left(self.viewer)
                if self._inspections is not None:
                    self._inspections.left(self.viewer.id)
            self.close()

    def close(self) -> None:
        """End the connection, even if a forked child still has a copy of the socket."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()

    def close_descriptor(self) -> None:
        """Close a forked child's copy of the socket, and leave the parent's connection open."""
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
        if not isinstance(hello, Hello | Join):
            self._send(Refused("the first message must be a greeting"))
            raise ProtocolError(f"its first message was a {type(hello).__name__}, not a greeting")
        if hello.protocol != PROTOCOL_VERSION:
            sender = "viewer" if isinstance(hello, Hello) else "process"
            theirs = f"protocol {hello.protocol} (tui-trainer {single_line(hello.product, 40)})"
            self._send(
                Refused(
                    f"the run speaks protocol {PROTOCOL_VERSION} (tui-trainer {__version__}), "
                    f"this {sender} {theirs}",
                    "use the same version of tui-trainer on both sides",
                )
            )
            raise ProtocolError(f"it speaks {theirs}")
        if isinstance(hello, Join):
            if self._serve_rank is None:
                self._send(Refused("this run accepts no further training processes"))
                raise ProtocolError("a training process tried to join")
            self.seen_end.set()  # the end of the run does not wait for it as for a viewer
            self._serve_rank(self._stream, hello)
            return
        name = single_line(hello.viewer, VIEWER_NAME_CHARACTERS) or f"viewer {self._viewer_id}"
        self.viewer = Viewer(self._viewer_id, name, hello.read_only)
        self._control.joined(self.viewer)
        self._send(Welcome(PROTOCOL_VERSION, __version__, self._run_name, self._viewer_id))

    def _receive(self) -> ToRun:
        """The next message. The viewer may be idle between messages, but not within one."""
        deadline: float | None = None

        def read(size: int) -> bytes:
            nonlocal deadline
            left = self._idle_timeout_s if deadline is None else deadline - time.monotonic()
            self._stream.settimeout(left if left is None else max(0.001, left))
            part = self._stream.recv(size)
            deadline = deadline or time.monotonic() + FRAME_TIMEOUT_S
            return part

        try:
            return read_to_run(read)
        except TimeoutError:
            if deadline is not None:
                raise ViewerTimeout("it stopped in the middle of a message") from None
            raise ViewerTimeout(
                f"it sent nothing for {rough_duration(self._idle_timeout_s)}"
            ) from None
        finally:
            self._stream.settimeout(None)

    def _answer(self, message: ToRun) -> None:
        assert self.viewer is not None
        match message:
            case Poll():
                update = self._recorder.update_for(message, self._viewer_id)
                self._send(update)
                if update.status.ended and not update.more:
                    self.seen_end.set()
            case Command():
                result = self._control.perform(self.viewer, message.action)
                status = self._recorder.status
                self._send(Ack(message.id, result.ok, status, result.message, result.hint))
            case Inspect():
                self._send(self._inspected(message))
            case Hello() | Join():
                raise ProtocolError("it sent a second greeting")

    def _inspected(self, message: Inspect) -> Inspected:
        if self._inspections is None:
            return Inspected(message.id, "failed", message="this run has no tensors")
        experiment = isinstance(message.request, Experiment)
        if experiment and self.viewer is not None and self.viewer.read_only:
            why = "this viewer is read-only, and an experiment pauses the training"
            return Inspected(message.id, "failed", message=why)
        return self._inspections.answer(self._viewer_id, message)

    def _send(self, message: ToViewer) -> None:
        try:
            data = memoryview(encode(message))
        except ProtocolError:
            if not isinstance(message, Update):
                raise
            data = memoryview(self._encode_reduced(message))
        deadline = time.monotonic() + SEND_TIMEOUT_S
        try:
            while data:
                self._stream.settimeout(max(0.001, deadline - time.monotonic()))
                data = data[self._stream.send(data) :]
        except TimeoutError:
            raise ViewerTimeout(f"it read nothing for {rough_duration(SEND_TIMEOUT_S)}") from None
        self._stream.settimeout(None)

    def _encode_reduced(self, update: Update) -> bytes:
        """Encode an update that exceeds the size of a frame without its large parts; logs which."""
        reduced = msgspec.structs.replace(update, artifacts=(), report=None, more=False)
        omitted = "samples and the report of the phase"
        try:
            data = encode(reduced)
        except ProtocolError:  # there may be hundreds of thousands of parameters to describe
            reduced = msgspec.structs.replace(reduced, info=None, rows=(), cadences=())
            data, omitted = encode(reduced), "the description of the run and all measurements"
        if omitted not in self._reported_too_large:
            self._reported_too_large.add(omitted)
            name = self.viewer.name if self.viewer else "a viewer"
            self._recorder.notice("viewer", f"too large to send to {name}: {omitted}", "error")
        return data


class Server:
    """Accepts viewers until it is closed."""

    def __init__(
        self,
        run_name: str,
        recorder: Recorder,
        control: CommandHandler,
        *,
        serve_rank: Callable[[socket.socket, Join], None] | None = None,
        inspections: Inspections | None = None,
    ) -> None:
        """`serve_rank(stream, join)` serves a training process that has joined the run."""
        self._inspections = inspections
        self._serve_rank = serve_rank
        self._run_name = run_name
        self._recorder = recorder
        self._control = control
        self._lock = threading.Lock()
        self._connections: dict[int, ViewerConnection] = {}
        self._viewer_ids = itertools.count(1)
        self._socket: socket.socket | None = None
        self._path: Path | None = None
        self._reported_drops: deque[float] = deque()
        self._unreported_drops = 0
        self._served_any = threading.Event()
        self._closed = False
        _close_in_children(self)

    def listen(self, path: Path) -> None:
        """Listen on a Unix socket at `path` (mode 0600). A socket that is removed is created again
        as soon as its directory exists. Raises OSError."""
        self._socket, self._path = _listen(path), path
        threading.Thread(target=self._accept, name="tui-trainer accept", daemon=True).start()

    def serve(self, stream: socket.socket) -> threading.Thread:
        """Serve a viewer over a connected socket, on a new thread."""
        return self._serve(stream, None)

    def _serve(self, stream: socket.socket, idle_timeout_s: float | None) -> threading.Thread:
        viewer_id = next(self._viewer_ids)
        connection = ViewerConnection(
            stream,
            viewer_id,
            self._run_name,
            self._recorder,
            self._control,
            idle_timeout_s=idle_timeout_s,
            serve_rank=self._serve_rank,
            inspections=self._inspections,
        )
        with self._lock:
            self._connections[viewer_id] = connection
        thread = threading.Thread(
            target=self._work,
            args=(viewer_id, connection),
            name=f"tui-trainer viewer {viewer_id}",
            daemon=True,
        )
        thread.start()
        return thread

    def wait_until_seen(self, timeout: float, first_within: float = 0.0) -> bool:
        """After the end: wait up to `timeout` seconds until every viewer has everything.

        If no viewer has ever connected, wait `first_within` seconds for one: the app that has just
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
            listening, self._socket = self._socket, None
        if listening is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            if self._path.parent.name.startswith(SOCKET_DIRECTORY_PREFIX):
                with contextlib.suppress(OSError):
                    self._path.parent.rmdir()
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while (listening := self._socket) is not None:
            try:
                stream, _ = listening.accept()
            except TimeoutError:
                self._restore_socket(listening)
                continue
            except OSError as error:
                if self._closed:
                    return
                self._recorder.fault("accepting viewers", error)
                time.sleep(0.5)  # for example, too many open files: it may pass
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                with contextlib.suppress(OSError), stream:
                    stream.settimeout(0.1)
                    refused = Refused(f"this run already has {MAX_CONNECTIONS} connections")
                    stream.send(encode(refused))
                continue
            self._serve(stream, IDLE_TIMEOUT_S)

    def _restore_socket(self, listening: socket.socket) -> None:
        """Listen on a new socket if the file of the current one was removed."""
        path = self._path
        if path is None or path.exists():
            return
        try:
            if path.parent.name.startswith(SOCKET_DIRECTORY_PREFIX):  # removed by a /tmp cleaner
                path.parent.mkdir(mode=0o700, exist_ok=True)
            restored = _listen(path)
        except OSError:
            return  # its directory does not exist yet
        with self._lock:
            if self._closed:
                restored.close()
                path.unlink(missing_ok=True)
                return
            self._socket = restored
        listening.close()
        text = "the run's directory was removed; it was created again so that viewers can attach"
        self._recorder.notice("state", text, "warning")

    def _work(self, viewer_id: int, connection: ViewerConnection) -> None:
        self._served_any.set()
        try:
            connection.serve(self._report_drop)
        except Exception as error:
            self._recorder.fault("serving a viewer", error)
        finally:
            with self._lock:
                self._connections.pop(viewer_id, None)

    def _report_drop(self, reason: str) -> None:
        with self._lock:
            now = time.monotonic()
            reported = self._reported_drops
            while reported and reported[0] < now - REPORTED_DROPS_PERIOD_S:
                reported.popleft()
            if len(reported) >= MAX_REPORTED_DROPS:
                self._unreported_drops += 1
                return
            reported.append(now)
            unreported, self._unreported_drops = self._unreported_drops, 0
        more = f" (and {unreported:,} before it)" if unreported else ""
        text = f"a viewer was dropped: {single_line(reason, 300)}{more}"
        self._recorder.notice("viewer", text, "warning")

    def _close_in_child(self) -> None:
        """Close the copies of the sockets in a forked child, such as a data-loader worker."""
        listening, self._socket = self._socket, None
        self._path = None
        if listening is not None:
            with contextlib.suppress(OSError):
                os.close(listening.detach())
        for connection in self._connections.values():
            connection.close_descriptor()
        self._connections = {}
        self._lock = threading.Lock()


def _listen(path: Path) -> socket.socket:
    """Create a socket that appears at `path` once it listens, so that no viewer finds one that
    refuses connections. The umask is left alone: all threads of the process share it."""
    starting = path.with_suffix(".new")
    starting.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(os.fspath(starting))
        starting.chmod(0o600)
        listening.listen(16)
        starting.replace(path)
    except OSError:
        listening.close()
        starting.unlink(missing_ok=True)
        raise
    listening.settimeout(CHECK_SOCKET_EVERY_S)
    return listening


def _close_in_children(server: Server) -> None:
    reference = weakref.ref(server)

    def close() -> None:
        if (found := reference()) is not None:
            found._close_in_child()

    os.register_at_fork(after_in_child=close)
