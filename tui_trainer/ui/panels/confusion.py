"""A confusion matrix: heat cells that carry their counts, so that it reads without colour too."""

from __future__ import annotations

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.color import Color as Colour
from textual.strip import Strip

from tui_trainer.protocol.messages import ConfusionMatrix
from tui_trainer.ui.panels.lines import Line, LinesView

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
