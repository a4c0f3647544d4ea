"""Between the thread that polls snapshots and the thread that speaks with the run.

Neither ever waits for the other: deques whose `append` and `popleft` are atomic, and a descriptor
to wake the speaking thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from tui_trainer.protocol.messages import Ack, Action, Command, Status, Update
from tui_trainer.session.api import Link
from tui_trainer.session.cursor import Cursor

UNREAD_UPDATES = 4
"""With so many updates not taken in yet, the run is asked for no more."""
FASTEST_S, SLOWEST_S = 0.01, 60.0


@dataclass(frozen=True)
class Delivery:
    """One answer, and the count of restarts before it was asked for."""

    update: Update
    generation: int


@dataclass(frozen=True)
class Ending:
    """How the run ended, where it was not the run that said it."""

    state: str
    message: str
    hint: str


class Mailbox:
    """What passes between the two threads."""

    def __init__(self) -> None:
        self.arrived: deque[Delivery | Status | Link | Ending] = deque()
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

    def deliver(self, item: Delivery | Status | Link | Ending) -> None:
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
