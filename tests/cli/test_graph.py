"""`tui-trainer graph`: as a table, as JSON, as a picture, and its errors."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.cli.calling import call
from tui_trainer.cli.commands import graph as command
from tui_trainer.cli.main import run
from tui_trainer.learn.scalar.torch_process import TorchGradients, TorchProcess
from tui_trainer.learn.scalar.torch_worker import autograd, version

LESSON = ["graph", "(a*b + c) * f", "--at", "a=2", "b=-3", "c=10", "f=-2"]


@pytest.fixture
def torch_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's gradients without another process."""
    monkeypatch.setattr(
        command,
        "_autograd",
        lambda found: TorchGradients(version(), tuple(autograd(found.expression, found.inputs))),
    )


def test_json_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = call(*LESSON, "--json", cwd=tmp_path, starts=True)
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    nodes = {node["name"]: node for node in made["nodes"]}
    assert nodes["a"] | {"numerical": 0} == {
        "name": "a", "operation": "input", "inputs": [], "value": 2.0, "gradient": 6.0,
        "numerical": 0, "product": "f*b",
    }  # fmt: skip
    assert {name: node["gradient"] for name, node in nodes.items()} == {
        "a": 6, "b": -4, "c": -2, "f": 4, "e": -2, "d": -2, "L": 1,
    }  # fmt: skip
    assert nodes["a"]["numerical"] == pytest.approx(6)
    assert made["gradient_by"] == version()


@pytest.mark.usefixtures("torch_here")
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(LESSON) == 0
    out = capsys.readouterr().out
    assert "e     a*b           -6        -2" in out
    assert "dL/da = dL/de * de/da = dL/de * b = -2 * (-3) = 6" in out
    assert version() in out


@pytest.mark.usefixtures("torch_here")
def test_sweep_and_descent(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["graph", "neuron", "--sweep", "w1"]) == 0
    assert "left of it rounding, right of it truncation" in capsys.readouterr().out
    assert run(["graph", "weight", "--descend", "w", "--at", "w=0.25"]) == 0
    out = capsys.readouterr().out
    assert "0.25 - " in out
    assert "too large" in out
    assert run(["graph", "weight", "--descend", "w", "--sweep", "w", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [each["label"] for each in made["descent"]["runs"]] == [
        "too small", "right", "too large",
    ]  # fmt: skip
    assert len(made["sweep"]["points"]) == 61


@pytest.mark.usefixtures("torch_here")
def test_a_gradient_that_is_not_finite_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["graph", "a**b", "--at", "a=-2", "b=2", "--json"]) == 0
    nodes = {node["name"]: node for node in json.loads(capsys.readouterr().out)["nodes"]}
    assert (nodes["b"]["gradient"], nodes["b"]["numerical"]) == (None, None)
    assert nodes["a"]["gradient"] == -4


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "backpropagation.svg"
    assert run([*LESSON, "--svg", str(path)]) == 0
    assert "dL/da" in "".join(ET.parse(path).getroot().itertext())
    assert run([*LESSON, "--svg", str(path)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run([*LESSON, "--svg", str(path), "--overwrite"]) == 0
    assert run([*LESSON, "--svg", str(tmp_path / "graph.png")]) == 2
    assert run([*LESSON, "--svg", str(tmp_path / "missing" / "graph.svg")]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b", "--at", "a=1", "b=0"], "    a/b\n    ^^^\n  hint: there a = 1, b = 0"),
        (["log(a)", "--at", "a=-1"], "logarithm of a negative number"),
        (["a*b", "--at", "a=1"], "      ^\n  hint: --at b=1"),
        (["a*b", "--at", "a=1", "c=2"], "there is no c in the expression"),
        (["a*b", "--at", "a=1", "b=x"], "x is not a number"),
        (["neuron", "--at", "w9=1"], "there is no w9"),
        (["neuron", "--sweep", "w9"], "w9 is not an input"),
        (["neuron", "--descend", "s"], "s is not an input"),
        (["neuron", "--h", "0"], "0"),
        (["sigmoid(a)", "--at", "a=1"], "there is no function sigmoid"),
        ([""], "empty"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["graph", *arguments, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_without_torch_the_own_gradients_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tui_trainer.learn.scalar.torch_process.COMMAND", ("false",))
    assert run([*LESSON, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["gradient_by"] == "tui-trainer"
    assert "PyTorch gave no gradients" in captured.err


def test_a_closed_process_answers_nothing() -> None:
    process = TorchProcess()
    process.close()
    assert process.gradients("a*b", {"a": 1.0, "b": 1.0}) is None
