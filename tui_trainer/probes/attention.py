"""How Wq, Wk and Wv of every attention layer grow, turn and drift apart, at every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import Floats
from tui_trainer.probes.attention_layers import Layer, find_layers
from tui_trainer.probes.attention_products import (
    EvenLayers,
    Products,
    UnevenLayers,
    even_products,
    six_products,
)
from tui_trainer.protocol import tables
from tui_trainer.protocol.tables import ATTENTION_STATISTICS, attention_columns
from tui_trainer.tracing.probe import Facts, Gradient, Options, Probe, Readings, TableSpec
from tui_trainer.tracing.subject import Subject

NO_LAYERS = "no attention layer was found by its parameters' names"


class Attention(Probe):
    """Table `attention`: the statistics of `tables.ATTENTION_STATISTICS` for each layer.

    Weights are those after the step, their drift is from what they were when the optimizer was
    first seen (before its first step); gradients are those before clipping. A cosine with a matrix
    that is zero, or a comparison that has no meaning (see `AttentionInfo.note`), is NaN.
    """

    name = tables.ATTENTION
    importance = 40

    def __init__(self, subject: Subject, options: Options) -> None:
        super().__init__(subject, options)
        self.layers = find_layers(subject, options.attention_pattern)
        if not self.layers:
            self.unseen = NO_LAYERS
            return
        self.attention = tuple(layer.info(subject.names) for layer in self.layers)
        paths = tuple(layer.path for layer in self.layers)
        self.tables = (TableSpec(tables.ATTENTION, attention_columns(paths, ATTENTION_STATISTICS)),)
        self._even = EvenLayers(self.layers, self._weight, subject.device)
        self._uneven = UnevenLayers(self.layers, self._weight, subject.device)
        self._sizes = np.array(
            [[p.rows * p.columns for p in layer.parts] for layer in self.layers], np.float64
        )
        self._repeats = _repeats(self.layers)
        self._gradients: Sequence[Gradient] = ()
        norms = np.sqrt(_diagonal(self._products_at_start()))
        self._growth_at_start = _growth(norms)

    def _weight(self, position: int) -> torch.Tensor:
        return self.subject.parameters[position].detach()

    def gradients(self, gradients: Sequence[Gradient]) -> Readings:
        """Inner products between the gradients of each layer."""
        self._gradients = gradients
        even = self._even.read_gradients(lambda i: gradients[i])
        uneven = self._uneven.read_gradients(lambda i: gradients[i])
        return [*even, *uneven]

    def after_update(self) -> Readings:
        """Inner products, sums and drift of the weights."""
        even = self._even.read_weights(self._weight)
        return [*even, *self._uneven.read_weights(self._weight)]

    def rows(self, values: Floats, facts: Facts) -> Sequence[Floats | None]:
        """Statistics from products."""
        count = len(self.layers)
        reader = _Reader(values)
        gradients = np.full((count, 3, 3), np.nan)
        for block in self._even.blocks:
            gradients[block.layers] = reader.take(9 * len(block.layers)).reshape(-1, 3, 3)
        for index in self._uneven.indices:
            six_products(reader.take(6), index, gradients)
        weights = np.full((count, 3, 3), np.nan)
        sums, drift = np.empty((count, 3)), np.empty((count, 3))
        for block in self._even.blocks:
            size = len(block.layers)
            weights[block.layers] = reader.take(9 * size).reshape(-1, 3, 3)
            sums[block.layers] = reader.take(3 * size).reshape(-1, 3)
            drift[block.layers] = reader.take(3 * size).reshape(-1, 3)
        for index in self._uneven.indices:
            six_products(reader.take(6), index, weights)
            sums[index], drift[index] = reader.take(3), reader.take(3)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self._statistics(weights, sums, drift, gradients),)

    def _statistics(
        self,
        weights: Products,
        sums: NDArray[np.float64],
        drift: NDArray[np.float64],
        gradients: Products,
    ) -> Floats:
        dots, squares, of_a, of_b = _paired(weights, self._repeats)
        norms = np.sqrt(squares)
        mean = sums / self._sizes
        variance = (squares - sums * mean) / np.maximum(self._sizes - 1, 1)
        gradient_dots, _, g_a, g_b = _paired(gradients, self._repeats)
        columns = [
            norms,
            mean,
            np.sqrt(np.maximum(variance, 0.0)),
            dots / np.sqrt(of_a * of_b),
            np.sqrt(np.maximum(1 - 2 * dots / (of_a + of_b), 0.0)),  # ‖a−b‖² = ‖a‖²+‖b‖²−2⟨a,b⟩
            drift / self._norms_at_start,
            gradient_dots / np.sqrt(g_a * g_b),
            (_growth(norms) / self._growth_at_start)[:, None],
        ]
        return np.concatenate(columns, axis=1).astype(np.float32).reshape(-1)

    def _products_at_start(self) -> Products:
        found = np.full((len(self.layers), 3, 3), np.nan)
        even = [r.cpu().numpy().astype(np.float64) for r in self._even.read_start()]
        if even:
            even_products(np.concatenate(even), self._even, found)
        uneven = [float(r) for r in self._uneven.read_start()]
        for number, index in enumerate(self._uneven.indices):
            six_products(np.array(uneven[6 * number : 6 * number + 6]), index, found)
        self._norms_at_start = np.sqrt(_diagonal(found))
        return found


class _Reader:
    """Takes values from the front."""

    def __init__(self, values: Floats) -> None:
        self._values = values.astype(np.float64)
        self._position = 0

    def take(self, count: int) -> NDArray[np.float64]:
        taken = self._values[self._position : self._position + count]
        self._position += count
        return taken


def _repeats(layers: Sequence[Layer]) -> NDArray[np.float64]:
    """(layers, 3): how often the second matrix stands in the comparisons qk, qv and kv."""
    return np.array([[layer.group, layer.group, 1.0] for layer in layers])


def _diagonal(products: Products) -> NDArray[np.float64]:
    return products[:, [0, 1, 2], [0, 1, 2]]


def _paired(products: Products, repeats: NDArray[np.float64]) -> tuple[Products, ...]:
    """(layers, 3) each: ⟨a,b⟩ of qk, qv and kv; ‖W‖² of q, k and v; ‖a‖² and ‖b‖² of the pairs,
    the shared heads repeated where Q is compared."""
    dots = products[:, [0, 0, 1], [1, 2, 2]]
    squares = _diagonal(products)
    return dots, squares, squares[:, [0, 0, 1]], squares[:, [1, 2, 2]] * repeats


def _growth(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖Wq‖‖Wk‖ / ‖Wv‖ of each layer."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return norms[:, 0] * norms[:, 1] / norms[:, 2]
