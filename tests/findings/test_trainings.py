"""Real trainings: the bug is named, and programs that are unusual but right have no warning."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.probes import PROBES
from tui_trainer.protocol.events import newest_findings
from tui_trainer.protocol.messages import Poll
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer


def findings_of(train):
    """Train under the tracer; the findings that are warnings or worse."""
    return [f for f in all_findings_of(train) if f.level != "info"]


def all_findings_of(train):
    """Train under the tracer; every finding."""
    torch.manual_seed(0)
    recorder = Recorder(RunInfo(name="run", task="script"))
    faults = []
    recorder.evaluate_with(FindingsEngine(on_fault=faults.append))
    try:
        with Tracer(recorder, Gate(), PROBES, ProbeOptions(budget=0.0)):
            train()
        events, first = [], 0
        while (update := recorder.update_for(Poll(event=first))).events:
            events += update.events
            first = events[-1].id + 1
    finally:
        recorder.close()
    assert not faults
    return newest_findings(events)


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 32)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.dropout(F.relu(self.second(F.relu(self.first(x))))))


DIRECTIONS = torch.linspace(-1, 1, 32).reshape(8, 4)


def batch(count=32):
    x = torch.randn(count, 8)
    return x, (x @ DIRECTIONS).argmax(1)


def train(steps=60, **changed):
    """A plain loop with hooks for bugs."""
    net = changed.get("net") or changed.get("make", Net)()
    parameters = changed.get("parameters", lambda net: net.parameters())
    optimizer = torch.optim.SGD(parameters(net), lr=changed.get("rate", 0.1), momentum=0.9)
    if "replace" in changed:
        net = changed["replace"](net)
    loss_of = changed.get("loss", lambda net, x, y, step: F.cross_entropy(net(x), y))
    for step in range(1, steps + 1):
        x, y = batch()
        if changed.get("zero", "before") == "before":
            optimizer.zero_grad(set_to_none=changed.get("set_to_none", True))
        loss = loss_of(net, x, y, step)
        loss.backward()
        if changed.get("zero") == "between":
            optimizer.zero_grad()
        optimizer.step()
        if changed.get("zero") == "after":
            optimizer.zero_grad()


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(32, 4)


def sigmoids():
    layers = [nn.Linear(8, 32)]
    for _ in range(12):
        layers += [nn.Sigmoid(), nn.Linear(32, 32)]
    return nn.Sequential(*layers, nn.Sigmoid(), nn.Linear(32, 4))


def nan_at_20(net, x, y, step):
    out = net(x)
    return F.cross_entropy(out, y) + (0.0 * torch.sqrt(out[0, 0] - out[0, 0]) if step == 20 else 0)


BUGS = {
    "gradients-kept": ({"zero": "never"}, 2),
    "zeroed-before-step": ({"zero": "between"}, 1),
    "not-in-optimizer": (
        {"parameters": lambda net: [*net.first.parameters(), *net.head.parameters()]},
        1,
    ),
    "never-reached": ({"make": Unused}, 1),
    "no-gradients": ({"replace": copy.deepcopy}, 1),
    "eval-mode": ({"make": lambda: Net(dropout=0.5).eval()}, 1),
    "update-ratio-high": ({"rate": 30.0}, 1),
    "softmax-before-cross-entropy": (
        {"loss": lambda net, x, y, step: F.cross_entropy(F.softmax(net(x), -1), y)},
        1,
    ),
    "initial-loss": (
        {"loss": lambda net, x, y, step: F.cross_entropy(50 * net(x), y), "rate": 1e-4},
        1,
    ),
    "non-finite": ({"loss": nan_at_20}, 20),
    "gradients-vanish": ({"make": sigmoids, "steps": 100}, 1),
}


@pytest.mark.parametrize("rule", BUGS)
def test_bug_is_the_first_finding_at_its_step(rule):
    changed, onset = BUGS[rule]
    found = findings_of(lambda: train(**changed))
    assert found, "nothing was found"
    assert (found[0].rule, found[0].onset) == (rule, onset)
    others = [f.rule for f in found if f.cause is None and f.rule != rule]
    assert not others


def test_layer_that_is_replaced_after_the_optimizer_was_created_is_one_finding():
    def replace(net):
        net.first = nn.Linear(8, 32)
        return net

    (found,) = findings_of(lambda: train(replace=replace))
    assert (found.rule, found.onset) == ("not-in-optimizer", 1)
    assert found.parameters == ("first.weight", "first.bias")
    assert "created before they were replaced" in found.text


def test_gradient_that_is_not_finite_names_the_parameter_nearest_to_the_loss():
    (finding,) = findings_of(lambda: train(loss=nan_at_20))
    assert finding.parameters[0] == "head.bias"


# ---------------------------------------------------------------- unusual and right


def accumulation():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(60):
        for _ in range(4):
            x, y = batch(8)
            (F.cross_entropy(net(x), y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()


def gan():
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
    discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(), nn.Linear(16, 1))
    of_g = torch.optim.Adam(generator.parameters(), 1e-3)
    of_d = torch.optim.Adam(discriminator.parameters(), 1e-3)
    for _ in range(80):
        real, fake = torch.randn(16, 8) + 1, generator(torch.randn(16, 4))
        of_d.zero_grad()
        logits = discriminator(torch.cat([real, fake.detach()]))
        labels = torch.cat([torch.ones(16, 1), torch.zeros(16, 1)])
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        of_d.step()
        of_g.zero_grad()
        F.binary_cross_entropy_with_logits(discriminator(fake), torch.ones(16, 1)).backward()
        of_g.step()


def closure():
    net = Net()
    x, y = batch(128)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4)

    def evaluate():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(evaluate)


def transfer():
    net = Net()
    net.first.requires_grad_(False)
    net.second.requires_grad_(False)
    train(net=net, parameters=lambda net: net.head.parameters())


def two_groups():
    net = Net()
    matrices = torch.optim.SGD([p for p in net.parameters() if p.dim() > 1], 0.05)
    others = torch.optim.Adam([p for p in net.parameters() if p.dim() < 2], 1e-3)
    for _ in range(60):
        x, y = batch()
        for optimizer in (matrices, others):
            optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for optimizer in (matrices, others):
            optimizer.step()


def skipping_bad_batches():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(60):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(net(x * (math.inf if step % 20 == 5 else 1)), y).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()


def unfreezing():
    net = Net()
    net.second.requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(60):
        if step == 20:
            net.second.requires_grad_(True)
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def warm_up_from_zero():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20))
    for _ in range(60):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()


def perceptual_loss():
    net, judge = Net(), Net(dropout=0.5).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(60):
        x, _ = batch()
        optimizer.zero_grad()
        F.mse_loss(judge(F.pad(net(x), (0, 4))), judge(x)).backward()
        optimizer.step()


def zero_initialised():
    net = nn.Linear(8, 4)
    nn.init.zeros_(net.weight)
    train(net=net, rate=0.5)


def assigned_gradients():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(40):
        x, y = batch()
        gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


RIGHT = {
    "plain": train,
    "zero after the step": lambda: train(zero="after"),
    "zeroed, not freed": lambda: train(set_to_none=False),
    "dropout": lambda: train(net=Net(dropout=0.3)),
    "accumulation": accumulation,
    "GAN": gan,
    "closure": closure,
    "transfer": transfer,
    "two optimizers": two_groups,
    "skipping bad batches": skipping_bad_batches,
    "unfreezing": unfreezing,
    "warm-up from zero": warm_up_from_zero,
    "perceptual loss": perceptual_loss,
    "zero-initialised": zero_initialised,
    "assigned gradients": assigned_gradients,
}


@pytest.mark.parametrize("program", RIGHT)
def test_program_that_is_right_has_no_warning(program):
    assert not [(f.rule, f.text) for f in findings_of(RIGHT[program])]


def test_nan_in_the_batch_is_the_cause_of_the_batch_that_stands_out():
    def nan_in_a_row(net, x, y, step):
        x[5] = x[5] * (math.nan if step == 40 else 1.0)
        return F.cross_entropy(net(x), y)

    found = {each.rule: each for each in all_findings_of(lambda: train(loss=nan_in_a_row))}
    cause = found["non-finite"]
    assert cause.onset == 40
    assert "in row 5;" in cause.text
    assert "rows of the batch" in cause.advice
    assert found["bad-batch"].cause == cause.number


def test_constant_that_is_not_finite_is_not_taken_for_the_batch():
    def times_nan(net, x, y, step):
        return F.cross_entropy(net(x), y) * (math.nan if step == 20 else 1.0)

    found = next(f for f in findings_of(lambda: train(loss=times_nan)) if f.rule == "non-finite")
    assert "a constant" in found.text
    assert "rows" not in found.advice
    assert found.phase == "loss"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda weights: torch.optim.SGD(weights, 0.1), False),
        (lambda weights: torch.optim.SGD(weights, 0.1, weight_decay=1e-3), False),
        (lambda weights: torch.optim.SGD(weights, 0.01, momentum=0.9, weight_decay=0.2), True),
        (lambda weights: torch.optim.Adam(weights, 5e-3, weight_decay=1e-4), False),
        (lambda weights: torch.optim.Adam(weights, 5e-3, weight_decay=1.0), True),
        (lambda weights: torch.optim.AdamW(weights, 5e-3), False),
        (lambda weights: torch.optim.AdamW(weights, 1e-3, weight_decay=15.0), True),
    ],
)
def test_weights_that_the_data_make_smaller_are_no_finding(make, found):
    def regress():
        layer = nn.Linear(20, 1)
        optimizer = make(layer.parameters())
        small = 0.01 * torch.randn(20, 1)
        before = layer.weight.norm().item()
        for _ in range(60):
            # With small inputs the data say little about the weights, and the decay decides.
            x = torch.randn(64, 20) * (0.1 if found else 1.0)
            optimizer.zero_grad()
            F.mse_loss(layer(x), x @ small + 0.01 * torch.randn(64, 1)).backward()
            optimizer.step()
        shares.append(layer.weight.norm().item() / before)

    shares = []
    rules = [each.rule for each in findings_of(regress)]
    assert shares[0] < 0.75
    assert ("weights-shrink" in rules) == found
