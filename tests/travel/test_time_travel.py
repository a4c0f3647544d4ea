"""Going back arrives where the training has been, to the last bit, and goes on from there."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import types

import pytest
import torch

from tests.travel.support import Edited, Run, same, tiny, until, weights
from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.findings.rule import RuleSettings
from tui_trainer.protocol.actions import Back
from tui_trainer.protocol.settings import SettingChange
from tui_trainer.run.control import CommandHandler, RunBreakpoints, Viewer
from tui_trainer.trace.gate import Refusal
from tui_trainer.travel.snapshots import (
    SnapshotStore,
    TrainingParts,
    TrainingSnapshot,
    TrainingState,
)
from tui_trainer.travel.time_travel import TimeTravel


@pytest.mark.parametrize(
    ("task", "options"),
    [("gpt", {}), ("vit", {}), ("gpt", {"dtype": "fp16", "optimizer": "sgd"})],
)
def test_going_back_is_having_been_there(task, options, tmp_path):
    with Run(tiny(task, **options), tmp_path, every=3) as run:
        seen = {step: run.to(step) for step in range(1, 9)}
        losses = run.losses
        assert same(seen[7], run.back())
        assert same(seen[6], run.back())
        assert same(seen[2], run.back(2))
        assert same(seen[3], run.to(3))
        assert same(seen[5], run.back(5)), "forward again, to a step that was seen"
        assert same(seen[8], run.to(8))
        assert run.losses == losses, "nothing is recorded twice"
        run.to(10)
    whole = tiny(task, **options)
    whole.total_steps = 10
    with Run(tiny(task, **options), tmp_path, memory=0) as plain:
        end = plain.to(10)
        assert plain.losses == run.losses
    assert same(end["weights"], weights(run.training.model))
    assert not [line for line in run.log if "differs" in line or "Error" in line]


def test_changes_of_settings_are_made_again_at_their_steps(tmp_path):
    with Run(tiny(), tmp_path, every=4) as run:
        seen = {step: run.to(step) for step in range(1, 3)}
        run.change("lr=3e-3 freeze=blocks.0.*norm* batch_size=6")
        seen[2] = run.at(2)
        seen |= {step: run.to(step) for step in range(3, 6)}
        run.edits.undo()
        run.change("clip=0.01 beta1=0.5")
        seen[5] = run.at(5)
        seen |= {step: run.to(step) for step in range(6, 9)}
        for step in (7, 5, 4, 2, 1, 3, 6, 8):
            assert same(seen[step], run.back(step)), step
        for name, value in (("batch_size", float("inf")), ("seed", 1e20), ("beta2", 1.0)):
            with pytest.raises(Refusal, match="cannot be"):
                run.edits.change((SettingChange(name, value),))
        run.back(4)
        with pytest.raises(Refusal, match="step 4 is in the past of this run") as refused:
            run.change("lr=1")
        assert "branch" in refused.value.hint
        assert same(seen[8], run.to(8))
        run.change("lr=1e-4")
        run.to(9)
    assert not [line for line in run.log if "differs" in line or "Error" in line]


def test_a_phase_within_an_earlier_step_can_be_looked_at(tmp_path):
    with Run(tiny(), tmp_path) as run:
        run.to(6)
        seen = run.to(7)
        run.back(5)
        while run.gate.phase != "backward":
            run.phase()
        assert run.gate.step_in_progress == 6
        assert run.travel.back() == "back to step 5"
        run.at(5)
        assert same(seen, run.to(7))


def test_a_checkpoint_serves_where_no_snapshot_is_kept(tmp_path):
    with Run(tiny(), tmp_path, memory=0) as run:
        seen = {step: run.to(step) for step in range(1, 7)}
        with pytest.raises(Refusal, match="no snapshot of an earlier step is kept"):
            run.travel.back()
        run.change("lr=3e-3")
        run.gate.call_soon(lambda: run.saver.write(6)).result(60)
        seen |= {step: run.to(step) for step in range(7, 10)}
        for step in (8, 6, 9):
            expected = seen[step] if step != 6 else run.back(6)
            assert same(expected, run.back(step))
        with pytest.raises(Refusal, match="nothing is kept from before step 6"):
            run.travel.back(4)
        with pytest.raises(Refusal, match="the run has not been at step 12 yet"):
            run.travel.back(12)


def test_snapshots_stay_within_their_memory_and_are_dense_near_the_present(tmp_path):
    training = tiny(steps=60)
    with Run(training, tmp_path) as run:
        run.to(2)
        size = TrainingState.take(
            TrainingParts([training.model], [training.stateful["optimizer"]])
        ).nbytes
        run.travel.snapshots.budget_bytes = 8 * size
        run.to(40)
        steps = run.travel.snapshots.steps
        assert run.travel.snapshots.nbytes <= 8 * size
        assert steps[0] == 0
        assert steps[-3:] == (38, 39, 40)
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert gaps == sorted(gaps, reverse=True)
    announced = [line for line in run.log if line.startswith("snapshots take at most")]
    assert len(announced) == 2, "of weights, and of weights with the optimizer's state"
    with Run(tiny(), tmp_path, memory=1000) as small:
        small.to(2)
        assert small.travel.snapshots.steps == ()
    assert any("two do not fit in" in line for line in small.log)


def test_a_killed_run_is_resumed_and_gone_back_in(tmp_path):
    with Run(tiny(), tmp_path) as run:
        run.to(4)
        run.change("lr=3e-3 weight_decay=0.3 freeze=norm* seed=3")
        run.to(6)
        run.gate.call_soon(lambda: run.saver.write(6)).result(60)
        seen = {step: run.to(step) for step in range(7, 10)}
    resumed = Run(tiny(), tmp_path / "other")
    resumed.resume(tmp_path)
    with resumed as run:
        run.to(8)
        again = run.to(9)
        for step in (9, 7, 8):
            found = again if step == 9 else run.back(step)
            for part in ("weights", "states", "random"):
                assert same(seen[step][part], found[part]), (step, part, run.log)
        with pytest.raises(Refusal, match="nothing is kept from before step 6"):
            run.travel.back(5)


class Position:
    """A script's own data."""

    def __init__(self):
        self.drawn = 0

    def next(self):
        self.drawn += 1
        return torch.randn(8, 4)


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def script(model, optimizer, scheduler, data, after=lambda step: None):
    for step in range(1, 13):
        optimizer.zero_grad()
        model(data.next()).square().mean().backward()
        optimizer.step()
        after(step)
        scheduler.step()


def test_a_script_gets_weights_optimizer_scheduler_and_generators_back(tmp_path):
    parts = make()
    data = Position()
    travels = []

    def keep(run):
        travels.append(TimeTravel(run.tracer, run.gate, run.recorder, run.edits, 1 << 30))
        travels[0]._take(4)

    def back(run):
        assert travels[0]._restore_script(travels[0].snapshots.before(4)) is None

    run = Edited(lambda: script(*parts, data), {4: keep, 8: back})
    assert data.drawn == 12
    assert "not the script's own variables, data order, DataLoader workers" in run.notices[-1]
    model, optimizer, scheduler = make()
    saved = {}

    def by_hand(step):
        if step == 4:
            saved["state"] = copy.deepcopy(
                [model.state_dict(), optimizer.state_dict(), scheduler.state_dict()]
            )
            saved["random"] = torch.get_rng_state()
        if step == 8:
            for part, state in zip((model, optimizer, scheduler), saved["state"], strict=True):
                part.load_state_dict(state)
            torch.set_rng_state(saved["random"])

    script(model, optimizer, scheduler, Position(), by_hand)
    assert same(weights(parts[0]), weights(model))
    assert same(parts[1].state_dict(), optimizer.state_dict())
    assert same(parts[2].state_dict(), scheduler.state_dict())


def test_a_script_that_was_taken_back_keeps_the_true_snapshots_and_goes_back_further(tmp_path):
    travels, found = [], []

    def keep(run):
        travels.append(TimeTravel(run.tracer, run.gate, run.recorder, run.edits, 1 << 30))
        travels[0].every = 1000
        travels[0]._take(4)

    def back(run):
        travel = travels[0]
        snapshot = travel.snapshots.before(4)
        for each in (dataclasses.replace(snapshot, edits=object()), snapshot):
            try:
                travel._restore_script(each)
            except Refusal as refused:
                found.append(refused.message)
                found.append(travel.has_state_for(6))
        travel._take_now()
        found.extend((travel.has_state_for(6), travel.state_step, travel.snapshots.steps))
        try:
            travel.back()
        except Refusal as refused:
            found.append(refused.message)

    def later(run):
        travels[0]._take_now()
        found.append(travels[0].snapshots.steps)

    Edited(lambda: script(*make(), Position()), {4: keep, 8: back, 9: later})
    assert "step 4 could not be restored" in found.pop(0)
    refused = "no snapshot of an earlier step is kept"
    assert found == [False, True, 4, (4,), refused, (4, 9)]


def test_snapshots_share_what_has_not_changed_and_only_that():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8)
    )
    model[0].requires_grad_(False)
    model[2].weight.data[0, 0] = float("nan")
    optimizer = torch.optim.Adam(model.parameters())
    parts = TrainingParts([model], [optimizer])

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 8)).nan_to_num().square().mean().backward()
        optimizer.step()

    step()
    first = TrainingState.take(parts)
    snapshots = SnapshotStore(1 << 20)
    snapshots.add(TrainingSnapshot(1, first, None))
    assert snapshots.nbytes == first.nbytes
    model[2].requires_grad_(False)
    model[2].weight.grad = model[2].bias.grad = None
    model.eval()
    step()
    second = TrainingState.take(parts, first)
    snapshots.add(TrainingSnapshot(2, second, None))
    names = [name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())]
    kept = zip(names, first.tensors, second.tensors, strict=True)
    changed = [name for name, a, b in kept if a is not b]
    assert changed == ["1.weight", "1.bias"]
    states = [[state and id(state["exp_avg"]) for state in each.optimizers[0][1]]
              for each in (first, second)]  # fmt: skip
    assert [a == b for a, b in zip(*states, strict=True)] == [True, True, False, False, True, True]
    generators = first.unshared_nbytes
    assert generators > 20_000, "Python's alone has 624 words"
    assert snapshots.nbytes - 2 * generators < 1.5 * (first.nbytes - generators)
    assert parts.changing_nbytes() < parts.nbytes() == first.nbytes
    assert second.nbytes == first.nbytes
    # Neither is noticed by the counter of versions, the second not by a comparison of values.
    model[0].weight.data[3, 3] += 1
    model[0].bias.data.zero_()
    third = TrainingState.take(parts, second)
    model[0].bias.data.copy_(torch.tensor(-0.0))
    fourth = TrainingState.take(parts, third)
    for state in (first, second, third):
        snapshots.add(TrainingSnapshot(3, state, None))
    kept = [fourth.tensors[names.index("0.bias")], third.tensors[names.index("0.weight")]]
    assert not any(each is a for each in kept for a in (*second.tensors, *third.tensors[1:]))
    third.restore()
    assert torch.equal(model[0].bias.signbit(), torch.zeros(8, dtype=torch.bool))
    first.restore()
    assert same_bits(model.state_dict(), dict(zip(names, first.tensors, strict=True)))
    snapshots.forget_after(0)
    assert snapshots.nbytes == 0


def test_counts_of_steps_return_to_the_device_that_they_were_on():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).backward()
    optimizer.step()
    state = TrainingState.take(TrainingParts([model], [optimizer]))
    counts = [saved["step"] for saved in state.optimizers[0][1]]
    assert [state.devices[id(count)].type for count in counts] == ["cpu", "cpu"]
    state.devices[id(counts[0])] = torch.device("meta")  # as for a fused one on a GPU
    optimizer.state.clear()
    state.restore()
    restored = [optimizer.state[parameter]["step"] for parameter in model.parameters()]
    assert [count.device.type for count in restored] == ["meta", "cpu"]
    assert restored[1] == 1
    assert restored[1] is not counts[1]


def test_two_snapshots_that_share_frozen_weights_fit_in_less_than_twice_one():
    model = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 1))
    model[0].requires_grad_(False)
    parts = TrainingParts([model], [torch.optim.SGD(model[1].parameters())])
    notices = []
    travel = TimeTravel(
        None, types.SimpleNamespace(completed=1, call_when_due=print),
        types.SimpleNamespace(notice=lambda *given, **_: notices.append(given[1])),
        types.SimpleNamespace(), 800_000,
    )  # fmt: skip
    assert 2 * parts.nbytes() > 800_000 > parts.nbytes() + parts.changing_nbytes()
    assert travel._announce(parts)
    model.requires_grad_(True)
    assert not travel._announce(parts)
    assert "two do not fit" in notices[-1]


def same_bits(state, saved):
    return all(state[name].numpy().tobytes() == saved[name].numpy().tobytes() for name in state)


class Unrestorable:
    """A part of a training whose state cannot be loaded once it has been spoilt."""

    def __init__(self):
        self.spoilt = False

    def state_dict(self):
        return {"spoilt": self.spoilt}

    def load_state_dict(self, state):
        if self.spoilt and not state["spoilt"]:
            raise ValueError("no such state")


@pytest.mark.parametrize("phases", [0, 3])
def test_a_state_that_cannot_be_restored_leaves_the_run_where_it_is(phases, tmp_path):
    training = tiny(dropout=0.0)
    part = training.stateful["unrestorable"] = Unrestorable()
    with Run(training, tmp_path) as run:
        seen = run.to(5)
        run.change("clip=0.5")
        seen = run.at(5)
        for _ in range(phases):
            run.phase()
        part.spoilt = True
        run.travel.back(2)
        found = run.at(5)
        for each in ("weights", "edits"):
            assert same(seen[each], found[each]), each
        assert any(
            line == "the run stays where it is: step 2 could not be restored: ValueError: "
            "no such state"
            for line in run.log
        ), run.log
        run.to(7)
    with Run(tiny(dropout=0.0), tmp_path, memory=0) as plain:
        plain.to(5)
        plain.change("clip=0.5")
        end = plain.to(7)
    assert same(end["weights"], weights(run.training.model))
    assert run.losses == plain.losses


def test_a_breakpoint_is_met_at_a_step_that_is_made_again_but_not_on_the_way_there(tmp_path):
    with Run(tiny(), tmp_path, every=4) as run:
        breakpoints = RunBreakpoints(run.spec, run.gate, run.recorder).all
        control = CommandHandler(
            run.gate, run.recorder, print, print, travel=lambda: run.travel,
            breakpoints=types.SimpleNamespace(
                all=breakpoints, save=lambda: None, forget_stop=lambda: None),
        )  # fmt: skip
        viewer = Viewer(0, "you", False)
        control.joined(viewer)
        run.to(8)
        on_the_way = breakpoints.add("step == 5 at loss")
        done = control.perform(viewer, Back(6, break_at="step == 7 at backward"))
        assert done.message.endswith("breakpoint 2: step == 7 at backward (once)"), done
        run.at(6)
        assert breakpoints.list()[0].hits == on_the_way.hits == 0
        run.gate.resume()
        until(lambda: run.gate.mode == "paused" and run.gate.phase == "backward")
        assert run.gate.step_in_progress == 7
        assert breakpoints.stop.number == 2
        refused = control.perform(viewer, Back(11, break_at="step == 12"))
        assert "has not been at step 11" in refused.message
        assert len(breakpoints.list()) == 2
        run.gate.step()
        run.at(7)
        run.travel.back(4)
        run.at(4)
        run.gate.resume()
        until(lambda: run.gate.mode == "paused" and run.gate.step_in_progress == 5)


def test_a_breakpoint_of_a_script_comes_as_many_steps_later_as_it_counts_further(tmp_path):
    class Script:
        task = None

        def back(self, step, confirmed, arrived):
            arrived(13)
            return f"back to {step}"

    with Run(tiny(), tmp_path, memory=0) as run:
        breakpoints = RunBreakpoints(run.spec, run.gate, run.recorder).all
        control = CommandHandler(
            run.gate, run.recorder, print, print, travel=Script,
            breakpoints=types.SimpleNamespace(
                all=breakpoints, save=lambda: None, forget_stop=lambda: None),
        )  # fmt: skip
        viewer = Viewer(0, "you", False)
        control.joined(viewer)
        assert control.perform(viewer, Back(6, break_at="step == 7 at backward")).ok
        assert control.perform(viewer, Back(6, break_at="step == 7")).ok
        conditions = [each.condition for each in breakpoints.list()]
        assert conditions == ["step == 20 at backward", "step == 20"]
        refused = control.perform(viewer, Back(6, break_at="loss > 3"))
        assert "the condition has to name a step" in refused.message


def test_the_origin_of_a_value_that_is_not_finite_is_found_by_making_its_step_again(tmp_path):
    class Overflow(torch.nn.Module):
        def forward(self, x):
            return (x * 0 + 1e38) * 1e3 if run.gate.step_in_progress in spoilt else x

    spoilt = ()
    training = tiny(dropout=0.0)
    training.model.blocks[0].norm_1 = torch.nn.Sequential(
        training.model.blocks[0].norm_1, Overflow()
    )
    with Run(training, tmp_path) as run:
        run.recorder.evaluate_with(FindingsEngine(RuleSettings()))
        spoilt = (6, 7)
        run.to(8)
        run.back(5)
        assert not any("was repeated" in line for line in run.log)
        run.to(6)
        run.recorder.flush(60)
        text = next(line for line in run.log if line.startswith("step 6 was repeated: "))
        assert "blocks.0.norm_1.1 (Overflow) is not finite although its inputs" in text
