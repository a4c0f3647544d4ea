"""`tui_trainer.watch`: loops that were not started by `tui-trainer run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import tui_trainer
from tests import processes
from tests.cli.calling import call
from tests.runs.starting import until
from tui_trainer.config.run_spec import read_state
from tui_trainer.protocol.formatting import number
from tui_trainer.run.watch import WatchError


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def _runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TUI_TRAINER_RUNS_DIR", str(tmp_path / "runs"))


def state_of(run):
    return read_state(run.directory)


def test_a_loop_is_recorded_and_torch_is_restored():
    def replaced():
        loss = torch.nn.functional.cross_entropy
        return (
            torch.Tensor.backward,
            torch.optim.Optimizer.zero_grad,
            torch.nn.Linear.__call__,
            loss,
        )

    before = replaced()
    model, optimizer = make()
    with tui_trainer.watch(model, optimizer, name="r") as run:
        losses = train(model, optimizer, 12)
        assert run.step == 12
        assert run.loss == pytest.approx(losses[-1])
        tui_trainer.log(accuracy=0.5)
    assert replaced() == before
    ended = state_of(run)
    assert (ended.name, ended.state, ended.step) == ("r", "finished", 12)
    assert train(model, optimizer, 2)
    assert state_of(run).step == 12


def test_its_findings_and_its_end_are_reported(tmp_path):
    out = tmp_path / "out"
    model, optimizer = make()
    target = f"cat >> {out}; echo >> {out}"
    with tui_trainer.watch(model, optimizer, name="r", alert=target):
        for _ in range(6):  # without zero_grad
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()

    def sent():
        lines = out.read_text().splitlines() if out.exists() else []
        return {json.loads(line)["kind"]: json.loads(line) for line in lines if line}

    until(lambda: sent().keys() == {"finding", "end"}, "both alerts")
    assert sent()["finding"]["finding"]["rule"] == "gradients-kept"
    assert (sent()["end"]["state"], sent()["end"]["step"]) == ("finished", 6)
    with pytest.raises(ValueError, match="neither a command nor"):
        tui_trainer.watch(model, optimizer, alert=["true", "ftp://example.org/x"])


def test_the_weights_are_the_same_to_the_last_bit():
    model, optimizer = make()
    train(model, optimizer, 20)
    watched, its_optimizer = make()
    with tui_trainer.watch(watched, its_optimizer):
        train(watched, its_optimizer, 20)
    for a, b in zip(model.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loop_that_has_made_steps_is_watched_from_there_on():
    model, optimizer = make()
    train(model, optimizer, 5)
    optimizer.zero_grad()
    with tui_trainer.watch(model, optimizer) as run:
        train(model, optimizer, 3)
        assert run.step == 3


def test_within_an_iteration_it_is_refused():
    model, optimizer = make()
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(WatchError, match=r"within an iteration[^$]*hint: .*zero_grad"):
        tui_trainer.watch(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    tui_trainer.watch(model, optimizer).close()


def test_a_second_one_is_refused_until_the_first_is_closed():
    model, optimizer = make()
    run = tui_trainer.watch(model, optimizer, name="first")
    try:
        with pytest.raises(WatchError, match=r"already watched, as first[^$]*hint: .*run.close"):
            tui_trainer.watch(model, optimizer)
    finally:
        run.close()
    run.close()
    tui_trainer.watch(model, optimizer).close()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda m, o: (o, m), TypeError, "the model is of type Adam"),
        (lambda m, o: (m, [3]), TypeError, "the optimizer is of type int"),
        (lambda m, o: (m, []), ValueError, "no optimizer"),
        (lambda m, o: (torch.nn.Linear(1, 1), o), ValueError, "none of the model's"),
    ],
)
def test_what_is_no_model_with_its_optimizer(arguments, error, words):
    with pytest.raises(error, match=words):
        tui_trainer.watch(*arguments(*make()))


def test_a_name_that_cannot_be():
    model, optimizer = make()
    tui_trainer.watch(model, optimizer, name="a").close()
    with pytest.raises(WatchError, match="already exists"):
        tui_trainer.watch(model, optimizer, name="a")
    with pytest.raises(WatchError, match="is not a valid name"):
        tui_trainer.watch(model, optimizer, name="../a")


def test_an_exception_ends_the_run_as_crashed():
    model, optimizer = make()
    run = tui_trainer.watch(model, optimizer)
    with pytest.raises(ZeroDivisionError), run:
        train(model, optimizer, 1 // 0)
    assert state_of(run).state == "crashed"
    assert "ZeroDivisionError" in state_of(run).reason


def test_a_trainer_that_raised_is_followed_by_a_new_run(monkeypatch):
    from tui_trainer.integrations import huggingface

    monkeypatch.setattr(huggingface, "TrainerCallback", type("TrainerCallback", (), {}))
    model, optimizer = make()
    runs = []

    def train_with(callback, steps, fails=False):
        callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
        runs.append(callback.run)
        train(model, optimizer, steps)
        optimizer.zero_grad()
        if not fails:
            callback.on_train_end(None, None, None)

    callback = huggingface.TuiTrainerCallback(name="r")
    train_with(callback, 2, fails=True)
    train_with(callback, 3, fails=True)
    train_with(huggingface.TuiTrainerCallback(name="new"), 4)  # the cell is executed again
    states = [state_of(run) for run in runs]
    assert [(each.name, each.state, each.step) for each in states] == [
        ("r", "stopped", 2),
        ("r-2", "stopped", 3),
        ("new", "finished", 4),
    ]


def test_its_pictures():
    model, optimizer = make()
    with tui_trainer.watch(model, optimizer, name="<b>"[1]) as run:
        html = run._repr_html_()
        assert "waiting" not in html
        assert "<svg" not in html
        loss = train(model, optimizer, 30)[-1]
        html = run._repr_html_()
        assert "<svg" in html
        assert f"<td>{number(loss, 0)}</td>" in html
        assert "tui-trainer attach b" in html
        assert "step 30" in repr(run)
        console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(run)
        assert number(loss, 0) in console.export_text()
    assert "tui-trainer replay b" in run._repr_html_()


class FakeShell:
    """As IPython's in a notebook."""


FakeShell.__name__ = "ZMQInteractiveShell"


def test_a_picture_in_a_notebook_follows_the_run(monkeypatch):
    from types import ModuleType

    drawn = []

    class Handle:
        def update(self, picture):
            drawn.append(picture)

    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = FakeShell
    display.HTML = str
    display.display = lambda picture, display_id: drawn.append(picture) or Handle()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    model, optimizer = make()
    with tui_trainer.watch(model, optimizer) as run:
        run._ipython_display_()
        train(model, optimizer, 3)
        until(lambda: any(">3<" in picture for picture in drawn), "the third step in the picture")
    assert "finished" in drawn[-1]
    count, run._next_update = len(drawn), 0.0
    run._update_displays()  # as the recorder's thread may still be about to
    assert len(drawn) == count


LOOP = """
import sys, torch, tui_trainer
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
run = tui_trainer.watch(model, optimizer, name="r")
step = 0
while True:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    step += 1
    if sys.argv[1:] == ["crash"] and step == 5:
        raise RuntimeError("planted")
    if sys.argv[1:] == ["end"] and step == 5:
        break
"""


@pytest.fixture
def loop(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []

    def start(*arguments):
        command = [sys.executable, "loop.py", *arguments]
        process = processes.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_terminal_lists_pauses_steps_and_stops_it(tmp_path, loop):
    process = loop()
    until(lambda: (s := read_state(tmp_path / "runs" / "r")) and s.step > 3, "some steps")
    listed = json.loads(call("ls", "--json", cwd=tmp_path).stdout)
    assert [(run["name"], run["state"], run["title"]) for run in listed] == [
        ("r", "live", "loop.py")
    ]
    assert call("pause", "r", cwd=tmp_path).returncode == 0
    paused = until(
        lambda: (
            (s := json.loads(call("show", "r", "--json", cwd=tmp_path).stdout))["state"] == "paused"
            and s
        ),
        "the pause",
    )
    assert call("step", "r", "2", cwd=tmp_path).returncode == 0
    stepped = json.loads(call("show", "r", "--json", cwd=tmp_path).stdout)
    assert paused["step"] + 1 <= stepped["step"] <= paused["step"] + 2
    assert call("stop", "r", cwd=tmp_path).returncode == 0
    _, printed = process.communicate(timeout=240)
    assert "stopped on request" in printed
    assert "Traceback" not in printed
    assert read_state(tmp_path / "runs" / "r").state == "stopped"


@pytest.mark.parametrize(("how", "state"), [("end", "finished"), ("crash", "crashed")])
def test_it_ends_with_the_process(tmp_path, loop, how, state):
    process = loop(how)
    _, printed = process.communicate(timeout=240)
    ended = read_state(tmp_path / "runs" / "r")
    assert (ended.state, ended.step) == (state, 5)
    assert ("planted" in printed) == (how == "crash")


def test_under_the_command_it_is_the_run_that_is_recorded(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    done = call("run", "--json", "--name", "outer", "loop.py", "end", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines if line["type"] == "step"] == [1, 2, 3, 4, 5]
    assert any("already being recorded" in line.get("text", "") for line in lines)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["outer"]
