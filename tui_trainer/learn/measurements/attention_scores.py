"""Q·K: angle, score, softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tui_trainer.learn.measurement_process import Value

DIMENSIONS, PAIRS = 64, 4000
KEYS = 16


def measure() -> dict[str, Value]:
    """A query and three keys in the plane, then random ones in many dimensions."""
    turned = 2 * math.pi * torch.rand(()).item()
    query = _at(turned)
    keys = torch.stack([_at(turned + angle) for angle in (0.0, math.pi / 2, math.pi)])
    scores = keys @ query
    weights = scores.softmax(0)
    values: dict[str, Value] = {}
    for number in range(3):
        cosine = F.cosine_similarity(keys[number], query, dim=0).clamp(-1, 1)
        values[f"angle_{number}"] = math.degrees(math.acos(cosine))
        values[f"score_{number}"] = scores[number].item()
        values[f"weight_{number}"] = weights[number].item()

    queries, many = torch.randn(PAIRS, DIMENSIONS), torch.randn(PAIRS, KEYS, DIMENSIONS)
    products = torch.einsum("pd,pkd->pk", queries, many)
    scaled = products / math.sqrt(DIMENSIONS)
    q, k, v = (torch.randn(1, 2, KEYS, DIMENSIONS) for _ in range(3))
    by_hand = (q @ k.transpose(-1, -2) / math.sqrt(DIMENSIONS)).softmax(-1) @ v
    return values | {
        "sum": weights.sum().item(),
        "dimensions": DIMENSIONS,
        "root": math.sqrt(DIMENSIONS),
        "keys": KEYS,
        "spread": products.std().item(),
        "scaled_spread": scaled.std().item(),
        "largest": products.softmax(-1).amax(-1).mean().item(),
        "scaled_largest": scaled.softmax(-1).amax(-1).mean().item(),
        "difference": (by_hand - F.scaled_dot_product_attention(q, k, v)).abs().max().item(),
        "doubled": (2 * scores).softmax(0).tolist(),
    }


def _at(angle: float) -> Tensor:
    """The vector of length 1 at an angle."""
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
