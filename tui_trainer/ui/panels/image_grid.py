"""Images with what the model made of them: half-block thumbnails, a line of verdict under each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.cells import set_cell_size
from rich.segment import Segment
from textual.strip import Strip

from tui_trainer.protocol.messages import ImageSample
from tui_trainer.ui.panels.lines import LinesView
from tui_trainer.ui.panels.pixels import Pixels, fit, half_blocks, resize

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
