"""Finds attention layers by the names and shapes of their parameters.

A layer has separate matrices (`q_proj`, `k_proj`, `v_proj` and the like), a fused matrix (split by
rows, by columns, or interleaved per head), or is an `nn.MultiheadAttention`; with grouped queries
it has fewer key and value heads than query heads. A pattern finds layers with other names.

A fused matrix is split only where its layout is known: a wrong split would be shown as fact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tui_trainer.probes.attention.effective_weights import find_further_weights
from tui_trainer.protocol.schema import AttentionInfo, AttentionKind
from tui_trainer.trace.parameters import TrackedParameters

# ---------------------------------------------------------------- projections

View = Callable[[torch.Tensor], torch.Tensor]
"""Maps a parameter, or its gradient, to the matrix (output features, input features) in it."""


@dataclass(frozen=True)
class Projection:
    """Wq, Wk or Wv of a layer: a parameter, and the place of the matrix in it."""

    parameter: int
    """Index of the parameter in the tracked parameters."""
    view: View
    rows: int
    columns: int
    first: int | None = None
    """Index of the first element in the flattened parameter, if the matrix is contiguous there."""

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features)."""
        return self.rows, self.columns

    def lies_in(self, tensor: torch.Tensor) -> bool:
        """Whether `flat` returns a view."""
        return self.first is not None and tensor.is_contiguous()

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements (rows · columns,) in the order of `view`, as a view where possible."""
        if self.first is not None and tensor.is_contiguous():
            size = self.rows * self.columns
            whole = tensor.view(-1)
            return whole if whole.numel() == size else whole[self.first : self.first + size]
        return self.view(tensor).reshape(-1)


@dataclass(frozen=True)
class Heads:
    """Numbers of heads that the layer's module or its configuration declares."""

    query: int | None
    key_value: int | None
    dim: int | None


@dataclass(frozen=True)
class Matrix:
    """A parameter that holds Wq, Wk or Wv, or several of them."""

    position: int
    outputs: int
    inputs: int
    transposed: bool
    """Whether its shape is (inputs, outputs), as in Hugging Face's Conv1D."""

    @classmethod
    def of(cls, position: int, shape: tuple[int, ...], transposed: bool) -> Matrix:
        outputs = shape[1] if transposed else shape[0]
        return cls(position, outputs, math.prod(shape) // outputs, transposed)

    def by_rows(self, sizes: tuple[int, ...]) -> tuple[Projection, ...]:
        """Consecutive parts, with `sizes` as their numbers of output features."""
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return tuple(self._part(start, size) for start, size in zip(starts, sizes, strict=True))

    def _part(self, start: int, size: int) -> Projection:
        if self.transposed:
            return Projection(
                self.position, lambda t: t[:, start : start + size].t(), size, self.inputs
            )
        return Projection(
            self.position,
            lambda t: t[start : start + size].reshape(size, -1),
            size,
            self.inputs,
            first=start * self.inputs,
        )

    def interleaved(self, heads: int) -> tuple[Projection, ...]:
        """Wq, Wk and Wv of rows in the order (head, q|k|v, head_dim)."""
        size, inputs = self.outputs // 3, self.inputs

        def part(which: int) -> Projection:
            def view(tensor: torch.Tensor) -> torch.Tensor:
                each = tensor.reshape(heads, 3, size // heads, inputs)
                return each[:, which].reshape(size, inputs)

            return Projection(self.position, view, size, inputs)

        return part(0), part(1), part(2)


def split(
    matrix: Matrix, heads: Heads, mixed: bool, projected: Callable[[int], bool]
) -> tuple[Projection, ...] | str:
    """Wq, Wk and Wv; or the reason why they cannot be separated.

    The parts are equal thirds if the numbers of heads say so, if the outputs are three times the
    inputs, or if the layer's output projection reads a third of them (`projected`). `mixed`: fused
    per head, as in GPT-NeoX and BLOOM.
    """
    h, kv, outputs = heads.query, heads.key_value, matrix.outputs
    if h and kv:
        each = heads.dim or outputs // (h + 2 * kv)
        if each * (h + 2 * kv) == outputs:
            if not mixed or kv == 1:  # with one key head there is only this order
                return matrix.by_rows((h * each, kv * each, kv * each))
            if kv == h:
                return matrix.interleaved(h)
            return "the order of its heads is unknown"
    third, rest = divmod(outputs, 3)
    if rest or not (
        third == matrix.inputs or (h and heads.dim and third == h * heads.dim) or projected(third)
    ):
        unknown = "key/value heads" if h else "heads"
        if h and kv:
            return f"it does not consist of {h} heads and twice {kv} key/value heads"
        return f"the number of its {unknown} is unknown"
    if not mixed:
        return matrix.by_rows((third, third, third))
    return matrix.interleaved(h) if h and third % h == 0 else "the number of its heads is unknown"


# ---------------------------------------------------------------- names

SEPARATE = (
    ("w_query", "w_key", "w_value"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("w_q", "w_k", "w_v"),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_linear", "k_linear", "v_linear"),
    ("linear_q", "linear_k", "linear_v"),
    ("fc_q", "fc_k", "fc_v"),
    ("queries", "keys", "values"),
    ("query_layer", "key_layer", "value_layer"),
    ("q", "k", "v"),
)
FUSED = (
    *("c_attn", "qkv", "wqkv", "w_qkv", "qkv_proj", "to_qkv", "attn_qkv", "c_qkv", "w_pack"),
    *("in_proj_weight", "query_key_value"),
)
QUERY_OF_CROSS_ATTENTION = ("q_attn", "q_proj", "to_q", "wq", "w_q", "q_linear", "query", "q")
KEY_VALUE = ("c_attn", "kv_proj", "to_kv", "wkv", "w_kv", "kv_linear", "key_value", "kv")
"""Cross-attention: Wq and a fused matrix of Wk and Wv, as in Hugging Face's GPT-2."""
INTERLEAVED = ("query_key_value",)
"""Fused per head: rows are (head, q|k|v, head_dim), as in GPT-NeoX and BLOOM."""

ROLE_NAMES = frozenset(
    (*(n for triple in SEPARATE for n in triple), *FUSED, *QUERY_OF_CROSS_ATTENTION, *KEY_VALUE)
)
"""All names of parameters above."""

HEADS = ("n_head", "num_heads", "n_heads", "heads", "num_attention_heads", "nhead", "nheads")
KEY_VALUE_HEADS = (
    *("n_kv_head", "num_key_value_heads", "n_kv_heads", "num_kv_heads", "kv_heads", "n_head_kv"),
    *("num_heads_kv", "kv_n_heads", "n_query_groups", "num_query_groups", "n_local_kv_heads"),
    "n_local_heads",  # gpt-fast; Llama means the query heads by it, and has one of the others
)
HEAD_DIM = ("head_dim", "head_size", "dim_head", "attention_head_size", "d_head", "dim_per_head")

Roles = dict[str, dict[str, int]]
"""Layer path → role (`q`, `k`, `v`, or a fused name) → position of the parameter."""


def by_pattern(tracked: TrackedParameters, pattern: str) -> Roles:
    """Roles by a regular expression over parameter names, with named groups."""
    roles: Roles = {}
    for position, name in enumerate(tracked.weight_names):
        match = re.search(pattern, name)
        if match is None or len(tracked.weight_shape(position)) < 2:
            continue
        groups = match.groupdict()
        for role in ("q", "k", "v", "qkv"):
            if groups.get(role) is not None:
                roles.setdefault(groups.get("layer") or "", {})[role] = position
    return roles


def by_name(tracked: TrackedParameters) -> Roles:
    """Roles by the usual names."""
    members: dict[str, dict[str, int]] = {}
    for position, name in enumerate(tracked.weight_names):
        if len(tracked.weight_shape(position)) >= 2:
            path, _, last = name.removesuffix(".weight").rpartition(".")
            members.setdefault(path, {})[last.lower()] = position
    roles: Roles = {}
    for path, found in members.items():
        for triple in SEPARATE:
            if all(role in found for role in triple):
                roles[path] = dict(zip("qkv", (found[role] for role in triple), strict=True))
                break
        else:
            query = next((name for name in QUERY_OF_CROSS_ATTENTION if name in found), None)
            both = next((name for name in KEY_VALUE if name in found), None)
            fused = next((name for name in FUSED if name in found), None)
            if query is not None and both is not None:
                roles[path] = {"q": found[query], "kv": found[both]}
            elif fused is not None:
                roles[path] = {fused: found[fused]}
    return roles


def declared_heads(tracked: TrackedParameters, path: str) -> Heads:
    """Numbers of heads from the modules around a layer, or from their configurations."""
    modules = list(_modules_around(tracked, path))
    return Heads(*(_first_number(modules, names) for names in (HEADS, KEY_VALUE_HEADS, HEAD_DIM)))


def _modules_around(tracked: TrackedParameters, path: str) -> Iterator[object]:
    """The layer's module and the two that contain it, each followed by its configuration."""
    for _ in range(3):
        module = tracked.modules.get(path)
        if module is not None:
            yield module
            config = getattr(module, "config", None)
            if config is not None:
                yield config
        if not path:
            return
        path = path.rpartition(".")[0]


def _first_number(things: list[object], names: tuple[str, ...]) -> int | None:
    for thing in things:
        for name in names:
            try:
                value = getattr(thing, name, None)
            except Exception:
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


NO_LAYERS = "no attention layer was found by its parameters' names"


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer and where its Wq, Wk and Wv are."""

    path: str
    kind: AttentionKind
    q: Projection
    k: Projection
    v: Projection
    heads: int | None
    key_value_heads: int | None

    @property
    def parts(self) -> tuple[Projection, Projection, Projection]:
        return self.q, self.k, self.v

    @property
    def group(self) -> int:
        """Number of query heads that share a key/value head."""
        if self.heads and self.key_value_heads:
            return self.heads // self.key_value_heads
        return 1

    def comparable(self, pair: str) -> bool:
        """Whether `qk`, `qv` or `kv` can be compared: same shape, or per shared head."""
        if pair == "kv":
            return self.k.shape == self.v.shape
        other = self.k if pair == "qk" else self.v
        return self.q.shape == (other.rows * self.group, other.columns)

    @property
    def incomparable(self) -> tuple[str, ...]:
        """The pairs that cannot be compared."""
        return tuple(pair for pair in ("qk", "qv", "kv") if not self.comparable(pair))

    @property
    def note(self) -> str:
        """Why some pairs cannot be compared; "" if all can."""
        match self.incomparable:
            case ():
                return ""
            case ("qk", "qv") if self.q.columns != self.k.columns:
                return "Q has a different input width from K and V: they cannot be compared"
            case ("qk", "qv"):
                return "the number of heads is unknown: Q cannot be compared with K and V"
            case ("qv", "kv"):
                return "V has a different shape from Q and K: it cannot be compared with them"
            case ("qk", "kv"):
                return "K has a different shape from Q and V: it cannot be compared with them"
        return "Q, K and V all have different shapes: they cannot be compared"

    @property
    def even(self) -> bool:
        """Whether Wq, Wk and Wv have the same shape."""
        return self.q.shape == self.k.shape == self.v.shape

    def info(self, names: list[str]) -> AttentionInfo:
        """The description of the layer for viewers."""
        return AttentionInfo(
            layer=self.path,
            kind=self.kind,
            query=names[self.q.parameter],
            key=names[self.k.parameter],
            value=names[self.v.parameter],
            heads=self.heads,
            key_value_heads=self.key_value_heads,
            head_dim=self.q.rows // self.heads if self.heads else None,
            note=self.note,
            incomparable=self.incomparable,
        )


SHARDED = "the weights are sharded over processes: each has only a part of every matrix"


@dataclass(frozen=True)
class FoundLayers:
    """The attention layers of a model."""

    layers: list[AttentionLayer]
    """Layers in the order of the model."""
    left_out: tuple[str, ...] = ()
    """Matrices that cannot be split, each with the reason."""

    @property
    def nothing(self) -> str:
        """Why no layer was found; "" if any was."""
        return "" if self.layers else self.remark or NO_LAYERS

    @property
    def remark(self) -> str:
        """Matrices that were left out, on one line."""
        more = len(self.left_out) - 1
        return "".join(self.left_out[:1]) + (f", and {more} more like it" if more > 0 else "")


def find_layers(tracked: TrackedParameters, pattern: str | None = None) -> FoundLayers:
    """The attention layers among the tracked parameters, in the order of the model.

    `pattern`: a regular expression over parameter names with the group `layer` and one of the
    groups `q`, `k`, `v` (separate) or `qkv` (fused); it replaces the usual names.
    """
    if tracked.sharded:
        return FoundLayers([], (SHARDED,))
    if tracked.further_left_out is None:
        tracked.further, tracked.further_left_out = find_further_weights(tracked, ROLE_NAMES)
    roles = by_pattern(tracked, pattern) if pattern else by_name(tracked)
    found: list[AttentionLayer] = []
    left_out: list[str] = list(tracked.further_left_out)
    for path, named in roles.items():
        layer = _layer(tracked, path, named)
        if isinstance(layer, AttentionLayer):
            found.append(layer)
        else:
            left_out.append(layer)
    order = {layer.path: min(part.parameter for part in layer.parts) for layer in found}
    return FoundLayers(sorted(found, key=lambda layer: order[layer.path]), tuple(left_out))


def _layer(tracked: TrackedParameters, path: str, roles: dict[str, int]) -> AttentionLayer | str:
    """The layer; or the matrix that cannot be split, and why."""
    declared = declared_heads(tracked, path)
    if set(roles) >= {"q", "k", "v"}:
        parts: tuple[Projection, ...] = tuple(_whole(tracked, roles[role]) for role in "qkv")
        multihead = isinstance(tracked.modules.get(path), torch.nn.MultiheadAttention)
        kind: AttentionKind = "multihead" if multihead else "separate"
    else:
        name = next((name for name in roles if name not in ("q", "k", "v")), "")
        if not name:
            return f"{path}: only {' and '.join(roles)} of it was found"
        position = roles[name]
        parts_or_reason = _split_fused(tracked, path, name, position, declared)
        if isinstance(parts_or_reason, str):
            name = tracked.weight_names[position]
            return f"{name} cannot be split into its parts: {parts_or_reason}"
        parts = (_whole(tracked, roles["q"]), *parts_or_reason) if name == "kv" else parts_or_reason
        kind = "multihead" if name == "in_proj_weight" else "fused"
    q, k, v = parts
    heads, key_value_heads = _heads(declared, q, k, v)
    if k.rows != q.rows and kind != "multihead":
        kind = "grouped"
    return AttentionLayer(path, kind, q, k, v, heads, key_value_heads)


def _heads(
    declared: Heads, q: Projection, k: Projection, v: Projection
) -> tuple[int | None, int | None]:
    """Numbers of query heads and of key/value heads; None where they do not fit the shapes."""
    heads = declared.query
    if heads is None and declared.dim and q.rows % declared.dim == 0:
        heads = q.rows // declared.dim
    if heads is None or heads <= 0 or q.rows % heads:
        return None, None
    shared, rest = divmod(k.rows, q.rows // heads)
    fits = not rest and shared > 0 and heads % shared == 0 and v.rows % shared == 0
    return heads, shared if fits else None


def _matrix(tracked: TrackedParameters, position: int) -> Matrix:
    """The parameter at `position` as a matrix."""
    module = tracked.modules.get(tracked.weight_names[position].removesuffix(".weight"))
    module = getattr(module, "base_layer", module)
    conv1d = type(module).__name__ == "Conv1D"  # Hugging Face's GPT-2: (inputs, outputs)
    return Matrix.of(position, tracked.weight_shape(position), conv1d)


def _whole(tracked: TrackedParameters, position: int) -> Projection:
    matrix = _matrix(tracked, position)
    return matrix.by_rows((matrix.outputs,))[0]


def _split_fused(
    tracked: TrackedParameters, path: str, name: str, position: int, declared: Heads
) -> tuple[Projection, ...] | str:
    """Wq, Wk and Wv of a fused matrix (`kv`: Wk and Wv); or why they cannot be separated."""
    fused = _matrix(tracked, position)
    if name == "kv":
        half, rest = divmod(fused.outputs, 2)
        return "the number of its outputs is odd" if rest else fused.by_rows((half, half))

    def projected(width: int) -> bool:
        """Whether another matrix of the layer maps `width` features back to the inputs."""
        wanted = (width, fused.inputs) if fused.transposed else (fused.inputs, width)
        return bool(path) and any(
            other.startswith(f"{path}.")
            and parameter.dim() >= 2
            and (parameter.shape[0], parameter.numel() // parameter.shape[0]) == wanted
            for other, parameter in zip(tracked.names, tracked.parameters, strict=True)
        )

    return split(fused, declared, name in INTERLEAVED, projected)
