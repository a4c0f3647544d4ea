"""`--resume`: a new run continues from another's checkpoint, bit for bit, and names its parent."""

from __future__ import annotations

import json

import pytest

from tests.cli.calling import assert_refused, call
from tui_trainer.runs.checkpoints import checkpoint_steps


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of 12 steps with a checkpoint of its seventh."""
    here = tmp_path_factory.mktemp("resume")
    options = ("--steps", "12", "--threads", "1", "--json", "--name", "whole")
    options += ("--eval-batches", "1", "--sample-length", "8", "--layers", "2", "--heads", "2")
    options += ("--width", "32", "--block-size", "16", "--batch-size", "8")
    done = call("gpt", *options, "--checkpoint-every", "7", cwd=here)
    assert done.returncode == 0, done.stderr
    (here / "whole.jsonl").write_text(done.stdout)
    return here


def steps_in(text):
    lines = [json.loads(line) for line in text.splitlines()]
    measured = ("loss", "lr", "grad_norm_preclip", "clip")
    return lines[0], {
        line["step"]: {name: line[name] for name in measured}
        for line in lines
        if line["type"] == "step"
    }


def drifts_in(text):
    """Step to the drift of every layer's matrices, where it was measured."""
    return {
        line["step"]: [[layer[f"drift_{m}"] for m in "qkv"] for layer in line["attention"]]
        for line in map(json.loads, text.splitlines())
        if line["type"] == "step" and line["attention"]
    }


def files_of(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_going_on_equals_never_having_stopped(place):
    _, whole = steps_in((place / "whole.jsonl").read_text())
    parent = place / "runs" / "whole"
    before = files_of(parent)
    done = call("gpt", "--resume", "whole@7", "--json", "--name", "rest", cwd=place)
    assert done.returncode == 0, done.stderr
    header, rest = steps_in(done.stdout)
    assert list(rest) == list(range(8, 13))
    assert rest == {step: whole[step] for step in rest}
    # Drift is from the weights that the whole run began with.
    drifts, of_whole = drifts_in(done.stdout), drifts_in((place / "whole.jsonl").read_text())
    assert drifts
    assert drifts == {step: of_whole[step] for step in drifts}
    assert header["parent"] == str(parent)
    assert header["branch_step"] == 7
    assert header["working_directory"] == str(place)
    listed = {run["name"]: run for run in json.loads(call("ls", "--json", cwd=place).stdout)}
    assert (listed["rest"]["parent"], listed["rest"]["branch_step"]) == (str(parent), 7)
    assert (listed["whole"]["parent"], listed["whole"]["branch_step"]) == (None, None)
    shown = json.loads(call("show", "rest", "--json", cwd=place).stdout)
    assert (shown["parent"], shown["branch_step"]) == (str(parent), 7)
    assert "from whole@7" in call("ls", cwd=place).stdout
    assert "continues whole@7" in call("show", "rest", cwd=place).stdout
    assert "continues" not in call("show", "whole", cwd=place).stdout
    assert header["host"]
    assert {"tui-trainer", "python", "torch"} <= set(header["versions"])
    assert files_of(parent) == before
    # And on from there, longer than was planned.
    more = call("gpt", "--resume", "rest", "--steps", "14", "--json", cwd=place)
    assert more.returncode == 0, more.stderr
    assert list(steps_in(more.stdout)[1]) == [13, 14]
    assert "schedule ends at another step" in more.stderr
    assert "schedule" not in done.stderr
    # The parent had gone beyond the checkpoint: those steps are repeated, and a message says so.
    assert "continuing from step 7 of whole, which reached step 12" in done.stderr
    assert "continuing from step 12 of rest\n" in more.stderr


def test_checkpoints_are_found_as_they_are_written(place):
    directory = place / "runs" / "whole"
    assert checkpoint_steps(directory) == [7, 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt", "--resume", "whole"), "has already made all of its 12 steps"),
        (("gpt", "--resume", "whole@8"), "no checkpoint of step 8"),
        (("gpt", "--resume", "who@7", "--preset", "nanogpt-cpu"), "--preset cannot be given"),
        (("vit", "--resume", "whole"), "tui-trainer gpt --resume whole"),
        (("gpt", "--resume", "nowhere"), "there is no run nowhere"),
        (("run", "--resume", "whole", "x.py"), "script"),
        (("run", "--resume", "whole"), "has already made all of its 12 steps"),
    ],
)
def test_refused_resumes(place, arguments, message):
    (place / "x.py").write_text("")
    assert_refused(call(*arguments, cwd=place), message)


def test_a_script_resumes_by_itself_and_no_missing_weights_are_promised(place):
    (place / "empty.py").write_text("import torch")
    assert call("run", "--name", "bare", "empty.py", cwd=place).returncode == 0
    refused = call("gpt", "--resume", "bare", cwd=place)
    assert_refused(refused, "resumes by its own means", "tui-trainer run --name bare empty.py")
    assert "weights" not in refused.stderr
    assert call("run", "--resume", "bare", cwd=place).stderr == refused.stderr
