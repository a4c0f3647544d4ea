"""The dialog of the breakpoints: a list of them, and an input for a new condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.suggester import Suggester
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from tui_trainer.breakpoints.expression import ExpressionError, parse
from tui_trainer.breakpoints.quantities import ATTENTION_TABLES, completions
from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.actions import AddBreakpoint, ChangeBreakpoint, DeleteBreakpoint
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.messages import Breakpoint
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.ui.screens import app_context
from tui_trainer.ui.screens.dialogs import NumberPrompt, SnapshotDialog
from tui_trainer.ui.widgets.ordered_input import OrderedInput

EXAMPLES = "such as loss > 3 * ema(loss), nonfinite, grad_norm(any) > 10 at backward"


class ConditionSuggester(Suggester):
    """Completes the last word of a condition, with the names of the run on the screen."""

    def __init__(self, info: Callable[[], RunInfo | None]) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._info = info

    async def get_suggestion(self, value: str) -> str | None:
        return next(iter(completions(value, columns_of(self._info()))), None)


def columns_of(info: RunInfo | None) -> dict[str, list[str]]:
    """The names that a condition can quote, by table: columns, or attention layers."""
    if info is None:
        return {}
    layers = [each.layer for each in info.attention]
    found: dict[str, list[str]] = {}
    for table in info.tables:
        names = layers if table.name in ATTENTION_TABLES else [c.name for c in table.columns]
        found.setdefault(table.name, []).extend(names)
    return found


class BreakpointList(OptionList):
    """A line for each breakpoint; the keys change the breakpoint under the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "change('enabled')", "On/off", id="breakpoints.toggle",
                tooltip="Enable or disable the breakpoint"),
        Binding("o", "change('once')", "Once", id="breakpoints.once",
                tooltip="Disable it after it has fired once, or never"),
        Binding("l", "change('log_only')", "Log only", id="breakpoints.log",
                tooltip="Write a line to the log instead of pausing"),
        Binding("i", "ignore", "Ignore", id="breakpoints.ignore",
                tooltip="Let the first hits have no effect"),
        Binding("d,delete", "delete", "Delete", id="breakpoints.delete",
                tooltip="Delete the breakpoint"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__(compact=True, markup=False)
        self.breakpoints: tuple[Breakpoint, ...] = ()

    @property
    def current(self) -> Breakpoint | None:
        """The breakpoint under the cursor."""
        if self.highlighted is None or self.highlighted >= len(self.breakpoints):
            return None
        return self.breakpoints[self.highlighted]

    def set_breakpoints(self, breakpoints: tuple[Breakpoint, ...], stopped_at: int | None) -> None:
        """Show `breakpoints`; the cursor stays on its breakpoint."""
        current = self.current
        self.breakpoints = breakpoints
        self.set_options([Option(self._line(each, stopped_at)) for each in breakpoints])
        numbers = [each.number for each in breakpoints]
        if current is not None and current.number in numbers:
            self.highlighted = numbers.index(current.number)
        elif breakpoints:
            self.highlighted = min(self.highlighted or 0, len(breakpoints) - 1)
        self.display = bool(breakpoints)

    def _line(self, breakpoint: Breakpoint, stopped_at: int | None) -> Content:
        sign = app_context(self).glyphs.paused if breakpoint.number == stopped_at else " "
        properties = [*(["off"] if not breakpoint.enabled else []), *breakpoint.properties]
        hits = counted(breakpoint.hits, "hit")
        return Content.assemble(
            (f"{sign}{breakpoint.number:>3} ", "$text-warning"),
            (breakpoint.condition, "" if breakpoint.enabled else "dim"),
            (f"   {', '.join([hits, *properties])}", "dim"),
        )

    def action_change(self, field: str) -> None:
        """Switch a property of the breakpoint under the cursor."""
        current = self.current
        if current is not None:
            changed = {field: not getattr(current, field)}
            app_context(self).command(ChangeBreakpoint(current.number, **changed))

    def action_ignore(self) -> None:
        """Ask how many hits of the breakpoint under the cursor have no effect."""
        current = self.current
        if current is None:
            return
        number, context = current.number, app_context(self)

        def change(count: float | None) -> None:
            if count is not None:
                context.command(ChangeBreakpoint(number, ignore=int(count)))

        question = f"Ignore how many hits of {current.condition}, from now on? (empty: none)"
        prompt = NumberPrompt(question, str(current.ignore or ""), whole=True, empty=0)
        self.app.push_screen(prompt, change)

    def action_delete(self) -> None:
        current = self.current
        if current is not None:
            app_context(self).command(DeleteBreakpoint(current.number))


class BreakpointsDialog(SnapshotDialog):
    """Lists the breakpoints of the run and adds to them."""

    CSS = """
    BreakpointsDialog .dialog { width: 92; }
    BreakpointsDialog OptionList { max-height: 12; }
    BreakpointsDialog .keys { color: $text-muted; margin-top: 1; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close", id="breakpoints.close",
                tooltip="Close the breakpoints"),
        Binding("up", "focus_list", "List", show=False, id="breakpoints.list",
                tooltip="To the list of breakpoints"),
    ]  # fmt: skip

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Breakpoints: pause when a condition is met", markup=False)
            yield BreakpointList()
            yield OrderedInput(
                placeholder="condition",
                compact=True,
                suggester=ConditionSuggester(lambda: app_context(self).snapshot.info),
            )
            yield Static("", classes="error", markup=False)
            yield Static(classes="keys", markup=False)

    def on_mount(self) -> None:
        self.show(app_context(self).snapshot)
        self.query_one(Input).focus()

    def show(self, snapshot: Snapshot) -> None:
        """Draw the breakpoints of a snapshot."""
        breakpoints = self.query_one(BreakpointList)
        stop = snapshot.status.stopped_at
        breakpoints.set_breakpoints(snapshot.status.breakpoints, stop.number if stop else None)
        self._show_keys()

    def _show_keys(self) -> None:
        listed = self.query_one(BreakpointList)
        if listed.has_focus:
            text = "space: on/off, o: once, i: ignore, l: log only, d: delete, escape: close"
        else:
            text = f"enter: add, right: complete{', tab: list' * listed.display}, escape: close"
            text += f"\n{EXAMPLES}"
        self.query_one(".keys", Static).update(text)

    def on_descendant_focus(self) -> None:
        self._show_keys()

    def action_focus_list(self) -> None:
        if self.query_one(BreakpointList).display:
            self.query_one(BreakpointList).focus()

    def on_input_changed(self) -> None:
        self.query_one(".error", Static).update("")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Add the condition, or point at what is wrong with it."""
        if not event.value.strip():
            return
        try:
            condition = parse(event.value).text
        except ExpressionError as error:
            hint = f"\n{error.hint}" if error.hint else ""
            self.query_one(".error", Static).update(f"{error.pointed}{hint}")
            return
        app_context(self).command(AddBreakpoint(condition))
        event.input.value = ""
