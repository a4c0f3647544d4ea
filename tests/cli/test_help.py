"""Help and version: complete, quick to print, on stdout."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.cli.calling import call
from tui_trainer import __version__
from tui_trainer.cli import commands
from tui_trainer.cli.installed_tasks import load_task
from tui_trainer.cli.options import RunOptions
from tui_trainer.config.options import options_of


def flag(name: str) -> str:
    return "--break" if name == "breakpoints" else "--" + name.replace("_", "-")


@pytest.mark.parametrize("task", ["gpt", "vit"])
def test_every_option_of_a_task_is_there_with_its_help(task: str, tmp_path: Path) -> None:
    done = call(task, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(r"[│\s]+", " ", done.stdout)
    definition = load_task(task)
    for option in options_of(definition.config):
        assert re.search(rf"{option.flag}\b", text), option.flag
        assert all(choice in text for choice in option.choices)
        assert option.help.split()[0] in text
    for each in dataclasses.fields(RunOptions):
        assert flag(each.name) in text
    assert all(preset in text for preset in definition.presets)
    assert "--preset" in text


def test_the_defaults_shown_are_those_of_the_default_preset(tmp_path: Path) -> None:
    text = re.sub(r"[│\s]+", " ", call("gpt", "--help", cwd=tmp_path).stdout)
    definition = load_task("gpt")
    preset = definition.presets["light"]
    assert re.search(rf"--steps N number of optimizer steps \[default: {preset['steps']}\]", text)


def test_the_commands_are_listed(tmp_path: Path) -> None:
    done = call("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("gpt", "vit", "run", "--version", "--help", "--ascii", "--runs-dir"):
        assert word in done.stdout


def test_help_of_run(tmp_path: Path) -> None:
    done = call("run", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "SCRIPT" in done.stdout
    for each in dataclasses.fields(RunOptions):
        assert flag(each.name) in done.stdout


def test_the_version(tmp_path: Path) -> None:
    done = call("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_a_task_that_cannot_be_loaded_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    site = tmp_path / "site" / "broken-1.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (site / "entry_points.txt").write_text("[tui_trainer.tasks]\nbroken = nowhere:task\n")
    env = {"PYTHONPATH": str(site.parent)}
    helped = call("--help", cwd=tmp_path, env=env)
    assert helped.returncode == 0
    assert "gpt" in helped.stdout
    assert "the task broken cannot be loaded" in helped.stderr
    named = call("broken", cwd=tmp_path, env=env)
    assert named.returncode == 1
    assert "nowhere:task of broken" in named.stderr
    assert "Traceback" not in named.stderr


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return call("--help", cwd=tmp_path_factory.mktemp("help")).stdout


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_for_runs_has_help_of_one_voice(
    command: str, listed: str, tmp_path: Path
) -> None:
    done = call(command, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    about = done.stdout.split("\n\n")[1].strip()
    assert re.search(rf"│ {command} +{re.escape(about)} +│", listed)


def test_addresses_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    text = re.sub(r"[│\s]+", "", call("attach", "--help", cwd=tmp_path).stdout)
    assert "ssh://[user@]host[:port][/RUN]" in text


def test_help_imports_no_numbers(tmp_path: Path) -> None:
    """What a command needs is imported when it is called for: help is there at once."""
    done = call("--help", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "cyclopts" in imported
    assert not imported & {"numpy", "sqlite3", "textual", "torch", "psutil"}
