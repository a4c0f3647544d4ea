"""The dialog of the timeline, which lists snapshots, checkpoints and edits, and goes to any step.
Its key is one of `CONTROL_BINDINGS` in `base.py`."""

from __future__ import annotations

import math
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from tui_trainer.client.api import Snapshot
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import parse_size
from tui_trainer.protocol.actions import Back, KeepSnapshots, Step
from tui_trainer.protocol.formatting import bytes_, counted, rough_duration
from tui_trainer.protocol.inspection import Inspected
from tui_trainer.protocol.travel import LONG_S, ReadTimeline, Timeline
from tui_trainer.ui.screens import app_context
from tui_trainer.ui.screens.dialogs import SnapshotDialog
from tui_trainer.ui.screens.inspection_requests import InspectionRequests
from tui_trainer.ui.widgets.ordered_input import OrderedInput

NEWEST = "newest step"
KEYS = "left, right: one step, enter: go there, tab: step or memory, escape: close"
NOTHING = "nothing is kept yet: enter an amount of memory for snapshots, such as 512MB"
SCRIPT = (
    "a script gets the state of a snapshot, and what follows is a branch; its own data order and "
    "counters continue"
)


class TimelineList(OptionList):
    """A line for each step with a snapshot, a checkpoint or an edit, for the current step and for
    the newest; the newest first."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Step back", id="timeline.left", tooltip="One step back"),
        Binding("right", "move(1)", "Step", id="timeline.right", tooltip="One step forward"),
    ]

    def __init__(self) -> None:
        super().__init__(compact=True, markup=False)
        self.steps: list[int] = []

    def set_timeline(self, timeline: Timeline) -> None:
        """Show `timeline`, with the cursor on the current step of the run."""
        by_step: dict[int, list[str]] = {timeline.now: [], timeline.newest: []}
        for place in timeline.places:
            by_step.setdefault(place.step, []).append(place.text or place.kind)
        self.steps = sorted(by_step, reverse=True)
        by_step[timeline.newest].append(NEWEST)
        now = app_context(self).glyphs.paused
        width = len(f"{self.steps[0]:,}")
        self.set_options(
            Option(
                Content.assemble(
                    (f"{step:>{width},} {now if step == timeline.now else ' '}  ", "$text-accent"),
                    ", ".join(dict.fromkeys(by_step[step])),
                )
            )
            for step in self.steps
        )
        self.highlighted = self.steps.index(timeline.now)

    def action_move(self, steps: int) -> None:
        """Go one step back or forward."""
        app_context(self).command(Back() if steps < 0 else Step(1))


class TimelineDialog(SnapshotDialog):
    """Shows the steps that the training can go back to, and goes back to one."""

    CSS = """
    TimelineDialog .dialog { width: 92; }
    TimelineDialog OptionList { max-height: 12; }
    TimelineDialog .keys { color: $text-muted; margin-top: 1; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close", id="timeline.close",
                tooltip="Close the timeline"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.requests = InspectionRequests(self)
        self._timeline: Timeline | None = None
        self._confirmed: int | None = None
        """A step that takes long to reach, to which the next enter goes."""
        self._seen: tuple[int, str, int | None] | None = None
        """(step, state, newest step) of the run when the timeline was last read."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Go to a step", markup=False)
            yield TimelineList()
            yield OrderedInput(
                placeholder="step, or memory for snapshots such as 512MB", compact=True
            )
            yield Static("", classes="error", markup=False)
            yield Static("", classes="about", markup=False)
            yield Static(KEYS, classes="keys", markup=False)

    def on_mount(self) -> None:
        self.show(app_context(self).snapshot)
        self.query_one(TimelineList).focus()

    def show(self, snapshot: Snapshot) -> None:
        """Read the timeline again when the run has moved."""
        status = snapshot.status
        now = (status.step, status.state, status.ahead)
        if now != self._seen:
            self._seen = now
            self._read()

    def _read(self) -> None:
        self.requests.send(ReadTimeline(), self._show_timeline)

    def _show_timeline(self, answer: Inspected) -> None:
        about = self.query_one(".about", Static)
        timeline = answer.result
        if not isinstance(timeline, Timeline):
            about.update(f"{answer.message}\n{answer.hint}".strip())
            return
        self._timeline = timeline
        self.query_one(TimelineList).set_timeline(timeline)
        self._say_facts()

    def _say_facts(self) -> None:
        """Show what is kept, and the cost of going to the step under the cursor."""
        timeline = self._timeline
        if timeline is None:
            return
        kept = sum(place.kind == "snapshot" for place in timeline.places)
        facts = []
        if timeline.budget:
            taken, budget = bytes_(timeline.bytes, 0), bytes_(timeline.budget, 0)
            facts.append(f"{counted(kept, 'snapshot')}, {taken} of {budget}")
        elif not timeline.places:
            facts.append(NOTHING)
        if timeline.snapshot_bytes:
            facts[-1:] = [f"{facts[-1] if facts else ''}, {bytes_(timeline.snapshot_bytes, 0)} each"
                          .removeprefix(", ")]  # fmt: skip
        facts += [SCRIPT] if not timeline.exact else []
        steps, cursor = self.query_one(TimelineList).steps, self.query_one(TimelineList).highlighted
        if timeline.exact and cursor is not None and cursor < len(steps):
            facts.append(self._way_to(timeline, steps[cursor]))
        self.query_one(".about", Static).update("\n".join(filter(None, facts)))

    @staticmethod
    def _way_to(timeline: Timeline, step: int) -> str:
        """`step 120: 20 steps from step 100 are repeated, about 3 s`; "" where the run is."""
        repeated = _repeated(timeline, step)
        if repeated is None or step == timeline.now:
            return ""
        if not repeated:
            return f"step {step:,} is restored, without repeating a step"
        seconds = _seconds(timeline, repeated)
        took = f", about {rough_duration(seconds)}" if seconds else ""
        return f"step {step:,}: {counted(repeated, 'step')} from step {step - repeated:,}{took}"

    def on_option_list_option_highlighted(self) -> None:
        self._say_facts()

    def _go(self, step: int) -> None:
        """Go to a step; one that takes long to reach needs a second enter."""
        timeline = self._timeline
        repeated = _repeated(timeline, step) if timeline is not None else None
        long = timeline is not None and (_seconds(timeline, repeated or 0) or 0) > LONG_S
        if long and self._confirmed != step:
            self._confirmed = step
            assert timeline is not None
            text = self._way_to(timeline, step)
            self.query_one(".error", Static).update(f"{text}: enter again goes there")
            return
        self._confirmed = None
        self.query_one(".error", Static).update("")
        app_context(self).command(Back(step, confirmed=long))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Go to the step under the cursor."""
        self._go(self.query_one(TimelineList).steps[event.option_index])

    def on_input_changed(self) -> None:
        self.query_one(".error", Static).update("")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go to the step, or keep snapshots in this much memory."""
        text = event.value.strip().replace(",", "")
        if not text:
            return
        if text.isdecimal() and len(text) <= 15:
            self._go(int(text))
            if self._confirmed is not None:
                return
        else:
            try:
                app_context(self).command(KeepSnapshots(parse_size(text)))
            except ConfigurationError as error:
                self.query_one(".error", Static).update(f"{error.message}\n{error.hint}")
                return
            self.set_timer(0.5, self._read)
        event.input.value = ""


def _repeated(timeline: Timeline, step: int) -> int | None:
    """Number of steps repeated on the way to `step`; None when no earlier state is kept."""
    kept = [p.step for p in timeline.places if p.kind != "edit" and p.step <= step]
    return step - max(kept) if kept else None


def _seconds(timeline: Timeline, repeated: int) -> int | None:
    return math.ceil(repeated * timeline.step_s) if timeline.step_s else None
