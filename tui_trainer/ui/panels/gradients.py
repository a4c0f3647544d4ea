"""Gradient norms as a module tree: the norm of each parameter and module, its share, its trend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import is_

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual import events

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import formatting as f
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import Table
from tui_trainer.ui.panels.base import (
    FIRST_STEP,
    Item,
    provisional,
    title_row,
    unseen,
    waiting_text,
)
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import nice_above, window
from tui_trainer.ui.widgets.table import Ids, TableColumn, VirtualTable, fitted
from tui_trainer.ui.widgets.text import ago
from tui_trainer.ui.widgets.tree import NameTree

# ---- gradient_values
# Gradient norms of every parameter, whichever optimizer's table they are in.


Values = NDArray[np.float32]


class GradientNorms:
    """The columns of all tables, one after the other."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.histories = snapshot.history.tables_named(schema.GRAD_NORM)
        self._starts = np.cumsum([0, *(each.columns for each in self.histories)])

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [column.name for each in self.histories for column in each.table.columns]

    @property
    def measured(self) -> bool:
        """Whether there is a value at all."""
        return any(each.rows for each in self.histories)

    @property
    def every(self) -> int:
        """The longest cadence among the tables."""
        return max((each.table.every for each in self.histories), default=1)

    @property
    def last_step(self) -> int:
        """The newest step that was measured."""
        return max((each.last_step or 0 for each in self.histories), default=0)

    def fresh(self) -> bool:
        """Whether some values are those of a step in the making."""
        return any(provisional(self._snapshot, each) is not None for each in self.histories)

    def latest(self) -> Values:
        """The newest of each, (parameters,); NaN: not measured yet."""
        found: list[Values] = []
        for each in self.histories:
            newest = each.latest()
            values = provisional(self._snapshot, each)
            if values is None:
                values = newest[1] if newest else np.full(each.columns, np.nan, np.float32)
            found.append(values)
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def recent(self, rows: int) -> Values:
        """The mean of the last `rows` of each, (parameters,)."""
        found = [
            each.tail(rows)[1].mean(0) if each.rows else np.full(each.columns, np.nan, np.float32)
            for each in self.histories
        ]
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def highest(
        self, wanted: Sequence[int], start: int, stop: int, cells: int
    ) -> tuple[Values, NDArray[np.bool_]]:
        """The highest value in each of `cells` stretches of steps, and whether one was not finite:
        both (len(wanted), cells)."""
        places = np.asarray(wanted, np.int64)
        high = np.full((len(places), cells), np.nan, np.float32)
        bad = np.zeros((len(places), cells), np.bool_)
        for number, each in enumerate(self.histories):
            first, end = self._starts[number], self._starts[number + 1]
            here = np.flatnonzero((places >= first) & (places < end))
            if len(here) and each.rows:
                seen = each.window((places[here] - first).tolist(), start, stop, cells)
                high[here], bad[here] = seen.high.T, seen.nonfinite.T
        return high, bad


ORDERS = ("model", "norm", "name")
TREND_STEPS = 200
AVERAGED = 20
FRUGAL_FRAMES = 5
"""On a slow line trends are drawn anew only every so many frames."""
SETTLE_FRAMES = 8
"""Frames between two sortings by norm: rows that change places all the time cannot be read."""
MOST_MEMBERS = 256
"""Modules with more parameters than this have no trend: it would have to read them all."""

COLUMNS = (
    TableColumn("name", "", 0, left=True),
    TableColumn("norm", "‖∂L/∂p‖", 9, tooltip="Norm of the gradient before clipping"),
    TableColumn("share", "share", 5, tooltip="Part of the squared total norm"),
    TableColumn("trend", "trend", 14, left=True),
)


class GradientsPanel(VirtualTable):
    """A tree while in model order and unfiltered, else a flat list of parameters."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(COLUMNS, id=id)
        self.snapshot = Snapshot()
        self.modules = NameTree(())
        self.sorting = "model"
        self.filter = ""
        self.heading = 1
        self._norms: NDArray[np.float64] = np.empty(0)
        self._total = 0.0
        self._provisional = False
        self._trends: dict[int, str] = {}
        self._trending: list[int] = []
        """The rows that the trends are of."""
        self._frames = 0
        self._folded_by_hand = False
        self._values = GradientNorms(Snapshot())
        self._described: list[Table] = []

    # ------------------------------------------------------------ what is shown

    def show(self, snapshot: Snapshot) -> None:
        """Take the snapshot and redraw the visible rows."""
        self.snapshot = snapshot
        self._values = GradientNorms(snapshot)
        self._take_names()
        self._take_norms()
        self.empty = unseen(snapshot, "grad_norm") or (
            f"nothing matches “{self.filter}”"
            if self.filter and self.modules.leaves
            else waiting_text(snapshot)
            if snapshot.status.step
            else FIRST_STEP
        )
        self._frames += 1
        if self.sorting == "norm" and self._frames % SETTLE_FRAMES == 1:
            self._arrange()
        self.update_rows()

    def _take_names(self) -> None:
        described = [each.table for each in self._values.histories]
        if len(described) == len(self._described) and all(map(is_, described, self._described)):
            return  # the usual case: 10,000 names need not be compared each frame
        self._described = described
        names = self._values.names
        if len(names) == self.modules.leaves and tuple(names) == self.modules.names:
            return
        self.modules = NameTree(names)
        self._fold_to_fit()
        self._arrange()

    def on_resize(self, event: events.Resize) -> None:
        """As many modules unfold as there is room for now."""
        if not self._folded_by_hand and self.modules.leaves:
            before = self.modules.folded
            self._fold_to_fit()
            if self.modules.folded != before:
                self._arrange()

    def _fold_to_fit(self) -> None:
        """As deep as fits on the screen and half of it again: a little scrolling is better than
        rows that stay empty."""
        room = 3 * max(self.page, 12) // 2
        fitting = (depth for depth in (9, 2, 1) if self.modules.rows_folded_at(depth) <= room)
        self.modules.fold_deeper_than(next(fitting, 0))

    def _take_norms(self) -> None:
        self._provisional = self._values.fresh()
        if not self._values.measured and not self._provisional:
            self._norms = np.full(len(self.modules.labels), np.nan)
            self._total = np.nan
            return
        self._norms = self.modules.root_sum_squares(self._values.latest())
        self._total = float(np.sqrt(np.square(self._norms[: self.modules.leaves]).sum()))

    def _arrange(self) -> None:
        tree = self.modules
        if self.sorting == "model" and not self.filter:
            self.set_order(tree.visible())
            return
        found = tree.matching(self.filter)
        if self.sorting == "norm" and self._values.measured:
            recent = self._values.recent(AVERAGED)
            found = found[np.argsort(-np.nan_to_num(recent[found], nan=np.inf), kind="stable")]
        elif self.sorting == "name":
            found = found[np.argsort(np.array(tree.names)[found], kind="stable")]
        self.set_order(found)

    def set_filter(self, text: str) -> None:
        """Show only parameters whose names hold these words."""
        self.filter = text.strip()
        self._arrange()
        self.show(self.snapshot)

    def sort(self, order: str | None = None) -> str:
        """Sort by `order`, or by the next one."""
        following = ORDERS[(ORDERS.index(self.sorting) + 1) % len(ORDERS)]
        self.sorting = order if order in ORDERS else following
        self.sorted_by = {"norm": "norm", "name": "name"}.get(self.sorting, "")
        self.descending = self.sorting == "norm"
        self._arrange()
        self.update_rows()
        return self.sorting

    def toggle(self, node: int) -> None:
        """Fold or unfold a module; from then on nothing folds by itself."""
        self._folded_by_hand = True
        self.modules.toggle(node)
        self._arrange()
        self.update_rows()

    # ------------------------------------------------------------ drawing

    def head(self, width: int) -> list[Row]:
        """The title."""
        count = self.modules.leaves
        items: list[Item] = []
        if count and len(self._norms):
            style = self.palette.provisional if self._provisional else self.palette.norm
            known = self._values.measured or self._provisional
            items = [("total", f.number(self._total, 7), style)] if known else []
            items.append(("of", f"{count:,} parameters", self.palette.dim))
        behind = self.snapshot.status.step - self._values.last_step
        if items and self._values.measured and not self._provisional and behind > 0:
            # Measuring was stretched to stay within the budget: say how old this is.
            items.insert(1, ("", _age(behind, self._values.every), self.palette.dim))
        if self._provisional:
            items.insert(1, ("", "this step, before its update", self.palette.provisional))
        if self.filter:
            items.insert(0, ("/", self.filter, self.palette.accent))
        right = "" if self.sorting == "model" else f"by {self.sorting}"
        return [title_row(self, width, "Gradients", items, right)]

    def prepare(self, visible: Ids) -> None:
        """The trends of the visible rows, in one read of the history."""
        if not self._values.measured:
            self._trends = {}
            return
        if self.slow_link and self._frames % FRUGAL_FRAMES and visible.tolist() == self._trending:
            return
        self._trends, self._trending = {}, visible.tolist()
        cells = COLUMNS[-1].width
        start, stop = window(self._values.last_step, self._trend_steps(), coarse=self.slow_link)
        wanted: list[int] = []
        parts: list[tuple[int, int]] = []
        for node in visible.tolist():
            members = (
                self.modules.members[node] if self.modules.is_branch(node) else np.array([node])
            )
            if len(members) <= MOST_MEMBERS:
                parts.append((node, len(members)))
                wanted += members.tolist()
        if not wanted:
            return
        high, nonfinite = self._values.highest(wanted, start, stop, cells)
        squares = np.square(high.astype(np.float64))
        starts = np.concatenate([[0], np.cumsum([count for _, count in parts])[:-1]])
        values = np.sqrt(np.add.reduceat(squares, starts, axis=0)).astype(np.float32)
        bad = np.logical_or.reduceat(nonfinite, starts, axis=0)
        drawn = sparklines(values, bad, self.glyphs, hold=True)
        self._trends = {node: line for (node, _), line in zip(parts, drawn, strict=True)}
        title = f"last {self._trend_steps():,}"
        if self.columns[-1].title != title:
            self.columns = (*COLUMNS[:-1], replace(COLUMNS[-1], title=title))

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """Name, norm, share, trend."""
        palette, glyphs, tree = self.palette, self.glyphs, self.modules
        branch = tree.is_branch(row)
        norm = float(self._norms[row]) if row < len(self._norms) else float("nan")
        finite = np.isfinite(norm)
        flat = self.sorting != "model" or bool(self.filter)
        style = palette.provisional if self._provisional else palette.text
        out: Row = []
        for column, width in zip(columns, widths, strict=True):
            if column.key == "name":
                out.append(
                    Segment(self._label_of(row, branch, flat, width), _named(self, row, branch))
                )
            elif column.key == "norm":
                measured = self._values.measured or self._provisional
                text = f.number(norm, width) if measured else glyphs.missing.rjust(width)
                out.append(Segment(text, style if finite or not measured else palette.error))
            elif column.key == "share":
                share = (norm / self._total) ** 2 if finite and self._total > 0 else None
                out.append(Segment(f.percent(share, width, 0), palette.dim))
            else:
                trend = self._trends.get(row, "").ljust(width)[:width]
                out.append(Segment(trend, palette.norm if not branch else palette.loss_raw))
        return out

    def _trend_steps(self) -> int:
        """Steps that a trend covers: more where the norms are measured less often, so that every
        cell has a value."""
        return max(TREND_STEPS, int(nice_above(2 * self._values.every * COLUMNS[-1].width)))

    def _label_of(self, row: int, branch: bool, flat: bool, width: int) -> str:
        tree, glyphs = self.modules, self.glyphs
        if flat:
            return fitted(f" {tree.names[row]}", width, left=True)
        sign = (glyphs.folded if row in tree.folded else glyphs.unfolded) if branch else " "
        count = f" {len(tree.members[row])}" if row in tree.folded else ""
        indent = "  " * tree.depths[row]
        label = tree.labels[row].removesuffix(".weight")
        return fitted(f"{indent}{sign} {label}{count}", width, left=True)


def _age(behind: int, every: int) -> str:
    """How old the values are, and, where that is so by design, how often they are measured."""
    return f"{ago(behind)}, every {every:,}" if every > 1 else ago(behind)


def _named(panel: GradientsPanel, row: int, branch: bool) -> Style:
    """Names of Wq, Wk and Wv wear their colours everywhere."""
    palette = panel.palette
    if branch:
        return palette.strong
    name = panel.modules.names[row]
    info = panel.snapshot.info
    for layer in info.attention if info and len(info.attention) <= 128 else ():
        if layer.kind in ("fused", "multihead"):
            continue
        for letter, part in (("q", layer.query), ("k", layer.key), ("v", layer.value)):
            if name == part:
                return palette.series(letter)
    return palette.text
