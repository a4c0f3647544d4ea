"""Commands and inspections that the app sends to the run, and the answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

from textual.app import App

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import actions
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.inspection import Inspected, InspectionRequest, OfRank, RankRequest
from tui_trainer.protocol.messages import Ack
from tui_trainer.ui.screens import AppContext

SHOWN_BY_STATE = (actions.Pause, actions.Resume)
"""Commands whose effect the header shows anyway: `paused  after forward`, `running`."""


class RunCommands:
    """Sends commands and inspections to the run of an app, and shows the answers to commands."""

    def __init__(
        self,
        app: App[Any],
        *,
        accepted: Callable[[str], None],
        refused: Callable[[], None],
        redraw: Callable[[], None],
    ) -> None:
        """`accepted` shows the message of an answer, `refused` is called when a command was
        refused, `redraw` draws the current snapshot."""
        self._app = app
        self._accepted, self._refused, self._redraw = accepted, refused, redraw

    @property
    def _context(self) -> AppContext:
        return cast(AppContext, self._app)

    def send(self, action: Action) -> None:
        """Send a command; its answer is shown when it arrives."""
        session = self._context.session
        if session is None:
            self._app.notify("no run is open yet", severity="warning")
            return
        show = partial(self._show_answer, action)
        session.send(action).add_done_callback(partial(self._call, show))

    def inspect(
        self,
        request: InspectionRequest,
        answered: Callable[[Inspected], None],
        replaced: Callable[[], None] = lambda: None,
    ) -> None:
        """Request an inspection. Calls `answered` on the event loop, or `replaced` when another
        request replaces this one."""
        session, rank = self._context.session, self._context.inspected_rank
        if session is None:
            return
        if rank and isinstance(request, RankRequest):
            request = OfRank(rank, request)

        def show(future: Future[Inspected]) -> None:
            if future.cancelled():
                replaced()
            else:
                answered(future.result())

        session.inspect(request).add_done_callback(partial(self._call, show))

    def _call(self, show: Callable[[Any], None], answer: Future[Any]) -> None:
        """Called by the session, on any thread."""
        self._context.schedule(show, answer)

    def _show_answer(self, action: Action, answer: Future[Ack]) -> None:
        error = answer.exception() if not answer.cancelled() else None
        if answer.cancelled() or error is not None:
            text = str(error or "not sent")
            self._app.notify(text, title="command failed", severity="error", markup=False)
            return
        ack = answer.result()
        if not ack.ok:
            self._refused()
            text = f"{ack.message}\n{ack.hint}" if ack.hint else ack.message
            self._app.notify(text, title="command refused", severity="warning", markup=False)
        elif ack.message and not isinstance(action, SHOWN_BY_STATE):
            self._accepted(ack.message)
        # `ack.status` is not drawn from here, where it could replace a newer status: the session
        # delivers it in order.
        self._redraw()

    def notify_control_taken(self, before: Snapshot, new: Snapshot) -> None:
        """Tell the user when another viewer takes control from this one."""
        own_id, controller = new.link.viewer_id, new.status.controller
        if own_id is None or controller in (None, own_id):
            return
        if before.status.controller != own_id:
            return
        notices = (event for event in reversed(new.events) if isinstance(event, Notice))
        who = next((notice.who for notice in notices if notice.kind == "control"), "")
        self._app.notify(
            f"{who or 'another viewer'} has taken control\nctrl+t takes it back",
            severity="warning",
            markup=False,
        )
