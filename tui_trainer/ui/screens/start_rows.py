"""What the start screen's form is made of: the rows of a task, or those of a script."""

from __future__ import annotations

from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Input

from tui_trainer.config.options import Option
from tui_trainer.ui.panels.choice import Choice, Toggle
from tui_trainer.ui.panels.form import Fold, FormRow, row_for, still
from tui_trainer.ui.screens.start_model import (
    TaskForm,
    common_options,
    folded_options,
    preset_value,
    written,
)


def preset_row(task: TaskForm, preset: str) -> FormRow:
    """The choice of a preset."""
    chooser = Choice(tuple(task.presets), preset, id="preset")
    return FormRow("preset", chooser, help="A set of defaults: size, length, schedule")


def task_rows(task: TaskForm, preset: str, *, unfolded: bool) -> list[Widget]:
    """The common options, then the others under headings, open where there is room for them."""

    def row(option: Option) -> FormRow:
        return row_for(option, written(preset_value(task, preset, option)))

    common = [row(option) for option in common_options(task)]
    folded: list[Widget] = []
    for name, options in folded_options(task).items():
        rows = Vertical(*(row(option) for option in options), classes="group")
        fold = Fold(name, rows, len(options))
        fold.open = rows.display = unfolded
        folded += [fold, rows]
    sides = Vertical(*common, paused_row(), id="common"), Vertical(*folded, id="folded")
    return [Vertical(*sides, id="columns")]


def script_rows() -> list[Widget]:
    """A path and arguments."""
    path = Input(placeholder="train.py", compact=True, id="option-script", classes="-text")
    arguments = Input(placeholder="none", compact=True, id="option-arguments", classes="-text")
    return [
        FormRow(
            "script",
            still(path),
            help="The Python file that trains, as you would give it to python",
        ),
        FormRow("arguments", still(arguments), help="Its own arguments, quoted as in a shell"),
        paused_row(),
    ]


def paused_row() -> FormRow:
    """Whether to stop before the first phase."""
    toggle = Toggle(False, id="paused")
    return FormRow("start paused", toggle, help="Stop before the first phase, to step from there")
