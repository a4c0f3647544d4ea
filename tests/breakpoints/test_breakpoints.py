"""Breakpoints on a real loop: where the run pauses, and what a fault in a condition does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tui_trainer.breakpoints.breakpoint_list import BreakpointError
from tui_trainer.breakpoints.compiled_conditions import Selector
from tui_trainer.breakpoints.expression import ExpressionError
from tui_trainer.breakpoints.quantities import COLUMN_QUANTITIES, nothing_matches
from tui_trainer.config.run_spec import RunSpec, saved_breakpoints
from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.probes import PROBES
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.messages import Breakpoint, Poll
from tui_trainer.protocol.schema import ProcessInfo, RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.control import RunBreakpoints
from tui_trainer.run.scalars import ScalarLog
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer

Stop = tuple[str, int, str, str]
"""(phase, step, condition, parameter)"""


class Run:
    """A loop of twenty steps whose loss spikes at step 10 and is nan from step 15 on, and which
    goes on by itself wherever it pauses."""

    def __init__(
        self, folder: Path, *conditions: str, budget: float = 0.01, processes: int = 1
    ) -> None:
        spec = RunSpec(
            name="run",
            directory=str(folder),
            task="script",
            breakpoints=tuple(Breakpoint(n, each) for n, each in enumerate(conditions)),
        )
        ranks = tuple(ProcessInfo(rank) for rank in range(processes)) if processes > 1 else ()
        self.recorder = Recorder(RunInfo(name="run", task="script", processes=ranks))
        self.recorder.evaluate_with(FindingsEngine())
        self.gate = Gate()
        self.run = RunBreakpoints(spec, self.gate, self.recorder)
        self.breakpoints = self.run.all
        self.stops: list[Stop] = []
        self.gate.hooks.changed = self._changed
        self.log = ScalarLog(self.recorder, self.gate)
        self.budget = budget
        self.before: Callable[[int], None] = lambda step: None
        self.weights: list[torch.Tensor] = []
        self.losses: dict[int, float] = {}

    def _changed(self) -> None:
        if self.gate.mode == "paused":
            stop = self.run.stopped_at
            assert stop is not None
            assert (self.gate.phase, self.gate.step_in_progress) == (stop.phase, stop.step)
            self.stops.append((stop.phase, stop.step, stop.condition, stop.parameter))
            self.gate.resume()

    def train(self) -> list[Stop]:
        tracer = Tracer(self.recorder, self.gate, PROBES, ProbeOptions(budget=self.budget))
        with tracer:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
            for step in range(1, 21):
                self.before(step)
                inputs = torch.randn(16, 4)
                targets = inputs.sum(1, keepdim=True)
                if step == 10:
                    targets = targets * 50
                if step >= 15:
                    targets = targets * float("nan")
                optimizer.zero_grad()
                loss = (model(inputs) - targets).square().mean()
                self.losses[step] = loss.item()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                self.log.log({"half": step / 2})
            self.weights = [parameter.detach().clone() for parameter in model.parameters()]
        self.recorder.close()
        return self.stops

    def notices(self) -> list[str]:
        events = self.recorder.update_for(Poll()).events
        return [e.text for e in events if isinstance(e, Notice) and e.kind == "breakpoint"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("step == 5", [("step", 5, "")]),
        ("step == 5 at backward", [("backward", 5, "")]),
        ("loss > 20 * ema(loss)", [("step", 10, "")]),
        ("loss > 20 * ema(loss) at loss", [("loss", 10, "")]),
        ("nonfinite", [("step", 15, "")]),
        ("nonfinite at loss", [("loss", 15, "")]),
        ("nonfinite at backward", [("backward", 15, "")]),
        ("clip.scale < 0.01", [("step", 10, "")]),
        ("clip.scale < 0.01 at clip", [("clip", 10, "")]),
        ("grad_norm > 100", [("step", 10, "")]),
        ("grad_norm > 100 at backward", [("backward", 10, "")]),
        ('grad_norm("2.bias") > 30', [("step", 10, "2.bias")]),
        ('grad_norm("2") > 30 at backward', [("backward", 10, "2.weight")]),
        ('grad_norm("2.bias") > 30 at clip', [("clip", 10, "2.bias")]),
        ('log("half") == 6', [("step", 13, "")]),
        ('log("half") == 6 at data', [("data", 13, "")]),
        ('logged("half") == 6 at data', [("data", 13, "")]),
        ('validation("half") == 6', []),
        ("weight_norm(any) > 0 and step == 7", [("step", 7, "0.weight")]),
        ("update_ratio(any) >= 0 and step == 8", [("step", 8, "2.weight")]),
        ('finding("non-finite")', [("step", 15, "")]),
        ("cos_qk(any) > -2", []),
        ("loss < -1", []),
    ],
)
def test_the_run_stands_at_the_step_and_the_phase(
    tmp_path: Path, condition: str, expected: list[tuple[str, int, str]]
) -> None:
    stops = Run(tmp_path, condition).train()
    assert [(phase, step) for phase, step, _, _ in stops[: len(expected) or 1]] == [
        (phase, step) for phase, step, _ in expected
    ]
    for stop, (_, _, parameter) in zip(stops, expected, strict=False):
        if parameter:
            assert stop[3] == parameter


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("nonfinite", [6]),
        ("nonfinite and step > 2", [6]),
        ('finding("non-finite")', [6]),
        ('finding(level="error")', [6]),
        ("step == 6 or loss > 0", [1, 2, 3, 4, 5]),
    ],
)
def test_a_nan_loss_behind_a_grad_scaler_stops_in_the_iteration_that_it_skips(
    tmp_path: Path, condition: str, expected: list[int]
) -> None:
    run = Run(tmp_path, condition)
    gradients: list[tuple[str, bool]] = []
    stopped_in: list[int] = []
    changed = run.gate.hooks.changed

    def look() -> None:
        if run.gate.mode == "paused":
            held = bool(model[0].weight.grad is not None and model[0].weight.grad.isnan().any())
            gradients.append((run.gate.phase, held))
            stopped_in.append(iteration)
        changed()

    run.gate.hooks.changed = look
    with Tracer(run.recorder, run.gate, PROBES):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        for iteration in range(1, 19):
            optimizer.zero_grad()
            inputs = torch.randn(16, 4)
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            if iteration > 5:
                loss = loss * float("nan")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    run.recorder.close()
    assert [step for _, step, _, _ in run.stops] == expected
    if 6 in expected:
        assert set(gradients) == {("backward", True)}
        assert stopped_in[0] == 6
        skipped = "GradScaler skipped this iteration)"
        assert all("paused after backward at" in n and n.endswith(skipped) for n in run.notices())


def test_a_step_that_is_known_to_be_stopped_at_is_measured_in_full(tmp_path: Path) -> None:
    run = Run(tmp_path, "step == 13")
    assert [(phase, step) for phase, step, _, _ in run.train()] == [("step", 13)]
    table = run.recorder.history.table("weight_norm")
    assert table is not None
    found = (table.row_at(step) for step in range(1, 15))
    assert sorted({row[0] for row in found if row is not None}) == [1, 11, 13]


def test_hits_are_counted_ignored_and_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.breakpoints.add("step % 5 == 0", ignore=2)
    run.breakpoints.add("step > 17", once=True)
    run.breakpoints.add("step > 3", log_only=True)
    assert [stop[:2] for stop in run.train()] == [("step", 15), ("step", 18), ("step", 20)]
    listed = {each.number: each for each in run.breakpoints.list()}
    assert [each.hits for each in listed.values()] == [4, 1, 17]
    assert [each.enabled for each in listed.values()] == [True, False, True]
    assert run.notices() == [
        "breakpoint 3: step > 3, after step",
        "paused after step at breakpoint 1: step % 5 == 0",
        "paused after step at breakpoint 2: step > 17",
        "paused after step at breakpoint 1: step % 5 == 0",
    ]


def test_a_selector_that_matches_nothing_disables_its_breakpoint_with_a_notice(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, 'grad_norm("blocks.*") > 0', "step == 5")
    assert [stop[:2] for stop in run.train()] == [("step", 5)]
    (text,) = [each for each in run.notices() if "disabled" in each]
    assert 'no column of grad_norm matches "blocks.*"' in text
    assert run.breakpoints.list()[0].fault
    with pytest.raises(ExpressionError) as caught:
        run.breakpoints.add('step > 3 and grad_norm("2.weigth") > 0')
    assert "2.weight" in caught.value.hint
    assert caught.value.start == len("step > 3 and ")


def test_a_quantity_that_the_run_does_not_have_is_named_once(tmp_path: Path) -> None:
    run = Run(tmp_path, "cos_qk(any) > 0.5", 'validation("loss") > 3', "clip.scale < 0")
    assert run.train() == []
    assert run.notices() == [
        "breakpoint 1 waits: this run has measured no attention so far: cos_qk(any) > 0.5"
    ]
    assert all(each.enabled for each in run.breakpoints.list())


def test_a_fault_in_an_evaluation_disables_the_breakpoint_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, "loss > 1", "step == 5")

    def broken(*_: object) -> None:
        raise RuntimeError("no value")

    monkeypatch.setattr("tui_trainer.breakpoints.quantities._present", broken)
    assert [stop[:2] for stop in run.train()] == [("step", 5)]
    assert "breakpoint 1 is disabled: loss > 1: RuntimeError: no value" in run.notices()


def test_breakpoints_change_while_the_run_trains(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def change(step: int) -> None:
        if step == 3:
            run.breakpoints.add("step % 2 == 0")
            assert run.gate.break_phases == {"step"}
        elif step == 5:
            run.breakpoints.change(1, enabled=False)
            assert not run.gate.break_phases
            assert run.recorder.on_record is None
        elif step == 9:
            run.breakpoints.change(1, enabled=True, ignore=1)
        elif step == 13:
            run.breakpoints.delete(1)

    run.before = change
    assert [stop[:2] for stop in run.train()] == [("step", 4), ("step", 12)]
    with pytest.raises(BreakpointError):
        run.breakpoints.delete(1)


def test_weights_are_the_same_with_and_without(tmp_path: Path) -> None:
    plain = Run(tmp_path)
    plain.train()
    watched = Run(
        tmp_path,
        "loss > 20 * ema(loss) at loss",
        "max(grad_norm(any)) > 5 at backward",
        "clip.scale < 0.5 at clip",
        "update_ratio(any) > 0.001",
        "at zero_grad",
    )
    assert watched.train()
    assert all(
        torch.equal(torch.nan_to_num(a, 7.0), torch.nan_to_num(b, 7.0))
        for a, b in zip(plain.weights, watched.weights, strict=True)
    )


def test_they_are_saved_and_restored(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.run.save()
    assert list(tmp_path.iterdir()) == []
    run.breakpoints.add("loss > 5", once=True)
    run.breakpoints.add("nonfinite", ignore=3)
    run.breakpoints.change(2, enabled=False)
    run.run.save()
    saved = saved_breakpoints(tmp_path)
    assert saved == run.breakpoints.list()
    again = Run(tmp_path)
    again.breakpoints.restore((*saved, Breakpoint(9, "loss >")))
    assert again.breakpoints.list() == saved
    assert "breakpoint loss > was not set" in again.notices()[0]
    (tmp_path / "breakpoints.json").write_bytes(b"{")
    assert saved_breakpoints(tmp_path) == ()


def test_the_results_of_evaluations_stop_the_run_before_the_next_step(tmp_path: Path) -> None:
    run = Run(tmp_path, 'validation("loss") > 2', 'logged("loss") > 2')
    validation = ScalarLog(run.recorder, run.gate, schema.VALIDATION)
    run.before = lambda step: validation.log({"loss": float(step)}) if step in (2, 8) else None
    assert [stop[:2] for stop in run.train()] == [("data", 8)]


def test_ranks_are_compared_at_the_same_step(tmp_path: Path) -> None:
    """Rank 1 reports its steps two steps late, and another loss in step 9."""
    conditions = ("rank(1).loss != loss", "rank(any).grad_norm > 1e6")
    run = Run(tmp_path, *conditions, processes=2)

    def rank_one(step: int) -> None:
        late = step - 2
        if late in run.losses:
            row = np.full(len(schema.RANK_COLUMNS), absent(Absent.NOT_MEASURED), np.float32)
            row[schema.RANK_INDEX["loss"]] = run.losses[late] + (0.5 if late == 9 else 0)
            run.breakpoints.observe_rank(1, late, row)

    run.before = rank_one
    stops = run.train()
    assert [stop[:2] for stop in stops[:1]] == [("step", 11)], run.notices()
    (text, *_) = [each for each in run.notices() if "rank(1)" in each]
    assert "paused after step at breakpoint 1: rank(1).loss != loss" in text
    assert text.endswith("at step 9)")


def test_before_other_ranks_have_sent_steps_nothing_is_compared(tmp_path: Path) -> None:
    assert Run(tmp_path, "rank(1).loss != loss", processes=2).train() == []


@pytest.mark.parametrize(
    ("condition", "processes", "message", "hint"),
    [
        ("loss > 5 or rank(1).loss != loss", 1, "the run has one process", "leave out the rank"),
        ("loss > 5 or rank(any).loss > 5", 1, "the run has one process", "leave out the rank"),
        ("loss > 5 or rank(4).loss > 5", 4, "there is no rank 4", "the run has ranks 0 to 3"),
    ],
)
def test_a_rank_that_the_run_does_not_have_is_refused_at_its_place(
    tmp_path: Path, condition: str, processes: int, message: str, hint: str
) -> None:
    run = Run(tmp_path, condition, processes=processes)
    assert not run.breakpoints.list()
    assert f"{condition} was not set: {message} ({hint}" in run.notices()[0]
    with pytest.raises(ExpressionError, match=message) as refused:
        run.breakpoints.add(condition)
    marked = condition[refused.value.start : refused.value.end]
    assert marked in ("rank(1)", "rank(any)", "rank(4)")


def test_a_layer_that_is_not_there_is_answered_with_those_that_are() -> None:
    quantity = COLUMN_QUANTITIES["grad_norm"]
    names = ["embedding.weight", "blocks.0.weight", "blocks.1.weight"]
    error = nothing_matches(quantity, Selector(layer=7), names)
    assert (error.message, error.hint) == ("grad_norm has no layer=7", "its layers are 0, 1")
