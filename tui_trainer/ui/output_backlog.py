"""Output that the terminal has not read yet: while there is too much of it, nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from textual.app import App
from textual.timer import Timer

from tui_trainer.ui import textual_hacks

MAX_PENDING_WRITES = 3
"""Pieces of output that may wait for the terminal before drawing stops. A frame is about three."""
CHECK_INTERVAL_S = 0.02
"""A frame that was requested and finds output waiting looks again after this time."""
MAX_CHECKS = 12
"""Checks for one frame; later ones are left to the ticks, in case the terminal reads nothing."""


class OutputBacklog:
    """The output of an app that its terminal has not read.

    Textual writes on a thread, from a short queue. Were it to fill up, the event loop would block.
    """

    def __init__(self, app: App[Any], drained: Callable[[], None]) -> None:
        """`drained` is called when the terminal has read everything, after `check_soon`."""
        self._app = app
        self._drained = drained
        self._timer: Timer | None = None
        self._checks = 0
        """Made since the last frame."""
        self._suppressed: ExitStack | None = None
        """The batch that suppresses drawing."""

    @property
    def pending(self) -> int:
        """Pieces of output that the terminal has not read."""
        return textual_hacks.pending_writes(textual_hacks.driver_of(self._app))

    @property
    def bytes_written(self) -> int:
        """Bytes sent to the terminal so far."""
        return textual_hacks.bytes_written(textual_hacks.driver_of(self._app))

    def update(self) -> int:
        """Suppress drawing while the terminal does not keep up, and draw what has changed once it
        has; returns `pending`."""
        pending = self.pending
        if pending >= MAX_PENDING_WRITES and self._suppressed is None:
            self._suppressed = ExitStack()
            self._suppressed.enter_context(self._app.batch_update())
        elif not pending and self._suppressed is not None:
            self._suppressed.close()
            self._suppressed = None
            # The end of Textual's batch draws nothing: a changed widget waits for the next message
            # to its screen, and in a paused run there is none.
            for screen in self._app.screen_stack:
                screen.check_idle()
        return pending

    def frame_started(self) -> None:
        """The next frame may be looked for as often as this one."""
        self._checks = 0

    def check_soon(self) -> None:
        """Call `drained` as soon as the terminal has read its output, before the next tick."""
        if self._timer is None and self._checks < MAX_CHECKS:
            self._checks += 1
            self._timer = self._app.set_timer(CHECK_INTERVAL_S, self._check)

    def _check(self) -> None:
        self._timer = None
        if self.pending:
            self.check_soon()
        else:
            self._drained()
