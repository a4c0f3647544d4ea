"""Leaving the app: what becomes of the run, and which command of `tui-trainer` runs next."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from textual.app import App
from textual.screen import ModalScreen

from tui_trainer.protocol import actions
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.ui.screens import AppContext
from tui_trainer.ui.screens.dialogs import QuitDialog

if TYPE_CHECKING:
    from tui_trainer.ui.screens.ended import NextStep


class Leaving:
    """Asks what is to become of the run, and leaves."""

    next_command: tuple[str, ...] = ()
    """The command that the user has chosen to run after the app has closed."""

    def __init__(self, app: App[Any], ends_with_app: bool) -> None:
        """`ends_with_app`: the run trains inside this process, so leaving ends it."""
        self._app = app
        self._ends_with_app = ends_with_app
        self._stopping = False
        """The user asked to stop the run and leave: the app exits once the run has ended."""

    @property
    def _context(self) -> AppContext:
        return cast(AppContext, self._app)

    # ------------------------------------------------------------ quitting

    def quit(self) -> None:
        """Ask whether to detach or stop; leave at once where there is nothing to decide."""
        if isinstance(self._app.screen, ModalScreen):
            self._app.exit(0)
        else:
            self.leave_run_for(())

    def leave_run_for(self, command: tuple[str, ...]) -> None:
        """Leave and run another command, once the user has said what is to become of the run."""
        if self._decides_nothing:
            self.leave_for(command)
        else:
            answered = partial(self._answered, command)
            self._app.push_screen(QuitDialog(self._ends_with_app), answered)

    def leave_for(self, command: tuple[str, ...] | None) -> None:
        """Leave, and run another command of `tui-trainer` then; None: stay."""
        if command is not None:
            Leaving.next_command = command
            self._app.exit(0)

    @property
    def _decides_nothing(self) -> bool:
        """Whether leaving decides nothing about a run."""
        status, link = self._context.snapshot.status, self._context.snapshot.link
        no_run = self._context.session is None or status.ended
        return no_run or link.state != "live" or link.read_only

    def _answered(self, command: tuple[str, ...], choice: str | None) -> None:
        if choice is not None:
            Leaving.next_command = command
        if choice == "detach":
            self._app.exit(0)
        elif choice in ("stop", "checkpoint"):
            self._stopping = True
            self._context.command(actions.Stop(checkpoint=choice == "checkpoint"))

    def stop_refused(self) -> None:
        """Stay: a command was refused, so that the run may never end."""
        self._stopping = False

    def drawn(self) -> None:
        """A snapshot was drawn: leave if the run that was stopped has ended."""
        if self._stopping and self._context.snapshot.status.ended:
            self._app.exit(0)

    # ------------------------------------------------------------ after the end

    def ask_next(self) -> None:
        """Offer what can be done with a run that has ended; what is chosen is run on leaving."""
        info = self._context.snapshot.info
        if info is not None and not isinstance(self._app.screen, ModalScreen):
            self._app.run_worker(partial(self._find_next_steps, info), thread=True)

    def _find_next_steps(self, info: RunInfo) -> None:
        """Runs on a worker thread."""
        from tui_trainer.ui.screens.ended import next_steps

        found = next_steps(info, replayed=self._context.snapshot.link.state == "replay")
        self._app.call_from_thread(self._offer_next_steps, found)

    def _offer_next_steps(self, found: list[NextStep]) -> None:
        from tui_trainer.ui.screens.ended import EndedDialog

        if found:
            self._app.push_screen(EndedDialog(found), self.leave_for)
        else:
            text = "the recording of this run is on another machine"
            self._app.notify(text, severity="warning")
