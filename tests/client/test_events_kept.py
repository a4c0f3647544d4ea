"""Commands are not lost among thousands of clips, in the run or in a snapshot."""

from __future__ import annotations

from tests.rows import step_row
from tui_trainer.client.api import SnapshotBuilder
from tui_trainer.client.connection import next_poll
from tui_trainer.history.records import ClipRecord, StepRecord
from tui_trainer.protocol.events import Clip, Notice
from tui_trainer.protocol.messages import Poll
from tui_trainer.protocol.schema import STEP_COLUMNS, RunInfo, Table
from tui_trainer.record.recorder import Recorder


def test_commands_are_kept_after_thousands_of_clips():
    recorder = Recorder(RunInfo("r", "gpt"))
    recorder.declare([Table(0, "step", STEP_COLUMNS)])
    clip = ClipRecord(1.0, 2.0, 0.5, (), ())
    for step in range(1, 20_001):
        row = (0, step_row(1, 1, 1, 1))
        recorder.record(StepRecord(step, float(step), "", (row,), clip))
        if step in (10, 100):
            recorder.notice("command", f"pause {step}", who="me")
        if step % 1000 == 0:
            assert recorder.update_for(Poll(event=1 << 60)).status.step == step
    seen, poll = SnapshotBuilder(), Poll(budget=1 << 20)
    more = True
    while more:
        update = recorder.update_for(poll)
        poll = next_poll(poll, update)
        seen.apply(update)
        more = update.more
    events = seen.snapshot.events
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices == ["pause 10", "pause 100"]
    numbers = [event.id for event in events]
    assert numbers == sorted(set(numbers))
    assert events[-1].step == 20_000
    assert isinstance(events[-1], Clip)
    assert 2_000 <= len(events) < 5_000
    assert recorder.close(240)
