"""Images with what the model made of them: half-block thumbnails, a line of verdict under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.cells import set_cell_size
from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.color import Color as Colour
from textual.strip import Strip

from tui_trainer.protocol.messages import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.protocol.text import wrap
from tui_trainer.ui.widgets.lines import Line, LinesView

# ---- confusion
# A confusion matrix: heat cells that carry their counts, so that it reads without colour too.


LONGEST_LABEL = 14
WIDEST_COLUMN = 7


def worst(matrix: ConfusionMatrix, most: int = 3) -> list[tuple[int, str, str]]:
    """(count, truth, prediction) of the commonest mistakes, the most frequent first."""
    found = [
        (count, matrix.labels[truth], matrix.labels[predicted])
        for truth, row in enumerate(matrix.counts)
        for predicted, count in enumerate(row)
        if truth != predicted and count
    ]
    return sorted(found, key=lambda each: -each[0])[:most]


def accuracy(matrix: ConfusionMatrix) -> float | None:
    """Share of the diagonal; None when nothing was counted."""
    total = sum(map(sum, matrix.counts))
    return sum(row[i] for i, row in enumerate(matrix.counts)) / total if total else None


class ConfusionView(LinesView):
    """Truth down, prediction across. The diagonal in one colour, mistakes in the colour of errors,
    each the stronger the larger its share of the row; zeros are dots."""

    fits = False

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.matrix: ConfusionMatrix | None = None

    def show_matrix(self, matrix: ConfusionMatrix | None) -> None:
        """Show `matrix`; nothing is drawn again when it is shown already."""
        if matrix != self.matrix:
            self.matrix = matrix
            self.changed()

    # ------------------------------------------------------------ layout

    def _label_width(self) -> int:
        assert self.matrix is not None
        return min(LONGEST_LABEL, max((len(label) for label in self.matrix.labels), default=0)) + 1

    def _column_width(self) -> int:
        assert self.matrix is not None
        most = max((count for row in self.matrix.counts for count in row), default=0)
        longest = max((len(label) for label in self.matrix.labels), default=1)
        return max(len(str(most)), min(longest, 4)) + 2 if most < 10**WIDEST_COLUMN else 9

    def count(self) -> int:
        """Two lines of heading, then a line a class."""
        return 2 + len(self.matrix.labels) if self.matrix else 0

    def line_width(self) -> int:
        """Label, columns and the recall at the end of the row."""
        if self.matrix is None:
            return 0
        return self._label_width() + self._column_width() * len(self.matrix.labels) + 8

    def line(self, index: int) -> Line | Strip:
        """The heading, or the row of a class."""
        assert self.matrix is not None
        label, column = self._label_width(), self._column_width()
        across = f"predicted {self.glyphs.arrow}"
        down = "truth" if label > 5 else ""
        if index == 0:
            return [(down.ljust(label) + across, "dim")]
        if index == 1:
            names = "".join(name[: column - 1].rjust(column) for name in self.matrix.labels)
            return [(" " * label, ""), (names, "strong"), ("  recall", "dim")]
        return self._row(index - 2, label, column)

    def _row(self, truth: int, label: int, column: int) -> Strip:
        assert self.matrix is not None
        counts, name = self.matrix.counts[truth], self.matrix.labels[truth]
        total = sum(counts)
        if len(name) >= label:
            name = name[: label - 2] + self.glyphs.ellipsis
        segments = [Segment(name.ljust(label), self.style("strong"))]
        for predicted, count in enumerate(counts):
            share = count / total if total else 0.0
            segments.append(self._cell(count, share, truth == predicted, column))
        recall = f"{counts[truth] / total:8.1%}" if total else "     n/a"
        return Strip([*segments, Segment(recall, self.style("dim"))])

    def _cell(self, count: int, share: float, right: bool, column: int) -> Segment:
        empty = self.glyphs.separator
        if not count:
            return Segment(empty.rjust(column - 1) + " ", self.style("dim"))
        style = self.style("good" if right else "error")
        text = str(count)
        if not right and self.glyphs.ascii:
            text = text + "!"
        return Segment(text.rjust(column - 1) + " ", _heat(style, self.style(""), share))


def _heat(colour: Style, base: Style, share: float) -> Style:
    """The background mixed towards `colour`: √share, since one mistake in fifty must be seen."""
    if colour.color is None or base.bgcolor is None:
        return colour
    strong = Colour.from_rich_color(colour.color)
    ground = Colour.from_rich_color(base.bgcolor)
    mixed = ground.blend(strong, 0.15 + 0.65 * min(1.0, share) ** 0.5)
    text = mixed.get_contrast_text(1.0)
    return base + Style(
        color=Color.from_rgb(text.r, text.g, text.b),
        bgcolor=Color.from_rgb(mixed.r, mixed.g, mixed.b),
        bold=True,
    )


# ---- pixels
# Images in the terminal: two pixels a cell with half blocks, or a ramp of characters in ASCII.
#
# `▀` has the upper pixel as its foreground and the lower as its background, so a cell, twice as
# high
# as wide, shows two square pixels.


Pixels = NDArray[np.uint8]

RAMP = " .:-=+*#%@"
"""From dark to bright, one pixel of two in height a cell."""

_styles: dict[bytes, Style] = {}
_STYLES_KEPT = 65_536


def fit(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """The largest (width, height) in pixels of an image drawn in `columns` × `rows` cells.

    Small images are enlarged by a whole factor, so that their pixels stay square and equal.
    """
    room_x, room_y = max(1, columns), max(1, rows) * 2
    scale = min(room_x / max(1, width), room_y / max(1, height))
    if scale >= 1:
        scale = float(int(scale))
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize(image: Pixels, width: int, height: int) -> Pixels:
    """`image` (h, w, 3) at (height, width, 3): repeated where larger, averaged where smaller."""
    rows, columns = image.shape[:2]
    if (height, width) == (rows, columns):
        return image
    if height >= rows and width >= columns:
        return image[_nearest(rows, height)][:, _nearest(columns, width)]
    averaged = _average(_average(image.astype(np.float32), height, 0), width, 1)
    return np.clip(np.rint(averaged), 0, 255).astype(np.uint8)


def half_blocks(
    image: Pixels, ascii_only: bool = False, plain: Style | None = None
) -> list[list[Segment]]:
    """Lines of segments for `image` (h, w, 3): ⌈h/2⌉ of them, each `w` cells wide. `plain` is the
    style of characters under `ascii_only`."""
    rows = image.shape[0]
    if rows % 2:
        image = np.concatenate([image, image[-1:]])
    upper, lower = image[0::2], image[1::2]
    if ascii_only:
        return [_ramp(line, plain) for line in _luminance(upper, lower)]
    pairs = np.concatenate([upper, lower], axis=2)  # (h/2, w, 6)
    return [_blocks(line) for line in pairs]


def _blocks(line: Pixels) -> list[Segment]:
    """One row of cells; equal neighbours share a segment, which is what makes flat images cheap."""
    segments: list[Segment] = []
    starts = np.flatnonzero(np.any(line[1:] != line[:-1], axis=1)) + 1
    edges = [0, *starts.tolist(), len(line)]
    for start, stop in pairwise(edges):
        segments.append(Segment("▀" * (stop - start), _style(line[start].tobytes())))
    return segments


def _style(pair: bytes) -> Style:
    found = _styles.get(pair)
    if found is None:
        if len(_styles) >= _STYLES_KEPT:
            _styles.clear()
        found = Style.from_color(Color.from_rgb(*pair[:3]), Color.from_rgb(*pair[3:]))
        _styles[pair] = found
    return found


def _luminance(upper: Pixels, lower: Pixels) -> NDArray[np.float32]:
    mean = (upper.astype(np.float32) + lower) / 2
    weights = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    return np.asarray(mean @ weights, dtype=np.float32)


def _ramp(line: NDArray[np.float32], plain: Style | None) -> list[Segment]:
    places = np.clip(line / 256 * len(RAMP), 0, len(RAMP) - 1).astype(int)
    return [Segment("".join(RAMP[place] for place in places), plain)]


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    return (np.arange(new, dtype=np.int64) * old) // new


def _average(image: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    old = image.shape[axis]
    if size >= old:
        return np.take(image, _nearest(old, size), axis=axis)
    edges = (np.arange(size, dtype=np.int64) * old) // size
    counts = np.diff(np.append(edges, old)).astype(np.float32)
    shape = [1] * image.ndim
    shape[axis] = size
    return np.asarray(np.add.reduceat(image, edges, axis=axis) / counts.reshape(shape))


TILE_COLUMNS = 18
"""Narrowest tile: room for a verdict such as `✗ 3 is 8  62%`."""
LARGEST = 36
GAP = 2


@dataclass(frozen=True)
class Tile:
    """One image of a sample, by its index in it."""

    index: int
    prediction: str
    truth: str
    confidence: float

    @property
    def wrong(self) -> bool:
        """Whether the model took it for another class."""
        return self.prediction != self.truth


def tiles_of(sample: ImageSample, wrong_first: bool) -> list[Tile]:
    """The images in the order in which they are shown; the surest of the wrong ones first."""
    count = min(len(sample.predictions), len(sample.truths), len(sample.confidences))
    tiles = [
        Tile(i, sample.predictions[i], sample.truths[i], sample.confidences[i])
        for i in range(count)
    ]
    if wrong_first:
        tiles.sort(
            key=lambda tile: (not tile.wrong, -tile.confidence if tile.wrong else tile.index)
        )
    return tiles


def pixels_of(sample: ImageSample) -> Pixels:
    """uint8 (n, height, width, 3); empty when the bytes do not hold whole images."""
    size = sample.height * sample.width * 3
    count = len(sample.pixels) // size if size else 0
    flat = np.frombuffer(sample.pixels, dtype=np.uint8, count=count * size)
    return flat.reshape(count, sample.height, sample.width, 3)


class ImageGrid(LinesView):
    """As many images in a row as fit; wrong ones are marked by sign, reverse video and colour."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.sample: ImageSample | None = None
        self.wrong_first = True
        self._tiles: list[Tile] = []
        self._pixels: Pixels = np.zeros((0, 1, 1, 3), np.uint8)
        self._drawn: dict[int, list[list[Segment]]] = {}

    def show_sample(self, sample: ImageSample | None, wrong_first: bool) -> None:
        """Show `sample`; nothing is drawn again when it is shown already."""
        if (sample, wrong_first) == (self.sample, self.wrong_first):
            return
        self.sample, self.wrong_first = sample, wrong_first
        self._tiles = tiles_of(sample, wrong_first) if sample else []
        self._pixels = pixels_of(sample) if sample else self._pixels[:0]
        self.changed()

    def changed(self, first: int = 0) -> None:
        """As in the base; the thumbnails depend on the width."""
        self._drawn.clear()
        super().changed(first)

    # ------------------------------------------------------------ layout

    def _image_size(self) -> tuple[int, int]:
        """Pixels (width, height) of a thumbnail; a cell shows one beside and two above another.

        As large as lets all images be seen at once, within reason; the least is a tile's width.
        """
        assert self.sample is not None
        smallest = TILE_COLUMNS - GAP if self.sample.width <= TILE_COLUMNS else 28
        for columns in range(LARGEST, smallest, -4):
            width, height = fit(self.sample.width, self.sample.height, columns, self.height)
            across = (self.width + GAP) // max(TILE_COLUMNS, width + GAP)
            if across and -(-len(self._tiles) // across) * (-(-height // 2) + 2) - 1 <= self.height:
                return width, height
        room = max(8, min(smallest, self.width - GAP))
        return fit(self.sample.width, self.sample.height, room, max(3, self.height - 2))

    def _layout(self) -> tuple[int, int, int]:
        """(tiles in a row, cells of a tile, lines of a tile with its verdict and a gap)."""
        width, height = self._image_size()
        cells = max(TILE_COLUMNS, width + GAP)
        across = max(1, (self.width + GAP) // cells)
        return across, min(cells, self.width), -(-height // 2) + 2

    def count(self) -> int:
        """Lines of the whole grid."""
        if not self._tiles:
            return 0
        across, _, lines = self._layout()
        return -(-len(self._tiles) // across) * lines - 1

    def line(self, index: int) -> Strip:
        """One line through a row of thumbnails, or through their verdicts."""
        across, cells, lines = self._layout()
        row, inside = divmod(index, lines)
        segments: list[Segment] = []
        for tile in self._tiles[row * across : (row + 1) * across]:
            segments += self._piece(tile, inside, cells, lines)
        return Strip(segments)

    def _piece(self, tile: Tile, inside: int, cells: int, lines: int) -> list[Segment]:
        plain = self.style("")
        if inside == lines - 1:
            return [Segment(" " * cells, plain)]
        if inside == lines - 2:
            return self._verdict(tile, cells)
        picture = self._picture(tile.index)
        line = picture[inside] if inside < len(picture) else []
        used = sum(segment.cell_length for segment in line)
        return [*line, Segment(" " * max(0, cells - used), plain)]

    def _picture(self, index: int) -> list[list[Segment]]:
        drawn = self._drawn.get(index)
        if drawn is None:
            if index >= len(self._pixels):
                return []
            width, height = self._image_size()
            image = resize(self._pixels[index], width, height)
            drawn = self._drawn[index] = half_blocks(image, self.glyphs.ascii, self.style(""))
        return drawn

    def _verdict(self, tile: Tile, cells: int) -> list[Segment]:
        sure = f"{tile.confidence:4.0%}" if 0 <= tile.confidence <= 1 else "   ?"
        right, wrong = ("+", "x") if self.glyphs.ascii else ("✓", "✗")
        said = (
            f"{wrong} {tile.prediction} is {tile.truth}" if tile.wrong else f"{right} {tile.truth}"
        )
        room = cells - GAP - len(sure) - 1
        if len(said) > room:
            said = said[: max(0, room - 1)] + self.glyphs.ellipsis
        name = "error reverse" if tile.wrong else "good"
        return [
            Segment(said, self.style(name)),
            Segment(set_cell_size("", max(0, room - len(said))) + " ", self.style("")),
            Segment(sure, self.style("dim")),
            Segment(" " * GAP, self.style("")),
        ]


# ---- continuations
# What a language model made of its prompt, newest first, the prompt marked.


COMFORTABLE = 100
"""Longer rows are hard to read, however wide the terminal."""


class Continuations(LinesView):
    """Samples under each other, each with the step at which it was drawn."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.samples: tuple[TextSample, ...] = ()
        self._rows: list[Line] = []

    def show_samples(self, samples: Sequence[TextSample]) -> None:
        """Show `samples` (oldest first, as they came); nothing is done when they are shown."""
        newest_first = tuple(reversed(samples))
        if newest_first != self.samples:
            self.samples = newest_first
            self.changed()

    def changed(self, first: int = 0) -> None:
        """Lay the texts out for the present width."""
        self._rows = self._lay_out(min(self.width, COMFORTABLE))
        super().changed(first)

    def count(self) -> int:
        """Rows of all samples."""
        return len(self._rows)

    def line(self, index: int) -> Line:
        """One row of a sample."""
        return self._rows[index]

    def _lay_out(self, width: int) -> list[Line]:
        rows: list[Line] = []
        for place, sample in enumerate(self.samples):
            title = f"step {sample.step:,}" + ("  newest" if place == 0 else "")
            name = "accent bold" if place == 0 else "title"
            rest = " " + self.glyphs.rule * max(0, width - len(title) - 1)
            rows.append([(title, name), (rest, "faint")])
            rows += self._text(sample, width)
            rows.append([])
        return rows[:-1]

    def _text(self, sample: TextSample, width: int) -> list[Line]:
        """Rows of prompt and continuation, some of which hold the end of the one and the start of
        the other. A sampled text may or may not repeat its prompt."""
        body = sample.text
        if sample.prompt and body.startswith(sample.prompt):
            body = body[len(sample.prompt) :]
        prompt = wrap(sample.prompt, width) if sample.prompt.strip() else []
        if not prompt:
            return [[(row, "")] for row in wrap((sample.prompt + body).strip("\n"), width)]
        *whole, last = prompt
        rows: list[Line] = [[(row, "accent bold underline")] for row in whole]
        joined = wrap(last + body, width)
        for row in joined:
            known = min(len(last), len(row))
            rows.append([(row[:known], "accent bold underline"), (row[known:], "")])
            last = last[known:].lstrip(" ") if known < len(last) else ""
        return rows
