"""The statistics of Wq, Wk and Wv: meaning, healthy range, location of the values, and format."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from tui_trainer.client.api import Snapshot
from tui_trainer.history.columns import (
    STATISTICS,
    LayerLocation,
    attention_tables,
    layers_in,
    location_of,
)
from tui_trainer.history.healthy_ranges import HealthyRange
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.absent import Absent, why_absent
from tui_trainer.protocol.schema import AttentionInfo
from tui_trainer.ui.panels.base import newest_row
from tui_trainer.ui.widgets.chart import ChartCurve
from tui_trainer.ui.widgets.table import NOT_COMPARABLE, Cell

MATRICES = ("q", "k", "v")
PAIRS = ("qk", "qv", "kv")
LAYER = ("",)
"""The only part of a statistic of the layer as a whole."""
PART_STYLES = {"q": "q", "k": "k", "v": "v", "qk": "qk", "qv": "qv", "kv": "kv", "": "norm"}
"""Wq, Wk and Wv have the same colours everywhere; pairs have colours of their own."""

NO_ATTENTION = "no attention layer was found in this model"


@dataclass(frozen=True)
class Statistic:
    """One quantity of every attention layer: of q, k and v, of their pairs, or of the layer."""

    key: str
    title: str
    table: str
    parts: tuple[str, ...]
    meaning: str
    healthy: str
    signed: bool = False
    short_title: str = ""
    """Title where there is little room; "" for the title itself."""
    band: HealthyRange | None = None
    """The range of healthy values, if there is one; others are coloured."""

    @property
    def label(self) -> str:
        """The short title."""
        return self.short_title or self.title

    def column(self, part: str) -> str:
        """Name of the column of a part."""
        return f"{self.key}_{part}" if part else self.key

    def index(self, part: str) -> int:
        """Index of the column of a part among those of one layer."""
        return STATISTICS[self.table].index(self.column(part))

    def location(self, snapshot: Snapshot, layer: AttentionInfo) -> LayerLocation | None:
        """The location of a layer's values, in the table of the optimizer that trains the layer."""
        return location_of(snapshot.history, self.table, layer.layer)

    def curves(self, layer: AttentionInfo, location: LayerLocation) -> list[ChartCurve]:
        """The curves of a layer, without pairs that cannot be compared."""
        return [
            ChartCurve(part, PART_STYLES[part], location.columns[self.index(part)])
            for part in self.parts
            if layer.comparable(part)
        ]

    def format(self, value: float | None, width: int) -> str:
        """`value` in exactly `width` cells; cosines with their sign."""
        if self.signed:
            return formatting.signed(value, width, 4 if width > 7 else 3)
        return formatting.number(value, width, 4 if width > 6 else 3)


SHOWN_STATISTICS = (
    Statistic(
        "drift", "drift", schema.ATTENTION, MATRICES,
        "‖W−W₀‖/‖W₀‖: how far each matrix has moved from its initialization",
        "rises fast, then levels off; q and k alike, v more slowly",
    ),
    Statistic(
        "cos", "cosine", schema.ATTENTION, PAIRS,
        "⟨Wa,Wb⟩/(‖Wa‖‖Wb‖): 1 same direction, 0 unrelated, as at a random start",
        "near 0, up to ±0.7; q and k may align slowly, a jump is suspicious", True, "cos",
        HealthyRange(-0.7, 0.7),
    ),
    Statistic(
        "distance", "distance", schema.ATTENTION, PAIRS,
        "‖Wa−Wb‖/√(‖Wa‖²+‖Wb‖²): 1 for unrelated matrices, 0 for equal ones",
        "near 1; below 0.5 two projections do much the same work",
        band=HealthyRange(low=0.5),
    ),
    Statistic(
        "norm", "norm", schema.ATTENTION, MATRICES,
        "‖W‖ (Frobenius): the size of each projection",
        "grows slowly; runaway q and k norms blow up the logits",
    ),
    Statistic(
        "grad_cos", "∇ cosine", schema.ATTENTION, PAIRS,
        "the cosine between the gradients of two projections",
        "noise around 0; lasting + aligns the two weights, − separates them", True, "∇cos",
    ),
    Statistic(
        "growth", "growth", schema.ATTENTION, LAYER,
        "‖Wq‖‖Wk‖/‖Wv‖ relative to the start: early sign of a logit blow-up",
        "1 to 40; a steep rise comes before entropy collapses",
        band=HealthyRange(high=40),
    ),
    Statistic(
        "sigma_max", "σ max", schema.ATTENTION_SPECTRUM, MATRICES,
        "the largest singular value: the most the matrix can stretch a vector",
        "grows slowly; a sudden rise in one matrix is a spectral spike",
    ),
    Statistic(
        "stable_rank", "stable rank", schema.ATTENTION_SPECTRUM, MATRICES,
        "‖W‖²/σ_max²: how many directions dominate; robust to small ones",
        "falls as structure is learned; below 1.1 a single direction dominates",
        band=HealthyRange(low=1.1),
    ),
    Statistic(
        "effective_rank", "effective rank", schema.ATTENTION_SPECTRUM, MATRICES,
        "exp(entropy of σ/Σσ), Roy & Vetterli 2007: how many directions are used",
        "a good share of the width; a collapse loses capacity",
    ),
    Statistic(
        "max_logit", "max logit", schema.ATTENTION_HEALTH, LAYER,
        "the largest attention logit q·k/√d of a sampled batch",
        "below 50; beyond it softmax saturates and gradients vanish",
        band=HealthyRange(high=50),
    ),
    Statistic(
        "entropy", "entropy", schema.ATTENTION_HEALTH, LAYER,
        "mean entropy of the attention rows in nats: how spread out attention is",
        "0.1 to ln of the context length (uniform); near 0: one token only",
        band=HealthyRange(low=0.1),
    ),
    Statistic(
        "cos_qk_activations", "cos(q, k)", schema.ATTENTION_HEALTH, LAYER,
        "mean cosine between queries and keys (activations, not weights)",
        "small; above 0.9 every query attends to all keys alike", True,
        band=HealthyRange(-0.9, 0.9),
    ),
    Statistic(
        "std", "std", schema.ATTENTION, MATRICES,
        "standard deviation of the matrix entries",
        "starts at the value of the initialization and follows the norm",
    ),
    Statistic(
        "mean", "mean", schema.ATTENTION, MATRICES,
        "mean of the matrix entries",
        "stays near 0; a lasting offset is unusual", True,
    ),
)  # fmt: skip
"""Statistics in the order in which they are offered."""
BY_KEY = {statistic.key: statistic for statistic in SHOWN_STATISTICS}


def short_layer_name(layer: AttentionInfo) -> str:
    """`blocks.0` for `blocks.0.attention`, since the last part is the same in every layer."""
    head, _, last = layer.layer.rpartition(".")
    return head if head and not last.isdigit() else layer.layer


def layer_label(layer: AttentionInfo) -> str:
    """The short name, with an asterisk if there is a note on the layer."""
    return f"{short_layer_name(layer)}*" if layer.note else short_layer_name(layer)


def missing_statistic_message(statistic: Statistic, snapshot: Snapshot, optimizer: str = "") -> str:
    """Why `statistic` has no values for the layers that `optimizer` trains (as `Table.optimizer`
    names it)."""
    info = snapshot.info
    if info is not None:
        name = optimizer or next(iter(info.optimizers), "")
        for key in (
            statistic.table,
            f"{statistic.table}@{name}",
            statistic.column(statistic.parts[0]),
            "attention",
        ):
            if key in info.unseen:
                return info.unseen[key]
        if snapshot.status.step and not info.attention:
            return NO_ATTENTION
    if snapshot.status.ended:
        return "the run ended before this was measured"
    if snapshot.status.step and statistic.table != schema.ATTENTION:
        return "no value yet: it is measured occasionally, more often while this screen is open"
    return "waiting for the first step"


Layers = tuple[AttentionInfo, ...]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class LayerValues:
    """The newest values of one table for every attention layer, in the order of
    `RunInfo.attention`."""

    values: NDArray[np.float32]
    """(layers, statistics); also nan where nothing was measured."""
    measured: NDArray[np.bool_]
    """(layers,)"""
    provisional: NDArray[np.bool_]
    """(layers,): whether the values are those of an unfinished step."""

    def cell(self, layer: AttentionInfo, row: int, statistic: Statistic, part: str) -> Cell | None:
        """The table cell with the value of one layer; None before the first measurement."""
        if row >= len(self.measured) or not self.measured[row]:
            return None
        value = float(self.values[row, statistic.index(part)])
        not_comparable = why_absent(value) is Absent.NOT_COMPARABLE
        if not_comparable or (value != value and not layer.comparable(part)):
            return Cell(NOT_COMPARABLE, "dim")
        if statistic.band is not None and not statistic.band.holds(value):
            return Cell(value, "warning")
        return Cell(value, "provisional" if self.provisional[row] else PART_STYLES[part])


class LayerValuesReader:
    """Reads the newest values from all tables of one name; caches which layers each table has."""

    def __init__(self, table: str) -> None:
        self.table = table
        self._width = len(STATISTICS[table])
        self._known: WeakKeyDictionary[SeriesReader, tuple[Layers, Indices, Indices]]
        self._known = WeakKeyDictionary()

    def read(self, snapshot: Snapshot) -> LayerValues | None:
        """None before the first row of any table."""
        layers = snapshot.info.attention if snapshot.info else ()
        found = LayerValues(
            np.full((len(layers), self._width), np.nan, np.float32),
            np.zeros(len(layers), np.bool_),
            np.zeros(len(layers), np.bool_),
        )
        for series in attention_tables(snapshot.history, self.table):
            row, provisional = newest_row(snapshot, series)
            if row is None:
                continue
            in_run, in_table = self._indices(series, layers)
            if len(in_run):
                found.values[in_run] = row.reshape(-1, self._width)[in_table]
                found.measured[in_run] = True
                found.provisional[in_run] = provisional
        return found if found.measured.any() else None

    def _indices(self, series: SeriesReader, layers: Layers) -> tuple[Indices, Indices]:
        """The layers of a table: their indices in the run, and in the table."""
        known = self._known.get(series)
        if known is None or known[0] is not layers:
            columns = layers_in(series)
            in_run = [n for n, layer in enumerate(layers) if layer.layer in columns]
            in_table = [columns[layers[n].layer].start // self._width for n in in_run]
            known = (layers, np.array(in_run, np.intp), np.array(in_table, np.intp))
            self._known[series] = known
        return known[1:]
