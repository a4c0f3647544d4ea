"""Measures Wq, Wk and Wv of every attention layer: norms, cosines, distances, drift.

Layers whose three matrices have the same shape are copied into one float32 block of shape
(layers, 3, elements), so that a single batched product computes all norms and inner products of a
model: at nanoGPT's CPU size this takes 0.07 ms, where one call per quantity takes 0.3 ms. The size
of a block is bounded, and blocks are kept between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import Floats
from tui_trainer.probes.attention.layers import AttentionLayer, Projection, find_layers
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import ATTENTION_STATISTICS, attention_columns
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import (
    Gradient,
    Probe,
    ProbeOptions,
    Readings,
    StepFacts,
    TableSpec,
    Values,
)
from tui_trainer.trace.torch_private import copy_each

BLOCK_BYTES = 32 * 1024 * 1024
Source = Callable[[int], torch.Tensor | None]
"""Returns a parameter, or its gradient, by position."""
SQUARES = np.array([0, 4, 8])
"""‖Wq‖², ‖Wk‖² and ‖Wv‖² among the nine products of a layer."""
OF_BOTH, OF_A, OF_B = np.array([1, 2, 5]), np.array([0, 0, 4]), np.array([4, 8, 8])
"""⟨a,b⟩, ‖a‖² and ‖b‖² of qk, qv and kv among the nine products."""
IN_ROWS = np.concatenate(
    [
        *(first + each for first in (9, 0) for each in (OF_BOTH, OF_A, OF_B)),
        *(np.arange(18, 24), 9 + SQUARES),
    ]
)
"""Columns of `order_of`: ⟨a,b⟩, ‖a‖² and ‖b‖² of weights and of gradients, sums, drifts, ‖W‖²."""


@dataclass
class ProductBlock:
    """Layers whose products are computed together."""

    layers: list[int]
    """Positions among all layers."""
    work: torch.Tensor
    """(layers, 3, elements), float32; overwritten at each use."""
    start: torch.Tensor
    """Like `work`, with the weights at the start."""
    positions: list[int]
    """Positions of the parameters, in the order of `work`."""
    parts: list[Projection]
    """The matrices, in the order of `work`."""
    parameters: list[torch.Tensor]
    """The parameters at `positions`; empty where one of the weights is not a parameter."""
    matrices: torch.Tensor | None = None
    """`work` as (3 · layers, *shape), where each matrix is a whole parameter of one shape."""
    where: list[int] = field(default_factory=list)
    """Addresses of the weights that `views` belong to; empty where `views` has copies."""
    views: list[torch.Tensor] = field(default_factory=list)
    """The matrices, flattened, in the order of `work`."""


class EvenLayers:
    """The layers in which Wq, Wk and Wv have one shape."""

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        start: Source,
        device: torch.device,
        parameters: Sequence[torch.Tensor] = (),
    ) -> None:
        """`start`: returns the weights from which drift is measured. `parameters`: parameters that
        are weights themselves."""
        self.layers = layers
        self._parameters = parameters
        self._by_product = device.type == "cpu"
        self.blocks: list[ProductBlock] = []
        by_size: dict[int, list[int]] = {}
        for index, layer in enumerate(layers):
            if layer.even:
                by_size.setdefault(layer.q.rows * layer.q.columns, []).append(index)
        for size, members in by_size.items():
            at_once = max(1, BLOCK_BYTES // (12 * size))
            for first in range(0, len(members), at_once):
                self.blocks.append(self._block(members[first : first + at_once], size, device))
        for block in self.blocks:
            self._fill_weights(block, start)
            block.start.copy_(block.work)

    def _block(self, members: list[int], size: int, device: torch.device) -> ProductBlock:
        shape = (len(members), 3, size)
        work = torch.empty(shape, dtype=torch.float32, device=device)
        parts = [part for index in members for part in self.layers[index].parts]
        positions = [part.parameter for part in parts]
        all_known = max(positions) < len(self._parameters)
        parameters = [self._parameters[p] for p in positions] if all_known else []
        block = ProductBlock(members, work, torch.empty_like(work), positions, parts, parameters)
        sizes = {parameter.shape for parameter in parameters}
        one = sizes.pop() if len(sizes) == 1 else torch.Size()
        if len(one) == 2 and one.numel() == size and all(p.first is not None for p in parts):
            block.matrices = work.view(-1, *one)
        return block

    def _fill_weights(self, block: ProductBlock, weight: Source) -> None:
        """Copy weights into a block, by views that are kept while the addresses stay the same."""
        if block.where and list(map(torch.Tensor.data_ptr, block.parameters)) == block.where:
            self._copy(block, block.views)
            return
        weights = [weight(position) for position in block.positions]
        where = [0 if tensor is None else tensor.data_ptr() for tensor in weights]
        if where != block.where:
            pairs = [(p, t) for p, t in zip(block.parts, weights, strict=True) if t is not None]
            block.views = [part.flat(tensor) for part, tensor in pairs]
            views = all(part.lies_in(tensor) for part, tensor in pairs)
            block.where = where if views else []  # a copy would not follow the weights
        self._copy(block, block.views)

    def _fill(self, block: ProductBlock, gradients: Sequence[Gradient]) -> bool:
        if block.matrices is not None and gradients:
            try:
                whole = [gradients[position] for position in block.positions]
                torch.stack(whole, out=block.matrices)  # type: ignore[arg-type]
            except (TypeError, RuntimeError):  # absent, of another dtype or layout, …
                pass
            else:
                return True
        size = block.work.shape[-1]
        views: list[torch.Tensor] = []
        for part in block.parts:
            gradient = gradients[part.parameter] if part.parameter < len(gradients) else None
            if gradient is None:
                return False
            if gradient.numel() == size and part.first is not None and gradient.is_contiguous():
                views.append(gradient.view(-1))
            else:
                views.append(part.flat(gradient))
        self._copy(block, views)
        return True

    def _copy(self, block: ProductBlock, views: list[torch.Tensor]) -> None:
        target = block.work.view(-1, block.work.shape[-1])
        if views[0].dtype == torch.float32:
            torch.stack(views, out=target)
        else:
            copy_each(target.unbind(0), views)

    def read_weights(self, weight: Source) -> list[torch.Tensor]:
        """For each block Σ⟨a,b⟩ (9 per layer), Σw (3) and ‖W−W₀‖ (3), each a vector."""
        readings: list[torch.Tensor] = []
        for block in self.blocks:
            self._fill_weights(block, weight)
            readings.append(self._products(block.work))
            readings.append(block.work.sum(-1).view(-1))
            # Subtract first: computed from norms and products, the small difference would cancel.
            torch.sub(block.work, block.start, out=block.work)
            readings.append(torch.linalg.vector_norm(block.work, dim=-1).view(-1))
        return readings

    def read_gradients(self, gradients: Sequence[Gradient]) -> list[torch.Tensor]:
        """For each block ⟨a,b⟩ (9 per layer), nan where a gradient is absent."""
        return [
            self._products(block.work)
            if self._fill(block, gradients)
            else block.work.new_full((9 * len(block.layers),), torch.nan)
            for block in self.blocks
        ]

    def _products(self, matrices: torch.Tensor) -> torch.Tensor:
        """(layers, 3, n) → (9 · layers,), in full float32 precision.

        A matrix product is fastest on a CPU, but may be configured to use less than float32.
        """
        if self._by_product and torch.get_float32_matmul_precision() == "highest":
            return torch.bmm(matrices, matrices.transpose(1, 2)).view(-1)
        products = [
            (matrices[:, a] * matrices[:, b]).sum(-1) for a in range(3) for b in range(a, 3)
        ]
        full = [products[_UPPER[a][b]] for a in range(3) for b in range(3)]
        return torch.stack(full, dim=-1).view(-1)


_UPPER = ((0, 1, 2), (1, 3, 4), (2, 4, 5))


class UnevenLayers:
    """The other layers (grouped queries, different input widths), one at a time.

    With grouped queries Wk counts once for each query head that shares it: ⟨Wq, Wk⟩ is summed over
    the query heads.
    """

    def __init__(
        self, layers: Sequence[AttentionLayer], start: Source, device: torch.device
    ) -> None:
        self._layers = [layer for layer in layers if not layer.even]
        self.indices = [index for index, layer in enumerate(layers) if not layer.even]
        self._nan = torch.full((), torch.nan, device=device)
        self._start = [
            [part.view(start(part.parameter)).float().clone() for part in layer.parts]  # type: ignore[arg-type]
            for layer in self._layers
        ]

    def read_weights(self, weight: Source) -> list[torch.Tensor]:
        """For each layer ⟨a,b⟩ (6: qq qk qv kk kv vv), Σw (3), ‖W−W₀‖ (3)."""
        readings: list[torch.Tensor] = []
        for layer, start in zip(self._layers, self._start, strict=True):
            matrices = self._matrices(layer, weight)
            readings += self._six(layer, matrices)
            readings += [self._nan if m is None else m.sum() for m in matrices]
            readings += [
                self._nan if m is None else torch.linalg.vector_norm(m - before)
                for m, before in zip(matrices, start, strict=True)
            ]
        return readings

    def read_gradients(self, gradient: Source) -> list[torch.Tensor]:
        """For each layer ⟨a,b⟩ (6)."""
        return [
            r for layer in self._layers for r in self._six(layer, self._matrices(layer, gradient))
        ]

    def _matrices(self, layer: AttentionLayer, source: Source) -> list[torch.Tensor | None]:
        tensors = [source(part.parameter) for part in layer.parts]
        return [
            None if t is None else part.view(t).float()
            for t, part in zip(tensors, layer.parts, strict=True)
        ]

    def _six(self, layer: AttentionLayer, m: list[torch.Tensor | None]) -> list[torch.Tensor]:
        q, k, v = m
        without = layer.incomparable
        summed = None
        if q is not None and not {"qk", "qv"} <= set(without):
            summed = _sum_over_group(layer, q)

        def dot(a: torch.Tensor | None, b: torch.Tensor | None, pair: str = "") -> torch.Tensor:
            return self._nan if a is None or b is None or pair in without else (a * b).sum()

        return [
            *(dot(q, q), dot(summed, k, "qk"), dot(summed, v, "qv")),
            *(dot(k, k), dot(k, v, "kv"), dot(v, v)),
        ]


def _sum_over_group(layer: AttentionLayer, q: torch.Tensor) -> torch.Tensor:
    """Wq (heads · d, in) summed over the query heads of each key/value head."""
    if layer.group == 1 or not layer.heads or not layer.key_value_heads:
        return q
    each = q.shape[0] // layer.heads
    grouped = q.reshape(layer.key_value_heads, layer.group, each, -1)
    return grouped.sum(1).reshape(layer.key_value_heads * each, -1)


def order_of(even: EvenLayers, uneven: UnevenLayers) -> NDArray[np.intp]:
    """(layers, 24): where the values of each layer are in the readings of gradients and weights.

    For each layer nine products of gradients, nine of weights (3×3 matrices over q, k, v by rows),
    three sums and three drifts.
    """
    order = np.empty((len(even.layers), 24), dtype=np.intp)
    position = 0

    def take(layers: list[int], columns: slice, pick: list[int]) -> None:
        nonlocal position
        for layer in layers:
            order[layer, columns] = position + np.array(pick)
            position += max(pick) + 1

    nine, six, three = list(range(9)), [0, 1, 2, 1, 3, 4, 2, 4, 5], [0, 1, 2]
    for block in even.blocks:
        take(block.layers, slice(0, 9), nine)
    for index in uneven.indices:
        take([index], slice(0, 9), six)
    for block in even.blocks:
        take(block.layers, slice(9, 18), nine)
        take(block.layers, slice(18, 21), three)
        take(block.layers, slice(21, 24), three)
    for index in uneven.indices:
        take([index], slice(9, 18), six)
        take([index], slice(18, 21), three)
        take([index], slice(21, 24), three)
    return order


class AttentionWeights(Probe):
    """Table `attention`: the statistics of `schema.ATTENTION_STATISTICS` for each layer.

    Weights are those after the step, their drift is measured from the weights before the
    optimizer's first step, and gradients are those before clipping. A cosine with a zero matrix, or
    a comparison that has no meaning (see `AttentionInfo.note`), is nan.
    """

    name = schema.ATTENTION
    importance = 40
    max_stretch = 64
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        found = find_layers(tracked, options.attention_pattern)
        self.layers, self.unseen = found.layers, found.nothing
        if self.unseen:
            return
        self.partly_unseen = found.remark
        self.attention = tuple(layer.info(tracked.weight_names) for layer in self.layers)
        paths = tuple(layer.path for layer in self.layers)
        self.tables = (TableSpec(schema.ATTENTION, attention_columns(paths, ATTENTION_STATISTICS)),)
        self._even = EvenLayers(
            self.layers,
            tracked.weight_at_start,
            tracked.device,
            () if tracked.sharded else tracked.parameters,
        )
        self._uneven = UnevenLayers(self.layers, tracked.weight_at_start, tracked.device)
        self._sizes = np.array(
            [[p.rows * p.columns for p in layer.parts] for layer in self.layers], np.float64
        ).T
        self._freedom = np.maximum(self._sizes - 1, 1)
        repeats = _repeats(self.layers).T
        self._repeats = None if (repeats == 1).all() else np.stack((repeats, repeats))
        order = order_of(self._even, self._uneven)
        self._order = order[:, IN_ROWS].T.copy()
        at_start = np.concatenate(
            [
                torch.as_tensor(r).reshape(-1).cpu().numpy()
                for r in (*self.gradients(()), *self._read(tracked.weight_at_start))
            ]
        )
        self._norms_at_start = np.sqrt(at_start.astype(np.float64)[order[:, 9 + SQUARES].T])
        with np.errstate(divide="ignore", invalid="ignore"):
            self._growth_at_start = _growth(self._norms_at_start)

    def gradients(self, gradients: Sequence[Gradient]) -> Readings:
        """Inner products between the gradients of each layer."""
        even = self._even.read_gradients(gradients)
        if not self._uneven.indices:
            return even

        def source(position: int) -> Gradient:
            return gradients[position] if position < len(gradients) else None

        return [*even, *self._uneven.read_gradients(source)]

    def after_update(self) -> Readings:
        """Inner products, sums and drift of the weights."""
        return self._read(self.tracked.weight)

    def _read(self, weight: Source) -> list[torch.Tensor]:
        even = self._even.read_weights(weight)
        return [*even, *self._uneven.read_weights(weight)] if self._uneven.indices else even

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self._statistics(values[self._order]),)

    def _statistics(self, read: NDArray[np.float64]) -> Floats:
        """`read` is (27, layers), in the order of IN_ROWS."""
        sums, drift, squares = read[18:21], read[21:24], read[24:]
        # For weights and gradients at once: (2, 3, layers) each.
        dots, of_a, of_b = read[:18].reshape(2, 3, 3, -1).swapaxes(0, 1)
        if self._repeats is not None:
            of_b = of_b * self._repeats
        norms = np.sqrt(squares)
        mean = sums / self._sizes
        variance = (squares - sums * mean) / self._freedom
        cosines = dots / np.sqrt(of_a * of_b)
        # ‖a−b‖² = ‖a‖²+‖b‖²−2⟨a,b⟩
        distances = np.sqrt(np.maximum(1 - 2 * dots[0] / (of_a[0] + of_b[0]), 0.0))
        columns = (
            norms,
            mean,
            np.sqrt(np.maximum(variance, 0.0)),
            cosines[0],
            distances,
            drift / self._norms_at_start,
            cosines[1],
            (_growth(norms) / self._growth_at_start)[None],
        )
        return np.concatenate(columns).T.astype(np.float32).reshape(-1)


def _repeats(layers: Sequence[AttentionLayer]) -> NDArray[np.float64]:
    """(layers, 3): how often the second matrix counts in the comparisons qk, qv and kv. In qk and
    qv a shared head counts once for each of its query heads."""
    return np.array([[layer.group, layer.group, 1.0] for layer in layers])


def _growth(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖Wq‖‖Wk‖ / ‖Wv‖ of each layer; `norms`: (3, layers)."""
    growth: NDArray[np.float64] = norms[0] * norms[1] / norms[2]
    return growth
