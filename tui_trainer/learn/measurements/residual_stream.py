"""The contribution of V to the residual stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import (
    BLOCK_SIZE,
    loss_of,
    random_batch,
    small_gpt,
)
from tui_trainer.models.gpt import Block, CausalSelfAttention

STEPS = 30


@torch.no_grad()
def measure() -> dict[str, Value]:
    """Train a small GPT a little, and take the attention of its first block apart."""
    model = small_gpt()
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, random_batch()).backward()
            optimizer.step()
    tokens = random_batch(1)[0]
    stream = model.token_embedding(tokens) + model.position_embedding(torch.arange(BLOCK_SIZE))
    block = model.get_submodule("blocks.0")
    assert isinstance(block, Block)
    attention, normed = block.attention, block.norm_1(stream)
    weights, parts = _by_head(attention, normed)
    added = attention(normed)
    last = -1
    before, addition = stream[0, last], added[0, last]

    attention.W_value.weight *= 2
    doubled_weights, _ = _by_head(attention, normed)
    doubled = attention(normed)[0, last]
    attention.W_value.weight *= 0
    without = attention(normed)[0, last]
    return {
        "positions": BLOCK_SIZE,
        "heads": attention.heads,
        "steps": STEPS,
        "weights_sum": weights[0, 0, last].sum().item(),
        "stream_norm": before.norm().item(),
        "head_1_norm": parts[0][0, last].norm().item(),
        "head_2_norm": parts[1][0, last].norm().item(),
        "added_norm": addition.norm().item(),
        "after_norm": (before + addition).norm().item(),
        "cosine": torch.cosine_similarity(before, addition, dim=0).item(),
        "difference": (sum(parts) - added).abs().max().item(),
        "without_norm": without.norm().item(),
        "doubled_ratio": (doubled.norm() / addition.norm()).item(),
        "weights_changed": (doubled_weights - weights).abs().max().item(),
    }


def _by_head(attention: CausalSelfAttention, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(softmax weights (B, H, T, T), contributions of the heads to the stream: H × (B, T, C))."""
    batch, positions, width = x.shape
    by_head = (batch, positions, attention.heads, width // attention.heads)
    q, k, v = (
        projection(x).view(by_head).transpose(1, 2)  # (B, H, T, D)
        for projection in (attention.W_query, attention.W_key, attention.W_value)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(by_head[-1])
    future = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    mixed = weights @ v  # (B, H, T, D)
    columns = attention.W_out.weight.split(by_head[-1], dim=1)  # H × (C, D)
    return weights, [mixed[:, head] @ columns[head].T for head in range(attention.heads)]
