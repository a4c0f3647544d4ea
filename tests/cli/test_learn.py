"""`tui-trainer learn` off a terminal: a list, a page as text, one object."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cli.calling import call
from tests.learn.measured_once import measured
from tui_trainer.cli.commands import learn
from tui_trainer.cli.main import run
from tui_trainer.learn import measurement_process
from tui_trainer.learn.catalog import PAGES
from tui_trainer.learn.measurement_process import MeasurementError, PageMeasurement
from tui_trainer.learn.page import load_progress, titles


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("LANG", "C.UTF-8")
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements run in this process."""
    monkeypatch.setattr(
        measurement_process.MeasurementProcess,
        "measure",
        lambda self, name, seed: measured(name, seed),
    )


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["learn"]) == 0
    printed = capsys.readouterr().out
    for name, title in titles("en").items():
        assert f"{name} " in printed
        assert title in printed


def test_the_list_as_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["learn", "--json", "--language", "fr"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["language"] == "fr"
    assert [page["page"] for page in found["pages"]] == list(PAGES)
    assert {page["state"] for page in found["pages"]} == {"new"}
    assert load_progress().language == "fr"
    assert run(["learn"]) == 0
    assert titles("fr")["loss-graph"] in capsys.readouterr().out


@pytest.mark.usefixtures("_here")
def test_a_page_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["learn", "accumulation"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(titles("en")["accumulation"])
    assert f"{measured('accumulation').values['norm_once']:.4f}" in printed
    assert "`zero_grad(set_to_none=True)`" in printed or "`set_to_none=True`" in printed
    assert "Question" in printed
    assert "Answer" not in printed
    assert run(["learn", "accumulation", "--answer", "--seed", "2"]) == 0
    assert "3.00 times" in capsys.readouterr().out


@pytest.mark.usefixtures("_here")
def test_a_page_as_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["learn", "Param_Groups", "--json", "--language", "fr"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["page"], found["language"], found["seed"]) == ("param-groups", "fr", 1)
    values = measured("param-groups").values
    assert found["values"].keys() == values.keys()
    assert found["answer"].startswith("Réponse")
    assert all(found[part] for part in ("title", "body", "to_try", "question", "torch"))


def test_a_failed_measurement_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, name: str, seed: int) -> PageMeasurement:
        raise MeasurementError("there is no module torch", "pip install torch")

    monkeypatch.setattr(measurement_process.MeasurementProcess, "measure", fail)
    assert run(["learn", "loss-graph"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "tui-trainer: there is no module torch\n  hint: pip install torch\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("learn", "nothing"), "there is no page nothing"),
        (("learn", "--language", "de"), "de"),
        (("learn", "loss-graph", "--seed", "-1"), "--seed"),
    ],
)
def test_a_wrong_command_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(list(arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_process_prints_the_list(tmp_path: Path) -> None:
    done = call("learn", "--json", cwd=tmp_path, env={"LANG": "fr_FR.UTF-8"})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["language"] == "fr"


def test_the_command_of_a_page_runs_and_the_page_comes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(learn, "why_no_screen", lambda: "")
    monkeypatch.setattr(learn.subprocess, "run", lambda command, check: ran.append(command[4:]))
    monkeypatch.setattr(learn.os, "execv", lambda path, command: ran.append(command[4:]))
    monkeypatch.setattr("builtins.input", print)
    before = signal.getsignal(signal.SIGINT)
    run(["learn", "accumulation", "--try"])
    assert ran == [["demo", "zero-grad"], ["learn", "accumulation"]]
    assert "back to the page" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("arguments", [["--try"], ["accumulation", "--try"]])
def test_a_command_is_tried_only_of_a_page_and_on_a_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["learn", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) <= 2
