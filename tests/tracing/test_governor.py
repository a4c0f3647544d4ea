"""Cadences are stretched until our cost fits the budget, and restored when there is room."""

from __future__ import annotations

import itertools

import torch

from tests.tracing.support import KeepingRecorder, SmallGpt, gpt_loop, mlp, plain_loop, trace
from tui_trainer.probes import PROBES
from tui_trainer.tracing.governor import NEVER_STRETCHED, STEADY, WINDOW, Governed, Governor
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
        measured = [one for one in governed if one.name in own]
        own["tracer"] = costs.get("tracer", 0.0)
        governor.step(measured, governed, own, 10.0)


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
    assert 0.0 < cost(governed, costs) <= 0.01
    assert max(one.every for one in governed) <= 128


def test_all_together_stays_within_the_budget_where_the_fixed_part_leaves_room():
    governed = things()
    costs = {"dear": 0.4, "dearer": 0.2, "vital": 0.01, "tracer": 0.07}
    run(Governor(0.01, lambda one, text: None), governed, costs, 10)
    assert cost(governed, costs) + costs["tracer"] <= 0.1


def test_what_may_not_be_stretched_far_goes_last_and_is_then_taken_as_it_is():
    governed = things()
    governed[1].furthest = 4
    costs = {"dear": 0.1, "dearer": 0.2}
    run(Governor(0.01, lambda one, text: None), governed, costs, 10)
    assert governed[1].every == 4
    assert governed[0].every <= 16


def test_what_comes_with_the_training_is_due_at_every_step_and_no_matter_of_choice():
    governed = things()
    costs = {"dear": 0.4, "dearer": 0.2}
    run(Governor(0.01, lambda one, text: None), governed, costs, 5)
    assert governed[1].every > 1
    governed[1].held = True
    run(Governor(0.01, lambda one, text: None), governed, costs, 5)
    assert governed[1].every == 1


def test_steps_that_waited_for_something_else_make_no_room():
    governed = things()
    governor = Governor(0.01, lambda one, text: None)
    for step in range(STEADY + 5 * WINDOW):
        due = [one for one in governed[:1] if step % one.every == 0]
        took = 700.0 if step % 13 == 0 else 10.0
        governor.step(due, governed, {"dear": 0.4}, took)
    assert governed[0].every >= 4


def test_nothing_is_stretched_out_of_sight():
    """However short the steps are."""
    for probe in PROBES:
        if probe.every and probe.importance < NEVER_STRETCHED:
            assert probe.every * probe.furthest <= 512, probe.name


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


def small_budget(max_norm: float | None) -> KeepingRecorder:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = Options(budget=1e-6)
    recorder, _ = trace(lambda: plain_loop(model, optimizer, 150, max_norm), options=options)
    return recorder


def test_every_clip_tells_who_dominated_however_small_the_budget():
    recorder = small_budget(1e-3)
    assert len(recorder.rows("grad_norm")) == 150
    assert all(len(r.clip.parameters) == len(r.clip.shares) == 4 for r in recorder.records)
    assert recorder.table("weight_norm").every > 10


def test_without_clipping_gradients_are_measured_every_four_steps_at_least():
    rows = list(small_budget(None).rows("grad_norm"))
    assert max(b - a for a, b in itertools.pairwise(rows)) == 4
