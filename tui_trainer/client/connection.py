"""One connection to a run: greeting, then polls and commands until it ends."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tui_trainer import __version__
from tui_trainer.client.api import Link
from tui_trainer.config.run_spec import find_socket
from tui_trainer.history import MemoryHistory
from tui_trainer.protocol import PROTOCOL_VERSION, Phase
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.framing import (
    ConnectionClosed,
    FrameBuffer,
    ProtocolError,
    encode,
    read_to_viewer,
)
from tui_trainer.protocol.messages import (
    Ack,
    Action,
    Command,
    Event,
    Hello,
    LogLine,
    Poll,
    Refused,
    Status,
    TakeControl,
    ToRun,
    ToViewer,
    Update,
    Welcome,
)
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import sanitize_message
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run
from tui_trainer.runs.registry import live_socket
from tui_trainer.runs.security import check_directory, check_socket, connect_unix, peer_user

# ---- ask
# A short conversation with a run, for commands that ask and leave: each answer is waited for.


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


class BlockingConnection:
    """A viewer that polls and commands when told to. Not safe for use from several threads."""

    def __init__(self, connection: socket.socket, who: str, read_only: bool = True) -> None:
        self._connection = connection
        self._connection.settimeout(ANSWER_TIMEOUT_S)
        self._commands = 0
        self.history = MemoryHistory()
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
    def with_run(cls, run: RunEntry, command: str, read_only: bool = True) -> BlockingConnection:
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

    def __enter__(self) -> BlockingConnection:
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
            return sanitize_message(read_to_viewer(self._connection.recv))
        except TimeoutError as fault:
            raise RunError(f"the run gave no answer within {ANSWER_TIMEOUT_S:.0f} s") from fault
        except ConnectionClosed as fault:
            raise RunError("the run ended the connection") from fault
        except ProtocolError as fault:
            raise RunError(f"what answers is no run of tui-trainer: {fault}") from fault
        except OSError as fault:
            raise RunError(f"the run no longer answers: {fault.strerror or fault}") from fault


# ---- stream
# Duplex byte streams that a session speaks over, and why one could not be had.
#
# A stream is a pair of file descriptors: the two ends of one socket, or the pipes of a child
# process.


class NotReady(Exception):
    """There will be a run to connect to: try again in a moment. The text says what is awaited."""


class Unreachable(UserError):
    """The run may be there but cannot be reached now: try again with patience."""


class RunGone(UserError):
    """There is no such run to connect to, and there will be none.

    `state`: how it is known to have ended (`crashed`, `finished`, `stopped`), "" when that is not
    the reason.
    """

    def __init__(self, message: str, hint: str = "", state: str = "") -> None:
        super().__init__(message, hint)
        self.state = state


class Stream:
    """Bytes both ways, without waiting: `receive` and `send` do what can be done at once."""

    def __init__(
        self, read_fd: int, write_fd: int, on_close: Callable[[], None] | None = None
    ) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self._on_close = on_close
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    @classmethod
    def of_socket(cls, connected: socket.socket) -> Stream:
        """A stream over a connected socket, which it then owns."""
        connected.setblocking(False)
        return cls(connected.fileno(), connected.fileno(), connected.close)

    def receive(self, size: int = 1 << 16) -> bytes | None:
        """What is there, at most `size` bytes; b"" at the end, None when nothing is there now.
        Raises OSError."""
        try:
            return os.read(self.read_fd, size)
        except BlockingIOError:
            return None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes were taken. Raises OSError."""
        try:
            return os.write(self.write_fd, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Give the descriptors back."""
        if self._on_close is not None:
            with contextlib.suppress(OSError):
                self._on_close()
            return
        for descriptor in {self.read_fd, self.write_fd}:
            with contextlib.suppress(OSError):
                os.close(descriptor)


Connect = Callable[[], Stream]
"""One attempt to connect, which takes at most a few seconds; called from the session's thread.
Raises NotYet, Unreachable or RunGone."""


# ---- local
# Connecting to a run on this machine, by its directory.


CONNECT_SECONDS = 3.0


def connector(directory: str | os.PathLike[str]) -> Connect:
    """For `LiveSession`: connects to the run whose directory this is, for as long as it lives."""
    run = Path(directory).absolute()

    def connect() -> Stream:
        path = find_socket(run)
        try:
            check_directory(run)
            if path is None:
                raise NotReady("waiting for the run to listen")
            return open_unix_stream(path)
        except NotReady:
            _check_alive(run)
            raise
        except RunError as fault:
            raise RunGone(fault.message, fault.hint) from fault
        except OSError as fault:
            raise RunGone(f"there is no run in {run}: {fault.strerror}") from fault

    return connect


def _check_alive(directory: Path) -> None:
    run = inspect_run(directory)
    if run is None:
        raise RunGone(f"there is no run in {directory}")
    if not run.live:
        raise RunGone(f"{run.name} is not running: it has {run.state}", run.note, run.state)


def open_unix_stream(path: Path) -> Stream:
    """A stream to the socket at `path`, if it is this user's.

    Raises NotYet when nobody listens there, Unreachable when the run does not accept now, RunGone
    when the socket or its listener must not be trusted.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(CONNECT_SECONDS)
    try:
        check_socket(path)
        client.connect(str(path))
        if peer_user(client) not in (None, os.geteuid()):
            raise RunGone(f"what listens at {path} belongs to another user")
        return Stream.of_socket(client)
    except (FileNotFoundError, ConnectionRefusedError) as fault:
        client.close()
        raise NotReady("waiting for the run to listen") from fault
    except OSError as fault:
        client.close()
        reason = "it does not answer" if isinstance(fault, TimeoutError) else fault.strerror
        raise Unreachable(f"cannot connect to the run: {reason}", str(path)) from fault
    except RunError as fault:
        client.close()
        raise RunGone(fault.message, fault.hint) from fault
    except RunGone:
        client.close()
        raise


# ---- cursor
# Where a viewer stands in a run: what it asks for next.


@dataclass
class Cursor:
    """What has been received, whether or not the ui has taken it in yet."""

    revision: int = -1
    rows: dict[int, int] = field(default_factory=dict)
    event: int = 0
    log: int = 0
    artifact: int = 0
    report: tuple[int, Phase] | None = None

    def advance(self, update: Update) -> None:
        """Step over what an answer holds."""
        if update.info is not None:
            self.revision = update.info.revision
        for rows in update.rows:
            self.rows[rows.table] = rows.first + rows.count
        if update.events:
            self.event = update.events[-1].id + 1
        if update.log:
            self.log = update.log[-1].id + 1
        if update.artifacts:
            self.artifact = update.artifacts[-1].id + 1
        if update.report is not None:
            self.report = (update.report.step, update.report.phase)
        elif update.status.state != "paused":
            self.report = None

    def poll(self, watch: frozenset[str], budget: int) -> Poll:
        """The question for everything after it."""
        tables = max(self.rows, default=-1) + 1
        return Poll(
            revision=self.revision,
            rows=tuple(self.rows.get(table, 0) for table in range(tables)),
            event=self.event,
            log=self.log,
            artifact=self.artifact,
            report=self.report,
            watch=tuple(sorted(watch)),
            budget=budget,
        )


# ---- mailbox
# Between the thread that polls snapshots and the thread that speaks with the run.
#
# Neither ever waits for the other: deques whose `append` and `popleft` are atomic, and a
# descriptor
# to wake the speaking thread.


UNREAD_UPDATES = 4
"""With so many updates not taken in yet, the run is asked for no more."""
FASTEST_S, SLOWEST_S = 0.01, 60.0


@dataclass(frozen=True)
class Delivery:
    """One answer, and the count of restarts before it was asked for."""

    update: Update
    generation: int


@dataclass(frozen=True)
class ConnectionEnd:
    """How the run ended, where it was not the run that said it."""

    state: str
    message: str
    hint: str


class CommandQueue:
    """What passes between the two threads."""

    def __init__(self) -> None:
        self.arrived: deque[Delivery | Status | Link | ConnectionEnd] = deque()
        self.commands: deque[tuple[Command, Future[Ack]]] = deque()
        self.topics: frozenset[str] = frozenset()
        self.interval = 0.25
        """Seconds between two polls."""
        self.restart: tuple[int, Cursor] | None = None
        """Set by the polling thread: begin again from this cursor, as this generation."""
        self.closing = threading.Event()
        self.callback: Callable[[], None] | None = None
        self.wake_fd, self._waker = os.pipe()
        os.set_blocking(self.wake_fd, False)
        os.set_blocking(self._waker, False)
        self._numbers = itertools.count(1)
        self._descriptors = threading.Lock()

    # ------------------------------------------------------------ from the polling thread

    def post(self, action: Action) -> Future[Ack]:
        """Hand a command over."""
        future: Future[Ack] = Future()
        self.commands.append((Command(next(self._numbers), action), future))
        self.wake()
        if self.closing.is_set():
            self.refuse_commands("this session is closed")
        return future

    def set_rate(self, polls_per_second: float) -> None:
        """Poll so often, within reason."""
        interval = 1 / polls_per_second if polls_per_second > 0 else SLOWEST_S
        self.interval = min(max(interval, FASTEST_S), SLOWEST_S)
        self.wake()

    def wake(self) -> None:
        """Let the speaking thread look at what changed."""
        with self._descriptors, contextlib.suppress(OSError):
            os.write(self._waker, b"\0")  # a full pipe wakes as well

    # ------------------------------------------------------------ from the speaking thread

    @property
    def has_room(self) -> bool:
        """Whether the ui keeps up."""
        return len(self.arrived) < UNREAD_UPDATES

    def deliver(self, item: Delivery | Status | Link | ConnectionEnd) -> None:
        """Pass something on and say so."""
        self.arrived.append(item)
        callback = self.callback
        if callback is not None:
            # The ui may be closing down; that is no fault of the link.
            with contextlib.suppress(Exception):
                callback()

    def refuse_commands(self, why: str) -> None:
        """Answer every command that was not sent."""
        while self.commands:
            with contextlib.suppress(IndexError):
                answer(self.commands.popleft()[1], refusal(why))

    def drain_wakes(self) -> None:
        """Forget the wake-up calls so far."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wake_fd, 4096):
                pass

    def release(self) -> None:
        """Give the descriptors back."""
        with self._descriptors:
            os.close(self.wake_fd)
            os.close(self._waker)
            self.wake_fd = self._waker = -1


def refusal(why: str, number: int = 0) -> Ack:
    """The answer to a command that did not reach the run."""
    return Ack(number, False, Status(), why)


def answer(future: Future[Ack], ack: Ack) -> None:
    """Resolve, unless it was cancelled."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(ack)


SILENCE_S = 10.0
"""A peer that owes an answer and sends not one byte for so long is lost."""
FRAME_S = 120.0
"""A frame that takes longer is lost too, though bytes trickle."""
OBEYING_S, OBEYING_TIMES = 0.6, 10
"""So long after a command was acknowledged the run is asked so many times as often: a pause comes
about only at the end of the running phase."""
SMALLEST_BUDGET, LARGEST_BUDGET = 4 * 1024, 256 * 1024
SLOW_UPDATE_S, QUICK_UPDATE_S = 0.3, 0.1
"""An update that takes longer makes the next ones smaller: a command waits behind at most one."""


class ConnectionLost(Exception):
    """The connection is of no more use; the text says why."""


class Connection:
    """Runs on the session's thread, from a connected stream to its end."""

    def __init__(self, stream: Stream, box: CommandQueue, cursor: Cursor, generation: int) -> None:
        self._stream, self._box = stream, box
        self._cursor, self._generation = cursor, generation
        self._frames, self._out = FrameBuffer(), bytearray()
        self._waiting: dict[int, Future[Ack]] = {}
        self._asked: float | None = None
        self._next_poll = self._heard = self._frame_began = time.monotonic()
        self._interval = box.interval
        self._obeying_until = 0.0
        self._topics: frozenset[str] = frozenset()
        self._budget = LARGEST_BUDGET // 4
        self.welcome: Welcome | None = None
        self.ended = self._said_end = False
        self.received = 0
        self.latency_ms: float | None = None

    def run(self, hello: Hello, on_welcome: Callable[[Welcome], None]) -> None:
        """Speak until the run has ended and all of it was fetched, or the session closes.

        Raises Lost, or RunGone when the run refuses us.
        """
        self._on_welcome = on_welcome
        self._out += encode(hello)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._box.wake_fd, selectors.EVENT_READ)
                while not (self._done() or self._box.closing.is_set()):
                    self._speak()
                    self._wait(selector)
        except (ProtocolError, OSError) as fault:
            reason = getattr(fault, "strerror", None) or str(fault)
            raise ConnectionLost(reason) from fault
        finally:
            for number, future in self._waiting.items():
                answer(future, refusal("the connection was lost before the answer came", number))
            self._stream.close()

    def _done(self) -> bool:
        if self._box.restart is not None:
            raise ConnectionLost("what the run sent does not fit together")
        return self.ended and self._asked is None and not self._waiting

    # ------------------------------------------------------------ speaking

    def _speak(self) -> None:
        box, now = self._box, time.monotonic()
        if self.welcome is None:
            return
        while box.commands:
            command, future = box.commands.popleft()
            if future.set_running_or_notify_cancel():
                self._waiting[command.id] = future
                self._out += encode(command)
        if box.topics != self._topics or box.interval < self._interval:
            self._next_poll = now
        self._interval = box.interval
        if self._asked is None and now >= self._next_poll and box.has_room:
            self._topics = box.topics
            self._out += encode(self._cursor.poll(self._topics, self._budget))
            self._asked = now

    def _wait(self, selector: selectors.BaseSelector) -> None:
        self._register(selector)
        ready = {key.fd: events for key, events in selector.select(self._patience())}
        if self._box.wake_fd in ready:
            self._box.drain_wakes()
        if self._out and ready.get(self._stream.write_fd, 0) & selectors.EVENT_WRITE:
            self._send()
        if ready.get(self._stream.read_fd, 0) & selectors.EVENT_READ:
            self._receive()
        self._check_time()

    def _register(self, selector: selectors.BaseSelector) -> None:
        wanted = {self._stream.read_fd: selectors.EVENT_READ}
        if self._out:
            writing = wanted.get(self._stream.write_fd, 0) | selectors.EVENT_WRITE
            wanted[self._stream.write_fd] = writing
        known = selector.get_map()
        for descriptor in (self._stream.read_fd, self._stream.write_fd):
            events = wanted.get(descriptor, 0)
            if descriptor in known and known[descriptor].events != events:
                selector.unregister(descriptor)
            if events and descriptor not in known:
                selector.register(descriptor, events)

    def _owed(self) -> bool:
        return bool(self.welcome is None or self._asked is not None or self._waiting or self._out)

    def _patience(self) -> float | None:
        """Seconds until there is something to do without being called."""
        now, moments = time.monotonic(), []
        if self._owed():
            moments.append(self._heard + SILENCE_S)
        if self.welcome is not None and self._asked is None and self._box.has_room:
            moments.append(self._next_poll)
        return max(0.0, min(moments) - now) if moments else None

    def _check_time(self) -> None:
        now = time.monotonic()
        if not self._owed():
            self._heard = now
        if now - self._heard > SILENCE_S:
            raise ConnectionLost(f"the run has not answered for {SILENCE_S:.0f} s")
        if self._frames.inside and now - self._frame_began > FRAME_S:
            raise ConnectionLost(f"an answer took longer than {FRAME_S:.0f} s")

    def _send(self) -> None:
        # A greeting that is refused may find the other end closed: what it said comes first.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = self._stream.send(self._out)
            del self._out[:sent]
            return
        self._receive()
        raise ConnectionLost("the run closed the connection")

    # ------------------------------------------------------------ hearing

    def _receive(self) -> None:
        data = self._stream.receive()
        if data is None:
            return
        if not data:
            raise ConnectionLost("the run closed the connection")
        self._heard = time.monotonic()
        if not self._frames.inside:
            self._frame_began = self._heard
        self.received += len(data)
        for message in self._frames.feed(data):
            self._hear(message)
            self._frame_began = self._heard

    def _hear(self, message: ToViewer) -> None:
        match message:
            case Refused():
                raise RunGone(message.reason, message.hint)
            case Welcome() if self.welcome is None:
                if message.protocol != PROTOCOL_VERSION:
                    raise RunGone(
                        f"the run speaks protocol {message.protocol} (tui-trainer "
                        f"{message.product}), this is {PROTOCOL_VERSION} ({__version__})",
                        "use the same version of tui-trainer on both sides",
                    )
                self._on_welcome(message)
                self.welcome = message
            case Update() if self._asked is not None:
                self._hear_update(message)
            case Ack() if message.id in self._waiting:
                self._box.deliver(message.status)  # first: who is answered may look at once
                answer(self._waiting.pop(message.id), message)
                self._next_poll = self._heard
                self._obeying_until = self._heard + OBEYING_S
            case _:
                raise ProtocolError(f"a {type(message).__name__} that was not asked for")

    def _hear_update(self, update: Update) -> None:
        assert self._asked is not None
        took, self._asked = self._heard - self._asked, None
        self.latency_ms = took * 1e3
        if took > SLOW_UPDATE_S:
            self._budget = max(SMALLEST_BUDGET, self._budget // 2)
        elif took < QUICK_UPDATE_S:
            self._budget = min(LARGEST_BUDGET, self._budget * 2)
        # Once more after the end was said: what was printed last.
        self.ended = update.status.ended and not update.more and self._said_end
        self._said_end = update.status.ended and not update.more
        wait = self._interval
        if self._heard < self._obeying_until:
            wait /= OBEYING_TIMES
        self._next_poll = self._heard + (0.0 if update.more else wait)
        self._cursor.advance(update)
        self._box.deliver(Delivery(update, self._generation))

    @property
    def silent_s(self) -> float:
        """Seconds since an answer that has not come was asked for; 0 when none is owed."""
        asked = self._asked  # another thread is asking
        return time.monotonic() - asked if asked is not None else 0.0

    @property
    def said_end(self) -> bool:
        """Whether the run has said that it ended and gave all it had."""
        return self._said_end
