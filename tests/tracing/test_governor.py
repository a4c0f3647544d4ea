"""Cadences are stretched until our cost fits the budget, and restored when there is room."""

from __future__ import annotations

import torch

from tests.tracing.support import KeepingRecorder, SmallGpt, gpt_loop, trace
from tui_trainer.tracing.governor import STEADY, WINDOW, Governed, Governor
from tui_trainer.tracing.probe import Options


def things() -> list[Governed]:
    return [
        Governed(name="dear", natural=1, every=1, importance=10),
        Governed(name="dearer", natural=1, every=1, importance=40),
        Governed(name="vital", natural=1, every=1, importance=100),
        Governed(name="request", natural=0, every=0, importance=10),
    ]


def run(
    governor: Governor, governed: list[Governed], costs: dict[str, float], windows: int
) -> None:
    for step in range(STEADY + windows * WINDOW):
        own = {
            one.name: costs[one.name]
            for one in governed
            if one.name in costs and one.every and step % one.every == 0
        }
        governor.step(governed, own | {"tracer": costs.get("tracer", 0.0)}, 10.0)


def cost(governed: list[Governed], costs: dict[str, float]) -> float:
    return sum(costs[one.name] / one.every for one in governed if one.name in costs)


def test_fits_the_budget_and_spares_the_important():
    said: list[str] = []
    governor = Governor(0.01, lambda one, text: said.append(text))
    governed = things()
    costs = {"dear": 0.2, "dearer": 0.06, "vital": 0.03}
    run(governor, governed, costs, 3)
    assert cost(governed, costs) <= 0.1
    assert governed[0].every > 1
    assert governed[1].every == 1
    assert governed[2].every == 1
    assert any("dear is now measured every" in text for text in said)


def test_everything_stays_as_it_is_when_off_or_cheap():
    for budget, price in ((0.0, 5.0), (0.01, 0.01)):
        governed = things()
        governor = Governor(budget, lambda one, text: None)
        run(governor, governed, {"dear": price, "dearer": price}, 3)
        assert [one.every for one in governed] == [1, 1, 1, 0]


def test_something_is_measured_even_where_the_fixed_part_is_over_the_budget():
    governed = things()
    costs = {"dear": 0.4, "dearer": 0.2, "tracer": 3.0}
    run(Governor(0.01, lambda one, text: None), governed, costs, 10)
    assert cost(governed, costs) <= 0.05
    assert max(one.every for one in governed) <= 32


def test_is_restored_when_it_becomes_cheap_and_does_not_swing():
    changes: list[str] = []
    governor = Governor(0.01, lambda one, text: changes.append(text))
    governed = things()
    run(governor, governed, {"dear": 0.4}, 3)
    assert governed[0].every > 1
    settled = len(changes)
    run(governor, governed, {"dear": 0.4}, 10)
    assert len(changes) == settled
    run(governor, governed, {"dear": 0.02}, 30)
    assert governed[0].every == 1


def test_a_tiny_step_stretches_cadences_says_so_and_redeclares_the_tables():
    torch.manual_seed(0)
    model = SmallGpt()
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = KeepingRecorder()
    trace(lambda: gpt_loop(model, optimizer, 150), options=Options(budget=0.001), recorder=recorder)
    assert recorder.said("cadence")
    every = recorder.table("attention").every
    assert every > 1
    assert len(recorder.rows("attention")) < 150
    assert len(recorder.rows("step")) == 150
    assert len(recorder.rows("clip")) == 150
