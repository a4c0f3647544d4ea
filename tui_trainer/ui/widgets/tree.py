"""Dotted names (`blocks.0.attention.W_query.weight`) as a tree whose branches fold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class NameTree:
    """Nodes are numbered so that 0 … n-1 are the leaves (as given) and the rest the branches.

    A branch with one child is joined to it (`head.weight` is one row, not two).
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.leaves = len(names)
        self.labels: list[str] = list(names)
        self.depths: list[int] = [0] * self.leaves
        self.members: dict[int, Ids] = {}
        """Branch to its leaves."""
        self._walk: list[int] = []
        """Every node, parents before their children."""
        self._ends: dict[int, int] = {}
        """Branch to the place in `_walk` after its last descendant."""
        self._sums: tuple[Ids, Ids, Ids] | None = None
        self._lower = tuple(name.lower() for name in names)
        root: dict[str, object] = {}
        for leaf, name in enumerate(names):
            at = root
            *branches, last = name.split(".")
            for part in branches:
                below = at.setdefault(part, {})
                if not isinstance(below, dict):
                    below = at[part] = {"": below}
                at = below
            at[last if last not in at else f"{last} "] = leaf
        self._add(root, 0)
        self.folded: set[int] = set()

    def _add(self, branch: dict[str, object], depth: int) -> list[int]:
        leaves: list[int] = []
        for label, child in branch.items():
            while isinstance(child, dict) and len(child) == 1:
                ((below, child),) = child.items()
                label = f"{label}.{below}" if below else label
            if isinstance(child, dict) and all(name.isdigit() for name in child):
                # A list of blocks is no level of its own: `blocks.0`, `blocks.1`, …
                numbered = {f"{label}.{name}": block for name, block in child.items()}
                leaves += self._add(numbered, depth)
                continue
            if isinstance(child, int):
                self.labels[child], self.depths[child] = label, depth
                self._walk.append(child)
                leaves.append(child)
            elif isinstance(child, dict):
                node = len(self.labels)
                self.labels.append(label)
                self.depths.append(depth)
                self._walk.append(node)
                inside = self._add(child, depth + 1)
                self.members[node] = np.array(inside, np.int64)
                self._ends[node] = len(self._walk)
                leaves += inside
        return leaves

    def is_branch(self, node: int) -> bool:
        """Whether it has children."""
        return node >= self.leaves

    def toggle(self, node: int) -> None:
        """Fold or unfold a branch."""
        if self.is_branch(node):
            self.folded ^= {node}

    def fold_deeper_than(self, depth: int) -> None:
        """Fold every branch at `depth` and below."""
        self.folded = {node for node in self.members if self.depths[node] >= depth}

    def rows_folded_at(self, depth: int) -> int:
        """How many nodes `fold_deeper_than(depth)` leaves in sight, without folding anything."""
        return int((np.asarray(self.depths) <= depth).sum())

    def visible(self) -> Ids:
        """The nodes to show, in order."""
        shown: list[int] = []
        place = 0
        while place < len(self._walk):
            node = self._walk[place]
            shown.append(node)
            place = self._ends[node] if node in self.folded else place + 1
        return np.array(shown, np.int64)

    def matching(self, text: str) -> Ids:
        """The leaves whose whole name holds every word of `text`."""
        words = text.lower().split()
        found = [i for i, name in enumerate(self._lower) if all(word in name for word in words)]
        return np.array(found, np.int64)

    def root_sum_squares(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """√Σx² over each node's leaves, for all nodes: the norm of a module from those of its
        parameters."""
        squares = np.square(values.astype(np.float64))
        every = np.empty(len(self.labels))
        every[: self.leaves] = squares
        if self.members:
            branches, joined, starts = self._joined()
            every[branches] = np.add.reduceat(squares[joined], starts)
        return np.sqrt(every)

    def _joined(self) -> tuple[Ids, Ids, Ids]:
        """The branches, the leaves of all of them in one, and where those of each begin."""
        if self._sums is None:
            members = list(self.members.values())
            ends = np.cumsum([len(leaves) for leaves in members])
            starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
            branches = np.array(list(self.members), np.int64)
            self._sums = (branches, np.concatenate(members), starts)
        return self._sums
