"""A session with a run that lives: in this process, on this machine or on another one."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import msgspec

from tui_trainer import __version__
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.messages import Ack, Action, Hello, Status, Welcome
from tui_trainer.session.api import Link, Snapshot
from tui_trainer.session.conversation import Conversation, Lost
from tui_trainer.session.cursor import Cursor
from tui_trainer.session.intake import Intake
from tui_trainer.session.mailbox import Delivery, Ending, Mailbox
from tui_trainer.session.stream import Connect, NotYet, RunGone, Unreachable

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
        self._box = Mailbox()
        self._intake = Intake()
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

    def _take(self, item: Delivery | Status | Link | Ending) -> None:
        match item:
            case Link():
                self._intake.show_link(item)
            case Status():
                self._intake.show_status(item)
            case Ending():
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

    def __init__(self, connect: Connect, box: Mailbox, hello: Hello) -> None:
        super().__init__(name="tui-trainer session", daemon=True)
        self._connect, self._box, self._hello = connect, box, hello
        self._cursor, self._generation = Cursor(), 0
        self._run_name: str | None = None
        self._received = 0
        self._talk: Conversation | None = None
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
                except NotYet as fault:
                    self._show("connecting" if self._run_name is None else "lost", str(fault))
                    self._pause(NOT_YET_S)
                    continue
                except (Lost, Unreachable) as fault:
                    back_off = FIRST_BACK_OFF_S if time.monotonic() - began > STEADY_S else back_off
                    self._say_lost(str(fault), getattr(fault, "hint", ""), back_off)
                self._pause(back_off)
                back_off = min(back_off * 2, LONGEST_BACK_OFF_S)
        except RunGone as fault:
            self._show("closed", str(fault), fault.hint)
            if fault.state:
                self._box.deliver(Ending(fault.state, str(fault), fault.hint))
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
        talk = self._talk = Conversation(stream, self._box, self._cursor, self._generation)
        try:
            talk.run(self._hello, self._welcomed)
        except Lost:
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
