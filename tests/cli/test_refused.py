"""A refused start is reported once and leaves nothing; other crashed runs are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.calling import call
from tests.runs.starting import until
from tui_trainer.cli.run_setup import discard, discard_refused
from tui_trainer.config.run_spec import RunSpec, RunState, write_spec, write_state

SHORT = ["--steps", "3", "--device", "cpu", "--threads", "1", "--eval-batches", "1"]
SHORT += ["--sample-length", "8"]


def listed(place: Path) -> dict[str, dict[str, Any]]:
    done = call("ls", "--json", cwd=place)
    return {each["name"]: each for each in json.loads(done.stdout)}


@pytest.mark.parametrize("how", ["--plain", "--json"])
def test_a_device_that_is_not_there_leaves_no_run(how: str, tmp_path: Path) -> None:
    done = call("gpt", how, "--device", "cuda:99", cwd=tmp_path)
    assert done.returncode == 2
    assert "cuda:99" in done.stderr
    assert listed(tmp_path) == {}
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_script_that_is_not_python_leaves_no_run(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("for step in range(3)\n    pass\n")
    done = call("run", "bad.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "line 1" in done.stderr
    assert listed(tmp_path) == {}


@pytest.mark.parametrize(
    "program",
    ["raise ValueError('before any step')", "import sys; print('usage: …'); sys.exit(2)"],
)
def test_a_script_that_failed_before_its_first_step_stays(program: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(program)
    assert call("run", "train.py", cwd=tmp_path).returncode > 0
    (run,) = listed(tmp_path).values()
    assert (run["state"], run["step"]) == ("crashed", 0)


def test_a_name_is_free_again_after_a_refusal(tmp_path: Path) -> None:
    huge = ["--width", "131072", "--layers", "100"]
    assert call("gpt", *huge, *SHORT, "--name", "whole", cwd=tmp_path).returncode == 1
    assert listed(tmp_path) == {}
    assert call("gpt", *SHORT, "--name", "whole", cwd=tmp_path).returncode == 0
    assert list(listed(tmp_path)) == ["whole"]


def test_ls_shows_a_refused_detached_start(tmp_path: Path) -> None:
    """Without a viewer there was no one to report it to."""
    name = call("gpt", "--detach", "--device", "cuda:99", cwd=tmp_path).stdout.strip()
    until(lambda: listed(tmp_path)[name]["state"] == "crashed", "it is refused")
    run = listed(tmp_path)[name]
    assert run["note"].startswith("could not start: ")
    assert "cuda:99" in run["note"]
    assert "could not start" in call("ls", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("state", "refused", "kept"),
    [("crashed", True, False), ("crashed", False, True), ("finished", False, True)],
)
def test_nothing_but_a_refused_start_is_taken_away(
    state: str, refused: bool, kept: bool, tmp_path: Path
) -> None:
    spec = RunSpec(name="a", directory=str(tmp_path / "a"), task="gpt")
    write_spec(spec)
    write_state(spec.directory, RunState(name="a", state=state, refused=refused))
    discard_refused(spec)
    assert (tmp_path / "a").exists() is kept


def test_a_run_that_never_began_is_removed_unless_it_has_files(tmp_path: Path) -> None:
    for name in ("empty", "used"):
        write_spec(RunSpec(name=name, directory=str(tmp_path / name), task="gpt"))
    (tmp_path / "used" / "history.sqlite").write_bytes(b"rows")
    for name in ("empty", "used"):
        discard(RunSpec(name=name, directory=str(tmp_path / name), task="gpt"))
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
