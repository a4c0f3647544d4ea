"""Learn: short pages whose numbers are measured on a live model while they are read, and guided
runs."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import ClassVar

import numpy as np
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.timer import Timer

from tui_trainer.client.api import Snapshot
from tui_trainer.learn.catalog import PAGES
from tui_trainer.learn.demos import DEMOS, Demo, demo_texts, find_demo
from tui_trainer.learn.measurement_process import (
    MeasurementError,
    MeasurementProcess,
    PageMeasurement,
)
from tui_trainer.learn.page import (
    LANGUAGES,
    Page,
    PageState,
    command_to_try,
    key_labels,
    load_page,
    load_progress,
    save_progress,
    titles,
    words,
)
from tui_trainer.learn.page_layout import Numbers, StyledLine, changed_values, escaped, laid_out
from tui_trainer.ui.guide import introduction
from tui_trainer.ui.screens.base import MIN_SIZE, RunScreen
from tui_trainer.ui.widgets.caption import Caption
from tui_trainer.ui.widgets.key_line import KeyLine, TooSmall
from tui_trainer.ui.widgets.lines import Row, ScrollingLines
from tui_trainer.ui.widgets.table import Cell, TableColumn, VirtualTable

FIRST_SEED = 1
RELEASE_AFTER_S = 60.0
MAX_TEXT_WIDTH = 84
"""Line length, in cells, that makes texts easy to read."""
MIN_WIDTH_BESIDE = 140
"""Width from which the list is next to the page."""
MARKS: dict[PageState, tuple[str, str]] = {
    "new": ("·", "dim"),
    "read": ("○", "accent"),
    "answered": ("✓", "good"),
}
"""Sign and style of each state of a page."""


HEADING = ""
ENTRIES = (*PAGES, HEADING, *(demo.name for demo in DEMOS))
"""Pages and guided runs, by the row of the list, with a heading between them."""


class PageList(VirtualTable):
    """The pages and the guided runs, with the user's progress."""

    DEFAULT_CSS = "PageList { margin: 0 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "activate", "Open", id="learn.open", tooltip="Read the page"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, PageState] = {}
        self.titles: dict[str, str] = {}
        self.columns = (
            TableColumn("number", "", 2, self._number),
            TableColumn("state", "", 1, self._mark, left=True),
            TableColumn("title", "", 0, self._title, left=True),
        )
        self.set_order(np.arange(len(ENTRIES)))

    def _number(self, row: int) -> Cell:
        """The number of a page, or the sign of a guided run."""
        if row < len(PAGES):
            return Cell(str(row + 1), "dim")
        return Cell(self.glyphs.current if ENTRIES[row] else "", "accent")

    def _mark(self, row: int) -> Cell:
        if ENTRIES[row] == HEADING:
            return Cell("", "dim")
        return Cell(*MARKS[self.states.get(ENTRIES[row], "new")])

    def _title(self, row: int) -> Cell:
        return Cell(self.titles.get(ENTRIES[row], ""), "text" if ENTRIES[row] else "title")

    def move_cursor(self, index: int) -> None:
        """Move the cursor, but skip the heading."""
        if 0 <= index < len(ENTRIES) and ENTRIES[index] == HEADING:
            index += 1 if index > self.cursor else -1
        super().move_cursor(index)


class PageView(ScrollingLines):
    """The text of one page, with the numbers that have been measured."""

    DEFAULT_CSS = "PageView { margin: 1 0 0 1; }"

    def __init__(self) -> None:
        super().__init__()
        self._text = ""
        self._numbers = Numbers(LANGUAGES[0])
        self._laid_out: list[StyledLine] = []

    def show_text(self, text: str, numbers: Numbers) -> None:
        """Show a text in Markdown."""
        if (text, numbers) != (self._text, self._numbers):
            self._text, self._numbers = text, numbers
            self.lines_changed()

    def lines_changed(self, first: int = 0) -> None:
        """Lay the text out for the present width."""
        width = min(self.view_size.width - 1, MAX_TEXT_WIDTH)
        self._laid_out = laid_out(self._text, self._numbers, width)
        super().lines_changed(first)

    def line_count(self) -> int:
        return len(self._laid_out)

    def line(self, index: int) -> Row:
        return self.styled(self._laid_out[index])


class LearnScreen(RunScreen):
    """A list of pages and the page that is read: side by side where there is room."""

    CSS = """
    LearnScreen #learn-title { height: 1; padding: 0 1; }
    LearnScreen #learn-body { height: 1fr; }
    LearnScreen #reader { display: none; width: 1fr; }
    LearnScreen #page-title { margin: 1 1 0 1; }
    LearnScreen #page-title, LearnScreen #page-state { max-width: 86; }
    LearnScreen #page-state { margin: 0 1; }
    LearnScreen.-reading PageList { display: none; }
    LearnScreen.-reading #reader { display: block; }
    LearnScreen.-beside PageList { display: block; width: 52; }
    LearnScreen.-beside #reader { display: block; }
    LearnScreen.-too-small #learn-title, LearnScreen.-too-small #learn-body { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("a", "answer", "Answer", id="learn.answer",
                tooltip="Show or hide the answer to the question of the page"),
        Binding("enter", "enter", "Answer or start", id="learn.enter", show=False,
                tooltip="Show the answer of the page, or start its guided run"),
        Binding("t", "try", "Try it", id="learn.try",
                tooltip="Run the command that the page proposes"),
        Binding("s", "start", "Start", id="learn.start",
                tooltip="Start the guided run that the page is about"),
        Binding("r", "again", "Other seed", id="learn.again",
                tooltip="Measure again with another seed: what stays is a law"),
        Binding("n,right", "turn(1)", "Next", id="learn.next", tooltip="The next page"),
        Binding("N,left", "turn(-1)", "Previous", id="learn.previous", show=False,
                tooltip="The previous page"),
        Binding("l", "language", "English/français", id="learn.language",
                tooltip="Read the pages in the other language; it is remembered"),
        Binding("escape", "back", "Back", id="learn.back",
                tooltip="To the list of pages, or to the previous screen"),
    ]  # fmt: skip

    class Measured(Message):
        """The values of a page, or why it has none."""

        def __init__(self, page: str, result: PageMeasurement | MeasurementError) -> None:
            super().__init__()
            self.page = page
            self.result = result

    def __init__(self) -> None:
        super().__init__()
        self.measurements = MeasurementProcess()
        self._progress = load_progress()
        self._page: Page | None = None
        self._demo: Demo | None = None
        """The guided run that is shown in place of a page."""
        self._revealed = False
        self._opened_from_help = False
        self._measured: dict[str, list[PageMeasurement]] = {}
        """The newest two measurements of each page, oldest first."""
        self._failure: dict[str, MeasurementError] = {}
        """The error of each page whose measurement failed."""
        self._measurement: tuple[str, int] | None = None
        """(page, seed) of the measurement in progress."""
        self._wanted: tuple[str, int] | None = None
        """(page, seed) of the measurement to run next."""
        self._release_timer: Timer | None = None

    # ------------------------------------------------------------ layout

    def compose(self) -> ComposeResult:
        yield TooSmall(*MIN_SIZE)
        yield Caption(id="learn-title")
        with Horizontal(id="learn-body"):
            yield PageList()
            with Vertical(id="reader"):
                yield Caption(id="page-title")
                yield Caption(id="page-state")
                yield PageView()
        yield KeyLine()

    def on_mount(self) -> None:
        self.query_one(PageList).focus()
        self._show_all()
        self._open_wanted()

    def on_screen_resume(self, event: events.ScreenResume) -> None:
        """Keep the child process, or start it again."""
        if self._release_timer is not None:
            self._release_timer.stop()
            self._release_timer = None
        self.run_worker(self.measurements.prepare, thread=True, group="measurement")

    def on_screen_suspend(self) -> None:
        """End the child process a while after the screen was left: it holds 300 MB."""
        self._release_timer = self.set_timer(RELEASE_AFTER_S, self.measurements.release)

    def on_unmount(self) -> None:
        """End the child process."""
        self.measurements.close()

    def on_resize(self, event: events.Resize) -> None:
        """Show list and page side by side where there is room."""
        width, height = event.size
        self.set_class(width < MIN_SIZE[0] or height < MIN_SIZE[1], "-too-small")
        self.set_class(self._beside, "-beside")
        if self._beside and self._page is None and self._demo is None:
            self._preview(self.query_one(PageList).cursor)

    @property
    def _beside(self) -> bool:
        return self.app.size.width >= MIN_WIDTH_BESIDE

    @property
    def _reading(self) -> bool:
        """Whether the keys act on the page and not on the list."""
        return self.has_class("-reading")

    def on_descendant_focus(self) -> None:
        """Show the keys of the list or of the page."""
        self.call_after_refresh(self._show_keys)

    def show(self, snapshot: Snapshot) -> None:
        """Open a page that another screen has requested; nothing of the run is shown here."""
        self._open_wanted()

    def _open_wanted(self) -> None:
        if self.context.lesson and self.is_mounted:
            name, self.context.lesson = self.context.lesson, ""
            self._opened_from_help = bool(self.context.learn_from)
            self.open_page(name)

    # ------------------------------------------------------------ pages

    @property
    def measuring(self) -> bool:
        """Whether a measurement is in progress; `screenshots/make.py` waits for its end."""
        return self._measurement is not None

    @property
    def language(self) -> str:
        """The language of the pages."""
        return self._progress.shown_language

    def open_page(self, name: str) -> None:
        """Open a page, whose numbers are measured unless they are known, or the introduction of a
        guided run."""
        pages = self.query_one(PageList)
        pages.move_cursor(ENTRIES.index(name))
        self.add_class("-reading")
        if self._progress.mark(name):
            save_progress(self._progress)
        self._show_page(name)
        self.query_one(PageView).focus()

    def _preview(self, row: int) -> None:
        """Show a page next to the list, which keeps the focus."""
        if ENTRIES[row] != HEADING:
            self._show_page(ENTRIES[row])

    def _show_page(self, name: str) -> None:
        self._demo = None if name in PAGES else find_demo(name)
        self._page = load_page(name, self.language) if name in PAGES else None
        self._revealed = False
        self.query_one(PageView).scroll_home(animate=False)
        if self._page is not None and name not in self._measured:
            self._measure(name, FIRST_SEED)
        self._show_all()

    def on_virtual_table_highlighted(self, message: VirtualTable.Highlighted) -> None:
        """Show the page under the cursor where there is room next to the list."""
        message.stop()
        if self._beside and not self._reading:
            self._preview(message.row)

    def on_virtual_table_activated(self, message: VirtualTable.Activated) -> None:
        """Open the page under the cursor."""
        message.stop()
        self._opened_from_help = False
        if ENTRIES[message.row] != HEADING:
            self.open_page(ENTRIES[message.row])

    # ------------------------------------------------------------ drawing

    def _show_all(self) -> None:
        text = words(self.language)
        pages = self.query_one(PageList)
        demos = {name: about.title for name, about in demo_texts(self.language).items()}
        pages.titles = titles(self.language) | demos | {HEADING: text["demos"]}
        pages.states = {name: self._progress.state(name) for name in ENTRIES}
        pages.update_rows()
        answered = sum(pages.states[name] == "answered" for name in PAGES)
        progress = text["pages"].format(answered=answered, count=len(PAGES))
        self.query_one("#learn-title", Caption).update(
            [(text["learn"], "title"), (progress, "dim")],
            text["choose"] if not self._reading else "",
            right_is_optional=True,
        )
        self._show_text()
        self.refresh_bindings()
        self._show_keys()

    def _show_keys(self) -> None:
        """The keys, in the language of the pages."""
        keys = self.query_one(KeyLine)
        keys.labels = key_labels(self.language)
        keys.update_rows()

    def _show_text(self) -> None:
        if self._demo is not None:
            self._show_demo(self._demo)
            return
        page = self._page
        if page is None:
            return
        text, glyphs = words(self.language), self.context.glyphs
        number = f"{PAGES.index(page.name) + 1}/{len(PAGES)}"
        self.query_one("#page-title", Caption).update([(number, "dim"), (page.title, "title")])
        known = self._measured.get(page.name, [])
        numbers = Numbers(
            self.language,
            known[-1].values if known else None,
            known[-2].values if len(known) > 1 else None,
            glyphs.missing if page.name in self._failure else glyphs.ellipsis,
        )
        state, style, hint = self._page_state(page, numbers)
        self.query_one("#page-state", Caption).update(
            [(state, style)], hint, right_is_optional=True
        )
        failure = self._failure.get(page.name)
        shown = f"{escaped(failure.message)}\n\n{escaped(failure.hint)}\n\n" if failure else ""
        shown += page.text + "\n\n"
        shown += page.answer if self._revealed else f"*{text['press_answer']}*"
        self.query_one(PageView).show_text(shown, numbers)

    def _show_demo(self, demo: Demo) -> None:
        """Show the introduction of a guided run, which enter starts."""
        text, about = words(self.language), demo_texts(self.language)[demo.name]
        self.query_one("#page-title", Caption).update(
            [(self.context.glyphs.current, "accent"), (about.title, "title")]
        )
        self.query_one("#page-state", Caption).update(
            [(text["demo_start"], "accent")], f"tui-trainer demo {demo.name}",
            right_is_optional=True,
        )  # fmt: skip
        shown = introduction(demo, self.language)
        self.query_one(PageView).show_text(shown, Numbers(self.language, {}))

    def _page_state(self, page: Page, numbers: Numbers) -> tuple[str, str, str]:
        """(state of the numbers of a page, style, hint)"""
        name, text = page.name, words(self.language)
        if self._measurement is not None and self._measurement[0] == name:
            return text["measuring"], "warning", ""
        if name in self._failure:
            return text["failed"], "error", ""
        known = self._measured.get(name, [])
        if not known:
            return text["measuring"], "warning", ""
        newest = known[-1]
        if len(known) == 1:
            line = text["measured"].format(
                seed=newest.seed, milliseconds=round(newest.milliseconds)
            )
            return f"{line}, PyTorch {newest.torch}", "dim", text["press_again"]
        changed = len(changed_values(page.text + page.answer, numbers))
        line = text["compared"].format(
            seed=newest.seed, same=len(newest.values) - changed, changed=changed
        )
        return line, "dim", text["legend"].format(before=known[-2].seed)

    # ------------------------------------------------------------ measuring

    def _measure(self, name: str, seed: int) -> None:
        """Run a measurement once the one in progress has ended."""
        self._failure.pop(name, None)
        if self._measurement is not None:
            self._wanted = name, seed
            return
        self._measurement = name, seed
        self.run_worker(partial(self._run, name, seed), thread=True, group="measurement")

    def _run(self, name: str, seed: int) -> None:
        """Called on a thread: a child process measures."""
        try:
            result: PageMeasurement | MeasurementError = self.measurements.measure(name, seed)
        except MeasurementError as error:
            result = error
        with contextlib.suppress(RuntimeError):  # the app has left
            self.post_message(self.Measured(name, result))

    def on_learn_screen_measured(self, message: LearnScreen.Measured) -> None:
        """Show the values, and measure the page that was requested meanwhile."""
        name, result = message.page, message.result
        self._measurement = None
        if isinstance(result, PageMeasurement):
            self._measured[name] = [*self._measured.get(name, []), result][-2:]
        else:
            self._failure[name] = result
        wanted, self._wanted = self._wanted, None
        if wanted is not None and wanted != (name, getattr(result, "seed", None)):
            self._measure(*wanted)
        self._show_all()

    # ------------------------------------------------------------ actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer the keys of a page, or of a guided run, while one is shown."""
        if action == "turn":
            return self._reading
        if action in ("again", "answer"):
            return self._page is not None and (self._reading or self._beside)
        if action == "start":
            return self._demo is not None and (self._reading or self._beside)
        if action == "try":
            return self._page is not None and self._reading and bool(command_to_try(self._page))
        if action == "enter":
            return self._reading
        return True

    def action_enter(self) -> None:
        """Show the answer of the page, or start the guided run."""
        if self._demo is not None:
            self.action_start()
        else:
            self.action_answer()

    def action_try(self) -> None:
        """Leave the app to run the command that the page proposes, and return to the page."""
        if self._page is not None and command_to_try(self._page):
            self.context.leaving.leave_run_for(("learn", self._page.name, "--try"))

    def action_start(self) -> None:
        """Start the guided run on the screen."""
        if self._demo is not None:
            self.context.start_demo(self._demo.name, introduced=True)

    def action_answer(self) -> None:
        """Show or hide the answer."""
        if self._page is None:
            return
        self._revealed = not self._revealed
        if self._revealed and self._progress.mark(self._page.name, answered=True):
            save_progress(self._progress)
        self._show_all()
        if self._revealed:
            self.call_after_refresh(self.query_one(PageView).scroll_end, animate=False)

    def action_again(self) -> None:
        """Run the measurement of the page with the next seed."""
        if self._page is not None and self._measurement is None:
            known = self._measured.get(self._page.name, [])
            self._measure(self._page.name, known[-1].seed + 1 if known else FIRST_SEED)
            self._show_all()

    def action_turn(self, by: int) -> None:
        """Open the next or the previous page."""
        shown = self._demo or self._page
        if shown is not None:
            known = [name for name in ENTRIES if name != HEADING]
            self.open_page(known[(known.index(shown.name) + by) % len(known)])

    def action_language(self) -> None:
        """Show the pages in the other language."""
        others = [language for language in LANGUAGES if language != self.language]
        self._progress.language = others[0]
        save_progress(self._progress)
        self.context.language = self.language
        if self._page is not None:
            self._page = load_page(self._page.name, self.language)
        self._show_all()

    def action_back(self) -> None:
        """Return to the list; from there, or from a page that the help opened, to the screen where
        this one was opened."""
        if self._reading:
            self.remove_class("-reading")
            self.query_one(PageList).focus()
            self._show_all()
            if not self._opened_from_help:
                return
        self._opened_from_help = False
        origin = self.context.learn_from
        if not origin:
            origin = "start" if self.app.check_action("go", ("start",)) else "dashboard"
        self.context.action_go(origin)
