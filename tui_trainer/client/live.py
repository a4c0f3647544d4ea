"""A session with a run that lives: in this process, on this machine or on another one."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import msgspec

from tui_trainer import __version__
from tui_trainer.client.api import ARTIFACTS_KEPT, EVENTS_KEPT, LOG_LINES_KEPT, Link, Snapshot
from tui_trainer.client.connection import (
    CommandQueue,
    Connect,
    Connection,
    ConnectionEnd,
    ConnectionLost,
    Cursor,
    Delivery,
    NotReady,
    RunGone,
    Unreachable,
)
from tui_trainer.history import MemoryHistory
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.messages import (
    Ack,
    Action,
    Artifact,
    Clip,
    Event,
    Hello,
    LogLine,
    Status,
    Update,
    Welcome,
)
from tui_trainer.protocol.text import sanitize, sanitize_message

# ---- intake
# The ui's side of a session: what arrived becomes the next snapshot, on the thread that polls.


class SnapshotBuilder:
    """Grows one `Snapshot` out of updates. Used from one thread."""

    def __init__(self) -> None:
        self.history = MemoryHistory()
        self.snapshot = Snapshot(history=self.history)
        # Apart: a run may clip at every step, and what somebody did must not be lost among that.
        self._clips: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._others: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._newest_event = -1
        self._log: deque[LogLine] = deque(maxlen=LOG_LINES_KEPT)
        self._artifacts: dict[str, deque[Artifact]] = {}

    def apply(self, update: Update) -> None:
        """Take in one answer. Raises ValueError when its rows do not fit; what came before the
        faulty rows is kept."""
        update = sanitize_message(update)
        known = self.snapshot
        changes: dict[str, object] = {}
        if update.info is not None:
            for table in update.info.tables:
                self.history.declare(table)
            changes["info"] = update.info
        elif known.info is not None and update.cadences:
            info = known.info.with_cadences(update.cadences)
            if info is not known.info:
                for table in info.tables:
                    self.history.declare(table)
                changes["info"] = info
        if update.status != known.status:
            changes["status"] = update.status
        if self._take_events(update.events):
            both = (*self._others, *self._clips)
            changes["events"] = tuple(sorted(both, key=lambda event: event.id))
        if _extend(self._log, update.log):
            changes["log"] = tuple(self._log)
        if update.artifacts:
            changes["artifacts"] = self._keep(update.artifacts)
        if update.report is not None:
            changes["report"] = update.report
        elif update.status.state != "paused" and known.report is not None:
            changes["report"] = None
        if update.rows or changes:
            self.snapshot = replace(known, version=known.version + 1, **changes)  # type: ignore[arg-type]
        for rows in update.rows:
            self.history.apply(rows)

    def show_status(self, status: Status) -> None:
        """Take in a state that came without an update."""
        status = sanitize_message(status)
        known = self.snapshot
        if status != known.status:
            report = known.report if status.state == "paused" else None
            self.snapshot = replace(known, status=status, report=report, version=known.version + 1)

    def show_link(self, link: Link) -> None:
        """Take in how the connection is; figures that always change are no reason to draw."""
        link = replace(link, message=sanitize(link.message), hint=sanitize(link.hint))
        known = self.snapshot
        if link != known.link:
            told = (link.state, link.message, link.hint, link.viewer_id, link.read_only)
            before = known.link
            same = told == (
                before.state,
                before.message,
                before.hint,
                before.viewer_id,
                before.read_only,
            )
            self.snapshot = replace(known, link=link, version=known.version + (not same))

    def _take_events(self, events: tuple[Event, ...]) -> bool:
        fresh = [event for event in events if event.id > self._newest_event]
        for event in fresh:
            (self._clips if isinstance(event, Clip) else self._others).append(event)
            self._newest_event = event.id
        return bool(fresh)

    def _keep(self, artifacts: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
        for artifact in artifacts:
            kind = type(artifact).__name__
            held = self._artifacts.setdefault(kind, deque(maxlen=ARTIFACTS_KEPT))
            if not held or artifact.id > held[-1].id:
                held.append(artifact)
        kept = [artifact for held in self._artifacts.values() for artifact in held]
        return tuple(sorted(kept, key=lambda artifact: artifact.id))


def _extend(held: deque[LogLine], new: tuple[LogLine, ...]) -> bool:
    """Add what is newer than what is held; whether there was any."""
    newest = held[-1].id if held else -1
    fresh = [item for item in new if item.id > newest]
    for line in fresh:
        if line.id > newest + 1:
            held.append(_left_out(line, line.id - newest - 1))
        held.append(line)
        newest = line.id
    return bool(fresh)


def _left_out(before: LogLine, count: int) -> LogLine:
    """In place of lines that the run did not send: too many were printed, or long ago."""
    text = f"… {count:,} lines are left out here: tui-trainer logs has them all"
    return LogLine(before.id - 1, before.time, before.step, before.stream, text)


FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.25, 8.0
STEADY_S = 5.0
"""A connection that lasted so long was a good one: the next attempt follows soon."""
NOT_YET_S = 0.05
SAY_SILENT_S = 2.5
"""An answer that takes longer is said to be missing; long before the link is given up."""


class LiveSession:
    """Implements `session.api.Session` over any duplex byte stream.

    One background thread connects, polls, sends commands and connects again; what it receives is
    queued and taken in by `poll`, on the ui's thread. A poll goes out only when the answer to the
    one before has come, so a slow link or a slow ui gets less, never more and more late.
    """

    def __init__(self, connect: Connect, *, read_only: bool = False, viewer: str = "") -> None:
        self._box = CommandQueue()
        self._intake = SnapshotBuilder()
        self._generation = 0
        hello = Hello(PROTOCOL_VERSION, __version__, viewer or whoami(), read_only)
        self._speaker = _Speaker(connect, self._box, hello)
        self._speaker.start()

    def poll(self) -> Snapshot:
        """See `Session.poll`."""
        arrived, taken = self._box.arrived, 0
        while arrived:
            self._take(arrived.popleft())
            taken += 1
        figures = self._speaker.link
        if figures.state == self._intake.snapshot.link.state:
            self._intake.show_link(figures)
        if taken:
            self._box.wake()
        return self._intake.snapshot

    def _take(self, item: Delivery | Status | Link | ConnectionEnd) -> None:
        match item:
            case Link():
                self._intake.show_link(item)
            case Status():
                self._intake.show_status(item)
            case ConnectionEnd():
                status = self._intake.snapshot.status
                if not status.ended:
                    ended = msgspec.structs.replace(
                        status, state=item.state, reason=item.message, hint=item.hint
                    )
                    self._intake.show_status(ended)
            case Delivery() if item.generation == self._generation:
                try:
                    self._intake.apply(item.update)
                except ValueError:
                    self._generation += 1
                    self._box.restart = (self._generation, self._where())

    def _where(self) -> Cursor:
        """The cursor after what was taken in."""
        seen = self._intake.snapshot
        return Cursor(
            rows=dict(enumerate(seen.history.cursors())),
            event=seen.events[-1].id + 1 if seen.events else 0,
            log=seen.log[-1].id + 1 if seen.log else 0,
            artifact=seen.artifacts[-1].id + 1 if seen.artifacts else 0,
        )

    def send(self, action: Action) -> Future[Ack]:
        """See `Session.send`."""
        return self._box.post(action)

    def watch(self, topics: frozenset[str]) -> None:
        """See `Session.watch`."""
        if topics != self._box.topics:
            self._box.topics = frozenset(topics)
            self._box.wake()

    def set_rate(self, polls_per_second: float) -> None:
        """See `Session.set_rate`."""
        self._box.set_rate(polls_per_second)

    def on_arrival(self, callback: Callable[[], None] | None) -> None:
        """See `Session.on_arrival`."""
        self._box.callback = callback
        if callback is not None and self._box.arrived:
            callback()

    def close(self) -> None:
        """See `Session.close`."""
        self._box.callback = None
        self._box.closing.set()
        self._box.wake()


class _Speaker(threading.Thread):
    """Connects, speaks, and connects again."""

    def __init__(self, connect: Connect, box: CommandQueue, hello: Hello) -> None:
        super().__init__(name="tui-trainer session", daemon=True)
        self._connect, self._box, self._hello = connect, box, hello
        self._cursor, self._generation = Cursor(), 0
        self._run_name: str | None = None
        self._received = 0
        self._talk: Connection | None = None
        self._link = Link(read_only=hello.read_only)

    @property
    def link(self) -> Link:
        """The link with its figures of this moment."""
        talk, link = self._talk, self._link
        if talk is None:
            return replace(link, bytes_received=self._received)
        received = self._received + talk.received
        silent = talk.silent_s
        if silent > SAY_SILENT_S and link.state == "live":
            return replace(link, bytes_received=received, message=f"no answer for {silent:.0f} s")
        return replace(link, bytes_received=received, latency_ms=talk.latency_ms)

    def run(self) -> None:
        """Until closed, ended or refused for good."""
        back_off, began = FIRST_BACK_OFF_S, time.monotonic()
        try:
            while not self._box.closing.is_set():
                began = time.monotonic()
                try:
                    if self._converse():
                        self._show("closed", "the run has ended")
                        return
                    continue
                except NotReady as fault:
                    self._show("connecting" if self._run_name is None else "lost", str(fault))
                    self._pause(NOT_YET_S)
                    continue
                except (ConnectionLost, Unreachable) as fault:
                    back_off = FIRST_BACK_OFF_S if time.monotonic() - began > STEADY_S else back_off
                    self._say_lost(str(fault), getattr(fault, "hint", ""), back_off)
                self._pause(back_off)
                back_off = min(back_off * 2, LONGEST_BACK_OFF_S)
        except RunGone as fault:
            self._show("closed", str(fault), fault.hint)
            if fault.state:
                self._box.deliver(ConnectionEnd(fault.state, str(fault), fault.hint))
        except Exception as fault:
            # A fault of ours must be seen, not leave a screen that waits for ever.
            self._show("closed", f"the session failed: {type(fault).__name__}: {fault}")
            raise
        finally:
            self._box.closing.set()
            self._box.refuse_commands("there is no connection to the run")
            self._box.release()

    def _converse(self) -> bool:
        """One connection, from first to last byte; whether there is nothing left to fetch."""
        if self._box.restart is not None:
            (self._generation, self._cursor), self._box.restart = self._box.restart, None
        stream = self._connect()
        talk = self._talk = Connection(stream, self._box, self._cursor, self._generation)
        try:
            talk.run(self._hello, self._welcomed)
        except ConnectionLost:
            if not talk.said_end or self._box.restart is not None:
                raise
        finally:
            self._received += talk.received
            self._talk = None
        return talk.said_end

    def _welcomed(self, welcome: Welcome) -> None:
        if self._run_name not in (None, welcome.run):
            raise RunGone(f"{self._run_name} has ended; {welcome.run} answers in its place")
        self._run_name = welcome.run
        self._show("live", viewer=welcome.viewer_id)

    def _say_lost(self, why: str, hint: str, seconds: float) -> None:
        state = "connecting" if self._run_name is None else "lost"
        message = f"{why}, trying again in {max(1, round(seconds))} s"
        self._show(state, message, hint)

    def _show(
        self, state: str, message: str = "", hint: str = "", viewer: int | None = None
    ) -> None:
        link = Link(state, message, hint, viewer_id=viewer, read_only=self._hello.read_only)
        if link != self._link:
            self._link = link
            self._box.deliver(link)

    def _pause(self, seconds: float) -> None:
        """Wait; commands given meanwhile are refused, not kept for a run that has moved on."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self._box.closing.is_set():
            self._box.refuse_commands("there is no connection to the run now")
            self._box.closing.wait(min(left, 0.05))


def whoami() -> str:
    """`user@host`, and the terminal if there is one."""
    name = "somebody"
    with contextlib.suppress(OSError, KeyError, ImportError):
        name = getpass.getuser()
    terminal = ""
    with contextlib.suppress(OSError):
        terminal = " " + os.ttyname(0).removeprefix("/dev/")
    return f"{name}@{socket.gethostname()}{terminal}"
