"""`tui-trainer demo`: the list, the program, the comparison, and errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

from tests.recorded_runs import directory
from tui_trainer.cli.commands import demo as command
from tui_trainer.cli.errors import CommandError
from tui_trainer.cli.main import run
from tui_trainer.cli.options import RunOptions
from tui_trainer.cli.start import demo_spec
from tui_trainer.config.run_spec import read_spec
from tui_trainer.learn.demos import DEMOS, find_demo


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings in place of the two trainings."""
    specs = {cured: read_spec(directory("calm" if cured else "eager")) for cured in (False, True)}
    monkeypatch.setattr(
        command, "demo_spec", lambda chosen, options, *, cured, stem="": specs[cured]
    )
    monkeypatch.setattr(command, "_run_to_end", lambda specs: None)


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo"]) == 0
    text = capsys.readouterr().out
    for demo in DEMOS:
        assert f"{demo.name:<15}  {demo.rule}" in text
    assert run(["demo", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in made["demos"]] == [demo.name for demo in DEMOS]


def test_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "zero-grad", "--source"]) == 0
    assert "optimizer.zero_grad()" in capsys.readouterr().out


@pytest.mark.usefixtures("trained")
def test_both_curves_and_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "rate-high"]) == 0  # the output is not a terminal
    text = capsys.readouterr().out
    for part in ("the fault: ", "cured: ", "the cure: a learning rate of 0.1", "training loss"):
        assert part in text
    assert run(["demo", "rate-high", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [each["cured"] for each in made["runs"]] == [False, True]
    assert made["rule"] == "update-ratio-high"
    assert made["set"] == "lr=0.1"
    assert isinstance(made["found"], bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rate-hihg"], "did you mean rate-high?"),
        (["rate-high", "--both", "--cured"], "leave out --cured"),
        (["rate-high", "--against", "x", "--cured"], "leave out --cured"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_training_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = [sys.executable, "-c", "import sys; print('no disk', file=sys.stderr); sys.exit(3)"]
    monkeypatch.setattr(command, "run_command", lambda spec: fails)
    spec = read_spec(directory("calm"))
    with pytest.raises(CommandError, match="status 3") as caught:
        command._run_to_end([spec, spec])
    assert caught.value.hint == "no disk"


@pytest.mark.usefixtures("trained")
def test_a_run_is_compared_with_the_one_that_makes_the_other_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_title = {cured: find_demo("rate-high").title(cured) for cured in (False, True)}
    trained: list[str] = []
    monkeypatch.setattr(
        command, "_run_to_end", lambda specs: trained.extend(spec.name for spec in specs)
    )
    for cured, given in enumerate(("eager", "calm")):
        spec = read_spec(directory(given))
        titled = msgspec.structs.replace(spec, title=with_title[bool(cured)])
        monkeypatch.setattr(command, "read_spec", lambda path, titled=titled: titled)
        assert run(["demo", "rate-high", "--against", str(directory(given)), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert [each["cured"] for each in made["runs"]] == [False, True]
        assert made["runs"][cured]["run"] == spec.name
    assert trained == [read_spec(directory(name)).name for name in ("calm", "eager")]


def test_a_run_of_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "rate-high", "--against", str(directory("calm"))]) == 2
    assert "is not a run of this demo" in capsys.readouterr().err


def test_the_run_that_is_guided(tmp_path: Path) -> None:
    options = RunOptions(runs_dir=tmp_path)
    for demo in DEMOS:
        spec = demo_spec(demo, options, guided=True)
        assert [each.condition for each in spec.breakpoints] == [demo.breakpoint]
        assert spec.steps_per_second == demo.pace
        assert spec.budget == 0, "a finding comes, however short the steps are"
        assert (spec.snapshots > 0) == (demo.back > 0)
        assert spec.name.startswith(f"{demo.name}-")
        assert read_spec(spec.directory) == spec
    cured = demo_spec(DEMOS[0], options, cured=True, guided=True)
    assert cured.arguments == ("--cured",)
    assert cured.breakpoints == ()
    assert demo_spec(DEMOS[0], options).steps_per_second is None
