"""Trainings unlike the textbook's: policies that collect their batches, gradients scaled parameter
by parameter, optimizers with a mode, updates by hand that are stepped, unusual tensors."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.runs.starting import until
from tests.trace.support import EVERYTHING, KeepingRecorder, batch, close, mlp, trace
from tui_trainer.probes import PROBES
from tui_trainer.protocol.absent import Absent, absent, why_absent
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.tracer import Tracer

# ---------------------------------------------------------------- policies


def policy():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 3))


@pytest.mark.parametrize("in_eval_mode", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_rollouts_without_gradients_are_data(monkeypatch, in_eval_mode, every):
    now = [1.0]
    monkeypatch.setattr("tui_trainer.trace.phase_clocks.perf_counter", lambda: now[0])
    model = policy()
    optimizer = torch.optim.Adam(model.parameters())

    def loop():
        for iteration in range(12):
            if iteration % every == 0:
                model.train(not in_eval_mode)
                seen = []
                for _ in range(4):
                    seen.append(torch.randn(1, 6))
                    with torch.no_grad():
                        model(seen[-1]).argmax(1)
                    now[0] += 1  # the environment's step
                model.train()
            loss = -model(torch.cat(seen)).log_softmax(1)[:, 0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    recorder, _ = trace(loop)
    rows = recorder.rows("phase_ms")
    assert all(why_absent(row["eval"]) for row in rows.values())
    assert rows[every + 1]["data"] == 4000
    assert not any("evaluated_in_train_mode" in record.signs for record in recorder.records)


def evaluates_first(model):
    with torch.no_grad():
        for _ in range(3):
            inputs, targets = batch()
            F.cross_entropy(model(inputs), targets)


def measures_accuracy_first(model):
    data = torch.utils.data.TensorDataset(*batch(12))
    loader = torch.utils.data.DataLoader(data, 4)
    with torch.no_grad():
        for inputs, targets in loader:
            (model(inputs).argmax(1) == targets).sum()


def generates_first(model):
    with torch.no_grad():
        for count in range(1, 4):
            model(torch.randn(count, 6))


@pytest.mark.parametrize("first", [evaluates_first, measures_accuracy_first, generates_first])
def test_calls_before_training_that_collect_nothing_are_evaluations(first):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        if first is measures_accuracy_first:
            loader = torch.utils.data.DataLoader(torch.zeros(1))  # which the script keeps
        for _ in range(4):
            first(model)
            inputs, targets = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        if first is measures_accuracy_first:
            del loader

    recorder, _ = trace(loop)
    assert recorder.rows("phase_ms")[3]["eval"] > 0


# ---------------------------------------------------------------- adaptive clipping


def clip_adaptively(parameters, factor):
    """Each row of a gradient is limited to `factor` times the norm of the row of its weights, as in
    Brock et al., High-Performance Large-Scale Image Recognition Without Normalization (2021)."""
    for parameter in parameters:
        weights, gradient = parameter.detach(), parameter.grad
        rows = tuple(range(1, weights.dim()))
        over_rows = {"dim": rows, "keepdim": True} if rows else {"dim": 0, "keepdim": True}
        largest = weights.norm(**over_rows).clamp(min=1e-3) * factor
        norm = gradient.norm(**over_rows).clamp(min=1e-6)
        gradient.detach().copy_(torch.where(norm > largest, gradient * (largest / norm), gradient))


def test_adaptive_clipping_is_clipping_by_hand():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []

    def total():
        return float(torch.stack([p.grad.double().norm() for p in model.parameters()]).norm())

    def loop():
        for _ in range(5):
            inputs, targets = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            before = total()
            clip_adaptively(model.parameters(), 0.01)
            norms.append((before, total()))
            optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("step", "grad_norm_preclip"), [before for before, _ in norms])
    clips = [record.clip for record in recorder.records]
    assert {clip.kind for clip in clips} == {"hand"}
    rows = recorder.rows("clip").values()
    close([(row["norm_before"], row["norm_after"]) for row in rows], norms)
    assert all(after < before for before, after in norms)


# ---------------------------------------------------------------- optimizers with a mode


class ScheduleFree(torch.optim.Optimizer):
    """The weights are those at which gradients are computed in `train()` mode, and their running
    mean in `eval()` mode."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "train_mode": True, "count": 0})

    def _swap(self, to_train):
        for group in self.param_groups:
            if group["train_mode"] != to_train:
                group["train_mode"] = to_train
                for parameter in group["params"]:
                    other = self.state[parameter].setdefault("other", parameter.detach().clone())
                    kept = parameter.detach().clone()
                    parameter.data.copy_(other)
                    other.copy_(kept)

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("other", parameter.detach().clone())
                parameter.sub_(parameter.grad, alpha=group["lr"])
                mean.lerp_(parameter, 1 / group["count"])


def test_an_optimizer_that_swaps_the_weights_for_evaluations():
    model = mlp()
    optimizer = ScheduleFree(model.parameters(), 0.1)
    losses, ratios = [], []

    def loop():
        for number in range(6):
            optimizer.train()
            inputs, targets = batch()
            loss = F.cross_entropy(model(inputs), targets)
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
            ratios.append(float((model[0].weight.detach() - before).norm() / before.norm()))
            if number % 2:
                optimizer.eval()
                with torch.no_grad():
                    model(inputs)

    recorder, _ = trace(loop)
    assert recorder.info["optimizers"] == ("schedulefree",)
    assert len(recorder.records) == 6
    assert recorder.skips == []
    close(recorder.series("step", "loss"), losses)
    for step, row in recorder.rows("update_ratio").items():
        close(row["0.weight"], ratios[step - 1])


# ---------------------------------------------------------------- updates by hand


def test_updates_by_hand_are_paused_and_stepped():
    model, gate, recorder = mlp(), Gate(paused=True), KeepingRecorder()
    found, losses = [], []

    def held(step, phase="step"):
        until(
            lambda: gate.mode == "paused" and (gate.completed, gate.phase) == (step, phase),
            f"the run is held after step {step}",
            240,
        )

    def drive():
        try:
            held(0, "data")
            for step in (1, 2):
                gate.step()
                held(step)
                found.append(len(losses))
            gate.resume()
            until(lambda: len(losses) >= 5, "the loop goes on", 240)
            gate.pause()
            until(lambda: gate.mode == "paused", "the run is paused", 240)
            found.append(gate.phase)
            gate.step_phase()
            until(lambda: gate.mode == "paused" and gate.phase != found[-1], "a phase", 240)
        finally:
            stop.set()
            gate.resume()

    stop = threading.Event()
    driver = threading.Thread(target=drive)
    driver.start()
    with Tracer(recorder, gate, PROBES, EVERYTHING):
        while not stop.is_set() or len(losses) < 8:
            inputs, targets = batch()
            loss = F.cross_entropy(model(inputs), targets)
            losses.append(float(loss.detach()))
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
            model.zero_grad()
    gate.end()
    driver.join(240)
    assert not driver.is_alive()
    assert found[:2] == [1, 2]
    assert recorder.notices_of("fault") == []
    close(recorder.series("step", "loss"), losses)
    assert [record.step for record in recorder.records] == list(range(1, len(losses) + 1))


def test_updates_by_hand_next_to_an_optimizer_that_steps():
    """Those of further parameters are no steps; what is shown of the optimizer's is its own."""
    body, head = nn.Linear(6, 8), nn.Linear(8, 3)
    model = nn.Sequential(body, nn.Tanh(), head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    losses, totals, outside, ratios = [], [], [], []

    def norm(module):
        return float(torch.stack([p.grad.double().norm() for p in module.parameters()]).norm())

    def loop():
        for _ in range(6):
            inputs, targets = batch()
            loss = F.cross_entropy(model(inputs), targets)
            losses.append(float(loss.detach()))
            model.zero_grad()
            loss.backward()
            totals.append(norm(head))
            outside.append(float(body.weight.grad.norm()))
            before = head.weight.detach().clone()
            with torch.no_grad():
                for parameter in body.parameters():
                    parameter -= 0.1 * parameter.grad
            optimizer.step()
            ratios.append(float((head.weight.detach() - before).norm() / before.norm()))

    recorder, _ = trace(loop)
    assert recorder.info["optimizers"] == ("sgd",)
    assert recorder.skips == []
    close(recorder.series("step", "loss"), losses)
    close(recorder.series("step", "grad_norm_preclip"), totals)
    close(recorder.series("grad_norm", "0.weight"), outside)
    rows = recorder.rows("update_ratio")
    assert {1, 2, 3} <= rows.keys()
    for step, row in rows.items():
        close(row["2.weight"], ratios[step - 1])
        assert why_absent(row.get("0.weight", absent(Absent.NOT_MEASURED)))
    assert all(record.clip is None for record in recorder.records)


# ---------------------------------------------------------------- tensors


def test_a_quantized_buffer_and_a_nested_batch():
    warnings.simplefilter("ignore")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            base = torch.randn(6, 6)
            self.register_buffer("base", torch.quantize_per_tensor(base, 0.1, 0, torch.qint8))

        def forward(self, inputs):
            padded = torch.nested.to_padded_tensor(inputs, 0.0)
            return self.layer(padded @ self.base.dequantize())

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = [], []

    def loop():
        for _ in range(4):
            inputs = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
            loss = model(inputs).pow(2).mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(model.layer.weight.grad.norm()))
            optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("step", "loss"), losses)
    close(recorder.series("grad_norm", "layer.weight"), norms)
