"""Bad data and failing scripts without a terminal: one error on stderr, the right exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.cli.calling import COMMAND, assert_refused, call
from tests.runs.starting import until
from tui_trainer.config.run_spec import read_state

SHORT = ["--steps", "3", "--device", "cpu", "--threads", "1", "--eval-batches", "1"]
SHORT_GPT = [*SHORT, "--sample-length", "8"]

LOOP = """
import sys, torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1, {steps} + 1):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).pow(2).mean(){spoil}
    loss.backward()
    optimizer.step()
    {then}
{last}
"""

GAN = """
import torch
first, second = torch.nn.Linear(4, 1), torch.nn.Linear(4, 4)
slow = torch.optim.RMSprop(first.parameters())
fast = torch.optim.Adam(second.parameters())
for step in range(3):
    made = second(torch.ones(2, 4))
    for optimizer, loss in (
        (slow, lambda: first(made.detach()).mean()), (fast, lambda: first(made).square().mean())
    ):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
"""


def script(to: Path, steps: int = 10, then: str = "pass", last: str = "", spoil: str = "") -> Path:
    path = to / "train.py"
    path.write_text(LOOP.format(steps=steps, then=then, last=textwrap.dedent(last), spoil=spoil))
    return path


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ---------------------------------------------------------------- data and settings


def test_missing_data(tmp_path: Path) -> None:
    done = call("gpt", "--data", "nowhere.txt", *SHORT_GPT, cwd=tmp_path)
    assert_refused(done, "nowhere.txt")


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert_refused(call("gpt", "--data", "empty.txt", *SHORT_GPT, cwd=tmp_path), "empty")


def test_a_corpus_shorter_than_a_block(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("to be or not")
    assert_refused(call("gpt", "--data", "short.txt", *SHORT_GPT, cwd=tmp_path), "block")


def test_a_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert_refused(call("vit", "--data", "images", *SHORT, cwd=tmp_path), "images")


def test_a_single_class(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    assert_refused(call("vit", "--data", "images", *SHORT, cwd=tmp_path), "class")


def test_only_unreadable_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        (folder / "broken.png").write_bytes(b"no image")
    assert_refused(call("vit", "--data", "images", *SHORT, cwd=tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_missing_device(device: str, tmp_path: Path) -> None:
    done = call("gpt", "--steps", "3", "--device", device, cwd=tmp_path)
    assert_refused(done, device)


def test_torch_compile_without_a_compiler(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path)}
    done = call("gpt", "--compile", *SHORT_GPT, cwd=tmp_path, env=env)
    assert_refused(done, "C++ compiler", "--no-compile", status=2)


def test_a_model_too_large_for_memory(tmp_path: Path) -> None:
    done = call("gpt", "--width", "131072", "--layers", "100", *SHORT_GPT, cwd=tmp_path)
    assert_refused(done, "out of memory: 64.0 GB could not be allocated", "--batch-size", status=1)


def test_a_task_whose_loss_ends_as_nan_has_failed(tmp_path: Path) -> None:
    explosive = ["--learning-rate", "1e9", "--warmup-steps", "0", "--clip", "off"]
    explosive += ["--schedule", "constant", "--optimizer", "sgd", "--sample-every", "0"]
    done = call("gpt", "--json", *explosive, *SHORT_GPT, cwd=tmp_path)
    assert_refused(done, "the loss is nan", "divide the learning rate by 10", status=1)
    lines = records(done.stdout)
    assert (lines[-1]["reason"], lines[-1]["steps"]) == ("finished", 3)
    assert [each["step"] for each in lines if each["type"] == "step"] == [1, 2, 3]
    assert any(each["type"] == "event" and each["kind"] == "nonfinite" for each in lines)


# ---------------------------------------------------------------- scripts


def test_a_syntax_error(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("for step in range(3)\n    pass\n")
    done = call("run", "bad.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "bad.py" in done.stderr
    assert "line 1" in done.stderr
    assert "tui_trainer" not in done.stderr


def test_an_exception_at_step_7(tmp_path: Path) -> None:
    path = script(tmp_path, then="if step == 7: raise ValueError('the seventh')")
    done = call("run", "--json", path, cwd=tmp_path)
    assert done.returncode == 1
    lines = records(done.stdout)
    assert [each["step"] for each in lines if each["type"] == "step"] == [*range(1, 8)]
    assert lines[-1]["type"] == "end"
    assert lines[-1]["steps"] == 7
    assert "the seventh" in done.stderr
    assert "/tui_trainer/" not in done.stderr, "our frames are in its traceback"


@pytest.mark.parametrize(
    ("allocate", "message"),
    [("torch.empty(10**15)", "out of memory: 3.6 PB"), ("bytearray(10**18)", "out of memory")],
)
def test_out_of_memory(allocate: str, message: str, tmp_path: Path) -> None:
    path = script(tmp_path, then=f"if step == 7: {allocate}")
    done = call("run", "--json", path, cwd=tmp_path)
    assert done.returncode == 1
    lines = records(done.stdout)
    assert lines[-1]["reason"] == "crashed"
    assert message in lines[-1]["message"]
    assert "train.py, line 10" in lines[-1]["message"]
    assert "smaller batch" in lines[-1]["hint"]
    assert "--batch-size" not in lines[-1]["hint"], "the script does not have our options"
    assert [each["step"] for each in lines if each["type"] == "step"] == [*range(1, 8)]
    assert allocate in done.stderr, "the script's own traceback is missing"


def test_plain_lines_come_between_whole_lines_of_the_script(tmp_path: Path) -> None:
    """Python writes the text and its newline separately when it does not buffer."""
    then = "import time; time.sleep(0.01); print('x' * 20)"
    path = script(tmp_path, steps=250, then=then)
    done = call("run", "--plain", path, cwd=tmp_path, env={"PYTHONUNBUFFERED": "1"})
    lines = done.stdout.splitlines()
    assert sum(line == "x" * 20 for line in lines) == 250
    assert sum(line.startswith("step ") for line in lines) >= 3


def test_several_optimizers_are_each_named(tmp_path: Path) -> None:
    (tmp_path / "gan.py").write_text(GAN)
    done = call("run", "--json", "gan.py", cwd=tmp_path)
    steps = [each for each in records(done.stdout) if each["type"] == "step"]
    assert [each["optimizer"] for each in steps] == ["slow", "fast"] * 3
    assert all("clip" not in each["phase_ms"] for each in steps), "it never clips"
    seen = {"forward", "loss", "backward", "step"}
    assert all(seen <= each["phase_ms"].keys() for each in steps)


@pytest.mark.parametrize(
    ("leave", "status"),
    [
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('no more')", 1),
        ("raise SystemExit(42)", 42),
    ],
)
def test_leaving_early(leave: str, status: int, tmp_path: Path) -> None:
    done = call("run", "--json", script(tmp_path, then=f"if step == 4: {leave}"), cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert records(done.stdout)[-1]["steps"] == 4


def test_a_megabyte_of_output_keeps_out_of_the_json(tmp_path: Path) -> None:
    path = script(tmp_path, then="sys.stdout.write('x' * 99 + '\\n'); print('y' * 100_000)")
    done = call("run", "--json", path, cwd=tmp_path)
    assert done.returncode == 0
    lines = records(done.stdout)
    assert (lines[0]["type"], lines[-1]["type"], lines[-1]["steps"]) == ("run", "end", 10)
    assert done.stderr.count("y") >= 1_000_000


def test_the_script_sees_what_python_would_give_it(tmp_path: Path) -> None:
    last = """
        import os
        print(sys.argv, os.getcwd(), __name__, file=sys.stderr)
        """
    path = script(tmp_path, steps=1, last=last)
    done = call("run", "--plain", path, "--json", "a b", cwd=tmp_path)
    assert done.returncode == 0
    assert f"{[str(path), '--json', 'a b']} {tmp_path} __main__" in done.stderr


def test_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    path = script(tmp_path, spoil=" * (float('nan') if step == 5 else 1)")
    done = call("run", "--json", path, cwd=tmp_path)
    assert done.returncode == 0
    losses = [each["loss"] for each in records(done.stdout) if each["type"] == "step"]
    assert losses[4] in (None, "nan", "NaN")
    assert isinstance(losses[3], float)


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    command = [*COMMAND, "gpt", "--json", "--runs-dir", str(tmp_path), *SHORT_GPT]
    with processes.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(b"\n")
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(timeout=240)
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_run_without_a_screen_ends_in_order(number: int, status: int, tmp_path: Path) -> None:
    command = [*COMMAND, "gpt", "--plain", "--threads", "1", "--steps", "100000", "--name", "it"]
    command += ["--eval-batches", "1", "--sample-length", "8"]
    environment = {**os.environ, "TUI_TRAINER_RUNS_DIR": str(tmp_path / "runs")}
    process = processes.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    run = tmp_path / "runs" / "it"
    try:
        until(lambda: (state := read_state(run)) and state.step > 3, "it trains")
        process.send_signal(number)
        assert process.wait(240) == status
    finally:
        process.kill()
    state = read_state(run)
    assert state is not None
    assert state.state == "stopped"
    assert (run / "checkpoints" / f"step-{state.step:08}").is_dir()
