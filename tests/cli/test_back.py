"""A real run is rewound from another terminal, and continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.calling import StartedRun, assert_refused, call, started
from tests.runs.starting import last_step, stored_step, until
from tests.travel.support import same
from tui_trainer.run.checkpoints import load_checkpoint
from tui_trainer.runs.checkpoints import checkpoint_path
from tui_trainer.runs.recording import reported_info
from tui_trainer.ui.related_runs import find_related, open_related

OPTIONS = """
    --steps 12 --layers 1 --width 16 --heads 2 --block-size 8 --batch-size 4 --threads 1
    --device cpu --eval-batches 1 --eval-every 3 --sample-every 1000 --sample-length 8
    --snapshots 64MB
"""


def losses_from(directory: Path, cwd: Path) -> dict[int, float]:
    lines = call("export", directory, "--format", "jsonl", cwd=cwd).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    found = [(row["step"], row["loss"]) for row in rows if row.get("type") == "step"]
    assert len(dict(found)) == len(found), "a step was recorded twice"
    return dict(found)


def losses(directory: Path, cwd: Path) -> dict[int, float]:
    found = losses_from(directory, cwd)
    assert sorted(found) == list(range(1, len(found) + 1))
    return found


def test_a_live_run_is_taken_back_and_goes_on(tmp_path: Path) -> None:
    command = ("gpt", "--plain", "--paused", "--name", "one", *OPTIONS.split())
    with started(*command, cwd=tmp_path) as run:
        until(lambda: call("step", "one", "7", cwd=tmp_path).returncode == 0, "the run steps")
        one = tmp_path / "runs" / "one"
        until(lambda: len(losses(one, tmp_path)) == 7, "seven steps are stored")
        recorded = losses(one, tmp_path)
        done = call("back", "one", cwd=tmp_path)
        assert done.returncode == 0, done
        assert done.stdout.splitlines()[-1].startswith("one paused at step 6, loss "), done
        there = json.loads(call("back", "one", "--to", "2", "--json", cwd=tmp_path).stdout)
        assert (there["step"], there["state"]) == (2, "paused")
        assert there["loss"] == pytest.approx(recorded[2], rel=1e-6)
        shown = json.loads(call("show", "one", "--json", cwd=tmp_path).stdout)
        assert (shown["step"], shown["loss"]) == (2, pytest.approx(recorded[2], rel=1e-6))
        assert f"loss {recorded[3]:.4g}"[:9] in call("step", "one", cwd=tmp_path).stdout
        call("back", "one", cwd=tmp_path)
        assert_refused(call("set", "one", "lr=1", cwd=tmp_path), "step 2 is in the past", "branch")
        assert_refused(call("back", "one", "--to", "9", cwd=tmp_path), "has not been at step 9 yet")
        assert_refused(call("back", "one", "--keep", "much", cwd=tmp_path), "512MB", status=2)
        what = json.loads(
            call("what-if", "one", "lr=0.1", "--steps", "3", "--json", cwd=tmp_path).stdout
        )
        present, changed = what["curves"]
        assert present["loss"] == pytest.approx([recorded[step] for step in (3, 4, 5)], rel=1e-4)
        assert (changed["name"], changed["step"]) == ("lr=0.1", [3, 4, 5])
        shown = call("lr-finder", "one", "--steps", "8", cwd=tmp_path)
        assert "learning rate" in shown.stdout, shown
        shown = call("landscape", "one", "--points", "5", cwd=tmp_path)
        assert shown.stdout.splitlines()[-1] == "the run is unchanged, and paused", shown
        call("resume", "one", cwd=tmp_path)
        printed = run.wait()
    whole = losses(tmp_path / "runs" / "one", tmp_path)
    assert len(whole) == 12
    assert {step: whole[step] for step in recorded} == recorded
    assert "differs" not in printed


def shown_beside(one: Path, child: dict[int, float], parent: dict[int, float]) -> None:
    """The charts of either run show the line of the other."""
    for directory, other, losses in (
        (one, "one-2", child),
        (one.with_name("one-2"), "one", parent),
    ):
        info = reported_info(directory)
        entries = find_related(info)
        assert [entry.name for entry in entries] == [other]
        (related,) = open_related(entries, ())
        curve = related.curve("step", "loss", (1, 13), 12)
        assert (window := curve.window) is not None
        assert [step + 1 for step in window.filled.nonzero()[0]] == sorted(losses)
        assert window.last[window.filled, 0].tolist() == pytest.approx(
            [losses[step] for step in sorted(losses)], rel=1e-6
        )
        assert curve.newest == pytest.approx(losses[max(losses)], rel=1e-6)
        assert open_related(entries, (related,)) == (related,)
        assert open_related((), (related,)) == ()


def test_a_branch_goes_on_from_an_earlier_step_with_another_rate(tmp_path: Path) -> None:
    command = ("gpt", "--plain", "--paused", "--name", "one", *OPTIONS.split())
    with started(*command, cwd=tmp_path, starts=True):
        until(lambda: call("step", "one", "8", cwd=tmp_path).returncode == 0, "the run steps")
        changes = ("lr=0.5", "clip=0.01")
        for wrong, words in (
            (("lr=0.5", "--name", "one"), "there is a run one already"),
            (("momentum=0.5",), "adamw has no momentum"),
        ):
            assert_refused(call("branch", "one", *wrong, "--to", "5", cwd=tmp_path), words)
        shown = json.loads(call("show", "one", "--json", cwd=tmp_path).stdout)
        assert shown["step"] == 8, "a refused branch does not take the run back"
        done = call("branch", "one", *changes, "--to", "5", "--json", cwd=tmp_path)
        assert done.returncode == 0, done
        assert json.loads(done.stdout) == {
            "run": "one-2", "parent": "one", "branch_step": 5, "changes": ["lr=0.5", "clip=0.01"]
        }  # fmt: skip
        assert call("step", "one", "3", cwd=tmp_path).stdout.startswith("one paused at step 8")

        def state() -> dict[str, object]:
            runs = json.loads(call("ls", "--json", cwd=tmp_path).stdout)
            return next(each for each in runs if each["name"] == "one-2")

        until(lambda: state()["state"] == "finished", "the branch ends")
        assert (Path(state()["parent"]).name, state()["branch_step"]) == ("one", 5)
        one = tmp_path / "runs" / "one"
        until(lambda: len(losses_from(one, tmp_path)) == 8, "eight steps are stored")
        until(lambda: len(losses_from(one.with_name("one-2"), tmp_path)) == 7, "seven as well")
        parent, child = (
            losses_from(tmp_path / "runs" / name, tmp_path) for name in ("one", "one-2")
        )
        assert sorted(child) == list(range(6, 13))
        assert child[6] == parent[6], "the loss of a step is computed before its update"
        assert child[7] != parent[7]
        shown_beside(one, child, parent)
        listed = call("ls", cwd=tmp_path).stdout.splitlines()[1:]
        assert listed[0].startswith("one "), listed
        assert listed[1].startswith("  one-2 "), listed
        compared = call("compare", "one", "one-2", cwd=tmp_path)
        assert compared.returncode == 0, compared


def state_at_nine(run: Path) -> dict[str, object]:
    """What the run's checkpoint of step 9 holds of its training."""
    saved = load_checkpoint(checkpoint_path(run, 9))
    saved.states["edits"].pop("edits")  # their number: of this process alone
    return {"weights": saved.weights, "states": saved.states, "random": saved.random}


SMALL = "--steps 12 --layers 1 --width 16 --heads 2 --batch-size 4 --threads 1 --device cpu"
RANDOM = {
    "gpt": ("--block-size", "8", "--eval-batches", "1", "--sample-length", "8", "--dropout", "0.1"),
    "vit": ("--dropout", "0.1", "--shift", "1", "--flip"),
}


@pytest.mark.parametrize("task", ["gpt", "vit"])
def test_a_killed_run_is_continued_and_gone_back_in_bit_for_bit(task: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def done(*command: str) -> None:
        result = call(*command, cwd=tmp_path)
        assert result.returncode == 0, result

    def begun(run: StartedRun, name: str) -> None:
        def steps() -> bool:
            assert run.process.poll() is None, run.process.communicate()
            return call("step", name, cwd=tmp_path).returncode == 0

        until(steps, "the run steps")

    common = ("--plain", "--paused", "--snapshots", "64MB")
    with started(
        task, "--name", "one", *common, *SMALL.split(), *RANDOM[task], cwd=tmp_path
    ) as run:
        begun(run, "one")
        done("set", "one", "lr=1e-2", "seed=5", "beta1=0.8")
        done("step", "one", "5")
        done("checkpoint", "one")
        done("set", "one", "freeze=*norm*", "lr=2e-3")
        done("step", "one", "3")
        done("checkpoint", "one")
        until(lambda: stored_step(runs / "one") == 9, "nine steps are stored")
    # `started` has killed the run with SIGKILL, which no process can handle.
    recorded = losses_from(runs / "one", tmp_path)
    resumed = ("--resume", "one@6", "--set", "freeze=*norm*", "--set", "lr=2e-3")
    with started(task, *resumed, "--name", "two", *common, cwd=tmp_path) as run:
        begun(run, "two")
        while (at := last_step(call("step", "two", cwd=tmp_path))) < 9:
            assert at > 6
        for step in ("7", "6", "9"):
            done("back", "two", "--to", step)
        done("checkpoint", "two")
        until(lambda: stored_step(runs / "two") >= 9, "three steps are stored")
    continued = losses_from(runs / "two", tmp_path)
    assert continued == {step: recorded[step] for step in (7, 8, 9)}
    assert same(state_at_nine(runs / "one"), state_at_nine(runs / "two"))
