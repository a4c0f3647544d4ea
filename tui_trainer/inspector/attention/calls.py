"""One computation of attention: its tensors and scores, the computation inside
`nn.MultiheadAttention`, and the operands of its two products."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SDPA = "scaled_dot_product_attention"
MULTIHEAD = "nn.MultiheadAttention"
SOFTMAX = "softmax of a product"
PROJECTED = "the outputs of its projections"


@dataclass(frozen=True)
class LayerToTrace:
    """An attention layer to trace."""

    path: str
    module: torch.nn.Module
    heads: int | None
    key_value_heads: int | None
    weights: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None,) * 3
    """The parameters that hold Wq, Wk and Wv."""


@dataclass
class AttentionCall:
    """One computation of attention for the chosen example. `q`, `k`, `v` and `scores` are kept only
    for the requested layer."""

    layer: str
    index: int
    how: str
    batch: int
    q: torch.Tensor | None = None
    """(heads, queries, head_dim)"""
    k: torch.Tensor | None = None
    """(key/value heads, keys, head_dim)"""
    v: torch.Tensor | None = None
    """(key/value heads, keys, value_dim)"""
    scale: float = math.nan
    bias: torch.Tensor | None = None
    """Added to the scaled products: broadcasts to (heads, queries, keys), -inf where masked."""
    causal: bool = False
    scores: torch.Tensor | None = None
    """(heads, queries, keys): the input of a softmax, if that was traced."""
    z: torch.Tensor | None = None
    """(heads, queries, value_dim): the weighted sums of values, as computed."""
    plain_z: torch.Tensor | None = None
    """`z` without dropout, computed by the same function."""
    dropout: float = 0.0
    off: float = math.nan
    """Deviation from the layer's own result; nan while it has not been compared."""
    problem: str = ""
    """Why Q and K are unknown."""
    out_weight: torch.Tensor | None = None
    """(width, heads · value_dim): weight of the projection that reads `z`."""
    out_bias: torch.Tensor | None = None
    out_index: int = -1
    out: torch.Tensor | None = None
    """(rows, width): output of that projection, at the positions that are kept."""


# ---------------------------------------------------------------- scores


def scores_of(
    call: AttentionCall, rows: slice = slice(None), head: int | None = None
) -> torch.Tensor:
    """The input of softmax: (heads, rows, keys), for one `head` (1, rows, keys), in float32 or
    float64; -inf where masked."""
    q, k = call.q, call.k
    assert q is not None
    assert k is not None
    heads, queries, _ = q.shape
    if call.scores is not None:
        chosen = call.scores if head is None else call.scores[head : head + 1]
        found = at_least_float32(chosen[:, rows])
        return found.masked_fill(found <= torch.finfo(call.scores.dtype).min / 2, -math.inf)
    keys = repeat_heads(k, heads)
    if head is not None:
        q, keys = q[head : head + 1], keys[head : head + 1]
    found = at_least_float32(q[:, rows]) @ at_least_float32(keys).transpose(1, 2) * call.scale
    if call.bias is not None:
        bias = torch.broadcast_to(call.bias, (heads, queries, k.shape[1]))
        bias = bias if head is None else bias[head : head + 1]
        found = found + at_least_float32(bias[:, rows])
        found = found.masked_fill(bias[:, rows] <= torch.finfo(bias.dtype).min / 2, -math.inf)
    if call.causal:
        positions = torch.arange(queries, device=q.device)[rows]
        keys_at = torch.arange(k.shape[1], device=q.device)
        found = found.masked_fill(keys_at[None] > positions[:, None], -math.inf)
    return found


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in at least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    ours, theirs = at_least_float32(ours), at_least_float32(theirs)
    if not theirs.numel():
        return 0.0
    largest = float(theirs.abs().max()) or 1.0
    return float((ours - theirs).abs().max()) / largest


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative deviation that the order of additions explains."""
    eps = torch.finfo(dtype).eps
    return (64 if eps < 1e-4 else 4) * eps  # single values of half precision are rounded, not sums


def repeat_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Key/value heads, repeated for each of their query heads."""
    return tensor.repeat_interleave(heads // tensor.shape[0], 0)


# ---------------------------------------------------------------- nn.MultiheadAttention


def call_of_multihead(
    layer: LayerToTrace,
    index: int,
    example: int,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> AttentionCall:
    """Repeat the computation of `multi_head_attention_forward` for one example of the batch. The
    function's inputs are (positions, batch, width), whatever the module's `batch_first`."""
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query, heads = given["query"], given["num_heads"]
    if query.dim() == 2:
        call = AttentionCall(layer.path, index, MULTIHEAD, 1)
        call.problem = "it is called without a batch dimension"
        return call
    batch, width = query.shape[1], query.shape[2]
    sample = min(example, batch - 1)
    call = AttentionCall(layer.path, index, MULTIHEAD, batch)
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if given[name] is not None:
            call.problem = f"it has {name}, which is not taken into account"
            return call
    if given["add_zero_attn"]:
        call.problem = "it adds a key of zeros (add_zero_attn)"
        return call
    if given["use_separate_proj_weight"]:
        weights = [given[f"{part}_proj_weight"] for part in "qkv"]
    else:
        weights = list(given["in_proj_weight"].chunk(3))
    biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    call.q, call.k, call.v = (
        _by_head(torch.nn.functional.linear(given[name][:, sample], weight, bias), heads)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
    )
    call.scale = 1 / math.sqrt(width // heads)
    call.causal = bool(given["is_causal"]) and given["attn_mask"] is None
    bias = torch.zeros(1, 1, 1, dtype=query.dtype, device=query.device)
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if mask is not None:
        if mask.dim() == 3 and mask.shape[0] == batch * heads:
            mask = mask[sample * heads : (sample + 1) * heads]
        bias = bias + _blocked(mask, query.dtype)
    if padding is not None:
        bias = bias + _blocked(padding[sample], query.dtype)[None, None]
    call.bias = bias if mask is not None or padding is not None else None
    call.out_weight, call.out_bias = given["out_proj_weight"], given["out_proj_bias"]
    call.out_index = index
    call.dropout = float(given["dropout_p"]) if given["training"] else 0.0
    # The result here is compared with that of the function itself, called without dropout.
    again = inspect.signature(func).bind(*args, **kwargs)
    again.arguments["training"] = False
    result = func(*again.args, **again.kwargs)[0]
    scores = scores_of(call)
    weighted = torch.softmax(scores, -1).to(call.v.dtype) @ repeat_heads(call.v, heads)
    call.z = weighted
    merged = weighted.transpose(0, 1).reshape(weighted.shape[1], -1)
    call.out = torch.nn.functional.linear(merged, call.out_weight, call.out_bias)
    call.plain_z = None
    call.off = difference = deviation(call.out, result[:, sample])
    if difference > max(tolerance(each.dtype) for each in (query, call.v, result)):
        call.problem = (
            f"its output cannot be computed from Q, K and V: it differs by {difference:.1e}"
        )
    return call


def _by_head(projected: torch.Tensor, heads: int) -> torch.Tensor:
    """(positions, features) → (heads, positions, head_dim)."""
    return projected.view(projected.shape[0], heads, -1).transpose(0, 1)


def _blocked(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of nn.MultiheadAttention (True where a query may not attend) as additive mask."""
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(mask, -math.inf)
    return mask


def additive_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask of scaled_dot_product_attention (True where a query may attend) as additive mask."""
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, device=mask.device)
        return zeros.masked_fill(~mask, -math.inf)
    return mask.clone()


# ---------------------------------------------------------------- products


@dataclass
class Product:
    """A matrix product; `equation` is that of `einsum`, or "" for any other function."""

    result: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    equation: str


def same_last_axes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() and a.shape[-2:] == b.shape[-2:]


def operands_of(product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as (…, positions, head_dim) of their product."""
    if not product.equation:
        return product.left, product.right.transpose(-1, -2)
    inputs, result = product.equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    (contracted,) = set(left) & set(right) - set(result)
    *outer, rows, columns = list(result)
    return (
        product.left.permute([left.index(c) for c in (*outer, rows, contracted)]),
        product.right.permute([right.index(c) for c in (*outer, columns, contracted)]),
    )


def values_of(product: Product) -> torch.Tensor:
    """The values (…, keys, value_dim) of a product with the weights."""
    if not product.equation:
        return product.right
    inputs, _ = product.equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    *outer, _, keys = list(left)
    (size,) = set(right) - set(left)
    return product.right.permute([right.index(c) for c in (*outer, keys, size)])


def result_of(product: Product) -> torch.Tensor:
    """The result (…, queries, value_dim)."""
    if not product.equation:
        return product.result
    inputs, result = product.equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    *outer, rows, _ = list(left)
    (size,) = set(right) - set(left)
    return product.result.permute([result.index(c) for c in (*outer, rows, size)])


def batch_size_of(tensor: torch.Tensor, layer: LayerToTrace) -> int:
    """Number of examples in (batch, heads, …), or in (batch · heads, …)."""
    if tensor.dim() == 4:
        return tensor.shape[0]
    for heads in (layer.heads, layer.key_value_heads):
        if heads and tensor.shape[0] % heads == 0:
            return max(1, tensor.shape[0] // heads)
    return max(1, tensor.shape[0])
