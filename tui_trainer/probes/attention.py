"""How Wq, Wk and Wv of every attention layer grow, turn and drift apart, at every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import Floats
from tui_trainer.probes.attention_layers import Layer, find_layers
from tui_trainer.probes.attention_products import SQUARES, EvenLayers, UnevenLayers, order_of
from tui_trainer.protocol import tables
from tui_trainer.protocol.tables import ATTENTION_STATISTICS, attention_columns
from tui_trainer.tracing.probe import Facts, Gradient, Options, Probe, Readings, TableSpec
from tui_trainer.tracing.subject import Subject


class Attention(Probe):
    """Table `attention`: the statistics of `tables.ATTENTION_STATISTICS` for each layer.

    Weights are those after the step, their drift is from what they were when the optimizer was
    first seen (before its first step); gradients are those before clipping. A cosine with a matrix
    that is zero, or a comparison that has no meaning (see `AttentionInfo.note`), is NaN.
    """

    name = tables.ATTENTION
    importance = 40
    furthest = 64
    lasting = True

    def __init__(self, subject: Subject, options: Options) -> None:
        super().__init__(subject, options)
        found = find_layers(subject, options.attention_pattern)
        self.layers, self.unseen = found.layers, found.nothing
        if self.unseen:
            return
        self.left_out = found.remark
        self.attention = tuple(layer.info(subject.names) for layer in self.layers)
        paths = tuple(layer.path for layer in self.layers)
        self.tables = (TableSpec(tables.ATTENTION, attention_columns(paths, ATTENTION_STATISTICS)),)
        self._even = EvenLayers(self.layers, self._weight, subject.device)
        self._uneven = UnevenLayers(self.layers, self._weight, subject.device)
        self._sizes = np.array(
            [[p.rows * p.columns for p in layer.parts] for layer in self.layers], np.float64
        )
        self._repeats = _repeats(self.layers)
        self._order = order_of(self._even, self._uneven)
        at_start = np.concatenate(
            [r.reshape(-1).cpu().numpy() for r in (*self.gradients(()), *self.after_update())]
        )
        self._norms_at_start = np.sqrt(
            at_start.astype(np.float64)[self._order][:, 9:18][:, SQUARES]
        )
        self._growth_at_start = _growth(self._norms_at_start)

    def _weight(self, position: int) -> torch.Tensor:
        return self.subject.parameters[position].detach()

    def gradients(self, gradients: Sequence[Gradient]) -> Readings:
        """Inner products between the gradients of each layer."""

        def source(position: int) -> Gradient:
            return gradients[position] if gradients else None

        return [*self._even.read_gradients(source), *self._uneven.read_gradients(source)]

    def after_update(self) -> Readings:
        """Inner products, sums and drift of the weights."""
        even = self._even.read_weights(self._weight)
        return [*even, *self._uneven.read_weights(self._weight)]

    def rows(self, values: Floats, facts: Facts) -> Sequence[Floats | None]:
        """Statistics from products."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self._statistics(values.astype(np.float64)[self._order]),)

    def _statistics(self, read: NDArray[np.float64]) -> Floats:
        """`read` (layers, 24) in the order of `attention_products.order_of`."""
        gradients, weights, sums, drift = read[:, :9], read[:, 9:18], read[:, 18:21], read[:, 21:]
        norms = np.sqrt(weights[:, SQUARES])
        mean = sums / self._sizes
        variance = (weights[:, SQUARES] - sums * mean) / np.maximum(self._sizes - 1, 1)
        dots, of_a, of_b = self._pairs(weights)
        gradient_dots, of_ga, of_gb = self._pairs(gradients)
        columns = [
            norms,
            mean,
            np.sqrt(np.maximum(variance, 0.0)),
            dots / np.sqrt(of_a * of_b),
            np.sqrt(np.maximum(1 - 2 * dots / (of_a + of_b), 0.0)),  # ‖a−b‖² = ‖a‖²+‖b‖²−2⟨a,b⟩
            drift / self._norms_at_start,
            gradient_dots / np.sqrt(of_ga * of_gb),
            (_growth(norms) / self._growth_at_start)[:, None],
        ]
        return np.concatenate(columns, axis=1).astype(np.float32).reshape(-1)

    def _pairs(self, products: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """(layers, 9) → (layers, 3) each: ⟨a,b⟩, ‖a‖² and ‖b‖² of qk, qv and kv, a shared head
        counted as often as it is compared."""
        return (
            products[:, [1, 2, 5]],
            products[:, [0, 0, 4]],
            products[:, [4, 8, 8]] * self._repeats,
        )


def _repeats(layers: Sequence[Layer]) -> NDArray[np.float64]:
    """(layers, 3): how often the second matrix stands in the comparisons qk, qv and kv."""
    return np.array([[layer.group, layer.group, 1.0] for layer in layers])


def _growth(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖Wq‖‖Wk‖ / ‖Wv‖ of each layer."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return norms[:, 0] * norms[:, 1] / norms[:, 2]
