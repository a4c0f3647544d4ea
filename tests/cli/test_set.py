"""Settings of a real run, changed from another terminal: applied, recorded, shown and undone."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.calling import assert_refused, call, started
from tests.runs.starting import until
from tui_trainer.cli.run_summary import _shown_events
from tui_trainer.client.connection import RunClient
from tui_trainer.protocol.actions import StepPhase
from tui_trainer.protocol.events import Notice
from tui_trainer.runs.registry import resolve

OPTIONS = """
    --steps 40 --layers 1 --width 16 --heads 2 --block-size 8 --batch-size 4 --threads 1
    --device cpu --eval-batches 1 --sample-every 1000 --sample-length 8 --warmup-steps 0
    --schedule constant --learning-rate 0.001 --checkpoint-every 6
"""


def rates(directory: Path, cwd: Path) -> dict[int, float]:
    """The learning rate of each step that is recorded."""
    lines = call("export", directory, "--format", "jsonl", cwd=cwd).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["lr"] for row in rows if row.get("type") == "step"}


def test_a_live_run_is_changed_undone_and_resumed_with_the_change(tmp_path: Path) -> None:
    command = ("gpt", "--json", "--paused", "--name", "one", *OPTIONS.split())
    with started(*command, cwd=tmp_path):
        until(lambda: call("step", "one", "3", cwd=tmp_path).returncode == 0, "the run steps")
        listed = json.loads(call("set", "one", "--json", cwd=tmp_path).stdout)
        assert listed["settings"]["lr"] == 0.001
        assert listed["settings"]["clip"] == 1.0
        wrong = call("set", "one", "lr=1e-3", "momentum=0.9", cwd=tmp_path)
        assert_refused(wrong, "adamw has no momentum", "it has lr, weight_decay, betas, eps")
        wrong = call("set", "one", "rl=1", cwd=tmp_path)
        assert_refused(wrong, "there is no setting 'rl'", status=2)
        done = call("set", "one", "lr=3e-4", "freeze=blocks.0.*", cwd=tmp_path)
        assert done.stdout.startswith("one: lr 0.001 → 0.0003; freeze blocks.0.*: "), done
        assert done.stdout.endswith("from step 4 on\n")
        call("step", "one", "3", cwd=tmp_path)
        done = call("set", "one", "--undo", cwd=tmp_path)
        assert done.stdout.startswith("one: undone: lr 0.001 → 0.0003; freeze"), done
        call("step", "one", "2", cwd=tmp_path)
        shown = json.loads(call("show", "one", "--json", cwd=tmp_path).stdout)
        edits = [event for event in shown["events"] if event["kind"] == "edit"]
        assert [event["step"] for event in edits] == [3, 6]
        assert "undone: lr 0.001" in call("show", "one", cwd=tmp_path).stdout
        one = tmp_path / "runs" / "one"
        until(lambda: len(rates(one, tmp_path)) == 8, "eight steps are stored")
        found = rates(one, tmp_path)
        assert [found[step] for step in range(1, 9)] == [0.001] * 3 + [0.0003] * 3 + [0.001] * 2
        with RunClient.connect(
            resolve("one", tmp_path / "runs"), "test", read_only=False
        ) as client:
            assert client.command(StepPhase()).ok

            def in_a_step():
                client.poll()
                return client.snapshot.status.phase not in ("step", "")

            until(in_a_step, "the run has paused within step 9")
        done = call("set", "one", "lr=5", cwd=tmp_path)
        assert done.stdout == "one: at the end of step 9\n", done
        listed = json.loads(call("set", "one", "--json", cwd=tmp_path).stdout)
        assert listed["waiting"] == ["lr=5"]
        done = call("set", "one", "--undo", cwd=tmp_path)
        assert done.stdout == "one: withdrawn: lr=5\n", done
        listed = json.loads(call("set", "one", "--json", cwd=tmp_path).stdout)
        assert (listed["waiting"], listed["settings"]["lr"]) == ([], 0.001)
    # Killed: the checkpoint of step 6 was written before that change was undone.
    done = call("gpt", "--resume", "one@6", "--name", "two", "--json", "--steps", "8",
                cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done
    again = rates(tmp_path / "runs" / "two", tmp_path)
    assert again == {7: 0.0003, 8: 0.0003}


def test_changes_of_settings_are_shown_where_other_events_are_newer() -> None:
    events = [Notice(id=0, step=1, time=0.0, kind="edit", text="lr 0.1 → 0.2")]
    events += [Notice(id=n, step=n, time=0.0, kind="command", text="pause") for n in range(2, 20)]
    assert [each.id for each in _shown_events(events, 4)] == [0, 16, 17, 18, 19]
    assert [each.id for each in _shown_events(events[:3], 4)] == [0, 2, 3]
