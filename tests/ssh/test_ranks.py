"""Ranks on several machines: rank 1 finds nothing of rank 0's on its own and goes through ssh."""

from __future__ import annotations

import contextlib
import os
import signal

import numpy as np
import pytest

from tests.run.test_ranks import RUN, LaunchFolder, column
from tests.runs.starting import until
from tests.ssh.sshd import PATH_WITH_US, Sshd
from tui_trainer.client.connection import RunClient
from tui_trainer.protocol import schema
from tui_trainer.protocol.actions import Pause, Resume, Step
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import StoreError


@pytest.fixture
def place(tmp_path):
    found = LaunchFolder(tmp_path)
    yield found
    found.end()


@pytest.fixture
def on_two_machines(place):
    """Variables of each rank: rank 1 is the first on its machine and has runs of its own there."""
    environment = {"PATH": PATH_WITH_US, "TUI_TRAINER_RUNS_DIR": str(place.runs)}
    sshd = Sshd(place.path / "sshd", environment)

    def variables(rank):
        if rank == 0:
            return {}
        elsewhere = str(place.path / "elsewhere")
        return {
            "LOCAL_RANK": "0",
            "TUI_TRAINER_RUNS_DIR": elsewhere,
            "TUI_TRAINER_SSH": sshd.command,
        }

    yield variables
    sshd.close()


def listening(place, name):
    try:
        run = place.run(name)
    except Exception:
        return None
    return run if run.live and (run.directory / "run.sock").exists() else None


def stored_ranks(place):
    """The ranks of which the store of the live run has rows."""
    try:
        history = StoredHistory(place.runs / "far")
    except StoreError:
        return []
    with contextlib.closing(history):
        return sorted(each.table.rank for each in history.tables_named(schema.RANKS))


@pytest.mark.slow
def test_ranks_on_another_machine_are_recorded_and_held_through_ssh(place, on_two_machines):
    over = ("--ranks-over", "ssh://Box")
    options = ("--name", "far", "--budget", "0", "--paused", *over)
    started = place.start(
        2, *RUN, *options, "train.py", each=on_two_machines, STEPS="1000000", PAUSE="0.01"
    )
    run = until(lambda: place.runs.is_dir() and listening(place, "far"), "the run listens")
    with RunClient.connect(run, "test", read_only=False) as client:

        def processes():
            client.poll()
            return client.snapshot.status.processes

        def held():
            found = processes()
            return len(found) == 2 and all(at.held for at in found)

        def together(step):
            return held() and {(at.step, at.phase) for at in processes()} == {(step, "step")}

        until(held, "both are held before the first step", 240)
        assert client.command(Step(3)).ok
        until(lambda: together(3), "both are held after three steps", 240)
        assert client.command(Resume()).ok
        moved = until(
            lambda: [at for at in processes() if at.rank == 1 and not at.held and at.step > 5],
            "the position of rank 1 is sent while it runs",
            240,
        )
        assert moved[0].for_s >= 0
        assert client.command(Pause()).ok
        until(held, "both are held again", 240)
        until(lambda: stored_ranks(place) == [0, 1], "steps of both are stored")
        started[1].send_signal(signal.SIGKILL)
        info = until(
            lambda: (
                client.poll()
                and client.snapshot.info
                and client.snapshot.info.processes[1].state == "lost"
                and client.snapshot.info
            ),
            "the loss of rank 1 is seen",
            240,
        )
    assert info.processes[1].host == os.uname().nodename
    assert info.processes[1].reason == f"closed its connection from {os.uname().nodename}"
    started[0].kill()
    started[0].wait()
    tables = place.tables("far")
    assert sorted(tables) == [0, 1]
    assert np.isfinite(column(tables[1], "loss")).all()
    assert not (place.path / "elsewhere").exists()


@pytest.mark.slow
def test_a_rank_on_another_machine_without_the_option_says_what_to_do(place, on_two_machines):
    command = (*RUN, "--name", "near", "train.py")
    for process in place.start(2, *command, each=on_two_machines, STEPS="20"):
        assert process.wait(240) == 0, place.errors(0) + place.errors(1)
    expected = "it is on another machine than rank 0 (to record it: tui-trainer run --ranks-over "
    assert expected + "ssh://127.0.0.1)" in place.errors(1)
    assert len(place.printed("WEIGHTS", 2)) == 2
    info = StoredHistory(place.runs / "near", ended=True).store.info()
    assert [(p.rank, p.state) for p in info.processes] == [(0, "finished"), (1, "waiting")]
