"""Finding attention layers by the names and shapes of their parameters.

Layers are separate (`q_proj`, `k_proj`, `v_proj` and their like), fused (one matrix, split by rows,
by columns, or interleaved per head), or `nn.MultiheadAttention`; keys and values may be fewer than
queries (grouped queries). Where the usual names are not used, a pattern tells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tui_trainer.probes.attention_names import INTERLEAVED, by_name, by_pattern, told_heads
from tui_trainer.probes.attention_parts import Heads, Matrix, Part, split
from tui_trainer.protocol.describe import AttentionInfo
from tui_trainer.tracing.subject import Subject

NO_LAYERS = "no attention layer was found by its parameters' names"


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

    def comparable(self, pair: str) -> bool:
        """Whether the two of `qk`, `qv` or `kv` can be compared: same shape, or per shared head."""
        if pair == "kv":
            return self.k.shape == self.v.shape
        other = self.k if pair == "qk" else self.v
        return self.q.shape == (other.rows * self.group, other.columns)

    @property
    def incomparable(self) -> tuple[str, ...]:
        """The pairs that cannot."""
        return tuple(pair for pair in ("qk", "qv", "kv") if not self.comparable(pair))

    @property
    def note(self) -> str:
        """Why they cannot."""
        match self.incomparable:
            case ():
                return ""
            case ("qk", "qv") if self.q.columns != self.k.columns:
                return (
                    "Q reads other inputs than K and V, of another width: they cannot be compared"
                )
            case ("qk", "qv"):
                return "the number of heads is unknown: Q cannot be compared with K and V"
            case ("qv", "kv"):
                return "V is of another shape than Q and K: it cannot be compared with them"
            case ("qk", "kv"):
                return "K is of another shape than Q and V: it cannot be compared with them"
        return "Q, K and V are each of another shape: they cannot be compared"

    @property
    def even(self) -> bool:
        """Whether Wq, Wk and Wv have one shape."""
        return self.q.shape == self.k.shape == self.v.shape

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
            incomparable=self.incomparable,
        )


@dataclass(frozen=True)
class Found:
    """What there is of attention in a model."""

    layers: list[Layer]
    """In the order of the model."""
    left_out: tuple[str, ...] = ()
    """Matrix matrices that cannot be taken apart, each with the reason."""

    @property
    def nothing(self) -> str:
        """Why there is no layer; "" when there is one."""
        return "" if self.layers else self.remark or NO_LAYERS

    @property
    def remark(self) -> str:
        """What was left out, in one line."""
        more = len(self.left_out) - 1
        return "".join(self.left_out[:1]) + (f", and {more} more like it" if more > 0 else "")


def find_layers(subject: Subject, pattern: str | None = None) -> Found:
    """The attention layers among the subject's parameters, in the order of the model.

    `pattern`: a regular expression over parameter names with the group `layer` and one of the
    groups `q`, `k`, `v` (separate) or `qkv` (fused); it replaces the usual names.
    """
    roles = by_pattern(subject, pattern) if pattern else by_name(subject)
    found: list[Layer] = []
    left_out: list[str] = []
    for path, named in roles.items():
        layer = _layer(subject, path, named)
        if isinstance(layer, Layer):
            found.append(layer)
        else:
            left_out.append(layer)
    order = {layer.path: min(part.parameter for part in layer.parts) for layer in found}
    return Found(sorted(found, key=lambda layer: order[layer.path]), tuple(left_out))


def _layer(subject: Subject, path: str, roles: dict[str, int]) -> Layer | str:
    """The layer; or which matrix cannot be taken apart, and why."""
    told = told_heads(subject, path)
    if set(roles) >= {"q", "k", "v"}:
        parts: tuple[Part, ...] = tuple(_whole(subject, roles[role]) for role in "qkv")
        multihead = isinstance(subject.modules.get(path), torch.nn.MultiheadAttention)
        kind = "multihead" if multihead else "separate"
    else:
        name = next((name for name in roles if name not in ("q", "k", "v")), "")
        if not name:
            return f"{path}: only {' and '.join(roles)} of it was found"
        position = roles[name]
        taken = _take_apart(subject, path, name, position, told)
        if isinstance(taken, str):
            return f"{subject.names[position]} cannot be split into its parts: {taken}"
        parts = (_whole(subject, roles["q"]), *taken) if name == "kv" else taken
        kind = "multihead" if name == "in_proj_weight" else "fused"
    q, k, v = parts
    heads, key_value_heads = _heads(told, q, k, v)
    if k.rows != q.rows and kind != "multihead":
        kind = "grouped"
    return Layer(path, kind, q, k, v, heads, key_value_heads)


def _heads(told: Heads, q: Part, k: Part, v: Part) -> tuple[int | None, int | None]:
    """Query heads and key/value heads, where they fit the shapes."""
    heads = told.query
    if heads is None and told.dim and q.rows % told.dim == 0:
        heads = q.rows // told.dim
    if heads is None or heads <= 0 or q.rows % heads:
        return None, None
    shared, rest = divmod(k.rows, q.rows // heads)
    fits = not rest and shared > 0 and heads % shared == 0 and v.rows % shared == 0
    return heads, shared if fits else None


def _matrix(subject: Subject, position: int) -> Matrix:
    """A parameter, and which of its sides is which."""
    module = subject.modules.get(subject.names[position].removesuffix(".weight"))
    conv1d = type(module).__name__ == "Conv1D"  # Hugging Face's GPT-2: (inputs, outputs)
    return Matrix.of(position, subject.parameters[position], conv1d)


def _whole(subject: Subject, position: int) -> Part:
    matrix = _matrix(subject, position)
    return matrix.by_rows((matrix.outputs,))[0]


def _take_apart(
    subject: Subject, path: str, name: str, position: int, told: Heads
) -> tuple[Part, ...] | str:
    """Wq, Wk and Wv of a fused matrix (`kv`: Wk and Wv); or why they cannot be told apart."""
    fused = _matrix(subject, position)
    if name == "kv":
        half, rest = divmod(fused.outputs, 2)
        return "its outputs are not even in number" if rest else fused.by_rows((half, half))

    def projected(width: int) -> bool:
        """Whether a matrix beside it takes so many features back to the inputs."""
        wanted = (width, fused.inputs) if fused.transposed else (fused.inputs, width)
        return bool(path) and any(
            other.startswith(f"{path}.")
            and parameter.dim() >= 2
            and (parameter.shape[0], parameter.numel() // parameter.shape[0]) == wanted
            for other, parameter in zip(subject.names, subject.parameters, strict=True)
        )

    return split(fused, told, name in INTERLEAVED, projected)
