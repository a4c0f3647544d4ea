"""What the model produces: generated texts, images with their predictions, and the confusion
matrix; and the numbers that a script logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.color import Color as TextualColor

from tui_trainer.client.api import Snapshot
from tui_trainer.history.columns import LoggedSeries, logged_series
from tui_trainer.protocol import formatting
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.events import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.protocol.text import truncate, wrap
from tui_trainer.ui.widgets.lines import Row, ScrollingLines, Span
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable

# ---------------------------------------------------------------- the confusion matrix

MAX_LABEL_WIDTH = 14
MAX_COLUMN_LABEL_WIDTH = 4
MAX_COUNT_DIGITS = 7
RECALL_WIDTH = 8


def most_confused(matrix: ConfusionMatrix, count: int = 3) -> list[tuple[int, str, str]]:
    """(count, truth, prediction) of the most frequent mistakes."""
    mistakes = [
        (number, matrix.labels[truth], matrix.labels[prediction])
        for truth, row in enumerate(matrix.counts)
        for prediction, number in enumerate(row)
        if truth != prediction and number
    ]
    return sorted(mistakes, key=lambda mistake: -mistake[0])[:count]


def accuracy(matrix: ConfusionMatrix) -> float | None:
    """Share of the diagonal; None when nothing was counted."""
    total = sum(map(sum, matrix.counts))
    return sum(row[i] for i, row in enumerate(matrix.counts)) / total if total else None


class ConfusionView(ScrollingLines):
    """Truth down, prediction across. Cells are coloured by their share of the row, correct ones and
    mistakes differently; they show their counts, so the matrix can be read without colour."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.matrix: ConfusionMatrix | None = None
        self._label_width = 0
        self._column_width = 0

    def show_matrix(self, matrix: ConfusionMatrix | None) -> None:
        if matrix == self.matrix:
            return
        self.matrix = matrix
        if matrix is not None:
            longest = max((len(label) for label in matrix.labels), default=1)
            digits = len(str(max((count for row in matrix.counts for count in row), default=0)))
            self._label_width = min(MAX_LABEL_WIDTH, longest) + 1
            self._column_width = 2 + max(
                min(digits, MAX_COUNT_DIGITS), min(longest, MAX_COLUMN_LABEL_WIDTH)
            )
        self.lines_changed()

    def line_count(self) -> int:
        """Two lines of headings, then a line for each class."""
        return 2 + len(self.matrix.labels) if self.matrix else 0

    def line_width(self) -> int:
        """Label, columns, and the recall at the end of each row."""
        if self.matrix is None:
            return 0
        return self._label_width + self._column_width * len(self.matrix.labels) + RECALL_WIDTH

    def line(self, index: int) -> Row:
        """A heading, or the row of a class."""
        assert self.matrix is not None
        if index == 0:
            truth = "truth" if self._label_width > len("truth") else ""
            across = f"predicted {self.glyphs.arrow}"
            return self.styled([(truth.ljust(self._label_width) + across, "dim")])
        if index == 1:
            width = self._column_width
            names = "".join(label[: width - 1].rjust(width) for label in self.matrix.labels)
            spans = [(" " * self._label_width, "text"), (names, "strong"), ("  recall", "dim")]
            return self.styled(spans)
        return self._class_row(self.matrix, index - 2)

    def _class_row(self, matrix: ConfusionMatrix, truth: int) -> Row:
        counts = matrix.counts[truth]
        total = sum(counts)
        label = truncate(matrix.labels[truth], self._label_width - 1, self.glyphs.ellipsis)
        row = self.styled([(label.ljust(self._label_width), "strong")])
        for prediction, count in enumerate(counts):
            share = count / total if total else 0.0
            row.append(self._cell(count, share, truth == prediction))
        recall = f"{counts[truth] / total:8.1%}" if total else "     n/a"
        return [*row, Segment(recall, self.palette.dim)]

    def _cell(self, count: int, share: float, correct: bool) -> Segment:
        width = self._column_width - 1
        if not count:
            return Segment(f"{self.glyphs.separator:>{width}} ", self.palette.dim)
        text = str(count) if correct or not self.glyphs.ascii else f"{count}!"
        style = self.palette.good if correct else self.palette.error
        return Segment(f"{text:>{width}} ", _heat(style, self.palette.text, share))


def _heat(colour: Style, base: Style, share: float) -> Style:
    """The background blended towards `colour` by √share: one mistake in fifty must be visible."""
    if colour.color is None or base.bgcolor is None:
        return colour
    background = TextualColor.from_rich_color(base.bgcolor)
    full = TextualColor.from_rich_color(colour.color)
    blended = background.blend(full, 0.15 + 0.65 * min(1.0, share) ** 0.5)
    text = blended.get_contrast_text(1.0)
    return base + Style(
        color=Color.from_rgb(text.r, text.g, text.b),
        bgcolor=Color.from_rgb(blended.r, blended.g, blended.b),
        bold=True,
    )


# ---------------------------------------------------------------- pixels

Pixels = NDArray[np.uint8]

BRIGHTNESS = " .:-=+*#%@"
"""Characters from dark to bright, each for one pixel above another."""
LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
"""Rec. 709 weights of red, green and blue."""
MAX_CACHED_STYLES = 65_536

_pixel_styles: dict[bytes, Style] = {}


def fit_image(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """The largest (width, height) in pixels of an image that is drawn in `columns` × `rows` cells.

    Small images are enlarged by an integer factor, so that their pixels stay square and equal.
    """
    scale = min(max(1, columns) / max(1, width), 2 * max(1, rows) / max(1, height))
    if scale >= 1:
        scale = float(int(scale))
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize(image: Pixels, width: int, height: int) -> Pixels:
    """`image` (h, w, 3) at (height, width, 3): pixels are repeated or averaged."""
    rows, columns = image.shape[:2]
    if (height, width) == (rows, columns):
        return image
    if height >= rows and width >= columns:
        return image[_nearest(rows, height)][:, _nearest(columns, width)]
    averaged = _average(_average(image.astype(np.float32), height, 0), width, 1)
    return np.clip(np.rint(averaged), 0, 255).astype(np.uint8)


def half_blocks(image: Pixels, ascii: bool = False, ascii_style: Style | None = None) -> list[Row]:
    """Rows of cells for `image` (h, w, 3): ⌈h/2⌉ of them, `w` cells wide.

    A cell is about twice as high as wide: `▀` with the upper pixel as its foreground and the lower
    one as its background shows two square pixels. In ASCII, a character shows their brightness.
    """
    if image.shape[0] % 2:
        image = np.concatenate([image, image[-1:]])
    upper, lower = image[0::2], image[1::2]
    if ascii:
        brightness = (upper.astype(np.float32) + lower) / 2 @ LUMINANCE
        return [[Segment(_brightness_text(row), ascii_style)] for row in brightness]
    return [_block_row(row) for row in np.concatenate([upper, lower], axis=2)]


def _block_row(pairs: Pixels) -> Row:
    """One row of cells from pixel pairs (w, 6). Equal neighbours share a segment."""
    changes = np.flatnonzero(np.any(pairs[1:] != pairs[:-1], axis=1)) + 1
    edges = [0, *changes.tolist(), len(pairs)]
    return [
        Segment("▀" * (stop - start), _pixel_style(pairs[start].tobytes()))
        for start, stop in pairwise(edges)
    ]


def _pixel_style(pair: bytes) -> Style:
    style = _pixel_styles.get(pair)
    if style is None:
        if len(_pixel_styles) >= MAX_CACHED_STYLES:
            _pixel_styles.clear()
        style = Style.from_color(Color.from_rgb(*pair[:3]), Color.from_rgb(*pair[3:]))
        _pixel_styles[pair] = style
    return style


def _brightness_text(row: NDArray[np.float32]) -> str:
    levels = np.clip(row / 256 * len(BRIGHTNESS), 0, len(BRIGHTNESS) - 1).astype(int)
    return "".join(BRIGHTNESS[level] for level in levels)


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


# ---------------------------------------------------------------- images

MIN_TILE_WIDTH = 18
"""Room for a caption such as `✗ 3 is 8  62%`."""
MAX_THUMBNAIL_WIDTH = 36
SMALL_THUMBNAIL_WIDTH = 28
TILE_GAP = 2
CAPTION_LINES = 2
"""The caption and an empty line."""


@dataclass(frozen=True)
class Tile:
    """One image of a sample, by its index in the sample."""

    index: int
    prediction: str
    truth: str
    confidence: float

    @property
    def wrong(self) -> bool:
        """Whether the model predicted another class."""
        return self.prediction != self.truth


def tiles_of(sample: ImageSample, wrong_first: bool) -> list[Tile]:
    """The images in the order in which they are shown; of the wrong ones, the most confident
    first."""
    tiles = [
        Tile(index, *fields)
        for index, fields in enumerate(
            zip(sample.predictions, sample.truths, sample.confidences, strict=False)
        )
    ]
    if wrong_first:
        tiles.sort(key=lambda t: (not t.wrong, -t.confidence if t.wrong else t.index))
    return tiles


def pixels_of(sample: ImageSample) -> Pixels:
    """uint8 (n, height, width, 3); empty when the sample does not hold whole images."""
    size = sample.height * sample.width * 3
    count = len(sample.pixels) // size if size else 0
    flat = np.frombuffer(sample.pixels, dtype=np.uint8, count=count * size)
    return flat.reshape(count, sample.height, sample.width, 3)


class ImageGrid(ScrollingLines):
    """Images in rows, each with its prediction below. Wrong predictions differ in
    sign, reverse video and colour."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.sample: ImageSample | None = None
        self.wrong_first = True
        self._tiles: list[Tile] = []
        self._pixels: Pixels = np.zeros((0, 1, 1, 3), np.uint8)
        self._thumbnails: dict[int, list[Row]] = {}

    def show_sample(self, sample: ImageSample | None, wrong_first: bool) -> None:
        if (sample, wrong_first) == (self.sample, self.wrong_first):
            return
        self.sample, self.wrong_first = sample, wrong_first
        self._tiles = tiles_of(sample, wrong_first) if sample else []
        self._pixels = pixels_of(sample) if sample else self._pixels[:0]
        self.lines_changed()

    def lines_changed(self, first: int = 0) -> None:
        """Also discard the thumbnails, which depend on the width."""
        self._thumbnails.clear()
        super().lines_changed(first)

    def discard_drawn(self) -> None:
        """Also discard the thumbnails, which in ASCII have the colours of the theme."""
        super().discard_drawn()
        self._thumbnails.clear()

    def _thumbnail_size(self, sample: ImageSample) -> tuple[int, int]:
        """(width, height) in pixels: a cell shows one pixel across and two down.

        The largest size at which all images are in view at once, but no smaller than a tile.
        """
        width, height = self.view_size
        smallest = MIN_TILE_WIDTH - TILE_GAP
        if sample.width > MIN_TILE_WIDTH:
            smallest = SMALL_THUMBNAIL_WIDTH
        for columns in range(MAX_THUMBNAIL_WIDTH, smallest, -4):
            size = fit_image(sample.width, sample.height, columns, height)
            across = (width + TILE_GAP) // max(MIN_TILE_WIDTH, size[0] + TILE_GAP)
            lines = -(-size[1] // 2) + CAPTION_LINES
            if across and -(-len(self._tiles) // across) * lines - 1 <= height:
                return size
        columns = max(8, min(smallest, width - TILE_GAP))
        return fit_image(sample.width, sample.height, columns, max(3, height - CAPTION_LINES))

    def _layout(self, sample: ImageSample) -> tuple[int, int, int]:
        """(tiles in a row, cells of a tile, lines of a tile)"""
        width, height = self._thumbnail_size(sample)
        tile_width = max(MIN_TILE_WIDTH, width + TILE_GAP)
        across = max(1, (self.view_size.width + TILE_GAP) // tile_width)
        return across, min(tile_width, self.view_size.width), -(-height // 2) + CAPTION_LINES

    def line_count(self) -> int:
        """Lines of all tiles."""
        if self.sample is None or not self._tiles:
            return 0
        across, _, lines = self._layout(self.sample)
        return -(-len(self._tiles) // across) * lines - 1

    def line(self, index: int) -> Row:
        """One line through a row of thumbnails or captions."""
        assert self.sample is not None
        across, width, lines = self._layout(self.sample)
        tile_row, line = divmod(index, lines)
        row: Row = []
        for tile in self._tiles[tile_row * across : (tile_row + 1) * across]:
            if line == lines - 1:
                row += self.styled([(" " * width, "text")])
            elif line == lines - 2:
                row += self._caption(tile, width)
            else:
                row += self._thumbnail_row(self.sample, tile, line, width)
        return row

    def _thumbnail_row(self, sample: ImageSample, tile: Tile, line: int, width: int) -> Row:
        thumbnail = self._thumbnail(sample, tile.index)
        row = thumbnail[line] if line < len(thumbnail) else []
        used = sum(segment.cell_length for segment in row)
        return [*row, *self.styled([(" " * max(0, width - used), "text")])]

    def _thumbnail(self, sample: ImageSample, index: int) -> list[Row]:
        thumbnail = self._thumbnails.get(index)
        if thumbnail is None:
            if index >= len(self._pixels):
                return []
            image = resize(self._pixels[index], *self._thumbnail_size(sample))
            thumbnail = half_blocks(image, self.glyphs.ascii, self.palette.text)
            self._thumbnails[index] = thumbnail
        return thumbnail

    def _caption(self, tile: Tile, width: int) -> Row:
        """`✗ 3 is 8   62%`"""
        confidence = f"{tile.confidence:4.0%}" if 0 <= tile.confidence <= 1 else "   ?"
        right, wrong = ("+", "x") if self.glyphs.ascii else ("✓", "✗")
        text = f"{right} {tile.truth}"
        if tile.wrong:
            text = f"{wrong} {tile.prediction} is {tile.truth}"
        room = max(0, width - TILE_GAP - len(confidence) - 1)
        text = truncate(text, room, self.glyphs.ellipsis)
        return self.styled(
            [
                (text, "error reverse" if tile.wrong else "good"),
                (" " * (room - cell_len(text) + 1), "text"),
                (confidence, "dim"),
                (" " * TILE_GAP, "text"),
            ]
        )


# ---------------------------------------------------------------- texts

MAX_TEXT_WIDTH = 100
"""Longer rows are hard to read, however wide the terminal is."""
PROMPT_STYLE = "accent bold underline"


class GeneratedTexts(ScrollingLines):
    """The texts that a language model generated, newest first, each with its step and its prompt
    marked."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.samples: tuple[TextSample, ...] = ()
        """Newest first."""
        self._layout: list[list[Span]] = []

    def show_samples(self, samples: Sequence[TextSample]) -> None:
        """Show `samples`, given oldest first."""
        newest_first = tuple(reversed(samples))
        if newest_first != self.samples:
            self.samples = newest_first
            self.lines_changed()

    def lines_changed(self, first: int = 0) -> None:
        """Lay the texts out for the present width."""
        self._layout = self._laid_out(max(1, min(self.view_size.width, MAX_TEXT_WIDTH)))
        super().lines_changed(first)

    def line_count(self) -> int:
        """Rows of all samples."""
        return len(self._layout)

    def line(self, index: int) -> Row:
        """One row of a sample."""
        return self.styled(self._layout[index])

    def _laid_out(self, width: int) -> list[list[Span]]:
        rows: list[list[Span]] = []
        for number, sample in enumerate(self.samples):
            title = f"step {sample.step:,}" + ("  newest" if number == 0 else "")
            rule = " " + self.glyphs.rule * max(0, width - len(title) - 1)
            rows.append([(title, "accent bold" if number == 0 else "title"), (rule, "rule")])
            rows += _text_rows(sample, width)
            rows.append([])
        return rows[:-1]


def _text_rows(sample: TextSample, width: int) -> list[list[Span]]:
    """Rows of the prompt and of the generated text, one of which may hold the end of the prompt and
    the beginning of the generated text. `sample.text` may repeat the prompt or not."""
    generated = sample.text.removeprefix(sample.prompt)
    if not sample.prompt.strip():
        return [[(row, "text")] for row in wrap((sample.prompt + generated).strip("\n"), width)]
    *whole, last = wrap(sample.prompt, width)
    rows: list[list[Span]] = [[(row, PROMPT_STYLE)] for row in whole]
    for row in wrap(last + generated, width):
        known = min(len(last), len(row))
        rows.append([(row[:known], PROMPT_STYLE), (row[known:], "text")])
        last = last[known:].lstrip(" ") if known < len(last) else ""
    return rows


class LoggedTable(VirtualTable):
    """A row for each logged name, in the order in which they were first logged."""

    DEFAULT_CSS = "LoggedTable { height: 1fr; min-height: 4; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.columns = (
            TableColumn("name", "logged by the script", 0, self._name_of, left=True),
            TableColumn("value", "newest", 10, self._value),
            TableColumn("best", "best", 10, self._best, tooltip="Over the whole run"),
            TableColumn("step", "at step", 9, self._step, formatting.count, style="dim"),
        )
        self.descending = False
        self._logged: Sequence[LoggedSeries] = ()
        self._newest: list[tuple[int, float] | None] = []

    def show(self, snapshot: Snapshot) -> int:
        """Show the names of a snapshot; returns how many there are."""
        self._logged = logged_series(snapshot.history)
        self._newest = [each.newest() for each in self._logged]
        if len(self.order) != len(self._logged):
            self.set_order(np.arange(len(self._logged)))
        self.update_rows()
        return len(self._logged)

    @property
    def selected(self) -> LoggedSeries | None:
        """The series under the cursor."""
        row = self.current_row
        return self._logged[row] if row is not None and row < len(self._logged) else None

    def _name_of(self, row: int) -> CellValue:
        return self._logged[row].name

    def _value(self, row: int) -> CellValue:
        newest = self._newest[row]
        if newest is None:
            return None
        why = why_absent(newest[1])
        return newest[1] if why is None else Cell(None, "dim")

    def _best(self, row: int) -> CellValue:
        return self._logged[row].best()

    def _step(self, row: int) -> CellValue:
        newest = self._newest[row]
        return None if newest is None else f"{newest[0]:,}".rjust(9)
