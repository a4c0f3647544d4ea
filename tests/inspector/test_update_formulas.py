"""The explained update of every variant against what torch.optim makes of the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.optimizer_updates import (
    ExplainedUpdate,
    UpdateInputs,
    explain,
    formula_of,
    is_decoupled,
)

RATES = st.floats(1e-5, 1.0)
DECAYS = st.one_of(st.just(0.0), st.floats(1e-4, 0.3))
MOMENTA = st.one_of(st.just(0.0), st.floats(0.1, 0.99))
IMPLEMENTATIONS = st.sampled_from([{"foreach": False}, {"foreach": True}])


def steps_of(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], seed: int, steps: int = 4
) -> list[tuple[ExplainedUpdate, torch.Tensor, torch.Tensor]]:
    """(explained, old weight, new weight) of the first steps."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
    optimizer = kind([weight], **options)
    found = []
    for _ in range(steps):
        weight.grad = torch.randn(5, 3, generator=generator) * 0.3
        group = optimizer.param_groups[0]
        inputs = UpdateInputs(
            group,
            weight.detach().clone(),
            weight.grad.clone(),
            {k: v.clone() for k, v in optimizer.state.get(weight, {}).items() if v is not None},
            is_decoupled(optimizer, group),
        )
        explained = explain(optimizer, inputs, single=False)
        optimizer.step()
        found.append((explained, inputs.weight, weight.detach().clone()))
    return found


def assert_agrees(found: list[tuple[ExplainedUpdate, torch.Tensor, torch.Tensor]]) -> None:
    """To a few units in the last place of the weight, or of its update."""
    for explained, old, new in found:
        size = torch.maximum(old.abs(), new.abs())
        allowed = 4 * torch.finfo(torch.float32).eps * (size + (new - old).abs()) + 1e-12
        assert ((explained.new - new).abs() <= allowed).all(), (explained.new - new) / allowed
        assert explained.terms[-1].name == "w"
        assert explained.terms[-2].name == "Δw"


@settings(max_examples=120, deadline=None)
@given(RATES, MOMENTA, st.floats(0, 0.9), DECAYS, st.booleans(), st.booleans(), IMPLEMENTATIONS,
       st.integers(0, 99))  # fmt: skip
def test_sgd(lr, momentum, dampening, decay, nesterov, maximize, how, seed):
    nesterov = nesterov and momentum > 0
    options = {
        "lr": lr, "momentum": momentum, "weight_decay": decay, "nesterov": nesterov,
        "dampening": 0.0 if nesterov else dampening, "maximize": maximize, **how,
    }  # fmt: skip
    assert_agrees(steps_of(torch.optim.SGD, options, seed))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([torch.optim.Adam, torch.optim.AdamW]), RATES, st.floats(0, 0.99),
       st.floats(0.5, 0.9999), st.floats(1e-8, 1e-3), DECAYS, st.booleans(), st.booleans(),
       IMPLEMENTATIONS, st.integers(0, 99))  # fmt: skip
def test_adam_and_adamw(kind, lr, beta1, beta2, eps, decay, amsgrad, maximize, how, seed):
    options = {
        "lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay,
        "amsgrad": amsgrad, "maximize": maximize, **how,
    }  # fmt: skip
    assert_agrees(steps_of(kind, options, seed))


@settings(max_examples=150, deadline=None)
@given(RATES, st.floats(0.5, 0.999), st.floats(1e-8, 1e-3), DECAYS, MOMENTA, st.booleans(),
       st.booleans(), IMPLEMENTATIONS, st.integers(0, 99))  # fmt: skip
def test_rmsprop(lr, alpha, eps, decay, momentum, centered, maximize, how, seed):
    options = {
        "lr": lr, "alpha": alpha, "eps": eps, "weight_decay": decay, "momentum": momentum,
        "centered": centered, "maximize": maximize, **how,
    }  # fmt: skip
    assert_agrees(steps_of(torch.optim.RMSprop, options, seed))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_fused_and_learning_rates_that_are_tensors(kind):
    assert_agrees(steps_of(kind, {"lr": 0.01, "weight_decay": 0.1, "fused": True}, 1))
    if kind is not torch.optim.SGD:
        assert_agrees(steps_of(kind, {"lr": torch.tensor(0.01), "foreach": False}, 1))


def test_the_numbers_of_a_single_entry_stand_in_the_formula():
    weight = torch.nn.Parameter(torch.tensor(2.0))
    weight.grad = torch.tensor(-0.5)
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
    group = optimizer.param_groups[0]
    inputs = UpdateInputs(group, weight.detach(), weight.grad, {}, is_decoupled(optimizer, group))
    lines = [(t.name, t.formula, t.numbers) for t in explain(optimizer, inputs, True).terms]
    assert lines == [
        ("g", "gradient", ""),
        ("m", "β₁·m + (1−β₁)·g", "0.9·0 + 0.1·(-0.5)"),
        ("v", "β₂·v + (1−β₂)·g²", "0.999·0 + 0.001·(-0.5)²"),
        ("m'", "m / (1−β₁ᵗ)", "(-0.05) / 0.1"),
        ("√v'", "√(v / (1−β₂ᵗ))", "√(0.00025 / 0.001)"),
        ("w", "(1 − η·λ)·w (decoupled decay)", "0.999·2"),
        ("Δw", "−η·m' / (√v' + ε)", "−0.1·(-0.5) / (0.5 + 1e-08)"),
        ("w", "w + Δw", "1.998 + 0.1"),
    ]


def test_an_optimizer_without_a_formula_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(InspectionError, match="the update of Adagrad is not explained"):
        formula_of(torch.optim.Adagrad([weight]))

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Renamed(torch.optim.SGD):
        pass

    with pytest.raises(InspectionError, match="Own"):
        formula_of(Own([weight], lr=0.1))
    assert formula_of(Renamed([weight], lr=0.1)) is formula_of(torch.optim.SGD([weight], lr=0.1))
