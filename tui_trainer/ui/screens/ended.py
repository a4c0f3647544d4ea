"""What to do with a run that has ended: replay it, resume it, compare it, report on it, or start it
again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.markup import escape
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from tui_trainer.learn.demos import demo_of
from tui_trainer.protocol.schema import SCRIPT, RunInfo
from tui_trainer.runs.checkpoints import checkpoint_steps
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import list_runs

MAX_OTHERS = 3
"""Runs that are offered for a comparison."""


@dataclass(frozen=True)
class NextStep:
    """A command of `tui-trainer` that is offered."""

    title: str
    help: str
    command: tuple[str, ...]


def next_steps(info: RunInfo, replayed: bool) -> list[NextStep]:
    """What can be done with the recording of an ended run on this machine; nothing where it is not
    here. Reads the disk."""
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
    """A command without `--name NAME`, which two runs cannot share. A later one is the script's."""
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
