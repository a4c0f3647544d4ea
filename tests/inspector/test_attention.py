"""What attention layers attend to, against plain references that know nothing of the trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tui_trainer.models.gpt import GPT
from tui_trainer.models.vit import ViT

from tests.inspector.attending import examined, layers_of
from tui_trainer.inspector.attention.calls import MULTIHEAD, PROJECTED, SDPA, SOFTMAX
from tui_trainer.inspector.attention.examine import chosen_layer, entropy, products
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.protocol.attention import ExamineAttention
from tui_trainer.protocol.heat_map import HeatMapWindow

WHOLE = HeatMapWindow(512, 512, reduction="mean")


def perturbed(model: nn.Module) -> nn.Module:
    """Weights as large as those of a model that has learned something."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def gpt(**options) -> GPT:
    torch.manual_seed(0)
    return perturbed(GPT(vocabulary=11, block_size=8, layers=3, heads=4, width=16, **options))


def vit(**options) -> ViT:
    torch.manual_seed(0)
    return perturbed(
        ViT(
            classes=5, image_size=8, patch_size=2, channels=1, layers=2, heads=2, width=8, **options
        )
    )


def values(data: bytes, *shape: int) -> np.ndarray:
    return np.frombuffer(data, "<f4").reshape(*shape)


def matrix(found) -> np.ndarray:
    return values(found.map.cells, found.map.rows, found.map.columns)


def plain_attention(attention, x: torch.Tensor, causal: bool) -> tuple[torch.Tensor, ...]:
    """(q, k, scores, weights) of every head, (heads, positions, …), with loops."""
    size = x.shape[-1] // attention.heads
    q, k = attention.W_query(x), attention.W_key(x)
    per_head = []
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if causal:
            for row in range(len(scores)):
                scores[row, row + 1 :] = -math.inf
        per_head.append((q[:, part], k[:, part], scores, scores.softmax(-1)))
    return tuple(torch.stack(each) for each in zip(*per_head, strict=True))


def check_row(found, q, k, scores, weights, query: int) -> None:
    """The table of a query, its entropy, and those of the heads."""
    head, row = found.head, found.row
    products = k[head] @ q[head, query]
    cosines = F.cosine_similarity(k[head], q[head, query][None])
    np.testing.assert_allclose(values(row.products, -1), products, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(values(row.angles, -1), cosines.acos().rad2deg(), rtol=1e-3)
    np.testing.assert_allclose(values(row.weights, -1), weights[head, query], rtol=2e-5, atol=1e-7)
    expected = scores[head, query].masked_fill(scores[head, query].isinf(), math.nan)
    np.testing.assert_allclose(values(row.scores, -1), expected, rtol=2e-5, atol=1e-6)
    logs = weights.clamp_min(1e-30).log()
    entropies = -(weights * logs).sum(-1)
    np.testing.assert_allclose(values(found.entropies, -1), entropies[head], rtol=1e-4, atol=1e-6)
    for number, each in enumerate(found.by_head):
        assert each.entropy == pytest.approx(float(entropies[number, query]), abs=1e-5)
        assert each.mean_entropy == pytest.approx(float(entropies[number].mean()), abs=1e-5)
        assert each.largest == pytest.approx(float(weights[number, query].max()), rel=1e-5)
        assert each.key == int(weights[number, query].argmax())


@pytest.mark.parametrize("bias", [False, True])
def test_the_gpt_over_its_text(bias):
    model, tokens = gpt(bias=bias), torch.randint(0, 11, (3, 8))
    seen = []
    hook = model.blocks[1].attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens)
    hook.remove()
    with torch.no_grad():
        q, k, scores, weights = plain_attention(model.blocks[1].attention, seen[0][2], True)
    request = ExamineAttention("blocks.1.attention", head=3, query=5, sample=2, window=WHOLE)
    found = examined(model, tokens, request, tokens="abcdefghijk")
    assert (found.how, found.missing, found.samples, found.heads) == (SDPA, "", 3, 4)
    assert found.labels == tuple("abcdefghijk"[n] for n in tokens[2].tolist())
    assert found.scale == 0.5
    assert found.deviation < 1e-6
    np.testing.assert_allclose(matrix(found), weights[3], rtol=2e-5, atol=1e-7)
    check_row(found, q, k, scores, weights, 5)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_the_vit_over_its_patches(pooling):
    model, images = vit(pooling=pooling), torch.randn(4, 1, 8, 8)
    seen = []
    hook = model.blocks[0].attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images)
    hook.remove()
    with torch.no_grad():
        q, k, scores, weights = plain_attention(model.blocks[0].attention, seen[0][1], False)
    found = examined(model, images, ExamineAttention("0", head=1, query=0, sample=1, window=WHOLE))
    np.testing.assert_allclose(matrix(found), weights[1], rtol=2e-5, atol=1e-7)
    check_row(found, q, k, scores, weights, 0)
    assert (found.grid.rows, found.grid.columns) == (4, 4)
    assert found.grid.first == (pooling == "class")
    assert (found.grid.picture.width, found.grid.picture.height) == (8, 8)
    gray = np.frombuffer(found.grid.picture.pixels, np.uint8).reshape(8, 8, 3)[..., 0] / 255
    image = images[1, 0].numpy()
    np.testing.assert_allclose(gray, (image - image.min()) / np.ptp(image), atol=0.003)


class Wrapped(nn.Module):
    """A block around nn.MultiheadAttention."""

    def __init__(self, batch_first=True, **given):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.given = given
        self.need_weights = True

    def forward(self, x):
        return self.attention(
            x, x, x, need_weights=self.need_weights, average_attn_weights=False, **self.given
        )[0]


ALLOWED = torch.ones(5, 5).tril().bool()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"attn_mask": ~ALLOWED},
        {"attn_mask": torch.randn(5, 5)},
        {"attn_mask": torch.randn(3 * 2, 5, 5)},
        {"attn_mask": ~ALLOWED, "is_causal": True},
        {"key_padding_mask": torch.tensor([[0, 0, 0, 1, 1]] * 3).bool()},
    ],
    ids=["plain", "causal", "biased", "biased by head", "is_causal", "padded"],
)
def test_multihead_attention_as_its_own_weights_say(given, batch_first, need_weights):
    torch.manual_seed(1)
    model = perturbed(Wrapped(batch_first, **given))
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    with torch.no_grad():
        expected = model.attention(x, x, x, need_weights=True, average_attn_weights=False, **given)[
            1
        ]  # (batch, heads, queries, keys)
    model.need_weights = need_weights
    found = examined(model, x, ExamineAttention(head=1, query=2, sample=2, window=WHOLE))
    assert (found.how, found.missing) == (MULTIHEAD, "")
    assert 0 <= found.deviation < 1e-5
    np.testing.assert_allclose(matrix(found), expected[2, 1], rtol=2e-5, atol=1e-7)


class Own(nn.Module):
    """Attention computed in one of several ways, by hand."""

    def __init__(self, way: str, dropout: float = 0.0, kv_heads: int = 2):
        super().__init__()
        self.n_head, self.n_kv_head, self.way, self.p = 2, kv_heads, way, dropout
        self.q_proj = nn.Linear(8, 8)
        self.k_proj, self.v_proj = (nn.Linear(8, 4 * kv_heads) for _ in range(2))
        self.o_proj = nn.Linear(8, 8)
        self.seen = None

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, 4) for p in (self.q_proj, self.k_proj, self.v_proj))
        if "rotary" in self.way:
            angle = torch.arange(t)[:, None, None] * torch.tensor([1.0, 0.1]).repeat(2)
            q, k = (e * angle.cos() + e.roll(2, -1) * angle.sin() for e in (q, k))
        if self.n_kv_head == 1 and "sdpa" not in self.way:
            k, v = (e.expand(b, t, 2, 4) for e in (k, v))
        mask = torch.ones(t, t).tril().bool()
        if "einsum" in self.way:
            scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
        else:
            q, k, v = (e.transpose(1, 2) for e in (q, k, v))
            scores = (q @ k.repeat_interleave(2 // k.shape[1], 1).transpose(-2, -1)) * 0.5
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        self.seen = weights.detach()
        if "einsum" in self.way:
            y = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)
        elif "sdpa" in self.way:
            y = (
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=self.p, enable_gqa=self.n_kv_head == 1
                )
                .transpose(1, 2)
                .flatten(2)
            )
        elif "own" in self.way:
            y = Opaque.apply(q, k, v).transpose(1, 2).flatten(2)
        elif "bias" in self.way:
            bias = torch.arange(t) * torch.tensor([0.1, 0.3])[:, None, None]  # as in ALiBi
            q, k, v = (e.reshape(b * 2, t, 4) for e in (q, k, v))
            scores = bias.repeat(b, 1, 1).baddbmm(batch1=q, batch2=k.transpose(1, 2), alpha=0.5)
            scores = scores.view(b, 2, t, t).masked_fill(~mask, torch.finfo(torch.float32).min)
            weights = scores.softmax(-1)
            self.seen = weights.detach()
            y = torch.bmm(weights.view(b * 2, t, t), v).view(b, 2, t, 4).transpose(1, 2).flatten(2)
        elif "bmm" in self.way:
            q, k, v = (e.reshape(b * 2, t, 4) for e in (q, k, v))
            scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=0.5)
            weights = scores.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
            y = torch.bmm(weights, v).view(b, 2, t, 4).transpose(1, 2).flatten(2)
        else:
            weights = F.dropout(weights, self.p)
            y = (weights @ v).transpose(1, 2).flatten(2)
        return self.o_proj(y)


class Opaque(torch.autograd.Function):
    """A custom kernel: no torch function is seen inside."""

    @staticmethod
    def forward(ctx, q, k, v):
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("matmul", SOFTMAX),
        ("matmul rotary", SOFTMAX),
        ("einsum", SOFTMAX),
        ("bmm", SOFTMAX),
        ("bias", SOFTMAX),
        ("sdpa", SDPA),
        ("sdpa rotary", SDPA),
        ("own", PROJECTED),
    ],
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_by_hand_is_seen_where_it_is_computed(way, how, kv_heads):
    torch.manual_seed(2)
    model = perturbed(nn.Sequential(Own(way, kv_heads=kv_heads)))
    found = examined(model, torch.randn(3, 5, 8), ExamineAttention(head=1, sample=1, window=WHOLE))
    assert (found.missing, found.how, found.samples, found.query) == ("", how, 3, 4)
    assert 0 <= found.deviation < 1e-5
    np.testing.assert_allclose(matrix(found), model[0].seen[1, 1], rtol=3e-5, atol=1e-6)
    assert math.isnan(found.scale) if way == "bias" else found.scale == pytest.approx(0.5)


@pytest.mark.parametrize("way", ["matmul", "sdpa"])
def test_the_weights_are_those_before_dropout(way):
    torch.manual_seed(2)
    model = perturbed(nn.Sequential(Own(way, dropout=0.5)))
    found = examined(model, torch.randn(3, 5, 8), ExamineAttention(head=1, sample=1, window=WHOLE))
    assert found.missing == ""
    assert any("before dropout" in note for note in found.notes)
    np.testing.assert_allclose(matrix(found), model[0].seen[1, 1], rtol=3e-5, atol=1e-6)


def test_attention_that_cannot_be_computed_is_not_shown():
    torch.manual_seed(2)
    found = examined(perturbed(nn.Sequential(Own("own rotary"))), torch.randn(3, 5, 8))
    assert found.map is None
    assert found.row is None
    assert "is not what its output projection reads" in found.missing
    assert "Q and K are changed in between" in found.missing


class Uncalled(Own):
    def forward(self, x):
        return self.o_proj(x)


def test_a_layer_that_is_not_called_has_its_weights_alone():
    found = examined(
        nn.Sequential(Uncalled("")), torch.randn(3, 5, 8), ExamineAttention(weights=True)
    )
    assert "attention is computed by a function that is not torch's" in found.missing
    assert len(found.weights) == 2
    assert found.spectra is not None


def test_the_softmax_of_one_zero_and_minus_one():
    attention = Own("matmul")
    with torch.no_grad():
        for parameter in (*attention.q_proj.parameters(), *attention.k_proj.parameters()):
            parameter.zero_()
        attention.q_proj.bias[0] = attention.q_proj.bias[4] = 1
        attention.k_proj.weight[0, 0] = attention.k_proj.weight[4, 0] = 2
    x = torch.randn(1, 3, 8)
    x[0, :, 0] = torch.tensor([1.0, 0.0, -1.0])
    found = examined(nn.Sequential(attention), x, ExamineAttention(query=2))
    assert values(found.row.scores, 3).tolist() == [1, 0, -1]
    assert values(found.row.weights, 3).tolist() == pytest.approx([0.665, 0.245, 0.09], abs=1e-3)
    assert found.by_head[0].entropy == pytest.approx(0.832, abs=1e-3)
    product, angle = products(torch.tensor([1.0, 0]), torch.tensor([[2.0, 0], [0, 3], [-1, 0]]))
    assert product.tolist() == [2, 0, -1]
    assert angle.tolist() == pytest.approx([0, 90, 180])
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0
    assert float(entropy(torch.full((8,), 1 / 8))) == pytest.approx(math.log(8))


def test_what_is_not_there_is_refused_with_what_is():
    model, tokens = gpt(), torch.randint(0, 11, (3, 8))
    layers = layers_of(model)
    assert chosen_layer(layers, "").layer.path == "blocks.0.attention"
    assert chosen_layer(layers, "2").layer.path == "blocks.2.attention"
    assert chosen_layer(layers, "s.1.").layer.path == "blocks.1.attention"
    for path, words in (("blocks", "3 attention layers match"), ("x", "no attention layer")):
        with pytest.raises(InspectionError, match=words):
            chosen_layer(layers, path)
    for request, words in (
        (ExamineAttention(head=4), "no head 4"),
        (ExamineAttention(query=8), "no position 8"),
        (ExamineAttention(sample=3), "no example 3"),
    ):
        with pytest.raises(InspectionError, match=words):
            examined(model, tokens, request)


def test_a_large_map_is_reduced_and_the_row_is_exact():
    model, tokens = gpt(), torch.randint(0, 11, (3, 8))
    whole = examined(model, tokens, ExamineAttention(window=WHOLE))
    small = examined(
        model, tokens, ExamineAttention(window=HeatMapWindow(2, 4, reduction="max_abs"))
    )
    assert (small.map.rows, small.map.columns) == (2, 4)
    blocks = matrix(whole).reshape(2, 4, 4, 2).max((1, 3))
    np.testing.assert_array_equal(matrix(small), blocks)
    assert small.row == whole.row
    assert examined(model, tokens, ExamineAttention()).map is None


@pytest.mark.parametrize("way", ["matmul", "sdpa", "multihead"])
def test_half_precision_is_checked_to_its_own_precision(way):
    torch.manual_seed(2)
    model = perturbed(Wrapped() if way == "multihead" else nn.Sequential(Own(way)))
    with torch.autocast("cpu", torch.bfloat16):
        found = examined(model, torch.randn(3, 5, 8), ExamineAttention(head=1, window=WHOLE))
    assert found.missing == ""
    np.testing.assert_allclose(matrix(found).sum(1), 1, atol=0.02)


def test_a_product_that_is_not_understood_is_reported():
    class Dotted(Own):
        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (p(x).view(b, t, 2, 4).transpose(1, 2)
                       for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
            weights = torch.einsum("...td,...sd->...ts", q, k).softmax(-1)
            y = torch.einsum("...ts,...sd->...td", weights, v)
            return self.o_proj(y.transpose(1, 2).flatten(2))

    found = examined(perturbed(nn.Sequential(Dotted(""))), torch.randn(3, 5, 8))
    assert found.map is None
    assert found.missing.startswith("tracing it failed: ")
