"""Serving viewers: a Unix socket that only its owner can reach, one thread a connection."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
import weakref
from collections import deque
from pathlib import Path

from tui_trainer.config.spec import ELSEWHERE
from tui_trainer.protocol.framing import encode
from tui_trainer.protocol.messages import Refused
from tui_trainer.protocol.text import printable
from tui_trainer.recording.recorder import Recorder
from tui_trainer.run import connection as connections
from tui_trainer.run.connection import Connection
from tui_trainer.run.control import Control

MAX_CONNECTIONS = 64
LOOK_EVERY_S = 1.0
"""How often the server looks whether its socket is still there."""
DROPS_SAID, DROPS_SAID_EVERY_S = 20, 600.0
"""So many dropped connections get a line in the log within so many seconds; of a flood of them the
rest is counted in one line."""


class Server:
    """Accepts viewers until closed. Nothing that a viewer does can stop or slow the training."""

    def __init__(self, run: str, recorder: Recorder, control: Control) -> None:
        self._run = run
        self._recorder = recorder
        self._control = control
        self._lock = threading.Lock()
        self._connections: dict[int, Connection] = {}
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
        connection = Connection(
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
            self._serve(stream, connections.SILENT_S)

    def _look_after_socket(self, listening: socket.socket) -> None:
        """What listens at a path that is gone is reached by nobody."""
        path = self._path
        if path is None or path.exists():
            return
        try:
            if path.parent.name.startswith(ELSEWHERE):  # some tidy temporary files away
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

    def _work(self, identity: int, connection: Connection) -> None:
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
        text = f"a viewer was dropped: {printable(why, 300)}{more}"
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
