"""A branch of a script begins with the state that was asked for, and ends with the status that the
script left it with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from tui_trainer.config.run_spec import RunSpec, read_state
from tui_trainer.protocol.actions import Branch
from tui_trainer.protocol.messages import Status
from tui_trainer.record.sink_items import InfoChanged
from tui_trainer.run.environment import initial_info
from tui_trainer.run.host import Host
from tui_trainer.run.script_branches import BranchRecording, Segment
from tui_trainer.trace.gate import Refusal
from tui_trainer.travel.snapshots import SnapshotStore, TrainingSnapshot
from tui_trainer.travel.time_travel import TimeTravel


def test_a_branch_ends_with_the_status_it_was_left_with(tmp_path: Path) -> None:
    own = RunSpec(name="one", directory=str(tmp_path / "one"), task="script")
    directory = tmp_path / "one-2"
    spec = msgspec.structs.replace(
        own, name="one-2", directory=str(directory), parent=own.directory, branch_step=1
    )
    recorder: Any = SimpleNamespace(status=Status(step=7), notice=lambda *_, **__: None)
    segment = Segment(5, "one-2", directory, 4)
    recording = BranchRecording(spec, segment, "step 1 of one", "", recorder, print)
    recording.begin()
    recording.take([InfoChanged(initial_info(own))], recorder.status)
    recording.left("the script was rewound to step 1")
    recorder.status = Status(step=12)  # the next branch has begun before this one is closed
    recording.close()
    found = read_state(directory)
    assert found is not None
    assert (found.step, found.state) == (3, "stopped")
    assert found.reason == "the script was rewound to step 1"


def test_only_a_branch_from_another_step_needs_that_the_script_went_back(tmp_path: Path) -> None:
    begun, notices = [], []
    travel: Any = object.__new__(TimeTravel)
    travel.snapshots, travel.restored = SnapshotStore(1 << 20), (-1, -1)
    state: Any = SimpleNamespace(unshared_nbytes=0, held=list)
    travel.snapshots.add(TrainingSnapshot(4, state, None))
    gate = SimpleNamespace(mode="running", within_step=False, completed=8, resume=list, pause=list)
    travel._gate = gate

    def call_soon(work: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        try:
            done.set_result(work())
        except Refusal as refused:
            done.set_exception(refused)
        return done

    gate.call_soon = call_soon
    host: Any = SimpleNamespace(
        _time_travel=lambda: travel,
        _live_edits=lambda: SimpleNamespace(require_possible=list),
        gate=gate,
        recorder=SimpleNamespace(notice=lambda *given: notices.append(given[1])),
        _branches=SimpleNamespace(
            new_directory=lambda name: tmp_path / name,
            begin=lambda now, step, *_: begun.append((now, step)),
        ),
    )
    # The snapshot of step 4 could not be restored.
    Host._branch_in_script(host, Branch(name="two", back_to=5))
    assert begun == []
    assert notices == ["branch two could not be started: the script could not be rewound"]
    Host._branch_in_script(host, Branch(name="two"))
    assert begun == [(8, 8)]
    travel.restored = (8, 4)
    Host._branch_in_script(host, Branch(name="three", back_to=5))
    assert begun == [(8, 8), (8, 4)]
    assert len(notices) == 1
