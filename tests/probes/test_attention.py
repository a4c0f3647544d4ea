"""Attention layers of many kinds, and their statistics compared with a slow float64 reference."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.trace.support import KeepingRecorder, SmallGpt, close, gpt_loop, trace
from tui_trainer.probes.attention.health import health
from tui_trainer.probes.attention.spectrum import AttentionSpectrum, Decomposer
from tui_trainer.protocol.schema import ATTENTION_STATISTICS
from tui_trainer.trace.probe import ProbeOptions

OPTIONS = ProbeOptions(
    budget=0.0,
    cadences={"attention_spectrum": 1, "attention_health": 1},
)


class Conv1D(nn.Module):
    """Hugging Face's: the weight is (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def attend(q, k, v, heads, key_value_heads=None):
    """(B, T, heads · d) each."""
    key_value_heads = key_value_heads or heads
    batch, positions = q.shape[:2]
    q = q.view(batch, positions, heads, -1).transpose(1, 2)
    k, v = (t.reshape(batch, positions, key_value_heads, -1).transpose(1, 2) for t in (k, v))
    k, v = (t.repeat_interleave(heads // key_value_heads, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).reshape(batch, positions, -1)


class Separate(nn.Module):
    names = ("q_proj", "k_proj", "v_proj")

    def __init__(self, width=8, names=None, key_value_heads=4):
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, key_value_heads
        self.chosen = names or self.names
        small = width // 4 * key_value_heads
        for name, rows in zip(self.chosen, (width, small, small), strict=True):
            setattr(self, name, nn.Linear(width, rows, bias=False))

    def forward(self, x):
        q, k, v = (getattr(self, name)(x) for name in self.chosen)
        return attend(q, k, v, 4, self.num_key_value_heads)

    def parts(self):
        return [getattr(self, name).weight for name in self.chosen]


class Fused(nn.Module):
    def __init__(self, width=8, name="qkv", conv1d=False):
        super().__init__()
        self.n_head, self.name, self.conv1d = 4, name, conv1d
        layer = Conv1D(3 * width, width) if conv1d else nn.Linear(width, 3 * width, bias=False)
        setattr(self, name, layer)

    def forward(self, x):
        return attend(*getattr(self, self.name)(x).chunk(3, -1), 4)

    def parts(self):
        weight = getattr(self, self.name).weight
        return [p.t() for p in weight.chunk(3, 1)] if self.conv1d else list(weight.chunk(3, 0))


class Interleaved(nn.Module):
    """GPT-NeoX's."""

    def __init__(self, width=8):
        super().__init__()
        self.num_attention_heads = 4
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x):
        mixed = self.query_key_value(x).view(*x.shape[:2], 4, 3, -1)
        q, k, v = (mixed[:, :, :, i].reshape(x.shape) for i in range(3))
        return attend(q, k, v, 4)

    def parts(self):
        weight = self.query_key_value.weight
        view = weight.view(4, 3, weight.shape[0] // 12, weight.shape[1])
        return [view[:, i].reshape(-1, weight.shape[1]) for i in range(3)]


class FusedGrouped(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.num_heads, self.num_kv_heads = 4, 2
        self.qkv_proj = nn.Linear(width, 16, bias=False)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).split((8, 4, 4), -1)
        return attend(q, k, v, 4, 2)

    def parts(self):
        return list(self.qkv_proj.weight.split((8, 4, 4)))


class Multihead(nn.Module):
    def __init__(self, width=8, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 4, bias=False, batch_first=True, **options)

    def forward(self, x):
        other = x[..., : self.inner.kdim]
        return self.inner(x, other, other, need_weights=False)[0]

    def parts(self):
        inner = self.inner
        if inner.in_proj_weight is not None:
            return list(inner.in_proj_weight.chunk(3))
        return [inner.q_proj_weight, inner.k_proj_weight, inner.v_proj_weight]


MAKES = {
    "q_proj": (Separate, "separate", 1),
    "W_query": (lambda: Separate(names=("W_query", "W_key", "W_value")), "separate", 1),
    "to_q": (lambda: Separate(names=("to_q", "to_k", "to_v")), "separate", 1),
    "wq": (lambda: Separate(names=("wq", "wk", "wv")), "separate", 1),
    "query": (lambda: Separate(names=("query", "key", "value")), "separate", 1),
    "grouped": (lambda: Separate(key_value_heads=2), "grouped", 2),
    "one key head": (lambda: Separate(key_value_heads=1), "grouped", 4),
    "qkv": (Fused, "fused", 1),
    "Wqkv": (lambda: Fused(name="Wqkv"), "fused", 1),
    "c_attn": (lambda: Fused(name="c_attn"), "fused", 1),
    "c_attn Conv1D": (lambda: Fused(name="c_attn", conv1d=True), "fused", 1),
    "query_key_value": (Interleaved, "fused", 1),
    "fused grouped": (FusedGrouped, "grouped", 2),
    "MultiheadAttention": (Multihead, "multihead", 1),
}


class Stack(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def expected(parts, start, gradients, group) -> dict[str, float]:
    """Straight from the definitions."""

    def cosine(a, b):
        return float((a * b).sum() / (a.norm() * b.norm()))

    def shared(matrix, heads):
        each = matrix.shape[0] // heads
        return torch.cat(
            [matrix[each * h : each * (h + 1)] for h in range(heads) for _ in range(group)]
        )

    def compared(matrices):
        q, k, v = matrices
        kv_heads = 4 // group
        return {"qk": (q, shared(k, kv_heads)), "qv": (q, shared(v, kv_heads)), "kv": (k, v)}

    found: dict[str, float] = {}
    for name, w, w0 in zip("qkv", parts, start, strict=True):
        found[f"norm_{name}"] = float(w.norm())
        found[f"mean_{name}"] = float(w.mean())
        found[f"std_{name}"] = float(w.std())
        found[f"drift_{name}"] = float((w - w0).norm() / w0.norm())
    for pair, (a, b) in compared(parts).items():
        found[f"cos_{pair}"] = cosine(a, b)
        found[f"distance_{pair}"] = float((a - b).norm() / (a.norm() ** 2 + b.norm() ** 2).sqrt())
    for pair, (a, b) in compared(gradients).items():
        found[f"grad_cos_{pair}"] = cosine(a, b)

    def growth(m):
        return float(m[0].norm() * m[1].norm() / m[2].norm())

    found["growth"] = growth(parts) / growth(start)
    return found


def run(model, steps=3, options=OPTIONS, topics=frozenset({"attention_heads"})):
    """Trace some steps; for each the parts of each layer at the start, after it, and gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = KeepingRecorder()
    recorder.topics = topics

    def doubles(layer, of):
        return [t.detach().double().clone() for t in of(layer)]

    start = [doubles(layer, lambda one: one.parts()) for layer in model.layers]
    seen = []

    def gradient_parts(layer):
        kept = {name: p.detach().clone() for name, p in layer.named_parameters()}
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
            found = [t.detach().double().clone() for t in layer.parts()]
            for name, p in layer.named_parameters():
                p.copy_(kept[name])
        return found

    def loop():
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 5, 8)).square().sum().backward()
            gradients = [gradient_parts(layer) for layer in model.layers]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            seen.append(
                (gradients, [doubles(layer, lambda one: one.parts()) for layer in model.layers])
            )

    trace(loop, options=options, recorder=recorder)
    return recorder, start, seen


@pytest.mark.parametrize("make", MAKES)
def test_statistics_of_every_make_of_layer(make):
    build, kind, group = MAKES[make]
    torch.manual_seed(0)
    recorder, start, seen = run(Stack(build))
    infos = recorder.info["attention"]
    assert [info.kind for info in infos] == [kind] * 2
    assert [info.heads for info in infos] == [4, 4]
    assert [info.key_value_heads for info in infos] == [4 // group] * 2
    for step, (gradients, parts) in enumerate(seen, start=1):
        row = recorder.rows("attention")[step]
        for number, info in enumerate(infos):
            truth = expected(parts[number], start[number], gradients[number], group)
            assert truth.keys() == set(ATTENTION_STATISTICS)
            for statistic, value in truth.items():
                found = row[f"{info.layer}.{statistic}"]
                np.testing.assert_allclose(found, value, rtol=1e-4, atol=2e-5, err_msg=statistic)


@pytest.mark.parametrize("make", MAKES)
def test_heads_of_every_make_of_layer(make):
    build, _, group = MAKES[make]
    torch.manual_seed(0)
    recorder, start, seen = run(Stack(build))
    for step, (_, parts) in enumerate(seen, start=1):
        row = recorder.rows("attention_heads")[step]
        for number, info in enumerate(recorder.info["attention"]):
            q, k, v = parts[number]
            for head in range(4):
                of_q = slice(2 * head, 2 * head + 2)
                of_k = slice(2 * (head // group), 2 * (head // group) + 2)
                wq, wk, wv = q[of_q], k[of_k], v[of_k]
                at = f"{info.layer}.{head}"
                close(row[f"{at}.norm_k"], float(wk.norm()))
                close(row[f"{at}.cos_qk"], float((wq * wk).sum() / (wq.norm() * wk.norm())), 1e-4)
                close(row[f"{at}.cos_kv"], float((wk * wv).sum() / (wk.norm() * wv.norm())), 1e-4)
                drift = (wv - start[number][2][of_k]).norm() / start[number][2][of_k].norm()
                close(row[f"{at}.drift_v"], float(drift), 1e-4)


def test_heads_are_measured_only_while_a_viewer_shows_them():
    torch.manual_seed(0)
    recorder, _, _ = run(Stack(Separate), topics=frozenset())
    assert recorder.rows("attention_heads") == {}


@pytest.mark.parametrize("make", ["q_proj", "grouped", "c_attn Conv1D", "MultiheadAttention"])
def test_spectrum_against_the_singular_values(make):
    torch.manual_seed(0)
    recorder, _, seen = run(Stack(MAKES[make][0]), steps=6)
    ((step, row),) = recorder.rows("attention_spectrum").items()
    assert step == 6
    compare_spectrum(recorder, row, lambda turn: seen[turn])


def compare_spectrum(recorder, row, seen_at, relative=1e-3):
    for turn in range(6):
        layer, which = turn // 3, turn % 3
        sigma = torch.linalg.svdvals(seen_at(turn)[1][layer][which])
        share = sigma / sigma.sum()
        at, name = recorder.info["attention"][layer].layer, "qkv"[which]
        close(row[f"{at}.sigma_max_{name}"], float(sigma.max()))
        close(row[f"{at}.stable_rank_{name}"], float(sigma.square().sum() / sigma.max() ** 2), 1e-4)
        entropy = -(share * share.log()).sum()
        close(row[f"{at}.effective_rank_{name}"], float(entropy.exp()), relative)


def test_spectrum_of_an_accelerators_weights_is_computed_beside_the_training(monkeypatch):
    """The code path of weights on a device, run on the CPU."""
    made, put, measure = AttentionSpectrum.__init__, Decomposer.put, AttentionSpectrum.after_update
    sent_at: list[int] = []
    calls = 0

    def elsewhere(self, tracked, options):
        made(self, tracked, options)
        self._decomposer = Decomposer()

    def after_update(self):
        nonlocal calls
        found = measure(self)
        if found:
            sent_at.append(calls)
        calls += 1
        return found

    def put_and_wait(self, key, matrix):
        put(self, key, matrix)
        while self._done.empty():
            time.sleep(0.001)

    monkeypatch.setattr(AttentionSpectrum, "__init__", elsewhere)
    monkeypatch.setattr(AttentionSpectrum, "after_update", after_update)
    monkeypatch.setattr(Decomposer, "put", put_and_wait)
    torch.manual_seed(0)
    recorder, _, seen = run(Stack(MAKES["grouped"][0]), steps=150)
    row = next(iter(recorder.rows("attention_spectrum").values()))
    compare_spectrum(recorder, row, lambda turn: seen[sent_at[turn]])
    assert any(thread.name == "tui-trainer spectra" for thread in threading.enumerate())


def test_a_non_finite_spectrum_is_nan():
    decomposer, found = Decomposer(), {}
    decomposer.put(1, np.array([[np.nan, 1.0], [2.0, 3.0]]))
    decomposer.put(2, np.diag([3.0, 4.0]))
    deadline = time.monotonic() + 240
    while decomposer.under_way and time.monotonic() < deadline:
        decomposer.take(lambda key, values: found.update({key: values}))
        time.sleep(0.001)
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[2], [3.0, 4.0])


def slow_health(q, k, mask, scale):
    """One row at a time."""
    logits, entropies, cosines = [], [], []
    for index in np.ndindex(*q.shape[:-1]):
        row = q[index]
        keys = k[index[:-1]]
        values = []
        for position in range(keys.shape[0]):
            if mask[index[-1], position]:
                values.append(float(row @ keys[position]) * scale)
                cosines.append(float(F.cosine_similarity(row, keys[position], dim=0)))
        p = np.exp(np.array(values) - max(values))
        p /= p.sum()
        entropies.append(-float((p * np.log(p)).sum()))
        logits += values
    return [max(logits), float(np.mean(entropies)), float(np.mean(cosines))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_health_against_one_row_at_a_time(causal, masked, scale):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    allowed = torch.ones(6, 6, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    mask = None
    if masked:
        chosen = torch.rand(6, 6) > 0.3
        chosen.fill_diagonal_(True)
        allowed = allowed & chosen
        mask = chosen if masked == "bool" else torch.zeros(6, 6).masked_fill(~chosen, -math.inf)
    found = health(q, k, mask, causal, scale)
    close(found.numpy(), slow_health(q.double(), k.double(), allowed, scale or 0.5), 1e-4)


@pytest.mark.parametrize("make", ["q_proj", "grouped", "MultiheadAttention"])
def test_health_is_sampled_from_the_forward(make):
    torch.manual_seed(0)
    recorder, _, _ = run(Stack(MAKES[make][0]))
    rows = recorder.rows("attention_health")
    assert list(rows) == [1, 2, 3]
    for row in rows.values():
        for name, value in row.items():
            assert np.isfinite(value)
            if name.endswith("entropy"):
                assert 0 <= value <= math.log(5) + 1e-4


def test_other_widths_are_reported_as_incomparable():
    torch.manual_seed(0)
    recorder, _, _ = run(Stack(lambda: Multihead(kdim=6, vdim=6)))
    (info, _) = recorder.info["attention"]
    assert info.kind == "multihead"
    assert "cannot be compared" in info.note
    row = recorder.rows("attention")[2]
    assert np.isnan(row[f"{info.layer}.cos_qk"])
    assert np.isfinite(row[f"{info.layer}.cos_kv"])
    assert np.isfinite(row[f"{info.layer}.drift_q"])


def test_a_pattern_finds_what_no_usual_name_would():
    torch.manual_seed(0)
    model = Stack(lambda: Separate(names=("asker", "asked", "told")))
    pattern = r"(?P<layer>layers\.\d+)\.(?:(?P<q>asker)|(?P<k>asked)|(?P<v>told))\.weight"
    recorder, _, _ = run(model, options=ProbeOptions(budget=0.0, attention_pattern=pattern))
    assert [info.layer for info in recorder.info["attention"]] == ["layers.0", "layers.1"]
    assert recorder.info["attention"][0].query == "layers.0.asker.weight"
    plain, _, _ = run(Stack(lambda: Separate(names=("asker", "asked", "told"))))
    assert "no attention layer" in plain.info["unseen"]["attention"]


def test_small_drift_does_not_cancel():
    torch.manual_seed(0)
    model = Stack(Separate)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    start = [p.detach().double().clone() for p in model.layers[0].parts()]

    def loop():
        optimizer.zero_grad()
        model(torch.randn(3, 5, 8)).square().sum().backward()
        optimizer.step()

    recorder, _ = trace(loop, options=OPTIONS)
    for name, now, before in zip("qkv", model.layers[0].parts(), start, strict=True):
        truth = float((now.detach().double() - before).norm() / before.norm())
        assert 0 < truth < 1e-4
        found = recorder.rows("attention")[1][f"layers.0.drift_{name}"]
        assert found == pytest.approx(truth, rel=1e-4)


def test_low_precision_weights():
    torch.manual_seed(0)
    model = SmallGpt().to(torch.bfloat16)
    start = model.blocks[0].q_proj.weight.detach().double().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder, _ = trace(lambda: gpt_loop(model, optimizer, 2), options=OPTIONS)
    now = model.blocks[0].q_proj.weight.detach().double()
    row = recorder.rows("attention")[2]
    close(row["blocks.0.norm_q"], float(now.norm()), 1e-4)
    close(row["blocks.0.drift_q"], float((now - start).norm() / start.norm()), 1e-4)


def test_less_precise_matrix_products_do_not_touch_us():
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        recorder, start, seen = run(Stack(Separate))
    finally:
        torch.set_float32_matmul_precision(before)
    truth = expected(seen[2][1][0], start[0], seen[2][0][0], 1)
    close(recorder.rows("attention")[3]["layers.0.cos_qk"], truth["cos_qk"], 1e-5)
    assert recorder.notices_of("fault") == []


def test_a_step_that_is_first_seen_within_autocast_is_measured_in_full_precision():
    torch.manual_seed(0)
    model = SmallGpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            tokens = torch.randint(0, 11, (3, 9))
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()

    recorder, _ = trace(loop)
    (row, *_) = recorder.rows("attention").values()
    norms = [value for name, value in row.items() if "norm_q" in name]
    expected = [float(block.q_proj.weight.detach().norm()) for block in model.blocks]
    assert norms == pytest.approx(expected, rel=1e-6)
