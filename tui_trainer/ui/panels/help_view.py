"""The text of the help: keys and explanations, in as many columns as the width allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tui_trainer.protocol.describe import RunInfo
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.key_map import Group
from tui_trainer.ui.panels import explanations
from tui_trainer.ui.panels.lines import Line, LinesView
from tui_trainer.ui.panels.plain import wrap

COLUMN = 66
"""Cells that a column of text needs to be read with ease."""
GAP = 3


@dataclass(frozen=True)
class Block:
    """A heading and its entries: what stands left (a key, a name) and what it means."""

    title: str
    entries: tuple[tuple[str, str], ...]
    style: str = "accent"


def blocks(groups: Sequence[Group], glyphs: Glyphs, info: RunInfo | None = None) -> list[Block]:
    """All of the help, keys first. `info`: of the run whose stretched cadences are listed."""
    keys = [
        Block(group.title, tuple((" ".join(key.keys), key.help) for key in group.keys))
        for group in groups
    ]
    return [
        *keys,
        Block("The phases of a step", explanations.PHASES, "strong"),
        Block("What is measured", explanations.QUANTITIES, "strong"),
        Block("Stretched now, for the budget", explanations.cadences(info), "strong"),
        Block("Attention: Wq, Wk, Wv of every layer", explanations.ATTENTION, "strong"),
        Block("Signs", explanations.signs(glyphs), "strong"),
    ]


class HelpView(LinesView):
    """Blocks flow down one column, then the next."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._blocks: list[Block] = []
        self._rows: list[Line] = []

    def show_blocks(self, shown: list[Block]) -> None:
        """Show these."""
        self._blocks = shown
        self.changed()

    def changed(self, first: int = 0) -> None:
        """Lay the text out for the present width."""
        self._rows = self._lay_out()
        super().changed(first)

    def count(self) -> int:
        """Rows of the longest column."""
        return len(self._rows)

    def line(self, index: int) -> Line:
        """One row through all columns."""
        return self._rows[index]

    def _lay_out(self) -> list[Line]:
        if not self._blocks:
            return []
        number = max(1, min(3, (self.width + GAP) // (COLUMN + GAP)))
        width = (self.width - GAP * (number - 1)) // number
        made = [self._block(block, width) for block in self._blocks]
        columns = _flow(made, number)
        rows: list[Line] = []
        for y in range(max(map(len, columns))):
            row: Line = []
            for column in columns:
                piece = column[y] if y < len(column) else []
                used = sum(len(text) for text, _ in piece)
                row += [*piece, (" " * (width - used + GAP), "")]
            rows.append(row)
        return rows

    def _block(self, block: Block, width: int) -> list[Line]:
        rule = self.glyphs.rule * max(0, width - len(block.title) - 1)
        rows: list[Line] = [[(block.title, "title"), (f" {rule}", "faint")]]
        left = min(max((len(name) for name, _ in block.entries), default=0) + 2, 20)
        for name, text in block.entries:
            for place, part in enumerate(wrap(text, max(10, width - left))):
                head = name if place == 0 else ""
                rows.append([(f"{head:<{left}}"[: max(left, len(head))], block.style), (part, "")])
        return [*rows, []]


def _flow(made: list[list[Line]], number: int) -> list[list[Line]]:
    """Blocks in order down `number` columns of about equal height, none cut in two."""
    target = sum(map(len, made)) / number
    columns: list[list[Line]] = [[]]
    total = 0
    for rows in made:
        full = total + len(rows) / 2 > target * len(columns)
        if full and len(columns) < number and columns[-1]:
            columns.append([])
        columns[-1] += rows
        total += len(rows)
    return columns
