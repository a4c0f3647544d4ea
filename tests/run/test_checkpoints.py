from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.run.checkpoints import (
    CheckpointWriter,
    NotSerializable,
    flatten,
    load_checkpoint,
    restore,
    unflatten,
)
from tui_trainer.runs.checkpoints import checkpoint_steps
from tui_trainer.tasks.torch_private import GradScaler
from tui_trainer.trace.random_state import random_state, restore_random_state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


def test_any_state_survives_bit_for_bit():
    shared = torch.randn(3)
    state = {
        "ints": {0: 1, 2**70: -1},
        3.5: (1, [2, (None, True)]),
        "floats": [0.1, math.inf, -math.inf, math.nan, 1e-310],
        "tensors": [shared, shared, torch.zeros(()), torch.zeros(0, 3), torch.arange(5)[::2]],
        "bf16": torch.randn(4, 4).bfloat16().t(),
        "numpy": np.arange(6, dtype=">i2").reshape(2, 3),
        "scalar": np.float32(0.1),
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "odd/key with 'quotes'": {"dict": [["tensor", "x"]]},
        "text": "\udc80 \n",
    }
    skeleton, tensors = flatten(state)
    assert same(state, unflatten(json.loads(json.dumps(skeleton)), tensors))


def test_unsupported_state_is_named():
    with pytest.raises(NotSerializable, match="/a/1 is a function"):
        flatten({"a": [1, print.__class__ and (lambda: 0)]})


class Position:
    def __init__(self):
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def make(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    return model, {"optimizer": optimizer, "schedule": schedule, "position": Position()}


def train(model, parts, steps):
    losses = []
    for _ in range(steps):
        parts["optimizer"].zero_grad()
        noise = np.random.rand() + random.random()
        loss = (model(torch.randn(16, 4)) * noise).square().mean()
        loss.backward()
        parts["optimizer"].step()
        parts["schedule"].step()
        parts["position"].position += 1
        losses.append(loss.detach())
    return torch.stack(losses)


def test_sixty_and_forty_are_a_hundred(tmp_path):
    np.random.seed(1)
    random.seed(2)
    model, parts = make()
    begin = random_state()
    whole = train(model, parts, 100)

    first, first_parts = make()
    restore_random_state(begin)
    losses = train(first, first_parts, 60)
    CheckpointWriter(tmp_path).write(60, first.state_dict(), first_parts, {"why": "test"})
    train(first, first_parts, 5)  # the writer going on changes nothing on disk

    second, second_parts = make(seed=9)
    checkpoint = load_checkpoint(tmp_path)
    restore(checkpoint, second, second_parts)
    restore_random_state(checkpoint.random)
    losses = torch.cat([losses, train(second, second_parts, 40)])
    assert torch.equal(losses, whole)
    for one, other in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (checkpoint.step, checkpoint.facts) == (60, {"why": "test"})
    assert second_parts["position"].position == 100


def make_scaled(implementation):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.01, **{implementation: True} if implementation else {}
    )
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return model, {"optimizer": optimizer, "scaler": scaler, "position": Position()}


def train_scaled(model, parts, until, infinite=frozenset()):
    """As the loops of the tasks, with gradients that are not finite at some steps."""
    optimizer, scaler, position = parts.values()
    scales = {}
    while position.position < until:
        position.position += 1
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        if position.position in infinite:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales[position.position] = scaler.get_scale()
    return scales


@pytest.mark.parametrize("implementation", ["fused", "foreach", None])
@pytest.mark.parametrize("at", [59, 60, 61, 62, 63])
def test_sixty_and_forty_are_a_hundred_under_a_scaler(tmp_path, at, implementation):
    infinite = {60, 80} if implementation == "fused" else {80}
    model, parts = make_scaled(implementation)
    scales = train_scaled(model, parts, 100, infinite)

    first, first_parts = make_scaled(implementation)

    def write(*_):  # as the gate does: inside the optimizer's step
        if first_parts["position"].position == at:
            CheckpointWriter(tmp_path).write(at, first.state_dict(), first_parts)

    first_parts["optimizer"].register_step_post_hook(write)
    train_scaled(first, first_parts, at + 2, infinite)

    second, second_parts = make_scaled(implementation)
    checkpoint = load_checkpoint(tmp_path)
    restore(checkpoint, second, second_parts)
    restore_random_state(checkpoint.random)
    if implementation == "fused" and at == 60:
        assert second_parts["scaler"].state_dict()["scale"] == scales[60] == scales[59] / 2
    rest = train_scaled(second, second_parts, 100, infinite)
    assert rest == {step: scale for step, scale in scales.items() if step > at}
    for one, other in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_writing_draws_no_random_number(tmp_path):
    model, parts = make()
    before = random_state()
    CheckpointWriter(tmp_path).write(1, model.state_dict(), parts)
    assert same(before, random_state())


def test_the_newest_and_the_best_are_kept(tmp_path):
    model, parts = make()
    written = CheckpointWriter(tmp_path, keep=2)
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: math.nan, 50: 2.5, 60: 2.4}
    for step, loss in losses.items():
        improves = written.is_best(loss)
        written.write(step, model.state_dict(), parts)
        if improves:
            written.mark_best(step, loss)
    assert checkpoint_steps(tmp_path) == [20, 50, 60]
    assert load_checkpoint(tmp_path).step == 60
    assert load_checkpoint(tmp_path / "checkpoints" / "step-00000020").step == 20
    again = CheckpointWriter(tmp_path, keep=2)
    assert not again.is_best(1.5)
    assert again.is_best(0.9)


def test_weights_are_readable_by_any_tool_and_tied_ones_are_written(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    path = CheckpointWriter(tmp_path).write(1, model.state_dict(), {})
    assert set(load_file(path / "weights.safetensors")) == set(model.state_dict())
    assert not list(path.parent.glob(".*"))


def test_a_write_that_fails_leaves_the_former_one(tmp_path, monkeypatch):
    model, parts = make()
    written = CheckpointWriter(tmp_path)
    written.write(1, model.state_dict(), parts)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        written.write(2, model.state_dict(), parts)
    assert load_checkpoint(tmp_path).step == 1
    assert not list((tmp_path / "checkpoints").glob(".writing*"))


@pytest.mark.parametrize("file", ["weights.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "noise"])
def test_damage_is_one_clear_message(tmp_path, file, damage):
    model, parts = make()
    path = CheckpointWriter(tmp_path).write(1, model.state_dict(), parts) / file
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "noise":
        path.write_bytes(bytes(reversed(data)))
    with pytest.raises(ConfigurationError):
        load_checkpoint(tmp_path / "checkpoints" / "step-00000001")


def test_another_model_does_not_fit(tmp_path):
    model, parts = make()
    CheckpointWriter(tmp_path).write(1, model.state_dict(), parts)
    with pytest.raises(ConfigurationError, match="does not fit"):
        restore(load_checkpoint(tmp_path), torch.nn.Linear(3, 3), {})
