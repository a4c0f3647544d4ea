"""Evaluations in a row are distinguished where it can be known that they are several."""

from __future__ import annotations

from threading import get_ident
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tui_trainer.run.loop_length import name_of_data
from tui_trainer.trace.evaluation import EvaluationLosses
from tui_trainer.trace.module_calls import Patches

MODEL = torch.nn.Linear(3, 2)
SPLITS = {"train": [1.0, 2.0], "val": [5.0, 7.0]}


@pytest.fixture
def losses():
    patches = Patches()
    found = EvaluationLosses(SimpleNamespace(training_thread=get_ident()), patches)
    found.label_of = name_of_data
    found.results, found.ambiguous = [], []
    found.on_result = lambda step, means: found.results.append(means)
    found.on_ambiguous = found.ambiguous.append
    found.install()
    with torch.no_grad():
        yield found
    patches.restore()


def call(losses):
    losses.call_began(MODEL, 4)


def loss_of(value, reduction="mean"):
    return F.l1_loss(torch.full((2,), value), torch.zeros(2), reduction=reduction)


def validate(losses):
    for value in (1.0, 3.0):
        call(losses)
        F.l1_loss(torch.full((2,), value), torch.zeros(2))


def test(losses):
    for value in (4.0, 8.0):
        call(losses)
        F.l1_loss(torch.full((2,), value), torch.zeros(2))


test.__test__ = False


def test_one_evaluation(losses):
    validate(losses)
    losses.end()
    assert losses.results == [{"loss": 2.0}]


def test_two_functions_in_a_row(losses):
    validate(losses)
    losses.end()
    validate(losses)
    test(losses)
    losses.end()
    assert losses.results == [{"loss": 2.0}, {"loss": 2.0, "test/loss": 6.0}]
    assert losses.ambiguous == []


def test_the_splits_of_one_loop(losses):
    for split in ("train", "val"):
        for value in SPLITS[split]:
            call(losses)
            loss_of(value)
    losses.end()
    assert losses.results == [{"train/loss": 1.5, "loss": 6.0}]


def test_losses_of_one_call_are_several(losses):
    for value in (1.0, 2.0):
        call(losses)
        loss_of(value)
        F.mse_loss(torch.zeros(1), torch.ones(1))
    losses.end()
    assert losses.results == []
    assert losses.ambiguous == [4]


def test_losses_in_turn_are_several(losses):
    for value in (1.0, 2.0):
        call(losses)
        F.l1_loss(torch.full((2,), value), torch.zeros(2))
        call(losses)
        F.mse_loss(torch.zeros(1), torch.ones(1))
    losses.end()
    assert losses.results == []
    assert losses.ambiguous == [4]


def test_many_names_are_parts_of_one_evaluation(losses):
    for name in "abcdef":
        call(losses)
        loss_of(float(ord(name) - ord("a")))
    losses.end()
    assert losses.results == [{"loss": 2.5}]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ignored_targets_are_not_counted_in_a_sum(losses, device):
    """A meta tensor has no value: what is computed with it waits for no device."""
    total, count = 0.0, 0
    for number in range(2):
        call(losses)
        logits = torch.randn(4, 3, device=device)
        target = torch.tensor([0, -100, 2, -100 if number else 1], device=device)
        loss = F.cross_entropy(logits, target, reduction="sum")
        if device == "cpu":
            total, count = total + float(loss), count + int((target >= 0).sum())
    losses.trains(MODEL)
    (found,) = losses.results
    if device == "cpu":
        assert found["loss"] == pytest.approx(total / count)
    else:
        assert found["loss"].is_meta


def test_a_fault_of_ours_is_reported_and_the_evaluation_has_no_loss(losses):
    faults = []
    losses.on_fault = faults.append
    losses.label_of = lambda frame: 1 / 0
    validate(losses)
    losses.trains(MODEL)
    assert losses.results == []
    assert isinstance(faults[0], ZeroDivisionError)
