"""Breakpoints of a real process: from its start, and from another terminal."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.calling import assert_refused, call, started
from tests.runs.starting import until

LOOP = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(1, 41):
    inputs = torch.randn(8, 4) * (1000 if step == 20 else 1)
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
"""


def test_a_run_stands_where_its_condition_is_met_until_it_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LOOP)
    breaks = ("--break", "loss > 100 * ema(loss)", "--break", "step == 39 at backward")
    with started("run", "--json", "--name", "one", *breaks, "train.py", cwd=tmp_path) as run:
        assert run.next_breakpoint()["text"].startswith(
            "paused after step at breakpoint 1: loss > 100 * ema(loss) (loss "
        )
        wrong = call("break", "one", "grad_norm('bais') > 1", cwd=tmp_path)
        assert_refused(wrong, 'no column of grad_norm matches "bais"', "^^^^", "bias")
        wrong = call("break", "one", "losss > 1", cwd=tmp_path)
        assert_refused(wrong, "    losss > 1\n    ^^^^^\n  hint: did you mean loss?", status=2)
        added = call("break", "one", "step == 30", "--once", cwd=tmp_path)
        assert added.stdout == "one: breakpoint 3: step == 30 (once)\n"
        assert call("break", "one", "--disable", "1", cwd=tmp_path).returncode == 0
        assert call("resume", "one", cwd=tmp_path).returncode == 0
        assert run.next_breakpoint()["text"] == "paused after step at breakpoint 3: step == 30"
        listed = json.loads(call("break", "one", "--json", cwd=tmp_path).stdout)
        assert [(each["number"], each["enabled"], each["hits"]) for each in listed] == [
            (1, False, 1), (2, True, 0), (3, False, 1)
        ]  # fmt: skip
        assert call("break", "one", "--delete", "3", cwd=tmp_path).returncode == 0
        resumed = call("resume", "one", cwd=tmp_path)
        assert resumed.returncode == 0
        assert (
            run.next_breakpoint()["text"]
            == "paused after backward at breakpoint 2: step == 39 at backward"
        )
        shown = call("pause", "one", cwd=tmp_path).stdout
        assert "one paused at step 38" in shown
        assert "(breakpoint 2: step == 39 at backward)" in shown
        call("resume", "one", cwd=tmp_path)
        run.wait()
    saved = json.loads((tmp_path / "runs" / "one" / "breakpoints.json").read_text())
    assert [(each["number"], each["hits"]) for each in saved] == [(1, 1), (2, 1)]


def test_the_result_of_an_evaluation_pauses_a_task_before_its_next_step(tmp_path: Path) -> None:
    options = ("--steps", "20", "--eval-every", "6", "--eval-batches", "1", "--width", "16")
    options += ("--layers", "1", "--threads", "1")
    condition = 'validation("loss") > 0 and step > 1'
    command = ("gpt", "--json", "--name", "one", *options, "--break", condition)
    with started(*command, cwd=tmp_path) as run:
        paused = run.next_breakpoint()
        assert paused["text"].startswith("paused after data at breakpoint 1: validation(")
        assert "(validation loss " in paused["text"]
        assert paused["step"] == 7
        until(
            lambda: "paused" in call("show", "one", cwd=tmp_path).stdout.splitlines()[0],
            "show reports the pause",
        )


def test_a_condition_that_cannot_be_understood_starts_no_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LOOP)
    done = call("run", "--break", "loss >", "train.py", cwd=tmp_path)
    assert_refused(done, "--break: this is not a valid condition", "loss >", status=2)
    done = call("run", "--break", "rank(1).loss != loss", "train.py", cwd=tmp_path)
    assert_refused(done, "--break: the run has one process", "^^^^^^^", status=2)
    done = call("run", "--break-on-finding", "bad", "train.py", cwd=tmp_path)
    assert_refused(done, "warning", status=2)
    assert not (tmp_path / "runs").exists()


def test_a_number_that_no_breakpoint_can_have_is_refused_at_once(
    tmp_path: Path,
) -> None:
    for arguments in (
        ["--delete", "0"],
        ["--enable", str(2**70)],
        ["one", "loss > 1", "--ignore", "-1"],
    ):
        assert_refused(call("break", *arguments, cwd=tmp_path, torch=False), status=2)
