"""The newest values of every attention layer, whichever optimizer's table they are in."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.layers import STATISTICS, attention_tables, layers_in
from tui_trainer.history.table import TableHistory
from tui_trainer.protocol.describe import AttentionInfo
from tui_trainer.session.api import Snapshot
from tui_trainer.ui.panels.base import provisional

Layers = tuple[AttentionInfo, ...]
Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class LayerValues:
    """One statistic table's newest values, in the order of `RunInfo.attention`."""

    values: NDArray[np.float32]
    """(layers, statistics); NaN also where nothing was measured."""
    measured: NDArray[np.bool_]
    """(layers,)"""
    provisional: NDArray[np.bool_]
    """(layers,): whether it is of the step in the making."""

    def value(self, layer: int, statistic: int) -> float | None:
        """None before the first."""
        if layer >= len(self.measured) or not self.measured[layer]:
            return None
        return float(self.values[layer, statistic])


class NewestValues:
    """Reads the tables of one name. Which layers a table has is found out once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._width = len(STATISTICS[name])
        self._known: WeakKeyDictionary[TableHistory, tuple[Layers, Numbers, Numbers]]
        self._known = WeakKeyDictionary()

    def read(self, snapshot: Snapshot) -> LayerValues | None:
        """None before the first row of any."""
        layers = snapshot.info.attention if snapshot.info else ()
        found = LayerValues(
            np.full((len(layers), self._width), np.nan, np.float32),
            np.zeros(len(layers), np.bool_),
            np.zeros(len(layers), np.bool_),
        )
        for history in attention_tables(snapshot.history, self.name):
            fresh, newest = provisional(snapshot, history), history.latest()
            row = fresh if fresh is not None else newest[1] if newest is not None else None
            if row is None:
                continue
            here, there = self._where(history, layers)
            if len(here):
                found.values[here] = row.reshape(-1, self._width)[there]
                found.measured[here] = True
                found.provisional[here] = fresh is not None
        return found if found.measured.any() else None

    def _where(self, history: TableHistory, layers: Layers) -> tuple[Numbers, Numbers]:
        """The layers that this table has: their numbers in the run, and in the table."""
        known = self._known.get(history)
        if known is None or known[0] is not layers:
            columns = layers_in(history)
            here = [n for n, each in enumerate(layers) if each.layer in columns]
            there = [columns[layers[n].layer].start // self._width for n in here]
            known = (layers, np.array(here, np.intp), np.array(there, np.intp))
            self._known[history] = known
        return known[1:]
