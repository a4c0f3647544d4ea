"""Guided runs on the screen: what to look at now, and the key that applies the cure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.geometry import Size
from textual.widgets import Static

from tui_trainer.client.api import OnLaunch, Session, Snapshot
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.config.run_spec import runs_directory
from tui_trainer.learn.catalog import PAGE_OF_RULE
from tui_trainer.learn.demos import Demo, demo_of, demo_texts, find_demo
from tui_trainer.learn.page import words
from tui_trainer.learn.page_layout import Numbers, laid_out
from tui_trainer.protocol import actions
from tui_trainer.protocol.events import Notice, newest_findings
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.protocol.text import wrap
from tui_trainer.runs.launch import LaunchError, LaunchRequest
from tui_trainer.ui.panels.base import Panel
from tui_trainer.ui.screens import SCREENS, AppContext, ScreenMode, app_context
from tui_trainer.ui.screens.dialogs import SnapshotDialog
from tui_trainer.ui.widgets.lines import Row

Stage = Literal["ready", "watch", "paused", "back", "cured", "ended", "without"]
"""Where a guided run is: before its first step, on its way to the breakpoint, at or past it,
rewound and paused, cured, over; `without`: it trains without the fault from the start."""
MAX_ROWS = 4
CURED_PACE = 20.0
"""Lowest pace, in steps per second, after a change of settings has cured a run: fast enough not to
wait long for the end."""


def stage_of(snapshot: Snapshot, demo: Demo, cured: bool) -> Stage:
    """The stage of a guided run."""
    status = snapshot.status
    if status.ended:
        return "ended"
    if cured:
        return "without"
    kinds = {event.kind for event in snapshot.events if isinstance(event, Notice)}
    if "edit" in kinds:
        return "back" if demo.back and status.state == "paused" else "cured"
    if "breakpoint" in kinds or status.stopped_at is not None:
        return "paused"
    return "ready" if status.state == "paused" and not status.step else "watch"


def screen_named(mode: ScreenMode) -> str:
    """`Dashboard (1)`: a screen with its key."""
    entry = next(entry for entry in SCREENS if entry.mode == mode)
    return f"{entry.title} ({entry.key})"


def introduction(demo: Demo, language: str) -> str:
    """What a guided run shows, and how, as Markdown."""
    text, about = words(language), demo_texts(language)[demo.name]
    cure = text[f"demo_cure_{_kind(demo)}"].format(set=demo.live)
    points = (
        text["demo_screen"].format(screen=screen_named(demo.screen)),
        text["demo_breakpoint"].format(condition=f"`{demo.breakpoint}`"),
        text["demo_finding"].format(rule=f"`{demo.rule}`"),
        f"{text['demo_cure'].format(cure=about.cure)} {cure}",
        text["demo_curves"],
    )
    listed = "\n".join(f"- {point}" for point in points)
    return f"{_sentence(about.happens)}\n\n{listed}"


def guidance(
    snapshot: Snapshot, demo: Demo, cured: bool, language: str, finishing: bool = False
) -> str:
    """What to look at, and what to do, at this moment. `finishing`: the run continues to its end
    for the two curves."""
    text, about = words(language), demo_texts(language)[demo.name]
    if finishing:
        return text["demo_finishing"]
    stage = stage_of(snapshot, demo, cured)
    if stage == "paused":
        cure = text[f"demo_cure_{_kind(demo)}"].format(set=demo.live)
        return " ".join(
            (*_pause(snapshot, demo, text), text["demo_cure"].format(cure=about.cure), cure)
        )
    return text[f"demo_{stage}"].format(
        happens=_sentence(about.happens), condition=demo.breakpoint, cure=about.cure
    )


def _pause(snapshot: Snapshot, demo: Demo, text: dict[str, str]) -> Iterator[str]:
    """Where the run has paused, and whether a finding names the fault already."""
    stopped = snapshot.status.stopped_at
    if stopped is not None and demo.breakpoint.startswith("finding"):
        yield text["demo_paused_finding"].format(rule=demo.rule)
        return
    if stopped is not None:
        at = text["demo_paused"].format(condition=demo.breakpoint)
        yield f"{at} ({stopped.text})." if stopped.text else f"{at}."
    found = any(each.rule == demo.rule for each in newest_findings(snapshot.events))
    yield text["demo_named" if found else "demo_not_yet_named"].format(rule=demo.rule)


def _kind(demo: Demo) -> str:
    return "live" if demo.live else "back" if demo.back else "code"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


class GuideLine(Panel):
    """The guidance of a guided run, in as many rows as it needs; hidden in other runs."""

    DEFAULT_CSS = """
    GuideLine { height: 1; display: none; margin: 0 1; }
    GuideLine.-shown { display: block; }
    """

    @property
    def lessons(self) -> tuple[str, ...]:
        """The page about the fault."""
        found = demo_of(self.snapshot.info)
        page = PAGE_OF_RULE.get(found[0].rule) if found is not None else None
        return () if page is None else (page,)

    def show(self, snapshot: Snapshot) -> None:
        """Draw a snapshot, and appear where the run is a guided one."""
        shown = demo_of(snapshot.info) is not None and snapshot.link.state != "replay"
        self.set_class(shown, "-shown")
        self.snapshot = snapshot
        self._fit(self.app.size.width - 2)
        self.update_rows()

    def on_resize(self, event: events.Resize) -> None:
        """Take the rows that the text needs at this width."""
        super().on_resize(event)
        self._fit(event.size.width)

    def _fit(self, width: int) -> None:
        height = max(1, len(self._lines(width)))
        if self.styles.height is None or self.styles.height.value != height:
            self.styles.height = height

    def _lines(self, width: int) -> list[str]:
        found = demo_of(self.snapshot.info)
        if found is None or width <= 0:
            return []
        demo, cured = found
        context = app_context(self)
        text = guidance(self.snapshot, demo, cured, context.language, context.guided_run_finishes)
        return wrap(f"{demo.name}  {text}", width)[:MAX_ROWS]

    def rows(self, size: Size) -> Sequence[Row]:
        """The name of the run, and the text."""
        first, *others = self._lines(size.width) or [""]
        name, _, text = first.partition(" ")
        return [
            self.styled([(name, "accent bold"), (f" {text}", "text")]),
            *(self.styled([(line, "text")]) for line in others),
        ]


class Introduction(Static):
    """The introduction of a guided run, as many rows as it needs."""

    def __init__(self, markdown: str, language: str) -> None:
        super().__init__()
        self._markdown, self._language = markdown, language

    def on_resize(self, event: events.Resize) -> None:
        """Lay the text out for the present width."""
        lines = laid_out(self._markdown, Numbers(self._language), event.size.width)
        text = Text("\n").join(
            Text.assemble(*((piece, BOLD if style == "strong" else "") for piece, style in line))
            for line in lines
        )
        self.update(text)


BOLD = "bold"


class DemoDialog(SnapshotDialog):
    """Says what a guided run will show, while its process starts; enter starts the training."""

    CSS = """
    DemoDialog .dialog { width: 84; }
    DemoDialog #demo-title { margin-bottom: 1; }
    DemoDialog #demo-keys { margin-top: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,space", "start", "Start", id="demo.start", tooltip="Start the guided run"),
        Binding("escape", "dismiss(None)", "Stay paused", id="demo.stay",
                tooltip="Look around first; space starts the training"),
    ]  # fmt: skip

    def __init__(self, demo: Demo) -> None:
        super().__init__()
        self.demo = demo
        self._wanted = False
        """Whether enter was pressed before the run was ready."""

    def compose(self) -> ComposeResult:
        language = app_context(self).language
        title = demo_texts(language)[self.demo.name].title
        with Vertical(classes="dialog"):
            yield Static(
                f"[b]{title}[/b]  [dim]tui-trainer demo {self.demo.name}[/]", id="demo-title"
            )
            yield Introduction(introduction(self.demo, language), language)
            yield Static("", id="demo-keys")

    def show(self, snapshot: Snapshot) -> None:
        """Show whether the run is ready, and start it if enter was pressed."""
        text = words(app_context(self).language)
        ready = snapshot.status.state == "paused"
        waiting = snapshot.status.waiting_for or snapshot.status.state
        keys = text["demo_keys"]
        shown = f"[$accent]{keys}[/]" if ready else f"[dim]{keys}[/]  [$warning]{waiting}[/]"
        self.query_one("#demo-keys", Static).update(shown)
        if ready and self._wanted:
            app_context(self).command(actions.Resume())
        if snapshot.status.ended or (ready and self._wanted):
            self.dismiss()

    def action_start(self) -> None:
        """Start the training as soon as the run is ready."""
        self._wanted = True
        self.show(app_context(self).snapshot)


@dataclass
class GuidedRuns:
    """Starts guided runs, makes their cures, and ends them with the two curves side by side."""

    app: App[Any]
    finishing: bool = False
    """Whether the run continues to its end for the two curves."""

    @property
    def context(self) -> AppContext:
        """The app, as its screens know it."""
        return cast(AppContext, self.app)

    # ------------------------------------------------------------ starting

    def start(self, name: str, introduced: bool = False) -> None:
        """Start a guided run in this app, or in a new one once the user has left the open run.
        `introduced`: the user has read what the guided run shows."""
        demo = find_demo(name)
        if self.context.session is None and self.context.on_launch is not None:
            request = LaunchRequest(SCRIPT, demo=name, paused=not introduced)
            self.app.run_worker(
                partial(self._launch, self.context.on_launch, request, demo, introduced),
                thread=True, group="demo", exclusive=True,
            )  # fmt: skip
        else:
            self.context.leaving.leave_run_for(("demo", name, *self._options()))

    def _launch(
        self, launch: OnLaunch, request: LaunchRequest, demo: Demo, introduced: bool
    ) -> None:
        """Runs on a worker thread: a run process takes a moment to start."""
        try:
            session = launch(request)
        except (LaunchError, ConfigurationError) as error:
            message = f"{error.message}\n{error.hint}".strip()
            self.app.call_from_thread(self.app.notify, message, severity="error", markup=False)
        else:
            self.app.call_from_thread(self._launched, session, demo, introduced)

    def _launched(self, session: Session, demo: Demo, introduced: bool) -> None:
        self.context.attach(session)
        self.context.action_go(demo.screen)
        if not introduced:
            self.introduce(demo)

    def introduce(self, demo: Demo) -> None:
        """Say what the run in front will show; it is paused before its first step."""
        self.app.push_screen(DemoDialog(demo))
        self.app.call_after_refresh(self.context.redraw)

    def _options(self) -> list[str]:
        """Options of this command that the next one repeats."""
        options = ["--ascii"] * self.context.glyphs.ascii + ["--slow-link"] * self.context.link.slow
        info = self.context.snapshot.info
        if info is not None and info.directory:
            folder = Path(info.directory).parent
            if folder != runs_directory(None):
                options += ["--runs-dir", str(folder)]
        return options

    # ------------------------------------------------------------ the cure

    def offers_cure(self) -> bool | None:
        """Whether the cure key works now: None (shown, but disabled) while it does not yet, False
        (hidden) when no guided run is open."""
        snapshot = self.context.snapshot
        found = demo_of(snapshot.info)
        if found is None or snapshot.link.state == "replay":
            return False
        stage = stage_of(snapshot, *found)
        if stage == "ended":
            return True
        if self.finishing:
            return None
        return True if stage == "paused" and snapshot.link.state == "live" else None

    def label(self) -> str:
        """What the key of the cure does now; "" where no guided run is open."""
        if demo_of(self.context.snapshot.info) is None:
            return ""
        text = words(self.context.language)
        return text["demo_key_curves" if self.context.snapshot.status.ended else "demo_key_cure"]

    def cure(self) -> None:
        """Make the cure; after the end, show the two curves."""
        snapshot = self.context.snapshot
        found = demo_of(snapshot.info)
        if found is None:
            return
        demo, _ = found
        if snapshot.status.ended:
            self.show_curves()
        elif demo.live:
            self.context.command(actions.ChangeSettings(parse_changes(demo.live.split())))
            self.context.command(actions.Throttle(max(demo.pace, CURED_PACE)))
            self._resume()
        elif demo.back:
            self.context.command(actions.Back())
        else:
            self.finishing = True
            self.context.command(actions.Throttle(None))
            self._resume()
            self.context.redraw()

    def _resume(self) -> None:
        if self.context.snapshot.status.state == "paused":
            self.context.command(actions.Resume())

    def drawn(self) -> None:
        """A snapshot was drawn: show the curves of a run that continued to its end."""
        if self.finishing and self.context.snapshot.status.ended:
            self.finishing = False
            self.show_curves()

    def show_curves(self) -> None:
        """Leave the app, train the counterpart of this run, and compare both."""
        info = self.context.snapshot.info
        found = demo_of(info)
        if info is None or found is None:
            return
        if not Path(info.directory).is_dir():
            self.app.notify("the recording of this run is on another machine", severity="warning")
            return
        demo, _ = found
        self.context.leaving.leave_for(
            ("demo", demo.name, "--against", info.directory, *self._options())
        )
