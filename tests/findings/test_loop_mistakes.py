"""Mistakes in the order of a loop and in shapes, in real trainings, and the same loops without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.findings.test_trainings import findings_of
from tests.trace.support import KeepingRecorder
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer

STEPS = 25


def net(outputs=4):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs))


def clipped_after_step(wrong):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        loss = F.mse_loss(model(torch.randn(16, 8)), torch.randn(16, 4))
        optimizer.zero_grad()
        loss.backward()
        for step in (True, False) if wrong else (False, True):
            if step:
                optimizer.step()
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def schedule_idle(wrong):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    if wrong:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        loss = F.mse_loss(model(torch.randn(16, 8)), torch.randn(16, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def losses_mixed(wrong):
    generator, critic = net(8), net(1)
    first = torch.optim.Adam(critic.parameters(), lr=1e-3)
    second = torch.optim.Adam(generator.parameters(), lr=1e-3)
    for _ in range(STEPS):
        first.zero_grad()
        second.zero_grad()
        false = generator(torch.randn(16, 8))
        judged = critic(false if wrong else false.detach())
        (judged.mean() - critic(torch.randn(16, 8)).mean() + judged.square().mean()).backward()
        first.step()
        critic(generator(torch.randn(16, 8))).square().mean().backward()
        second.step()


def two_optimizers_of_one_loss(wrong):
    """Right, whatever the order of the steps: both use the same backward passes."""
    trunk, head = net(8), net(1)
    first = torch.optim.Adam(trunk.parameters(), lr=1e-3)
    second = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(STEPS):
        first.zero_grad()
        second.zero_grad()
        for _ in range(2):
            head(trunk(torch.randn(16, 8))).square().mean().backward()
        first.step()
        second.step()


def updates_undone(wrong):
    model = net()
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        loss = F.mse_loss(model(torch.randn(16, 8)), torch.randn(16, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, averaged in zip(model.parameters(), average.parameters(), strict=True):
                if wrong:
                    mine.lerp_(averaged, 0.99)
                else:
                    averaged.lerp_(mine, 0.01)
                    mine.clamp_(-0.5, 0.5)


def updates_rounded(wrong):
    model = net().bfloat16() if wrong else net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    for _ in range(STEPS):
        x = torch.randn(16, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.mse_loss(model(x.bfloat16() if wrong else x).float(), torch.randn(16, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def classes_mixed(wrong):
    model = nn.Conv2d(1, 3, 3, padding=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        x = torch.randn(4, 1, 6, 6)
        labels = (x[:, 0] > 0).long() + (x[:, 0] > 0.5).long()
        scores = model(x)
        rows = scores.view(-1, 3) if wrong else scores.permute(0, 2, 3, 1).reshape(-1, 3)
        loss = F.cross_entropy(rows, labels.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def targets_out_of_reach(wrong):
    model = nn.Sequential(net(), nn.Sigmoid() if wrong else nn.Identity())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        x = torch.randn(16, 8)
        loss = F.mse_loss(model(x).view(-1), x[:, :4].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def not_shuffled(wrong):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(60):
        labels = torch.full((16,), step // 8 % 4) if wrong else torch.randint(4, (16,))
        x = torch.randn(16, 8) + F.one_hot(labels, 8)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


MISTAKES = [
    (clipped_after_step, 2),
    (schedule_idle, 2),
    (losses_mixed, None),
    (updates_undone, 1),
    (updates_rounded, 1),
    (classes_mixed, 1),
    (targets_out_of_reach, 1),
    (not_shuffled, 1),
]


@pytest.mark.parametrize(("loop", "onset"), MISTAKES)
def test_mistake_is_named(loop, onset):
    found = {each.rule: each for each in findings_of(lambda: loop(True))}
    rule = loop.__name__.replace("_", "-")
    assert rule in found, list(found)
    assert onset in (None, found[rule].onset)
    assert found[rule].cause is None


@pytest.mark.parametrize("loop", [*(each for each, _ in MISTAKES), two_optimizers_of_one_loss])
def test_right_loop_has_no_such_finding(loop):
    rules = {name.__name__.replace("_", "-") for name, _ in MISTAKES}
    assert not rules & {each.rule for each in findings_of(lambda: loop(False))}


def test_varying_number_of_calls_is_noticed():
    records = []

    class Keeping(KeepingRecorder):
        def record(self, record):
            records.append(record)

    model = net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Tracer(Keeping(), Gate(), (), ProbeOptions(budget=0.0)):
        for calls in (2, 2, 3, 1, 1):
            optimizer.zero_grad()
            sum(model(torch.randn(4, 8)).square().mean() for _ in range(calls)).backward()
            optimizer.step()
    assert ["calls_vary" in each.signs for each in records] == [False, False, True, True, False]


@pytest.mark.parametrize("first_trained", [0, 2])
def test_eval_mode_in_the_middle_begins_at_its_first_step(first_trained: int):
    """Also where the optimizer does not have the first parameters of the model."""

    def run():
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
        optimizer = torch.optim.SGD([*model.parameters()][first_trained:], lr=0.05)
        for step in range(1, 60):
            if step == 10:
                model.eval()
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(16, 8)), torch.randn(16, 4)).backward()
            optimizer.step()

    (found,) = [f for f in findings_of(run) if f.rule == "eval-mode"]
    assert found.onset == 10
