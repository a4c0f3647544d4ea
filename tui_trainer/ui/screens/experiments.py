"""The dialog of the experiments: what if a setting were another, which learning rate, and the loss
along a direction, each as a chart. The run is restored afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from rich.segment import Segment
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.geometry import Size
from textual.widgets import Input, Static

from tui_trainer.client.api import Snapshot
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.protocol.formatting import cost_text, number
from tui_trainer.protocol.inspection import NOT_CAPTURED, Inspected
from tui_trainer.protocol.travel import (
    Curve,
    EstimateCost,
    Experiment,
    ExperimentCost,
    ExperimentResult,
    FindLearningRate,
    MeasureLandscape,
    ReadTimeline,
    Timeline,
    WhatIf,
)
from tui_trainer.ui.panels.runs import run_marker
from tui_trainer.ui.screens import app_context
from tui_trainer.ui.screens.dialogs import SnapshotDialog
from tui_trainer.ui.screens.inspection_requests import InspectionRequests
from tui_trainer.ui.widgets.axes import AXIS_WIDTH
from tui_trainer.ui.widgets.chart import Chart
from tui_trainer.ui.widgets.chart_layers import Layer, Line, Points
from tui_trainer.ui.widgets.lines import LineView, Row
from tui_trainer.ui.widgets.ordered_input import OrderedInput
from tui_trainer.ui.widgets.tabs import TabLine

KINDS = ("What if", "Learning rate", "Gradient", "Random", "Snapshots")
ABOUT = (
    "a change, such as lr=3e-4 clip=0.5: 50 steps with the present settings and 50 with these",
    "the lowest and the highest learning rate: the loss while it grows from one to the other",
    "how far to go against the gradient, in learning rates: the loss of one batch",
    "how far to go along a random direction, in norms of parameters: the loss of one batch",
    "the steps of two snapshots: the loss of one batch on the line through both",
)
DEFAULTS = ("", "1e-7 1", "1", "0.5", "")
KEYS = "enter: run, up, down: another experiment, escape: close"
RUNNING = "escape: end it"
WHAT_IF_STEPS = 50
ATTEMPTS = 5
MARKER_SPACING = 24
"""Dot columns between two markers of a curve."""
STYLES = ("loss", "accent")
SHORT_NAMES = {"learning rate": "lr", "gradient": "lr ×", "random": "‖w‖ ×", "snapshots": ""}
"""Short names of the quantities on the x axis. `snapshots` runs from 0, the first snapshot, to 1,
the second."""


class CurvesChart(LineView):
    """The curves of an experiment over its own quantity, with a legend of their last losses."""

    DEFAULT_CSS = "CurvesChart { height: 1fr; min-height: 6; }"

    def __init__(self) -> None:
        super().__init__()
        self.result: ExperimentResult | None = None
        self.chart = Chart()

    def set_result(self, result: ExperimentResult | None) -> None:
        """Show other curves, or none."""
        self.result, self.chart = result, Chart()
        self.display = result is not None
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """Legend, plot and axis."""
        result = self.result
        curves = [curve for curve in result.curves if curve.x] if result is not None else []
        if result is None or not curves:
            return []
        columns = 2 * self.chart.plot_width(size.width)
        layers: list[Layer] = []
        for place, curve in enumerate(curves):
            style = self.style(STYLES[place % len(STYLES)])
            longest = max(len(each.x) for each in curves)
            values = _resampled(curve, columns, longest)
            layers.append(Line(style, values))
            known = np.flatnonzero(np.isfinite(values))
            offset = place * MARKER_SPACING // 2
            at = known[(known - offset) % MARKER_SPACING == 0]
            layers.append(Points(style, at, values[at], run_marker(place, self.glyphs)))
        height = max(2, size.height - 1)
        rows = self.chart.rows(size.width, height, (0, 2), layers, self.palette, self.glyphs)
        return [
            self._legend(curves, size.width),
            *rows[:-1],
            self._axis(result, curves, size.width),
        ]

    def _legend(self, curves: Sequence[Curve], width: int) -> Row:
        row: Row = [Segment("Loss ", self.palette.title)]
        left = width - 5
        for place, curve in enumerate(curves):
            text = f" {run_marker(place, self.glyphs)} {curve.name} {number(curve.loss[-1], 0)} "
            text = text[: max(0, left)]
            row += self.styled([(text, STYLES[place % len(STYLES)])])
            left -= len(text)
        return [*row, Segment(self.glyphs.rule * max(0, left), self.palette.rule)]

    def _axis(self, result: ExperimentResult, curves: Sequence[Curve], width: int) -> Row:
        """`learning rate 1e-07      3.2e-04        1`"""
        x = max((curve.x for curve in curves), key=len)
        plot = self.chart.plot_width(width)
        labels = [f"{x[len(x) * part // 2 if part < 2 else -1]:.3g}" for part in range(3)]
        middle = max(0, plot // 2 - len(labels[0]) - len(labels[1]) // 2)
        line = labels[0] + " " * middle + labels[1]
        line += labels[2].rjust(max(1, plot - len(line)))
        short = SHORT_NAMES.get(result.x_name, result.x_name)
        name = short[: AXIS_WIDTH - 1].rjust(AXIS_WIDTH - 1) + " "
        return [Segment(name, self.palette.dim), Segment(line[:plot], self.palette.dim)]


def _resampled(
    curve: Curve, columns: int, longest: int
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """One loss for each dot column, (columns,), with the points of the curve equally spaced; nan
    beyond its end."""
    loss = np.array(curve.loss, np.float64)
    place = np.linspace(0, max(1, longest - 1), columns)
    values = np.interp(place, np.arange(len(loss)), loss, right=np.nan)
    return values.astype(np.float32)


class ExperimentsDialog(SnapshotDialog):
    """Makes an experiment from the current step of the run, and shows its curves."""

    CSS = """
    ExperimentsDialog .dialog {
        width: 120; max-width: 96%; height: auto; max-height: 96%; background: $background;
    }
    ExperimentsDialog CurvesChart { height: 16; margin-top: 1; }
    ExperimentsDialog.-large CurvesChart { height: 26; }
    ExperimentsDialog.-small CurvesChart { height: 10; }
    ExperimentsDialog .about { color: $text-muted; height: auto; }
    ExperimentsDialog .keys { color: $text-muted; margin-top: 1; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", id="experiments.close",
                tooltip="End the experiment, or close the dialog"),
        Binding("down", "kind(1)", "Next", show=False, id="experiments.next",
                tooltip="The next kind of experiment"),
        Binding("up", "kind(-1)", "Previous", show=False, id="experiments.previous",
                tooltip="The previous kind of experiment"),
    ]  # fmt: skip

    def __init__(self, changes: str = "") -> None:
        """`changes`: settings as typed, for a what-if that is sent when the screen opens."""
        super().__init__()
        self._texts = [changes, *DEFAULTS[1:]]
        self._kind = 0
        self._at_once = bool(changes)
        self.requests = InspectionRequests(self)
        self._asked: Experiment | None = None
        """The experiment that is being estimated or made."""
        self._at_work = False
        self._attempts = 0
        """Attempts left while a running script has not kept the batch of its step yet."""
        self._confirmed: Experiment | None = None
        """A costly experiment, which the next enter starts."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Experiment: the run is restored afterwards", markup=False)
            yield TabLine(KINDS)
            yield OrderedInput(self._texts[0], compact=True, select_on_focus=False)
            yield Static("", classes="error", markup=False)
            yield Static(ABOUT[0], classes="about", markup=False)
            yield CurvesChart()
            yield Static(KEYS, classes="keys", markup=False)

    def on_mount(self) -> None:
        self.query_one(CurvesChart).set_result(None)
        self.query_one(Input).focus()
        if self._at_once:
            self.call_after_refresh(self._begin)
        self.requests.send(ReadTimeline(), self._suggest_snapshots)

    def on_resize(self) -> None:
        self.set_class(self.size.height < 30, "-small")
        self.set_class(self.size.height >= 44, "-large")

    def show(self, snapshot: Snapshot) -> None:
        """Do nothing: the dialog shows nothing of the snapshot."""

    def _suggest_snapshots(self, answer: Inspected) -> None:
        if not isinstance(answer.result, Timeline):
            return
        places = answer.result.places
        steps = [place.step for place in places if place.kind == "snapshot"]
        if len(steps) > 1 and not self._texts[4]:
            self._texts[4] = f"{steps[0]} {steps[-1]}"

    # ------------------------------------------------------------ choosing

    def action_kind(self, by: int) -> None:
        """Choose another kind of experiment."""
        self._choose((self._kind + by) % len(KINDS))

    def on_tab_line_chosen(self, message: TabLine.Chosen) -> None:
        self._choose(message.number)

    def _choose(self, kind: int) -> None:
        if self._at_work:
            return
        entry = self.query_one(Input)
        self._texts[self._kind] = entry.value
        self._kind = kind
        entry.value = self._texts[kind]
        self.query_one(TabLine).choose(kind)
        self.query_one(CurvesChart).set_result(None)
        self._say(ABOUT[kind])

    def on_input_changed(self) -> None:
        self.query_one(".error", Static).update("")
        self._confirmed = None

    def on_input_submitted(self) -> None:
        self._begin()

    # ------------------------------------------------------------ running

    def _begin(self) -> None:
        """Ask the run what the experiment costs, and then make it."""
        if self._at_work:
            return
        try:
            asked = _experiment(self._kind, self.query_one(Input).value)
        except ConfigurationError as error:
            hint = f"\n{error.hint}" if error.hint else ""
            self.query_one(".error", Static).update(f"{error.message}{hint}")
            return
        self._asked = asked
        if asked == self._confirmed:
            self._make(asked, "")
        else:
            self._say("asking the run what that takes …")
            self.requests.send(EstimateCost(asked), self._estimated)

    def _estimated(self, answer: Inspected) -> None:
        if self._asked is None:
            return
        cost = answer.result
        if not isinstance(cost, ExperimentCost):
            self._say(f"{answer.message}\n{answer.hint}".strip())
        elif cost.large:
            self._confirmed = self._asked
            self._say(f"{cost_text(cost)}: enter again starts it")
        else:
            self._make(self._asked, f"{cost_text(cost)} …")

    def _make(self, asked: Experiment, text: str) -> None:
        self._at_work, self._confirmed = True, None
        self._attempts = ATTEMPTS
        self._say(text or "at work …", RUNNING)
        self.requests.send(asked, self._answered, self._interrupted)

    def _interrupted(self) -> None:
        self._at_work = False
        self._say("interrupted by another request; the run is unchanged, and paused")

    def _answered(self, answer: Inspected) -> None:
        if not self._at_work:
            return
        running = app_context(self).snapshot.status.state == "running"
        if answer.message == NOT_CAPTURED and running and self._attempts and self._asked:
            self._attempts -= 1
            self.requests.send(self._asked, self._answered, self._interrupted)
            return
        self._at_work = False
        if not isinstance(answer.result, ExperimentResult):
            self._say(f"{answer.message}\n{answer.hint}".strip())
            return
        self.query_one(CurvesChart).set_result(answer.result)
        self._say(f"{answer.result.text}; the run is unchanged, and paused")

    def action_close(self) -> None:
        """Cancel the running experiment with a request that replaces it, or close the dialog."""
        if self._at_work:
            self._at_work = False
            self.requests.send(ReadTimeline(), lambda _: None)
            self._say("ended; the run is unchanged, and paused")
        else:
            self.dismiss(None)

    def _say(self, text: str, keys: str = KEYS) -> None:
        self.query_one(".about", Static).update(text)
        self.query_one(".keys", Static).update(keys)


def _experiment(kind: int, text: str) -> Experiment:
    """The experiment that `text` describes. Raises ConfigurationError."""
    words = text.split()
    if kind == 0:
        if not words:
            raise ConfigurationError("name a setting and its new value", "for example lr=3e-4")
        return WhatIf(parse_changes(words), WHAT_IF_STEPS)
    numbers = [_number(word) for word in words]
    wanted = (2, 1, 1, 2)[kind - 1]
    if len(numbers) != wanted:
        what = "one number" if wanted == 1 else "two numbers"
        raise ConfigurationError(f"{ABOUT[kind].partition(':')[0]}: {what}")
    if kind == 1:
        return FindLearningRate(numbers[0], numbers[1])
    if kind == 4:
        return MeasureLandscape("snapshots", first=int(numbers[0]), second=int(numbers[1]))
    return MeasureLandscape("gradient" if kind == 2 else "random", reach=numbers[0])


def _number(word: str) -> float:
    try:
        value = float(word.replace(",", ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not 0 <= value < 1e15:
        raise ConfigurationError(f"{word!r} is not a valid number")
    return value
