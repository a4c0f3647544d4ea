"""Dotted names (`blocks.0.attention.W_query.weight`) as a tree of modules that can be folded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NodeIds = NDArray[np.int64]


class NameTree:
    """Nodes 0 … n-1 are the names, in the given order; further nodes are their modules.

    A module with a single child is merged with it: `head.weight` is one row, not two.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.leaf_count = len(names)
        self.labels: list[str] = list(names)
        """What each node is called under its parent."""
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
        """Add the children of one module; their leaves."""
        leaves: list[int] = []
        for label, child in children.items():
            while isinstance(child, dict) and len(child) == 1:
                ((below, child),) = child.items()
                label = f"{label}.{below}" if below else label
            if isinstance(child, dict) and all(name.isdigit() for name in child):
                # A list of blocks is no level of its own: `blocks.0`, `blocks.1`, …
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
