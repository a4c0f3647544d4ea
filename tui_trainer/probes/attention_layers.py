"""Finding attention layers by the names and shapes of their parameters.

Layers are separate (`q_proj`, `k_proj`, `v_proj` and their like), fused (one matrix, split by rows,
by columns, or interleaved per head), or `nn.MultiheadAttention`; keys and values may be fewer than
queries (grouped queries). Where the usual names are not used, a pattern tells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tui_trainer.protocol.describe import AttentionInfo
from tui_trainer.tracing.subject import Subject

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
INTERLEAVED = ("query_key_value",)
"""Fused per head: rows are (head, q|k|v, head_dim), as GPT-NeoX and BLOOM have them."""

HEADS = ("n_head", "num_heads", "n_heads", "heads", "num_attention_heads", "nhead", "nheads")
KEY_VALUE_HEADS = ("n_kv_head", "num_key_value_heads", "n_kv_heads", "num_kv_heads", "kv_heads")
HEAD_DIM = ("head_dim", "head_size", "dim_head", "attention_head_size", "d_head", "dim_per_head")

View = Callable[[torch.Tensor], torch.Tensor]
"""Takes a parameter (or its gradient) to the matrix (output features, input features) in it."""


@dataclass(frozen=True)
class Part:
    """Wq, Wk or Wv of a layer: a parameter and where in it."""

    parameter: int
    """Position in the subject."""
    view: View
    rows: int
    columns: int
    first: int | None = None
    """Where it begins in a contiguous parameter, when it lies there in one piece."""

    def lies_in(self, tensor: torch.Tensor) -> bool:
        """Whether `flat` is a view."""
        return self.first is not None and tensor.is_contiguous()

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its elements (rows · columns,), a view where possible; their order is that of `view`."""
        if self.first is not None and tensor.is_contiguous():
            size = self.rows * self.columns
            whole = tensor.view(-1)
            return whole if whole.numel() == size else whole[self.first : self.first + size]
        return self.view(tensor).reshape(-1)


@dataclass(frozen=True)
class Layer:
    """An attention layer."""

    path: str
    kind: str
    q: Part
    k: Part
    v: Part
    heads: int | None
    key_value_heads: int | None
    note: str

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        """Q, K, V."""
        return self.q, self.k, self.v

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        if self.heads and self.key_value_heads:
            return self.heads // self.key_value_heads
        return 1

    @property
    def query_comparable(self) -> bool:
        """Whether Wq can be compared with Wk and Wv: same shape, or per shared head."""
        return self.q.columns == self.k.columns and self.q.rows == self.k.rows * self.group

    @property
    def even(self) -> bool:
        """Whether Wq, Wk and Wv have one shape."""
        return len({(p.rows, p.columns) for p in self.parts}) == 1

    def info(self, names: list[str]) -> AttentionInfo:
        """As it is described to viewers."""
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
        )


def find_layers(subject: Subject, pattern: str | None = None) -> list[Layer]:
    """The attention layers among the subject's parameters, in the order of the model.

    `pattern`: a regular expression over parameter names with the group `layer` and one of the
    groups `q`, `k`, `v` (separate) or `qkv` (fused); it replaces the usual names.
    """
    roles = _by_pattern(subject, pattern) if pattern else _by_name(subject)
    found: list[Layer] = []
    for path, named in roles.items():
        layer = _layer(subject, path, named)
        if layer is not None:
            found.append(layer)
    order = {layer.path: min(part.parameter for part in layer.parts) for layer in found}
    return sorted(found, key=lambda layer: order[layer.path])


Roles = dict[str, dict[str, int]]
"""Layer path to role (`q`, `k`, `v`, or a fused name) to the parameter's position."""


def _by_pattern(subject: Subject, pattern: str) -> Roles:
    roles: Roles = {}
    for position, name in enumerate(subject.names):
        match = re.search(pattern, name)
        if match is None or subject.parameters[position].dim() < 2:
            continue
        groups = match.groupdict()
        for role in ("q", "k", "v", "qkv"):
            if groups.get(role) is not None:
                roles.setdefault(groups.get("layer") or "", {})[role] = position
    return roles


def _by_name(subject: Subject) -> Roles:
    members: dict[str, dict[str, int]] = {}
    for position, name in enumerate(subject.names):
        if subject.parameters[position].dim() >= 2:
            path, _, last = name.removesuffix(".weight").rpartition(".")
            members.setdefault(path, {})[last.lower()] = position
    roles: Roles = {}
    for path, found in members.items():
        for triple in SEPARATE:
            if all(role in found for role in triple):
                roles[path] = dict(zip("qkv", (found[role] for role in triple), strict=True))
                break
        else:
            fused = next((name for name in FUSED if name in found), None)
            if fused is not None:
                roles[path] = {fused: found[fused]}
    return roles


def _layer(subject: Subject, path: str, roles: dict[str, int]) -> Layer | None:
    modules = list(_modules_around(subject, path))
    heads = _first_number(modules, HEADS)
    key_value_heads = _first_number(modules, KEY_VALUE_HEADS)
    head_dim = _first_number(modules, HEAD_DIM)
    if set(roles) >= {"q", "k", "v"}:
        q, k, v = (_whole(subject, roles[role]) for role in "qkv")
        multihead = isinstance(subject.modules.get(path), torch.nn.MultiheadAttention)
        kind = "multihead" if multihead else "separate"
    else:
        ((name, position),) = list(roles.items())[:1]
        fused = _split(subject, path, name, position, heads, key_value_heads, head_dim)
        if fused is None:
            return None
        q, k, v = fused
        kind = "multihead" if name == "in_proj_weight" else "fused"
    if heads is None and head_dim and q.rows % head_dim == 0:
        heads = q.rows // head_dim
    if heads is None or heads <= 0 or q.rows % heads:
        heads = key_value_heads = None
    else:
        each = q.rows // heads
        fits = k.rows % each == 0 and k.rows > 0 and heads % (k.rows // each) == 0
        key_value_heads = k.rows // each if fits else None
    note = ""
    if k.rows != q.rows and kind != "multihead":
        kind = "grouped"
        if key_value_heads is None:
            note = "the number of heads is unknown: Q cannot be compared with the smaller K and V"
    if q.columns != k.columns:
        note = "Q reads other inputs than K and V, of another width: they cannot be compared"
    return Layer(path, kind, q, k, v, heads, key_value_heads, note)


def _whole(subject: Subject, position: int) -> Part:
    parameter = subject.parameters[position]
    rows = parameter.shape[0]
    columns = parameter.numel() // rows
    return Part(position, lambda t: t.reshape(rows, -1), rows, columns, first=0)


def _split(
    subject: Subject,
    path: str,
    name: str,
    position: int,
    heads: int | None,
    key_value_heads: int | None,
    head_dim: int | None,
) -> tuple[Part, Part, Part] | None:
    """The parts of a fused matrix; None when it is no such thing."""
    parameter = subject.parameters[position]
    module = next(
        (m for p, m in subject.modules.items() if p.lower() == f"{path}.{name}".lower()), None
    )
    transposed = type(module).__name__ == "Conv1D"  # Hugging Face's GPT-2: (inputs, outputs)
    outputs = parameter.shape[1] if transposed else parameter.shape[0]
    inputs = parameter.numel() // outputs
    if name in INTERLEAVED and heads and outputs % (3 * heads) == 0:
        return _interleaved(position, heads, outputs, inputs)
    if outputs % 3 == 0 and (outputs == 3 * inputs or key_value_heads in (None, heads)):
        sizes = (outputs // 3,) * 3
    elif heads and key_value_heads and outputs % (heads + 2 * key_value_heads) == 0:
        each = head_dim or outputs // (heads + 2 * key_value_heads)
        sizes = (heads * each, key_value_heads * each, key_value_heads * each)
        if sum(sizes) != outputs:
            return None
    else:
        return None
    starts = (0, sizes[0], sizes[0] + sizes[1])

    def part(start: int, size: int) -> Part:
        if transposed:
            return Part(position, lambda t: t[:, start : start + size].t(), size, inputs)
        return Part(
            position,
            lambda t: t[start : start + size].reshape(size, -1),
            size,
            inputs,
            first=start * inputs,
        )

    q, k, v = (part(start, size) for start, size in zip(starts, sizes, strict=True))
    return q, k, v


def _interleaved(position: int, heads: int, outputs: int, inputs: int) -> tuple[Part, Part, Part]:
    size = outputs // 3

    def part(which: int) -> Part:
        def view(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.reshape(heads, 3, size // heads, inputs)[:, which].reshape(size, inputs)

        return Part(position, view, size, inputs)

    return part(0), part(1), part(2)


def _modules_around(subject: Subject, path: str) -> Iterator[object]:
    """The layer's module and the two around it, each followed by its configuration."""
    for _ in range(3):
        module = subject.modules.get(path)
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
