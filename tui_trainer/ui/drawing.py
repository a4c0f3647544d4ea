"""The half of the app that draws: pulls a snapshot a frame and hands it to the screens, no oftener
than the pace allows and never while the terminal takes nothing."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from textual import events
from textual.app import App

from tui_trainer.session.api import Session, Snapshot
from tui_trainer.ui import output
from tui_trainer.ui.pace import Link, Pace
from tui_trainer.ui.screens.base import RunScreen

TICKS_PER_SECOND = 4.0
"""How often it is looked whether a frame is due."""
HELD_WRITES = 3
"""Pieces of output that may wait for the terminal before drawing stops: a frame is three."""


class DrawingApp(App[int]):
    """Base of the app: what is on its screens, and what it says to the run, is for others."""

    _loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, session: Session | None, link: Link) -> None:
        super().__init__()
        self.session = session
        self.snapshot = Snapshot()
        self.link = link
        self.pace = Pace(link)
        self._rate = 0.0
        """Polls a second that the session was told."""
        self._drawn_version = -1
        self._wake_scheduled = False
        self._switching: ExitStack | None = None
        self._held: ExitStack | None = None
        """While the terminal takes nothing, nothing is drawn."""

    # ------------------------------------------------------------ the session

    def begin_frames(self) -> None:
        """Once the first screen is up."""
        self._loop = asyncio.get_running_loop()
        self.pace.touched(self._now())
        self.set_interval(1 / max(self.link.frames_per_second, TICKS_PER_SECOND), self._tick)
        if self.session is not None:
            self.attach(self.session)

    def attach(self, session: Session) -> None:
        """Show this run from now on."""
        if self.session is not None and self.session is not session:
            self.session.on_arrival(None)
            self.session.close()
        self.session = session
        self._drawn_version = -1
        self._rate = 0.0
        self._set_rate()
        session.on_arrival(self._arrived)
        self._watch_topics()
        self.frame()

    def on_unmount(self) -> None:
        """End the link; the run goes on."""
        if self.session is not None:
            self.session.on_arrival(None)
            self.session.close()

    # ------------------------------------------------------------ frames

    def _tick(self) -> None:
        """Draw if a frame is due and the terminal has taken the one before."""
        behind = output.waiting(self._driver)
        if behind:
            self.pace.waits()
        if behind >= HELD_WRITES and self._held is None:
            self._held = ExitStack()
            self._held.enter_context(self.batch_update())
        elif not behind and self._held is not None:
            self._held.close()  # what changed meanwhile is drawn in one piece
            self._held = None
        self._set_rate()
        if not behind and self._due() <= 0.002:
            self.frame()

    def _due(self) -> float:
        return self.pace.due(self._now(), output.written(self._driver))

    def _set_rate(self) -> None:
        rate = self.pace.polls_per_second(self._now())
        if self.session is not None and rate != self._rate:
            self._rate = rate
            self.session.set_rate(rate)

    async def on_event(self, event: events.Event) -> None:
        """Every key and click on its way in: somebody is there."""
        if isinstance(event, events.Key | events.MouseDown | events.MouseScrollDown | events.Paste):
            self.pace.touched(self._now())
            self._set_rate()
        await super().on_event(event)

    def frame(self) -> None:
        """Pull, and draw if anything is new."""
        self._wake_scheduled = False
        if self.session is None:
            return
        snapshot = self.session.poll()
        if snapshot.version == self._drawn_version:
            return
        self.pace.drawn(self._now(), output.written(self._driver))
        self._drawn_version = snapshot.version
        self.draw(snapshot)

    def draw(self, snapshot: Snapshot) -> None:
        """Hand the picture to the screens that are open."""
        self.snapshot = snapshot
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen) and screen.is_mounted:
                screen.show(snapshot)

    def redraw(self) -> None:
        """Draw the present picture again, for a change that is not the run's."""
        self.draw(self.snapshot)

    def shown_again(self, screen: RunScreen) -> None:
        """A screen came to the front: it is given the present picture."""
        self._watch_topics()
        if screen.is_mounted:
            screen.show(self.snapshot)
            self._draw_again()

    def _arrived(self) -> None:
        """From any thread: something new is there. Frames are never closer than the frame rate."""
        if self._loop is not None and not self._wake_scheduled and not self._loop.is_closed():
            self._wake_scheduled = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._wake_scheduled = False
        if self.session is not None:
            now, drawn = self.session.poll(), self.snapshot
            if (now.link.state, now.status.state) != (drawn.link.state, drawn.status.state):
                self.pace.at_once()  # a link that was lost for a moment is said to have been
        self.call_next(self._tick)  # not due yet: a later tick takes it

    def _now(self) -> float:
        return self._loop.time() if self._loop is not None else 0.0

    def _watch_topics(self) -> None:
        if self.session is not None:
            screens = [s for s in self.screen_stack if isinstance(s, RunScreen)]
            self.session.watch(frozenset().union(*(screen.topics for screen in screens)))

    # ------------------------------------------------------------ from one screen to another

    def delay_update(self, delay: float = 0.05) -> None:
        """Draw nothing while one screen makes room for another: for `delay` seconds, as Textual has
        it, or until the other has been given the present picture, which is sooner."""
        self._draw_again()
        self._switching = ExitStack()
        self._switching.enter_context(self.batch_update())
        self.set_timer(delay, self._draw_again, name="delay_update")

    def _draw_again(self) -> None:
        if self._switching is not None:
            self._switching.close()
            self._switching = None
            self.screen.refresh()
