"""Bugs of the data, the initialisation and the loop in real trainings, and their clean twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from tests.findings.test_trainings import Net, all_findings_of, batch, train
from tests.trace.support import trace
from tui_trainer.findings.rules.batch import BadBatchRule
from tui_trainer.trace.bad_batch import FACTOR
from tui_trainer.trace.evaluation import SAMPLING_CALLS

Finding = tuple[str, int]


def cross_entropy(net, x, y, step):
    return F.cross_entropy(net(x), y)


class Tanh(Net):
    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Divides(Net):
    """Normalises its own input."""

    def forward(self, x):
        return super().forward(x / 100)


class Gate(nn.Module):
    """A sigmoid that is the model's output, as for binary_cross_entropy."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return torch.sigmoid(100 * self.layer(x))


def scaled(by):
    return lambda net, x, y, step: F.cross_entropy(net(x * by), y)


def same_batch():
    x, y = batch()
    return lambda net, *_: F.cross_entropy(net(x), y)


def dead():
    net = Net()
    nn.init.constant_(net.second.bias, -50.0)
    return net


def saturated():
    net = Tanh()
    with torch.no_grad():
        net.second.weight *= 5  # below the limit of initial-scale
        net.second.bias.add_(torch.where(torch.arange(32) % 2 == 0, 60.0, -60.0))
    return net


def constant():
    net = Net()
    nn.init.constant_(net.second.weight, 0.1)
    return net


def huge():
    net = Net()
    nn.init.normal_(net.second.weight, std=5.0)
    return net


def quiet_part():
    net = Net(dropout=0.3)
    net.dropout.eval()
    return net


def quiet_frozen_part():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = Net(dropout=0.3), nn.Linear(4, 4)
            self.backbone.requires_grad_(False)
            self.backbone.eval()

        def forward(self, x):
            return self.head(self.backbone(x))

    return Frozen()


def one_label(net, x, y, step):
    return F.cross_entropy(net(x), y * 0 + 2)


def sorted_labels(net, x, y, step):
    return F.cross_entropy(net(x), y * 0 + step // 5 % 4)


def minus_one_and_one(net, x, y, step):
    target = torch.where(y[:, None] == torch.arange(4), 1.0, -1.0)
    return F.binary_cross_entropy_with_logits(net(x), target)


def zero_and_one(net, x, y, step):
    return F.binary_cross_entropy_with_logits(net(x), F.one_hot(y, 4).float())


def broadcast(net, x, y, step):
    return F.mse_loss(net(x)[:, :1], y.float())


def one_by_one(net, x, y, step):
    return F.mse_loss(net(x)[:, 0], y.float())


BUGS = {
    "raw pixels": ("input-scale", 1, {"loss": scaled(100.0), "rate": 1e-4}),
    "divided twice": ("input-scale", 1, {"loss": scaled(1e-5)}),
    "constant input": ("constant-inputs", 1, {"loss": scaled(0.0)}),
    "same batch": ("same-batch", 1, {"loss": same_batch}),
    "one label": ("constant-labels", 1, {"loss": one_label}),
    "labels of -1 and 1": ("label-range", 1, {"loss": minus_one_and_one, "rate": 1e-3}),
    "broadcast": ("loss-broadcasts", 1, {"loss": broadcast, "rate": 1e-3}),
    "dead ReLUs": ("dead-units", 1, {"net": dead}),
    "saturated tanh": ("saturated-units", 1, {"net": saturated}),
    "constant weights": ("constant-weights", 1, {"net": constant}),
    "huge weights": ("initial-scale", 1, {"net": huge, "rate": 1e-4}),
    "dropout left off": ("dropout-off", 1, {"net": quiet_part}),
}
TWINS = {
    "normal input": {"loss": cross_entropy},
    "input that the model divides": {"loss": scaled(100.0), "net": Divides},
    "sorted labels": {"loss": sorted_labels, "rate": 1e-3},
    "labels of 0 and 1": {"loss": zero_and_one},
    "one target each": {"loss": one_by_one, "rate": 1e-3},
    "tanh": {"net": Tanh},
    "sigmoid as the output": {
        "net": Gate,
        "loss": lambda net, x, y, step: F.binary_cross_entropy(net(x), F.one_hot(y, 4).float()),
        "rate": 1e-3,
    },
    "frozen part in eval mode": {"net": quiet_frozen_part},
}


def run(changed, steps=70):
    changed = dict(changed)
    if "net" in changed:
        torch.manual_seed(0)
        changed["net"] = changed["net"]()
    if changed.get("loss") is same_batch:
        torch.manual_seed(0)
        changed["loss"] = same_batch()
    return all_findings_of(lambda: train(steps=steps, **changed))


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_named_at_its_step(bug):
    rule, onset, changed = BUGS[bug]
    found = run(changed)
    assert (rule, onset) in [(f.rule, f.onset) for f in found], [(f.rule, f.text) for f in found]
    others = [f for f in found if f.cause is None and f.level != "info" and f.rule != rule]
    assert not [(f.rule, f.text) for f in others if f.onset < onset]


@pytest.mark.parametrize("twin", TWINS)
def test_clean_twin_has_none_of_these_findings(twin):
    rules = {rule for rule, _, _ in BUGS.values()}
    assert not [(f.rule, f.text) for f in run(TWINS[twin]) if f.rule in rules]


def test_bad_batch_is_described_with_its_rows():
    def loss(net, x, y, step):
        if step == 50:
            x = x.clone()
            x[5] = 300.0
        return F.cross_entropy(net(x), y)

    (found,) = [f for f in run({"loss": loss}) if f.rule == "bad-batch"]
    assert (found.onset, found.level) == (50, "info")
    assert "rows by their share of the loss: 5 (" in found.text


def test_batches_that_the_rule_may_report_are_looked_at():
    (threshold,) = BadBatchRule.thresholds
    assert threshold.default == FACTOR


def test_rows_that_are_not_finite_are_named():
    def loss(net, x, y, step):
        if step == 20:
            x = x.clone()
            x[7, 3] = float("nan")
        return F.cross_entropy(net(x), y)

    found = {f.rule: f for f in run({"loss": loss}, steps=25)}
    assert "rows with inputs that are not finite: 7" in found["bad-batch"].text
    assert "the batch has values that are not finite" in found["non-finite"].text


# ---------------------------------------------------------------- the loop


def loop(steps=40, twice=False, schedule="after", accumulate=1):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number in range(steps * accumulate):
        x, y = batch()
        loss = F.cross_entropy(net(x), y) / accumulate
        loss.backward(retain_graph=twice)
        if twice:
            loss.backward()
        if schedule == "before":
            scheduler.step()
        if (number + 1) % accumulate:
            continue
        optimizer.step()
        optimizer.zero_grad()
        if schedule == "after":
            scheduler.step()


def two_losses():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    for _ in range(40):
        x, y = batch()
        out = net(x)
        optimizer.zero_grad()
        F.cross_entropy(out, y).backward(retain_graph=True)
        (0.01 * out.square().mean()).backward()
        optimizer.step()


def names_of(train):
    """Without what is true of the data of all these programs: two of four classes are rare."""
    found = all_findings_of(train)
    return [(f.rule, f.onset) for f in found if f.rule != "unbalanced-classes"]


def test_backward_twice_on_one_loss_is_named():
    assert ("backward-twice", 1) in names_of(lambda: loop(twice=True))
    assert not names_of(two_losses)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedule_before_the_step_is_named(accumulate):
    found = names_of(lambda: loop(schedule="before", accumulate=accumulate))
    assert ("schedule-before-step", 1) in found
    assert not names_of(lambda: loop(accumulate=accumulate))


def evaluating(mode, passes=3, without_gradients=torch.no_grad):
    """Every 20 steps on three batches in this mode, or in train() mode on one (`sample`)."""
    net = Net(dropout=0.2)
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    for step in range(1, 41):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step % 20 == 0:
            net.train(mode != "eval")
            with without_gradients():
                x, y = batch()
                for _ in range(passes):
                    if mode != "sample":
                        x, y = batch()
                    F.cross_entropy(net(x[:16]), y[:16])
            net.train()


def test_evaluation_in_train_mode_is_named():
    assert ("train-mode-evaluation", 21) in names_of(lambda: evaluating("train"))
    assert not names_of(lambda: evaluating("eval"))


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_one_batch_several_times_in_train_mode_is_sampling(without_gradients):
    """Twice is an evaluation: for the loss, and for the accuracy."""
    found = names_of(lambda: evaluating("sample", 2, without_gradients))
    assert ("train-mode-evaluation", 21) in found
    assert not names_of(lambda: evaluating("sample", SAMPLING_CALLS, without_gradients))


def test_evaluation_in_inference_mode_is_named_and_the_step_after_it_measured():
    recorder, _ = trace(lambda: evaluating("train", without_gradients=torch.inference_mode))
    assert [record.step for record in recorder.records] == list(range(1, 41))
    assert [r.step for r in recorder.records if "evaluated_in_train_mode" in r.signs] == [21]


# ---------------------------------------------------------------- weights


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def language(tied, copied):
    net = Language(tied)
    if copied:
        net.head.weight = nn.Parameter(copy.deepcopy(net.embedding.weight.data))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(10):
        x = torch.randint(0, 16, (4, 8))
        optimizer.zero_grad()
        F.cross_entropy(net(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()


def test_weights_that_were_tied_are_named():
    assert ("untied-weights", 1) in names_of(lambda: language(True, True))
    for tied in (True, False):
        found = names_of(lambda t=tied: language(t, False))
        assert "untied-weights" not in [rule for rule, _ in found]


# ---------------------------------------------------------------- workers


class Stream(IterableDataset):
    """Not divided among the workers where it is `whole`."""

    def __init__(self, whole):
        self.whole = whole

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, every = (0, 1) if self.whole else (info.id, info.num_workers)
        for index in range(first, 640, every):
            x = torch.randn(8, generator=torch.Generator().manual_seed(index))
            yield x, int((x @ torch.linspace(-1, 1, 32).reshape(8, 4)).argmax())


def streaming(whole):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    loader = DataLoader(Stream(whole), batch_size=16, num_workers=2)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def test_workers_that_yield_the_same_batches_are_named():
    assert ("batches-repeat", 2) in names_of(lambda: streaming(True))
    assert "batches-repeat" not in [rule for rule, _ in names_of(lambda: streaming(False))]
