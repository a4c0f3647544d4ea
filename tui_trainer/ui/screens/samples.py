"""What the model produces: a GPT's continuations, a ViT's predictions and their confusion, and
the values that a script logs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, TypeVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.events import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.samples import (
    ConfusionView,
    GeneratedTexts,
    ImageGrid,
    LoggedTable,
    accuracy,
    most_confused,
    tiles_of,
)
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.chart import ChartCurve, SeriesChart
from tui_trainer.ui.widgets.table import VirtualTable

MIN_WIDTH_BESIDE = 100
"""Width from which images and confusion matrix are side by side."""

SampleT = TypeVar("SampleT", TextSample, ImageSample, ConfusionMatrix)


class SamplesScreen(DetailScreen):
    """Shows the kinds of samples that the run has; earlier samples can be browsed."""

    CSS = """
    SamplesScreen Horizontal { height: 1fr; }
    SamplesScreen Vertical { width: 1fr; padding: 0 1; }
    SamplesScreen #matrix { display: none; }
    SamplesScreen.-matrix #images { display: none; }
    SamplesScreen.-matrix #matrix { display: block; }
    SamplesScreen.-beside #images { display: block; }
    SamplesScreen.-beside #matrix { display: block; }
    SamplesScreen ScrollingLines { height: 1fr; }
    SamplesScreen .-none { display: none !important; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket", "older(1)", "Older", key_display="[", id="samples.older",
                tooltip="Show the previous sample"),
        Binding("right_square_bracket", "older(-1)", "Newer", key_display="]", id="samples.newer",
                tooltip="Show the next sample, up to the newest"),
        Binding("w", "wrong_first", "Wrong first", id="samples.wrong_first",
                tooltip="Sort wrong images first, by confidence; or keep the original order"),
        Binding("m", "matrix", "Matrix", id="samples.matrix",
                tooltip="Show images or confusion matrix, where only one fits"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._back = 0
        """How many samples the shown one is behind the newest."""
        self._wrong_first = False

    def body(self) -> Iterable[Widget]:
        yield Placeholder()
        yield Horizontal(
            Vertical(LoggedTable(), SeriesChart(id="logged-chart"), id="logged"),
            Vertical(GeneratedTexts(), id="texts"),
            Vertical(Caption(id="images-caption"), ImageGrid(), id="images"),
            Vertical(Caption(id="matrix-caption"), ConfusionView(), id="matrix"),
        )

    def show_body(self, snapshot: Snapshot) -> None:
        texts = _samples(snapshot, TextSample)
        images, matrices = _samples(snapshot, ImageSample), _samples(snapshot, ConfusionMatrix)
        logged = self.query_one(LoggedTable).show(snapshot)
        nothing = not (texts or images or matrices or logged)
        message = placeholder_message(snapshot, *_no_samples(snapshot)) if nothing else ("", "")
        self.query_one(Placeholder).set_message(*message)
        self.query_one(Horizontal).display = not nothing
        self._back = min(self._back, max(0, len(images) - 1, len(matrices) - 1))
        self._show_part("#logged", bool(logged))
        self._show_logged(snapshot)
        self._show_part("#texts", bool(texts))
        self._show_part("#images", bool(images))
        self._show_part("#matrix", bool(matrices))
        if not images:
            self.set_class(bool(matrices), "-matrix")
        self.query_one(GeneratedTexts).show_samples(texts)
        self._show_images(_pick(images, self._back), len(images))
        self._show_matrix(_pick(matrices, self._back))
        self.show_keys()

    def _show_logged(self, snapshot: Snapshot) -> None:
        """Draw the chart of the logged series under the cursor."""
        chosen = self.query_one(LoggedTable).selected
        if chosen is not None:
            total = snapshot.info.total_steps if snapshot.info else None
            curves = [ChartCurve("", "accent", chosen.column)]
            chart = self.query_one("#logged-chart", SeriesChart)
            chart.plot(chosen.name, chosen.series, curves, total_steps=total,
                       related=snapshot.related)  # fmt: skip

    def _show_part(self, selector: str, available: bool) -> None:
        self.query_one(selector).set_class(not available, "-none")

    def _show_images(self, sample: ImageSample | None, count: int) -> None:
        self.query_one(ImageGrid).show_sample(sample, self._wrong_first)
        if sample is None:
            return
        tiles = tiles_of(sample, False)
        correct = sum(not tile.wrong for tile in tiles)
        pieces = [(f"step {sample.step:,}", "title"), (f"{correct} of {len(tiles)} right", "text")]
        if self._back:
            pieces.append((f"{self._back} before the newest", "warning"))
        elif count > 1:
            pieces.append(("newest", "dim"))
        self.query_one("#images-caption", Caption).update(pieces)

    def _show_matrix(self, matrix: ConfusionMatrix | None) -> None:
        self.query_one(ConfusionView).show_matrix(matrix)
        if matrix is None:
            return
        share = accuracy(matrix)
        pieces = [(f"step {matrix.step:,}", "title")]
        if share is not None:
            pieces.append((f"accuracy {share:.1%}", "text"))
        arrow = self.context.glyphs.arrow
        mistakes = [
            f"{truth}{arrow}{guess} {count}" for count, truth, guess in most_confused(matrix)
        ]
        if mistakes:
            pieces.append(("most confused " + ", ".join(mistakes), "dim"))
        self.query_one("#matrix-caption", Caption).update(pieces)

    # ------------------------------------------------------------ actions

    def action_older(self, by: int) -> None:
        """Show an older (1) or newer (-1) sample."""
        self._back = max(0, self._back + by)
        self.show(self.context.snapshot)

    def action_wrong_first(self) -> None:
        self._wrong_first = not self._wrong_first
        self.show(self.context.snapshot)

    def action_matrix(self) -> None:
        """Show images instead of the matrix, or the other way round."""
        self.toggle_class("-matrix")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim or hide the keys for images where there are none."""
        snapshot = self.context.snapshot
        if action in ("older", "wrong_first"):
            return bool(_samples(snapshot, ImageSample)) or None
        if action == "matrix":
            images, matrices = _samples(snapshot, ImageSample), _samples(snapshot, ConfusionMatrix)
            return bool(images and matrices) and not self.has_class("-beside")
        return super().check_action(action, parameters)

    def on_virtual_table_highlighted(self, event: VirtualTable.Highlighted) -> None:
        self._show_logged(self.context.snapshot)

    def on_mount(self) -> None:
        self.query_one(LoggedTable).focus()

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.width >= MIN_WIDTH_BESIDE, "-beside")
        self.show_keys()


def _samples(snapshot: Snapshot, kind: type[SampleT]) -> tuple[SampleT, ...]:
    return tuple(artifact for artifact in snapshot.artifacts if isinstance(artifact, kind))


def _pick(samples: tuple[SampleT, ...], back: int) -> SampleT | None:
    return samples[max(0, len(samples) - 1 - back)] if samples else None


def _no_samples(snapshot: Snapshot) -> tuple[str, ...]:
    """(message, quantity) for `placeholder_message` in a run without samples."""
    if snapshot.info is not None and snapshot.info.is_script:
        text = "a script has no samples; tui_trainer.log(name=value) in it shows its values here"
        return (text, "samples")
    return ("no sample yet: the first comes with the next evaluation", "samples")
