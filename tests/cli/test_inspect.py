"""`inspect` of a real run: its list, a summary as text and JSON, files, and refusals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.cli.calling import assert_refused, call, started

LOOP = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.Linear(5, 1))
half = torch.nn.Linear(5, 4, bias=False).bfloat16()
model.register_buffer("table", half.weight.detach())
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(1, 41):
    optimizer.zero_grad()
    model(torch.randn(8, 12)).square().mean().backward()
    optimizer.step()
"""


def assert_graph(
    autograd: Callable[..., subprocess.CompletedProcess[str]], directory: Path
) -> None:
    text = autograd().stdout
    assert "step 3, after backward\n" in text
    assert "Sequential  the model" in text
    found = json.loads(autograd("--json").stdout)
    assert (found["run"], found["source"], found["same_loss"]) == ("one", "rerun", True)
    leaves = [node["leaf"] for node in found["nodes"] if node["leaf"]]
    assert sorted(leaves) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert "0.weight to the loss: 5 edges, the only path" in autograd("--path", "0.weight").stdout
    done = autograd("--svg", "g.svg", "--dot", "g.dot")
    assert done.returncode == 0, done.stderr
    assert (directory / "g.svg").read_text().startswith("<svg")
    assert_refused(autograd("--svg", "g.svg"), "g.svg already exists")
    assert_refused(autograd("--path", "weight"), "2 leaves match weight")


def test_tensors_of_a_paused_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LOOP)

    def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
        return call("inspect", *arguments, cwd=tmp_path)

    breaks = ("--break", "step == 3 at backward", "--break", "step == 5")
    with started("run", "--json", "--name", "one", *breaks, "train.py", cwd=tmp_path) as run:
        run.next_breakpoint()
        listed = inspect("one").stdout.splitlines()
        assert listed[0].split() == ["tensor", "kind", "shape", "type", "bytes", "device"]
        assert listed[1].split() == ["0.weight", "parameter", "5×12", "float32", "240", "B", "cpu"]
        piped = inspect("one", "0.weight", "--pixels")
        assert "no pixels: the output is not a terminal" in piped.stderr
        assert "mean |x| of blocks 1×1" in piped.stdout
        kinds = [line.split()[1] for line in listed[1:6]]
        assert kinds == ["parameter", "gradient", "step", "exp_avg", "exp_avg_sq"]
        assert "table" in listed[-1]

        text = inspect("one", "0.weight", "--grad").stdout
        assert text.startswith("gradient of 0.weight\n5×12 float32, 240 B on cpu · step 3, after ")
        for part in ("mean ", "std ", "norm ", "quantile", "histogram", "largest ", "smallest "):
            assert part in text
        assert "mean |x| of blocks 1×1, rows 0 to 5, columns 0 to 12" in text

        found = json.loads(inspect("one", "0.weight", "--window", "1:3,4:10", "--json").stdout)
        assert (found["run"], found["step"], found["phase"]) == ("one", 3, "backward")
        assert found["statistics"]["count"] == 60
        assert np.shape(found["heat"]["cells"]) == (2, 6)

        assert inspect("one", "0.weight", "--save", "w.npy").stdout.startswith(
            "wrote 0.weight (5×12"
        )
        saved = np.load(tmp_path / "w.npy")
        assert saved.shape == (5, 12)
        assert np.isclose(np.linalg.norm(saved), found["statistics"]["norm"], rtol=1e-5)
        shown = np.array(found["heat"]["cells"], np.float32)
        assert np.array_equal(np.abs(saved[1:3, 4:10]), shown)
        assert_refused(inspect("one", "0.weight", "--save", "w.npy"), "w.npy already exists")
        done = inspect("one", "0.w", "--state", "exp_avg_sq", "--save", "v.safetensors")
        assert done.returncode == 0, done.stderr
        ((name, state),) = load_file(tmp_path / "v.safetensors").items()
        assert name == "exp_avg_sq of 0.weight"
        assert state.shape == (5, 12)
        assert (state >= 0).all()
        assert inspect("one", "table", "--save", "h.npy").returncode == 0
        assert np.load(tmp_path / "h.npy").dtype == np.float32
        assert inspect("one", "table", "--save", "h.safetensors").returncode == 0
        assert b'"BF16"' in (tmp_path / "h.safetensors").read_bytes()[:200]

        listed = inspect("one", "--modules").stdout.splitlines()
        rows = [line.split()[:3] for line in listed[1:]]
        assert rows[0] == ["model", "input", "8×12"]
        assert rows[1:4] == [["0", "input", "8×12"], ["0", "output", "8×5"], ["1", "input", "8×5"]]
        found = json.loads(inspect("one", "1", "--output", "0", "--json").stdout)
        assert found["statistics"]["count"] == 8
        assert inspect("one", "0", "--input", "0", "--save", "x.npy").returncode == 0
        assert np.load(tmp_path / "x.npy").shape == (8, 12)
        assert_refused(
            inspect("one", "0", "--output", "1"), "no module that matches 0 has an output 1"
        )
        assert_refused(inspect("one", "0", "--output", "0", "--grad"), status=2)

        text = inspect("one", "0.weight", "--update", "--index", "2,7").stdout
        assert text.startswith("0.weight[2, 7] · step 3, after backward\nadam, group 0: lr 0.01, ")
        for part in ("β₁·m + (1−β₁)·g", "−η·m' / (√v' + ε)", "t = 3", "before ", "predicted "):
            assert part in text
        found = json.loads(inspect("one", "0.weight", "--update", "--json").stdout)
        assert (found["index"], found["actual"]) == (None, None)
        predicted = json.loads(
            inspect("one", "0.weight", "--update", "--index", "2,7", "--json").stdout
        )["predicted"]
        assert_graph(lambda *arguments: call("autograd", "one", *arguments, cwd=tmp_path), tmp_path)
        gradcheck = ("gradcheck", "one", "0.weight", "--index", "2,7")
        assert "(L(w+h) − L(w−h)) / 2h" in call(*gradcheck, cwd=tmp_path).stdout
        found = json.loads(call(*gradcheck, "--json", cwd=tmp_path).stdout)
        entry = found["entries"][0]
        assert (found["dtype"], entry["index"]) == ("float64", [2, 7])
        assert entry["steps"][entry["best"]]["central_error"] < 1e-6
        assert np.isclose(found["step_gradient"][0], entry["autograd"], rtol=1e-3)
        assert_refused(call("gradcheck", "one", "0", cwd=tmp_path), "2 tensors match 0")
        assert_refused(call("gradcheck", "one", cwd=tmp_path), "name a parameter", status=2)
        stepped = call("step", "one", "--phase", cwd=tmp_path).stdout
        assert stepped.startswith("one paused at step 3, ")
        text = inspect("one", "0.weight").stdout
        assert "\nstep, the last phase:\n  mean " in text
        found = json.loads(
            inspect("one", "0.weight", "--update", "--index", "2,7", "--json").stdout
        )
        assert (found["step"], found["phase"]) == (3, "step")
        assert np.isclose(found["actual"], predicted, rtol=1e-6)
        assert found["difference"] <= 4 * found["precision"]
        assert_refused(inspect("one", "0.bias", "--update"), "was not observed", "ask again")
        assert_refused(inspect("one", "0.bias", "--update", "--index", "x"), status=2)
        assert_refused(inspect("one", "0.bias", "--index", "1"), status=2)
        assert_refused(inspect("one", "0.bias", "--update", "--grad"), status=2)

        text = inspect("one", "--groups").stdout
        assert "adam, group 0: 4 parameters, 71 entries\n  lr 0.01, betas 0.9, 0.999" in text
        assert "optimizer state" in text
        found = json.loads(inspect("one", "--groups", "--json").stdout)
        assert found["groups"][0]["names"][0] == "0.weight"
        assert_refused(inspect("one", "0.bias", "--groups"), status=2)

        assert_refused(inspect("one", "weight"), "2 tensors match weight", "0.weight, 1.weight")
        assert_refused(inspect("one", "wieght"), "no parameter or buffer matches wieght")
        assert_refused(inspect("one", "table", "--grad"), "table has no gradient now")
        assert_refused(
            inspect("one", "0.weight", "--state", "exp"),
            "no optimizer state exp", "it has step, exp_avg, exp_avg_sq",
        )  # fmt: skip
        for wrong in (("--window", "3"), ("--window", "5:3"), ("--save", "w.txt"),
                      ("--grad", "--state", "exp_avg")):  # fmt: skip
            assert_refused(inspect("one", "0.weight", *wrong), status=2)
        assert_refused(inspect("one", "--grad"), "name a parameter", status=2)

        assert call("resume", "one", cwd=tmp_path).returncode == 0
        run.next_breakpoint()
        assert "step 5, after step" in inspect("one", "0.bias").stdout
        assert (
            call("break", "one", "--disable", "1", "--disable", "2", cwd=tmp_path).returncode == 0
        )
        assert call("resume", "one", cwd=tmp_path).returncode == 0
        run.wait()
        assert_refused(inspect("one", "0.bias"), "one has finished")
