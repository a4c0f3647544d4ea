"""The run process from outside: real training in real processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests import processes
from tui_trainer.config.run_spec import RunSpec, find_socket, read_state, write_spec
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.actions import Pause, Resume, Step, StepPhase, Stop
from tui_trainer.protocol.framing import ConnectionClosed, encode, read_to_viewer
from tui_trainer.protocol.messages import Command, Hello, Poll

_spec = importlib.util.spec_from_file_location("schema", Path(__file__).parent / "schema.py")
schema = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(schema)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
IN_PROCESS = """
import sys
from tui_trainer.config.run_spec import read_spec
from tui_trainer.run.host import main
from tui_trainer.cli.start import open_sink
sys.exit(main(read_spec(sys.argv[1]), open_sink(sys.argv[2])))
"""
PATIENT = """
import sys
from tui_trainer.run import __main__, host
host.FIRST_VIEWER_S = host.LINGER_S = 120.0  # on a busy machine a viewer takes its time
sys.exit(__main__.start(sys.argv[1:]))
"""
"""Waits longer for viewers to fetch its end."""
SMALL_GPT = {
    **{"preset": "light", "steps": 20, "threads": 1, "layers": 2, "width": 16, "heads": 2},
    **{"block_size": 16, "batch_size": 4, "warmup_steps": 5, "dropout": 0.1},
    **{"eval_every": 10, "eval_batches": 2, "sample_every": 10, "sample_length": 8},
}
LOOP = """
    import sys
    import torch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, {steps} + 1):
        optimizer.zero_grad()
        loss = model(torch.randn(32, 8)).square().mean()
        {inside}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    {after}
"""


class RunFolder:
    def __init__(self, folder):
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir()

    def spec(self, **changes):
        spec = RunSpec(
            **{
                "name": "r",
                "directory": str(self.run),
                "task": "gpt",
                "budget": 0.0,
                "working_directory": str(self.folder),
                **changes,
            }
        )
        write_spec(spec)
        return spec

    def gpt(self, resume=None, checkpoint_every=None, **changes):
        configuration = {**SMALL_GPT, **changes}
        return self.spec(
            configuration=configuration, resume=resume, checkpoint_every=checkpoint_every
        )

    def script(self, text, **changes):
        (self.folder / "train.py").write_text(textwrap.dedent(text))
        return self.spec(task="script", script="train.py", **changes)

    def loop(self, steps=20, inside="pass", after="pass", **changes):
        return self.script(LOOP.format(steps=steps, inside=inside, after=after), **changes)

    def start(self, kind="json", **options):
        return processes.Popen(
            [sys.executable, "-c", IN_PROCESS, str(self.run), kind],
            cwd=self.folder,
            env=ENVIRONMENT,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def do(self, kind="json"):
        process = self.start(kind)
        out, err = process.communicate(timeout=240)
        return process.returncode, out.decode(), err.decode()

    def lines(self):
        status, out, err = self.do()
        return status, [json.loads(line) for line in out.splitlines()], err

    def patient(self):
        """A run that does not leave before its viewer has seen the end."""
        return self.process(command=("-c", PATIENT))

    def process(self, command=("-m", "tui_trainer.run")):
        log = open(self.run / "boot.log", "wb")  # noqa: SIM115
        return processes.Popen(
            [sys.executable, "-P", *command, str(self.run)],
            cwd=self.folder,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def viewer(self):
        """Connects as soon as the run listens."""
        made = []

        def connected():
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                if path := find_socket(self.run):
                    made.append(Viewer(path))
            return made

        wait_for(connected)
        return made[0]


class Viewer:
    def __init__(self, path):
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.settimeout(240)
        self.stream.connect(str(path))
        self.ask(Hello(PROTOCOL_VERSION, "0", "test"))

    def ask(self, message):
        self.stream.sendall(encode(message))
        return read_to_viewer(self.stream.recv)

    def do(self, action):
        return self.ask(Command(0, action))

    @property
    def status(self):
        return self.ask(Poll()).status

    def wait(self, condition):
        """The first status that satisfies the condition; the run may be gone after its last one."""
        return wait_for(lambda: status if condition(status := self.status) else None)


def wait_for(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


def of(kind, objects):
    return [one for one in objects if one["type"] == kind]


@pytest.fixture
def place(tmp_path):
    return RunFolder(tmp_path)


# ---------------------------------------------------------------- off a terminal


def test_gpt_in_json(place):
    place.gpt()
    status, lines, err = place.lines()
    assert (status, err) == (0, "")
    assert lines[0]["type"] == "run"
    assert lines[-1] == {**lines[-1], "type": "end", "reason": "finished", "steps": 20}
    steps = of("step", lines)
    assert [one["step"] for one in steps] == list(range(1, 21))
    assert [fault for line in lines for fault in schema.faults(line)] == []
    names = {one["name"] for one in lines[0]["parameters"]}
    assert all(set(one["grad_norm"]) == names for one in steps)
    assert all(one["clip"]["max_norm"] == 1.0 for one in steps)
    assert [one["step"] for one in of("validation", lines)] == [0, 10, 20]
    assert of("sample", lines)
    assert read_state(place.run).state == "finished"
    assert find_socket(place.run) is None


def test_gpt_in_plain_lines(place):
    place.gpt()
    status, out, err = place.do("plain")
    assert (status, err) == (0, "")
    assert "gpt · light" in out
    assert "step 20/20" in out
    assert "validation: loss" in out
    assert out.splitlines()[-1].startswith("finished after 20 steps")


def test_the_same_seed_gives_the_same_run(place, tmp_path):
    place.gpt()
    _, first, _ = place.lines()
    _, second, _ = place.lines()
    for name in ("loss", "grad_norm", "clip"):
        assert [o[name] for o in of("step", first)] == [o[name] for o in of("step", second)]


def test_fourteen_and_ten_are_twenty_four(place, tmp_path):
    place.gpt(steps=24)
    _, whole, _ = place.lines()
    weights = place.run / "checkpoints" / "step-00000024" / "weights.safetensors"
    expected = weights.read_bytes()

    again = RunFolder(tmp_path / "again" if (tmp_path / "again").mkdir() is None else None)
    again.gpt(steps=24, checkpoint_every=14)
    process = again.start()
    for line in process.stdout:
        if json.loads(line).get("text") == "checkpoint step-00000014":
            process.kill()
            break
    process.communicate()
    # It may have come to its end before it was killed.
    shutil.rmtree(again.run / "checkpoints" / "step-00000024", ignore_errors=True)
    again.gpt(steps=24, resume=str(again.run / "checkpoints" / "step-00000014"))
    _, rest, _ = again.lines()
    assert [o["step"] for o in of("step", rest)] == list(range(15, 25))
    resumed = [o["loss"] for o in of("step", rest)]
    assert resumed == [o["loss"] for o in of("step", whole)][14:]
    found = again.run / "checkpoints" / "step-00000024" / "weights.safetensors"
    assert found.read_bytes() == expected


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"task": "gtp"}, "gpt"),
        ({"configuration": {**SMALL_GPT, "stepz": 3}}, "steps"),
        ({"configuration": {**SMALL_GPT, "data": "/no/such/file"}}, "/no/such/file"),
        ({"configuration": SMALL_GPT, "resume": "/no/such/run"}, "checkpoint"),
    ],
)
def test_impossible_requests_have_a_message(place, changes, word):
    place.spec(**changes)
    status, out, err = place.do()
    assert status == 2
    assert word in err
    assert "hint" in err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["reason"] == "crashed"


def test_out_of_memory_has_a_hint(place):
    place.script("import torch\ntorch.empty(2**60)")
    status, lines, err = place.lines()
    assert status == 1
    assert "out of memory" in lines[-1]["message"]
    assert "batch" in lines[-1]["hint"]
    assert "Traceback" in err


# ---------------------------------------------------------------- scripts


def test_a_script_in_json_keeps_stdout_pure(place):
    place.loop(inside="import os; print('text', flush=True); os.system('echo from a child')")
    status, lines, err = place.lines()  # every line of stdout is JSON
    assert status == 0
    assert err.count("text") == 20
    assert err.count("from a child") == 20
    assert len(of("step", lines)) == 20
    header = of("run", lines)[-1]
    assert header["device"]["kind"] == "cpu"
    assert [p["name"] for p in header["parameters"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(one["clip"]["clipped"] for one in of("step", lines))


def test_it_raises_at_step_7_and_nothing_measured_is_lost(place):
    place.loop(inside="assert step < 7, 'seven'")
    status, lines, err = place.lines()
    assert status == 1
    assert len(of("step", lines)) == 6
    end = lines[-1]
    assert (end["reason"], end["steps"]) == ("crashed", 6)
    assert end["message"] == "AssertionError: seven (train.py, line 10)"
    assert err.startswith("Traceback")
    assert "tui_trainer" not in err


def test_nan_is_null_with_its_word(place):
    place.loop(steps=4, inside="loss = loss * (float('nan') if step >= 3 else 1)")
    _, lines, _ = place.lines()
    third = of("step", lines)[2]
    assert third["loss"] is None
    assert third["nonfinite"]["loss"] == "nan"
    assert "what the loss is multiplied by" in lines[-1]["hint"]
    assert of("event", lines)[0]["kind"] == "nonfinite"


def test_a_closed_pipe_ends_the_lines_not_the_training(place):
    place.loop(steps=300, after="open('done', 'w').close()")
    process = place.start()
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(240) == 0
    assert (place.folder / "done").exists()
    assert err.count("the reader closed the output") == 1
    assert "Traceback" not in err


def test_fast_steps_are_all_written(place):
    place.loop(steps=400)
    status, lines, _ = place.lines()
    assert status == 0
    assert [one["step"] for one in of("step", lines)] == list(range(1, 401))


def test_data_loader_workers_and_the_exit_of_a_script(place):
    place.script(
        """
        import torch, sys
        from torch.utils.data import DataLoader, TensorDataset
        if __name__ == "__main__":
            data = TensorDataset(torch.randn(64, 4))
            model = torch.nn.Linear(4, 1)
            optimizer = torch.optim.Adam(model.parameters())
            for method, workers in (("fork", 2), ("spawn", 1)):  # a spawned one imports torch
                loader = DataLoader(data, 16, num_workers=workers, multiprocessing_context=method)
                for batch, in loader:
                    optimizer.zero_grad()
                    model(batch).mean().backward()
                    optimizer.step()
            sys.exit(3)
        """
    )
    status, lines, err = place.lines()
    assert (status, err) == (3, "")
    assert lines[-1]["steps"] == 8
    assert lines[-1]["message"] == "exited with status 3"


def test_terminate_finishes_the_step_and_leaves_a_checkpoint(place):
    place.gpt(steps=100_000, eval_every=100_000, sample_every=100_000)
    process = place.start()
    for line in process.stdout:
        if json.loads(line).get("step", 0) >= 5:
            process.send_signal(signal.SIGTERM)
            break
    rest = [json.loads(line) for line in process.stdout]
    assert process.wait(240) == 143
    end = rest[-1]
    assert (end["type"], end["reason"]) == ("end", "stopped")
    assert of("event", rest)[-1]["text"] == f"checkpoint step-{end['steps']:08}"


def test_interrupt_of_a_script_is_its_own(place):
    place.loop(
        inside="import os, signal; step == 5 and os.kill(os.getpid(), signal.SIGINT)",
    )
    status, lines, err = place.lines()
    assert status == 130
    assert "KeyboardInterrupt" in err
    assert (lines[-1]["reason"], lines[-1]["steps"]) == ("stopped", 4)


# ---------------------------------------------------------------- with viewers


def test_pause_step_and_phases_through_the_socket(place):
    place.gpt(steps=100_000, eval_every=100_000, sample_every=100_000)
    process = place.patient()
    viewer = place.viewer()
    viewer.wait(lambda status: status.step > 3)
    assert viewer.do(Pause()).ok
    viewer.wait(lambda status: status.state == "paused")
    assert viewer.do(Step()).ok
    viewer.wait(lambda status: status.state == "paused" and status.phase == "step")
    at = viewer.status.step
    for _ in range(3):
        viewer.do(Step())
    viewer.wait(lambda status: status.state == "paused" and status.step == at + 3)
    phases = []
    for _ in range(7):
        before = viewer.ask(Poll()).report
        viewer.do(StepPhase())
        viewer.wait(
            lambda status, old=before: (
                status.state == "paused"
                and (r := viewer.ask(Poll()).report) is not None
                and (r.step, r.phase) != (old.step, old.phase)
            )
        )
        phases.append(viewer.status.phase)
    assert phases == ["data", "zero_grad", "forward", "loss", "backward", "clip", "step"]
    assert viewer.do(Resume()).ok
    viewer.wait(lambda status: status.step > at + 10)
    assert viewer.do(Stop(checkpoint=True)).ok
    viewer.wait(lambda status: status.state == "stopped")
    assert process.wait(240) == 0
    with pytest.raises((ConnectionClosed, OSError)):
        viewer.ask(Poll())
    assert find_socket(place.run) is None
    state = read_state(place.run)
    assert state.state == "stopped"
    assert (place.run / "checkpoints" / f"step-{state.step:08}").is_dir()


HELD_UP = """
import os, sys, time
class Importing:
    def find_spec(self, name, path=None, target=None):
        while name == "torch" and not os.path.exists("go"):
            time.sleep(0.02)
sys.meta_path.insert(0, Importing())
"""


def test_viewers_are_served_before_torch_is_there(place):
    place.loop(steps=3)
    process = place.process(command=("-c", HELD_UP + PATIENT))
    viewer = place.viewer()
    viewer.wait(lambda status: status.waiting_for == "importing torch")
    (place.folder / "go").touch()
    viewer.wait(lambda status: status.ended)
    assert process.wait(240) == 0


def test_start_paused_stops_before_anything_happens(place):
    place.loop(start_paused=True)
    process = place.patient()
    viewer = place.viewer()
    viewer.wait(lambda status: status.state == "paused")
    assert viewer.status.step == 0
    viewer.do(Resume())
    viewer.wait(lambda status: status.ended)
    assert process.wait(240) == 0


def test_a_script_that_crashes_at_once_is_still_reported(place):
    place.script("print('before')\nraise RuntimeError('at once')")
    process = place.patient()
    viewer = place.viewer()
    updates = []
    wait_for(lambda: updates.append(viewer.ask(Poll())) or updates[-1].status.ended)
    update = updates[-1]  # the run is gone once it has sent its end
    text = [line.text for line in update.log]
    assert update.status.reason == "RuntimeError: at once (train.py, line 2)"
    assert text[0] == "before"
    assert text[-1] == "RuntimeError: at once"
    assert process.wait(240) == 1


def test_stop_before_the_first_step(place):
    place.script("import time\ntime.sleep(600)")
    process = place.process()
    viewer = place.viewer()
    viewer.wait(lambda status: status.waiting_for == "the script's first step")
    assert viewer.do(Stop()).ok
    assert process.wait(240) == 0
    assert read_state(place.run).state == "stopped"


def test_the_run_ignores_a_hang_up_and_terminates_cleanly(place):
    place.gpt(steps=100_000, eval_every=100_000, sample_every=100_000)
    process = place.patient()
    viewer = place.viewer()
    viewer.wait(lambda status: status.step > 3)
    viewer.stream.close()
    process.send_signal(signal.SIGHUP)
    other = place.viewer()
    at = other.status.step
    other.wait(lambda status: status.step > at + 3)
    process.send_signal(signal.SIGTERM)
    other.wait(lambda status: status.ended)
    assert process.wait(240) == 143
