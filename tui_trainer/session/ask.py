"""A short conversation with a run, for commands that ask and leave: each answer is waited for."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import sys
from types import TracebackType

from tui_trainer import __version__
from tui_trainer.history import History
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.framing import ConnectionClosed, ProtocolError, encode, read_to_viewer
from tui_trainer.protocol.messages import (
    Ack,
    Action,
    Command,
    Event,
    Hello,
    LogLine,
    Poll,
    Refused,
    TakeControl,
    ToRun,
    ToViewer,
    Update,
    Welcome,
)
from tui_trainer.protocol.text import harmless_all
from tui_trainer.session.registry import Run, live_socket
from tui_trainer.session.trust import RunError, connect_unix

ANSWER_TIMEOUT_S = 10.0


def who_asks(command: str = "") -> str:
    """`user@host`, with the command or terminal that asks: shown to the other viewers."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    with contextlib.suppress(OSError, ValueError, AttributeError):
        command = command or os.ttyname(sys.stdin.fileno())
    return f"{user}@{socket.gethostname()}" + (f" ({command})" if command else "")


class Conversation:
    """A viewer that polls and commands when told to. Not safe for use from several threads."""

    def __init__(self, connection: socket.socket, who: str, read_only: bool = True) -> None:
        self._connection = connection
        self._connection.settimeout(ANSWER_TIMEOUT_S)
        self._commands = 0
        self.history = History()
        self.info: RunInfo | None = None
        self.events: list[Event] = []
        self.log: list[LogLine] = []
        self._artifact = 0
        self._send(Hello(PROTOCOL_VERSION, __version__, who, read_only))
        answer = self._receive()
        if isinstance(answer, Refused):
            raise RunError(f"the run refuses: {answer.reason}", answer.hint)
        if not isinstance(answer, Welcome):
            raise RunError("the run does not greet as tui-trainer does")
        self.viewer_id = answer.viewer_id

    @classmethod
    def with_run(cls, run: Run, command: str, read_only: bool = True) -> Conversation:
        """Begin one with a live run on this machine. Raises RunError."""
        connection = connect_unix(live_socket(run))
        try:
            return cls(connection, who_asks(command), read_only)
        except BaseException:
            connection.close()
            raise

    def poll(self, budget: int = 1 << 20, watch: tuple[str, ...] = ()) -> Update:
        """Ask for everything since the last poll and take it in. Raises RunError."""
        poll = Poll(
            revision=self.info.revision if self.info else -1,
            rows=self.history.cursors(),
            event=self.events[-1].id + 1 if self.events else 0,
            log=self.log[-1].id + 1 if self.log else 0,
            artifact=self._artifact,
            watch=watch,
            budget=budget,
        )
        self._send(poll)
        update = self._receive()
        if not isinstance(update, Update):
            raise RunError(f"the run answers a poll with {type(update).__name__}")
        self._take(update)
        return update

    def command(self, action: Action) -> Ack:
        """Send one command and wait for its answer. Raises RunError."""
        self._commands += 1
        self._send(Command(self._commands, action))
        ack = self._receive()
        if not isinstance(ack, Ack):
            raise RunError(f"the run answers a command with {type(ack).__name__}")
        return ack

    def insist(self, action: Action) -> Ack:
        """Send a command; where another viewer holds control, take it, which all of them see."""
        ack = self.command(action)
        if ack.ok or ack.status.controller in (None, self.viewer_id):
            return ack
        taken = self.command(TakeControl())
        return self.command(action) if taken.ok else taken

    def close(self) -> None:
        """Leave; the run goes on."""
        self._connection.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, update: Update) -> None:
        if update.info is not None:
            self.info = update.info
            for table in update.info.tables:
                self.history.declare(table)
        for rows in update.rows:
            self.history.apply(rows)
        self.events.extend(update.events)
        self.log.extend(update.log)
        if update.artifacts:
            self._artifact = update.artifacts[-1].id + 1

    def _send(self, message: ToRun) -> None:
        try:
            self._connection.sendall(encode(message))
        except (BrokenPipeError, ConnectionResetError):
            return  # closed at the other end: what it said before that is still to be read
        except OSError as fault:
            raise RunError(f"the run no longer answers: {fault.strerror or fault}") from fault

    def _receive(self) -> ToViewer:
        try:
            return harmless_all(read_to_viewer(self._connection.recv))
        except TimeoutError as fault:
            raise RunError(f"the run gave no answer within {ANSWER_TIMEOUT_S:.0f} s") from fault
        except ConnectionClosed as fault:
            raise RunError("the run ended the connection") from fault
        except ProtocolError as fault:
            raise RunError(f"what answers is no run of tui-trainer: {fault}") from fault
        except OSError as fault:
            raise RunError(f"the run no longer answers: {fault.strerror or fault}") from fault
