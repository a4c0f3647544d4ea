"""The help: all keys, read from the bindings, and what the phases, quantities and signs mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import Input

from tui_trainer.client.api import Snapshot
from tui_trainer.history.healthy_ranges import CLIP_SCALE, UPDATE_RATIO
from tui_trainer.learn.page import NO_BREAK, help_texts, key_labels, titles, words
from tui_trainer.protocol import Phase
from tui_trainer.protocol.schema import EXPLODING_NORM, RunInfo
from tui_trainer.protocol.text import wrap
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.panels.attention.statistics import SHOWN_STATISTICS
from tui_trainer.ui.panels.base import slowed_tables
from tui_trainer.ui.screens import FURTHER_SCREENS, SCREENS, dialogs
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.screens.breakpoints import BreakpointList
from tui_trainer.ui.widgets.form import ChoiceRow
from tui_trainer.ui.widgets.key_line import KeyLine
from tui_trainer.ui.widgets.lines import Row, ScrollingLines, Span
from tui_trainer.ui.widgets.search import SearchInput
from tui_trainer.ui.widgets.table import VirtualTable


@dataclass(frozen=True)
class KeyHelp:
    """One action and the keys that trigger it."""

    keys: tuple[str, ...]
    """Keys as displayed, such as `shift+f3`."""
    name: str
    help: str
    action: str


@dataclass(frozen=True)
class KeyGroup:
    """The keys of one screen or purpose."""

    title: str
    keys: tuple[KeyHelp, ...]


IN_REPLAY = {
    "run.pause": "Play the recording, or pause",
    "run.step": "One step forward",
    "run.steps": "A number of steps forward",
    "run.epoch": "To the end of the epoch",
}
"""What the keys that control a run do in a replay."""


def key_groups(app: App[Any], first: str = "") -> tuple[KeyGroup, ...]:
    """The keys of the app, of each screen, and of tables, forms and dialogs, with those of the
    screen `first` before all others. In a replay, only keys that have an effect there."""
    app_bindings = list(Binding.make_bindings(type(app).BINDINGS))
    replay = [binding for binding in app_bindings if (binding.id or "").startswith("replay.")]
    everywhere = [binding for binding in app_bindings if binding not in replay]
    groups = [
        KeyGroup("Controlling the run", _keys(app, CONTROL_BINDINGS)),
        KeyGroup("Everywhere", _keys(app, [*everywhere, _palette_binding(app)])),
    ]
    if replay:
        playing = [
            replace(binding, tooltip=IN_REPLAY[binding.id])
            for binding in CONTROL_BINDINGS
            if binding.id in IN_REPLAY
        ]
        groups[0] = KeyGroup("Looking back", _keys(app, [*playing, *replay]))
    controls = {binding.id for binding in CONTROL_BINDINGS}
    for entry in (*SCREENS, *FURTHER_SCREENS):
        bindings = Binding.make_bindings(entry.load().BINDINGS)
        own = [binding for binding in bindings if binding.id not in controls]
        if own and entry.mode == first:
            groups.insert(0, KeyGroup(f"{THIS_SCREEN}: {entry.title}", _keys(app, own)))
        elif own and (not replay or entry.mode != "start"):
            groups.append(KeyGroup(entry.title, _keys(app, own)))
    for title, screen in getattr(app, "OWN_SCREENS", ()):
        groups.insert(1, KeyGroup(title, _keys(app, screen.BINDINGS)))
    groups.append(KeyGroup("In tables", _keys(app, VirtualTable.BINDINGS)))
    forms = [*ChoiceRow.BINDINGS, *SearchInput.BINDINGS]
    groups.append(KeyGroup("In forms and prompts", _keys(app, forms)))
    if not replay:
        groups.append(KeyGroup("In the list of breakpoints", _keys(app, BreakpointList.BINDINGS)))
    in_dialogs = [*dialogs.NumberPrompt.BINDINGS, *dialogs.QuitDialog.BINDINGS]
    groups.append(KeyGroup("In dialogs", _keys(app, in_dialogs)))
    return tuple(groups)


def _palette_binding(app: App[Any]) -> Binding:
    """The key of the command palette with a tooltip, which Textual's own binding lacks."""
    return Binding(
        app.COMMAND_PALETTE_BINDING,
        "command_palette",
        "Palette",
        id="palette",
        tooltip="Every action by name",
    )


def _keys(app: App[Any], bindings: Iterable[BindingType]) -> tuple[KeyHelp, ...]:
    """One entry for each action, with all of its keys."""
    found: dict[tuple[str, str], KeyHelp] = {}
    for binding in Binding.make_bindings(bindings):
        identity = (binding.id or binding.action, binding.action)
        display = app.get_key_display(binding)
        known = found.get(identity)
        if known is not None:
            keys = known.keys if display in known.keys else (*known.keys, display)
            found[identity] = KeyHelp(keys, known.name, known.help, known.action)
        else:
            text = binding.tooltip or binding.description
            found[identity] = KeyHelp((display,), binding.description, text, binding.action)
    return tuple(found.values())


Entries = tuple[tuple[str, str], ...]
"""(key, name or sign, what it means)"""

PHASES: tuple[tuple[Phase, str], ...] = (
    ("data", "the next batch of inputs and targets is loaded"),
    ("zero_grad", "the gradients of the previous step are cleared"),
    ("forward", "the model turns inputs into predictions"),
    ("loss", "one number says how wrong the predictions are"),
    ("backward", "the gradient of the loss with respect to every parameter is computed"),
    ("clip", "a gradient that is too long is scaled down; its direction stays"),
    ("step", "the optimizer moves each parameter a little against its gradient"),
)

QUANTITIES: Entries = (
    ("loss", "what training minimizes; validation is the same on data that is not trained on"),
    ("gradient norm", "‖∂L/∂p‖₂ of a parameter, before clipping and after un-scaling"),
    (
        "total norm",
        "√Σ‖gᵢ‖² over all parameters: what clipping compares with its limit; "
        f"healthy up to {EXPLODING_NORM:.0f} times its first values",
    ),
    (
        "clip scale",
        "by norm min(1, max_norm / (norm + 1e-6)), by value the norm after / the norm before: "
        f"below 1 the step was clipped; {CLIP_SCALE.words}",
    ),
    ("share", "‖gᵢ‖² / Σ‖g‖²: a parameter's part of the squared total norm"),
    ("update ratio", f"‖Δw‖ / ‖w‖ of one step: {UPDATE_RATIO.words}, best near 1e-3"),
    ("weight norm", "‖w‖₂; without weight decay it usually grows"),
    ("non-finite", "nan or inf: usually a step that is too large, or an overflow of the data type"),
    (
        "overhead",
        "time that tui-trainer takes on the training thread, as a share of step time. Not counted: "
        "caches it evicts, threads it wakes, and what the viewer and other processes use",
    ),
)

ATTENTION: Entries = tuple(
    (statistic.title, f"{statistic.meaning}. Healthy: {statistic.healthy}")
    for statistic in SHOWN_STATISTICS
)


def cadence_entries(info: RunInfo | None) -> Entries:
    """The tables that are measured less often to stay within the overhead budget."""
    if info is None:
        return ()
    return tuple(slowed_tables(info)) or (("none", "every quantity is measured at its own rate"),)


def sign_entries(glyphs: Glyphs) -> Entries:
    """The signs as they are drawn with `glyphs`."""
    return (
        (glyphs.point, "on the loss chart, a validation; on the line of a replay, a mark"),
        (glyphs.user_event, "on a step axis: a user gave a command or set a mark"),
        (glyphs.mark, "on the axis of the clipping chart and the line of a replay: a clipped step"),
        (glyphs.failed, "on a step axis and the line of a replay: a value that was not finite"),
        (glyphs.ascending, "on the line of a replay: the worst spike of the loss"),
        ("yellow, italic", "provisional: a value of the unfinished step that the run is paused in"),
        ("layer*", "there is a note on this layer: screen 2 shows it under the cursor"),
        (glyphs.missing, "not measured yet"),
        ("n/a", "a comparison that has no meaning here; the screen says why"),
        ("! in a trend", "a value that was not finite"),
    )


COLUMN_WIDTH = 66
"""Width of a column, in cells, that makes texts easy to read."""
COLUMN_GAP = 3
MAX_COLUMNS = 3
MAX_NAME_WIDTH = 20
MIN_TEXT_WIDTH = 10


KEY_STYLE = "accent"


@dataclass(frozen=True)
class HelpBlock:
    """A heading and its entries: a key or a name, and what it means."""

    title: str
    entries: Sequence[tuple[str, str]]
    style: str = KEY_STYLE
    """Style of the names."""


def help_blocks(
    groups: Sequence[KeyGroup], glyphs: Glyphs, info: RunInfo | None = None
) -> list[HelpBlock]:
    """All blocks of the help, keys first; `info` describes the run whose cadences are listed."""
    keys = [
        HelpBlock(group.title, tuple((" ".join(key.keys), key.help) for key in group.keys))
        for group in groups
    ]
    return [
        *keys,
        HelpBlock("The phases of a step", PHASES, "strong"),
        HelpBlock("What is measured", QUANTITIES, "strong"),
        HelpBlock("Measured less often to stay within the budget", cadence_entries(info), "strong"),
        HelpBlock("Attention: Wq, Wk, Wv of every layer", ATTENTION, "strong"),
        HelpBlock("Signs", sign_entries(glyphs), "strong"),
    ]


THIS_SCREEN = "This screen"


def in_language(block: HelpBlock, language: str) -> HelpBlock:
    """A block with its texts in another language, as far as they are translated."""
    texts = help_texts(language)
    if not texts:
        return block
    first, colon, rest = block.title.partition(": ")
    title = texts.get(block.title, block.title)
    if first == THIS_SCREEN:
        title = f"{texts.get(first, first)}{NO_BREAK}{colon}{texts.get(rest, rest)}"
    translates_names = block.style != KEY_STYLE
    entries = tuple(
        (texts.get(name, name) if translates_names else name, texts.get(text, text))
        for name, text in block.entries
    )
    return HelpBlock(title, entries, block.style)


def lesson_block(lessons: Sequence[str], language: str) -> HelpBlock:
    """The pages about the screen that the help was opened from; key `l` opens the first."""
    known = titles(language)
    entries = [("l" if not number else "", known[name]) for number, name in enumerate(lessons)]
    return HelpBlock("Learn about this", entries or [("l", "the list of pages")])


class HelpView(ScrollingLines):
    """Blocks in columns of about equal height."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._blocks: Sequence[HelpBlock] = ()
        self._layout: list[list[Span]] = []

    def show_blocks(self, blocks: Sequence[HelpBlock]) -> None:
        """Show `blocks` in place of the blocks before."""
        self._blocks = blocks
        self.lines_changed()

    def lines_changed(self, first: int = 0) -> None:
        """Lay the text out for the present width."""
        self._layout = self._laid_out(max(1, self.view_size.width))
        super().lines_changed(first)

    def line_count(self) -> int:
        """Rows of the longest column."""
        return len(self._layout)

    def line(self, index: int) -> Row:
        """One row through all columns."""
        return self.styled(self._layout[index])

    def _laid_out(self, width: int) -> list[list[Span]]:
        if not self._blocks:
            return []
        count = max(1, min(MAX_COLUMNS, (width + COLUMN_GAP) // (COLUMN_WIDTH + COLUMN_GAP)))
        column_width = (width - COLUMN_GAP * (count - 1)) // count
        columns = _columns([self._block_rows(block, column_width) for block in self._blocks], count)
        rows: list[list[Span]] = []
        for y in range(max(map(len, columns))):
            row: list[Span] = []
            for column in columns:
                spans = column[y] if y < len(column) else []
                used = sum(len(text) for text, _ in spans)
                row += [*spans, (" " * (column_width - used + COLUMN_GAP), "text")]
            rows.append(row)
        return rows

    def _block_rows(self, block: HelpBlock, width: int) -> list[list[Span]]:
        rule = self.glyphs.rule * max(0, width - len(block.title) - 1)
        rows: list[list[Span]] = [[(block.title, "title"), (f" {rule}", "rule")]]
        longest = max((len(name) for name, _ in block.entries), default=0)
        left = min(longest + 2, MAX_NAME_WIDTH)
        for name, text in block.entries:
            for number, part in enumerate(wrap(text, max(MIN_TEXT_WIDTH, width - left))):
                head = name if number == 0 else ""
                rows.append([(f"{head:<{left}}", block.style), (part, "text")])
        return [*rows, []]


def _columns(blocks: Sequence[list[list[Span]]], count: int) -> list[list[list[Span]]]:
    """The rows of blocks in `count` columns of about equal height; no block is split."""
    target = sum(map(len, blocks)) / count
    columns: list[list[list[Span]]] = [[]]
    total = 0
    for rows in blocks:
        full = total + len(rows) / 2 > target * len(columns)
        if full and len(columns) < count and columns[-1]:
            columns.append([])
        columns[-1] += rows
        total += len(rows)
    return columns


class HelpScreen(DetailScreen):
    """The help. It is made from the bindings when it is shown, so it lists what the keys do."""

    CSS = """
    HelpScreen HelpView { height: 1fr; margin: 0 0 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/", id="help.filter",
                tooltip="Show only entries that contain these words; escape clears it"),
        Binding("l", "lesson", "Learn about this", id="help.lesson",
                tooltip="The page about the panel or the screen that the help was opened from"),
        Binding("escape", "back", "Back", id="help.back",
                tooltip="Clear the filter, or return to the previous screen"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._cadences: tuple[tuple[str, str], ...] = ()
        self._opened: tuple[str, tuple[str, ...], str] = ("", (), "")
        """(screen whose keys come first, its pages, language)"""

    def body(self) -> Iterable[Widget]:
        yield HelpView()
        yield SearchInput()

    def on_mount(self) -> None:
        self._show_matches("")
        self.query_one(HelpView).focus()

    def show_body(self, snapshot: Snapshot) -> None:
        """The cadences are all that the help shows of a run."""
        cadences, context = cadence_entries(snapshot.info), self.context
        opened = (context.help_for, context.lessons, context.language)
        if (cadences, opened) != (self._cadences, self._opened):
            if opened != self._opened:
                self.query_one(HelpView).scroll_home(animate=False)
            self._cadences, self._opened = cadences, opened
            self._show_matches(self.query_one(SearchInput).value)

    def show_keys(self) -> None:
        """Show the keys in the language of the pages."""
        super().show_keys()
        keys = self.query_one(KeyLine)
        keys.labels |= key_labels(self.context.language)
        if self.context.snapshot.status.state == "paused":
            keys.labels["run.pause"] = words(self.context.language)["resume"]
        keys.update_rows()

    def _show_matches(self, text: str) -> None:
        context = self.context
        wanted = text.casefold().split()
        found = []
        groups = key_groups(self.app, context.help_for)
        blocks = help_blocks(groups, context.glyphs, context.snapshot.info)
        for each in [lesson_block(context.lessons, context.language), *blocks]:
            block = in_language(each, context.language)
            entries = tuple(
                entry
                for entry in block.entries
                if all(w in f"{block.title} {entry[0]} {entry[1]}".casefold() for w in wanted)
            )
            if entries:
                found.append(HelpBlock(block.title, entries, block.style))
        texts = words(context.language)
        nothing = HelpBlock(
            texts["help_nothing"], (("", texts["help_no_entry"].format(text=text)),)
        )
        self.query_one(HelpView).show_blocks(found or [nothing])

    def action_lesson(self) -> None:
        """Open the first of the pages that the help names; the list where it names none."""
        self.context.show_lesson(next(iter(self.context.lessons), ""))

    def action_filter(self) -> None:
        self.query_one(SearchInput).open()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as the text is typed."""
        self._show_matches(event.value)

    def on_search_input_closed(self) -> None:
        self.query_one(HelpView).focus()

    def action_back(self) -> None:
        """Clear the filter; without one, return to the screen that the help was opened from."""
        search = self.query_one(SearchInput)
        if search.value:
            search.value = ""
        else:
            self.context.action_go(self.context.help_for)
