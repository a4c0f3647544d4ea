"""Totals, epochs and evaluations of scripts, as they are recorded."""

from __future__ import annotations

import json

import pytest

from tests.cli.calling import call
from tests.integrations.seen import LENGTH, compared

HEAD = """
import torch, torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
x = torch.randn(60, 16); y = x[:, :4].argmax(1)
train_loader = DataLoader(TensorDataset(x, y), 10)
test_loader = DataLoader(TensorDataset(x[:35], y[:35]), 10)
model = torch.nn.Linear(16, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def train():
    model.train()
    for data, target in train_loader:
        optimizer.zero_grad()
        F.cross_entropy(model(data), target).backward()
        optimizer.step()
"""

SUM = """
def test():
    model.eval()
    total = 0
    with torch.no_grad():
        for data, target in test_loader:
            total += F.cross_entropy(model(data), target, reduction="sum").item()
    print("TEST", total / 35)
"""

MEAN = """
criterion = torch.nn.CrossEntropyLoss()
@torch.inference_mode()
def test():
    losses = [criterion(model(data), target).item() for data, target in test_loader]
    print("TEST", sum(losses) / len(losses))
"""

EVAL_MODE = """
def test():  # with gradients, which nothing uses
    model.eval()
    total = 0
    for data, target in test_loader:
        total += F.cross_entropy(model(data), target, reduction="sum").item()
    print("TEST", total / 35)
"""

BY_HAND = """
del optimizer; import gc; gc.collect()  # it was never used
def train():
    model.train()
    for data, target in train_loader:
        model.zero_grad()
        F.cross_entropy(model(data), target).backward()
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-0.1)
"""

ATTACK = """
def test():
    model.eval()
    for data, target in test_loader:
        data.requires_grad_(True)
        gradient, = torch.autograd.grad(F.cross_entropy(model(data), target), data)
"""

TRAINED_IN_EVAL_MODE = """
def test():
    model.eval()
    for data, target in train_loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        print("TEST", loss.item())
        optimizer.step()
"""

SEVERAL = """
@torch.no_grad()
def test():
    for data, target in test_loader:
        output = model(data)
        F.cross_entropy(output, target)
        F.mse_loss(output, output + 1)
"""

METRIC = """
import tui_trainer
def train():
    for data, target in train_loader:
        optimizer.zero_grad()
        output = model(data)
        loss = F.cross_entropy(output, target)
        with torch.no_grad():
            F.mse_loss(model(data), output)
        loss.backward()
        optimizer.step()
def test():
    pass
"""

SEVERAL_MODELS = """
decoder = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD([*model.parameters(), *decoder.parameters()], lr=0.1)
def train():
    for data, target in train_loader:
        optimizer.zero_grad()
        F.cross_entropy(decoder(model(data)), target).backward()
        optimizer.step()
"""

RECURRENT = """
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = torch.nn.LSTM(4, 4), torch.nn.Linear(4, 4)
    def forward(self, x):
        return self.head(self.rnn(x.view(x.shape[0], -1, 4))[0]).mean(1)
model = Model()
"""

LOOP = """
for epoch in range(1, 4):
    train()
    test()
"""


def run(place, source):
    (place / "train.py").write_text(source)
    done = call("run", "--json", "--name", "r", "train.py", cwd=place)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [line for line in lines if line.get("kind") == "fault"]
    truth = [float(line[5:]) for line in done.stderr.splitlines() if line.startswith("TEST ")]
    header = [line for line in lines if line["type"] == "run"][-1]
    return header, [line for line in lines if line["type"] == "validation"], truth, lines


@pytest.mark.parametrize("test", [SUM, MEAN, EVAL_MODE])
def test_the_test_loop_of_a_script(tmp_path, test):
    header, validations, truth, _ = run(tmp_path, HEAD + test + LOOP)
    assert [line["step"] for line in validations] == [6, 12, 18]
    assert [line["loss"] for line in validations] == pytest.approx(truth, rel=1e-6)
    known = {name: header[name] for name in ("total_steps", "steps_per_epoch", "items_per_step")}
    assert known == {"total_steps": 18, "steps_per_epoch": 6, "items_per_step": 10}
    assert header["item_unit"] == "samples"
    shown = json.loads(call("show", "r", "--json", cwd=tmp_path).stdout)
    assert shown["validation"]["loss"] == pytest.approx(truth[-1], rel=1e-6)
    compared("loop", *(LENGTH - {"steps"}), "evaluation")


@pytest.mark.parametrize("test", [SUM, EVAL_MODE])
def test_the_test_loop_of_a_script_without_an_optimizer(tmp_path, test):
    header, validations, truth, lines = run(tmp_path, HEAD + BY_HAND + test + LOOP)
    assert header["optimizers"] == ["by hand"]
    assert len([line for line in lines if line["type"] == "step"]) == 18
    assert [line["step"] for line in validations] == [6, 12, 18]
    assert [line["loss"] for line in validations] == pytest.approx(truth, rel=1e-6)
    compared("by hand", "evaluation")


def test_a_pass_in_eval_mode_whose_gradients_are_used_is_no_evaluation(tmp_path):
    _, validations, _, lines = run(tmp_path, HEAD + ATTACK + LOOP)
    assert validations == []
    assert len([line for line in lines if line["type"] == "step"]) == 18


def test_training_in_eval_mode_is_no_evaluation(tmp_path):
    header, validations, truth, lines = run(tmp_path, HEAD + TRAINED_IN_EVAL_MODE + LOOP)
    assert validations == []
    losses = [line["loss"] for line in lines if line["type"] == "step"]
    assert len(losses) == 36
    assert losses[6:12] == pytest.approx(truth[:6], rel=1e-6)
    assert all(
        "forward" in line["phase_ms"]
        for line in lines
        if line.get("step", 0) > 7 and line["type"] == "step"
    )
    assert header["items_per_step"] == 10


def test_of_several_losses_none_is_chosen(tmp_path):
    _, validations, _, lines = run(tmp_path, HEAD + SEVERAL + LOOP)
    assert validations == []
    said = [line["text"] for line in lines if line.get("kind") == "evaluation"]
    assert len(said) == 1
    assert "several losses" in said[0]


def test_a_metric_within_an_iteration_is_no_evaluation(tmp_path):
    _, validations, _, _ = run(tmp_path, HEAD + METRIC + LOOP)
    assert validations == []


def test_why_the_total_is_not_known(tmp_path):
    source = HEAD.replace("for data, target in train_loader:", "for data, target in batches():")
    source += "\ndef batches():\n    yield from train_loader\ndef test(): pass\n" + LOOP
    header, _, _, _ = run(tmp_path, source)
    assert header["total_steps"] is None
    assert "batches()" in header["unseen"]["total_steps"]
    assert "batches()" in header["unseen"]["epochs"]


def test_a_scripted_loss_can_still_be_compiled_by_torchscript(tmp_path):
    source = (
        HEAD
        + "\ndef test(): pass\n"
        + LOOP
        + (
            "\nimport warnings; warnings.simplefilter('ignore')\n"
            "@torch.jit.script\n"
            "def f(a: torch.Tensor, b: torch.Tensor):\n"
            "    return F.mse_loss(a, b)\n"
            "print('SCRIPTED', f(torch.ones(3), torch.zeros(3)).item())\n"
        )
    )
    (tmp_path / "train.py").write_text(source)
    done = call("run", "--json", "--name", "r", "train.py", cwd=tmp_path)
    assert "SCRIPTED 1.0" in done.stderr


def test_of_several_models_the_number_of_samples_is_not_known(tmp_path):
    source = HEAD + SEVERAL_MODELS + "\ndef test(): pass\n" + LOOP
    header, _, _, _ = run(tmp_path, source)
    assert (header["total_steps"], header["items_per_step"]) == (18, None)
    assert "several models" in header["unseen"]["items_per_step"]


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_length_of_sequences_is_no_number_of_samples(tmp_path, batch_first):
    source = HEAD.replace("model = torch.nn.Linear(16, 4)", RECURRENT)
    source = source.replace("LSTM(4, 4)", f"LSTM(4, 4, batch_first={batch_first})")
    header, _, _, _ = run(tmp_path, source + "\ndef test(): pass\n" + LOOP)
    assert header["items_per_step"] == (10 if batch_first else None)
    assert ("items_per_step" in header["unseen"]) != batch_first
