"""Cadences are stretched until our cost fits the budget, and restored when there is room."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.trace.support import KeepingRecorder, SmallGpt, gpt_loop, mlp, plain_loop, trace
from tui_trainer.probes import PROBES
from tui_trainer.probes.attention.heads import AttentionHeads
from tui_trainer.probes.update_ratio import NEVER
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.governor import (
    EARLIEST,
    NEVER_STRETCHED,
    WARM_UP,
    WATCHED_LIMIT,
    WINDOW,
    ActiveProbe,
    Governor,
)
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings
from tui_trainer.trace.probe_set import ProbeSchedule
from tui_trainer.trace.tracer import Tracer


def active_probe(**given: Any) -> ActiveProbe:
    """One that has no tables: the governor reads none."""
    return ActiveProbe(probe=Probe.__new__(Probe), tables=[], **given)


def things() -> list[ActiveProbe]:
    return [
        active_probe(name="costly", natural=1, every=1, importance=10),
        active_probe(name="costlier", natural=1, every=1, importance=40),
        active_probe(name="vital", natural=1, every=1, importance=100),
        active_probe(name="request", natural=0, every=0, importance=10),
    ]


def silent(of: Sequence[ActiveProbe], text: str, level: str) -> None:
    pass


def run(
    governor: Governor,
    governed: list[ActiveProbe],
    costs: dict[str, float],
    windows: int,
    step_ms: float = 10.0,
    steps: int = 0,
) -> None:
    stretchable = [one for one in governed if one.importance < NEVER_STRETCHED]
    for step in range(steps or WARM_UP + windows * WINDOW):
        own = {
            one.name: costs[one.name]
            for one in governed
            if one.name in costs and one.now and step % one.now == 0
        }
        own["tracer"] = costs.get("tracer", 0.0)
        governor.step(stretchable, own, step_ms)


def cost(governed: list[ActiveProbe], costs: dict[str, float]) -> float:
    return sum(costs[one.name] / one.now for one in governed if one.name in costs and one.now)


def test_fits_the_budget_and_spares_the_important():
    said: list[str] = []
    governor = Governor(0.01, lambda of, text, level: said.append(text))
    governed = things()
    costs = {"costly": 0.2, "costlier": 0.06, "vital": 0.03}
    run(governor, governed, costs, 3)
    assert cost(governed, costs) <= 0.1
    assert governed[0].every > 1
    assert governed[1].every == 1
    assert governed[2].every == 1
    (text,) = said
    assert "costly every" in text
    # Once, however much it is stretched later.
    run(governor, governed, {"costly": 2.0, "costlier": 0.06, "vital": 0.03}, 9)
    assert sum("costly every" in text for text in said) == 1


def test_cadences_stay_natural_when_off_or_cheap():
    for budget, price in ((0.0, 5.0), (0.01, 0.01)):
        governed = things()
        governor = Governor(budget, silent)
        run(governor, governed, {"costly": price, "costlier": price}, 3)
        assert [one.every for one in governed] == [1, 1, 1, 0]


def test_something_is_measured_even_where_the_fixed_part_is_over_the_budget():
    governed = things()
    costs = {"costly": 0.4, "costlier": 0.2, "tracer": 3.0}
    run(Governor(0.01, silent), governed, costs, 10)
    assert 0.0 < cost(governed, costs) <= 0.01
    assert max(one.every for one in governed) <= 128


def test_all_together_stays_within_the_budget_where_the_fixed_part_leaves_room():
    governed = things()
    costs = {"costly": 0.4, "costlier": 0.2, "vital": 0.01, "tracer": 0.07}
    run(Governor(0.01, silent), governed, costs, 10)
    assert cost(governed, costs) + costs["tracer"] <= 0.1


def test_max_stretch_is_respected_even_over_budget():
    governed = things()
    governed[1].max_stretch = 4
    costs = {"costly": 0.1, "costlier": 0.2}
    run(Governor(0.01, silent), governed, costs, 10)
    assert governed[1].every == 4
    assert governed[0].every <= 16


def test_probes_served_by_clipping_keep_their_natural_cadence():
    governed = things()
    costs = {"costly": 0.4, "costlier": 0.2}
    run(Governor(0.01, silent), governed, costs, 5)
    assert governed[1].every > 1
    governed[1].with_clipping = True
    run(Governor(0.01, silent), governed, costs, 5)
    assert governed[1].every == 1


def test_slow_outlier_steps_do_not_enlarge_the_budget():
    governed = things()
    governor = Governor(0.01, silent)
    for step in range(WARM_UP + 5 * WINDOW):
        own = {"costly": 0.4} if step % governed[0].every == 0 else {}
        took = 700.0 if step % 13 == 0 else 10.0
        governor.step(governed, own, took)
    assert governed[0].every >= 4


def test_no_cadence_exceeds_512_steps():
    """However short the steps are; what measures the first steps alone has none."""
    for probe in PROBES:
        if 0 < probe.every < NEVER and probe.importance < NEVER_STRETCHED:
            assert probe.every * probe.max_stretch <= 512, probe.name


def test_cadence_is_restored_when_cheap_without_oscillating():
    changes: list[str] = []
    governor = Governor(0.01, lambda of, text, level: changes.append(text))
    governed = things()
    run(governor, governed, {"costly": 0.4}, 3)
    assert governed[0].every > 1
    settled = len(changes)
    run(governor, governed, {"costly": 0.4}, 10)
    assert len(changes) == settled
    run(governor, governed, {"costly": 0.02}, 30)
    assert governed[0].every == 1


def test_nothing_is_restored_over_budget_which_is_reported_once():
    """The part that is no matter of choice is over the budget by itself."""
    said: list[tuple[str, str]] = []
    governor = Governor(0.01, lambda of, text, level: said.append((text, level)))
    one = active_probe(name="weight_norm", natural=10, every=320, importance=30, max_stretch=32)
    run(governor, [one], {"weight_norm": 0.01, "tracer": 0.35}, 20, step_ms=19.4)
    assert one.every == 320
    text = (
        "overhead exceeds the budget of 1 %: measurements at every step take 0.35 ms, "
        "of a 19.4 ms step"
    )
    assert said == [(text, "info")]
    run(governor, [one], {"weight_norm": 0.01, "tracer": 0.7}, 20, step_ms=19.4)
    assert len(said) == 1
    run(governor, [one], {"weight_norm": 0.01, "tracer": 0.01}, 20, step_ms=19.4)
    assert one.every == 10
    assert all("the budget allows it" in text for text, _ in said[1:])


def test_warning_names_the_cost_of_stretchable_probes():
    said: list[str] = []
    governor = Governor(0.01, lambda of, text, level: said.append(text))
    one = active_probe(name="norm", natural=1, every=1, importance=50, max_stretch=4)
    run(governor, [one], {"norm": 0.4, "tracer": 0.05}, 4)
    assert one.every == 4
    assert said[-1] == (
        "overhead exceeds the budget of 1 %: measurements at every step take 0.05 ms, the others "
        "at their longest cadence 0.10 ms, of a 10.0 ms step"
    )


def test_far_too_costly_probes_are_stretched_before_the_window_ends():
    governed = things()
    run(Governor(0.01, silent), governed, {"costly": 50.0}, 0, steps=WARM_UP + EARLIEST)
    assert governed[0].every >= 32


def test_no_early_decision_within_the_budget_of_the_window():
    governed = things()
    governor = Governor(0.01, silent)
    run(governor, governed, {"costly": 0.02}, 0, steps=WARM_UP + 10)
    governor.step(governed, {"costly": 2.8}, 10.0)
    assert governed[0].every == 1


def watchable() -> list[ActiveProbe]:
    heads = active_probe(
        name="heads", natural=0, every=0, importance=10, watched_natural=1, watched_every=1
    )
    spectrum = active_probe(
        name="spectrum", natural=8, every=8, importance=10, watched_natural=2, watched_every=2
    )
    return [*things(), heads, spectrum]


def watch(governed: list[ActiveProbe], watched: bool) -> None:
    for one in governed:
        one.watched = watched and one.watched_natural > 0


def test_watched_probes_are_stretched_within_limits():
    governed = watchable()
    heads, spectrum = governed[-2:]
    watch(governed, True)
    costs = {"heads": 0.8, "spectrum": 0.2}
    run(Governor(0.01, silent), governed, costs, 6)
    assert heads.watched_every > 1
    assert cost(governed, costs) <= 0.1
    assert heads.every == 0  # once nobody watches
    run(Governor(0.01, silent), governed, {"heads": 80.0, "spectrum": 20.0}, 6)
    assert heads.now == WATCHED_LIMIT
    assert spectrum.now == 2 * WATCHED_LIMIT


def test_watching_is_reported_and_cadences_are_restored_afterwards():
    said: list[str] = []
    governor = Governor(0.01, lambda of, text, level: said.append(text))
    governed = watchable()
    costs = {"costly": 0.05, "heads": 0.8, "spectrum": 0.05}
    run(governor, governed, costs, 4)
    assert said == []
    watch(governed, True)
    run(governor, governed, costs, 4)
    assert said[0] == (
        "measured more often while on screen: heads every step, spectrum every 2 steps"
    )
    assert governed[0].every > 1
    stretched = governed[-2].watched_every
    said.clear()
    watch(governed, False)
    run(governor, governed, costs, 2)
    assert said == [
        "no longer on screen: heads not measured, spectrum every 8 steps, costly every step"
    ]
    said.clear()
    watch(governed, True)
    run(governor, governed, costs, 1)
    assert said[0].startswith(f"measured more often while on screen: heads every {stretched} ")


def test_watching_heads_is_declared_and_stretched_in_a_run():
    torch.manual_seed(0)
    model = SmallGpt()
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = KeepingRecorder()
    recorder.topics = frozenset({"attention_heads"})
    trace(
        lambda: gpt_loop(model, optimizer, 150),
        options=ProbeOptions(budget=1e-4),
        recorder=recorder,
    )
    assert "attention_heads every step" in recorder.notices_of("cadence")[0]
    table = recorder.table("attention_heads")
    assert table.natural == 1
    assert table.every == WATCHED_LIMIT
    assert table.stretched
    last = list(recorder.rows("attention_heads"))[-2:]
    assert last[1] - last[0] == WATCHED_LIMIT


class Failing(AttentionHeads):
    """Fails at its third measurement."""

    def after_update(self) -> Readings:
        self.left = getattr(self, "left", 3) - 1
        if not self.left:
            raise RuntimeError("fails")
        return super().after_update()


def test_failed_probes_are_not_governed(monkeypatch: pytest.MonkeyPatch):
    governed: list[str] = []
    step = Governor.step

    def noting(self: Governor, of, own_ms, step_ms) -> bool:  # type: ignore[no-untyped-def]
        governed[:] = [one.name for one in of]
        return step(self, of, own_ms, step_ms)

    monkeypatch.setattr(Governor, "step", noting)
    torch.manual_seed(0)
    model = SmallGpt()
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = KeepingRecorder()
    recorder.topics = frozenset({"attention_heads"})
    probes = [probe for probe in PROBES if probe is not AttentionHeads]
    with Tracer(recorder, Gate(), [*probes, Failing], ProbeOptions()):
        gpt_loop(model, optimizer, 20)
    assert recorder.notices_of("fault")
    assert "attention" in governed
    assert "attention_heads" not in governed


def test_a_tiny_step_stretches_cadences_and_redeclares_the_tables():
    torch.manual_seed(0)
    model = SmallGpt()
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = KeepingRecorder()
    trace(
        lambda: gpt_loop(model, optimizer, 150),
        options=ProbeOptions(budget=0.001),
        recorder=recorder,
    )
    assert recorder.notices_of("cadence")
    every = recorder.table("attention").every
    assert every > 1
    assert len(recorder.rows("attention")) < 150
    assert len(recorder.rows("step")) == 150
    assert len(recorder.rows("clip")) == 150


def small_budget(max_norm: float | None) -> KeepingRecorder:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = ProbeOptions(budget=1e-6)
    recorder, _ = trace(lambda: plain_loop(model, optimizer, 150, max_norm), options=options)
    return recorder


def test_every_clip_names_the_dominant_parameters_at_any_budget():
    recorder = small_budget(1e-3)
    assert len(recorder.rows("grad_norm")) == 150
    assert all(len(r.clip.parameters) == len(r.clip.shares) == 4 for r in recorder.records)
    assert recorder.table("weight_norm").every > 10


def test_without_clipping_gradients_are_measured_every_four_steps_at_least():
    rows = list(small_budget(None).rows("grad_norm"))
    assert max(b - a for a, b in itertools.pairwise(rows)) == 4


class WantedOften(Probe):
    often_in_short_runs = True


def test_a_short_run_measures_what_is_wanted_often_several_times():
    often = ActiveProbe(
        probe=WantedOften.__new__(WantedOften), tables=[], name="update_ratio", natural=10,
        every=10, importance=20, max_stretch=32,
    )  # fmt: skip
    rare = active_probe(name="spectra", natural=10, every=10, importance=10)
    governor = Governor(0.01, silent)
    measured = 0
    for step in range(300):
        due = [probe for probe in (often, rare) if step % probe.now == 0]
        measured += often in due
        governor.step([often, rare], {probe.name: 50.0 for probe in due}, 2.0)
    assert rare.now >= 320
    assert often.now <= 300 / 4
    assert measured >= 10


def test_a_step_before_a_pause_is_measured_in_full():
    probes = [
        active_probe(name="grad_norm", natural=1, every=4, importance=50),
        active_probe(name="heads", natural=0, every=0, importance=10),
    ]
    schedule = ProbeSchedule(probes)
    for stops_soon, expected in ((False, probes[:1]), (False, []), (True, probes[:1]), (False, [])):
        schedule.begin_step(1, (), stops_soon)
        assert list(schedule.plan.probes) == expected
        schedule.end_step()
