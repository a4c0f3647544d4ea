"""Measures Wq, Wk and Wv of every head, only while a viewer shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import Floats
from tui_trainer.probes.attention.layers import AttentionLayer, find_layers
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import head_columns
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, TableSpec, Values

Doubles = NDArray[np.float64]


Weight = Callable[[int], torch.Tensor]
"""Returns a weight by position."""


class AttentionHeads(Probe):
    """Table `attention_heads`, while a viewer watches the topic of that name.

    A query head is compared with the key/value head that it uses. Layers whose number of heads is
    unknown have no columns.
    """

    name = schema.ATTENTION_HEADS
    every = 0
    topic = schema.ATTENTION_HEADS
    watched_every = 1
    importance = 10
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        found = find_layers(tracked, options.attention_pattern)
        self._layers = [each for each in found.layers if each.heads and each.key_value_heads]
        if not self._layers:
            self.unseen = found.nothing or "the number of heads is unknown"
            return
        heads = tuple((layer.path, layer.heads or 0) for layer in self._layers)
        self.tables = (TableSpec(self.name, head_columns(heads)),)
        self._start = [
            [m.clone() for m in self._matrices(layer, tracked.weight_at_start)]
            for layer in self._layers
        ]
        self._norms_at_start = [
            [torch.linalg.vector_norm(m, dim=-1).cpu().numpy() for m in start]
            for start in self._start
        ]

    def _matrices(self, layer: AttentionLayer, weight: Weight) -> list[torch.Tensor]:
        """Wq as (heads, elements), Wk and Wv as (key/value heads, elements)."""
        counts = (layer.heads, layer.key_value_heads, layer.key_value_heads)
        return [
            part.view(weight(part.parameter)).to(torch.float32).reshape(count or 1, -1)
            for part, count in zip(layer.parts, counts, strict=True)
        ]

    def after_update(self) -> Readings:
        """For each layer squared norms (q, k, v), products (qk, qv, kv) and drift (q, k, v)."""
        readings: list[torch.Tensor] = []
        for layer, start in zip(self._layers, self._start, strict=True):
            q, k, v = now = self._matrices(layer, self.tracked.weight)
            readings += [(m * m).sum(-1) for m in now]
            grouped = q.view(k.shape[0], layer.group, -1)
            for pair, other in (("qk", k), ("qv", v)):
                if layer.comparable(pair):
                    readings.append((grouped * other.unsqueeze(1)).sum(-1).view(-1))
                else:
                    readings.append(torch.full_like(q[:, 0], torch.nan))
            both = layer.comparable("kv")
            readings.append((k * v).sum(-1) if both else torch.full_like(k[:, 0], torch.nan))
            readings += [
                torch.linalg.vector_norm(m - before, dim=-1)
                for m, before in zip(now, start, strict=True)
            ]
        return readings

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """In the order layer, head, statistic."""
        position = 0
        out: list[Floats] = []
        for layer, norms_at_start in zip(self._layers, self._norms_at_start, strict=True):
            heads, shared = layer.heads or 0, layer.key_value_heads or 0
            sizes = (heads, shared, shared, heads, heads, shared, heads, shared, shared)
            parts = []
            for size in sizes:
                parts.append(values[position : position + size].astype(np.float64))
                position += size
            out.append(_head_rows(layer, parts, norms_at_start))
        return (np.concatenate(out),)


def _head_rows(
    layer: AttentionLayer, parts: Sequence[Doubles], norms_at_start: Sequence[Doubles]
) -> Floats:
    """(heads · statistics,) of one layer; shared key/value heads are repeated."""
    qq, kk, vv, qk, qv, kv, drift_q, drift_k, drift_v = parts

    def shared(values: Doubles) -> Doubles:
        return np.repeat(values, layer.group)

    with np.errstate(divide="ignore", invalid="ignore"):
        norm_q, norm_k, norm_v = np.sqrt(qq), np.sqrt(kk), np.sqrt(vv)
        columns = [
            norm_q,
            shared(norm_k),
            shared(norm_v),
            qk / (norm_q * shared(norm_k)),
            qv / (norm_q * shared(norm_v)),
            shared(kv / (norm_k * norm_v)),
            drift_q / norms_at_start[0],
            shared(drift_k / norms_at_start[1]),
            shared(drift_v / norms_at_start[2]),
        ]
    return np.stack(columns, axis=1).astype(np.float32).reshape(-1)
