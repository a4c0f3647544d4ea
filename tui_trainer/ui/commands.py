"""The half of the app that speaks to the run: commands, their answers, and leaving."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from textual.screen import ModalScreen
from textual.timer import Timer

from tui_trainer.protocol import messages
from tui_trainer.protocol.messages import TAKEN, Ack, Action, Notice
from tui_trainer.session.api import Snapshot
from tui_trainer.ui.drawing import DrawingApp
from tui_trainer.ui.screens.dialogs import QuitDialog

SAID_S = 4.0
"""How long the answer to a command stays in the header, in seconds."""


class CommandingApp(DrawingApp):
    """Base of the app: what is on its screens is the app's."""

    ends_with_app = False
    """Whether the run is trained by this process, so that leaving ends it."""
    said = ""
    """What the last command did, for a moment."""
    _forget: Timer | None = None
    _leaving = False
    """The user asked to stop and leave: the app goes when the run has ended."""

    def draw(self, snapshot: Snapshot) -> None:
        """Hand the picture to the screens that are open, and say what it changes for the user."""
        self.tell_of_control(snapshot)
        super().draw(snapshot)
        if self._leaving and snapshot.status.ended:
            self.exit(0)

    # ------------------------------------------------------------ commands

    def command(self, action: Action) -> None:
        """Send a command; its answer is shown the moment it comes, refused or not."""
        if self.session is None:
            self.notify("no run is open yet", severity="warning")
            return
        self.session.send(action).add_done_callback(partial(self._answered, action))

    def _answered(self, action: Action, answer: Future[Ack]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.call_next, self._acknowledge, action, answer)

    def _acknowledge(self, action: Action, answer: Future[Ack]) -> None:
        fault = answer.exception() if not answer.cancelled() else None
        if answer.cancelled() or fault is not None:
            self.notify(str(fault or "not sent"), title="not done", severity="error")
            return
        ack = answer.result()
        if not ack.ok:
            self._leaving = False
            text = f"{ack.message}\n{ack.hint}" if ack.hint else ack.message
            self.notify(text, title="not done", severity="warning", markup=False)
        elif ack.message:
            self.say(ack.message)
        # The session has the answer's status among what arrived, in its order: drawn from here it
        # could overwrite a newer one.
        self.frame()

    def tell_of_control(self, seen: Snapshot) -> None:
        """Say when somebody else begins to steer the run that was steered from here."""
        mine, holder = seen.link.viewer_id, seen.status.controller
        if mine is None or holder in (None, mine) or self.snapshot.status.controller != mine:
            return
        taken = (e for e in reversed(seen.events) if isinstance(e, Notice) and e.kind == "command")
        who = next((event.who for event in taken if event.text == TAKEN), "") or "another viewer"
        self.notify(
            f"{who} has taken control\nctrl+t takes it back", severity="warning", markup=False
        )

    def say(self, message: str) -> None:
        """One short line about what was just done, shown in the header for a moment."""
        self.said = message
        if self._forget is not None:
            self._forget.stop()
        self._forget = self.set_timer(SAID_S, self._unsay)
        self.redraw()

    def _unsay(self) -> None:
        self.said = ""
        self.redraw()

    # ------------------------------------------------------------ leaving

    async def action_quit(self) -> None:
        """Ask what becomes of the run; without a living one, just leave."""
        status, link = self.snapshot.status, self.snapshot.link
        if isinstance(self.screen, ModalScreen):
            self.exit(0)  # asked for twice
        elif self.session is None or status.ended or link.state in ("closed", "replay"):
            self.exit(0)
        elif link.read_only or link.state != "live":
            self.exit(0)  # nothing to decide: the run goes on without us
        else:
            self.push_screen(QuitDialog(self.ends_with_app), self._leave)

    def _leave(self, choice: str | None) -> None:
        if choice == "detach":
            self.exit(0)
        elif choice in ("stop", "checkpoint"):
            self._leaving = True
            self.command(messages.Stop(checkpoint=choice == "checkpoint"))
