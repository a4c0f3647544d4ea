"""The gradients panel: the norm of each parameter's gradient in the tree of modules, with its share
of the total norm and its trend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from textual import events

from tui_trainer.client.api import Snapshot
from tui_trainer.history.healthy_ranges import GradientNormRange, HealthyRange
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.absent import Absent, absent, absent_mask, why_absent
from tui_trainer.protocol.schema import RunInfo, Table
from tui_trainer.ui.panels.base import (
    NO_STEP_YET,
    Figure,
    newest_row,
    provisional_row,
    steps_ago,
    title_line,
    unavailable_reason,
    waiting_message,
)
from tui_trainer.ui.widgets.axes import round_up, step_window
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.table import Cell, RowIds, TableColumn, VirtualTable

NodeIds = NDArray[np.int64]
Values = NDArray[np.float32]

SortKey = Literal["model", "norm", "name"]
SORT_KEYS: tuple[SortKey, ...] = ("model", "norm", "name")
"""`model` is the order of the model, as a tree."""

TREND_WIDTH = 14
MIN_TREND_STEPS = 200
AVERAGED_STEPS = 20
"""Steps whose mean norm the rows are sorted by."""
FRAMES_PER_SORT = 8
"""Frames between two sortings by norm: rows that change places all the time cannot be read."""
FRAMES_PER_TREND = 5
"""Frames between two drawings of the trends on a slow link."""
MAX_TREND_PARAMETERS = 256
"""A module with more parameters has no trend: reading all of them would take too long."""
MAX_COLOURED_LAYERS = 128
"""In models with more attention layers, the names of Wq, Wk and Wv are not coloured."""


class GradientNorms:
    """The gradient norms of all parameters, in the tables of one or several optimizers, as one
    array: the columns of the first table, then those of the second, …"""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.tables = snapshot.history.tables_named(schema.GRAD_NORM)
        self._starts = np.cumsum([0, *(table.columns for table in self.tables)])

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return [column.name for table in self.tables for column in table.table.columns]

    @property
    def measured(self) -> bool:
        """Whether any norm has been measured."""
        return any(table.rows for table in self.tables)

    @property
    def provisional(self) -> bool:
        """Whether values are those of an unfinished step."""
        return any(provisional_row(self._snapshot, table) is not None for table in self.tables)

    @property
    def every(self) -> int:
        """The longest cadence, in steps, of the tables."""
        return max((table.table.every for table in self.tables), default=1)

    @property
    def last_step(self) -> int:
        """The last step that was measured."""
        return max((table.last_step or 0 for table in self.tables), default=0)

    def newest(self) -> Values:
        """The newest norm of each parameter, (parameters,); nan before the first."""
        rows = [(table, newest_row(self._snapshot, table)[0]) for table in self.tables]
        return _concatenated(
            [_unmeasured(table.columns) if row is None else row for table, row in rows]
        )

    def mean(self, rows: int) -> Values:
        """The mean of the last `rows` norms of each parameter, (parameters,); absent where all of
        them are."""
        return _concatenated(
            [
                _mean_of_present(table.tail(rows)[1]) if table.rows else _unmeasured(table.columns)
                for table in self.tables
            ]
        )

    def maxima(
        self, parameters: Sequence[int], start: int, stop: int, buckets: int
    ) -> tuple[Values, NDArray[np.bool_]]:
        """The largest norm in each of `buckets` equal parts of start <= step < stop, and whether
        any was not finite; both (parameters, buckets)."""
        wanted = np.asarray(parameters, np.int64)
        high = np.full((len(wanted), buckets), np.nan, np.float32)
        nonfinite = np.zeros((len(wanted), buckets), np.bool_)
        for number, table in enumerate(self.tables):
            first, end = self._starts[number], self._starts[number + 1]
            here = np.flatnonzero((wanted >= first) & (wanted < end))
            if len(here) and table.rows:
                window = table.window((wanted[here] - first).tolist(), start, stop, buckets)
                high[here], nonfinite[here] = window.high.T, window.nonfinite.T
        return high, nonfinite


def _unmeasured(columns: int) -> Values:
    return np.full(columns, np.nan, np.float32)


def _mean_of_present(values: Values) -> Values:
    """The mean of each column of (rows, columns), without the values that are absent."""
    present = ~absent_mask(np.ascontiguousarray(values, np.float32))
    counts = present.sum(0)
    sums = np.where(present, values, 0).sum(0, dtype=np.float64)
    means: Values = (sums / np.maximum(counts, 1)).astype(np.float32)
    means[counts == 0] = absent(Absent.NO_GRADIENTS)
    return means


def _concatenated(parts: Sequence[Values]) -> Values:
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


class GradientsPanel(VirtualTable):
    """A tree of modules in the order of the model; a flat list of parameters when it is sorted
    otherwise or filtered."""

    lessons = ("gradient", "accumulation")

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        percent = partial(formatting.percent, decimals=0)
        self.columns = (
            TableColumn("name", "", 0, self._name_cell, left=True),
            TableColumn(
                "norm", "‖∂L/∂p‖", 9, self._norm_cell,
                tooltip="Norm of the gradient before clipping",
            ),
            TableColumn(
                "share", "share", 5, self._share_cell, percent, style="dim",
                tooltip="Part of the squared total norm",
            ),
            TableColumn("trend", "trend", TREND_WIDTH, self._trend_cell, left=True),
        )  # fmt: skip
        self.header_height = 1
        self.snapshot = Snapshot()
        self.name_tree = NameTree(())
        self.sort_key: SortKey = "model"
        self.filter = ""
        self._gradients = GradientNorms(Snapshot())
        self._described: list[Table] = []
        self._norms: NDArray[np.float64] = np.empty(0)
        """Norm of each node of the tree."""
        self._total_norm = 0.0
        self._norm_range = GradientNormRange()
        self._provisional = False
        self._info: RunInfo | None = None
        self._updated = True
        """The result of `_all_updated` for `_info`."""
        self._trends: dict[int, str] = {}
        self._trend_rows: list[int] = []
        """The rows in view when the trends were drawn."""
        self._frames = 0
        self._folded_by_user = False
        self._wanted = ""
        """Name of the parameter to put the cursor on."""
        self._name_styles: dict[str, str] = {}

    # ------------------------------------------------------------ what is shown

    def show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._gradients = GradientNorms(snapshot)
        self._take_names()
        self._take_norms()
        self._select_wanted()
        self._name_styles = _attention_styles(snapshot)
        self.placeholder = unavailable_reason(snapshot, "grad_norm") or self._placeholder_message()
        self._frames += 1
        if self.sort_key == "norm" and self._frames % FRAMES_PER_SORT == 1:
            self._arrange()
        self.update_rows()

    def _placeholder_message(self) -> str:
        if self.filter and self.name_tree.leaf_count:
            return f"no parameter matches “{self.filter}”"
        return waiting_message(self.snapshot) if self.snapshot.status.step else NO_STEP_YET

    def _take_names(self) -> None:
        described = [table.table for table in self._gradients.tables]
        if len(described) == len(self._described) and all(map(is_, described, self._described)):
            return  # the usual case: 10,000 names need not be compared each frame
        self._described = described
        names = self._gradients.names
        if tuple(names) != self.name_tree.names:
            self.name_tree = NameTree(names)
            self._fold_to_fit()
            self._arrange()

    def _take_norms(self) -> None:
        self._provisional = self._gradients.provisional
        if self._measured:
            newest = self._gradients.newest()
            gone = absent_mask(newest)
            self._norms = self.name_tree.root_sum_squares(np.where(gone, 0, newest))
            leaves = self._norms[: self.name_tree.leaf_count]
            self._total_norm = float(np.sqrt(np.square(leaves).sum()))
            if gone.any():
                present = self.name_tree.root_sum_squares(np.where(gone, 0, 1).astype(np.float32))
                self._norms[present == 0] = absent(Absent.NO_GRADIENTS)
                leaves[gone] = newest[gone]
        else:
            self._norms = np.full(len(self.name_tree.labels), np.nan)
            self._total_norm = np.nan

    @property
    def _measured(self) -> bool:
        return self._gradients.measured or self._provisional

    def on_resize(self, event: events.Resize) -> None:
        """Unfold as many modules as there is room for now."""
        if not self._folded_by_user and self.name_tree.leaf_count:
            folded = self.name_tree.folded
            self._fold_to_fit()
            if self.name_tree.folded != folded:
                self._arrange()

    def _fold_to_fit(self) -> None:
        """Unfold to the depth that fits on one and a half pages: scrolling a little is better than
        rows that stay empty."""
        room = 3 * max(self.page, 12) // 2
        fitting = (depth for depth in (9, 2, 1) if self.name_tree.visible_count(depth) <= room)
        self.name_tree.fold_from_depth(next(fitting, 0))

    def _arrange(self) -> None:
        tree = self.name_tree
        if self.sort_key == "model" and not self.filter:
            self.set_order(tree.visible())
            return
        matching = tree.matching(self.filter)
        if self.sort_key == "norm" and self._gradients.measured:
            norms = self._gradients.mean(AVERAGED_STEPS)[matching]
            norms = np.where(absent_mask(norms), -1, np.nan_to_num(norms, nan=np.inf))
            matching = matching[np.argsort(-norms, kind="stable")]
        elif self.sort_key == "name":
            matching = matching[np.argsort(np.array(tree.names)[matching], kind="stable")]
        self.set_order(matching)

    def set_filter(self, text: str) -> None:
        """Show only parameters whose names contain all words of `text`."""
        self.filter = text.strip()
        self._arrange()
        self.show(self.snapshot)

    def sort(self, key: SortKey | None = None) -> None:
        """Sort by `key`, or by the next one."""
        following = SORT_KEYS[(SORT_KEYS.index(self.sort_key) + 1) % len(SORT_KEYS)]
        self.sort_key = key or following
        self.sorted_by = "" if self.sort_key == "model" else self.sort_key
        self.descending = self.sort_key == "norm"
        self._arrange()
        self.update_rows()

    def select(self, name: str) -> None:
        """Put the cursor on a parameter, once it is known, and unfold the modules that it is in."""
        self._wanted = name
        self._select_wanted()

    def _select_wanted(self) -> None:
        if not self._wanted or self._wanted not in self.name_tree.names:
            return
        leaf = self.name_tree.names.index(self._wanted)
        self._wanted = ""
        self._folded_by_user = True  # it would be folded away again
        self.name_tree.unfold(leaf)
        self._arrange()
        places = np.flatnonzero(self.order == leaf)
        if len(places):
            self.move_cursor(int(places[0]))

    def parameter(self, row: int) -> str:
        """The name of a parameter; "" for a module."""
        names = self.name_tree.names
        return names[row] if row < len(names) else ""

    def toggle(self, node: int) -> None:
        """Fold or unfold a module; from then on the panel does not fold by itself."""
        self._folded_by_user = True
        self.name_tree.toggle(node)
        self._arrange()
        self.update_rows()

    # ------------------------------------------------------------ drawing

    def header(self, width: int) -> list[Row]:
        """The title."""
        palette = self.palette
        figures: list[Figure] = []
        if self.filter:
            figures.append(("/", self.filter, palette.accent))
        if self.name_tree.leaf_count and self._measured:
            style = palette.provisional if self._provisional else palette.norm
            table = self.snapshot.history.table(schema.STEP)
            # The healthy range holds for one optimizer's gradients; the total is over the table.
            alone = len(self._gradients.tables) == 1 and self._all_updated()
            healthy = self._norm_range.of(table) if alone and table is not None else HealthyRange()
            large = not healthy.holds(self._total_norm)
            style = palette.warning if large else style
            figures.append(("total", formatting.number(self._total_norm, 7), style))
            if large:
                figures.append(("", healthy.words, style))
            if self._provisional:
                figures.append(("", "this step, before its update", palette.provisional))
            elif age := self._age():
                figures.append(("", age, palette.dim))
        row = self.current_row
        if row is not None and self._measured and (why := why_absent(float(self._norms[row]))):
            figures.append((self.glyphs.missing, why.reason, palette.text))
        elif row is not None and self._measured and self._norms[row] == 0:
            figures.append(("", "this gradient is zero", palette.warning))
        if self.name_tree.leaf_count:
            figures.append(("of", f"{self.name_tree.leaf_count:,} parameters", palette.dim))
        right = "" if self.sort_key == "model" else f"by {self.sort_key}"
        return [title_line(self, width, "Gradients", figures, right)]

    def _all_updated(self) -> bool:
        """Whether every trainable parameter belongs to an optimizer."""
        info = self.snapshot.info
        if info is not self._info:
            self._info = info
            parameters = info.parameters if info is not None else ()
            self._updated = all(each.optimizer or not each.trainable for each in parameters)
        return self._updated

    def _age(self) -> str:
        """How old the norms are, where measuring was slowed down to stay within the budget."""
        age, every = self.snapshot.status.step - self._gradients.last_step, self._gradients.every
        if age <= 0:
            return ""
        return f"{steps_ago(age)}, every {every:,}" if every > 1 else steps_ago(age)

    def prepare(self, visible: RowIds) -> None:
        """Draw the trends of the visible rows, from one read of the history."""
        rows = visible.tolist()
        if not self._gradients.measured:
            self._trends = {}
            return
        if self.slow_link and self._frames % FRAMES_PER_TREND and rows == self._trend_rows:
            return
        self._trends, self._trend_rows = {}, rows
        parameters = {row: self._parameters_of(row) for row in rows}
        drawn = {row: p for row, p in parameters.items() if len(p) <= MAX_TREND_PARAMETERS}
        if not drawn:
            return
        steps = self._trend_steps()
        window = step_window(self._gradients.last_step, steps, coarse=self.slow_link)
        every = np.concatenate(list(drawn.values())).tolist()
        high, nonfinite = self._gradients.maxima(every, *window, TREND_WIDTH)
        starts = np.cumsum([0, *(len(p) for p in drawn.values())])[:-1]
        sums = np.add.reduceat(np.square(high.astype(np.float64)), starts, axis=0)
        nonfinite = np.logical_or.reduceat(nonfinite, starts, axis=0)
        lines = sparklines(np.sqrt(sums).astype(np.float32), nonfinite, self.glyphs, hold=True)
        self._trends = dict(zip(drawn, lines, strict=True))
        *others, trend = self.columns
        self.columns = (*others, replace(trend, title=f"last {steps:,}"))

    def _parameters_of(self, row: int) -> NDArray[np.int64]:
        return self.name_tree.leaves[row] if self.name_tree.is_module(row) else np.array([row])

    def _trend_steps(self) -> int:
        """Steps that a trend covers: more where the norms are measured less often, so that every
        cell has a value."""
        return max(MIN_TREND_STEPS, int(round_up(2 * self._gradients.every * TREND_WIDTH)))

    def _name_cell(self, row: int) -> Cell:
        tree, glyphs = self.name_tree, self.glyphs
        module = tree.is_module(row)
        style = "strong" if module else self._name_styles.get(tree.names[row], "text")
        if self.sort_key != "model" or self.filter:
            return Cell(f" {tree.names[row]}", style)
        folded = row in tree.folded
        arrow = (glyphs.folded if folded else glyphs.unfolded) if module else " "
        count = f" {len(tree.leaves[row])}" if folded else ""
        label = formatting.parameter_name(tree.labels[row])
        return Cell(f"{'  ' * tree.depths[row]}{arrow} {label}{count}", style)

    def _norm_cell(self, row: int) -> Cell | float | None:
        if not self._measured:
            return None
        norm = float(self._norms[row])
        if norm == 0:
            return Cell(norm, "warning")
        return Cell(norm, "provisional") if self._provisional else norm

    def _share_cell(self, row: int) -> float | None:
        norm = float(self._norms[row])
        finite = np.isfinite(norm) and self._total_norm > 0
        return (norm / self._total_norm) ** 2 if finite else None

    def _trend_cell(self, row: int) -> Cell:
        return Cell(
            self._trends.get(row, ""), "loss_raw" if self.name_tree.is_module(row) else "norm"
        )


def _attention_styles(snapshot: Snapshot) -> dict[str, str]:
    """The styles of the names of Wq, Wk and Wv, which have the same colours everywhere."""
    info = snapshot.info
    if info is None or len(info.attention) > MAX_COLOURED_LAYERS:
        return {}
    styles: dict[str, str] = {}
    for layer in info.attention:
        if layer.kind not in ("fused", "multihead"):  # one parameter holds all three
            styles |= {layer.query: "q", layer.key: "k", layer.value: "v"}
    return styles


class NameTree:
    """Nodes 0 … n-1 are the names, in the given order; further nodes are their modules.

    A module with a single child is merged with it: `head.weight` is one row, not two.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.leaf_count = len(names)
        self.labels: list[str] = list(names)
        """The name of each node relative to its parent."""
        self.depths: list[int] = [0] * self.leaf_count
        self.leaves: dict[int, NodeIds] = {}
        """The leaves of each module."""
        self.folded: set[int] = set()
        self._nodes: list[int] = []
        """All nodes, each before its children."""
        self._subtree_ends: dict[int, int] = {}
        """Module to the index in `_nodes` after its last descendant."""
        self._leaves_of_modules: tuple[NodeIds, NodeIds, NodeIds] | None = None
        self._lowercase_names = tuple(name.lower() for name in names)
        self._add(_nested(names), 0)

    def _add(self, children: dict[str, object], depth: int) -> list[int]:
        """Add the children of one module; returns their leaves."""
        leaves: list[int] = []
        for label, child in children.items():
            while isinstance(child, dict) and len(child) == 1:
                ((below, child),) = child.items()
                label = f"{label}.{below}" if below else label
            if isinstance(child, dict) and all(name.isdigit() for name in child):
                # A list of blocks gets no level of its own: `blocks.0`, `blocks.1`, …
                numbered = {f"{label}.{name}": block for name, block in child.items()}
                leaves += self._add(numbered, depth)
            elif isinstance(child, dict):
                leaves += self._add_module(label, child, depth)
            elif isinstance(child, int):
                self.labels[child], self.depths[child] = label, depth
                self._nodes.append(child)
                leaves.append(child)
        return leaves

    def _add_module(self, label: str, children: dict[str, object], depth: int) -> list[int]:
        node = len(self.labels)
        self.labels.append(label)
        self.depths.append(depth)
        self._nodes.append(node)
        leaves = self._add(children, depth + 1)
        self.leaves[node] = np.array(leaves, np.int64)
        self._subtree_ends[node] = len(self._nodes)
        return leaves

    def is_module(self, node: int) -> bool:
        """Whether a node has children."""
        return node >= self.leaf_count

    def toggle(self, node: int) -> None:
        """Fold or unfold a module."""
        if self.is_module(node):
            self.folded ^= {node}

    def unfold(self, leaf: int) -> None:
        """Unfold the modules that a leaf is in."""
        self.folded -= {module for module, leaves in self.leaves.items() if leaf in leaves}

    def fold_from_depth(self, depth: int) -> None:
        """Fold the modules at `depth` and below it."""
        self.folded = {node for node in self.leaves if self.depths[node] >= depth}

    def visible_count(self, depth: int) -> int:
        """How many nodes are visible after `fold_from_depth(depth)`."""
        return int((np.asarray(self.depths) <= depth).sum())

    def visible(self) -> NodeIds:
        """The nodes that are not inside a folded module, in order."""
        visible: list[int] = []
        index = 0
        while index < len(self._nodes):
            node = self._nodes[index]
            visible.append(node)
            index = self._subtree_ends[node] if node in self.folded else index + 1
        return np.array(visible, np.int64)

    def matching(self, text: str) -> NodeIds:
        """The leaves whose full name contains every word of `text`."""
        words = text.lower().split()
        names = enumerate(self._lowercase_names)
        return np.array([i for i, name in names if all(word in name for word in words)], np.int64)

    def root_sum_squares(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """√Σx² over the leaves of every node, (nodes,): the norm of a module from those of its
        parameters, (leaves,)."""
        squares = np.square(values.astype(np.float64))
        sums = np.empty(len(self.labels))
        sums[: self.leaf_count] = squares
        if self.leaves:
            modules, leaves, starts = self._concatenated_leaves()
            sums[modules] = np.add.reduceat(squares[leaves], starts)
        return np.sqrt(sums)

    def _concatenated_leaves(self) -> tuple[NodeIds, NodeIds, NodeIds]:
        """The modules, the leaves of all of them in one array, and where those of each begin."""
        if self._leaves_of_modules is None:
            leaves = list(self.leaves.values())
            ends = np.cumsum([len(each) for each in leaves])
            starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
            modules = np.array(list(self.leaves), np.int64)
            self._leaves_of_modules = (modules, np.concatenate(leaves), starts)
        return self._leaves_of_modules


def _nested(names: Sequence[str]) -> dict[str, object]:
    """The names as nested dictionaries, with the index of the name at each leaf."""
    root: dict[str, object] = {}
    for index, name in enumerate(names):
        children = root
        *modules, last = name.split(".")
        for module in modules:
            below = children.setdefault(module, {})
            if not isinstance(below, dict):  # a parameter and a module of one name
                below = children[module] = {"": below}
            children = below
        children[last if last not in children else f"{last} "] = index
    return root
