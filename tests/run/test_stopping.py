"""Stopping: what is waited for, what is interrupted, and that a checkpoint asked for is written."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import processes
from tui_trainer.protocol.actions import Stop
from tui_trainer.run import signals as signalling
from tui_trainer.run.signals import GRACE_S, GRACE_STEPS, StopHandler
from tui_trainer.trace.gate import Gate, StopTraining

_spec = importlib.util.spec_from_file_location("hosting", Path(__file__).parent / "test_host.py")
hosting = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hosting)
place = hosting.place


# ---------------------------------------------------------------- what is interrupted, and when


class Timers:
    """Replaces `threading`: timers that expire when the test wants."""

    def __init__(self):
        self.set: list[tuple[float, object]] = []

    def Timer(self, seconds, function, arguments=()):
        timer = threading.Timer(seconds, function, arguments)
        timer.start = lambda: self.set.append((seconds, lambda: function(*arguments)))
        return timer

    def run_down(self):
        ((_, function),) = self.set
        self.set.clear()
        function()


class Stopped:
    def __init__(self, task, monkeypatch):
        self.gate = Gate()
        self.timers, self.interrupts, self.warnings = Timers(), [], []
        self.longest_step_s = 0.0
        self.stops = StopHandler(self.gate, lambda: self.longest_step_s, self.warnings.append)
        monkeypatch.setattr(signalling, "threading", self.timers)
        monkeypatch.setattr(signalling, "_send_to_main_thread", self.interrupts.append)
        monkeypatch.setattr(signalling.signal, "signal", lambda *_: None)
        self.stops.install(task, own_session=True)
        self.gate.reached("step", 1)
        self.gate.reached("forward", 2)  # in mid-step


@pytest.fixture
def script(monkeypatch):
    return Stopped(False, monkeypatch)


@pytest.fixture
def task(monkeypatch):
    return Stopped(True, monkeypatch)


def terminate(stops):
    stops._on_terminate(signal.SIGTERM, None)


@pytest.mark.parametrize("ask", [lambda s: s.stop(True), terminate])
def test_a_task_is_waited_for_however_long_it_takes(task, ask):
    ask(task.stops)
    assert task.timers.set == task.interrupts == []
    with pytest.raises(StopTraining) as stopped:
        task.gate.reached("step", 2)
    assert stopped.value.checkpoint


def test_a_task_asked_twice_is_broken_off(task):
    task.stops.stop(True)
    task.stops.stop(True)
    assert len(task.interrupts) == 1
    with pytest.raises(StopTraining) as stopped:
        terminate(task.stops)
    assert not stopped.value.checkpoint


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_script_that_makes_no_step_is_interrupted_with_a_warning(script, checkpoint):
    script.stops.stop(checkpoint)
    assert [seconds for seconds, _ in script.timers.set] == [GRACE_S]
    assert script.interrupts == []
    script.timers.run_down()
    assert len(script.interrupts) == 1
    (warning,) = script.warnings
    assert "20.0 s" in warning
    assert ("checkpoint" in warning) == checkpoint
    assert script.timers.set == []


def test_a_script_with_long_steps_is_waited_for_longer(script):
    script.longest_step_s = 100.0
    terminate(script.stops)
    script.timers.run_down()
    assert script.interrupts == []
    assert [seconds for seconds, _ in script.timers.set] == [GRACE_STEPS * 100.0 - GRACE_S]
    script.timers.run_down()
    assert len(script.interrupts) == 1
    assert "5 min 00 s" in script.warnings[0]


def test_a_script_that_is_at_the_gate_is_not_interrupted(script):
    script.gate.armed = True
    script.gate.after_step.append(lambda step: script.timers.run_down())
    script.stops.stop(True)
    with pytest.raises(StopTraining):
        script.gate.reached("step", 2)
    script.timers.run_down()  # set again, and idle: it has ended
    assert script.interrupts == script.warnings == script.timers.set == []


def test_a_script_is_not_interrupted_while_its_last_checkpoint_is_written(script):
    script.gate.hooks.save_checkpoint = lambda step: script.timers.run_down()
    script.stops.stop(True)
    with pytest.raises(StopTraining):
        script.gate.reached("step", 2)
    assert script.interrupts == []


def test_an_ended_run_is_not_interrupted(script):
    script.stops.stop(False)
    script.stops.training_ended()
    script.timers.run_down()
    assert script.interrupts == []


# ---------------------------------------------------------------- in real processes

IMPATIENT = """
import os, signal, time
from tui_trainer.run import signals, task_training
from tui_trainer.tasks import optimizers as schedules
signals.GRACE_S = 0.1

def slow(owner, name, at):
    original = getattr(owner, name)
    def method(self, given, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
        return original(self, given, step)
    setattr(owner, name, method)
"""
SLOW_EVALUATION = IMPATIENT + "slow(task_training.Evaluations, '_run', 10)\n"
SLOW_STEP = IMPATIENT + "slow(schedules.LearningRate, 'set', 9)\n"


def run_and_stop(place, before=""):
    process = processes.run(
        [sys.executable, "-c", before + hosting.IN_PROCESS, str(place.run), "json"],
        cwd=place.folder,
        env=hosting.ENVIRONMENT,
        capture_output=True,
        timeout=240,
    )
    return process.returncode, [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("slow", [SLOW_EVALUATION, SLOW_STEP], ids=["evaluation", "step"])
def test_no_checkpoint_of_a_task_is_lost_to_slow_work(place, slow):
    place.gpt(steps=100)
    status, lines = run_and_stop(place, slow)
    assert (status, lines[-1]["reason"], lines[-1]["steps"]) == (143, "stopped", 10)
    written = [one["text"] for one in hosting.of("event", lines) if one["kind"] == "checkpoint"]
    assert written[-1] == "checkpoint step-00000010"
    assert (place.run / "checkpoints" / "step-00000010").is_dir()


CATCHES = """
    import os, signal, torch
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        for step in range(1, 1000):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            optimizer.step()
    except KeyboardInterrupt:
        {then}
"""


@pytest.mark.parametrize("then", ["torch.save(model.state_dict(), 'own.pt')", "raise"])
def test_a_script_that_catches_the_stop_gets_its_checkpoint_as_well(place, then):
    place.script(CATCHES.format(then=then))
    status, lines = run_and_stop(place)
    assert (status, lines[-1]["reason"], lines[-1]["steps"]) == (143, "stopped", 7)
    written = [one["text"] for one in hosting.of("event", lines) if one["kind"] == "checkpoint"]
    assert written == ["checkpoint step-00000007"]
    assert (place.run / "checkpoints" / "step-00000007" / "weights.safetensors").is_file()
    assert (place.folder / "own.pt").exists() == (then != "raise")


def test_a_script_after_its_last_step_is_interrupted_with_an_event(place):
    place.loop(
        steps=5,
        after="import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(600)",
    )
    status, lines = run_and_stop(place, IMPATIENT)
    assert (status, lines[-1]["reason"], lines[-1]["steps"]) == (143, "stopped", 5)
    (event,) = [one for one in hosting.of("event", lines) if one["kind"] == "state"]
    assert "interrupted" in event["text"]


BACKGROUND = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
"""What a shell does to what it starts with `&`."""
OWN_SESSION = "import sys; from tui_trainer.run.__main__ import start; start(sys.argv[1:])"


@pytest.mark.parametrize(
    "command",
    [(hosting.IN_PROCESS, "plain"), (OWN_SESSION,)],
    ids=["lines", "own session"],
)
def test_a_script_started_in_the_background_can_be_stopped_after_its_last_step(place, command):
    place.loop(steps=5, after="import time; time.sleep(600)")
    code, *arguments = command
    process = processes.Popen(
        [sys.executable, "-c", BACKGROUND + code, str(place.run), *arguments],
        cwd=place.folder,
        env=hosting.ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    try:
        viewer = place.viewer()
        viewer.wait(lambda status: status.step == 5)
        assert viewer.do(Stop()).ok
        viewer.do(Stop())
        assert process.wait(240) == 0
    finally:
        process.kill()


def test_a_script_that_takes_sigterm_itself_is_not_killed_by_us(script, monkeypatch):
    monkeypatch.setattr(
        signalling.signal,
        "getsignal",
        lambda number: signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL,
    )
    script.stops.stop(False)
    script.stops.stop(False)
    assert script.interrupts == []
    assert "not interrupted" in script.warnings[-1]


def test_a_viewers_stop_with_a_checkpoint_reaches_a_script_that_catches_it(place):
    place.loop(steps=1_000_000)
    text = (place.folder / "train.py").read_text()
    head, loop = text.split("for step", 1)
    body = "for step" + loop
    caught = "".join(f"    {line}\n" for line in body.splitlines())
    (place.folder / "train.py").write_text(f"{head}try:\n{caught}except KeyboardInterrupt: pass\n")
    process = place.patient()
    viewer = place.viewer()
    viewer.wait(lambda status: status.step > 3)
    assert viewer.do(Stop(checkpoint=True)).ok
    step = viewer.wait(lambda status: status.ended).step
    assert process.wait(240) == 0
    assert (place.run / "checkpoints" / f"step-{step:08}").is_dir()
