"""The heads of an examined layer: a table of them, and the spectra of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from textual.geometry import Size

from tui_trainer.protocol.attention import (
    PAIRS,
    PARTS,
    AttentionExamination,
)
from tui_trainer.protocol.formatting import number, signed
from tui_trainer.ui.panels.base import ExaminationView, Figure, title_line
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable


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
        """The head to which `show_attention` last moved the cursor."""
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
