"""A complete GPT in one file, to be read from top to bottom.

Decoder-only transformer with pre-norm blocks, as in GPT-2 (Radford et al. 2019, "Language Models
are Unsupervised Multitask Learners"); shapes follow the letters

    B  examples in the batch        T  positions (at most `block_size`)
    C  width of the embedding       H  heads, each of size D = C / H
    V  size of the vocabulary

Unlike in GPT-2's code, the query, key and value projections are three matrices, so that each can be
measured on its own.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a position attends to itself and to those before it."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.W_query = nn.Linear(width, width, bias=bias)
        self.W_key = nn.Linear(width, width, bias=bias)
        self.W_value = nn.Linear(width, width, bias=bias)
        self.W_out = nn.Linear(width, width, bias=bias)
        self.residual_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        batch, positions, width = x.shape
        by_head = (batch, positions, self.heads, width // self.heads)
        q = (
            self.W_query(x).view(by_head).transpose(1, 2)
        )  # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        k = self.W_key(x).view(by_head).transpose(1, 2)  # (B, H, T, D)
        v = self.W_value(x).view(by_head).transpose(1, 2)  # (B, H, T, D)
        # softmax(q kᵀ / √D + causal mask) v, without ever holding the (B, H, T, T) matrix
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(x.shape)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return cast(Tensor, self.residual_dropout(self.W_out(y)))


class MLP(nn.Module):
    """A two-layer perceptron, applied to each position, with four times the width inside."""

    def __init__(self, width: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C), by way of (B, T, 4C)."""
        return cast(Tensor, self.dropout(self.down(self.gelu(self.up(x)))))


class Block(nn.Module):
    """Attention, then MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, bias=bias)
        self.attention = CausalSelfAttention(width, heads, dropout, bias)
        self.norm_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = MLP(width, dropout, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attention(self.norm_1(x))
        x = x + self.mlp(self.norm_2(x))
        return x


class GPT(nn.Module):
    """Token and position embeddings, blocks, a norm, and a head tied to the token embedding."""

    def __init__(
        self,
        *,
        vocabulary: int,
        block_size: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(block_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        # weight tying (Press & Wolf 2017)
        self.head.weight = self.token_embedding.weight
        self.apply(_initialise)
        # as in GPT-2: each block adds twice to the residual stream, whose variance stays bounded
        for block in self.blocks:
            block = cast(Block, block)
            for projection in (block.attention.W_out, block.mlp.down):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers (B, T), T ≤ block_size, to the logits (B, T, V) of each next token."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, C) + (T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x)))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        vocabulary: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue tokens (B, T) by `count` sampled ones: (B, T + count), on the CPU.

        Samples on the CPU from `generator`, so that it gives the same text on every device.
        `vocabulary` limits sampling to the first tokens, if the embedding has more rows.
        """
        device = self.token_embedding.weight.device
        tokens = tokens.cpu()
        for _ in range(count):
            context = tokens[:, -self.block_size :].to(device)  # (B, ≤ block_size)
            logits = self(context)[:, -1, :vocabulary].float().cpu()  # (B, V)
            probabilities = F.softmax(logits / temperature, dim=-1)  # (B, V)
            next_tokens = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
            tokens = torch.cat((tokens, next_tokens), dim=1)  # (B, T + 1)
        return tokens


def _initialise(module: nn.Module) -> None:
    """As in GPT-2: matrices and embeddings from N(0, 0.02²), biases zero, norms one."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
