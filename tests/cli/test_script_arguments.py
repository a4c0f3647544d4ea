"""Which arguments belong to tui-trainer and which to the script."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui_trainer.cli.errors import UsageError
from tui_trainer.cli.script import LauncherCommand, Script, find_launch, split

CASES = [
    (["train.py"], [], Script("train.py", ())),
    (["train.py", "--help", "--json"], [], Script("train.py", ("--help", "--json"))),
    (["--json", "train.py", "-x"], ["--json"], Script("train.py", ("-x",))),
    (["--name", "a", "t.py"], ["--name", "a"], Script("t.py", ())),
    (["--name=a", "t.py", "b"], ["--name=a"], Script("t.py", ("b",))),
    (["--paused", "t.py"], ["--paused"], Script("t.py", ())),
    (["--", "t.py", "--", "a"], [], Script("t.py", ("--", "a"))),
    (["--", "--odd.py"], [], Script("--odd.py", ())),
    (["-m", "pkg.train", "-m", "x"], [], Script("pkg.train", ("-m", "x"), module=True)),
    (["--ascii", "-m", "pkg"], ["--ascii"], Script("pkg", (), module=True)),
    (["--budget", "0.5"], ["--budget", "0.5"], None),
    (["--help"], ["--help"], None),
    ([], [], None),
]


@pytest.mark.parametrize(("arguments", "ours", "script"), CASES)
def test_split(arguments: list[str], ours: list[str], script: Script | None) -> None:
    assert split(arguments) == (ours, script)


def test_a_module_needs_its_name() -> None:
    with pytest.raises(UsageError):
        split(["--json", "-m"])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--epochs", "3", "t.py"], "go after the script: tui-trainer run t.py --epochs 3"),
        (["--lr=1e-3", "--json", "t.py"], "go after the script: tui-trainer run t.py --lr 1e-3"),
        (["--fast", "t.py"], "go after the script: tui-trainer run t.py --fast"),
        (["--fast"], "go after the script: tui-trainer run train.py --fast"),
        (["--deatch", "t.py"], "did you mean --detach?"),
    ],
)
def test_an_option_of_the_script_before_it(arguments: list[str], hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        split(arguments)
    assert hint in refused.value.hint


@given(st.lists(st.text()))
def test_whatever_follows_the_script_is_the_scripts(arguments: list[str]) -> None:
    assert split(["--json", "t.py", *arguments]) == (["--json"], Script("t.py", tuple(arguments)))


@pytest.mark.parametrize(
    ("script", "stem"),
    [
        (Script("work/train.py", ()), "train"),
        (Script("package.train", (), module=True), "train"),
        (Script("train", (), module=True), "train"),
        (Script("work/", ()), "work"),
        (Script(".", ()), Path.cwd().stem),
    ],
)
def test_the_default_name_of_a_run(script: Script, stem: str) -> None:
    assert script.stem == stem


@pytest.mark.parametrize(
    ("given", "added", "option"),
    [
        (["--num_gpus", "2"], ["--no_python", "--no_local_rank"], "--local_rank"),
        (["--no_local_rank"], ["--no_python", "--no_local_rank"], ""),
    ],
)
def test_deepspeed_puts_its_own_option_before_those_of_the_script(
    given: list[str], added: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "deepspeed"
    command.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    script = Script("deepspeed", (*given, "t.py", "--lr", "1"))
    launch = LauncherCommand(Script("t.py", ("--lr", "1")), (str(command), *given, *added), option)
    assert find_launch(script, None) == launch
