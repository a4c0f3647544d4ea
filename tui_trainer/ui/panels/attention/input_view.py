"""The weights of a query over the text or the image that the model was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len
from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.answers.attention import (
    floats,
    position_label,
    visible,
)
from tui_trainer.protocol.attention import (
    AttentionExamination,
    ExampleImage,
    PatchGrid,
)
from tui_trainer.protocol.text import strip_escapes
from tui_trainer.ui.panels.base import ExaminationView, Figure, message_row, title_line
from tui_trainer.ui.panels.samples import Pixels, half_blocks, resize
from tui_trainer.ui.panels.tensor import Floats
from tui_trainer.ui.widgets.lines import Row

NO_LABELS = "neither the text nor the image of this batch is known"


class InputView(ExaminationView):
    """The weights of the query over the text or over the image."""

    lessons = ("attention-scores",)

    def rows(self, size: Size) -> Sequence[Row]:
        found = self.found
        if found is None or found.row is None:
            return []
        weights = floats(found.row.weights)
        if found.labels:
            return self._text(found, weights, size)
        if found.grid is not None:
            return self._image(found.grid, found.query, weights, size)
        return [title_line(self, size.width, "Input"), message_row(NO_LABELS, self.palette.dim)]

    def _shade(self, share: float) -> Color:
        """From the background to the colour of the largest weight."""
        levels = self._levels
        return levels[min(len(levels) - 1, max(0, round(share * (len(levels) - 1))))]

    @property
    def _levels(self) -> list[Color]:
        ground, top = self._rgb(self.palette.text, background=True), self._rgb(self.palette.k)
        steps = 16
        return [
            Color.from_rgb(*(g + (t - g) * s / steps for g, t in zip(ground, top, strict=True)))
            for s in range(steps + 1)
        ]

    def _rgb(self, style: Style, background: bool = False) -> tuple[int, int, int]:
        color = style.bgcolor if background else style.color
        found = color.get_truecolor() if color is not None else None
        if found is None:
            return (0, 0, 0) if background else (128, 128, 128)
        return found.red, found.green, found.blue

    @property
    def _colored(self) -> bool:
        return not self.glyphs.ascii and self.palette.text.bgcolor is not None

    def text_height(self, width: int) -> int:
        """Rows that the whole text takes, with its title; 0 where there is no text."""
        found = self.found
        if found is None or found.row is None or not found.labels:
            return 0
        return 1 + len(self._text_rows(found, floats(found.row.weights), width)[0])

    def _text(self, found: AttentionExamination, weights: Floats, size: Size) -> list[Row]:
        """The tokens, each on a background as strong as its weight, with the query marked. A text
        that does not fit is cut to the rows that end with the query's."""
        rows, of_query = self._text_rows(found, weights, size.width)
        room = size.height - 1
        first = max(0, min(of_query + 1, len(rows)) - room)
        figures: list[Figure] = [
            ("query", position_label(found, found.query) or str(found.query), self.palette.accent)
        ]
        title = title_line(self, size.width, "Text", figures)
        return [title, *rows[first : first + room]]

    def _text_rows(
        self, found: AttentionExamination, weights: Floats, columns: int
    ) -> tuple[list[Row], int]:
        """The rows of the text, and the index of the row with the query."""
        largest = float(weights.max(initial=0.0)) or 1.0
        assert found.row is not None
        masked = np.isnan(floats(found.row.scores))
        rows: list[Row] = [[]]
        used = of_query = 0
        for key, label in enumerate(found.labels[: len(weights)]):
            text = strip_escapes(visible(label).replace("␣", " "))
            width = cell_len(text)
            if used + width > columns and used:
                rows.append([])
                used = 0
            share = float(weights[key]) / largest
            if key == found.query:
                of_query = len(rows) - 1
            rows[-1].append(self._token(text, share, key == found.query, bool(masked[key])))
            used += width
            if "\n" in label:
                rows.append([])
                used = 0
        return rows, of_query

    def _token(self, text: str, share: float, query: bool, masked: bool) -> Segment:
        if query:
            return Segment(text, self.style("accent reverse bold"))
        if masked:
            return Segment(text, self.style("faint"))
        if not self._colored:
            return Segment(text, self.style("text reverse" if share > 0.5 else "text"))
        ground = self._shade(share)
        dark = sum(ground.get_truecolor()) > 3 * 120
        ink = Color.from_rgb(10, 10, 10) if dark else self.palette.text.color
        return Segment(text, Style(color=ink, bgcolor=ground))

    def _image(self, grid: PatchGrid, query: int, weights: Floats, size: Size) -> list[Row]:
        """The image, and next to it the weight of each of its patches; the query's is marked."""
        patches = weights[grid.first : grid.first + grid.rows * grid.columns]
        largest = float(weights.max(initial=0.0)) or 1.0
        cells = patches.reshape(grid.rows, grid.columns) / largest
        sides = 2 if grid.picture is not None else 1
        room = min(2 * (size.height - 2) // grid.rows, (size.width // sides - 2) // grid.columns)
        side = max(1, min(room, 12))
        if side > 1:
            side -= side % 2
        drawn = self._patches(cells, side, query - grid.first)
        rows = half_blocks(drawn, not self._colored, self.palette.text)
        if grid.picture is not None:
            image = resize(_pixels(grid.picture), drawn.shape[1], drawn.shape[0])
            image = self._mark(image, query - grid.first, side, grid.columns)
            gap = Segment("  ", self.palette.text)
            left = half_blocks(image, not self._colored, self.palette.text)
            rows = [[*a, gap, *b] for a, b in zip(left, rows, strict=True)]
        others = [(_token_name(grid, key), float(weights[key])) for key in range(grid.first)]
        label = "class" if query < grid.first else f"patch {query - grid.first}"
        figures: list[Figure] = [
            ("query", label, self.palette.accent),
            ("largest", f"{largest:.3f}", self.palette.text),
        ]
        notes = [self.styled([(f"weight of the {name} {w:.3f}", "dim")]) for name, w in others]
        return [title_line(self, size.width, "Image", figures), *rows, *notes]

    def _patches(self, cells: Floats, side: int, query: int) -> Pixels:
        """(rows · side, columns · side, 3)"""
        levels = np.array([color.get_truecolor() for color in self._levels], np.uint8)
        shares = 0.1 + 0.9 * np.clip(cells, 0, 1)  # patches without weight stay visible
        places = np.rint(shares * (len(levels) - 1)).astype(int)
        pixels: Pixels = levels[places].repeat(side, 0).repeat(side, 1)
        return self._mark(pixels, query, side, cells.shape[1])

    def _mark(self, pixels: Pixels, patch: int, side: int, columns: int) -> Pixels:
        """Frame the patch of the query."""
        if patch < 0:
            return pixels
        pixels = pixels.copy()
        color = self._rgb(self.palette.accent)
        top, left = patch // columns * side, patch % columns * side
        area = pixels[top : top + side, left : left + side]
        if side < 4:
            area[:] = color
        else:
            area[0], area[-1], area[:, 0], area[:, -1] = (color,) * 4
        return pixels


def _pixels(picture: ExampleImage) -> Pixels:
    values: Pixels = np.frombuffer(picture.pixels, np.uint8)
    return values.reshape(picture.height, picture.width, 3)


def _token_name(grid: PatchGrid, key: int) -> str:
    return "class token" if grid.first == 1 else f"token {key}"
