"""When to draw: depends on how many bytes frames cost and on whether the user is active.

After a frame of n bytes the next one is at least n / budget seconds away, so a screen that is only
watched never sends the terminal more than its budget. A key press draws at once. While the terminal
has not read the output of earlier frames, nothing is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from textual.app import App
from textual.timer import Timer

from tui_trainer.ui import textual_hacks

IDLE_INTERVALS = ((600.0, 4.0), (60.0, 2.0))
"""(seconds without input, factor on the interval between frames from then on)."""
ACTIVE_S = 1.5
"""After a key press, frames are drawn at full rate for this long."""
ACTIVE_POLLS_PER_SECOND = 4.0
MAX_INTERVAL_S = 8.0
"""Longest interval between frames that their size can cause."""
MAX_BACK_OFF = 16.0


CELL_UPDATES_VARIABLE = "TUI_TRAINER_CELL_UPDATES"
"""Environment variable: 0 never sends single cells, 1 always does."""


@dataclass(frozen=True)
class TerminalLink:
    """Limits of the connection to the terminal."""

    frames_per_second: float
    bytes_per_second: float
    """Budget while no key is pressed."""
    slow: bool = False
    """Whether panels also draw more coarsely, so that numbers and trends change less often."""
    cell_updates: bool = False
    """Whether to send only the cells that changed (see `textual_hacks`)."""


LOCAL_LINK = TerminalLink(4.0, 64_000.0)
SSH_LINK = TerminalLink(4.0, 8_000.0, cell_updates=True)
SLOW_LINK = TerminalLink(0.5, 900.0, slow=True, cell_updates=True)
"""Link assumed with `--slow-link`."""


def terminal_link(slow_link: bool, environment: Mapping[str, str] = os.environ) -> TerminalLink:
    """The link for `--slow-link`, for an SSH session, or for a terminal on this machine."""
    over_ssh = environment.get("SSH_CONNECTION") or environment.get("SSH_TTY")
    link = SLOW_LINK if slow_link else SSH_LINK if over_ssh else LOCAL_LINK
    requested = environment.get(CELL_UPDATES_VARIABLE)
    return replace(link, cell_updates=requested == "1") if requested in ("0", "1") else link


class FrameScheduler:
    """Decides when the next frame is due. All times are seconds of the caller's clock."""

    def __init__(self, link: TerminalLink, now: float = 0.0) -> None:
        self.link = link
        self._last_input = now
        self._active_until = 0.0
        self._requested = False
        self._last_frame = -MAX_INTERVAL_S
        self._bytes_at_last_frame = 0
        self._back_off = 1.0

    def input_received(self, now: float) -> None:
        """A key was pressed or the mouse used."""
        self._last_input = now
        self._active_until = now + ACTIVE_S
        self._requested = True
        self._back_off = 1.0

    def request_frame(self) -> None:
        """Make the next frame due now."""
        self._requested = True

    @property
    def requested(self) -> bool:
        """Whether the next frame is due, no matter when the last one was drawn."""
        return self._requested

    def frame_started(self, now: float, bytes_written: int) -> None:
        """A frame is being drawn; `bytes_written` is the total sent to the terminal before it."""
        self._last_frame, self._bytes_at_last_frame = now, bytes_written
        self._requested = False
        self._back_off = max(1.0, self._back_off / 2)

    def back_off(self) -> None:
        """The terminal has not read all of the last frame: double the interval."""
        self._back_off = min(self._back_off * 2, MAX_BACK_OFF)

    def seconds_until_due(self, now: float, bytes_written: int) -> float:
        """Seconds until the next frame; 0 or less when it is due."""
        if self._requested:
            return 0.0
        return self._last_frame + self._interval(now, bytes_written) - now

    def polls_per_second(self, now: float) -> float:
        """How often to poll the run: as often as frames are drawn, or at full rate after a key."""
        if now < self._active_until:
            return ACTIVE_POLLS_PER_SECOND
        return self.link.frames_per_second / self._idle_factor(now)

    def _interval(self, now: float, bytes_written: int) -> float:
        cost_s = (bytes_written - self._bytes_at_last_frame) / self.link.bytes_per_second
        if now < self._active_until and not self.link.slow:
            cost_s = 0.0
        interval = max(1 / self.link.frames_per_second, min(cost_s, MAX_INTERVAL_S))
        return interval * max(self._idle_factor(now), self._back_off)

    def _idle_factor(self, now: float) -> float:
        idle_s = now - self._last_input
        return next((factor for seconds, factor in IDLE_INTERVALS if idle_s >= seconds), 1.0)


MAX_PENDING_WRITES = 3
"""Pieces of output that may wait for the terminal before drawing stops. A frame is about three."""
CHECK_INTERVAL_S = 0.02
"""Interval at which a requested frame checks whether the pending output has been read."""
MAX_CHECKS = 12
"""Maximum number of checks for one frame; then only ticks check, since the terminal may read
nothing at all."""


class OutputBacklog:
    """The output of an app that its terminal has not read yet.

    Textual writes on a thread, from a short queue. A full queue would block the event loop.
    """

    def __init__(self, app: App[Any], drained: Callable[[], None]) -> None:
        """`drained` is called when the terminal has read everything, after `check_soon`."""
        self._app = app
        self._drained = drained
        self._timer: Timer | None = None
        self._checks = 0
        """Number of checks since the last frame."""
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
        """Reset the number of checks for the next frame."""
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
