"""`tui_trainer.log`: the user's own scalars."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import tui_trainer
from tests import processes
from tests.cli.calling import call
from tests.run.schema import faults
from tui_trainer.history.columns import logged_series
from tui_trainer.protocol.absent import Absent, why_absent
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.run import scalars
from tui_trainer.run.scalars import ScalarLog, activated
from tui_trainer.trace.gate import Gate


@pytest.fixture
def recorder():
    made = Recorder(RunInfo("r", "script"))
    yield made
    made.close()


def values_of(recorder):
    recorder.flush()
    return {each.name: each.newest() for each in logged_series(recorder.history)}


def texts_of(recorder):
    recorder.flush()
    return [event.text for event in recorder.update_for(poll()).events]


def poll():
    from tui_trainer.protocol.messages import Poll

    return Poll()


@pytest.mark.parametrize(
    "value",
    [2, 2.0, True + 1, np.float64(2), np.array([2.0]), torch.tensor(2.0), torch.tensor([[2]])],
)
def test_what_is_one_number(recorder, value):
    with activated(recorder, Gate()):
        tui_trainer.log(x=value)
    assert values_of(recorder) == {"x": (0, 2.0)}


def test_a_value_that_needs_grad_keeps_no_graph(recorder):
    loss = torch.ones((), requires_grad=True) * 3
    with activated(recorder, Gate()):
        tui_trainer.log({"val/loss": loss}, other=loss.detach().double())
    assert values_of(recorder) == {"val/loss": (0, 3.0), "other": (0, 3.0)}


def test_what_is_no_number_is_reported_once_and_raises_nothing(recorder):
    with activated(recorder, Gate()):
        for _ in range(3):
            tui_trainer.log(text="abc", nothing=None, vector=torch.ones(3), fine=1)
    assert values_of(recorder) == {"fine": (0, 1.0)}
    assert texts_of(recorder) == [
        "tui_trainer.log: text is not a number: str",
        "tui_trainer.log: nothing is not a number: NoneType",
        "tui_trainer.log: vector has 3 elements: log its mean, for example",
    ]


def test_nan_and_infinity_are_measured_values_and_what_float32_cannot_hold_is_absent(recorder):
    with activated(recorder, Gate()):
        tui_trainer.log(a=math.nan, b=-math.inf, c=1e60, d=10**400)
    values = values_of(recorder)
    assert math.isnan(values["a"][1])
    assert why_absent(values["a"][1]) is None
    assert values["b"][1] == -math.inf
    assert why_absent(values["c"][1]) is Absent.OUT_OF_RANGE
    assert why_absent(values["d"][1]) is Absent.OUT_OF_RANGE


def test_names_that_are_logged_together_and_one_by_one_have_one_series_each(recorder):
    gate = Gate()
    with activated(recorder, gate):
        tui_trainer.log(a=1, b=2)
        gate.completed = 7
        tui_trainer.log(b=3)
        tui_trainer.log(a=4, c=5)
    recorder.flush()
    assert [each.name for each in logged_series(recorder.history)] == ["a", "b", "c"]
    assert values_of(recorder) == {"a": (7, 4.0), "b": (7, 3.0), "c": (7, 5.0)}


def test_the_step_is_the_one_in_progress_within_an_iteration(recorder):
    gate = Gate()
    log = ScalarLog(recorder, gate)
    assert log.current_step == 0
    gate.reached("data", 1)
    assert log.current_step == 1
    gate.reached("backward", 1)
    assert log.current_step == 1
    gate.reached("step", 1)
    assert log.current_step == 1
    gate.reached("forward", 2)
    assert log.current_step == 2


@pytest.mark.slow
def test_names_without_end_are_refused(recorder, monkeypatch):
    most = 50
    monkeypatch.setattr(scalars, "MAX_NAMES", most)
    with activated(recorder, Gate()):
        for number in range(most + 5):
            tui_trainer.log({f"step {number}": 1})
    assert len(values_of(recorder)) == most
    assert any("at most" in text for text in texts_of(recorder))


def test_outside_of_a_run_nothing_is_done_and_nothing_imported():
    code = (
        "import sys, tui_trainer\n"
        "before = set(sys.modules)\n"
        "tui_trainer.log(loss=1.0, text='abc')\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'torch', 'numpy', 'msgspec'}, new\n"
        "assert not {'torch', 'numpy', 'textual'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_an_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'lok'"):
        tui_trainer.lok  # noqa: B018
    assert "log" in dir(tui_trainer)


LOGGED_LINE = {"$ref": "#/$defs/logged"}

SCRIPT = """
import torch, tui_trainer
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i in range(6):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).square().mean()
    tui_trainer.log(twice=2 * loss)
    loss.backward()
    optimizer.step()
    tui_trainer.log({"val/accuracy": i / 8})
    if i == 3:
        tui_trainer.log(odd=float("nan"))
print("weights", model.weight.sum().item())
"""


@pytest.mark.slow
def test_a_script_logs_and_every_output_has_the_values(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = call("run", "--json", "--name", "r", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["type"] == "step"}
    logged = [line for line in lines if line["type"] == "logged"]
    assert [fault for line in logged for fault in faults(line, LOGGED_LINE)] == []
    twice = {line["step"]: line["values"]["twice"] for line in logged if "twice" in line["values"]}
    assert twice == pytest.approx({step: 2 * loss for step, loss in losses.items()})
    accuracy = {
        e["step"]: e["values"].get("val/accuracy") for e in logged if "twice" not in e["values"]
    }
    assert accuracy[6] == 0.625
    odd = next(line for line in logged if "odd" in line["values"])
    assert (odd["step"], odd["values"], odd["nonfinite"]) == (
        4,
        {"odd": None},
        {"values.odd": "nan"},
    )

    shown = json.loads(call("show", "r", "--json", cwd=tmp_path).stdout)["logged"]
    assert shown["val/accuracy"] == {"step": 6, "value": 0.625, "text": None}
    assert shown["odd"] == {"step": 4, "value": None, "text": "nan"}
    assert call("export", "r", "--format", "jsonl", cwd=tmp_path).stdout == done.stdout
    call("export", "r", "--format", "csv", "--output", "csv", cwd=tmp_path)
    header, *rows = (tmp_path / "csv" / "steps.csv").read_text().splitlines()
    place = header.split(",").index("logged.val/accuracy")
    assert [row.split(",")[place] for row in rows][-1] == "0.625"
    shutil.copytree(tmp_path / "runs" / "r", tmp_path / "runs" / "s")
    compared = call("compare", "r", "s", cwd=tmp_path)
    assert "val/accuracy (logged), last" in compared.stdout, compared.stderr

    plain = processes.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert plain.stdout.splitlines()[-1] in done.stderr  # the same weights, without us
