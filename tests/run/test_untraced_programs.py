"""Commands of a script that start Python programs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tui_trainer.run.child_processes import ProgramReports, traced_command


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "train.py", "--lr", "1"], "tui-trainer run train.py"),
        ([sys.executable, "-W", "ignore", "-u", "src/train.py"], "tui-trainer run src/train.py"),
        (["/usr/bin/python3.12", "train.py"], "tui-trainer run train.py"),
        ("CUDA_VISIBLE_DEVICES=0 python train.py > log", "tui-trainer run train.py"),
        (["env", "A=1", "nohup", "python3", "train.py"], "tui-trainer run train.py"),
        (["torchrun", "--nproc-per-node=2", "t.py"], "tui-trainer run torchrun … t.py"),
        (["accelerate", "launch", "t.py"], "tui-trainer run accelerate … t.py"),
        (["python", "-m", "torch.distributed.run", "t.py"], "tui-trainer run torchrun … t.py"),
        (["tui-trainer", "run", "train.py"], None),
        (["python", "-c", "import torch"], None),
        (["python", "-m", "pip", "list"], None),
        (["python", "-m", "http.server"], None),
        (["python", "-m", "no_such_module_anywhere"], None),
        (["python", pytest.__file__], None),
        (["python", os.__file__], None),
        (["python"], None),
        (["git", "log", "train.py"], None),
        ("git add train.py", None),
        ("an unclosed 'quote", None),
        ([], None),
        (None, None),
    ],
)
def test_the_command_that_traces_a_program(command, expected):
    try:
        found = traced_command(command)
    except ValueError:  # `ProgramReports` takes any exception for "no program of ours"
        found = None
    assert (found and found[1]) == expected


def test_a_module_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "a_training_of_mine.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["python", "-m", "a_training_of_mine", "--fast"]
    assert traced_command(command) == (
        "-m a_training_of_mine",
        "tui-trainer run -m a_training_of_mine",
    )


def test_each_program_is_reported_once_and_everything_is_restored(tmp_path):
    (tmp_path / "w.py").write_text("")
    before = (subprocess.Popen.__init__, os.system)
    texts = []
    reports = ProgramReports(texts.append)
    reports.install()
    try:
        for _ in range(2):
            subprocess.run(args=[sys.executable, "w.py"], cwd=tmp_path, check=True)
        subprocess.run(["true", b"\xff"], check=True)
        assert os.system("exit 3") >> 8 == 3
    finally:
        reports.remove()
    assert (subprocess.Popen.__init__, os.system) == before
    assert len(texts) == 1
    assert texts[0].endswith("start it with tui-trainer run w.py")
