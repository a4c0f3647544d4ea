"""What the tracer reads of an optimizer's settings, however they are written."""

from __future__ import annotations

import weakref

import pytest
import torch

from tui_trainer.trace.optimizer_slot import OptimizerSlot, shapes_of


class OwnOptimizer(torch.optim.Optimizer):
    """Keeps settings of its own in its groups."""

    def step(self, closure: object = None) -> None:
        """Does nothing."""


def slot_of(optimizer: torch.optim.Optimizer) -> OptimizerSlot:
    return OptimizerSlot(
        "own", "own", type(optimizer), shapes_of(optimizer), weakref.ref(optimizer)
    )


@pytest.mark.parametrize(
    ("settings", "momentum"),
    [
        ({"betas": (0.95, 0.999)}, 0.95),
        ({"betas": 0.9}, None),
        ({"betas": torch.tensor([0.9, 0.999])}, None),
        ({"betas": ()}, None),
        ({"momentum": torch.tensor(0.9)}, None),
        ({"momentum": 0.8, "betas": (0.95, 0.999)}, 0.8),
        ({}, None),
    ],
)
def test_momentum_is_read_where_it_is_a_number(
    settings: dict[str, object], momentum: float | None
) -> None:
    optimizer = OwnOptimizer([torch.nn.Parameter(torch.zeros(2))], {"lr": 0.1, **settings})
    assert slot_of(optimizer).momentum == momentum


@pytest.mark.parametrize(
    ("groups", "epsilon"),
    [
        ([1e-8, 1e-8], 1e-8),
        ([1e-8, 1e-4], 1e-8),
        ([1.0, 1e-8, 1e-20], 1e-20),
        ([1e-8, 0.0, 1.0], 0.0),
        ([1e-8, torch.tensor(1.0)], 1e-8),
    ],
)
def test_epsilon_is_the_smallest_of_the_groups(groups: list[object], epsilon: float) -> None:
    optimizer = torch.optim.AdamW(
        [{"params": [torch.nn.Parameter(torch.zeros(2))], "eps": eps} for eps in groups]
    )
    assert slot_of(optimizer).epsilon == epsilon
