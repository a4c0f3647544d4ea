"""The residual stream as a sum, and direct effects on the logit against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.inspector.attending import examined
from tests.inspector.test_attention import Own, gpt, perturbed, vit
from tui_trainer.protocol.attention import ExamineAttention


def stream_of(found):
    assert found.no_residual == ""
    return found.residual


def summands(stream):
    """Without heads and biases, which are parts of others."""
    return [each for each in stream.contributions if each.kind not in ("head", "bias")]


def frozen_logit(model, stream, target, pool):
    """The logit with the divisor of the final norm held, and its gradient by the stream."""
    stream = stream.clone().requires_grad_()
    mean = stream.mean(-1, keepdim=True)
    scale = (stream.var(-1, unbiased=False, keepdim=True) + model.norm.eps).sqrt().detach()
    normed = (stream - mean) / scale * model.norm.weight
    if model.norm.bias is not None:
        normed = normed + model.norm.bias
    logit = model.head(pool(normed))[target]
    (gradient,) = torch.autograd.grad(logit, stream)
    return logit.detach(), gradient


def hooked(model, given, sample):
    """Outputs of the modules that add to the stream, and the stream, of one example."""
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = output[sample].detach()

        return hook

    handles = [model.norm.register_forward_pre_hook(
        lambda _, args: seen.__setitem__("stream", args[0][sample].detach()))]  # fmt: skip
    for number, block in enumerate(model.blocks):
        handles.append(block.attention.register_forward_hook(keep(f"blocks.{number}.attention")))
        handles.append(block.mlp.register_forward_hook(keep(f"blocks.{number}.mlp")))
    with torch.no_grad():
        model(given)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gpt_stream_is_the_sum_and_so_is_the_logit(bias, dropout):
    model, tokens = gpt(bias=bias, dropout=dropout), torch.randint(0, 11, (3, 8))
    targets = torch.randint(0, 11, (3, 8))
    torch.manual_seed(5)
    seen = hooked(model, tokens, 1)
    torch.manual_seed(5)
    found = examined(
        model, tokens, ExamineAttention("1", query=6, sample=1, residual=True), targets
    )
    stream = stream_of(found)
    assert stream.difference < 3e-7
    assert stream.position == 6
    assert (stream.target, stream.correct) == (int(targets[1, 6]), True)
    row = seen["stream"][6]
    assert stream.norm == pytest.approx(float(row.norm()), rel=1e-6)
    logit, gradient = frozen_logit(model, row, stream.target, lambda x: x)
    assert stream.logit == pytest.approx(float(logit), abs=1e-5)
    assert stream.logit_difference < 2e-6
    assert sum(each.logit for each in summands(stream)) == pytest.approx(stream.logit, abs=2e-6)
    by_name = {each.name: each for each in summands(stream)}
    for number in range(3):
        for part in ("attention", "mlp"):
            each, value = by_name[f"blocks.{number}.{part}"], seen[f"blocks.{number}.{part}"][6]
            assert each.norm == pytest.approx(float(value.norm()), rel=1e-5)
            assert each.cosine == pytest.approx(
                float(F.cosine_similarity(value, row, dim=0)), abs=1e-6
            )
            assert each.logit == pytest.approx(float(value @ gradient), abs=2e-6)
    names = [each.name for each in summands(stream)]
    rest = [f"blocks.{n}.{part}" for n in range(3) for part in ("attention", "mlp")]
    assert [name for name in names if name.startswith("blocks")] == rest
    assert names[-1] == "biases"


def test_heads_are_what_is_left_when_the_others_are_silent():
    model, tokens = gpt(bias=True), torch.randint(0, 11, (2, 8))
    found = examined(model, tokens, ExamineAttention(query=3, sample=0, residual=True))
    heads = [each for each in stream_of(found).contributions if each.head >= 0][:4]
    attention = model.blocks[0].attention
    seen = []
    hook = attention.W_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
        hook.remove()
        for number, head in enumerate(heads):
            alone = torch.zeros_like(seen[0])
            part = slice(number * 4, number * 4 + 4)
            alone[..., part] = seen[0][..., part]
            added = attention.W_out(alone)[0, 3] - attention.W_out.bias
            assert head.norm == pytest.approx(float(added.norm()), rel=1e-4)
    biases = [each for each in stream_of(found).contributions if each.kind == "bias"]
    assert biases[0].norm == pytest.approx(float(attention.W_out.bias.detach().norm()), rel=1e-5)
    logits = [each.logit for each in heads] + [biases[0].logit]
    whole = next(each for each in stream_of(found).contributions if each.kind == "attention")
    assert sum(logits) == pytest.approx(whole.logit, abs=2e-6)


@pytest.mark.parametrize("pooling", ["class", "mean"])
@pytest.mark.parametrize("embedding", [0, 6])
def test_the_vit_reads_its_class_token_or_the_mean(pooling, embedding):
    model, images = vit(pooling=pooling, embedding=embedding), torch.randn(3, 1, 8, 8)
    labels = torch.tensor([4, 0, 2])
    seen = hooked(model, images, 2)["stream"]
    request = ExamineAttention(query=5, sample=2, residual=True)
    stream = stream_of(examined(model, images, request, labels))
    assert stream.position == (0 if pooling == "class" else -1)
    assert (stream.target, stream.correct, stream.no_logit) == (2, True, "")
    pool = (lambda x: x[0]) if pooling == "class" else (lambda x: x.mean(0))
    if embedding:
        head = nn.Sequential(model.embedding, model.head)
        model.head = head
    logit, gradient = frozen_logit(model, seen, 2, pool)
    assert stream.logit == pytest.approx(float(logit), abs=1e-5)
    assert stream.logit_difference < 2e-6
    effects = [each.logit for each in summands(stream) if each.kind != "readout"]
    assert sum(effects) == pytest.approx(float((seen * gradient).sum()), abs=1e-5)
    assert stream.norm == pytest.approx(float(pool(seen).norm()), rel=1e-5)
    assert {"position_embedding"} <= {each.name for each in stream.contributions}


class OwnRmsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.gamma


class Deep(nn.Module):
    """Blocks with the norms, scales and orders of other families of models."""

    def __init__(self, way="", norm=OwnRmsNorm):
        super().__init__()
        self.way = way
        self.attentions = nn.ModuleList(Own("sdpa") for _ in range(2))
        self.norms = nn.ModuleList(norm() for _ in range(2))
        self.scales = nn.ModuleList(Scaled() for _ in range(2))
        self.final_norm = norm()
        self.head = nn.Linear(8, 7)
        self.tail = nn.Sequential(nn.Linear(8, 8), nn.GELU(), self.head)

    def forward(self, x):
        for attention, norm, scale in zip(self.attentions, self.norms, self.scales, strict=True):
            if "scaled" in self.way:
                x = x + scale(attention(norm(x)))
            elif "parallel" in self.way:
                x = attention(norm(x)) + scale(norm(x)) + x
            elif "in place" in self.way:
                x = x.clone()
                x += attention(norm(x))
            elif "post" in self.way:
                x = norm(x + attention(x))
            elif "multiplied" in self.way:
                x = (x + attention(norm(x))).mul_(0.5)
            else:
                x = attention(norm(x)) + x
        x = x if "post" in self.way else self.final_norm(x)
        return self.tail(x) if "mlp" in self.way else self.head(x)


def of_deep(way="", norm=OwnRmsNorm):
    torch.manual_seed(3)
    model = perturbed(Deep(way, norm))
    request = ExamineAttention(query=2, sample=1, residual=True)
    return examined(model, torch.randn(3, 5, 8), request, torch.randint(0, 7, (3, 5)))


@pytest.mark.parametrize("norm", [OwnRmsNorm, lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8)])
def test_norms_of_other_models(norm):
    stream = stream_of(of_deep(norm=norm))
    assert stream.no_logit == ""
    assert stream.difference < 3e-7
    assert stream.logit_difference < 3e-6
    assert sum(each.kind == "head" for each in stream.contributions) == 4


def test_branches_that_are_scaled_before_they_are_added():
    stream = stream_of(of_deep("scaled"))
    assert stream.logit_difference < 3e-6
    assert sum(each.kind == "head" for each in stream.contributions) == 4


def test_branches_that_read_the_same_stream():
    stream = stream_of(of_deep("parallel"))
    assert stream.logit_difference < 3e-6
    kinds = [each.kind for each in summands(stream)]
    assert kinds == ["start", *["attention", "module"] * 2, "readout"]
    assert sum(each.kind == "head" for each in stream.contributions) == 4


def test_additions_in_place():
    stream = stream_of(of_deep("in place"))
    assert stream.difference < 3e-7
    assert stream.notes == () or "not listed" in stream.notes[0]


def test_after_a_norm_the_stream_starts_over():
    stream = stream_of(of_deep("post"))
    assert [each.kind for each in summands(stream)] == ["start", "attention", "readout"]
    assert "heads of 1 of 2 layers" in stream.notes[0]
    assert stream.logit_difference < 3e-6


def test_a_stream_that_is_no_sum_is_refused():
    found = of_deep("multiplied")
    assert found.residual is None
    assert "does not sum to it" in found.no_residual


def test_an_mlp_before_the_logits_leaves_them_out():
    stream = stream_of(of_deep("mlp"))
    assert "not only linear layers" in stream.no_logit
    assert math.isnan(stream.logit)
    assert all(math.isnan(each.logit) for each in stream.contributions)
    assert stream.difference < 3e-7


def test_without_targets_it_is_the_largest_logit():
    model, tokens = gpt(), torch.randint(0, 11, (3, 8))
    stream = stream_of(examined(model, tokens, ExamineAttention(query=6, sample=1, residual=True)))
    assert not stream.correct
    with torch.no_grad():
        logits = model(tokens)[1, 6]
    assert stream.target == int(logits.argmax())
    assert stream.logit == pytest.approx(float(logits.max()), abs=1e-5)


def test_a_model_without_a_stream_says_so():
    model = perturbed(nn.Sequential(Own("sdpa")))
    found = examined(model, torch.randn(3, 5, 8), ExamineAttention(residual=True))
    assert found.no_residual.startswith("no norm after the blocks")
