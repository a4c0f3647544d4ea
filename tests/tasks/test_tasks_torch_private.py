"""One test for each private name of PyTorch that the example tasks rely on."""

from __future__ import annotations

import math

import pytest
import torch

from tui_trainer.tasks.torch_private import GradScaler, cpp_compiler_found


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_scaler_state_taken_inside_a_step_is_that_after_its_update(fused, unscale):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=fused)
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=2)
    inside: list[dict] = []
    optimizer.register_step_post_hook(lambda *_: inside.append(scaler.state_dict()))
    scales = []
    for step in range(1, 9):
        optimizer.zero_grad()
        scaler.scale(parameter.sum() * (math.inf if step == 6 else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        between = scaler.state_dict()
        scaler.update()
        assert between == scaler.state_dict()
        if step != 6 or fused:  # only a fused one is called, to skip by itself
            assert inside[-1] == scaler.state_dict()
        scales.append(scaler.get_scale())
    assert scales == [8, 16, 16, 32, 32, 16, 16, 32]
    assert len(inside) == (8 if fused else 7)


def test_a_disabled_scaler_has_no_state():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = GradScaler("cpu", enabled=False)
    inside: list[dict] = []
    optimizer.register_step_post_hook(lambda *_: inside.append(scaler.state_dict()))
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert inside == [{}]


def test_scaler_state_at_the_largest_scale_does_not_grow():
    parameter = torch.nn.Parameter(torch.ones(2) * 1e-38)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler = GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    inside: list[dict] = []
    optimizer.register_step_post_hook(lambda *_: inside.append(scaler.state_dict()))
    scaler.scale((parameter * 1e-38).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert inside == [scaler.state_dict()]
    assert inside[0]["scale"] == 2.0**127


@pytest.mark.parametrize("found", [False, True])
def test_whether_there_is_a_compiler_is_what_inductor_says(monkeypatch, found):
    def look() -> str:
        if not found:
            raise RuntimeError("no compiler")
        return "g++"

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", look)
    assert cpp_compiler_found() == found


def test_a_state_loaded_in_the_middle_of_a_step_begins_a_new_one():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameter.sum()).backward()
    state = scaler.state_dict()
    scaler.unscale_(optimizer)
    scaler.load_state_dict(state)
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [1.0, 1.0]
