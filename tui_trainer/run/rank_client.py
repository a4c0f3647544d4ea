"""The connection of a training process to rank 0, which records its measurements.

The client is a sink of this process's recorder and sends on the sink's thread; another thread
connects and reads. The training thread waits for neither. If rank 0 is not found or goes away, the
training continues.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tui_trainer import __version__
from tui_trainer.config.run_spec import find_socket
from tui_trainer.history.ranks import rank_row
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.events import LogLine, NonFinite, Notice
from tui_trainer.protocol.framing import ConnectionClosed, ProtocolError, encode, read_as
from tui_trainer.protocol.messages import EndState, Join, Status
from tui_trainer.protocol.ranks import (
    MAX_ANSWER_BYTES,
    MAX_BYTES,
    ROWS_PER_MESSAGE,
    InspectThere,
    Joined,
    Leave,
    RankLine,
    RankNotice,
    RankRow,
    RankRows,
    ToRank,
    ToRankZero,
    to_rank,
)
from tui_trainer.protocol.schema import Table
from tui_trainer.record.sink_items import InfoChanged, Item, StepRecorded
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.security import connect_unix

FIND_S = 60.0
"""How long to look for rank 0, which may be importing from a slow disk."""
RETRY_S = 0.1
SEND_TIMEOUT_S = 10.0
LEAVE_S = 8.0
"""How long the end of the training waits for rank 0 to be found, and then for unsent messages.
Together with `rank_host.FLUSH_S`, less than the 30 s after which torchrun kills a process."""
BACKLOG = 20_000
"""Messages kept until rank 0 is found."""
LINE_CHARACTERS = 4_000


def _do_nothing(*_: Any) -> None:
    pass


@dataclass
class RankClientHooks:
    """Callbacks of the client, called on its reading thread."""

    message: Callable[[ToRank], None] = _do_nothing
    """Called with each message of rank 0."""
    asked: Callable[[InspectThere], None] = _do_nothing
    """Called, instead of `message`, with each request to inspect this process's tensors."""
    lost: Callable[[], None] = _do_nothing
    """Called once when rank 0 was not found or the connection has ended."""


Connect = Callable[[], socket.socket | None]
"""Connects to rank 0's run; None while it does not listen. Raises RunError if it never will."""


def connect_locally(locate: Callable[[], Path | None]) -> Connect:
    """Connects to a run on this machine; `locate()`: its directory, once it is known."""

    def connect() -> socket.socket | None:
        directory = locate()
        path = find_socket(directory) if directory is not None else None
        if path is None:
            return None
        try:
            return connect_unix(path)
        except RunError:  # not listening yet, or not trusted
            return None

    return connect


class RankClient:
    """The connection of one training process to the run."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        label: str,
        connect: Connect,
        warn: Callable[[str], None],
        shared: int = -1,
        host: str = "",
    ) -> None:
        """`rank`: -1 for a child process, which rank 0 numbers; `connect()`: called on a thread of
        the client's until it succeeds; `warn(text)`: called once if rank 0 is not found or is lost;
        `shared`: the descriptor of the memory with this process's position; `host`: the name of
        this machine, if rank 0 runs on another."""
        self._join = Join(PROTOCOL_VERSION, __version__, rank, world_size, os.getpid(), label, host)
        self._open = connect
        self._warn = warn
        self._shared = shared
        self.hooks = RankClientHooks()
        self._sending = threading.Lock()
        self._stream: socket.socket | None = None
        self._backlog: deque[ToRankZero] = deque(maxlen=BACKLOG)
        self._given_up = False
        self._leaving = threading.Event()
        self._settled = threading.Event()
        """Set once rank 0 has been found or the search has failed."""
        self._tables: tuple[Table, ...] = ()
        self._thread = threading.Thread(target=self._work, name="tui-trainer rank", daemon=True)

    @property
    def connected(self) -> bool:
        return self._stream is not None

    def start(self) -> None:
        self._thread.start()

    def send(self, message: ToRankZero) -> None:
        """Send a message, or keep it until rank 0 is found. Not for the training thread."""
        with self._sending:
            if self._given_up:
                return
            if self._stream is None:
                self._backlog.append(message)
                return
            self._send_now(message)

    def leave(self, state: EndState, reason: str, step: int) -> None:
        """Report how the training ended, and close the connection."""
        if not self._settled.wait(LEAVE_S):
            self._warn(f"{self._name()} was not recorded: its run was not found")
        self.send(Leave(state, reason, step))
        self._leaving.set()
        with self._sending:
            stream, self._stream, self._given_up = self._stream, None, True
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_WR)
            self._thread.join(LEAVE_S)
            stream.close()

    # ------------------------------------------------------------ sink

    def take(self, items: Sequence[Item], status: Status) -> None:
        rows: list[RankRow] = []
        for item in items:
            match item:
                case InfoChanged():
                    self._tables = item.info.tables
                case StepRecorded(record=record):
                    values = rank_row(self._tables, record)
                    rows.append(RankRow(record.step, record.time, values.tobytes()))
                case LogLine():
                    self.send(RankLine(item.stream, item.text[:LINE_CHARACTERS]))
                case Notice() if item.level != "info":
                    text = item.text[:LINE_CHARACTERS]
                    self.send(RankNotice(item.kind, text, item.level, item.step))
                case NonFinite():
                    text = item.text[:LINE_CHARACTERS]
                    self.send(RankNotice("rank", text, "warning", item.step))
                case _:
                    pass
        for first in range(0, len(rows), ROWS_PER_MESSAGE):
            self.send(RankRows(tuple(rows[first : first + ROWS_PER_MESSAGE])))

    def close(self) -> None:
        """Does nothing: `leave` closes the connection."""

    # ------------------------------------------------------------ the connection

    def _work(self) -> None:
        lost = "its run was not found"
        try:
            stream = self._connect()
            if stream is not None:
                lost = "the connection to its run has ended"
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        message = read_as(stream.recv, to_rank, MAX_BYTES)
                        if isinstance(message, InspectThere):
                            self.hooks.asked(message)
                        else:
                            self.hooks.message(message)
        except (OSError, ProtocolError, RunError) as error:
            lost = f"{lost}: {error}"
        finally:
            with self._sending:
                self._given_up, self._stream = True, None
                self._backlog.clear()
            self._settled.set()
            if not self._leaving.is_set():
                self._warn(f"{self._name()} is not recorded, training continues: {lost}")
            self.hooks.lost()

    def _name(self) -> str:
        return self._join.label or f"rank {self._join.rank}"

    def _connect(self) -> socket.socket | None:
        deadline = time.monotonic() + FIND_S
        while (found := self._try()) is None:
            if time.monotonic() > deadline or self._leaving.wait(RETRY_S):
                return None
        stream, joined = found
        if not isinstance(joined, Joined):
            raise ProtocolError(getattr(joined, "reason", "an unexpected answer"))
        self._join = msgspec.structs.replace(self._join, rank=joined.rank)
        self._share(stream)
        with self._sending:
            self._stream = stream
            while self._backlog and self._stream is not None:
                self._send_now(self._backlog.popleft())
        self._settled.set()
        return stream

    def _share(self, stream: socket.socket) -> None:
        """Send the descriptor of the memory with this process's position."""
        descriptors = [self._shared] if self._shared >= 0 and not self._join.host else []
        socket.send_fds(stream, [b"\0"], descriptors)

    def _try(self) -> tuple[socket.socket, ToRank] | None:
        stream = self._open()
        if stream is None:
            return None
        stream.settimeout(SEND_TIMEOUT_S)
        stream.sendall(encode(self._join, MAX_BYTES))
        answer = read_as(stream.recv, to_rank, MAX_BYTES)
        stream.settimeout(None)
        return stream, answer

    def _send_now(self, message: ToRankZero) -> None:
        """Send a message while holding the lock. A connection that fails is closed for good."""
        stream = self._stream
        assert stream is not None
        try:
            stream.sendall(encode(message, MAX_ANSWER_BYTES))
        except (OSError, ProtocolError):
            self._stream, self._given_up = None, True
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
