"""A complete vision transformer in one file, to be read from top to bottom.

An image is cut into patches, each patch is a token (Dosovitskiy et al. 2021, "An Image is Worth
16x16 Words"); shapes follow the letters

    B  images in the batch          N  tokens: patches, plus the class token if there is one
    C  width of the embedding       H  heads, each of size D = C / H
    P  side of a patch in pixels    E  dimensions of the image embedding (C where there is none)

The query, key and value projections are three matrices, so that each can be measured on its own.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Multi-head self-attention in which every token attends to all tokens."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.W_query = nn.Linear(width, width)
        self.W_key = nn.Linear(width, width)
        self.W_value = nn.Linear(width, width)
        self.W_out = nn.Linear(width, width)
        self.residual_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        batch, tokens, width = x.shape
        by_head = (batch, tokens, self.heads, width // self.heads)
        q = (
            self.W_query(x).view(by_head).transpose(1, 2)
        )  # (B, N, C) -> (B, N, H, D) -> (B, H, N, D)
        k = self.W_key(x).view(by_head).transpose(1, 2)  # (B, H, N, D)
        v = self.W_value(x).view(by_head).transpose(1, 2)  # (B, H, N, D)
        # softmax(q kᵀ / √D) v, without ever holding the (B, H, N, N) matrix
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0
        )  # (B, H, N, D)
        y = y.transpose(1, 2).reshape(x.shape)  # (B, H, N, D) -> (B, N, H, D) -> (B, N, C)
        return cast(Tensor, self.residual_dropout(self.W_out(y)))


class MLP(nn.Module):
    """A two-layer perceptron, applied to each token, with four times the width inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C), by way of (B, N, 4C)."""
        return cast(Tensor, self.dropout(self.down(self.gelu(self.up(x)))))


class Block(nn.Module):
    """Attention, then MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = x + self.attention(self.norm_1(x))
        x = x + self.mlp(self.norm_2(x))
        return x


class PatchEmbedding(nn.Module):
    """Cuts an image into P×P patches and embeds each: a convolution whose stride is its kernel."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, S, S) to (B, (S/P)², C), row by row of the image."""
        x = self.projection(images)  # (B, C, S/P, S/P)
        return cast(Tensor, x.flatten(2).transpose(1, 2))  # -> (B, C, (S/P)²) -> (B, (S/P)², C)


class ViT(nn.Module):
    """Patch and position embeddings, blocks, a norm, one vector per image, and the class head."""

    def __init__(
        self,
        *,
        classes: int,
        image_size: int,
        patch_size: int,
        channels: int,
        layers: int,
        heads: int,
        width: int,
        pooling: str = "class",
        embedding: int = 0,
        dropout: float = 0.0,
    ) -> None:
        """`pooling`: `class` (an extra token represents the image) or `mean` (of the patches).

        `embedding`: dimensions of the image embedding before the head; 0: the pooled token itself.
        """
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not tile an image of {image_size} pixels")
        if pooling not in ("class", "mean"):
            raise ValueError(f"pooling is 'class' or 'mean', not {pooling!r}")
        tokens = (image_size // patch_size) ** 2 + (pooling == "class")
        self.patch_embedding = PatchEmbedding(channels, patch_size, width)
        self.class_token = nn.Parameter(torch.zeros(width)) if pooling == "class" else None
        self.position_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.embedding = nn.Linear(width, embedding) if embedding else nn.Identity()
        self.head = nn.Linear(embedding or width, classes)
        self._initialise(layers)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, channels, S, S) to their embeddings (B, E)."""
        x = self.patch_embedding(images)  # (B, (S/P)², C)
        if self.class_token is not None:
            first = self.class_token.expand(x.shape[0], 1, -1)  # (C,) -> (B, 1, C)
            x = torch.cat((first, x), dim=1)  # (B, N, C)
        x = self.dropout(x + self.position_embedding)  # (B, N, C) + (N, C)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        x = x[:, 0] if self.class_token is not None else x.mean(dim=1)  # (B, N, C) -> (B, C)
        return cast(Tensor, self.embedding(x))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, S, S) to class logits (B, classes)."""
        return cast(Tensor, self.head(self.embed(images)))

    def _initialise(self, layers: int) -> None:
        """As in GPT-2: weights N(0, 0.02²), residual projections by 1/√(2·layers), biases zero.

        The embedding has variance 1 / inputs instead, since no norm follows it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.embedding, nn.Linear):
            nn.init.normal_(self.embedding.weight, std=self.embedding.in_features**-0.5)
        nn.init.normal_(self.position_embedding, std=0.02)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)
        for block in self.blocks:
            block = cast(Block, block)
            for projection in (block.attention.W_out, block.mlp.down):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * layers))
