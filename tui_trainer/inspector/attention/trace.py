"""Observes the attention layers and the residual stream in one forward pass.

Every torch function that the forward calls passes through `AttentionTrace` (a TorchFunctionMode).
Attention is traced where it is computed: as `scaled_dot_product_attention`, as the function behind
`nn.MultiheadAttention`, or as a product, a softmax and another product. So Q, K, masks and biases
are those actually used: after rotary embeddings, norms of Q and K, and adapters. No value is
replaced, and only the chosen example is kept.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tui_trainer.inspector.attention.calls import (
    SDPA,
    SOFTMAX,
    AttentionCall,
    LayerToTrace,
    Product,
    additive_mask,
    batch_size_of,
    call_of_multihead,
    operands_of,
    repeat_heads,
    result_of,
    same_last_axes,
    values_of,
)

ADDITIONS = frozenset(("add", "add_", "__add__", "__iadd__", "__radd__"))
PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum", "__matmul__"))
FACTORS = ("batch1", "batch2", "mat2", "other", "tensor2")
"""Names of the second operand of a product, if it is passed by keyword."""
FEW_ELEMENTS = 1 << 18
"""Elements of the example's stream (positions, width) up to which all rows are kept; of a larger
one only the query's row is."""
MAX_TAIL = 4
"""Linear layers after the last norm that may lead to the logits."""


@dataclass
class Added:
    """A summand of the residual stream."""

    name: str
    index: int
    """Number of the torch call that computed it."""
    at: int
    """Number of the torch call that added it."""
    values: torch.Tensor
    """(rows, width), of the rows that are kept."""


@dataclass
class StreamSum:
    """A tensor that is the sum of `start` and of the tensors `added` to it."""

    start: Added
    added: tuple[Added, ...]
    index: int


@dataclass
class FinalNorm:
    """The last norm that reads the residual stream."""

    module: torch.nn.Module
    stream: StreamSum
    input: torch.Tensor
    """(rows, width)"""
    output: torch.Tensor | None = None


@dataclass
class TailLinear:
    """A linear layer after the last norm."""

    input: torch.Tensor
    """(rows, inputs), or (1, inputs) where the positions were pooled before the layer."""
    pooled: bool
    weight: torch.Tensor
    bias: torch.Tensor | None
    output: torch.Tensor


@dataclass
class Targets:
    """The targets that the loss compares the logits with."""

    values: torch.Tensor
    """Class numbers."""


@dataclass
class _Made:
    """The torch call and the module that computed a tensor."""

    index: int
    reference: weakref.ref[torch.Tensor]
    path: str


@dataclass
class _Pending:
    """Attention weights whose product with the values has not been computed yet."""

    call: AttentionCall
    weights: torch.Tensor
    kept: bool


class AttentionTrace(TorchFunctionMode):
    """Use it as a context around one forward pass under no_grad, and pass the calls of all modules
    to `called` and `returned`."""

    def __init__(
        self,
        layers: Iterable[LayerToTrace],
        paths: Mapping[int, str],
        wanted: str,
        sample: int,
        query: int | None,
        residual: bool,
    ) -> None:
        """`paths`: id of each module and parameter → its name."""
        super().__init__()
        self.layers = {id(layer.module): layer for layer in layers}
        self.wanted, self.sample, self.query = wanted, sample, query
        self.attends: dict[str, AttentionCall] = {}
        """Layer → its last computation of attention."""
        self.calls: dict[str, int] = {}
        self.projections: dict[int, torch.Tensor] = {}
        """0, 1, 2 for q, k, v → output (positions, features) in the requested layer."""
        self.inputs_of_linears: list[torch.Tensor] = []
        """Inputs (positions, features) of linear layers in the requested layer and after it."""
        self.norm: FinalNorm | None = None
        self.tail: list[TailLinear] = []
        self.targets: Targets | None = None
        self.batch = 0
        self.fault: Exception | None = None
        """The first exception in a handler, because of which something is missing."""
        self._paths = paths
        self._residual = residual
        self._stack: list[str] = []
        self._layer_stack: list[LayerToTrace] = []
        self._busy = False
        self._count = 0
        self._made: dict[int, _Made] = {}
        self._streams: dict[int, tuple[weakref.ref[torch.Tensor], StreamSum]] = {}
        self._products: list[Product] = []
        self._pending: _Pending | None = None
        self._batch_axis = int(any(_batch_second(layer.module) for layer in self.layers.values()))
        self._norms: dict[int, FinalNorm] = {}
        self._handlers: dict[str, Callable[..., None]] = {
            SDPA: self._attention,
            "multi_head_attention_forward": self._multihead,
            "softmax": self._softmax,
            "linear": self._linear,
            "addmm": self._addmm,
            "cross_entropy": self._cross_entropy,
            **dict.fromkeys(PRODUCTS, self._product),
            **dict.fromkeys(ADDITIONS, self._addition),
        }

    # ------------------------------------------------------------ observing

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._busy:
            self._busy = True
            try:
                self._saw(func, args, kwargs, result)
            except Exception as fault:
                self.fault = self.fault or fault
            finally:
                self._busy = False
        return result

    def _saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self._count += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and self._index_of(tensor) is None:
                path = self._stack[-1] if self._stack else ""
                self._made[id(tensor)] = _Made(self._count, weakref.ref(tensor), path)
        name = getattr(func, "__name__", "")
        handler = self._handlers.get(name)
        if handler is not None and (self._stack or name == "cross_entropy"):
            handler(func, args, kwargs, result)

    @property
    def chosen_query(self) -> int:
        """The requested position; the last one by default."""
        call = self.attends.get(self.wanted)
        last = (call.z.shape[1] if call is not None and call.z is not None else 1) - 1
        return last if self.query is None else min(self.query, last)

    def _index_of(self, tensor: torch.Tensor) -> _Made | None:
        made = self._made.get(id(tensor))
        return made if made is not None and made.reference() is tensor else None

    def called(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Called before each call of a module, the root model first."""
        self._stack.append(self._paths.get(id(module), self._stack[-1] if self._stack else ""))
        layer = self.layers.get(id(module))
        if layer is not None:
            self._layer_stack.append(layer)
            self.calls[layer.path] = self.calls.get(layer.path, 0) + 1
            self._products.clear()
            self._pending = None
            if layer.path == self.wanted:
                self.projections.clear()
                self.inputs_of_linears.clear()
        if self._residual and "norm" in type(module).__name__.lower() and args:
            stream = self._stream_of(args[0])
            if stream is not None:
                self._busy = True
                try:
                    values = self._rows(args[0]).clone()
                    self._norms[id(module)] = FinalNorm(module, stream, values)
                finally:
                    self._busy = False

    def returned(self, module: torch.nn.Module, result: Any) -> None:
        """Called when the innermost open call of a module has returned."""
        if self._stack:
            self._stack.pop()
        if id(module) in self.layers and self._layer_stack:
            self._layer_stack.pop()
        norm = self._norms.pop(id(module), None)
        if norm is not None and isinstance(result, torch.Tensor):
            self._busy = True
            try:
                norm.output = self._rows(result).clone()
            finally:
                self._busy = False
            self.norm, self.tail = norm, []

    @property
    def _layer(self) -> LayerToTrace | None:
        return self._layer_stack[-1] if self._layer_stack else None

    # ------------------------------------------------------------ attention

    def _add(self, call: AttentionCall) -> None:
        self.attends[call.layer] = call
        self.batch = call.batch

    def _attention(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, *,
        scale, enable_gqa)"""
        layer = self._layer
        if layer is None:
            return
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args,
                         strict=False)) | kwargs  # fmt: skip
        query, key, value = given["query"], given["key"], given["value"]
        mask, scale = given.get("attn_mask"), given.get("scale")
        call = AttentionCall(layer.path, self._count, SDPA, batch_size_of(query, layer))
        call.dropout = float(given.get("dropout_p") or 0.0)
        call.z = self._kept_z(result, layer)
        if layer.path == self.wanted:
            call.q, call.k, call.v = (self._sample(each, layer) for each in (query, key, value))
            call.scale = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
            call.causal = bool(given.get("is_causal"))
            if mask is not None:
                whole = torch.broadcast_to(mask, (*query.shape[:-1], key.shape[-2]))
                call.bias = additive_mask(self._sample(whole, layer))
            if call.dropout:
                plain = func(*args, **{**kwargs, "dropout_p": 0.0}) if len(args) < 5 else func(
                    *args[:4], 0.0, *args[5:], **kwargs
                )  # fmt: skip
                call.plain_z = self._sample(plain, layer)
        self._add(call)

    def _multihead(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        layer = self._layer
        if layer is None:
            return
        call = call_of_multihead(layer, self._count, self.sample, func, args, kwargs)
        if call.out is not None:
            call.out = self._kept(call.out)
        self._add(call)

    def _softmax(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
    ) -> None:
        layer, scores = self._layer, args[0]
        if layer is None or result.dim() not in (3, 4) or not self._products:
            return
        product = next(
            (each for each in reversed(self._products) if same_last_axes(each.result, scores)), None
        )
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if product is None or dim not in (-1, result.dim() - 1):
            return
        call = AttentionCall(layer.path, self._count, SOFTMAX, batch_size_of(result, layer))
        kept = layer.path == self.wanted
        if kept:
            q, k = operands_of(product)
            call.q, call.k = self._sample(q, layer), self._sample(k, layer)
            call.scores = self._sample(scores, layer)
        self._pending = _Pending(call, result, kept)

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
    ) -> None:
        layer = self._layer
        if layer is None or result.dim() not in (3, 4):
            return
        equation = args[0] if args and isinstance(args[0], str) else ""
        given = (*args, *(kwargs.get(name) for name in FACTORS))
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        if len(tensors) < 2:
            return
        product = Product(result, tensors[-2], tensors[-1], equation)
        pending = self._pending
        if pending is not None and same_last_axes(product.left, pending.weights):
            self._weighted(pending, product, layer)
        else:
            self._products = [*self._products[-3:], product]

    def _weighted(self, pending: _Pending, product: Product, layer: LayerToTrace) -> None:
        """Complete the attention with the product of its weights, after dropout, and the values."""
        call, self._pending = pending.call, None
        call.z = self._kept_z(result_of(product), layer)
        if pending.kept:
            call.v = self._sample(values_of(product), layer)
            weights = self._sample(pending.weights, layer)
            used = self._sample(product.left, layer)
            dropped = not torch.allclose(weights.float(), used.float(), atol=1e-6)
            if dropped:
                call.dropout = math.nan
                v = repeat_heads(call.v, weights.shape[0])
                call.plain_z = weights.to(v.dtype) @ v
        self._products.clear()
        self._add(call)

    # ------------------------------------------------------------ linear layers

    def _linear(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
    ) -> None:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        self._linear_layer(given["input"], given["weight"], given.get("bias"), result)

    def _addmm(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
    ) -> None:
        if len(args) >= 3 and not kwargs and args[0].dim() == 1 and args[1].dim() == 2:
            self._linear_layer(args[1], args[2].t(), args[0], result)

    def _linear_layer(
        self,
        given: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        result: torch.Tensor,
    ) -> None:
        layer = self._layer
        if layer is not None and layer.path == self.wanted:
            self._keep_projection(layer, given, weight, result)
        elif self.wanted in self.calls and len(self.inputs_of_linears) < MAX_TAIL:
            self._keep_input(given)
        for call in self.attends.values():
            if call.out_weight is None and call.z is not None:
                self._match_output(call, given, weight, bias, result)
        if self.norm is not None and self._residual:
            self._read(given, weight, bias, result)

    def _keep_projection(
        self, layer: LayerToTrace, given: torch.Tensor, weight: torch.Tensor, result: torch.Tensor
    ) -> None:
        base = _storage(weight)
        if not self.batch and result.dim() == 3:
            self.batch = result.shape[self._batch_axis]
        for place, own in enumerate(layer.weights):
            if own is not None and _storage(own) == base:
                self.projections[place] = self._positions(result).clone()
        if not any(own is not None and _storage(own) == base for own in layer.weights):
            self._keep_input(given)

    def _keep_input(self, given: torch.Tensor) -> None:
        if len(self.inputs_of_linears) < 2 * MAX_TAIL:
            self.inputs_of_linears.append(self._positions(given).clone())

    def _match_output(
        self,
        call: AttentionCall,
        given: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        result: torch.Tensor,
    ) -> None:
        """Take this linear layer as the output projection if it reads the attention's result."""
        z = call.z
        assert z is not None
        heads, queries, size = z.shape
        features = heads * size
        if given.shape[-1] != features or given.numel() != call.batch * queries * features:
            return
        seen = self._positions(given, call.batch)
        merged = z.transpose(0, 1).reshape(queries, features).to(seen.dtype)
        if seen.shape == merged.shape and torch.equal(seen, merged):
            call.out_weight, call.out_bias = weight, bias
            call.out_index = self._count
            call.out = self._kept(self._positions(result, call.batch)).clone()

    def _read(
        self,
        given: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        result: torch.Tensor,
    ) -> None:
        if len(self.tail) >= MAX_TAIL:
            return
        pooled = given.dim() == 2 and given.shape[0] == self.batch
        if pooled:
            seen, out = given[self.sample][None], result[self.sample][None]
        elif given.dim() == 3 or given.shape[0] % max(1, self.batch) == 0:
            positions = self._positions(given, self.batch)
            seen = self._kept(positions)
            out = self._kept(self._positions(result, self.batch))
        else:
            return
        self.tail.append(TailLinear(seen.clone(), pooled, weight, bias, out.clone()))

    # ------------------------------------------------------------ the residual stream

    def _addition(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        if not self._residual or len(args) != 2 or kwargs.get("alpha", 1) != 1:
            return
        a, b = args
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return
        if not isinstance(result, torch.Tensor) or result.dim() != 3:
            return
        if not result.is_floating_point():
            return
        whole = [each for each in (a, b) if each.shape == result.shape]
        whole = [each for each in whole if not isinstance(each, torch.nn.Parameter)]
        if not whole:
            return
        older = min(whole, key=self._age)
        younger = b if older is a else a
        known = self._stream_of(older)
        start = self._summand(older, result)
        if result is older:  # in place: `older` has become the sum
            start.values -= self._rows(torch.broadcast_to(younger, result.shape))
        stream = known or StreamSum(start, (), self._age(older))
        added = (*stream.added, *self._summands(younger, result, stream.index))
        index = stream.index if result is older else self._count
        grown = StreamSum(stream.start, added, index)
        self._streams[id(result)] = (weakref.ref(result), grown)

    def _age(self, tensor: torch.Tensor) -> int:
        stream = self._stream_of(tensor)
        if stream is not None:
            return stream.index
        made = self._index_of(tensor)
        return made.index if made is not None else -1

    def _summands(
        self, tensor: torch.Tensor, result: torch.Tensor, since: int
    ) -> tuple[Added, ...]:
        """The summands that `tensor` adds: itself, or the terms of a sum that began after call
        `since`, such as attention plus MLP where both read the same stream."""
        inner = self._stream_of(tensor)
        if inner is not None and inner.start.index > since:
            return (inner.start, *inner.added)
        return (self._summand(tensor, result),)

    def _summand(self, tensor: torch.Tensor, result: torch.Tensor) -> Added:
        made = self._index_of(tensor)
        here = self._stack[-1] if self._stack else ""
        name = _branch(made.path, here) if made is not None else self._name_of(tensor, here)
        values = self._rows(torch.broadcast_to(tensor, result.shape)).clone()
        return Added(name, made.index if made is not None else -1, self._count, values)

    def _name_of(self, tensor: torch.Tensor, here: str) -> str:
        """The name of a tensor that the forward pass did not compute: a parameter, or an input."""
        return self._paths.get(id(tensor)) or here or "input"

    def _stream_of(self, tensor: Any) -> StreamSum | None:
        found = self._streams.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    # ------------------------------------------------------------ the loss

    def _cross_entropy(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if isinstance(target, torch.Tensor) and not target.is_floating_point():
            self.targets = Targets(target.detach().reshape(-1).clone())

    # ------------------------------------------------------------ the chosen example

    def _sample(self, tensor: torch.Tensor, layer: LayerToTrace) -> torch.Tensor:
        """(batch, heads, …) or (batch · heads, …) → (heads, …) of the chosen example, copied, since
        a view would keep the whole batch alive."""
        if tensor.dim() == 4:
            return tensor[min(self.sample, tensor.shape[0] - 1)].clone()
        batch = batch_size_of(tensor, layer)
        heads = tensor.shape[0] // batch
        sample = min(self.sample, batch - 1)
        return tensor[sample * heads : (sample + 1) * heads].clone()

    def _kept_z(self, tensor: torch.Tensor, layer: LayerToTrace) -> torch.Tensor | None:
        """The example's part of z; None for layers other than the requested one, unless the
        residual stream was requested."""
        needed = self._residual or layer.path == self.wanted
        return self._sample(tensor, layer) if needed else None

    def _positions(self, tensor: torch.Tensor, batch: int = 0) -> torch.Tensor:
        """(batch, positions, features) or (batch · positions, features) → (positions, features) of
        the chosen example."""
        if tensor.dim() == 2:
            batch = batch or self.batch or 1
            if tensor.shape[0] % batch:
                return tensor
            tensor = tensor.view(batch, tensor.shape[0] // batch, tensor.shape[1])
            return tensor[min(self.sample, batch - 1)]
        if tensor.dim() > 3:
            tensor = tensor.flatten(2)
        sample = min(self.sample, tensor.shape[self._batch_axis] - 1)
        return tensor.select(self._batch_axis, sample)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows (rows, width) of a stream that are kept."""
        return self._kept(self._positions(tensor))

    def _kept(self, positions: torch.Tensor) -> torch.Tensor:
        if positions.numel() <= FEW_ELEMENTS:
            return positions
        query = positions.shape[0] - 1 if self.query is None else self.query
        query = min(query, positions.shape[0] - 1)
        return positions[query : query + 1]


def _batch_second(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.MultiheadAttention) and not module.batch_first


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


def _branch(made: str, here: str) -> str:
    """The child of `here` that contains the module `made`: `blocks.0.attention` for
    `blocks.0.attention.W_out` in `blocks.0`."""
    prefix = f"{here}." if here else ""
    if made == here or not made.startswith(prefix):
        return made
    return prefix + made[len(prefix) :].split(".")[0]
