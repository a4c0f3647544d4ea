"""Commands to real runs: each is answered, and its answer is true."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tui_trainer.cli.commands import control
from tui_trainer.cli.errors import CommandError
from tui_trainer.config.run_spec import RunState
from tui_trainer.protocol.actions import Checkpoint, Pause, Step, StepPhase, Throttle
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.messages import Poll, Status
from tui_trainer.runs.liveness import RunEntry

_spec = importlib.util.spec_from_file_location("hosting", Path(__file__).parent / "test_host.py")
hosting = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hosting)
place = hosting.place
ENDLESS = {"steps": 1_000_000, "eval_every": 1_000_000, "sample_every": 1_000_000}


def begin(place, name, *arguments):
    place.run.chmod(0o700)
    return processes.Popen(
        [sys.executable, "-m", "tui_trainer", name, str(place.run), *arguments],
        env=hosting.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        torch=False,
    )


def call(place, *arguments):
    process = begin(place, *arguments)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def notices(viewer, kind):
    events = viewer.ask(Poll()).events
    return [event.text for event in events if isinstance(event, Notice) and event.kind == kind]


@pytest.fixture
def begun(place):
    """A GPT that trains slowly in its own process, and a viewer that holds control."""
    place.gpt(**ENDLESS)
    process = place.process()
    viewer = place.viewer()
    viewer.do(Throttle(20))
    viewer.wait(lambda status: status.step > 3)
    yield place, viewer
    process.kill()
    process.wait()


def pause(viewer, phase=None):
    """Pause it, at the end of `phase` where one is named."""
    viewer.do(Pause())
    viewer.wait(lambda status: status.state == "paused")
    while phase is not None and viewer.status.phase != phase:
        before = viewer.ask(Poll()).report
        viewer.do(StepPhase())
        viewer.wait(
            lambda status, old=(before.step, before.phase): (
                status.state == "paused"
                and (now := viewer.ask(Poll()).report) is not None
                and (now.step, now.phase) != old
            )
        )


def written(place):
    return sorted(path.name for path in (place.run / "checkpoints").glob("step-*"))


# ---------------------------------------------------------------- checkpoint


def test_a_checkpoint_is_refused_within_a_step_and_written_once_between_steps(begun):
    place, viewer = begun
    for phase in ("data", "backward"):
        pause(viewer, phase)
        ack = viewer.do(Checkpoint())
        assert not ack.ok
        assert f"paused after {phase} of step {viewer.status.step + 1:,}" in ack.message
        assert "finish the step" in ack.hint
        done = call(place, "checkpoint")
        assert done.returncode == 1
        assert f"paused after {phase} of step" in done.stderr
        assert "tui-trainer step" in done.stderr
        assert written(place) == []
    pause(viewer, "step")
    step = viewer.status.step
    path = place.run / "checkpoints" / f"step-{step:08}"
    for _ in range(2):
        done = call(place, "checkpoint")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(path)
        assert (path / "weights.safetensors").is_file()
    messages = notices(viewer, "checkpoint")
    assert [text for text in messages if text.startswith("checkpoint step-")] == [
        f"checkpoint {path.name}",
        f"checkpoint {path.name} exists already",
    ]


def test_a_checkpoint_that_a_pause_overtakes_is_not_waited_for():
    status = Status(state="paused", phase="backward", step=12)
    assert control._written(status, [])
    run = RunEntry("gpt-one", Path("/none"), "live", RunState(name="gpt-one"), "")
    with pytest.raises(CommandError, match="paused after backward") as failed:
        control._written_checkpoint(Checkpoint(), run, status, [])
    assert "once the step is complete" in failed.value.hint
    assert not control._written(Status(state="paused", phase="step", step=12), [])


def test_a_run_paused_before_its_first_step_has_no_checkpoint(place):
    place.spec(configuration={**hosting.SMALL_GPT, **ENDLESS}, start_paused=True)
    process = place.process()
    viewer = place.viewer()
    viewer.wait(lambda status: status.state == "paused")
    done = call(place, "checkpoint")
    assert done.returncode == 1
    assert "paused after data of step 1" in done.stderr
    viewer.do(Step())
    viewer.wait(lambda status: status.state == "paused" and status.step == 1)
    viewer.stream.close()
    done = call(place, "checkpoint")
    assert done.returncode == 0, done.stderr
    assert written(place) == ["step-00000001"]
    process.kill()
    process.wait()


def test_a_checkpoint_of_a_run_that_ends_first_is_no_success(place):
    place.loop(
        steps=5, after="import os, time\n    while not os.path.exists('go'): time.sleep(.02)"
    )
    process = place.process()
    viewer = place.viewer()
    viewer.wait(lambda status: status.step == 5)
    viewer.stream.close()
    asking = begin(place, "checkpoint")
    viewer = place.viewer()
    hosting.wait_for(lambda: "checkpoint" in notices(viewer, "command"))
    (place.folder / "go").touch()
    _, messages = asking.communicate(timeout=240)
    assert asking.returncode == 1
    assert "no checkpoint was written" in messages
    assert process.wait(240) == 0


# ---------------------------------------------------------------- stop --checkpoint


def test_a_checkpoint_that_cannot_be_written_is_a_failure(begun):
    place, _ = begun
    (place.run / "checkpoints").write_text("a file is in its place")
    for command in (("checkpoint",), ("stop", "--checkpoint")):
        done = call(place, *command)
        assert done.returncode == 1
        assert "no checkpoint of step" in done.stderr


def test_stop_with_a_checkpoint_prints_its_path(begun):
    place, _ = begun
    done = call(place, "stop", "--checkpoint")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.splitlines()[-1]) / "weights.safetensors").is_file()


# ---------------------------------------------------------------- step


@pytest.mark.parametrize("count", ["9" * 5000, "1000000000001", "0"])
def test_more_steps_than_a_run_takes_are_a_wrong_use(place, count):
    place.gpt()
    done = call(place, "step", count)
    assert done.returncode == 2
    assert "from 1 to 1,000,000,000,000" in done.stderr
