"""The run's side of a connection: a small server that answers as a test scripts it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tui_trainer.client.connection import Connector, connector
from tui_trainer.history import MemoryHistory
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.events import LogLine, Notice
from tui_trainer.protocol.framing import ConnectionClosed, ProtocolError, encode, read_to_run
from tui_trainer.protocol.messages import Ack, Command, Hello, Poll, Status, Update, Welcome
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.runs.security import connect_unix

TABLES = (
    Table(0, "step", (Column("loss"), Column("learning_rate"))),
    Table(1, "grad_norm", tuple(Column(f"p{i}") for i in range(50))),
)
Behaviour = Callable[["ScriptedRun", socket.socket], None]


class ScriptedRun:
    """Listens on a Unix socket. Connection k is served by `behaviours[k]`, the rest by `serve`."""

    def __init__(self, path: Path, *behaviours: Behaviour) -> None:
        self.path = path
        self.behaviours = list(behaviours)
        self.info = RunInfo("quiet-otter", "gpt", revision=1, tables=TABLES)
        self.status = Status(state="running")
        self.history = MemoryHistory(TABLES)
        self.events: list[Notice] = []
        self.log: list[LogLine] = []
        self.polls: list[Poll] = []
        self.commands: list[Command] = []
        self.hellos: list[Hello] = []
        self.connections: list[socket.socket] = []
        self.lock = threading.RLock()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        path.chmod(0o600)
        self._listening.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connector(self) -> Connector:
        return connector(lambda: connect_unix(self.path))

    def steps(self, count: int) -> None:
        """Make steps: the loss is 1/step with a spike at every hundredth, each norm is the step."""
        with self.lock:
            for step in range(self.status.step + 1, self.status.step + count + 1):
                loss = 1e6 if step % 100 == 0 else 1 / step
                self.history.tables[0].append(step, np.array([loss, 0.1], np.float32))
                self.history.tables[1].append(step, np.full(50, step, np.float32))
                self.log.append(LogLine(len(self.log), 0.0, step, "stdout", f"step {step}"))
                self.events.append(Notice(len(self.events), step, 0.0, "state", "a step"))
            self.status = Status(state=self.status.state, step=self.status.step + count)

    def end(self) -> None:
        self.status = Status(state="finished", step=self.status.step)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.path.unlink(missing_ok=True)
        for connection in self.connections:
            drop(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections.append(connection)
            behaviour = self.behaviours.pop(0) if self.behaviours else serve
            threading.Thread(target=self._serve, args=(behaviour, connection), daemon=True).start()

    def _serve(self, behaviour: Behaviour, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ConnectionClosed, ProtocolError):
            behaviour(self, connection)
        drop(connection)

    def update_for(self, poll: Poll) -> Update:
        with self.lock:
            self.polls.append(poll)
            rows, more = self.history.rows_since(poll.rows, poll.budget)
            return Update(
                status=self.status,
                info=None if poll.revision == self.info.revision else self.info,
                rows=rows,
                events=tuple(self.events[poll.event :]),
                log=tuple(self.log[poll.log :]),
                more=more,
            )


def drop(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def greet(run: ScriptedRun, connection: socket.socket) -> None:
    hello = read_to_run(connection.recv)
    assert isinstance(hello, Hello)
    run.hellos.append(hello)
    connection.sendall(encode(Welcome(PROTOCOL_VERSION, "0", run.info.name, len(run.hellos))))


def answer_one(run: ScriptedRun, connection: socket.socket) -> None:
    message = read_to_run(connection.recv)
    if isinstance(message, Poll):
        connection.sendall(encode(run.update_for(message)))
    elif isinstance(message, Command):
        run.commands.append(message)
        connection.sendall(encode(Ack(message.id, True, run.status, "done")))


def serve(run: ScriptedRun, connection: socket.socket) -> None:
    greet(run, connection)
    while True:
        answer_one(run, connection)


def serve_for(count: int) -> Behaviour:
    """Answer `count` messages, then close."""

    def behave(run: ScriptedRun, connection: socket.socket) -> None:
        greet(run, connection)
        for _ in range(count):
            answer_one(run, connection)

    return behave


def until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.005)
