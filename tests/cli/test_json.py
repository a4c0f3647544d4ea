"""`--json` of a shipped task: every step has the documented fields, and the times are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.calling import call

SHORT = ["--json", "--steps", "5", "--threads", "1", "--device", "cpu", "--eval-batches", "1"]
STEP = {"step", "loss", "lr", "grad_norm_preclip", "clip", "grad_norm", "attention", "phase_ms"}
LAYER = {"layer", "cos_qk", "cos_qv", "cos_kv", "drift_q", "drift_k", "drift_v"}
PHASES = {"zero_grad", "forward", "loss", "backward", "clip", "step"}


def json_lines(task: str, *arguments: str, cwd: Path) -> list[dict[str, Any]]:
    samples = ("--sample-length", "8") if task == "gpt" else ()
    done = call(task, *arguments, *samples, *SHORT, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("task", ["gpt", "vit"])
def test_header_steps_and_end(task: str, tmp_path: Path) -> None:
    lines = json_lines(task, cwd=tmp_path)
    header, end = lines[0], lines[-1]
    steps = [line for line in lines if line["type"] == "step"]
    assert (header["type"], header["configuration"]["steps"]) == ("run", 5)
    assert (end["type"], end["reason"], end["steps"]) == ("end", "finished", 5)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    names = {parameter["name"] for parameter in header["parameters"]}
    layers = [layer["layer"] for layer in header["attention"]]
    for step in steps:
        assert step.keys() >= STEP
        assert step["clip"].keys() >= {"max_norm", "scale", "clipped"}
        assert step["grad_norm"].keys() == names
        assert [layer["layer"] for layer in step["attention"]] == layers
        assert all(layer.keys() >= LAYER for layer in step["attention"])
        assert step["phase_ms"].keys() >= PHASES


def test_the_times_of_the_steps_fit_into_the_time_of_the_run(tmp_path: Path) -> None:
    lines = json_lines("gpt", "--eval-every", "2", "--sample-every", "3", cwd=tmp_path)
    steps = [line for line in lines if line["type"] == "step"]
    lasted_ms = (steps[-1]["time"] - lines[0]["started_at"]) * 1e3
    assert 0 < sum(step["step_ms"] for step in steps) <= lasted_ms
    assert all(sum(step["phase_ms"].values()) <= step["step_ms"] * 1.001 for step in steps)
    assert sum(step["step_ms"] for step in steps) / 1e3 <= lines[-1]["elapsed_s"] * 1.001
