"""One connection to a run: greeting, then polls and commands until it ends."""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Future

from tui_trainer import __version__
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.framing import FrameBuffer, ProtocolError, encode
from tui_trainer.protocol.messages import Ack, Hello, Refused, ToViewer, Update, Welcome
from tui_trainer.session.cursor import Cursor
from tui_trainer.session.mailbox import Delivery, Mailbox, answer, refusal
from tui_trainer.session.stream import RunGone, Stream

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


class Lost(Exception):
    """The connection is of no more use; the text says why."""


class Conversation:
    """Runs on the session's thread, from a connected stream to its end."""

    def __init__(self, stream: Stream, box: Mailbox, cursor: Cursor, generation: int) -> None:
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
            raise Lost(reason) from fault
        finally:
            for number, future in self._waiting.items():
                answer(future, refusal("the connection was lost before the answer came", number))
            self._stream.close()

    def _done(self) -> bool:
        if self._box.restart is not None:
            raise Lost("what the run sent does not fit together")
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
            raise Lost(f"the run has not answered for {SILENCE_S:.0f} s")
        if self._frames.inside and now - self._frame_began > FRAME_S:
            raise Lost(f"an answer took longer than {FRAME_S:.0f} s")

    def _send(self) -> None:
        # A greeting that is refused may find the other end closed: what it said comes first.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = self._stream.send(self._out)
            del self._out[:sent]
            return
        self._receive()
        raise Lost("the run closed the connection")

    # ------------------------------------------------------------ hearing

    def _receive(self) -> None:
        data = self._stream.receive()
        if data is None:
            return
        if not data:
            raise Lost("the run closed the connection")
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
