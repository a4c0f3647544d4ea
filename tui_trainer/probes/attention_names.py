"""Which parameters are those of an attention layer: the names that models give them, and what
their modules say of their heads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tui_trainer.probes.attention_parts import Heads
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
QUERY_BESIDE = ("q_attn", "q_proj", "to_q", "wq", "w_q", "q_linear", "query", "q")
KEY_VALUE = ("c_attn", "kv_proj", "to_kv", "wkv", "w_kv", "kv_linear", "key_value", "kv")
"""Cross-attention: Wq beside a matrix of Wk and Wv, as Hugging Face's GPT-2 has it."""
INTERLEAVED = ("query_key_value",)
"""Fused per head: rows are (head, q|k|v, head_dim), as GPT-NeoX and BLOOM have them."""

HEADS = ("n_head", "num_heads", "n_heads", "heads", "num_attention_heads", "nhead", "nheads")
KEY_VALUE_HEADS = (
    *("n_kv_head", "num_key_value_heads", "n_kv_heads", "num_kv_heads", "kv_heads", "n_head_kv"),
    *("num_heads_kv", "kv_n_heads", "n_query_groups", "num_query_groups", "n_local_kv_heads"),
    "n_local_heads",  # gpt-fast; where Llama calls the query heads so, it has one of the others
)
HEAD_DIM = ("head_dim", "head_size", "dim_head", "attention_head_size", "d_head", "dim_per_head")

Roles = dict[str, dict[str, int]]
"""Layer path to role (`q`, `k`, `v`, or a fused name) to the parameter's position."""


def by_pattern(subject: Subject, pattern: str) -> Roles:
    """By a regular expression over parameter names, with named groups."""
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


def by_name(subject: Subject) -> Roles:
    """By the usual names."""
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
            query = next((name for name in QUERY_BESIDE if name in found), None)
            both = next((name for name in KEY_VALUE if name in found), None)
            fused = next((name for name in FUSED if name in found), None)
            if query is not None and both is not None:
                roles[path] = {"q": found[query], "kv": found[both]}
            elif fused is not None:
                roles[path] = {fused: found[fused]}
    return roles


def told_heads(subject: Subject, path: str) -> Heads:
    """What the modules around a layer, or their configurations, say of its heads."""
    modules = list(_modules_around(subject, path))
    return Heads(*(_first_number(modules, names) for names in (HEADS, KEY_VALUE_HEADS, HEAD_DIM)))


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
