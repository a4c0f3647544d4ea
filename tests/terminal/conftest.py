"""Runs of these tests are kept, and ended, with the test."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tui_trainer.config.run_spec import process_identity, read_state


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The runs directory; whatever still trains in it afterwards is ended."""
    directory = tmp_path / "runs"
    monkeypatch.setenv("TUI_TRAINER_RUNS_DIR", str(directory))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield directory
    for run in directory.glob("*"):
        state = read_state(run)
        if state and state.process and process_identity(state.pid) == state.process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """A script that trains forever, unless a test changes it."""
    path = tmp_path / "train.py"
    path.write_text(
        "import sys, time, torch\n"
        "model = torch.nn.Linear(4, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for step in range(1, 1_000_000):\n"
        "    optimizer.zero_grad()\n"
        "    loss = model(torch.ones(2, 4)).pow(2).mean()\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
        "    time.sleep(0.02)\n"
        "    # then\n"
    )
    return path
