"""The text of the help: keys and explanations, in as many columns as the width allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import wrap
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.keys import KeyGroup
from tui_trainer.ui.panels.attention import SHOWN_STATISTICS
from tui_trainer.ui.widgets.lines import Line, LinesView
from tui_trainer.ui.widgets.text import stretched

# ---- explanations
# What a step is made of and what is measured, in a sentence each, for people who learn.


PHASES = (
    ("data", "the next batch of inputs and targets is fetched"),
    ("zero_grad", "the gradients of the step before are thrown away"),
    ("forward", "the model turns inputs into predictions"),
    ("loss", "one number says how wrong they are"),
    ("backward", "from it, the gradient of every parameter: where to go to make it smaller"),
    ("clip", "a gradient that is too long is shortened, its direction kept"),
    ("step", "the optimizer moves the parameters, a little, against the gradient"),
)

QUANTITIES = (
    ("loss", "what training makes smaller; validation: the same on data never trained on"),
    ("gradient norm", "‖∂L/∂p‖₂ of a parameter, before clipping and after un-scaling"),
    ("total norm", "√Σ‖gᵢ‖² over all parameters: what clipping compares with its threshold"),
    (
        "clip scale",
        "by norm min(1, max_norm / (norm + 1e-6)), by value the norm after / the norm before: "
        "below 1 the step was clipped",
    ),
    ("share", "‖gᵢ‖² / Σ‖g‖²: how much of the total norm is this parameter's"),
    ("update ratio", "‖Δw‖ / ‖w‖ of one step: healthy near 1e-3, above 1e-2 too fast"),
    ("weight norm", "‖w‖₂; without weight decay it mostly grows"),
    ("non-finite", "NaN or infinity: usually a step too large, or a number too big for its type"),
    (
        "own cost",
        "time that our code takes on the training thread, by its own clock, as a share of all its "
        "time. Not in it: caches that it empties, threads it wakes, what the viewer and other "
        "processes take of the machine",
    ),
)

ATTENTION = tuple(
    (each.title, f"{each.means}. Healthy: {each.healthy}") for each in SHOWN_STATISTICS
)


def cadences(info: RunInfo | None) -> tuple[tuple[str, str], ...]:
    """What is measured less often now than it naturally is, to stay within the run's budget."""
    if info is None:
        return ()
    nothing = ("nothing", "each quantity is measured as often as it naturally is")
    return tuple(stretched(info)) or (nothing,)


def signs(glyphs: Glyphs) -> tuple[tuple[str, str], ...]:
    """What the signs mean, as `glyphs` has them."""
    return (
        (glyphs.point, "on the loss: a validation; on the line of a replay: a note"),
        (glyphs.deed, "on the axis of a chart: a command or a note was given there"),
        (glyphs.mark, "on the axis of the clipping, on the line of a replay: a clipped step"),
        (glyphs.failed, "on the line of a replay: a value that was not finite"),
        (glyphs.ascending, "on the line of a replay: the worst spike of the loss"),
        ("yellow, slanted", "a value of the step in the making, while paused inside it"),
        ("layer*", "there is a note on this layer: screen 2 has it where the cursor is on it"),
        (glyphs.missing, "not measured yet"),
        ("n/a", "a comparison that has no meaning here; the screen says why"),
        ("! in a trend", "something was not finite there"),
    )


COLUMN = 66
"""Cells that a column of text needs to be read with ease."""
GAP = 3


@dataclass(frozen=True)
class HelpBlock:
    """A heading and its entries: what stands left (a key, a name) and what it means."""

    title: str
    entries: tuple[tuple[str, str], ...]
    style: str = "accent"


def blocks(
    groups: Sequence[KeyGroup], glyphs: Glyphs, info: RunInfo | None = None
) -> list[HelpBlock]:
    """All of the help, keys first. `info`: of the run whose stretched cadences are listed."""
    keys = [
        HelpBlock(group.title, tuple((" ".join(key.keys), key.help) for key in group.keys))
        for group in groups
    ]
    return [
        *keys,
        HelpBlock("The phases of a step", PHASES, "strong"),
        HelpBlock("What is measured", QUANTITIES, "strong"),
        HelpBlock("Stretched now, for the budget", cadences(info), "strong"),
        HelpBlock("Attention: Wq, Wk, Wv of every layer", ATTENTION, "strong"),
        HelpBlock("Signs", signs(glyphs), "strong"),
    ]


class HelpView(LinesView):
    """Blocks flow down one column, then the next."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._blocks: list[HelpBlock] = []
        self._rows: list[Line] = []

    def show_blocks(self, shown: list[HelpBlock]) -> None:
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

    def _block(self, block: HelpBlock, width: int) -> list[Line]:
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
