"""Wrong usage: exit status 2, one message, and the closest name as a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calling import assert_refused, call

WRONG = {
    "a misspelt command": (["gtp"], ["no command gtp", "did you mean gpt?"]),
    "a script without run": (["train.py"], ["no command train.py", "tui-trainer run train.py"]),
    "help as a command": (["help"], ["no command help", "--help"]),
    "a misspelt preset": (
        ["gpt", "--preset", "nanogpt-cp"],
        ["no preset 'nanogpt-cp'", "did you mean nanogpt-cpu?"],
    ),
    "a misspelt option": (["gpt", "--max-nrom", "1"], ["--max-nrom", "did you mean --max-norm?"]),
    "a misspelt option of run": (
        ["run", "--pausd", "x.py"],
        ["--pausd", "did you mean --paused?"],
    ),
    "a misspelt choice": (["gpt", "--clip", "nomr"], ["--clip cannot be 'nomr'", "norm"]),
    "a missing value": (["gpt", "--steps"], ["--steps needs a value"]),
    "a word for a number": (["gpt", "--steps", "many"], ["--steps cannot be 'many'", "number"]),
    "a fraction of a step": (["gpt", "--steps", "2.5"], ["--steps cannot be '2.5'"]),
    "no steps at all": (["gpt", "--steps", "0"], ["--steps cannot be '0'", "at least 1"]),
    "a negative norm": (["gpt", "--max-norm", "-1"], ["--max-norm cannot be '-1'"]),
    "heads that do not divide": (["gpt", "--heads", "5"], ["cannot be divided", "--heads"]),
    "steps and epochs": (["gpt", "--steps", "5", "--epochs", "1"], ["both --steps and --epochs"]),
    "an argument too many": (["gpt", "extra"], ["unexpected argument extra"]),
    "both formats": (["gpt", "--json", "--plain"], ["--json and --plain"]),
    "a budget over one": (["gpt", "--budget", "50"], ["invalid value", "--budget", "<= 1"]),
    "a budget of words": (["gpt", "--budget", "all"], ["--budget", "all"]),
    "a name with a slash": (["gpt", "--name", "a/b"], ["--name cannot be 'a/b'"]),
    "a name that climbs": (["gpt", "--name", "..", "--json"], ["--name cannot be"]),
    "no regular expression": (
        ["gpt", "--attention-pattern", "(q"],
        ["--attention-pattern is not a regular expression"],
    ),
    "a pattern without a layer": (
        ["gpt", "--attention-pattern", r"(?P<q>ask)|(?P<k>asked)|(?P<v>told)"],
        ["--attention-pattern lacks named groups", "(?P<layer>…)", "such as"],
    ),
    "a pattern without values": (
        ["gpt", "--attention-pattern", r"(?P<layer>.*)\.((?P<q>ask)|(?P<k>asked))"],
        ["--attention-pattern lacks named groups", "(?P<v>…)"],
    ),
    "run without a script": (["run", "--paused"], ["run needs a script"]),
    "run with half a module": (["run", "-m"], ["-m needs the name of a module"]),
    "a script that is not there": (["run", "nowhere.py"], ["no script nowhere.py"]),
    "a module that is not there": (["run", "-m", "nowhere.train"], ["no module nowhere.train"]),
    "a folder": (["run", "."], ["is a folder"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_is_refused(case: str, tmp_path: Path) -> None:
    arguments, messages = WRONG[case]
    done = call(*arguments, cwd=tmp_path, torch=False)
    assert_refused(done, *messages, status=2)
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists(), "it left a run behind"


def test_the_near_script_is_named(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text("")
    done = call("run", "train_gtp.py", cwd=tmp_path)
    assert_refused(done, "no script train_gtp.py", "did you mean train_gpt.py?", status=2)


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    done = call("gpt", "--name", "mine", "--steps", "1", cwd=tmp_path)
    assert_refused(done, "a run named mine already exists", status=2)


def test_runs_cannot_be_kept_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("gpt", "--runs-dir", tmp_path / "file", "--steps", "1", cwd=tmp_path)
    assert_refused(done, "cannot create a run", "--runs-dir", status=1)


def test_without_a_terminal_there_is_no_start_screen(tmp_path: Path) -> None:
    assert_refused(call(cwd=tmp_path), "not a terminal", "tui-trainer gpt", status=2)
