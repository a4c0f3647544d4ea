"""Leaving the app: whether the run stops or continues, and which command of `tui-trainer` runs
next: a run that has ended can be replayed, resumed, compared, reported on, or started again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from rich.markup import escape
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from tui_trainer.learn.demos import demo_of
from tui_trainer.protocol import actions
from tui_trainer.protocol.schema import SCRIPT, RunInfo
from tui_trainer.runs.checkpoints import checkpoint_steps
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import list_runs
from tui_trainer.ui.screens import AppContext
from tui_trainer.ui.screens.dialogs import QuitChoice, QuitDialog

MAX_OTHERS = 3
"""Runs that are offered for a comparison."""


@dataclass(frozen=True)
class NextStep:
    """A command of `tui-trainer` that is offered."""

    title: str
    help: str
    command: tuple[str, ...]


def next_steps(info: RunInfo, replayed: bool) -> list[NextStep]:
    """The commands for the recording of an ended run; none when the recording is on another
    machine. Reads the disk."""
    directory = info.directory
    if not directory or not Path(directory).is_dir():
        return []
    steps = [] if replayed else [
        NextStep("Replay", "step by step through the recording", ("replay", directory))
    ]  # fmt: skip
    if (guided := demo_of(info)) is not None:
        curves = ("demo", guided[0].name, "--against", directory)
        steps.insert(0, NextStep("Both curves", "with the fault and without", curves))
    saved = [] if info.task == SCRIPT else checkpoint_steps(Path(directory))
    if saved and (info.total_steps is None or saved[-1] < info.total_steps):
        text = f"a new run from the checkpoint of step {saved[-1]:,}"
        steps.append(NextStep("Resume", text, (info.task, "--resume", directory)))
    steps += [
        NextStep(
            f"Compare with {other.name}",
            f"{other.reported.task}, {other.state} at step {other.reported.step:,}",
            ("compare", directory, str(other.directory)),
        )
        for other in _others(info)
    ]
    steps.append(NextStep("Report", "write one HTML page about it", ("report", directory)))
    again = _without_name(info.command, info.name)
    if again and Path(again[0]).name == "tui-trainer" and len(again) > 1:
        steps.append(NextStep("Start again", " ".join(again), again[1:]))
    return steps


def _without_name(command: Sequence[str], name: str) -> tuple[str, ...]:
    """A command without `--name NAME`, since two runs cannot share a name. Only the first one is
    removed: a second belongs to the script."""
    for place, word in enumerate(command):
        if word == f"--name={name}":
            return (*command[:place], *command[place + 1 :])
        if word == "--name" and command[place + 1 : place + 2] == (name,):
            return (*command[:place], *command[place + 2 :])
    return tuple(command)


def _others(info: RunInfo) -> list[RunEntry]:
    """The newest other runs, those of the same task first."""
    try:
        runs = list_runs(Path(info.directory).parent)
    except RunError:
        return []
    others = [
        run
        for run in runs
        if run.name != info.name and run.state != "refused" and run.reported.step
    ]
    others.sort(key=lambda run: run.reported.task != info.task)
    return others[:MAX_OTHERS]


class EndedDialog(ModalScreen[tuple[str, ...] | None]):
    """Asks what to do next; returns the command, or None to stay."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Stay", id="ended.stay", tooltip="Stay on this screen")
    ]

    def __init__(self, steps: Sequence[NextStep]) -> None:
        super().__init__()
        self.steps = steps

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("This run has ended. What next?", classes="question")
            yield OptionList(
                *(
                    Option(f"{escape(step.title)}  [dim]{escape(step.help)}[/dim]", id=str(number))
                    for number, step in enumerate(self.steps)
                )
            )
            yield Static("[dim]enter: choose, escape: stay[/dim]")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self.steps[int(event.option.id or 0)].command)


class Leaving:
    """Leaves the app, and asks what happens to the run then."""

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
        """Leave for another command, once the user has chosen what happens to the run."""
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

    def _answered(self, command: tuple[str, ...], choice: QuitChoice | None) -> None:
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
        """Offer commands for a run that has ended; the chosen one runs after the app has closed."""
        info = self._context.snapshot.info
        if info is not None and not isinstance(self._app.screen, ModalScreen):
            self._app.run_worker(partial(self._find_next_steps, info), thread=True)

    def _find_next_steps(self, info: RunInfo) -> None:
        """Runs on a worker thread."""
        found = next_steps(info, replayed=self._context.snapshot.link.state == "replay")
        self._app.call_from_thread(self._offer_next_steps, found)

    def _offer_next_steps(self, found: list[NextStep]) -> None:
        if found:
            self._app.push_screen(EndedDialog(found), self.leave_for)
        else:
            text = "the recording of this run is on another machine"
            self._app.notify(text, severity="warning")
