"""What the autograd graph of a loss tells about how it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tui_trainer.history.records import LossGraph
from tui_trainer.trace.loss_graph import loss_graph_of

PLAIN = LossGraph(12, 5, False, "", False, 0)


def layers(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *between, nn.Linear(8, 5))


@pytest.fixture
def x():
    return torch.randn(12, 4)


@pytest.fixture
def y():
    return torch.arange(12) % 5


def by_hand(logarithms, y):
    return -(F.one_hot(y, 5).float() * logarithms).sum(1).mean()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda out, y: F.cross_entropy(out, y), PLAIN),
        (lambda out, y: F.cross_entropy(out, y) / 4, PLAIN),
        (lambda out, y: by_hand(out.log_softmax(1), y), PLAIN),
        (lambda out, y: by_hand((out.softmax(1) + 1e-9).log(), y), PLAIN),
        (lambda out, y: by_hand(out.log_softmax(0), y), PLAIN._replace(over_rows=True)),
        (lambda out, y: F.nll_loss(out.log_softmax(-1), y), PLAIN),
        (lambda out, y: F.nll_loss(out, y), LossGraph(0, 0, False, "nll_loss", False, 0)),
        (
            lambda out, y: by_hand(out.clamp(1e-7, 1).log(), y),
            LossGraph(0, 0, False, "log", False, 0),
        ),
        (
            lambda out, y: F.mse_loss(out.softmax(1), F.one_hot(y, 5).float()),
            PLAIN._replace(squared_softmax=True),
        ),
        (lambda out, y: F.mse_loss(out[:, 0], y.float()), LossGraph(0, 0, False, "", False, 0)),
        (
            lambda out, y: -out.sigmoid().log().mean(),
            LossGraph(0, 0, False, "", False, 0),
        ),
    ],
)
def test_loss(x, y, loss, expected):
    assert loss_graph_of(loss(layers(nn.ReLU())(x), y).grad_fn) == expected


def test_softmax_before_a_layer_is_counted(x, y):
    loss = F.cross_entropy(layers(nn.Softmax(1))(x), y)
    assert loss_graph_of(loss.grad_fn) == PLAIN._replace(hidden_softmaxes=1)
    images = torch.randn(2, 1, 6, 6)
    loss = nn.Conv2d(3, 1, 3)(nn.Conv2d(1, 3, 3)(images).softmax(1)).sum()
    assert loss_graph_of(loss.grad_fn).hidden_softmaxes == 1


def test_layer_behind_a_softmax_is_named(x, y):
    model = layers(nn.Softmax(1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    loss = F.cross_entropy(model(x), y)
    found = loss_graph_of(loss.grad_fn, lambda parameter: names.get(id(parameter), ""))
    assert found.softmax_layers == ("2.weight",)


def test_samples_of_a_softmax_are_no_hidden_activation(x):
    model = layers()
    loss = model[1](F.gumbel_softmax(model[0](x), tau=1.0)).sum()
    assert loss_graph_of(loss.grad_fn).hidden_softmaxes == 0
    topics = model[0](x) + torch.randn(12, 8) * 0.1
    assert loss_graph_of(model[1](topics.softmax(1)).sum().grad_fn).hidden_softmaxes == 0


def test_scores_of_pairs_are_told_from_those_of_a_layer(x, y):
    query = F.normalize(layers()(x), dim=1)
    positive, negatives = query[:, :1], query @ torch.randn(5, 7)
    scores = torch.cat([positive, negatives], 1) / 0.2
    loss = F.cross_entropy(scores, torch.zeros(12, dtype=torch.long))
    assert loss_graph_of(loss.grad_fn).joined
    assert not loss_graph_of(F.cross_entropy(layers()(x) / 0.2, y).grad_fn).joined


def test_attention_is_no_hidden_softmax(x):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    inputs = torch.randn(2, 3, 8)
    loss = attention(inputs, inputs, inputs)[0].sum()
    assert loss_graph_of(loss.grad_fn).hidden_softmaxes == 0
    memory = nn.Parameter(torch.randn(6, 8))
    loss = ((nn.Linear(4, 6)(x)).softmax(1) @ memory).sum()
    assert loss_graph_of(loss.grad_fn).hidden_softmaxes == 0
    graph = torch.randn(12, 12, requires_grad=True)
    loss = (graph.softmax(1) @ nn.Linear(4, 3)(x)).sum()
    assert loss_graph_of(loss.grad_fn).hidden_softmaxes == 0


def test_several_terms_and_no_graph(x, y):
    model = layers(nn.ReLU())
    penalty = sum(each.square().sum() for each in model.parameters())
    assert loss_graph_of((F.cross_entropy(model(x), y) + penalty).grad_fn).rows == 0
    assert loss_graph_of(torch.tensor(1.0).grad_fn) is None


def of_norms(model):
    return torch.stack([p.norm() for p in model.parameters()]).sum()


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (lambda model: 0.1 * sum(p.square().sum() for p in model.parameters()), True),
        (lambda model: 0.1 * sum((p * p).sum() for p in model.parameters()), True),
        (lambda model: sum(p.abs().sum() for p in model.parameters()) / 10, True),
        (lambda model: 1e-4 * of_norms(model) ** 2, True),
        (lambda model: 0.5 * model[0].weight.norm() ** 2, True),
        (lambda model: torch.cat([p.view(-1) for p in model.parameters()]).pow(2).sum(), True),
        (lambda model: model[0].bias.square().sum(), False),
        (lambda model: 0.0, False),
    ],
)
def test_penalty_on_the_weights(x, y, penalty, expected):
    model = layers(nn.ReLU())
    for loss in (F.cross_entropy(model(x), y), (model(x)[:, 0] - y).square().mean()):
        graph = loss_graph_of((8 * (loss + penalty(model))).grad_fn)
        assert graph.penalty == expected


def test_rows_of_an_embedding_can_be_penalised():
    table = nn.Embedding(4, 3)
    rows = table(torch.arange(3))
    for loss, expected in ((rows.square().mean(), True), ((rows - 1).square().mean(), False)):
        assert loss_graph_of((loss + rows.sum()).grad_fn).penalty == expected
