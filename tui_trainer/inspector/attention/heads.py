"""Wq, Wk and Wv of each head of an attention layer: their similarity, singular values, and the
angles between their row spaces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tui_trainer.probes.attention.layers import AttentionLayer
from tui_trainer.protocol.attention import HeadSpectra, HeadWeights
from tui_trainer.trace.parameters import TrackedParameters

MAX_ELEMENTS = 1 << 24
"""Elements of Wq, Wk and Wv up to which every head is decomposed; in larger layers only the chosen
head is."""
PAIRS = ((0, 1), (0, 2), (1, 2))
"""qk, qv and kv among q, k, v."""
NO_HEADS = "the number of heads is unknown"

Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Triple = tuple[float, float, float]
MISSING: Triple = (math.nan, math.nan, math.nan)


def head_matrices(tracked: TrackedParameters, layer: AttentionLayer) -> Matrices | None:
    """Wq, Wk and Wv as (heads, head_dim, inputs) in float64 on the CPU; a shared key/value head
    comes once for each of its query heads. None where the number of heads is unknown."""
    if not layer.heads or not layer.key_value_heads:
        return None
    found = []
    for part, heads in zip(
        layer.parts, (layer.heads, layer.key_value_heads, layer.key_value_heads), strict=True
    ):
        matrix = part.view(tracked.weight(part.parameter)).to("cpu", torch.float64)
        split = matrix.reshape(heads, part.rows // heads, part.columns)
        found.append(split.repeat_interleave(layer.heads // heads, 0))
    q, k, v = found
    return q, k, v


def head_weights(matrices: Matrices, head: int | None = None) -> list[HeadWeights]:
    """The weights of every head, or of `head` alone."""
    heads = range(matrices[0].shape[0]) if head is None else (head,)
    return [_head_weights([matrix[each] for matrix in matrices]) for each in heads]


def _head_weights(parts: Sequence[torch.Tensor]) -> HeadWeights:
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        return HeadWeights(MISSING, MISSING, MISSING, MISSING, MISSING)
    norms = [float(torch.linalg.matrix_norm(part)) for part in parts]
    largest = [float(torch.linalg.matrix_norm(part, ord=2)) for part in parts]
    cosines, distances, angles = [], [], []
    for a, b in PAIRS:
        same = parts[a].shape == parts[b].shape
        dot = float((parts[a] * parts[b]).sum()) if same else math.nan
        lengths, squares = norms[a] * norms[b], norms[a] ** 2 + norms[b] ** 2
        cosines.append(dot / lengths if lengths else math.nan)
        distances.append(math.sqrt(max(0.0, 1 - 2 * dot / squares)) if squares else math.nan)
        between = principal_angles(parts[a], parts[b])
        angles.append(float(between.mean()) if between.numel() else math.nan)
    stable = [(n / s) ** 2 if s else math.nan for n, s in zip(norms, largest, strict=True)]
    return HeadWeights(
        _triple(cosines), _triple(distances), _triple(angles), _triple(largest), _triple(stable)
    )


def _triple(values: Sequence[float]) -> Triple:
    a, b, c = values
    return a, b, c


def head_spectra(matrices: Matrices, head: int) -> HeadSpectra | None:
    """The spectra of one head; None where a weight is not finite."""
    q, k, v = (matrix[head] for matrix in matrices)
    if not all(bool(torch.isfinite(part).all()) for part in (q, k, v)):
        return None
    return HeadSpectra(
        (_values(torch.linalg.svdvals(q)), _values(torch.linalg.svdvals(k)),
         _values(torch.linalg.svdvals(v))),
        (_values(principal_angles(q, k)), _values(principal_angles(q, v)),
         _values(principal_angles(k, v))),
    )  # fmt: skip


def _values(tensor: torch.Tensor) -> tuple[float, ...]:
    return tuple(tensor.tolist())


def principal_angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The angles between the row spaces of two matrices with equally many columns, in degrees and
    ascending; as many as the lower rank. Small angles are computed from sines, large ones from
    cosines (Björck & Golub 1973): arccos alone is exact to 1e-8 radians only."""
    if a.shape[1] != b.shape[1]:
        return a.new_empty(0)
    first, second = _row_space(a), _row_space(b)  # (columns, rank) each
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    if not second.shape[1]:
        return a.new_empty(0)
    cosines = torch.linalg.svdvals(first.T @ second).clamp(max=1)  # descending: angles ascend
    outside = second - first @ (first.T @ second)
    sines = torch.linalg.svdvals(outside)[: second.shape[1]].clamp(max=1).flip(0)
    radians = torch.where(cosines**2 < 0.5, cosines.acos(), sines.asin())
    return torch.rad2deg(radians)


def _row_space(matrix: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (columns, rank) of the rows of `matrix`."""
    _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    limit = values.max() * max(matrix.shape) * torch.finfo(matrix.dtype).eps if len(values) else 0
    kept: torch.Tensor = rows[values > limit]
    return kept.T
