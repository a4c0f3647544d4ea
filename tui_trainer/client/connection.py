"""One connection to a run, speaking the protocol: the app and the command line both use it.

`Connection` runs on an asyncio event loop: in the app, on the loop of the session thread
(`client/live.py`); in a `RunClient`, on a separate loop that runs only while an answer is due.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import itertools
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

import msgspec

from tui_trainer import __version__
from tui_trainer.client.api import Snapshot, SnapshotBuilder
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.actions import Action, TakeControl
from tui_trainer.protocol.formatting import rough_duration
from tui_trainer.protocol.framing import FrameBuffer, ProtocolError, encode
from tui_trainer.protocol.inspection import (
    Inspect,
    Inspected,
    InspectionRequest,
    OfRank,
    RankRequest,
)
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
from tui_trainer.protocol.text import sanitize_message
from tui_trainer.runs.errors import RunError, RunGone
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import live_socket
from tui_trainer.runs.security import connect_unix

SILENCE_S = 10.0
"""The connection is lost when an answer is due and no byte arrives for this long."""
FRAME_S = 120.0
"""The connection is also lost when a single message takes longer than this to arrive."""
MAX_TABLES = 1 << 16

Connector = Callable[[], AbstractAsyncContextManager[socket.socket]]
"""Connects to a run; the connected socket is the caller's until the context ends. Raises
NotListening and Unreachable, after which another attempt may succeed, and RunGone or another
RunError when it cannot.
"""


class ConnectionLost(RunError):
    """The connection has failed."""


class PeerClosed(ConnectionLost):
    """The other end closed the connection."""


def connector(open_socket: Callable[[], socket.socket]) -> Connector:
    """A Connector made from a function that connects."""

    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[socket.socket]:
        with open_socket() as connection:
            yield connection

    return connected


def whoami(command: str = "") -> str:
    """`user@host (command or terminal)`, the name under which other viewers see this one."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = str(os.getuid())
    with contextlib.suppress(OSError):
        command = command or os.ttyname(0).removeprefix("/dev/")
    return f"{user}@{socket.gethostname()}" + (f" ({command})" if command else "")


def next_poll(poll: Poll, update: Update) -> Poll:
    """The poll for everything after `update`, which is the answer to `poll`."""
    rows = list(poll.rows)
    for part in update.rows:
        if 0 <= part.table < MAX_TABLES:  # applying rows of any other table fails
            rows += [0] * (part.table + 1 - len(rows))
            rows[part.table] = part.first + part.count
    report = poll.report if update.status.state == "paused" else None
    if update.report is not None:
        report = (update.report.step, update.report.phase)
    return msgspec.structs.replace(
        poll,
        revision=update.info.revision if update.info is not None else poll.revision,
        rows=tuple(rows),
        event=update.events[-1].id + 1 if update.events else poll.event,
        log=update.log[-1].id + 1 if update.log else poll.log,
        artifact=update.artifacts[-1].id + 1 if update.artifacts else poll.artifact,
        report=report,
    )


def poll_again(poll: Poll, rows: tuple[int, ...]) -> Poll:
    """A poll that repeats `poll`, whose answer could not be applied; `rows` is the number of rows
    that the viewer has of each table."""
    return msgspec.structs.replace(poll, revision=-1, rows=rows)


class Connection(asyncio.Protocol):
    """Greets a run, then polls it and sends it commands, which do not wait for the answer to a
    poll.

    Used from the thread of the event loop, except for `bytes_received` and `polled_at`.
    """

    def __init__(self, on_lost: Callable[[], None] | None = None) -> None:
        self.error: RunError | None = None
        """Why the connection ended, unless it was closed here."""
        self.bytes_received = 0
        self.polled_at: float | None = None
        """When (`time.monotonic`) the unanswered poll was sent; None while every poll is
        answered."""
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._frames = FrameBuffer()
        self._welcome: asyncio.Future[Welcome] = self._loop.create_future()
        self._update: asyncio.Future[Update] | None = None
        self._acks: dict[int, asyncio.Future[Ack]] = {}
        self._inspected: dict[int, asyncio.Future[Inspected]] = {}
        self._command_ids = itertools.count(1)
        self._heard_at = self._frame_began_at = time.monotonic()
        self._silence_timer: asyncio.TimerHandle | None = None

    async def greet(self, connected: socket.socket, hello: Hello) -> Welcome:
        """Take over a connected socket and greet the run.

        Raises RunGone when the run refuses this viewer and ConnectionLost when it does not answer.
        """
        connected.setblocking(False)
        # Sent before there is a transport: a run that refuses may have closed its end already, and
        # a transport whose write failed would not read the reason.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await self._loop.sock_sendall(connected, encode(hello))
        self._watch_for_silence()
        await self._loop.create_connection(lambda: self, sock=connected)
        welcome = await self._welcome
        if welcome.protocol != PROTOCOL_VERSION:
            raise RunGone(
                f"the run speaks protocol {welcome.protocol} (tui-trainer {welcome.product}), "
                f"this is {PROTOCOL_VERSION} ({__version__})",
                "use the same version of tui-trainer on both sides",
            )
        return welcome

    async def poll(self, poll: Poll) -> Update:
        """Ask for what is new; one poll at a time. Raises RunError when the connection ends."""
        assert self._update is None, "one poll at a time"
        answer: asyncio.Future[Update] = self._send(poll)
        self._update, self.polled_at = answer, time.monotonic()
        return await answer

    def command(self, action: Action) -> asyncio.Future[Ack]:
        """Send a command. The future raises RunError when the connection ends before the answer."""
        number = next(self._command_ids)
        answer = self._acks[number] = self._send(Command(number, action))
        return answer

    async def inspect(self, request: InspectionRequest) -> Inspected:
        """Request an inspection, and repeat the request until the run has answered; the run serves
        only the latest request of a connection. Raises RunError when the connection ends."""
        number = next(self._command_ids)
        while True:
            answer = self._inspected[number] = self._send(Inspect(number, request))
            inspected: Inspected = await answer
            if inspected.state != "pending":
                return inspected

    @property
    def commands_due(self) -> int:
        """Commands that are not acknowledged yet."""
        return len(self._acks)

    def close(self) -> None:
        """End the connection; answers that are due are cancelled."""
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        for future in self._due():
            future.cancel()
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: RunError) -> None:
        """End the connection; answers that are due raise `error`."""
        if self.error is not None:
            return
        self.error = error
        for future in self._due():
            future.set_exception(error)
        self.close()
        if self._on_lost is not None:
            self._on_lost()

    def _due(self) -> list[asyncio.Future[Any]]:
        polls = () if self._update is None else (self._update,)
        answers = (self._welcome, *polls, *self._acks.values(), *self._inspected.values())
        return [each for each in answers if not each.done()]

    def _send(self, message: Poll | Command | Inspect) -> asyncio.Future[Any]:
        """Send a message at once; returns the future of its answer."""
        answer = self._loop.create_future()
        if self.error is not None:
            answer.set_exception(self.error)
            return answer
        if not self._due():
            self._heard_at = time.monotonic()
        self._watch_for_silence()
        assert self._transport is not None, "greet first"
        self._transport.write(encode(message))
        return answer

    # ------------------------------------------------------------ silence

    def _watch_for_silence(self, seconds: float | None = None) -> None:
        if self._silence_timer is None:
            after = SILENCE_S if seconds is None else seconds
            self._silence_timer = self._loop.call_later(after, self._check_silence)

    def _check_silence(self) -> None:
        self._silence_timer = None
        now = time.monotonic()
        left = self._heard_at + SILENCE_S - now
        if not self._due():
            return
        if left <= 0:
            self.fail(ConnectionLost(f"the run has not answered for {rough_duration(SILENCE_S)}"))
        elif self._frames.inside and now - self._frame_began_at > FRAME_S:
            self.fail(ConnectionLost(f"an answer took longer than {rough_duration(FRAME_S)}"))
        else:
            self._watch_for_silence(left)

    # ------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        if not self._frames.inside:
            self._frame_began_at = self._heard_at
        self.bytes_received += len(data)
        try:
            for message in self._frames.feed(data):
                self._receive(sanitize_message(message))
                self._frame_began_at = self._heard_at
        except ProtocolError as error:
            self.fail(ConnectionLost(f"the peer is not a tui-trainer run: {error}"))

    def eof_received(self) -> None:
        self.fail(PeerClosed("the run closed the connection"))

    def connection_lost(self, error: Exception | None) -> None:
        if error is None or isinstance(error, BrokenPipeError | ConnectionResetError):
            self.fail(PeerClosed("the run closed the connection"))
        else:
            self.fail(ConnectionLost(getattr(error, "strerror", None) or str(error)))

    def _receive(self, message: ToViewer) -> None:
        match message:
            case Refused():
                self.fail(RunGone(message.reason, message.hint))
            case Welcome() if not self._welcome.done():
                self._welcome.set_result(message)
            case Update() if self._update is not None:
                answer, self._update, self.polled_at = self._update, None, None
                if not answer.done():
                    answer.set_result(message)
            case Ack() if message.id in self._acks:
                future = self._acks.pop(message.id)
                if not future.done():
                    future.set_result(message)
            case Inspected() if message.id in self._inspected:
                inspection = self._inspected.pop(message.id)
                if not inspection.done():
                    inspection.set_result(message)
            case _:
                raise ProtocolError(f"a {type(message).__name__} that was not requested")


class RunClient:
    """A viewer that waits for each answer: for commands and scripts, not for the app.

    Every method raises RunError when the run does not answer. Not thread-safe.
    """

    def __init__(
        self, connected: socket.socket, viewer: str = "", read_only: bool = True, rank: int = 0
    ) -> None:
        """`rank`: the process whose tensors `inspect` reads."""
        hello = Hello(PROTOCOL_VERSION, __version__, viewer or whoami(), read_only)
        self._rank = rank
        self._runner = asyncio.Runner()
        self._builder = SnapshotBuilder()
        self._next_poll = Poll()
        try:
            self._connection, welcome = self._runner.run(_open(connected, hello))
        except BaseException:
            self._runner.close()
            connected.close()
            raise
        self.viewer_id = welcome.viewer_id

    @classmethod
    def connect(
        cls, run: RunEntry, command: str, read_only: bool = True, rank: int = 0
    ) -> RunClient:
        """Connect to a live run on this machine; `command` is shown to its other viewers."""
        return cls(connect_unix(live_socket(run)), whoami(command), read_only, rank)

    @property
    def snapshot(self) -> Snapshot:
        """Everything polled so far."""
        return self._builder.snapshot

    def poll(self, budget: int = 1 << 20) -> Update:
        """Ask for everything since the last poll, add it to the snapshot and return it."""
        poll = msgspec.structs.replace(self._next_poll, budget=budget)
        update = self._runner.run(self._connection.poll(poll))
        self._next_poll = next_poll(poll, update)
        try:
            self._builder.apply(update)
        except ValueError as error:
            raise ConnectionLost(f"the peer is not a tui-trainer run: {error}") from error
        return update

    def command(self, action: Action) -> Ack:
        """Send a command and wait until it is accepted or refused."""
        return self._runner.run(self._command(action))

    def command_in_control(self, action: Action) -> Ack:
        """Send a command, after taking control of the run when another viewer has it; every viewer
        is told so."""
        ack = self.command(action)
        if ack.ok or ack.status.controller in (None, self.viewer_id):
            return ack
        taken = self.command(TakeControl())
        return self.command(action) if taken.ok else taken

    def inspect(self, request: InspectionRequest) -> Inspected:
        """Request an inspection, and wait for its answer."""
        if self._rank and isinstance(request, RankRequest):
            request = OfRank(self._rank, request)
        return self._runner.run(self._connection.inspect(request))

    async def _command(self, action: Action) -> Ack:
        return await self._connection.command(action)

    def close(self) -> None:
        """Close the connection; the run continues."""
        self._connection.close()
        self._runner.close()

    def __enter__(self) -> RunClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


async def _open(connected: socket.socket, hello: Hello) -> tuple[Connection, Welcome]:
    connection = Connection()
    try:
        return connection, await connection.greet(connected, hello)
    except BaseException:
        connection.close()
        raise
