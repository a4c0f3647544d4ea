"""What the model makes: a GPT's continuations, a ViT's images with its verdicts and confusions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, TypeVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.messages import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.samples import (
    ConfusionView,
    GeneratedTexts,
    ImageGrid,
    accuracy,
    most_confused,
    tiles_of,
)
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.text import Caption, Placeholder

BESIDE = 100
"""From this width on images and matrix stand beside each other."""

A = TypeVar("A", TextSample, ImageSample, ConfusionMatrix)


class SamplesScreen(DetailScreen):
    """Only what there is takes room; older samples are kept and can be looked at."""

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
                tooltip="Look at the sample before"),
        Binding("right_square_bracket", "older(-1)", "Newer", key_display="]", id="samples.newer",
                tooltip="Look at the sample after, up to the newest"),
        Binding("w", "wrong_first", "Wrong first", id="samples.wrong_first",
                tooltip="Wrong images first, the surest of them first; or all as they came"),
        Binding("m", "matrix", "Matrix", id="samples.matrix",
                tooltip="Images or the confusion matrix, where there is room for one"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._back = 0
        """How many samples before the newest are looked at."""
        self._wrong_first = False

    def body(self) -> Iterable[Widget]:
        """Texts, images and matrix; those without data are hidden."""
        yield Placeholder()
        yield Horizontal(
            Vertical(GeneratedTexts(), id="texts"),
            Vertical(Caption(id="images-caption"), ImageGrid(), id="images"),
            Vertical(Caption(id="matrix-caption"), ConfusionView(), id="matrix"),
        )

    def show_body(self, snapshot: Snapshot) -> None:
        """Show what there is."""
        texts = _of(snapshot, TextSample)
        images, matrices = _of(snapshot, ImageSample), _of(snapshot, ConfusionMatrix)
        nothing = not (texts or images or matrices)
        message = placeholder_message(snapshot, *_no_samples(snapshot)) if nothing else ("", "")
        self.query_one(Placeholder).set_message(*message)
        self.query_one(Horizontal).display = not nothing
        self._back = min(self._back, max(0, len(images) - 1, len(matrices) - 1))
        self._there("#texts", bool(texts))
        self._there("#images", bool(images))
        self._there("#matrix", bool(matrices))
        if not images:
            self.set_class(bool(matrices), "-matrix")
        self.query_one(GeneratedTexts).show_samples(texts)
        self._show_images(_pick(images, self._back), len(images))
        self._show_matrix(_pick(matrices, self._back))
        self.show_keys()

    def _there(self, part: str, there: bool) -> None:
        self.query_one(part).set_class(not there, "-none")

    def _show_images(self, sample: ImageSample | None, count: int) -> None:
        self.query_one(ImageGrid).show_sample(sample, self._wrong_first)
        if sample is None:
            return
        tiles = tiles_of(sample, False)
        right = sum(not tile.wrong for tile in tiles)
        pieces = [(f"step {sample.step:,}", "title"), (f"{right} of {len(tiles)} right", "text")]
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

    # ------------------------------------------------------------ keys

    def action_older(self, by: int) -> None:
        """Another sample."""
        self._back = max(0, self._back + by)
        self.show(self.context.snapshot)

    def action_wrong_first(self) -> None:
        """The other order."""
        self._wrong_first = not self._wrong_first
        self.show(self.context.snapshot)

    def action_matrix(self) -> None:
        """The other of the two."""
        self.toggle_class("-matrix")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys for images only where there are images."""
        snapshot = self.context.snapshot
        if action in ("older", "wrong_first"):
            return bool(_of(snapshot, ImageSample)) or None
        if action == "matrix":
            both = bool(_of(snapshot, ImageSample)) and bool(_of(snapshot, ConfusionMatrix))
            return both and not self.has_class("-beside")
        return super().check_action(action, parameters)

    def on_resize(self, event: events.Resize) -> None:
        """Both beside each other where there is room."""
        self.set_class(event.size.width >= BESIDE, "-beside")
        self.show_keys()


def _of(snapshot: Snapshot, kind: type[A]) -> tuple[A, ...]:
    return tuple(artifact for artifact in snapshot.artifacts if isinstance(artifact, kind))


def _pick(samples: tuple[A, ...], back: int) -> A | None:
    return samples[max(0, len(samples) - 1 - back)] if samples else None


def _no_samples(snapshot: Snapshot) -> tuple[str, ...]:
    if snapshot.info is not None and snapshot.info.task == "script":
        return ("a script's samples cannot be seen: what it prints is in the log", "samples")
    return ("no sample yet: the first comes with the next evaluation", "samples")
