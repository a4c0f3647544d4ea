"""What one head attends to, and what it does with it: the map, the text or the image, the query
with every key, the heads, and the residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.cells import cell_len
from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.answers.attention import (
    KeyRow,
    allowed_keys,
    entropy_text,
    floats,
    key_rows,
    place_text,
    position_label,
    short_patch_label,
    target_text,
    visible,
)
from tui_trainer.client.answers.tensors import cells_of
from tui_trainer.protocol.attention import (
    PAIRS,
    PARTS,
    AttentionExamination,
    Contribution,
    PatchGrid,
    Picture,
)
from tui_trainer.protocol.formatting import number, signed
from tui_trainer.protocol.heat_map import HeatMap
from tui_trainer.protocol.text import strip_escapes, wrap
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.panels.base import Figure, message_row, title_line
from tui_trainer.ui.panels.samples import Pixels, half_blocks, resize
from tui_trainer.ui.panels.tensor import Floats, HeatMapView
from tui_trainer.ui.widgets.lines import LineView, Row, ScrollingLines, Span
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable

MAX_LABEL = 13
LABEL_WIDTH = 8
"""Cells for the tokens beside the map, at most."""
BAR_WIDTH = 12
EFFECT_WIDTH = 9
"""Cells of a bar to either side."""
CAPTION_ROWS = 2
"""Title, and the tokens of the keys."""
MAX_CELL = 8
"""Terminal cells across, and half cells down, for one query and key at most."""
NO_LABELS = "neither the text nor the image of this batch is known"


# ---------------------------------------------------------------- the map


class AttentionMapView(HeatMapView):
    """Queries down, keys across, with the tokens beside them and a mark at the query."""

    lessons = ("attention-scores",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.found: AttentionExamination | None = None

    def show_attention(self, found: AttentionExamination | None, message: str = "") -> None:
        self.found = found
        self.show(found.map if found is not None else None, message)

    @property
    def pixels(self) -> tuple[int, int]:
        """(rows, columns) of cells for which there is room."""
        size = self.view_size
        return max(2, 2 * (size.height - CAPTION_ROWS)), max(2, size.width - self._gutter)

    @property
    def _gutter(self) -> int:
        """Cells to the left of the map: a mark, and the tokens."""
        labels = self.found.labels if self.found is not None else ()
        longest = max((cell_len(visible(label)) for label in labels), default=0)
        return 2 + (min(LABEL_WIDTH, max(longest, 2)) if longest else 0)

    def rows(self, size: Size) -> Sequence[Row]:
        heat, found = self.heat, self.found
        if heat is None or found is None:
            return super().rows(size)
        cells = cells_of(heat)
        width, height = size.width - self._gutter, 2 * (size.height - CAPTION_ROWS)
        across = min(max(1, width // heat.columns), MAX_CELL)
        down = min(max(1, height // heat.rows), MAX_CELL)
        if down > 1:
            down -= down % 2  # whole lines for each query, to stand beside its token
        across = min(across, down)  # about square
        shown = cells[: height // down, : width // across]
        picture = shown.repeat(down, 0).repeat(across, 1)
        high = float(np.nanmax(cells, initial=0.0))
        lines = self._picture(picture, np.ones(picture.shape, bool), 0.0, high)
        gutters = [self._beside(heat, found, line, down) for line in range(len(lines))]
        drawn = [[*gutter, *line] for gutter, line in zip(gutters, lines, strict=True)]
        return [
            title_line(self, size.width, *self._head(heat, high)),
            *drawn,
            self._below(heat, found, across, shown.shape[1]),
        ]

    def _head(self, heat: HeatMap, high: float) -> tuple[str, list[Figure]]:
        style = self.palette.text
        figures = [
            ("queries", f"{heat.row_from:,}–{heat.row_to - 1:,}", style),
            ("keys", f"{heat.column_from:,}–{heat.column_to - 1:,}", style),
            ("strongest", f"{high:.3f}", style),
        ]
        if heat.block_rows > 1 or heat.block_columns > 1:
            block = f"{heat.block_rows:,}{self.glyphs.times}{heat.block_columns:,}"
            figures.append(("largest of", block, style))
        return "Weights", figures

    def _beside(self, heat: HeatMap, found: AttentionExamination, line: int, down: int) -> Row:
        """The mark of the query, and the tokens of a line's queries."""
        first = heat.row_from + (2 * line // down) * heat.block_rows
        last = min(heat.row_from + ((2 * line + 1) // down + 1) * heat.block_rows, heat.row_to)
        room = self._gutter - 2
        here = first <= found.query < last
        mark = self.glyphs.current if here and (down < 2 or 2 * line % down == 0) else " "
        text = ""
        if room and heat.block_rows == 1 and 2 * line % down == 0:
            text = "".join(position_label(found, q)[: room if down > 1 else 1]
                           for q in range(first, last))  # fmt: skip
        text = strip_escapes(text)[:room]
        return self.styled([(mark, "accent bold"), (text.rjust(room), "accent" if here else "dim"),
                            (" ", "text")])  # fmt: skip

    def _below(self, heat: HeatMap, found: AttentionExamination, across: int, shown: int) -> Row:
        """The first character of each key's token."""
        if not found.labels or heat.block_columns > 1:
            return []
        marks = [position_label(found, heat.column_from + key)[:1] for key in range(shown)]
        text = "".join((mark if cell_len(mark) == 1 else "?").ljust(across) for mark in marks)
        return self.styled([(" " * self._gutter, "text"), (text, "dim")])


class ExaminationView(LineView):
    """Draws a part of an examination from its top."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.found: AttentionExamination | None = None

    def show_attention(self, found: AttentionExamination | None) -> None:
        self.found = found
        self.update_rows()


# ---------------------------------------------------------------- the text, or the image


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

    def _text(self, found: AttentionExamination, weights: Floats, size: Size) -> list[Row]:
        """The tokens, each on a ground as strong as its weight; the query is marked."""
        largest = float(weights.max(initial=0.0)) or 1.0
        assert found.row is not None
        masked = np.isnan(floats(found.row.scores))
        rows: list[Row] = [[]]
        used = 0
        for key, label in enumerate(found.labels[: len(weights)]):
            text = strip_escapes(visible(label).replace("␣", " "))
            width = cell_len(text)
            if used + width > size.width and used:
                rows.append([])
                used = 0
            share = float(weights[key]) / largest
            rows[-1].append(self._token(text, share, key == found.query, bool(masked[key])))
            used += width
            if "\n" in label:
                rows.append([])
                used = 0
        figures: list[Figure] = [
            ("query", position_label(found, found.query) or str(found.query), self.palette.accent)
        ]
        return [title_line(self, size.width, "Text", figures), *rows[: size.height - 1]]

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
        """The image, and beside it the weight of each of its patches; the query's is marked."""
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
        shares = 0.1 + 0.9 * np.clip(cells, 0, 1)  # the grid shows where there is no weight
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


def _pixels(picture: Picture) -> Pixels:
    values: Pixels = np.frombuffer(picture.pixels, np.uint8)
    return values.reshape(picture.height, picture.width, 3)


def _token_name(grid: PatchGrid, key: int) -> str:
    return "class token" if grid.first == 1 else f"token {key}"


# ---------------------------------------------------------------- the query with every key


class QueryTable(VirtualTable):
    """Rows are keys: q · k, the angle, the score, the weight."""

    lessons = ("attention-scores",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._chosen = -1
        """The query that the cursor was put on."""
        self.header_height = 1
        self.found: AttentionExamination | None = None
        self._keys: list[KeyRow] = []
        self.by_weight = False
        self.columns = ()

    def show_attention(self, found: AttentionExamination | None) -> None:
        self.found = found
        self._keys = key_rows(found) if found is not None else []
        labelled = found is not None and (bool(found.labels) or found.grid is not None)
        self.columns = tuple(
            column for column in self._all_columns() if labelled or column.key != "label"
        )
        self.rearrange()
        if found is not None and found.query != self._chosen and self._keys:
            self._chosen = found.query
            self._to_query()
        self.update_rows()

    def _to_query(self) -> None:
        """Put the cursor on the key that is the query itself."""
        places = np.flatnonzero(self.order == self._chosen)
        self.move_cursor(int(places[0]) if len(places) else 0)

    def rearrange(self) -> None:
        """In the order of the keys, or of their weights."""
        weights = np.array([key.weight for key in self._keys], np.float64)
        order = np.argsort(-weights, kind="stable") if self.by_weight else np.arange(len(weights))
        self.sorted_by, self.descending = ("weight", True) if self.by_weight else ("key", False)
        self.set_order(order.astype(np.int64))

    def _all_columns(self) -> tuple[TableColumn, ...]:
        found = self.found
        patches = found is not None and found.grid is not None and not found.labels
        longest = max((cell_len(key.label) for key in self._keys), default=0)
        label = 7 if patches else min(max(longest, 5), MAX_LABEL)
        title = "row,col" if patches else "token"
        return (
            TableColumn("key", "key", 5, lambda row: Cell(str(row), self._style(row, "dim"))),
            TableColumn("label", title, label, self._label, left=True),
            TableColumn("product", "q·k", 7, self._of(lambda k: k.product)),
            TableColumn("angle", "angle", 6, self._angle),
            TableColumn("score", "score", 7, self._score),
            TableColumn("weight", "weight", 7, self._weight),
            TableColumn("bar", "", BAR_WIDTH, self._bar, left=True, style="k"),
        )

    def _style(self, row: int, usual: str = "text") -> str:
        if self.found is not None and row == self.found.query:
            return "accent"
        return "faint" if self._keys[row].masked else usual

    def _of(self, value: Callable[[KeyRow], float]) -> Callable[[int], CellValue]:
        return lambda row: Cell(value(self._keys[row]), self._style(row))

    def _label(self, row: int) -> Cell:
        found = self.found
        label = self._keys[row].label
        if found is not None and found.grid is not None and not found.labels:
            label = short_patch_label(found.grid, row)
        return Cell(label, self._style(row))

    def _angle(self, row: int) -> Cell:
        angle = self._keys[row].angle
        text = f"{angle:.1f}°" if math.isfinite(angle) else self.glyphs.missing
        return Cell(text, self._style(row))

    def _score(self, row: int) -> Cell:
        key = self._keys[row]
        return Cell("masked" if key.masked else key.score, self._style(row))

    def _weight(self, row: int) -> Cell:
        return Cell(f"{self._keys[row].weight:.4f}", self._style(row, "strong"))

    def _bar(self, row: int) -> Cell:
        largest = max((key.weight for key in self._keys), default=0.0) or 1.0
        share = self._keys[row].weight / largest
        return Cell(fine_bar(share, self.glyphs), self._style(row, "k"))

    def header(self, width: int) -> list[Row]:
        found = self.found
        figures: list[Figure] = []
        if found is not None and found.head < len(found.by_head):
            entropy = found.by_head[found.head].entropy
            text = entropy_text(entropy, allowed_keys(found))
            figures = [("entropy", text, self.palette.text)]
            if not math.isnan(found.scale):
                figures.append(("scale", number(found.scale, 0), self.palette.text))
        return [title_line(self, width, "Query by keys", figures)]


EIGHTHS = " ▏▎▍▌▋▊▉"


def fine_bar(share: float, glyphs: Glyphs) -> str:
    """From the left, of `BAR_WIDTH` cells at most, in eighths of a cell where these exist."""
    if glyphs.ascii:
        return bar(share, glyphs.bar, BAR_WIDTH)
    whole, rest = divmod(round(min(share, 1.0) * BAR_WIDTH * 8), 8) if share > 0 else (0, 0)
    return "█" * whole + (EIGHTHS[rest] if rest else "")


def bar(share: float, glyph: str, width: int) -> str:
    """Of `width` cells at most."""
    return glyph * round(min(share, 1.0) * width) if share > 0 else ""


# ---------------------------------------------------------------- heads


@dataclass(frozen=True)
class _HeadColumn:
    key: str
    title: str
    width: int
    value: Callable[[AttentionExamination, int], CellValue]
    style: str = "text"


def _weighted(name: str, place: int) -> Callable[[AttentionExamination, int], CellValue]:
    def value(found: AttentionExamination, head: int) -> CellValue:
        index = head if len(found.weights) > 1 else head - found.head
        if not 0 <= index < len(found.weights):
            return None
        figure: float = getattr(found.weights[index], name)[place]
        if name == "cosines":
            return signed(figure, 6, 2)
        return f"{figure:.1f}°" if name == "angles" else number(figure, 6, 3)

    return value


HEAD_COLUMNS = (
    _HeadColumn("head", "head", 5, lambda _, head: str(head), "dim"),
    _HeadColumn("entropy", "entropy", 7, lambda f, h: f"{f.by_head[h].entropy:.3f}"
                if f.by_head else None),
    _HeadColumn("mean", "mean", 6, lambda f, h: f"{f.by_head[h].mean_entropy:.3f}"
                if f.by_head else None),
    _HeadColumn("largest", "largest", 7, lambda f, h: f"{f.by_head[h].largest:.4f}"
                if f.by_head else None),
    *(_HeadColumn(f"cos {pair}", f"cos {pair}", 6, _weighted("cosines", i), pair)
      for i, pair in enumerate(PAIRS)),
    *(_HeadColumn(f"angle {pair}", f"∠ {pair}", 6, _weighted("angles", i), pair)
      for i, pair in enumerate(PAIRS)),
    *(_HeadColumn(f"σ {part}", f"σ {part}", 6, _weighted("largest", i), part)
      for i, part in enumerate(PARTS)),
    *(_HeadColumn(f"rank {part}", f"rank {part}", 6, _weighted("stable_ranks", i), part)
      for i, part in enumerate(PARTS)),
    *(_HeadColumn(f"dist {pair}", f"dist {pair}", 7, _weighted("distances", i), pair)
      for i, pair in enumerate(PAIRS)),
)  # fmt: skip


HEAD_LEGEND = ("entropy in nats: query, mean", "∠ between row spaces", "σ largest singular value")


class AttentionHeadsTable(VirtualTable):
    """Rows are heads: entropies, and how Wq, Wk and Wv relate."""

    lessons = ("qkv",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._chosen = -1
        """The head that the cursor was put on."""
        self.header_height = 1
        self.found: AttentionExamination | None = None
        self.columns = tuple(
            TableColumn(
                each.key, each.title, each.width, self._reader(each), style=each.style,
                title_style=each.style,
            )
            for each in HEAD_COLUMNS
        )  # fmt: skip

    def _reader(self, column: _HeadColumn) -> Callable[[int], CellValue]:
        def read(row: int) -> CellValue:
            if self.found is None:
                return None
            value = column.value(self.found, row)
            chosen = row == self.found.head and column.key == "head"
            return Cell(value, "accent") if chosen and isinstance(value, str) else value

        return read

    def show_attention(self, found: AttentionExamination | None) -> None:
        self.found = found
        heads = found.heads if found is not None else 0
        if len(self.order) != heads:
            self.set_order(np.arange(heads))
        if found is not None and found.head != self._chosen:
            self._chosen = found.head
            self.move_cursor(found.head)
        if found is not None and found.no_weights:
            self.placeholder = found.no_weights
        self.update_rows()

    def header(self, width: int) -> list[Row]:
        figures: list[Figure] = [("", text, self.palette.dim) for text in HEAD_LEGEND]
        return [title_line(self, width, "Heads", figures)]


class SpectraView(ExaminationView):
    """Singular values of Wq, Wk and Wv of a head, and the angles between their row spaces."""

    lessons = ("qkv",)

    def rows(self, size: Size) -> Sequence[Row]:
        found = self.found
        if found is None or found.spectra is None:
            return []
        head: list[Figure] = [("head", str(found.head), self.palette.accent)]
        rows = [title_line(self, size.width, "Singular values", head)]
        top = max(max(values, default=0.0) for values in found.spectra.singular)
        for part, values in zip(PARTS, found.spectra.singular, strict=True):
            ends = f"{number(values[0], 8)} to {number(values[-1], 8)}" if values else ""
            rows.append(self._line(f"W{part}", values, top, ends, part, size.width))
        rows.append(title_line(self, size.width, "Angles between the row spaces", head))
        for pair, angles in zip(PAIRS, found.spectra.angles, strict=True):
            ends = f"{angles[0]:7.1f}° to {angles[-1]:7.1f}°" if angles else "n/a"
            rows.append(self._line(pair, angles, 90.0, ends, pair, size.width))
        return rows

    def _line(
        self, name: str, values: Sequence[float], top: float, ends: str, style: str, width: int
    ) -> Row:
        """The values as bars from left to right."""
        sparks = self.glyphs.sparks
        room = max(4, width - 26)
        count = len(values)
        places = [values[i * count // min(room, count)] for i in range(min(room, count))]
        repeat = max(1, min(3, room // len(places))) if places else 1
        bars = "".join(
            sparks[min(len(sparks) - 1, max(0, int(v / (top or 1.0) * len(sparks))))] * repeat
            for v in places
        )
        return self.styled([(f"{name:<4}", style), (f"{ends:<21} ", "text"), (bars, style)])


# ---------------------------------------------------------------- the residual stream


class ResidualTable(VirtualTable):
    """Rows are what was added to the stream, in order."""

    lessons = ("residual-stream",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.header_height = 1
        self.found: AttentionExamination | None = None
        self.heads_shown = True
        self.columns = self._columns(20)

    def _columns(self, width: int) -> tuple[TableColumn, ...]:
        """`width`: of the names."""
        return (
            TableColumn("name", "what was added", width, self._what, left=True),
            TableColumn("norm", "norm", 8, lambda row: self._figure(row, "norm")),
            TableColumn("cosine", "cosine", 7, lambda row: self._figure(row, "cosine")),
            TableColumn("logit", "logit", 8, lambda row: self._figure(row, "logit")),
            TableColumn("bar", "", 2 * EFFECT_WIDTH + 1, self._bar, left=True),
        )

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        stream = self.found.residual if self.found is not None else None
        return stream.contributions if stream is not None else ()

    def show_attention(self, found: AttentionExamination | None) -> None:
        self.found = found
        if found is not None:
            self.placeholder = found.no_residual or found.missing or "reading …"
        longest = max((cell_len(each.name) for each in self.contributions), default=12)
        self.columns = self._columns(min(longest + 8, max(20, self.view_size.width - 46)))
        self.rearrange()
        self.update_rows()

    def rearrange(self) -> None:
        """With the heads of each layer, or without."""
        shown = [
            row
            for row, each in enumerate(self.contributions)
            if self.heads_shown or each.kind not in ("head", "bias")
        ]
        self.set_order(np.array(shown, np.int64))

    def _part(self, row: int) -> bool:
        return self.contributions[row].kind in ("head", "bias")

    def _what(self, row: int) -> Cell:
        each = self.contributions[row]
        if self._part(row):
            return Cell(f"  {each.name}", "dim")
        style = {"attention": "v", "start": "text", "readout": "dim"}.get(each.kind, "text")
        return Cell(f"{each.name} (start)" if each.kind == "start" else each.name, style)

    def _figure(self, row: int, name: str) -> CellValue:
        each = self.contributions[row]
        value: float = getattr(each, name)
        style = "dim" if self._part(row) else "text"
        if math.isnan(value):
            return Cell("", style)
        return Cell(number(value, 8) if name == "norm" else signed(value, 7, 3), style)

    def _bar(self, row: int) -> Cell:
        """The effect on the logit, to the left or to the right; without one, the norm."""
        each = self.contributions[row]
        name = "norm" if all(math.isnan(c.logit) for c in self.contributions) else "logit"
        sizes = [abs(getattr(c, name)) for c in self.contributions]
        largest = max((size for size in sizes if math.isfinite(size)), default=0.0) or 1.0
        value: float = getattr(each, name)
        if math.isnan(value):
            return Cell("", "text")
        drawn = bar(abs(value) / largest, self.glyphs.bar, EFFECT_WIDTH)
        axis = self.glyphs.vertical
        if value < 0:
            return Cell(f"{drawn.rjust(EFFECT_WIDTH)}{axis}", "q")
        return Cell(f"{' ' * EFFECT_WIDTH}{axis}{drawn}", "dim" if self._part(row) else "k")

    def header(self, width: int) -> list[Row]:
        found = self.found
        stream = found.residual if found is not None else None
        figures: list[Figure] = []
        if found is not None and stream is not None:
            figures = [
                ("norm", number(stream.norm, 0), self.palette.text),
                ("its sum within", f"{stream.difference:.0e}", self.palette.good),
            ]
            if not stream.no_logit:
                off = f"{stream.logit_difference:.0e}"
                figures.insert(1, ("logit", signed(stream.logit, 8, 3).strip(), self.palette.text))
                figures.append(("that of the logit", off, self.palette.good))
        return [title_line(self, width, "Residual stream", figures)]


class ResidualNotes(ScrollingLines, can_focus=False):
    """Where the stream is, whose logit it is, and what is special."""

    lessons = ("residual-stream",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._texts: list[Span] = []
        self._built: list[Row] = []

    def show_attention(self, found: AttentionExamination | None) -> None:
        stream = found.residual if found is not None else None
        self._texts = []
        if found is not None and stream is not None:
            logit = f"no effect on a logit: {stream.no_logit}" if stream.no_logit else (
                f"logit of {target_text(stream)}, the divisor of the final norm held"
            )  # fmt: skip
            self._texts = [(f"at {place_text(found, stream)}; {logit}", "text")]
            self._texts += [(note, "warning") for note in stream.notes]
        self.view_resized()

    def view_resized(self) -> None:
        if not self.is_attached or not self.view_size.width:
            return
        self._built = [
            self.styled([(line, style)])
            for text, style in self._texts
            for line in wrap(text, self.view_size.width)
        ]
        self.lines_changed()

    def discard_drawn(self) -> None:
        super().discard_drawn()
        self.call_later(self.view_resized)

    def line_count(self) -> int:
        return len(self._built)

    def line(self, index: int) -> Row:
        return self._built[index]
