"""What a script does after it was rewound is a branch: a run of its own, with its own line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.calling import assert_refused, call, started
from tests.cli.test_back import losses_from
from tests.runs.starting import stored_step, until
from tui_trainer.runs.recording import reported_info
from tui_trainer.ui.related_runs import find_related

SCRIPT = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(40):
    x = torch.randn(16, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_what_a_script_does_after_going_back_is_a_branch(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    runs = tmp_path / "runs"

    def done(*command: str) -> str:
        result = call(*command, cwd=tmp_path)
        assert result.returncode == 0, result
        return result.stdout

    def listed() -> dict[str, dict[str, object]]:
        return {run["name"]: run for run in json.loads(done("ls", "--json"))}

    options = ("--paused", "--plain", "--snapshots", "16MB", "--name", "one")
    with started("run", *options, "train.py", cwd=tmp_path) as run:
        until(lambda: call("pause", "one", cwd=tmp_path).returncode == 0, "the run has begun")
        within = call("branch", "one", "lr=1", cwd=tmp_path)
        assert_refused(within, "a branch begins at the end of a step")
        until(lambda: call("step", "one", "6", cwd=tmp_path).returncode == 0, "the run steps")
        assert "the script's own variables" in done("back", "one", "--to", "1")
        assert_refused(call("back", "one", cwd=tmp_path), "no snapshot of an earlier step")
        assert list(listed()) == ["one"], "nothing has followed yet"
        command = ("landscape", "one", "--direction", "random", "--points", "3", "--json")
        along = json.loads(done(*command))
        assert along["text"].startswith("the loss is lowest at ")
        assert "on the batch of step 6; with the weights as they are now" in along["text"]
        assert along["curves"][0]["random"] == [-1.0, 0.0, 1.0]
        refused = call("what-if", "one", "lr=0.1", cwd=tmp_path)
        assert_refused(refused, "the steps of a script cannot be made twice", "landscape")
        done("set", "lr=0.02")  # the only live run
        done("step", "one", "4")
        until(lambda: (runs / "one-2").is_dir() and stored_step(runs / "one-2") == 5, "a branch")
        until(lambda: listed()["one-2"]["state"] == "paused", "the branch is paused")
        found = listed()["one-2"]
        assert (found["parent"], found["branch_step"]) == (str(runs / "one"), 1)
        assert found["total_steps"] == 35
        assert [each.name for each in find_related(reported_info(runs / "one"))] == ["one-2"]
        text = done("branch", "one", "--to", "1", "lr=0.1", "--name", "hot", "--paused")
        assert "hot continues from step 1 of one with lr=0.1" in text
        until(lambda: listed()["one-2"]["state"] == "stopped", "the first branch has ended")
        assert "rewound to step 1" in listed()["one-2"]["note"]
        refused = call("branch", "one", "lr=1", "--name", "hot", cwd=tmp_path)
        assert_refused(refused, "there is a run hot already")
        done("step", "hot", "2")  # commands for the branch go to the process
        refused = call("branch", "one", "lr=1", "--name", "../out", cwd=tmp_path)
        assert_refused(refused, "a branch cannot be called")
        for wrong in (("--name", "hot"), ("nothing=1",)):
            assert call("branch", "one", "--to", "1", *wrong, cwd=tmp_path).returncode != 0
        assert listed()["hot"]["state"] != "stopped", "a refused branch does not take it back"
        done("back", "one", "--to", "12")
        done("resume", "one")
        run.wait()
    whole = losses_from(runs / "one", tmp_path)
    assert sorted(whole) == list(range(1, 41))
    first, hot = (losses_from(runs / name, tmp_path) for name in ("one-2", "hot"))
    assert first == {step: whole[step + 5] for step in (2, 3, 4, 5)}
    assert hot == {step: whole[step + 9] for step in (2, 3)}
    assert first[2] == hot[2] == pytest.approx(whole[2]), "the generators are restored"
    assert first[3] != hot[3]
    last = listed()["one-3"]
    kept = last["branch_step"]
    assert last["state"] == "finished"
    assert Path(last["parent"]).name in ("one", "one-2", "hot")
    third = losses_from(runs / "one-3", tmp_path)
    assert third == {kept + n: whole[12 + n] for n in range(1, 29)}
    events = done("export", "one-2", "--format", "jsonl")
    assert "lr 0.01 → 0.02" in events
    assert "continues one@1" in done("show", "one-2")
    assert "in the same process: the script's own variables and its place in the data" in events
    tree = done("ls").splitlines()[1:]
    assert tree[0].startswith("one ")
    assert all(line.startswith("  ") for line in tree[1:])
    assert "first differ at step 2" in done("compare", "one-2", "hot")
