"""`--paused` without a screen, and so without keys."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from tests import processes
from tests.cli.calling import COMMAND, call
from tui_trainer.config.run_spec import find_socket

LOOP = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
print("trained")
"""


@pytest.mark.parametrize("kind", ["--json", "--plain"])
def test_it_says_how_to_continue_and_continues(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "__main__.py").write_text(LOOP)
    runs = tmp_path / "the runs"
    process = processes.Popen(
        [*COMMAND, "run", "--paused", kind, "--runs-dir", "the runs", folder.name],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        message = process.stderr.readline().strip()
        assert message.startswith("tui-trainer: paused before the first step")
        program, *arguments = shlex.split(message.partition("to continue: ")[2])
        (run,) = runs.iterdir()
        assert (program, arguments[:2]) == ("tui-trainer", ["resume", run.name])
        while find_socket(run) is None:
            assert process.poll() is None
            time.sleep(0.05)
        done = call(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "trained" in out + err


def test_no_message_for_a_run_that_does_not_wait(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LOOP)
    done = call("run", "--plain", "train.py", cwd=tmp_path)
    assert done.returncode == 0
    assert "paused" not in done.stderr
