"""A branch that a script has left ends with the step and the loss that it had then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.run_state import read_state
from tui_trainer.protocol.messages import Status
from tui_trainer.record.events import InfoChanged
from tui_trainer.run.environment import initial_info
from tui_trainer.run.script_branches import BranchRecording, Segment


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
    recording.left("the script was taken back to step 1")
    recorder.status = Status(step=12)  # the next branch has begun before this one is closed
    recording.close()
    found = read_state(directory)
    assert found is not None
    assert (found.step, found.state) == (3, "stopped")
    assert found.reason == "the script was taken back to step 1"
