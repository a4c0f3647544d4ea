"""A line that a script prints carries the step in which it was printed."""

from __future__ import annotations

import contextlib
import sqlite3

from tests.cli.calling import call
from tests.runs.starting import until
from tui_trainer.config.run_spec import read_state

SCRIPT = """
import sqlite3, time, torch

def say(text):
    # Lines are read by another thread: go on only once this one is recorded.
    print(text, flush=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            store = sqlite3.connect("file:runs/r/history.sqlite?mode=ro", uri=True)
            if store.execute("SELECT 1 FROM log WHERE text = ?", (text,)).fetchone():
                return
        except sqlite3.OperationalError:  # neither a file nor tables yet
            pass
        time.sleep(0.01)

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
say("before")
for i in range(1, 6):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).square().mean()
    say(f"within {i}")
    loss.backward()
    optimizer.step()
    say(f"after {i}")
"""


def test_lines_within_and_after_a_step(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = call("run", "--detach", "--name", "r", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "runs" / "r"
    until(lambda: (s := read_state(directory)) is not None and s.state == "finished", "the end")
    until(lambda: len(lines_of(directory)) >= 11, "all lines")
    steps = dict(lines_of(directory))
    assert steps["before"] == 0
    for i in range(1, 6):
        assert (steps[f"within {i}"], steps[f"after {i}"]) == (i, i)


def lines_of(directory):
    store = sqlite3.connect(directory / "history.sqlite", timeout=240)
    with contextlib.closing(store):
        return store.execute("SELECT text, step FROM log").fetchall()
