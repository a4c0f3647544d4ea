"""`tui-trainer demo`: the list, the program, the comparison, and errors."""

from __future__ import annotations

import json
import sys

import pytest

from tests.recorded_runs import directory
from tests.ui.screens import text_of, until
from tui_trainer.cli.commands import demo as command
from tui_trainer.cli.errors import CommandError
from tui_trainer.cli.main import run
from tui_trainer.config.run_spec import read_spec
from tui_trainer.learn.demos import DEMOS
from tui_trainer.ui.app import TuiTrainerApp


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings in place of the two trainings."""
    specs = {cured: read_spec(directory("calm" if cured else "eager")) for cured in (False, True)}
    monkeypatch.setattr(command, "_spec", lambda chosen, cured, options: specs[cured])
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


async def test_the_app_begins_with_a_message() -> None:
    app = TuiTrainerApp(None, message=command.first_message(DEMOS[0], cured=False))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await until(pilot, lambda: "It pauses at" in text_of(app), "the message")


def test_the_first_message_of_a_guided_run() -> None:
    for demo in DEMOS:
        text = command.first_message(demo, cured=False)
        assert demo.breakpoint in text
        assert (demo.live in text) if demo.live else "E and" not in text
