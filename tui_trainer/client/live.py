"""A session with a live run: in this process, on this machine or on another one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from tui_trainer import __version__
from tui_trainer.client.api import Link, LinkState, Snapshot, SnapshotBuilder
from tui_trainer.client.connection import (
    Connection,
    ConnectionLost,
    Connector,
    next_poll,
    poll_again,
    whoami,
)
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.formatting import rough_duration
from tui_trainer.protocol.inspection import Inspected, InspectionRequest
from tui_trainer.protocol.messages import Ack, Hello, Poll, Status, Update, Welcome
from tui_trainer.protocol.text import sanitize
from tui_trainer.runs.errors import NotListening, RunError, RunGone, Unreachable

T = TypeVar("T")

UNREAD_UPDATES = 4
"""Polling stops while this many updates wait for the app."""
FASTEST_S, SLOWEST_S = 0.01, 60.0
"""Limits of the interval between polls."""
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.25, 8.0
STEADY_S = 5.0
"""A connection that lasted this long resets the back-off."""
NOT_LISTENING_S = 0.05
"""Pause between attempts while the run does not listen yet."""
EAGER_S, EAGER_FACTOR = 0.6, 10
"""How long after a command the run is polled more often, and how many times as often: a pause takes
effect only at the end of the current phase."""
SMALLEST_BUDGET, LARGEST_BUDGET = 4 * 1024, 256 * 1024
"""Limits of `Poll.budget`, in bytes."""
SLOW_UPDATE_S, QUICK_UPDATE_S = 0.3, 0.1
"""An update that takes longer than the first halves the budget, since a command may wait behind it;
one that takes less than the second doubles it."""
NOT_CONNECTED = "there is no connection to the run"
SHOW_SILENCE_S = 2.5
"""Time without an answer after which the link shows a message, long before it times out."""


@dataclass(frozen=True)
class Delivery:
    """An update on its way to the app."""

    update: Update
    poll: Poll
    """The poll that `update` answers."""
    generation: int
    """Generation of the session when `poll` was sent."""


class LiveSession:
    """Implements `client.api.Session` over a socket.

    A background thread runs an asyncio event loop that connects, polls, sends commands and
    reconnects. It queues what it receives, and `poll` applies that on the app's thread. The run is
    polled only after it has answered the previous poll and while the app keeps up, so over a slow
    link or to a slow app it sends less instead of falling behind.
    """

    def __init__(self, connect: Connector, *, read_only: bool = False, viewer: str = "") -> None:
        self._connect = connect
        self._hello = Hello(PROTOCOL_VERSION, __version__, viewer or whoami(), read_only)
        # Shared by both threads without a lock: deques, whose append and popleft are atomic, and
        # attributes that hold immutable values.
        self._arrived: deque[Delivery | Status | Link] = deque()
        self._commands: deque[tuple[Action, Future[Ack]]] = deque()
        self._inspections: deque[tuple[InspectionRequest, Future[Inspected]]] = deque()
        """Requests to send; only the latest will be sent."""
        self._topics: frozenset[str] = frozenset()
        self._interval_s = 0.25
        self._callback: Callable[[], None] | None = None
        self._start_over: tuple[int, Poll] | None = None
        self._closing = False
        self._link = Link(read_only=read_only)
        self._latency_ms: float | None = None
        self._bytes_received = 0
        """Bytes received over all earlier connections."""
        self._connection: Connection | None = None
        # Used by the app's thread alone.
        self._builder = SnapshotBuilder()
        self._generation = 0
        # Used by the session's thread alone.
        self._task: asyncio.Task[None] | None = None
        self._inspecting: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._next_poll = Poll(budget=LARGEST_BUDGET // 4)
        self._polled_generation = 0
        self._answered_at = 0.0
        self._poll_at_once = False
        self._eager_until = 0.0
        self._backing_off = False
        self._run_name: str | None = None
        self._status = Status()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tui-trainer session", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ on the app's thread

    def poll(self) -> Snapshot:
        taken = False
        while self._arrived:
            self._take(self._arrived.popleft())
            taken = True
        link = self._current_link()
        if link.state == self._builder.snapshot.link.state:
            self._builder.set_link(link)
        if taken:
            self._call(self._wake.set)  # there is room for another update
        return self._builder.snapshot

    def _take(self, item: Delivery | Status | Link) -> None:
        match item:
            case Link():
                self._builder.set_link(item)
            case Status():
                self._builder.set_status(item)
            case Delivery() if item.generation == self._generation:
                try:
                    self._builder.apply(item.update)
                except ValueError:
                    self._generation += 1
                    poll = poll_again(item.poll, self._builder.history.cursors())
                    self._start_over = (self._generation, poll)
                    self._call(self._drop_connection)

    def _current_link(self) -> Link:
        link, connection, received = self._link, self._connection, self._bytes_received
        if connection is None:
            return replace(link, bytes_received=received)
        received += connection.bytes_received
        polled_at = connection.polled_at
        silence = time.monotonic() - polled_at if polled_at is not None else 0.0
        if silence > SHOW_SILENCE_S and link.state == "live":
            return replace(
                link, bytes_received=received, message=f"no answer for {rough_duration(silence)}"
            )
        return replace(link, bytes_received=received, latency_ms=self._latency_ms)

    def send(self, action: Action) -> Future[Ack]:
        future: Future[Ack] = Future()
        self._commands.append((action, future))
        if not self._call(self._send_commands):
            self._refuse_commands(NOT_CONNECTED)
        return future

    def inspect(self, request: InspectionRequest) -> Future[Inspected]:
        future: Future[Inspected] = Future()
        self._inspections.append((request, future))
        if not self._call(self._send_inspection):
            self._refuse_inspections()
        return future

    def watch(self, topics: frozenset[str]) -> None:
        if topics != self._topics:
            self._topics = frozenset(topics)
            self._call(self._wake.set)

    def set_rate(self, polls_per_second: float) -> None:
        interval = 1 / polls_per_second if polls_per_second > 0 else SLOWEST_S
        self._interval_s = min(max(interval, FASTEST_S), SLOWEST_S)
        self._call(self._wake.set)

    def on_arrival(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback
        if callback is not None and self._arrived:
            callback()

    def close(self) -> None:
        self._callback = None
        self._closing = True
        self._call(self._cancel)

    def _call(self, function: Callable[[], object]) -> bool:
        """Call a function on the session's thread; returns False when that thread has ended."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed
            return False
        return True

    # ------------------------------------------------------------ on the session's thread

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        finally:
            self._refuse_commands(NOT_CONNECTED)
            self._refuse_inspections()

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        try:
            if not self._closing:
                await self._stay_connected()
        except asyncio.CancelledError:
            pass  # closed by the app
        except RunError as error:
            self._show("closed", error.message, error.hint)
            if isinstance(error, RunGone) and error.state and not self._status.ended:
                ended = msgspec.structs.replace(
                    self._status,
                    state=error.state,
                    reason=sanitize(error.message),
                    hint=sanitize(error.hint),
                )
                self._deliver(ended)
        except Exception as error:
            # Show a bug in the session instead of a screen that waits forever.
            self._show("closed", f"the session failed: {type(error).__name__}: {error}")
            raise

    async def _stay_connected(self) -> None:
        """Reconnect until the run has ended. Raises RunError when another attempt cannot
        succeed."""
        back_off = FIRST_BACK_OFF_S
        while True:
            began = time.monotonic()
            try:
                await self._follow()
            except NotListening as error:
                self._show(self._unconnected(), error.message)
                pause = NOT_LISTENING_S
            except (ConnectionLost, Unreachable) as error:
                if time.monotonic() - began > STEADY_S:
                    back_off = FIRST_BACK_OFF_S
                again = f"trying again in {rough_duration(max(1.0, back_off))}"
                self._show(self._unconnected(), f"{error.message}, {again}", error.hint)
                pause, back_off = back_off, min(back_off * 2, LONGEST_BACK_OFF_S)
            else:
                self._show("closed", "the run has ended")
                return
            # Commands are refused, not kept for a run that has moved on by then.
            self._backing_off = True
            self._refuse_commands(NOT_CONNECTED)
            await asyncio.sleep(pause)
            self._backing_off = False

    async def _follow(self) -> None:
        """Follow the run over one connection until it has ended and everything was fetched.

        Raises RunError when the connection cannot be made or ends before that.
        """
        if self._start_over is not None:
            (self._polled_generation, self._next_poll), self._start_over = self._start_over, None
        async with self._connect() as connected:
            connection = self._connection = Connection(on_lost=self._wake.set)
            end_seen = False
            try:
                self._welcomed(await connection.greet(connected, self._hello))
                self._poll_at_once = True
                while True:
                    update = await self._poll_run(connection)
                    ended = update.status.ended and not update.more
                    # One more poll after the end brings the last printed lines.
                    if ended and end_seen and not connection.commands_due:
                        return
                    end_seen = ended
            except ConnectionLost:
                if not end_seen or self._start_over is not None:
                    raise
            finally:
                self._connection = None
                self._bytes_received += connection.bytes_received
                connection.close()

    def _welcomed(self, welcome: Welcome) -> None:
        if self._run_name not in (None, welcome.run):
            raise RunGone(f"{self._run_name} has ended; {welcome.run} answers in its place")
        self._run_name = welcome.run
        self._show("live", viewer_id=welcome.viewer_id)
        self._send_commands()

    async def _poll_run(self, connection: Connection) -> Update:
        await self._until_due(connection)
        self._poll_at_once = False
        poll = msgspec.structs.replace(self._next_poll, watch=tuple(sorted(self._topics)))
        asked_at = time.monotonic()
        update = await connection.poll(poll)
        self._answered_at = time.monotonic()
        took = self._answered_at - asked_at
        self._latency_ms = took * 1e3
        budget = poll.budget
        if took > SLOW_UPDATE_S:
            budget = max(SMALLEST_BUDGET, budget // 2)
        elif took < QUICK_UPDATE_S:
            budget = min(LARGEST_BUDGET, budget * 2)
        self._next_poll = msgspec.structs.replace(next_poll(poll, update), budget=budget)
        self._poll_at_once |= update.more
        self._status = update.status
        self._deliver(Delivery(update, poll, self._polled_generation))
        return update

    async def _until_due(self, connection: Connection) -> None:
        """Wait for the moment of the next poll, and until the app keeps up."""
        while True:
            self._wake.clear()
            if connection.error is not None:
                raise connection.error
            now, interval = time.monotonic(), self._interval_s
            if now < self._eager_until:
                interval /= EAGER_FACTOR
            at_once = self._poll_at_once or tuple(sorted(self._topics)) != self._next_poll.watch
            wait = 0.0 if at_once else self._answered_at + interval - now
            has_room = len(self._arrived) < UNREAD_UPDATES
            if has_room and wait <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait if has_room else None):
                    await self._wake.wait()

    def _send_commands(self) -> None:
        """Send the queued commands. They wait during the first attempt to connect, and are refused
        between attempts and after a connection was lost."""
        connection = self._connection
        if self._backing_off or self._link.state == "lost":
            self._refuse_commands(NOT_CONNECTED)
        elif connection is not None and self._link.state == "live":
            while self._commands:
                action, future = self._commands.popleft()
                if future.set_running_or_notify_cancel():
                    answer = connection.command(action)
                    answer.add_done_callback(functools.partial(self._answered, future))

    def _answered(self, future: Future[Ack], answer: asyncio.Future[Ack]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            _resolve(future, refusal("the connection was lost before the answer came"))
            return
        ack = answer.result()
        self._status = ack.status
        self._deliver(ack.status)  # before the answer, on which the app may read the status
        _resolve(future, ack)
        self._eager_until = time.monotonic() + EAGER_S
        self._poll_at_once = True
        self._wake.set()

    def _send_inspection(self) -> None:
        """Send the latest request in place of the pending one."""
        if not self._inspections:
            return
        request, future = self._inspections.popleft()
        while self._inspections:
            future.cancel()
            request, future = self._inspections.popleft()
        if self._inspecting is not None:
            self._inspecting.cancel()
        connection = self._connection
        if connection is None or self._link.state != "live":
            _resolve(future, _not_inspected(NOT_CONNECTED))
        else:
            self._inspecting = self._loop.create_task(_inspect(connection, request, future))
            # Cancel the future even when the task is cancelled before it begins.
            self._inspecting.add_done_callback(lambda _: future.cancel())

    def _refuse_commands(self, why: str) -> None:
        while self._commands:
            with contextlib.suppress(IndexError):  # the other thread does the same
                _resolve(self._commands.popleft()[1], refusal(why))

    def _refuse_inspections(self) -> None:
        while self._inspections:
            with contextlib.suppress(IndexError):  # the other thread does the same
                _resolve(self._inspections.popleft()[1], _not_inspected(NOT_CONNECTED))

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.fail(ConnectionLost("the run sent inconsistent data"))

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _unconnected(self) -> LinkState:
        return "connecting" if self._run_name is None else "lost"

    def _show(
        self, state: LinkState, message: str = "", hint: str = "", viewer_id: int | None = None
    ) -> None:
        link = Link(
            state,
            sanitize(message),
            sanitize(hint),
            viewer_id=viewer_id,
            read_only=self._hello.read_only,
        )
        if link != self._link:
            self._link = link
            self._deliver(link)

    def _deliver(self, item: Delivery | Status | Link) -> None:
        self._arrived.append(item)
        callback = self._callback
        if callback is not None:
            # The app may be closing down, which is not an error of the link.
            with contextlib.suppress(Exception):
                callback()


def refusal(why: str) -> Ack:
    """The answer to a command that did not reach the run."""
    return Ack(0, False, Status(), why)


async def _inspect(
    connection: Connection, request: InspectionRequest, future: Future[Inspected]
) -> None:
    try:
        answer = await connection.inspect(request)
    except RunError as error:
        answer = _not_inspected(error.message, error.hint)
    _resolve(future, answer)


def _not_inspected(why: str, hint: str = "") -> Inspected:
    """The answer to a request that did not reach the run."""
    return Inspected(0, "failed", message=why, hint=hint)


def _resolve(future: Future[T], answer: T) -> None:
    with contextlib.suppress(InvalidStateError):  # it was cancelled
        future.set_result(answer)
