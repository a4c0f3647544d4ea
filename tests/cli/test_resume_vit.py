"""A killed vision transformer continues from its checkpoint's files, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest
from safetensors.torch import load_file

from tests import processes
from tests.cli.calling import COMMAND, call
from tests.runs.starting import until

STEPS, SAVED = 36, 18
"""An epoch of the digits has 23 steps: the checkpoint lies within one, and another follows."""
SMALL = ("--steps", STEPS, "--layers", 2, "--heads", 2, "--width", 32, "--threads", 1)
RANDOM = ("--dropout", 0.2, "--shift", 1, "--flip")
OPTIONS = (*map(str, SMALL), *map(str, RANDOM), "--checkpoint-every", str(SAVED), "--json")


def losses_in(text):
    lines = map(json.loads, text.splitlines())
    kept = ("loss", "lr", "grad_norm_preclip", "clip")
    return {line["step"]: [line[name] for name in kept] for line in lines if line["type"] == "step"}


def validated_in(text):
    lines = [json.loads(line) for line in text.splitlines()]
    return {
        line["step"]: (line["loss"], line["accuracy"])
        for line in lines
        if line["type"] == "validation"
    }


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(tmp_path):
    whole = call("vit", *OPTIONS, "--name", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    runs = tmp_path / "runs"
    saved = runs / "killed" / "checkpoints" / f"step-{SAVED:08}" / "state.json"
    # Its output is not read, so it cannot finish before it is killed.
    killed = processes.Popen(
        [*COMMAND, "vit", *OPTIONS, "--name", "killed"],
        cwd=tmp_path,
        env={**os.environ, "TUI_TRAINER_RUNS_DIR": str(runs), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: saved.exists() or killed.poll() is not None, "a checkpoint is written")
    finally:
        killed.kill()
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    listed = {run["name"]: run for run in json.loads(call("ls", "--json", cwd=tmp_path).stdout)}
    assert listed["killed"]["state"] == "crashed"
    resumed = call("vit", "--resume", f"killed@{SAVED}", "--name", "rest", "--json", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    known, rest = losses_in(whole.stdout), losses_in(resumed.stdout)
    assert list(rest) == list(range(SAVED + 1, STEPS + 1))
    assert rest == {step: known[step] for step in rest}
    validated = validated_in(resumed.stdout)
    assert validated
    assert validated.items() <= validated_in(whole.stdout).items()
    ends = [
        load_file(runs / name / "checkpoints" / f"step-{STEPS:08}" / "weights.safetensors")
        for name in ("whole", "rest")
    ]
    assert list(ends[0]) == list(ends[1])
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
