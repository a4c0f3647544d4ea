"""`ls` lists the runs that continue another one below it."""

from __future__ import annotations

from pathlib import Path

from tui_trainer.cli.commands.ls import as_tree
from tui_trainer.config.run_spec import RunState
from tui_trainer.runs.liveness import RunEntry


def run(name: str, parent: str = "") -> RunEntry:
    reported = RunState(name=name, parent=f"/runs/{parent}" if parent else "")
    return RunEntry(name, Path("/runs") / name, "finished", reported)


def test_branches_stand_below_the_run_that_they_continue() -> None:
    runs = [
        run("c", "b"),
        run("other"),
        run("b2", "a"),
        run("b", "a"),
        run("lost", "removed"),
        run("a"),
    ]
    listed = [(depth, each.name) for depth, each in as_tree(runs)]
    assert listed == [(0, "other"), (0, "lost"), (0, "a"), (1, "b2"), (1, "b"), (2, "c")]


def test_runs_that_name_each_other_are_listed_once() -> None:
    runs = [run("a", "b"), run("b", "a"), run("own", "own")]
    assert sorted(each.name for _, each in as_tree(runs)) == ["a", "b", "own"]
