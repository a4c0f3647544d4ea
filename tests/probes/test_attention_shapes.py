"""Fused matrices that do not split into thirds, and matrices of different shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.probes.test_attention import (
    OPTIONS,
    Conv1D,
    Multihead,
    Separate,
    Stack,
    attend,
    expected,
    run,
)
from tests.trace.support import KeepingRecorder, trace
from tui_trainer.probes.attention.layers import find_layers
from tui_trainer.trace.parameters import TrackedParameters


class FusedOf(nn.Module):
    """Fused with `heads` query heads and `shared` key/value heads of `dim`; sets `attributes`."""

    def __init__(self, attributes, heads=4, shared=1, dim=2, width=8, name="wqkv", out=False):
        super().__init__()
        self.name, self.sizes = name, (heads * dim, shared * dim, shared * dim)
        self.counts = heads, shared
        for attribute, value in attributes.items():
            setattr(self, attribute, value)
        setattr(self, name, nn.Linear(width, sum(self.sizes), bias=False))
        if out:
            self.to_out = nn.Sequential(nn.Linear(heads * dim, width, bias=False), nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = getattr(self, self.name)(x).split(self.sizes, -1)
        y = attend(q, k, v, *self.counts)
        return self.to_out(y) if hasattr(self, "to_out") else y

    def parts(self):
        return list(getattr(self, self.name).weight.split(self.sizes))


GPT_FAST = {"n_head": 4, "n_local_heads": 1, "head_dim": 2}


def look_at(model: nn.Module):
    pairs = list(model.named_parameters())
    return find_layers(
        TrackedParameters(
            name="sgd",
            key="",
            parameters=[p for _, p in pairs],
            names=[n for n, _ in pairs],
            indices=list(range(len(pairs))),
            own=len(pairs),
            modules=dict(model.named_modules()),
        )
    )


@pytest.mark.parametrize(
    "attributes",
    [
        GPT_FAST,
        *(
            {"num_heads": 4, name: 1}
            for name in ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
        ),
        *({"n_head": 4, name: 1} for name in ("n_head_kv", "num_heads_kv", "n_query_groups")),
    ],
)
def test_grouped_heads_are_found_under_many_names(attributes):
    found = look_at(Stack(lambda: FusedOf(attributes)))
    assert found.left_out == ()
    for layer in found.layers:
        assert layer.kind == "grouped"
        assert [part.rows for part in layer.parts] == [8, 2, 2]
        assert (layer.heads, layer.key_value_heads) == (4, 1)


def test_statistics_of_fused_grouped_heads():
    torch.manual_seed(0)
    recorder, start, seen = run(Stack(lambda: FusedOf(GPT_FAST)))
    for step, (gradients, parts) in enumerate(seen, start=1):
        row = recorder.rows("attention")[step]
        for number, info in enumerate(recorder.info["attention"]):
            truth = expected(parts[number], start[number], gradients[number], 4)
            for statistic, value in truth.items():
                found = row[f"{info.layer}.{statistic}"]
                np.testing.assert_allclose(found, value, rtol=1e-4, atol=2e-5, err_msg=statistic)


@pytest.mark.parametrize(
    ("attributes", "name", "why"),
    [
        ({"n_head": 4, "head_dim": 2}, "wqkv", "number of its key/value heads is unknown"),
        ({}, "wqkv", "number of its heads is unknown"),
        (
            {"n_head": 4, "n_kv_head": 3, "head_dim": 2},
            "wqkv",
            "does not consist of 4 heads and twice 3",
        ),
        ({"num_heads": 4, "num_kv_heads": 2}, "query_key_value", "order of its heads"),
    ],
)
def test_unsplittable_matrices_are_reported_and_not_shown(attributes, name, why):
    shared = attributes.get("num_kv_heads", 1)
    recorder, _, _ = run(Stack(lambda: FusedOf(attributes, shared=shared, name=name)))
    assert recorder.info["attention"] == ()
    for quantity in ("attention", "attention_spectrum", "attention_health", "attention_heads"):
        reason = recorder.info["unseen"][quantity]
        assert f"layers.0.{name}.weight cannot be split" in reason
        assert why in reason
        assert "and 1 more" in reason


def test_one_unsplittable_matrix_among_others_is_logged():
    model = Stack(lambda: FusedOf(GPT_FAST))
    model.layers[1] = FusedOf({})
    recorder, _, _ = run(model)
    assert [info.layer for info in recorder.info["attention"]] == ["layers.0"]
    (text,) = recorder.notices_of("unseen")
    assert "layers.1.wqkv.weight cannot be split" in text
    assert "attention" not in recorder.info["unseen"]


def test_thirds_of_other_width_than_the_inputs_are_known_by_the_output_projection():
    found = look_at(Stack(lambda: FusedOf({"heads": 4}, shared=4, dim=3, name="to_qkv", out=True)))
    assert [part.shape for part in found.layers[0].parts] == [(12, 8)] * 3
    without = look_at(Stack(lambda: FusedOf({"heads": 4}, shared=4, dim=3, name="to_qkv")))
    assert without.layers == []
    attributes = {"heads": 4, "dim_head": 3}
    again = look_at(Stack(lambda: FusedOf(attributes, shared=4, dim=3, name="to_qkv")))
    assert [part.shape for part in again.layers[0].parts] == [(12, 8)] * 3


class Crossed(nn.Module):
    """Hugging Face's GPT-2: `c_attn` holds Wk and Wv alone where queries come from elsewhere."""

    def __init__(self, width=12, query="q_attn"):
        super().__init__()
        self.num_heads, self.head_dim, self.query = 4, 3, query
        self.c_attn = Conv1D(2 * width, width)
        setattr(self, query, Conv1D(width, width))


def test_keys_and_values_in_one_matrix_are_halves():
    model = nn.ModuleDict({"crossattention": Crossed()})
    (layer,) = look_at(model).layers
    weight = model["crossattention"].c_attn.weight
    assert [part.shape for part in layer.parts] == [(12, 12)] * 3
    query = model["crossattention"].q_attn.weight
    assert torch.equal(layer.q.view(query), query.t())
    assert torch.equal(layer.k.view(weight), weight[:, :12].t())
    assert torch.equal(layer.v.view(weight), weight[:, 12:].t())


def test_keys_and_values_without_their_queries_are_not_cut_in_thirds():
    found = look_at(nn.ModuleDict({"crossattention": Crossed(query="asker")}))
    assert found.layers == []
    assert "crossattention.c_attn.weight cannot be split" in found.nothing


class Wider(Separate):
    """Values of another width than queries and keys: d_v is not d_k."""

    def __init__(self):
        super().__init__()
        self.v_proj = nn.Linear(8, 12, bias=False)
        self.o_proj = nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return self.o_proj(super().forward(x))


UNEVEN = {
    "d_v": (Wider, ("qv", "kv"), "V has a different shape"),
    "vdim": (lambda: Multihead(vdim=6), ("qv", "kv"), "V has a different shape"),
    "kdim": (lambda: Multihead(kdim=6), ("qk", "kv"), "K has a different shape"),
    "both": (lambda: Multihead(kdim=6, vdim=6), ("qk", "qv"), "Q has a different input width"),
    "each": (lambda: Multihead(kdim=6, vdim=4), ("qk", "qv", "kv"), "all have different shapes"),
}


@pytest.mark.parametrize("make", UNEVEN)
def test_only_pairs_of_one_shape_are_compared(make, monkeypatch):
    build, pairs, why = UNEVEN[make]

    def forward(self, x):
        inner = self.inner
        k, v = x[..., : inner.kdim], x[..., : inner.vdim]
        return inner(x, k, v, need_weights=False)[0]

    monkeypatch.setattr(Multihead, "forward", forward)
    torch.manual_seed(0)
    recorder, _, seen = run(Stack(build))
    assert recorder.notices_of("fault") == []
    row, heads = recorder.rows("attention")[3], recorder.rows("attention_heads")[3]
    for number, info in enumerate(recorder.info["attention"]):
        assert info.incomparable == pairs
        assert why in info.note
        for pair in ("qk", "qv", "kv"):
            values = [row[f"{info.layer}.{s}_{pair}"] for s in ("cos", "distance", "grad_cos")]
            values += [heads[f"{info.layer}.{head}.cos_{pair}"] for head in range(4)]
            assert np.isnan(values).all() if pair in pairs else np.isfinite(values).all()
            if pair not in pairs:
                a, b = (seen[2][1][number]["qkv".index(letter)] for letter in pair)
                truth = float((a * b).sum() / (a.norm() * b.norm()))
                assert values[0] == pytest.approx(truth, abs=2e-5)
                truth = float((a[2:4] * b[2:4]).sum() / (a[2:4].norm() * b[2:4].norm()))
                if a.shape == b.shape == (8, 8) or make == "both":
                    assert heads[f"{info.layer}.1.cos_{pair}"] == pytest.approx(truth, abs=2e-5)
        for letter in "qkv":
            assert np.isfinite(row[f"{info.layer}.drift_{letter}"])
            assert np.isfinite([heads[f"{info.layer}.{h}.norm_{letter}"] for h in range(4)]).all()
        assert np.isfinite(row[f"{info.layer}.growth"])


def test_a_pattern_that_finds_only_queries_is_reported():
    recorder = KeepingRecorder()
    model = Stack(Separate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        model(torch.randn(3, 5, 8)).square().sum().backward()
        optimizer.step()

    pattern = r"(?P<layer>layers\.\d+)\.(?:(?P<q>q_proj)|(?P<k>k_proj))\.weight"
    options = type(OPTIONS)(budget=0.0, attention_pattern=pattern)
    trace(loop, options=options, recorder=recorder)
    assert "layers.0: only q and k of it was found" in recorder.info["unseen"]["attention"]
