"""The dialog of the settings of a live run: their present values, and an input for a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.suggester import SuggestFromList
from textual.widgets import Input, OptionList, Static
from textual.widgets.input import Selection
from textual.widgets.option_list import Option

from tui_trainer.client.api import Snapshot
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.live_settings import NAMES, parse_changes
from tui_trainer.protocol.actions import Branch, ChangeSettings, UndoSettings
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.inspection import Inspected
from tui_trainer.protocol.settings import (
    ReadSettings,
    Setting,
    SettingChange,
    SettingList,
    setting_text,
)
from tui_trainer.ui.screens import app_context
from tui_trainer.ui.screens.dialogs import SnapshotDialog
from tui_trainer.ui.screens.inspection_requests import InspectionRequests
from tui_trainer.ui.widgets.ordered_input import OrderedInput

EXAMPLES = "such as lr=3e-4, lr[1]=1e-3, betas=0.9,0.95, clip=off, freeze=blocks.0.*"
IN_THE_PAST = (
    "step {:,} is in the past of this run, which has been at step {:,}: ctrl+b starts a branch"
)
NOTHING_TYPED = "type a change first, for example lr=3e-4"
LATER = "the settings are read at the next step boundary"


class SettingsTable(OptionList):
    """A line for each setting; enter edits it."""

    def __init__(self) -> None:
        super().__init__(compact=True, markup=False)
        self.settings: tuple[Setting, ...] = ()

    def set_settings(self, settings: tuple[Setting, ...]) -> None:
        """Show `settings`; the cursor stays on its line."""
        line = self.highlighted
        self.settings = settings
        names = max((len(each.name) for each in settings), default=0)
        values = max((len(setting_text(each.value)) for each in settings), default=0)
        self.set_options(
            Option(
                Content.assemble(
                    (f" {each.name:{names}}  ", "$text-accent"),
                    f"{setting_text(each.value):>{values}}",
                    (f"   {each.note}", "dim"),
                )
            )
            for each in settings
        )
        if settings:
            self.highlighted = min(line or 0, len(settings) - 1)
        self.display = bool(settings)


class SettingsDialog(SnapshotDialog):
    """Shows the settings of the run that can be changed, and changes them."""

    CSS = """
    SettingsDialog .dialog { width: 92; }
    SettingsDialog OptionList { max-height: 12; }
    SettingsDialog .keys { color: $text-muted; margin-top: 1; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close", id="settings.close",
                tooltip="Close the settings"),
        Binding("up", "focus_list", "List", show=False, id="settings.list",
                tooltip="To the list of settings"),
        Binding("ctrl+z", "undo", "Undo", priority=True, id="settings.undo",
                tooltip="Undo the latest change"),
        Binding("ctrl+o", "what_if", "What if", priority=True, id="settings.what_if",
                tooltip="Make 50 steps with the present settings and 50 with the changed ones, "
                "compare their losses, and restore everything"),
        Binding("ctrl+b", "branch", "Branch", priority=True, id="settings.branch",
                tooltip="Start a new run that continues from here with the change; this one stays"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.requests = InspectionRequests(self)
        self._seen: int | None = None
        """Id of the latest change of the settings that are shown."""

    def compose(self) -> ComposeResult:
        names = [f"{name}=" for name in NAMES]
        with Vertical(classes="dialog"):
            yield Static("Change a setting of the training, from the next step on", markup=False)
            yield SettingsTable()
            yield OrderedInput(
                placeholder="change",
                suggester=SuggestFromList(names),
                compact=True,
                select_on_focus=False,
            )
            yield Static("", classes="error", markup=False)
            yield Static("", classes="about", markup=False)
            yield Static(classes="keys", markup=False)

    def on_mount(self) -> None:
        self.query_one(SettingsTable).display = False
        self.query_one(".about", Static).update(LATER)
        self.show(app_context(self).snapshot)
        self.query_one(Input).focus()

    def show(self, snapshot: Snapshot) -> None:
        """Read the settings again when they have changed."""
        edits = [e.id for e in snapshot.events if isinstance(e, Notice) and e.kind == "edit"]
        latest = edits[-1] if edits else -1
        if latest != self._seen:
            self._seen = latest
            self.requests.send(ReadSettings(), self._show_settings)
        self._show_keys()

    def _show_settings(self, answer: Inspected) -> None:
        about = self.query_one(".about", Static)
        if not isinstance(answer.result, SettingList):
            about.update(f"{answer.message}\n{answer.hint}".strip())
            return
        listed = answer.result
        self.query_one(SettingsTable).set_settings(listed.settings)
        facts = [
            *([f"{counted(listed.frozen, 'parameter')} frozen"] if listed.frozen else []),
            *([f"ctrl+z undoes the last of {counted(listed.edits, 'change')}"] if listed.edits
              else []),
        ]  # fmt: skip
        about.update(", ".join(facts))
        about.display = bool(facts)

    def _show_keys(self) -> None:
        table = self.query_one(SettingsTable)
        if table.has_focus:
            text = "enter: edit this one, tab: input, escape: close"
        else:
            up = ", up: list" * table.display
            text = f"enter: change, ctrl+o: what if, ctrl+b: branch{up}, escape: close"
            text += f"\n{EXAMPLES}"
        self.query_one(".keys", Static).update(text)

    def on_descendant_focus(self) -> None:
        self._show_keys()

    def action_focus_list(self) -> None:
        if self.query_one(SettingsTable).display:
            self.query_one(SettingsTable).focus()

    def action_undo(self) -> None:
        app_context(self).command(UndoSettings())

    def action_what_if(self) -> None:
        """Compare the next steps with and without the change in the input."""
        self._once_typed(self._what_if)

    def action_branch(self) -> None:
        """Start a new run from here with the changes in the input."""
        self._once_typed(self._branch)

    def _once_typed(self, act: Callable[[str], None]) -> None:
        """Call `act` with the text of the input, after all keys pressed so far: these wait in the
        queue of the input, which a binding with priority overtakes."""
        entry = self.query_one(Input)
        entry.call_later(lambda: act(entry.value))

    def _what_if(self, text: str) -> None:
        if self._parsed(text):
            from tui_trainer.ui.screens.experiments import ExperimentsDialog

            self.app.push_screen(ExperimentsDialog(text))
        elif not text.strip():
            self.query_one(".error", Static).update(NOTHING_TYPED)

    def _branch(self, text: str) -> None:
        changes = self._parsed(text)
        if changes or not text.strip():
            app_context(self).command(Branch(changes))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Edit the setting under the cursor."""
        setting = self.query_one(SettingsTable).settings[event.option_index]
        change = self.query_one(Input)
        change.value = f"{setting.name}={setting_text(setting.value)}"
        change.selection = Selection(len(setting.name) + 1, len(change.value))
        change.focus()

    def on_input_changed(self) -> None:
        self.query_one(".error", Static).update("")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Make the change, or show what is wrong with it."""
        changes = self._parsed(event.value)
        status = app_context(self).snapshot.status
        if changes and status.ahead is not None:
            self.query_one(".error", Static).update(IN_THE_PAST.format(status.step, status.ahead))
        elif changes:
            app_context(self).command(ChangeSettings(changes))
            event.input.value = ""

    def _parsed(self, text: str) -> tuple[SettingChange, ...]:
        """The changes that were typed. When they are not valid, shows why and returns ()."""
        if not text.strip():
            return ()
        try:
            return parse_changes(text.split())
        except ConfigurationError as error:
            hint = f"\n{error.hint}" if error.hint else ""
            self.query_one(".error", Static).update(f"{error.message}{hint}")
            return ()
