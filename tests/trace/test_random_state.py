"""The generators of accelerators, by stand-ins for the modules of torch that own them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tui_trainer.trace.random_state import random_state, restore_random_state


class Generators:
    """What `torch.xpu` and `torch.mps` have in common: a state for each device."""

    def __init__(self) -> None:
        self.states = [torch.tensor([1, 2], dtype=torch.uint8)]

    def draw(self) -> None:
        self.states = [state + 1 for state in self.states]

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [state.clone() for state in self.states]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        self.states = [state.clone() for state in states]

    def get_rng_state(self) -> torch.Tensor:
        return self.states[0].clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.states = [state.clone()]


@pytest.fixture
def accelerators(monkeypatch):
    xpu, mps = Generators(), Generators()
    monkeypatch.setattr(
        torch,
        "xpu",
        SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: True,
            get_rng_state_all=xpu.get_rng_state_all,
            set_rng_state_all=xpu.set_rng_state_all,
        ),
    )
    monkeypatch.setattr(
        torch,
        "mps",
        SimpleNamespace(get_rng_state=mps.get_rng_state, set_rng_state=mps.set_rng_state),
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    return xpu, mps


def test_the_generators_of_xpu_and_mps_are_restored(accelerators):
    before = random_state()
    assert set(before) == {"torch", "numpy", "python", "xpu", "mps"}
    for generators in accelerators:
        generators.draw()
    restore_random_state(before)
    for generators in accelerators:
        assert [state.tolist() for state in generators.states] == [[1, 2]]


def test_a_state_of_another_machine_is_restored_as_far_as_there_are_devices(accelerators):
    state = random_state()
    with pytest.MonkeyPatch.context() as without:
        without.setattr(torch.xpu, "is_available", lambda: False)
        without.setattr(torch.backends.mps, "is_available", lambda: False)
        for generators in accelerators:
            generators.draw()
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        restore_random_state(state)
        assert [random.random(), np.random.rand(), torch.rand(()).item()] == drawn
    for generators in accelerators:
        assert [state.tolist() for state in generators.states] == [[2, 3]]
